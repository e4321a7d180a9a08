"""The only file that names what TVM moves between releases (0.27 today).

Importing it imports TVM (5 s of CPU). `tvm.s_tir.tensor_intrin` costs 70 s of CPU and is pulled in
by MetaSchedule; an empty package stands in for it, since our rules bring their own loop nests.
"""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

_stub = types.ModuleType("tvm.s_tir.tensor_intrin")
_stub.__path__ = []  # a package, so that a submodule can still be imported by name
sys.modules.setdefault("tvm.s_tir.tensor_intrin", _stub)

import tvm  # noqa: E402
from tvm import relax, te, tirx, topi  # noqa: E402
from tvm.ir import IRModule  # noqa: E402
from tvm.s_tir import Schedule  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.script.ir_builder import tirx as T  # noqa: E402
from tvm.target import Target as TvmTarget  # noqa: E402

__all__ = [
    "IRBuilder",
    "IRModule",
    "Schedule",
    "T",
    "TvmTarget",
    "relax",
    "te",
    "tirx",
    "topi",
    "tvm",
    "version",
]


def version() -> str:
    """TVM's version, for manifests and cache keys."""
    return str(tvm.__version__)


def compile_module(module: Any, target: Any) -> Any:
    """TVM's compilation of a module of loop nests.

    Storage rewriting is off: it drops the annotation that keeps `emit.local` off the heap, and has
    nothing to share, since every temporary is an argument.
    """
    with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_storage_rewrite": True}):
        return tvm.compile(module, target)


def device_source(func: Any, target: Any) -> tuple[str, list[dict[str, Any]]]:
    """CUDA C of a loop nest bound to GPU threads, and its launches in order.

    A launch is {"entry", "args", "grid", "block"}: `args` are indices of the function's buffers.
    No CUDA toolkit is needed: TVM writes text, and its prelude (for nvcc) is left off."""
    from tvm.tirx.build import codegen_build, split_host_device_mods

    config = {
        "tirx.disable_storage_rewrite": True,
        "tirx.UnrollLoop": {"auto_max_step": 0, "explicit_unroll": False},  # nvcc unrolls
    }
    with tvm.transform.PassContext(opt_level=3, config=config):
        module = tirx.transform.BindTarget(target)(IRModule({"main": func}))
        pipeline, _, finish = tvm.tirx.get_default_tir_pipeline(target)
        host, devices = split_host_device_mods(pipeline(module))
        sources = [codegen_build(finish()(m), target).inspect_source("cuda")
                   for m in devices.values()]  # fmt: skip
        functions = {
            str(f.attrs["global_symbol"]): f for m in devices.values() for f in m.functions.values()
        } if devices else {}
    text = "".join(source[source.index('extern "C"') :] for source in sources)
    return text, _launches(host, functions, [f"{p.name}_ptr" for p in func.params])


def _launches(host: Any, functions: dict[str, Any], names: list[str]) -> list[dict[str, Any]]:
    """The host function's calls of device functions, whose extents are all constants."""
    found: list[dict[str, Any]] = []
    assert len(set(names)) == len(names), f"arguments share a name: {names}"

    for function in host.functions.values():
        for call in _evaluated(function.body):
            entry = getattr(call.args[0], "value", None) if call.args else None
            if entry not in functions:
                continue
            device = functions[entry]
            n, tags = len(device.params), list(device.attrs["tirx.kernel_launch_params"])
            extents = {str(t): int(e) for t, e in zip(tags, call.args[1 + n :], strict=True)}
            found.append({
                "entry": str(entry),
                "args": [names.index(str(p.name)) for p in device.params],
                "grid": [extents.get(f"blockIdx.{a}", 1) for a in "xyz"],
                "block": [extents.get(f"threadIdx.{a}", 1) for a in "xyz"],
            })  # fmt: skip
    assert len(found) == len(functions), f"{len(functions)} functions, {len(found)} launches"
    return found


def _evaluated(stmt: Any) -> Iterator[Any]:
    """The calls a statement evaluates, in order."""
    if isinstance(getattr(stmt, "value", None), tvm.ir.Call) and isinstance(stmt, tirx.Evaluate):
        yield stmt.value
    for inner in (*getattr(stmt, "seq", ()), getattr(stmt, "body", None)):
        if inner is not None:
            yield from _evaluated(inner)


def tvm_target(description: Any) -> Any:
    """A TVM target from its JSON fields."""
    return TvmTarget(dict(description))


def torch_importer() -> type:
    """TVM's importer class for torch.export programs (imports torch)."""
    from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

    return ExportedProgramImporter


def onnx_converters() -> tuple[dict[str, Any], type]:
    """TVM's converters of ONNX operators by name, and the list type they take operands in."""
    from tvm.relax.frontend.onnx import onnx_frontend

    return onnx_frontend._get_convert_map(), onnx_frontend.onnx_input


def single_prim_func(expr: Any, params: list[Any]) -> Any | None:
    """The one TIR function that computes a Relax operator of `params`, or None without one.

    `expr` is a Relax call, or a function of tensor expressions to be called with the params."""
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            if isinstance(expr, tvm.ir.Call):
                call = builder.normalize(expr)
            else:
                call = builder.call_te(expr, *params)
            result = builder.emit_output(call)
        builder.emit_func_output(result)
    module = relax.transform.LegalizeOps()(builder.get())
    functions = [f for f in module.functions.values() if isinstance(f, tirx.PrimFunc)]
    if len(functions) != 1:
        return None
    return functions[0].with_attr("global_symbol", "main").with_attr("tirx.noalias", True)


def load_op(name: str) -> Any:
    """An operator by its full name, or Relax's by the name without `relax.`."""
    return tvm.ir.Op.get(name if name in _op_names() else f"relax.{name}")


@cache
def _op_names() -> frozenset[str]:
    return frozenset(str(n) for n in tvm.ir.Op.list_op_names())


def broadcast_matmul(
    a: Any, b: Any, shape: tuple[int, ...], transpose_a: bool, transpose_b: bool
) -> Any:
    """numpy's matmul of tensors of rank >= 2 as a tensor expression; batch axes broadcast."""
    depth = te.reduce_axis((0, a.shape[-2 if transpose_a else -1]), name="k")

    def element(tensor: Any, index: tuple[Any, ...], pair: tuple[Any, Any]) -> Any:
        rank = len(tensor.shape)
        outer = index[len(index) - rank : -2] if rank > 2 else ()
        batch = [0 if int(e) == 1 else i for e, i in zip(tensor.shape, outer, strict=False)]
        return tensor(*batch, *pair)

    def compute(*index: Any) -> Any:
        i, j = index[-2:]
        left = element(a, index, (depth, i) if transpose_a else (i, depth))
        right = element(b, index, (j, depth) if transpose_b else (depth, j))
        return te.sum(left * right, axis=depth)

    return te.compute(shape, compute, name="matmul")


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
    sizes = []
    for buffer in temporaries:
        elements = 1
        for extent in buffer.shape:
            elements *= int(extent)
        sizes.append((elements, str(buffer.dtype)))
    bare = tvm.s_tir.SBlock(
        root.iter_vars, root.reads, root.writes, root.name_hint, root.body, root.init, [],
        root.match_buffers, root.annotations,
    )  # fmt: skip
    body = tvm.s_tir.SBlockRealize(realize.iter_values, realize.predicate, bare)
    params = [*func.params, *temporaries]
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs), tuple(sizes)


def buffer_types(func: Any) -> list[tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every buffer argument of a TIR function."""
    return [(tuple(int(e) for e in p.shape), str(p.dtype)) for p in func.params]


def meta_schedule() -> Any:
    """TVM's MetaSchedule, with `utils.derived_object` where it was before it moved."""
    from tvm.ir.utils import derived_object
    from tvm.s_tir import meta_schedule as module

    # its tables would go to the terminal, and to stdout beside --json
    logging.getLogger("tvm.s_tir.meta_schedule").setLevel(logging.CRITICAL)
    if not hasattr(module.utils, "derived_object"):
        module.utils.derived_object = derived_object
    return module


def rpc_module() -> Any:
    """TVM's RPC client (trackers, sessions)."""
    from tvm import rpc

    return rpc
