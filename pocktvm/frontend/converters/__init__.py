"""Converters of torch operators to Relax, one file a family; importing it registers them.

Only operators that TVM converts wrongly or too coarsely are here; the rest are TVM's.
"""

from pocktvm.frontend.converters import attention, elementwise, shapes, spatial
from pocktvm.frontend.converters.registry import CONVERTERS

__all__ = ["CONVERTERS", "attention", "elementwise", "shapes", "spatial"]
