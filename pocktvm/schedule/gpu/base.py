"""What the GPU's rules have in common."""

from __future__ import annotations

from collections.abc import Mapping

from pocktvm.schedule.rule import Knob, Task


class GpuRule:
    """A rule without knobs."""

    name = ""

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """None."""
        return {}
