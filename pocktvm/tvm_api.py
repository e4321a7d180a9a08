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
from tvm.s_tir import Schedule  # noqa: E402
from tvm.target import Target as TvmTarget  # noqa: E402

__all__ = ["IRBuilder", "IRModule", "Schedule", "T", "TvmTarget", "relax", "tirx", "tvm", "version"]


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


def single_prim_func(expr: Any, params: list[Any]) -> Any | None:
    """The one TIR function that computes a Relax expression of `params`, or None without one.

    Several operators are fused into one function. Raises nothing for an operator TVM cannot
    legalize: it returns None."""
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit_output(builder.normalize(expr))
        builder.emit_func_output(result)
    passes = [relax.transform.LegalizeOps(), relax.transform.FoldConstant()]
    if len(_calls(builder.get())) > 1:
        passes += [
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FuseOps(fuse_opt_level=2),
            relax.transform.FuseTIR(),
        ]
    module = tvm.transform.Sequential(passes)(builder.get())
    functions = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    if len(functions) != 1:
        return None
    return functions[0].with_attr("global_symbol", "main").with_attr("tirx.noalias", True)


def _calls(module: Any) -> list[Any]:
    return [b for block in module["main"].body.blocks for b in block.bindings]


def load_attrs(text: str) -> Any:
    """An operator's attributes from the JSON that `save_attrs` wrote; None from ''."""
    return tvm.ir.load_json(text) if text else None


def save_attrs(attrs: Any) -> str:
    """An operator's attributes as JSON, '' for none."""
    return tvm.ir.save_json(attrs) if attrs is not None else ""


def hoist_allocations(func: Any) -> tuple[Any, tuple[tuple[int, str], ...]]:
    """Make the root block's temporaries arguments of the function.

    Returns the function and the temporaries as (elements, dtype), in argument order."""
    realize = func.body
    root = realize.block
    temporaries = list(root.alloc_buffers)
    if not temporaries:
        return func, ()
    params, buffers = list(func.params), dict(func.buffer_map.items())
    sizes = []
    for number, buffer in enumerate(temporaries):
        handle = tirx.Var(f"t{number}", "handle")
        params.append(handle)
        buffers[handle] = buffer
        elements = 1
        for extent in buffer.shape:
            elements *= int(extent)
        sizes.append((elements, str(buffer.dtype)))
    bare = tirx.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, root.body, root.init, [],
        root.match_buffers, root.annotations,
    )  # fmt: skip
    body = tirx.SBlockRealize(realize.iter_values, realize.predicate, bare)
    return tirx.PrimFunc(params, body, func.ret_type, buffers, func.attrs), tuple(sizes)
