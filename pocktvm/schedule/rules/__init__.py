"""The schedule rules, in the order they are asked; the first that does not decline emits."""

from __future__ import annotations

from pocktvm.schedule.rule import Rule
from pocktvm.schedule.rules.conv import Conv
from pocktvm.schedule.rules.conv_input_grad import ConvInputGrad
from pocktvm.schedule.rules.conv_weight_grad import ConvWeightGrad
from pocktvm.schedule.rules.cross_entropy import CrossEntropy, CrossEntropyGrad
from pocktvm.schedule.rules.depthwise import DepthwiseConv, DepthwiseInputGrad, DepthwiseWeightGrad
from pocktvm.schedule.rules.depthwise_grads import DepthwiseGrads
from pocktvm.schedule.rules.elementwise import Elementwise
from pocktvm.schedule.rules.embedding import Take, TakeGrad
from pocktvm.schedule.rules.fallback import Fallback
from pocktvm.schedule.rules.inverted_residual import InvertedResidual
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.schedule.rules.movement import Movement
from pocktvm.schedule.rules.pool import Pool
from pocktvm.schedule.rules.products import Products
from pocktvm.schedule.rules.put import Put
from pocktvm.schedule.rules.reduce import Reduce
from pocktvm.schedule.rules.resize import Resize
from pocktvm.schedule.rules.rows import RowOperators
from pocktvm.schedule.rules.winograd import WinogradConv, WinogradWeight

RULES: tuple[Rule, ...] = (
    Elementwise(),
    InvertedResidual(),
    Products(),
    DepthwiseGrads(),
    Matmul(),
    Reduce(),
    DepthwiseConv(),
    DepthwiseInputGrad(),
    DepthwiseWeightGrad(),
    WinogradConv(),
    Conv(),
    ConvInputGrad(),
    WinogradWeight(),
    ConvWeightGrad(),
    Pool(),
    Resize(),
    CrossEntropy(),
    CrossEntropyGrad(),
    RowOperators(),
    Take(),
    TakeGrad(),
    Put(),
    Movement(),
    Fallback(),
)
