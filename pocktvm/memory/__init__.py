"""One arena, every offset fixed at build time, and a verifier that trusts none of it."""

from pocktvm.memory.budget import check_budget
from pocktvm.memory.estimate import estimate
from pocktvm.memory.plan import plan
from pocktvm.memory.timeline import timeline
from pocktvm.memory.verify import verify

__all__ = ["check_budget", "estimate", "plan", "timeline", "verify"]
