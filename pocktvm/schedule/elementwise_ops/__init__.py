"""One vector expression per elementwise operator (vocabulary: pocktvm/ir/ops.py)."""

from pocktvm.schedule.elementwise_ops import activations, arithmetic, gradients, masking, narrowing
from pocktvm.schedule.elementwise_ops.table import OPS

__all__ = ["OPS", "activations", "arithmetic", "gradients", "masking", "narrowing"]
