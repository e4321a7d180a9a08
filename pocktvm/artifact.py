"""What `compile` returns: a folder that trains, with the plan that was printed for it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pocktvm.files import replacing_folder
from pocktvm.ir.artifact import Identity, SelfTest
from pocktvm.ir.kernels import Kernels
from pocktvm.ir.memory import MemoryPlan
from pocktvm.ir.target import Target


class Artifact:
    """A built artifact: a folder that trains, and what its build decided.

    path      its folder; a temporary one unless `out` was given (`save` copies it)
    plan      the memory plan, in bytes: arena_bytes, lower_bound_bytes, total_bytes, by_class
    updated   torch name -> share of the tensor that learns
    kernels   schedule rule -> calls of its kernels
    trade     what `budget` cost in time (levers.Trade); None where nothing had to give way
    """

    def __init__(
        self,
        path: Path,
        plan: MemoryPlan,
        identity: Identity,
        kernels: Mapping[str, int],
        keep: Any = None,
    ) -> None:
        self.path, self.plan, self.identity, self.kernels = path, plan, identity, kernels
        self.trade: Any = None  # what --budget cost, where levers were pulled (levers.Trade)
        self._keep = keep  # holds the temporary folder for as long as the artifact lives

    @classmethod
    def emit(
        cls,
        emitter: Callable[..., Path],
        kernels: Kernels,
        plan: MemoryPlan,
        identity: Identity,
        self_test: SelfTest,
        target: Target,
        out: str | Path | None,
    ) -> Artifact:
        """Write the folder with codegen's emitter and wrap it."""
        keep = tempfile.TemporaryDirectory(prefix="pocktvm-") if out is None else None
        folder = Path(keep.name) / identity.model if keep else Path(out or ".")
        path = emitter(kernels, plan, identity, self_test, target, folder)
        return cls(path, plan, identity, kernels.by_rule(), keep)

    @property
    def updated(self) -> dict[str, float]:
        """Torch name -> share of the tensor that learns."""
        return dict(self.identity.updated)

    def load(self, threads: int | None = None, seed: int = 0) -> Any:
        """A Trainer over this artifact, under the target's emulator where that is another machine.

        threads  None: as many as the artifact was built for, at most the cores that are online
        seed     of dropout's masks, 0 to 2**63 - 1

        PockError: the target is another machine's and its emulator is missing.
        """
        from pocktvm.runtime.trainer import load

        return load(self.path, threads=threads, seed=seed)

    def save(self, folder: str | Path) -> Path:
        """Copy the artifact to a folder, and return that; an older artifact there is replaced.

        PockError: the folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        if folder.resolve() != self.path.resolve():
            with replacing_folder(folder) as fresh:
                shutil.copytree(self.path, fresh, dirs_exist_ok=True)
        return folder
