"""The only file that names what TVM moves between releases (0.27 today).

Importing it imports TVM (5 s of CPU). `tvm.s_tir.tensor_intrin` costs 70 s of CPU and is pulled in
by MetaSchedule; an empty package stands in for it, since our rules bring their own loop nests.
"""

from __future__ import annotations

import sys
import types
from typing import Any

_stub = types.ModuleType("tvm.s_tir.tensor_intrin")
_stub.__path__ = []  # a package, so that a submodule can still be imported by name
sys.modules.setdefault("tvm.s_tir.tensor_intrin", _stub)

import tvm  # noqa: E402
from tvm import relax, tirx  # noqa: E402
from tvm.ir import IRModule  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.script.ir_builder import tirx as T  # noqa: E402
from tvm.target import Target as TvmTarget  # noqa: E402

__all__ = ["IRBuilder", "IRModule", "T", "TvmTarget", "relax", "tirx", "tvm", "version"]


def version() -> str:
    """TVM's version, for manifests and cache keys."""
    return str(tvm.__version__)


def tvm_target(description: Any) -> Any:
    """A TVM target from its JSON fields."""
    return TvmTarget(dict(description))


def torch_importer() -> type:
    """TVM's importer class for torch.export programs (imports torch)."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return ExportedProgramImporter
