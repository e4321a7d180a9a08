"""Where tuning records lie; apart from what reads them, which needs TVM."""

from __future__ import annotations

import os
from pathlib import Path


def logs_dir() -> Path:
    """$POCKTVM_TUNING_LOGS, else `tuning_logs/` of the checkout, else the user's cache."""
    if path := os.environ.get("POCKTVM_TUNING_LOGS"):
        return Path(path)
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").exists():
        return checkout / "tuning_logs"
    return Path.home() / ".cache" / "pocktvm" / "tuning_logs"
