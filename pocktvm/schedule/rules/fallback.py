"""Any operator TVM can legalize, with a default schedule: outer axes parallel, inner vectorised.

The last rule: it accepts every single node whose operator Relax knows (or that can be spelt with
Relax operators), so that nothing a frontend imports is refused for want of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pocktvm.errors import PockError
from pocktvm.ir.graph import Node
from pocktvm.ir.target import Target
from pocktvm.registry import entry
from pocktvm.schedule.default_schedule import schedule_prim_func
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.tvm_api import broadcast_matmul, load_attrs, load_op, relax, single_prim_func, topi

Expr = Any
SPELLINGS: dict[str, Callable[[list[Expr], Node, tuple[int, ...], str], Expr]] = {}


def spell(*names: str) -> Callable[[Any], Any]:
    """Register how an operator is written in Relax: (operands, node, out shape, out dtype)."""
    return entry(SPELLINGS, *names)


class Fallback(Knobless):
    """One node, through TVM's own legalization."""

    name = "fallback"

    def decline(self, task: Task) -> str | None:
        """Groups are split by the driver before they come here."""
        if task.node.body:
            return "the fallback takes single operators"
        if task.node.op not in SPELLINGS:
            return f"no spelling of '{task.node.op}' in Relax"
        return None

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Legalize, then schedule every block; temporaries become workspace arguments."""
        node = task.node
        operands = [
            relax.const(task.literals[n], task.values[n].dtype)
            if n in task.literals
            else relax.Var(f"a{i}", relax.TensorType(task.shape(n), task.values[n].dtype))
            for i, n in enumerate(node.inputs)
        ]
        out = task.values[node.outputs[0]]
        expr = SPELLINGS[node.op](operands, node, out.shape, out.dtype)
        func = single_prim_func(expr, [o for o in operands if isinstance(o, relax.Var)])
        if func is None:
            raise PockError(
                f"TVM has no implementation of '{node.op}' (layer '{node.layer}').\n"
                "  Write the model without it, or add a rule to pocktvm/schedule/rules/."
            )
        func, workspaces = self.schedule(func, task.target)
        return Emitted(func, workspaces=workspaces)

    def schedule(self, func: Any, target: Target) -> tuple[Any, tuple[tuple[int, str], ...]]:
        """The function with a loop order for the target, and its temporaries."""
        return schedule_prim_func(func, target)


@spell("relax")
def _relax(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.Call(load_op(node.attrs["op"]), a, attrs=load_attrs(node.attrs["relax_attrs"]))


def _reduction(function: Any) -> Any:
    def write(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
        return function(a[0], list(node.attrs["axes"]), node.attrs.get("keepdims", False))

    return write


for _name in ("sum", "mean", "max", "min", "prod"):
    SPELLINGS[_name] = _reduction(getattr(relax.op, _name))


@spell("argmax")
def _argmax(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    axis, keep = node.attrs["axis"], node.attrs.get("keepdims", False)
    return relax.op.astype(relax.op.argmax(a[0], axis, keep), dtype)


@spell("softmax")
def _softmax(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.op.nn.softmax(a[0], node.attrs["axis"])


@spell("log_softmax")
def _log_softmax(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.op.nn.log_softmax(a[0], node.attrs["axis"])


@spell("softmax_grad")
def _softmax_grad(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    axis = node.attrs["axis"]
    return lambda dy, y: topi.multiply(topi.subtract(dy, topi.sum(dy * y, axis, True)), y)


@spell("log_softmax_grad")
def _log_softmax_grad(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    axis = node.attrs["axis"]
    return lambda dy, y: topi.subtract(dy, topi.multiply(topi.exp(y), topi.sum(dy, axis, True)))


@spell("matmul")
def _matmul(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    flags = bool(node.attrs.get("transpose_a")), bool(node.attrs.get("transpose_b"))
    return lambda x, y: broadcast_matmul(x, y, shape, *flags)


@spell("permute_dims")
def _permute_dims(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.op.permute_dims(a[0], list(node.attrs["axes"]))


@spell("broadcast_to")
def _broadcast_to(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.op.broadcast_to(a[0], shape)


@spell("concat")
def _concat(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.op.concat(a, node.attrs["axis"])


@spell("take")
def _take(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.op.take(a[0], a[1], node.attrs["axis"])


@spell("gather_elements")
def _gather_elements(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    return relax.op.gather_elements(a[0], a[1], node.attrs["axis"])


@spell("scatter_add_elements")
def _scatter_add(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    axis = node.attrs["axis"]
    return lambda dy, indices: topi.scatter_elements(
        topi.full(shape, dtype, 0.0), indices, dy, axis, "add"
    )


@spell("cumsum")
def _cumsum(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    axis, exclusive = node.attrs["axis"], node.attrs.get("exclusive", False)
    if not node.attrs.get("reverse"):
        return lambda x: topi.cumsum(x, axis, dtype, exclusive)
    return lambda x: topi.flip(topi.cumsum(topi.flip(x, axis), axis, dtype, exclusive), axis)


@spell("strided_slice")
def _strided_slice(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    at = node.attrs
    axes = list(range(len(at["begin"])))
    return relax.op.strided_slice(
        a[0], axes, list(at["begin"]), list(at["end"]), list(at["strides"])
    )


@spell("pad")
def _pad(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    at = node.attrs
    return relax.op.nn.pad(
        a[0], list(at["pad_width"]), at.get("value", 0.0), at.get("mode", "constant")
    )


@spell("resize2d")
def _resize2d(a: list[Expr], node: Node, shape: tuple[int, ...], dtype: str) -> Expr:
    at = node.attrs
    spatial = shape[1:3] if at["layout"] == "NHWC" else shape[2:4]
    mode = (
        "align_corners"
        if at.get("align_corners")
        else ("half_pixel" if at["method"] == "linear" else "asymmetric")
    )
    return relax.op.image.resize2d(
        a[0],
        tuple(spatial),
        layout=at["layout"],
        method=at["method"].replace("nearest", "nearest_neighbor"),
        coordinate_transformation_mode=mode,
        rounding_method="floor",
    )
