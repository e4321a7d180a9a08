"""`relax`: whatever our vocabulary does not name, computed by TVM's own legalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Node, Value
from pocktvm.reference.registry import Tensor, reference

Types = tuple[tuple[tuple[int, ...], str], ...]


@reference("relax")
def relax_operator(node: Node, args: Sequence[Tensor], outs: Sequence[Value]) -> Any:
    """Compiles the operator for this machine with TVM's default schedule, once per signature."""
    arrays = [a.detach().contiguous().numpy() for a in args]
    # legalized kernels know one float: values of a float64 evaluation pass through float32
    arrays = [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]
    types = tuple((a.shape, str(a.dtype)) for a in arrays)
    name, attributes = str(node.attrs["op"]), node.attrs.get("relax_attrs") or ""
    results = _compiled(name, str(attributes), types)(arrays)
    return tuple(torch.from_numpy(np.array(r)) for r in results)


@lru_cache(maxsize=256)
def _compiled(
    name: str, attributes: str, types: Types
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    from pocktvm.tvm_api import IRModule, relax, tvm

    variables = [relax.Var(f"x{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(types)]
    builder = relax.BlockBuilder()
    name = name if name.startswith(("relax.", "pocktvm.")) else f"relax.{name}"
    try:
        with builder.function("main", variables):
            attrs = tvm.ir.load_json(attributes) if attributes else None
            call = relax.Call(tvm.ir.Op.get(name), variables, attrs=attrs)
            builder.emit_func_output(builder.emit(call))
        module: IRModule = relax.transform.LegalizeOps()(builder.get())
        machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    except Exception as error:
        raise InternalError(f"TVM cannot legalize '{name}' for {types}: {error}") from error

    def call_machine(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        result = machine["main"](*[tvm.runtime.tensor(np.ascontiguousarray(a)) for a in arrays])
        return [result.numpy()] if hasattr(result, "numpy") else [r.numpy() for r in result]

    return call_machine
