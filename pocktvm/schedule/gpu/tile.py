"""The tile all products are computed by: matmul, and convolutions as implicit matrix products.

C[batch, M, N] = sum over K of A B. A block owns a tile of C; for each slice of K its threads copy
a strip of A and one of B to shared memory, wait, and multiply from there, each thread a small tile
in registers: an element fetched from memory once is used by a whole row of threads. A and B are
functions of an index, so that a convolution's window is gathered during the copy, never stored.

Where C has too few tiles to fill the GPU and K is long (weight gradients: K counts pixels), K is
cut into parts, each written to a workspace; a second launch adds them in order. The cut depends on
sizes alone, so the same build gives the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.emit import const, load, local, store
from pocktvm.schedule.gpu.launch import barrier, choose, shared, threads
from pocktvm.schedule.loops import ceil_div
from pocktvm.tvm_api import T, tirx

Expr = Any
MAX_PARTS = 64
PART_DEPTH = 128  # the least of K worth a part


@dataclass(frozen=True)
class Tile:
    """A block computes bm x bn of C by slices of bk, a thread tm x tn of those."""

    bm: int
    bn: int
    bk: int
    tm: int
    tn: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return (self.bm // self.tm) * (self.bn // self.tn)


# From much to little work. 64 accumulators and 16 operands a thread leave two blocks of 256 on a
# multiprocessor; narrow tiles are for few columns (the first layers, classifiers).
TILES = (
    Tile(128, 128, 8, 8, 8),
    Tile(128, 64, 16, 8, 4),
    Tile(64, 64, 16, 4, 4),
    Tile(128, 32, 16, 8, 2),
    Tile(64, 32, 16, 4, 2),
    Tile(32, 32, 16, 2, 2),
    Tile(64, 16, 16, 4, 1),
    Tile(16, 16, 16, 1, 1),
)


@dataclass(frozen=True)
class Product:
    """Sizes, and where the elements come from.

    a(batch, m, k), b(batch, k, n)  expressions that read one element; indices are in range
    finish(batch, m, n, value)      writes one element of C, through the epilogue
    a_along_k, b_along_n            True where neighbours in memory differ in that index
    """

    m: int
    n: int
    k: int
    a: Callable[[Expr, Expr, Expr], Expr]
    b: Callable[[Expr, Expr, Expr], Expr]
    finish: Callable[[Expr, Expr, Expr, Expr], None]
    batch: int = 1
    a_along_k: bool = True
    b_along_n: bool = True


@dataclass(frozen=True)
class Plan:
    """How a product is cut."""

    tile: Tile
    parts: int
    depth: int  # of a part

    def workspaces(self, batch: int, m: int, n: int) -> tuple[tuple[int, str], ...]:
        """Partial sums of every part."""
        return ((self.parts * batch * m * n, "float32"),) if self.parts > 1 else ()


def plan(isa: Isa, m: int, n: int, k: int, batch: int = 1) -> Plan:
    """The largest tile that still fills the GPU; K in parts where no tile does."""
    wanted = 2 * isa.cores  # blocks: two a multiprocessor hide each other's waiting

    def count(tile: Tile) -> int:
        return ceil_div(m, tile.bm) * ceil_div(n, tile.bn) * batch

    fitting = [t for t in TILES if t.bm < 2 * max(m, 16) and t.bn < 2 * max(n, 16)]
    tile = next((t for t in fitting if count(t) >= wanted), None)
    if tile is None and k >= 4 * PART_DEPTH:  # parts of larger tiles read less
        tile = next((t for t in fitting if count(t) * (k // PART_DEPTH) >= wanted), None)
    tile = tile or fitting[-1]
    parts = min(ceil_div(wanted, count(tile)), k // PART_DEPTH, MAX_PARTS)
    if parts < 2:
        return Plan(tile, 1, k)
    depth = ceil_div(ceil_div(k, parts), tile.bk) * tile.bk
    return Plan(tile, ceil_div(k, depth), depth)


def emit_product(product: Product, cut: Plan, partial: Any) -> None:
    """The launches; `partial` is the workspace where K is cut into parts."""
    if not product.k:  # pixels that no tap reaches
        _zeros(product)
        return
    _Emitter(product, cut, partial).emit()
    if cut.parts > 1:
        _add_parts(product, cut, partial)


def _zeros(product: Product) -> None:
    for flat in threads(product.batch * product.m * product.n):
        row, column = T.bind(flat // product.n), T.bind(flat % product.n)
        batch = T.bind(row // product.m)
        product.finish(batch, T.bind(row % product.m), column, const(0.0))


def _add_parts(product: Product, cut: Plan, partial: Any) -> None:
    size = product.batch * product.m * product.n
    for flat in threads(size):
        acc = local(1)
        store(acc, 0, load(partial, flat, 1), 1)
        with T.serial(0, cut.parts - 1) as part:
            store(acc, 0, load(acc, 0, 1) + load(partial, (part + 1) * size + flat, 1), 1)
        row, column = T.bind(flat // product.n), T.bind(flat % product.n)
        batch = T.bind(row // product.m)
        product.finish(batch, T.bind(row % product.m), column, T.bind(load(acc, 0, 1)))


class _Emitter:
    def __init__(self, product: Product, cut: Plan, partial: Any) -> None:
        self.p, self.cut, self.tile, self.partial = product, cut, cut.tile, partial

    def emit(self) -> None:
        p, t = self.p, self.tile
        depths = p.batch * self.cut.parts
        with (
            T.launch_thread("blockIdx.x", ceil_div(p.m, t.bm)) as bm,
            T.launch_thread("blockIdx.y", ceil_div(p.n, t.bn)) as bn,
            T.launch_thread("blockIdx.z", depths) as bz,
            T.launch_thread("threadIdx.x", t.threads) as thread,
        ):
            self.thread = thread
            self.m0, self.n0 = T.bind(bm * t.bm), T.bind(bn * t.bn)
            self.batch, self.part = T.bind(bz // self.cut.parts), T.bind(bz % self.cut.parts)
            self.strip_a, self.strip_b = shared(t.bk * (t.bm + 1)), shared(t.bk * (t.bn + 1))
            self.acc = local(t.tm * t.tn)
            with T.unroll(0, t.tm * t.tn) as i:
                store(self.acc, i, const(0.0), 1)
            start = T.bind(self.part * self.cut.depth)
            stop = T.bind(tirx.Min(start + self.cut.depth, tirx.const(p.k, "int32")))
            with T.serial(0, ceil_div(self.cut.depth, t.bk)) as slice_:
                k0 = T.bind(start + slice_ * t.bk)
                self._copy(self.strip_a, t.bm, k0, stop, self._a, p.a_along_k)
                self._copy(self.strip_b, t.bn, k0, stop, self._b, not p.b_along_n)
                barrier()
                self._multiply()
                barrier()
            self._write()

    def _a(self, i: Expr, k: Expr, stop: Expr) -> Expr:
        m = T.bind(self.m0 + i)
        inside = tirx.And(m < self.p.m, k < stop)
        return choose(inside, self.p.a(self.batch, m, k), const(0.0))

    def _b(self, i: Expr, k: Expr, stop: Expr) -> Expr:
        n = T.bind(self.n0 + i)
        inside = tirx.And(n < self.p.n, k < stop)
        return choose(inside, self.p.b(self.batch, k, n), const(0.0))

    def _copy(
        self, strip: Any, width: int, k0: Expr, stop: Expr, read: Callable[..., Expr], along_k: bool
    ) -> None:
        """strip[k][i] of a slice; neighbouring threads read neighbours in memory. Rows are one
        longer than the tile, so that threads that walk down k write to different banks."""
        t = self.tile
        total, count = t.bk * width, t.threads
        with T.unroll(0, ceil_div(total, count)) as step:
            e = T.bind(step * count + self.thread)
            if along_k:
                k, i = T.bind(e % t.bk), T.bind(e // t.bk)
            else:
                k, i = T.bind(e // width), T.bind(e % width)

            def move(k: Expr = k, i: Expr = i) -> None:
                store(strip, k * (width + 1) + i, read(i, T.bind(k0 + k), stop), 1)

            if total % count == 0:
                move()
            else:
                with T.If(e < total), T.Then():
                    move()

    def _place(self) -> tuple[Expr, Expr]:
        """The thread's row and column among its block's threads; its elements lie a whole set of
        threads apart, so that a row of threads reads and writes neighbours."""
        across = self.tile.bn // self.tile.tn
        return T.bind(self.thread // across), T.bind(self.thread % across)

    def _multiply(self) -> None:
        t = self.tile
        down, across = t.bm // t.tm, t.bn // t.tn
        row, column = self._place()
        a, b = local(t.tm), local(t.tn)
        with T.unroll(0, t.bk) as k:
            with T.unroll(0, t.tm) as i:
                store(a, i, load(self.strip_a, k * (t.bm + 1) + i * down + row, 1), 1)
            with T.unroll(0, t.tn) as j:
                store(b, j, load(self.strip_b, k * (t.bn + 1) + j * across + column, 1), 1)
            with T.unroll(0, t.tm) as i, T.unroll(0, t.tn) as j:
                at = i * t.tn + j
                store(self.acc, at, load(self.acc, at, 1) + load(a, i, 1) * load(b, j, 1), 1)

    def _write(self) -> None:
        t, p = self.tile, self.p
        down, across = t.bm // t.tm, t.bn // t.tn
        row, column = self._place()
        with T.unroll(0, t.tm) as i, T.unroll(0, t.tn) as j:
            m = T.bind(self.m0 + i * down + row)
            n = T.bind(self.n0 + j * across + column)
            with T.If(tirx.And(m < p.m, n < p.n)), T.Then():
                value = T.bind(load(self.acc, i * t.tn + j, 1))
                if self.cut.parts == 1:
                    p.finish(self.batch, m, n, value)
                else:
                    row_ = (self.part * p.batch + self.batch) * p.m + m
                    store(self.partial, row_ * p.n + n, value, 1)
