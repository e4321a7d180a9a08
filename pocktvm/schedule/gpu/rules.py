"""The GPU's rules, in the order they are asked; the first that does not decline emits."""

from __future__ import annotations

from pocktvm.schedule.gpu.conv import Conv
from pocktvm.schedule.gpu.cross_entropy import CrossEntropy, CrossEntropyGrad
from pocktvm.schedule.gpu.depthwise import Depthwise
from pocktvm.schedule.gpu.elementwise import Elementwise
from pocktvm.schedule.gpu.embedding import Put, Take, TakeGrad
from pocktvm.schedule.gpu.fallback import Fallback
from pocktvm.schedule.gpu.matmul import Matmul
from pocktvm.schedule.gpu.movement import Movement
from pocktvm.schedule.gpu.reduce import Reduce
from pocktvm.schedule.gpu.rows import RowOperators
from pocktvm.schedule.gpu.spatial import Pool, Resize
from pocktvm.schedule.rule import Rule

GPU_RULES: tuple[Rule, ...] = (
    Elementwise(),
    Matmul(),
    Reduce(),
    Depthwise(),
    Conv(),
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
