"""The reference: a plain torch interpreter of any graph, fused or not, in either layout.

It is the oracle for gradients, passes, kernels and the self-test every artifact carries, so it
shares no code with them: each operator is one call of torch. A file of this package is one family
of operators; `registry.RULES` holds them by name.
"""

from pocktvm.reference import (  # noqa: F401  (imported for their registrations)
    dropout,
    elementwise,
    legalized,
    linear,
    rows,
    shape,
    spatial,
)
from pocktvm.reference.interpret import Result, eval_node, evaluate
from pocktvm.reference.registry import RULES

__all__ = ["RULES", "Result", "eval_node", "evaluate"]
