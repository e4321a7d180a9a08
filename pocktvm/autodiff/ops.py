"""Operators of our own inside Relax: `pocktvm.<name>`, one for every name of ir/ops.py.

A Relax function is prepared into these before it is differentiated, so that a gradient rule reads
and writes the same vocabulary as the passes and the schedule rules. A call carries its result's
shapes and dtypes as attributes; that is the whole type inference.

An `Emitter` writes calls: one method an operator where there is something to decide, `op` for the
rest. Arguments may be Python numbers (they become rank-0 constants of the other operand's dtype).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocktvm.ir.ops import BINARY, ELEMENTWISE, REDUCTIONS, SPATIAL
from pocktvm.tvm_api import relax, tvm

PREFIX = "pocktvm."
NAMES = sorted(
    ELEMENTWISE
    | REDUCTIONS
    | SPATIAL
    | set(
        "matmul softmax log_softmax softmax_grad log_softmax_grad layer_norm layer_norm_grad "
        "rms_norm rms_norm_grad cross_entropy cross_entropy_grad take take_grad gather_elements "
        "scatter_add_elements argmax cumsum reshape permute_dims broadcast_to concat dropout "
        "strided_slice strided_slice_grad pad".split()
    )
)
_BOOL = frozenset(
    "equal not_equal less less_equal greater greater_equal logical_and logical_or "
    "logical_not".split()
)
_NARROW = {"int64": "int32", "float64": "float32", "float16": "float32", "bfloat16": "float32"}

Expr = Any
Shape = tuple[int, ...]


def _infer_type(call: Expr, _builder: Expr) -> Expr:
    types = [
        relax.TensorType([int(d) for d in shape], str(dtype))
        for shape, dtype in zip(call.attrs["shapes"], call.attrs["dtypes"], strict=True)
    ]
    return types[0] if len(types) == 1 else relax.TupleType(types)


def _register(name: str) -> None:
    tvm.ir._ffi_api.RegisterOp(PREFIX + name, "an operator of pocktvm/ir/ops.py")
    tvm.ir.op.register_op_attr(PREFIX + name, "FInferType", _infer_type)
    tvm.ir.op.register_op_attr(PREFIX + name, "FPurity", True)


for _name in NAMES:
    _register(_name)


def own_call(
    name: str, args: Sequence[Expr], shapes: Sequence[Shape], dtypes: Sequence[str], **attrs: Any
) -> Expr:
    """A call of `pocktvm.<name>`; attributes that are None are left out."""
    kept = {key: value for key, value in attrs.items() if value is not None}
    node = tvm.ir.make_node(
        "ir.DictAttrs", shapes=[list(s) for s in shapes], dtypes=list(dtypes), **kept
    )
    return relax.Call(tvm.ir.Op.get(PREFIX + name), list(args), attrs=node)


def op_name(call: Expr) -> str:
    """`conv2d` for one of our operators, `relax.<…>` for one of TVM's."""
    return str(call.op.name).removeprefix(PREFIX)


def attrs_of(call: Expr) -> dict[str, Any]:
    """The attributes of a call of ours as plain Python values, without the result's types."""
    return {k: plain(v) for k, v in call.attrs.items() if k not in ("shapes", "dtypes")}


def plain(value: Any) -> Any:
    """TVM's containers and immediates as tuples, numbers and strings."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "value") and isinstance(value.value, bool | int | float):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | tvm.ir.Array):
        return tuple(plain(v) for v in value)
    if isinstance(value, relax.Tuple):
        return tuple(plain(v) for v in value.fields)
    if isinstance(value, relax.ShapeExpr):
        return tuple(int(v) for v in value.values)
    return value


def shape_of(expr: Expr) -> Shape:
    """The static shape of a tensor."""
    return tuple(int(d) for d in expr.ty.shape)


def dtype_of(expr: Expr) -> str:
    """The dtype of a tensor, narrowed as `narrow` does."""
    dtype = expr.ty.dtype
    return narrow(str(getattr(dtype, "dtype", dtype)))


def narrow(dtype: str) -> str:
    """What the device computes in: 32 bits."""
    return _NARROW.get(dtype, dtype)


def constant(value: Any, dtype: str | None = None) -> Expr:
    """A constant of a narrowed dtype."""
    array = np.asarray(value)
    return relax.const(array.astype(dtype or narrow(str(array.dtype))))


def is_const(expr: Expr) -> bool:
    """True for a value known at build time (parameters are not)."""
    return isinstance(expr, tvm.ir.expr.GenericConst)


def scalar_value(expr: Expr) -> float | None:
    """The number a constant of one element (or of equal ones) holds, else None."""
    if not is_const(expr):
        return None
    array = expr.value.numpy()
    if array.size == 0 or (array.size > 1 and not np.all(array == array.flat[0])):
        return None
    return float(array.flat[0])


def variable_name(layer: str, name: str) -> str:
    """A Relax variable's name telling its layer; BlockBuilder turns dots into underscores."""
    return f"{layer.replace('.', '/')}:{name}" if layer else name


def layer_and_name(variable: str) -> tuple[str, str]:
    """The layer of a variable and its whole name, with dots again."""
    layer, colon, name = variable.rpartition(":")
    layer = layer.replace("/", ".")
    return layer, f"{layer}{colon}{name}"


@dataclass(frozen=True)
class Found:
    """A call seen by a pattern (a Relax call itself refuses to be tested for truth)."""

    op: str
    args: tuple[Expr, ...]
    attrs: Mapping[str, Any]


class Emitter:
    """Writes our operators into a BlockBuilder, named after the layer they belong to.

    `calls` holds what each variable was bound to, for patterns that look back.
    """

    def __init__(self, builder: Any, layer: str = "", suffix: str = "") -> None:
        self.builder = builder
        self.layer = layer
        self.suffix = suffix
        self.calls: dict[Any, Expr] = {}
        self.padding: Mapping[str, int] = {}  # embedding table -> its padding row
        self.drops: int | None = None  # dropouts written so far; None: they are identities

    def bind(self, expr: Expr, name: str) -> Expr:
        """Bind an expression to a new variable of the current layer."""
        suffix = "" if name.endswith(self.suffix) else self.suffix
        var = self.builder.emit(expr, name_hint=variable_name(self.layer, f"{name}{suffix}"))
        self.calls[var] = expr
        return var

    def op(
        self, name: str, *args: Expr, shape: Shape, dtype: str = "float32", **attrs: Any
    ) -> Expr:
        """Any operator with one result."""
        return self.bind(own_call(name, args, [shape], [dtype], **attrs), name)

    def many(
        self, name: str, *args: Expr, shapes: Sequence[Shape], **attrs: Any
    ) -> tuple[Expr, ...]:
        """A float operator with several results."""
        call = own_call(name, args, shapes, ["float32"] * len(shapes), **attrs)
        var = self.bind(call, name)
        items = [relax.TupleGetItem(var, i) for i in range(len(shapes))]
        return tuple(self.bind(item, f"{name}{i}") for i, item in enumerate(items))

    def call_of(self, expr: Expr, *names: str) -> Found | None:
        """The call that computes `expr` when it is one of our operators `names`, else None."""
        call = self.calls.get(expr) if isinstance(expr, relax.Var) else None
        if call is None or not isinstance(call, relax.Call) or op_name(call) not in names:
            return None
        return Found(op_name(call), tuple(call.args), attrs_of(call))

    # -- elementwise ---------------------------------------------------------------------------

    def unary(self, name: str, x: Expr, **attrs: Any) -> Expr:
        """Same shape, same dtype (bool for logical operators)."""
        dtype = "bool" if name in _BOOL else dtype_of(x)
        return self.op(name, x, shape=shape_of(x), dtype=dtype, **attrs)

    def binary(self, name: str, a: Expr | float, b: Expr | float) -> Expr:
        """Broadcasting as numpy does; either operand may be a Python number."""
        assert name in BINARY, name
        if isinstance(a, int | float):
            a = constant(a, dtype_of(b))
        if isinstance(b, int | float):
            b = constant(b, dtype_of(a))
        shape = tuple(np.broadcast_shapes(shape_of(a), shape_of(b)))
        a, b = self._thin(a, b, shape), self._thin(b, a, shape)
        dtype = "bool" if name in _BOOL else dtype_of(a)
        return self.op(name, a, b, shape=shape, dtype=dtype)

    def _thin(self, x: Expr, other: Expr, shape: Shape) -> Expr:
        """Without a broadcast that the operator does by itself."""
        call = self.call_of(x, "broadcast_to")
        if call is not None and shape_of(other) == shape:
            return call.args[0]
        return x

    def add(self, a: Expr | float, b: Expr | float) -> Expr:
        """a + b."""
        return self.binary("add", a, b)

    def subtract(self, a: Expr | float, b: Expr | float) -> Expr:
        """a - b."""
        return self.binary("subtract", a, b)

    def multiply(self, a: Expr | float, b: Expr | float) -> Expr:
        """a * b, or the other operand where one is the constant 1."""
        for x, other in ((a, b), (b, a)):
            one = x == 1 if isinstance(x, int | float) else scalar_value(x) == 1
            if one and not isinstance(other, int | float):
                lone = isinstance(x, int | float) or shape_of(x) == ()
                if lone:
                    return other
        return self.binary("multiply", a, b)

    def divide(self, a: Expr | float, b: Expr | float) -> Expr:
        """a / b."""
        return self.binary("divide", a, b)

    def where(self, condition: Expr, a: Expr | float, b: Expr | float) -> Expr:
        """a where the condition holds, else b."""
        a = constant(a, "float32") if isinstance(a, int | float) else a
        b = constant(b, "float32") if isinstance(b, int | float) else b
        shape = tuple(np.broadcast_shapes(shape_of(condition), shape_of(a), shape_of(b)))
        return self.op("where", condition, a, b, shape=shape, dtype=dtype_of(a))

    def dropout(self, x: Expr, p: float) -> Expr:
        """x with a share p of its elements dropped, each dropout by a mask of its own."""
        if self.drops is None or p <= 0.0:
            return x
        if p >= 1.0:
            return self.multiply(x, 0.0)
        key, self.drops = self.drops, self.drops + 1
        return self.op("dropout", x, shape=shape_of(x), p=p, key=key)

    def astype(self, x: Expr, dtype: str) -> Expr:
        """x in another dtype."""
        dtype = narrow(dtype)
        if dtype == dtype_of(x):
            return x
        return self.op("astype", x, shape=shape_of(x), dtype=dtype)

    # -- shape ---------------------------------------------------------------------------------

    def reshape(self, x: Expr, shape: Sequence[int]) -> Expr:
        """x in another shape of as many elements: a view."""
        shape = tuple(shape)
        if is_const(x):
            return constant(x.value.numpy().reshape(shape))
        call = self.call_of(x, "reshape")
        x = x if call is None else call.args[0]
        return x if shape_of(x) == shape else self.op("reshape", x, shape=shape, dtype=dtype_of(x))

    def broadcast_to(self, x: Expr, shape: Sequence[int]) -> Expr:
        """x repeated to `shape`."""
        shape = tuple(shape)
        if shape_of(x) == shape:
            return x
        return self.op("broadcast_to", x, shape=shape, dtype=dtype_of(x))

    def permute(self, x: Expr, axes: Sequence[int]) -> Expr:
        """Axis i of the result is axis axes[i] of x."""
        axes = tuple(axes)
        call = self.call_of(x, "permute_dims")
        if call is not None:
            inner = call.attrs["axes"]
            x, axes = call.args[0], tuple(inner[a] for a in axes)
        if axes == tuple(range(len(axes))):
            return x
        shape = shape_of(x)
        out = tuple(shape[a] for a in axes)
        return self.op("permute_dims", x, shape=out, dtype=dtype_of(x), axes=axes)

    def slice(
        self, x: Expr, begin: Sequence[int], end: Sequence[int], strides: Sequence[int]
    ) -> Expr:
        """x[begin:end:strides]; the numbers lie inside x, one per axis."""
        shape = tuple(len(range(*t)) for t in zip(begin, end, strides, strict=True))
        if shape == shape_of(x) and all(s == 1 for s in strides):
            return x
        attrs = {"begin": tuple(begin), "end": tuple(end), "strides": tuple(strides)}
        return self.op("strided_slice", x, shape=shape, dtype=dtype_of(x), **attrs)

    def narrow_axis(self, x: Expr, axis: int, begin: int, end: int) -> Expr:
        """x[begin:end] along one axis."""
        shape = shape_of(x)
        begins, ends = [0] * len(shape), list(shape)
        begins[axis], ends[axis] = begin, end
        return self.slice(x, begins, ends, [1] * len(shape))

    def concat(self, xs: Sequence[Expr], axis: int) -> Expr:
        """xs one after another along `axis`."""
        if len(xs) == 1:
            return xs[0]
        shape = list(shape_of(xs[0]))
        shape[axis] = sum(shape_of(x)[axis] for x in xs)
        return self.op("concat", *xs, shape=tuple(shape), dtype=dtype_of(xs[0]), axis=axis)

    # -- reductions and products ----------------------------------------------------------------

    def reduce(self, name: str, x: Expr, axes: Sequence[int], keepdims: bool = False) -> Expr:
        """sum, mean, max, min or prod over `axes`."""
        axes, shape = tuple(sorted(axes)), shape_of(x)
        if not axes:
            return x
        kept = [1 if i in axes else d for i, d in enumerate(shape)]
        out = kept if keepdims else [d for i, d in enumerate(shape) if i not in axes]
        attrs = {"axes": axes, "keepdims": keepdims}
        return self.op(name, x, shape=tuple(out), dtype=dtype_of(x), **attrs)

    def sum_to(self, x: Expr, shape: Sequence[int]) -> Expr:
        """The gradient of broadcasting from `shape` to x's shape."""
        shape, have = tuple(shape), shape_of(x)
        if have == shape:
            return x
        padded = (1,) * (len(have) - len(shape)) + shape
        if padded != have:
            # axes of one are summed too: what remains is the plain vector, matrix, … of `shape`
            x = self.reduce("sum", x, [i for i, p in enumerate(padded) if p == 1])
        return self.reshape(x, shape)

    def matmul(self, a: Expr, b: Expr, ta: bool = False, tb: bool = False) -> Expr:
        """The product over the last two axes, either operand transposed; equal batch axes."""
        (*batch, m, _), (*other, _, n) = _flip(shape_of(a), ta), _flip(shape_of(b), tb)
        assert batch == other or not other, (shape_of(a), shape_of(b))
        shape = (*batch, m, n)
        return self.op("matmul", a, b, shape=shape, transpose_a=ta, transpose_b=tb)


def _flip(shape: Shape, transpose: bool) -> Shape:
    return (*shape[:-2], shape[-1], shape[-2]) if transpose else shape
