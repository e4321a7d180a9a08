"""Launches, blocks and threads: what every GPU rule is written with.

A kernel is one or several launches, one after the other; within one, threads of a block share
memory and wait for each other at `barrier()`. A rule emits scalar code (the targets' vectors are
one float wide), so the elementwise expressions of the CPU rules serve here as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pocktvm.schedule.emit import const, load, local, store
from pocktvm.schedule.loops import ceil_div
from pocktvm.tvm_api import T, tirx

Expr = Any
BLOCK = 256  # threads of a block where nothing speaks for another number
MAX_ROWS = 65535  # blocks along y and z


def threads(count: int, block: int = BLOCK) -> Iterator[Expr]:
    """A launch with one thread for each of `count` elements; yields the thread's number."""
    block = min(block, max(32, ceil_div(count, 32) * 32))
    with (
        T.launch_thread("blockIdx.x", ceil_div(count, block)) as b,
        T.launch_thread("threadIdx.x", block) as t,
    ):
        flat = T.bind(b * block + t)
        if count % block == 0:
            yield flat
            return
        with T.If(flat < count), T.Then():
            yield flat


def blocks(count: int, block: int) -> Iterator[tuple[Expr, Expr]]:
    """A launch of `count` blocks; yields (block number, thread number)."""
    with T.launch_thread("blockIdx.x", count) as b, T.launch_thread("threadIdx.x", block) as t:
        yield b, t


def barrier() -> None:
    """Every thread of the block has come here, and sees what the others wrote."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def shared(size: int, dtype: str = "float32") -> Any:
    """A buffer of `size` elements that the threads of a block share."""
    return T.alloc_buffer((size,), dtype, scope="shared")


def choose(condition: Expr, value: Expr, other: Expr) -> Expr:
    """`value` is evaluated (and read from memory) only where the condition holds."""
    return tirx.if_then_else(condition, value, other)


def stride_loop(start: Expr, stop: Expr, step: int) -> Iterator[Expr]:
    """start, start + step, … below stop (an int or an expression)."""
    with T.serial(0, tirx.Max((stop - start + (step - 1)) // step, tirx.const(0, "int32"))) as i:
        yield T.bind(start + i * step)


def strided_fold(
    start: Expr,
    stop: Expr,
    step: int,
    value: Callable[[Expr], Expr],
    combine: Callable[[Expr, Expr], Expr],
    first: float,
    dtype: str = "float32",
) -> Expr:
    """A thread's own share of a reduction: combine value(i) over a strided loop."""
    acc = local(1, dtype)
    store(acc, 0, const(first, 1, dtype), 1)
    for i in stride_loop(start, stop, step):
        store(acc, 0, combine(load(acc, 0, 1), value(i)), 1)
    return load(acc, 0, 1)


def block_fold(
    thread: Expr, count: int, value: Expr, combine: Callable[[Expr, Expr], Expr], dtype: str
) -> Expr:
    """Combine one value of each of `count` (a power of two) threads; all get the result.

    A tree of a fixed shape: the same bits every time."""
    scratch = shared(count, dtype)
    store(scratch, thread, value, 1)
    barrier()
    tree(scratch, thread, count, 1, combine)
    return T.bind(load(scratch, 0, 1))


def shared_fold(
    thread: Expr,
    count: int,
    stop: Expr,
    value: Callable[[Expr], Expr],
    combine: Callable[[Expr, Expr], Expr],
    first: float,
    dtype: str = "float32",
) -> Expr:
    """Combine value(i) for every i below `stop`, dealt out to the `count` threads of a block."""
    own = strided_fold(thread, stop, count, value, combine, first, dtype)
    return block_fold(thread, count, own, combine, dtype)


def tree(
    scratch: Any, at: Expr, count: int, apart: int, combine: Callable[[Expr, Expr], Expr]
) -> None:
    """Fold `count` (a power of two) values that lie `apart` elements from each other into the
    first; `at` is the place of the thread's own. Ends with a barrier."""
    half = count // 2
    while half:
        with T.If(at < half * apart), T.Then():
            both = combine(load(scratch, at, 1), load(scratch, at + half * apart, 1))
            store(scratch, at, both, 1)
        barrier()
        half //= 2


def power_of_two(count: int, low: int, high: int) -> int:
    """The smallest power of two that is at least `count`, between two others."""
    size = low
    while size < count and size < high:
        size *= 2
    return size
