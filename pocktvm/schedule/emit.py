"""Write a kernel's loop nest directly as TIR, with explicit vectors.

Emitting, not scheduling: register tiles are unrolled in Python, vectors are explicit Ramps and
Broadcasts, accumulators live in a flat local buffer that LLVM keeps in registers. That is what the
step times of docs/performance.md come from. Every argument is a flat one-dimensional buffer; a
vector is `width` consecutive float32 values, and `width` may be any power of two up to the target's
lanes, so tails are narrower vectors, not masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.rule import Task
from pocktvm.tvm_api import IRBuilder, T, tirx, tvm_target

Expr = Any  # a TIR expression
LOWEST = -3.4028234663852886e38  # not -inf: the code generator may assume there is none


@dataclass
class Context:
    """What a kernel body works with: buffers by value name, scratch buffers, the vector width."""

    task: Task
    buffers: dict[str, Any]
    workspaces: list[Any]

    @property
    def lanes(self) -> int:
        """float32 values in the target's vector."""
        return self.task.target.isa.lanes

    def load(self, name: str, index: Expr, width: int) -> Expr:
        """`width` consecutive elements of an argument, from a flat index."""
        return load(self.buffers[name], index, width)

    def store(self, name: str, index: Expr, value: Expr, width: int) -> None:
        """Write `width` consecutive elements of an argument."""
        store(self.buffers[name], index, value, width)


def build(
    task: Task,
    body: Callable[[Context], None],
    workspaces: tuple[tuple[int, str], ...] = (),
    sizes: Mapping[str, int] | None = None,
    dtypes: Mapping[str, str] | None = None,
    noalias: bool = True,
) -> Any:
    """The PrimFunc of a task: flat buffers for inputs, outputs and workspaces around `body`.

    `sizes`: elements of inputs whose packed form is larger than the value itself.
    `dtypes`: arguments the body reads as bits of another type of the same size.
    `noalias`: False where an output may lie over an input that is read at other indices than the
    one written, so that the order of loads and stores counts.
    """
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr(
            {
                "global_symbol": "main",
                "tirx.noalias": noalias,
                "target": tvm_target(task.target.tvm),
            }
        )
        buffers: dict[str, Any] = {}
        for number, name in enumerate((*task.node.inputs, *task.node.outputs)):
            value = task.values[name]
            size = (sizes or {}).get(name, max(value.size, 1))
            dtype = (dtypes or {}).get(name, value.dtype)
            buffer = T.arg(f"a{number}", T.Buffer((size,), dtype))
            buffers.setdefault(name, buffer)
        scratch = [
            T.arg(f"w{i}", T.Buffer((size,), dtype)) for i, (size, dtype) in enumerate(workspaces)
        ]
        body(Context(task, buffers, scratch))
    return builder.get()


def load(buffer: Any, index: Expr, width: int) -> Expr:
    """`width` consecutive elements as a vector, or one as a scalar."""
    if width == 1:
        return tirx.BufferLoad(buffer, [index])
    return tirx.BufferLoad(buffer, [tirx.Ramp(index, 1, width)])


def store(buffer: Any, index: Expr, value: Expr, width: int) -> None:
    """Write a vector to consecutive elements."""
    T.buffer_store(buffer, value, [index] if width == 1 else [tirx.Ramp(index, 1, width)])


def prefetch(buffer: Any, index: Expr, write: bool = False, level: int = 1) -> None:
    """Ask for the cache line of an element ahead of its use, into the cache of a level (1, 2); any
    index will do, none faults."""
    address = T.address_of(tirx.BufferLoad(buffer, [index]))
    hints = [tirx.const(value, "int32") for value in (int(write), 4 - level, 1)]
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, *hints))


def splat(value: Expr, width: int) -> Expr:
    """A scalar in every lane."""
    return value if width == 1 else tirx.Broadcast(value, width)


def const(value: float | int | bool, width: int = 1, dtype: str = "float32") -> Expr:
    """A literal in every lane."""
    return splat(tirx.const(value, dtype), width)


def local(size: int, dtype: str = "float32") -> Any:
    """A small buffer for accumulators; constant indices make LLVM keep it in registers.

    The annotation makes it an `alloca`: without it TVM asks the run time for heap memory, whatever
    the size (tvm_api.compile_module keeps the annotation alive).
    """
    annotations = {"disable_lower_builtin": True}
    return T.alloc_buffer((size,), dtype, scope="local", annotations=annotations)


def vectors(extent: int, lanes: int) -> list[tuple[int, int]]:
    """[(start, width)] covering [0, extent): full vectors, then halves, quarters, … for the tail.

    Meant for small extents that are unrolled; `vector_loop` is the one for long ones.
    """
    pieces = [(start, lanes) for start in range(0, extent - lanes + 1, lanes)]
    start = len(pieces) * lanes
    width = lanes // 2
    while start < extent:
        while width > extent - start:
            width //= 2
        pieces.append((start, width))
        start += width
    return pieces


def vector_loop(extent: int, lanes: int, unroll: int = 1) -> Iterator[tuple[Expr, int]]:
    """Yield (start, width) inside emitted loops that cover [0, extent).

    The main loop takes `unroll` vectors at a time; use as
    `for start, width in vector_loop(n, ctx.lanes): …`, the body is emitted once per yield.
    """
    block = lanes * unroll
    full = extent // block
    if full == 1:
        for u in range(unroll):
            yield tirx.const(u * lanes, "int32"), lanes
    elif full:
        with T.serial(0, full) as i:
            for u in range(unroll):
                yield i * block + u * lanes, lanes
    for start, width in vectors(extent - full * block, lanes):
        yield tirx.const(full * block + start, "int32"), width


def reduce_lanes(
    vector: Expr, width: int, combine: Callable[[Expr, Expr], Expr], dtype: str = "float32"
) -> Expr:
    """Combine the lanes of a vector into one scalar, pairwise (a fixed order: same bits)."""
    if width == 1:
        return vector
    scratch = local(width, dtype)
    store(scratch, 0, vector, width)
    items = [load(scratch, i, 1) for i in range(width)]
    while len(items) > 1:
        items = [combine(items[i], items[i + 1]) for i in range(0, len(items), 2)]
    return T.bind(items[0])
