"""Where candidates run: what every runner does, and which one the user asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from pocktvm.errors import PockError
from pocktvm.ir.target import Target

TIMEOUT_SECONDS = 20.0


class CandidateError(Exception):
    """A candidate that crashed, hung or computed something else."""


class Runner(Protocol):
    """Times candidate folders; every task starts with `reset`."""

    def reset(self) -> None:
        """The next candidate timed is the one later ones must agree with."""

    def time(self, folder: Path) -> float:
        """Median seconds of a candidate. Raises CandidateError."""

    def compare(self, first: Path, second: Path) -> tuple[float, float]:
        """Median seconds of two candidates, interleaved."""

    def close(self) -> None:
        """Let go of processes and connections."""


def open_runner(text: str, target: Target, threads: int | None = None) -> Runner:
    """A runner from `local`, `emulated`, `ssh://pi@host` or `rpc://host:port/key`.

    PockError: it does not fit the target, cannot be reached, or is none of these."""
    from pocktvm.tuning.runner_emulated import EmulatedRunner
    from pocktvm.tuning.runner_local import LocalRunner
    from pocktvm.tuning.runner_rpc import RpcRunner
    from pocktvm.tuning.runner_ssh import SshRunner

    if text == "local":
        if not target.is_host:
            raise PockError(
                f"--runner local times kernels on this machine, but the target is {target.name}.\n"
                "  Use --runner ssh://pi@host, rpc://host:port/key with boards behind a TVM "
                "tracker,\n  or emulated, which counts instructions (aarch64)."
            )
        return LocalRunner(threads)
    if text == "emulated":
        return EmulatedRunner(target)
    if text.startswith("ssh://"):
        return SshRunner(text.removeprefix("ssh://"), target, threads)
    match = re.fullmatch(r"rpc://([\w.-]+):(\d+)/([\w.-]+)", text)
    if match:
        return RpcRunner(match[1], int(match[2]), match[3])
    raise PockError(
        f"unknown runner '{text}': use local, emulated, ssh://pi@host, or rpc://host:port/key."
    )
