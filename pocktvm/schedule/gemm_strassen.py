"""A matrix product by Strassen's scheme, in Winograd's variant: 7 products of halves instead of 8.

    C11 = P1 + P2            P1 = A11 B11    P5 = S1 T1    S1 = A21 + A22   T1 = B12 - B11
    C12 = U2 + P5 + P3       P2 = A12 B21    P6 = S2 T2    S2 = S1 - A11    T2 = B22 - T1
    C21 = U3 + P4            P3 = S4 B22     P7 = S3 T3    S3 = A11 - A21   T3 = B22 - B12
    C22 = U3 + P5            P4 = A22 T4                   S4 = A12 - S2    T4 = B21 - T2
    U2 = P1 + P6, U3 = U2 + P7

(V. Strassen, "Gaussian elimination is not optimal", Numerische Mathematik 13, 1969; S. Winograd,
"On multiplication of 2 x 2 matrices", 1971.) The sums of C are made on registers, beside partial
ones in the cache; those of A are written once for a chunk of rows, those of B once for a panel and
a chunk, which costs 1 to 2 % each at 256 rows and columns. One level: the quarters of most layers
are too small for a second.

Sums of K / 2 terms, of sums of the operands: the largest error is 1 to 2 times the plain product's
here (at K = 256 to 1024, of the largest value: 0.9 to 1.9e-6 beside 0.4 to 1.3e-6), as Winograd's
convolutions have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.dot import tile_cycles
from pocktvm.schedule.emit import Context, load, local, store, vector_loop, vectors
from pocktvm.schedule.gemm import Gemm
from pocktvm.schedule.gemm_tile import UNROLL, Tile, register_tile
from pocktvm.schedule.loops import (
    balanced,
    ceil_div,
    grid,
    tile_at,
    tiles,
    workers,
    worth_threads,
    zero,
)
from pocktvm.schedule.prefetch import Ahead, worthwhile
from pocktvm.schedule.rule import Pack, Task
from pocktvm.schedule.transpose import Matrix, copy_transposed
from pocktvm.tvm_api import T, tirx

Expr = Any
Group = Sequence[tuple[str, str, str, str]]
QUARTERS = ("b11", "b21", "b22", "b12")  # of B, in the order they are stored in
SUMS_OF_A = ("s2", "s3", "s1", "s4")
SUMS_OF_B = ("t2", "t3", "t1", "t4")
SUMS_BYTES = 2 << 20  # of the sums of A, a chunk of rows at a time
FEW = 128  # pairs of rows for which those of B are not made again, if it were more bytes
SUM_ROWS = 3  # pairs of rows whose products take as long as the sums of their panel of B
FORK = 20_000  # cycles that one more parallel loop takes
TAIL = 0.015  # of the time, that a smaller last tile is avoided for: each is code of its own
LEAST = 6  # hundredths that must be saved for the form to be the default
SECOND = 5  # more of them where the epilogue writes a second result

# (operand of A, operand of B, what is added to their product, what becomes of it): partial sums
# are kept in "x" and "y"; 11, 12, 21 and 22 are quarters of C; of P5 two sums are made. Products
# of a group differ by where their operands lie, so that one loop does them all.
GROUPS = (
    (("a11", "b11", "", "x"), ("a12", "b21", "x", "11")),
    (("s2", "t2", "x", "x"), ("s3", "t3", "x", "y"), ("s1", "t1", "", "both")),
    (("a22", "t4", "y", "21"),),
    (("s4", "b22", "x", "12"),),
)


def divides(isa: Isa, gemm: Gemm) -> bool:
    """Does every axis have two equal halves, of whole vectors?"""
    plain = gemm.batch == 1 and not gemm.causal and not gemm.m % 2
    return plain and not gemm.n % (2 * isa.lanes) and not gemm.k % (2 * UNROLL)


def saved(isa: Isa, gemm: Gemm) -> float:
    """Hundredths of a product's time that the form saves: an eighth of the multiplications, less
    the sums of B (for every row), of A (for every column) and of C (for every k). Fitted to
    measurements with vectors of 512 bits, of which one multiply-add is done a cycle; two of 256
    are, while memory is no faster."""
    rate = 1 if isa.lanes >= 16 else 2
    return 12.5 - rate * (600 / gemm.m + 600 / gemm.n + 450 / gemm.k)


def short(isa: Isa, gemm: Gemm) -> bool:
    """Is K so short that a panel of B and its sums stay near, and those of A small?"""
    return 4 * 7 * gemm.k // 2 * 3 * isa.lanes <= 2 * isa.l2_bytes + (1 << 17)


def halves(gemm: Gemm) -> Gemm:
    """A product of quarters of both operands."""
    return replace(gemm, m=gemm.m // 2, n=gemm.n // 2, k=gemm.k // 2)


@dataclass(frozen=True)
class Chunk:
    """Pairs of rows: from `start` on in both halves."""

    start: Expr
    rows: int


@dataclass(frozen=True)
class Strassen:
    """One product; tiles of `mr` x `nr` in its halves, `rows` pairs of rows at a time."""

    gemm: Gemm
    isa: Isa
    mr: int
    nr: int
    packed: bool

    @classmethod
    def of(cls, task: Task, gemm: Gemm, mr: int, nr: int) -> Strassen:
        """The form of a task's product."""
        packed = task.is_frozen(gemm.b) and not gemm.b_batched
        return cls(gemm, task.target.isa, min(mr, gemm.m // 2), min(nr, gemm.n // 2), packed)

    @classmethod
    def tile(cls, task: Task, gemm: Gemm) -> tuple[int, int]:
        """(mr, nr) of the least time, with all cores at work."""
        isa = task.target.isa
        mr, nr = register_tile(isa, halves(gemm), False)
        shapes = [(mr, nr)]
        if isa.lanes >= 16:
            shapes += [(r, v * isa.lanes) for r, v in ((8, 3), (6, 4), (8, 2))]
        plans = [cls.of(task, gemm, *shape) for shape in shapes]
        best = min(plans, key=lambda plan: plan.longest(plan.part) * (1 + TAIL * plan.tails))
        return best.mr, best.nr

    @property
    def tails(self) -> int:
        """Of rows and of columns: is there a smaller last tile?"""
        return (self.part % self.mr > 0) + (self.half.n % self.nr > 0)

    @cached_property
    def half(self) -> Gemm:
        """Sizes of one of the seven products."""
        return halves(self.gemm)

    @property
    def rows(self) -> int:
        """Pairs of rows of a chunk."""
        most = max(FEW, SUMS_BYTES // (8 * self.gemm.k))
        return ceil_div(balanced(self.half.m, most), self.mr) * self.mr

    @property
    def chunk(self) -> int:
        """Those of the first chunk."""
        return min(self.rows, self.half.m)

    @property
    def parallel(self) -> bool:
        """Is a chunk worth several threads?"""
        return worth_threads(self.isa, self.gemm.flops * self.chunk // self.half.m)

    @cached_property
    def part(self) -> int:
        """Pairs of rows a core takes: all of a chunk's where panels are shared out, or its own."""
        share = ceil_div(ceil_div(self.chunk, self.isa.cores), self.mr) * self.mr
        if not self.parallel or share >= self.chunk:
            return self.chunk
        return min((self.chunk, share), key=self.longest)

    def longest(self, part: int) -> float:
        """Cycles of one k, in all of its tiles, of the core that has the most to do."""
        cores = self.isa.cores if self.parallel else 1
        costs = []
        for column in range(0, self.half.n, self.nr):
            width = min(self.nr, self.half.n - column) // self.isa.lanes
            costs.append(tile_cycles(self.isa, self.mr, width) / self.mr * (part + SUM_ROWS))
        if part < self.chunk:
            return sum(costs)
        apart = FORK / (7 * self.half.k) if self.parallel else 0
        return apart + max(sum(costs[core::cores]) for core in range(cores))

    @property
    def workers(self) -> int:
        """Cores that have something to do."""
        if not self.parallel:
            return 1
        rows, panels = ceil_div(self.chunk, self.part), ceil_div(self.half.n, self.nr)
        return min(self.isa.cores, rows if rows > 1 else panels)

    @property
    def slots(self) -> tuple[str, ...]:
        """What a worker keeps of its panel of B."""
        return (*SUMS_OF_B, *QUARTERS[:3]) if self.turned else SUMS_OF_B

    @property
    def turned(self) -> bool:
        """Is B stored [N, K], so that its panels are copied?"""
        return self.gemm.transpose_b and not self.packed

    @property
    def workspaces(self) -> tuple[tuple[int, str], ...]:
        """The sums of A; each worker's panel of B and its partial sums."""
        panel, partial = self.half.k * self.nr, self.part * self.nr
        each = len(self.slots) * panel + 2 * partial
        return ((4 * self.chunk * self.half.k, "float32"), (self.workers * each, "float32"))

    def packs(self, task: Task) -> dict[int, Pack]:
        """How a frozen B is stored."""
        if not self.packed:
            return {}
        layout = {"nr": self.nr, "transpose": self.gemm.transpose_b}
        return {task.node.inputs.index(self.gemm.b): Pack("quarter_panels", layout)}

    def emit(self, ctx: Context) -> None:
        """Chunk by chunk: the sums of A, then the panels."""
        for start, count in tiles(self.half.m, self.chunk):
            chunk = Chunk(T.bind(start), count)
            if self.part < self.chunk:
                self._by_rows(ctx, chunk)
            else:
                self._by_panels(ctx, chunk)

    def _by_panels(self, ctx: Context, chunk: Chunk) -> None:
        """Each core takes some panels, once all have made the sums of A."""
        lines = self.half.k if self.gemm.transpose_a else chunk.rows
        first = _Panel(ctx, self, chunk, Chunk(zero(), chunk.rows), zero(), self.nr, zero())
        for (line,) in grid((lines,), self.parallel):
            first.ask(line, lines)
            self._sum_a(ctx, chunk, line, 0, self._across(chunk.rows))
        for worker, (p,) in workers((ceil_div(self.half.n, self.nr),), self.workers):
            for column, width in tile_at(p, self.half.n, self.nr):
                rows = Chunk(zero(), chunk.rows)
                _Panel(ctx, self, chunk, rows, T.bind(column), width, T.bind(worker)).emit()

    def _by_rows(self, ctx: Context, chunk: Chunk) -> None:
        """Each core takes some rows, makes their sums and goes through all panels."""
        parts = ceil_div(chunk.rows, self.part)
        for worker, (part,) in workers((parts,), self.workers):
            for row, count in tile_at(part, chunk.rows, self.part):
                rows, first = Chunk(T.bind(row), count), (row, zero())[self.gemm.transpose_a]
                lines = self.half.k if self.gemm.transpose_a else count
                panel = _Panel(ctx, self, chunk, rows, zero(), self.nr, zero())
                with T.serial(0, lines) as line:
                    panel.ask(line, lines)
                    start = row if self.gemm.transpose_a else 0
                    self._sum_a(ctx, chunk, first + line, start, self._across(count))
                for column, width in tiles(self.half.n, self.nr):
                    _Panel(ctx, self, chunk, rows, T.bind(column), width, T.bind(worker)).emit()

    def _across(self, rows: int) -> int:
        """Values of a stored line of A's quarters."""
        return rows if self.gemm.transpose_a else self.half.k

    def operand(self, ctx: Context, name: str, chunk: Chunk) -> Matrix:
        """A chunk's rows of a quarter or of a sum of A; stored as A is."""
        gemm, half = self.gemm, self.half
        if name in SUMS_OF_A:
            at = SUMS_OF_A.index(name) * (self.chunk * half.k)
            return Matrix(ctx.workspaces[0], at, chunk.rows if gemm.transpose_a else half.k)
        number = int(name[1:])
        row = chunk.start + (half.m if number >= 21 else 0)
        k = half.k if number % 10 == 2 else 0
        if gemm.transpose_a:
            return Matrix(ctx.buffers[gemm.a], k * gemm.m + row, gemm.m)
        return Matrix(ctx.buffers[gemm.a], row * gemm.k + k, gemm.k)

    def _sum_a(self, ctx: Context, chunk: Chunk, line: Expr, start: Expr, width: int) -> None:
        """S1 to S4 of a chunk, `width` values of a stored line from `start` on."""
        of = {name: self.operand(ctx, name, chunk)
              for name in ("a11", "a12", "a21", "a22", "s1", "s2", "s3", "s4")}  # fmt: skip
        for column, lanes in vector_loop(width, ctx.lanes):

            def read(name: str, column: Expr = column, lanes: int = lanes) -> Expr:
                matrix = of[name]
                return T.bind(load(matrix.buffer, matrix.index(line, start + column), lanes))

            a11, a12, a21, a22 = (read(name) for name in ("a11", "a12", "a21", "a22"))
            s1 = T.bind(a21 + a22)
            s2 = T.bind(s1 - a11)
            for name, value in (("s1", s1), ("s2", s2), ("s3", a11 - a21), ("s4", a12 - s2)):
                matrix = of[name]
                store(matrix.buffer, matrix.index(line, start + column), value, lanes)


@dataclass(frozen=True)
class _Panel:
    """`width` columns of both halves of C, from `column` on, in some of a chunk's rows."""

    ctx: Context
    whole: Strassen
    chunk: Chunk
    rows: Chunk  # counted from the chunk's first
    column: Expr
    width: int
    worker: Expr

    def emit(self) -> None:
        """The sums of B, then seven products."""
        self._sum_b()
        for number, group in enumerate(GROUPS):
            with T.serial(0, len(group)) as i:
                self._products(group, i, self._ahead(number, i))

    def _products(self, group: Group, i: Expr, ahead: Ahead | None) -> None:
        """Number i of a group, for all rows."""
        whole, ctx = self.whole, self.ctx
        operand = self._nth([whole.operand(ctx, entry[0], self.chunk) for entry in group], i)
        skipped = self.rows.start * (1 if whole.gemm.transpose_a else operand.stride)
        operand = replace(operand, at=T.bind(operand.at + skipped))
        b = self._nth([self._panel(entry[1]) for entry in group], i)
        b = replace(b, at=T.bind(b.at))
        tile = Tile(ctx, whole.gemm, zero(), operand)

        def read(k: Expr, c: int, w: int) -> Expr:
            return load(b.buffer, b.index(k, c), w)

        for row, rows in tiles(self.rows.rows, whole.mr):
            for _, _, _, target in alternatives(group, i):
                if target not in ("x", "y"):
                    tile.prefetch(*self._place(target, row, rows), self.width)
            acc = tile.accumulators(rows, self.width)
            tile.multiply(acc, row, rows, self.width, zero(), whole.half.k, read, ahead)
            for _, _, source, target in alternatives(group, i):
                self._done(tile, acc, source, target, row, rows)

    def _done(self, tile: Tile, acc: Any, source: str, target: str, row: Expr, rows: int) -> None:
        """What becomes of a tile of a product."""
        if source:  # last, so that no chain of additions is longer than K / 2
            for at, lanes in self._elements(rows):
                value = load(self._scratch, self._sum(source, row) + at, lanes)
                store(acc, at, load(acc, at, lanes) + value, lanes)
        if target == "both":
            self._both(tile, acc, row, rows)
        elif target in ("x", "y"):
            for at, lanes in self._elements(rows):
                store(self._scratch, self._sum(target, row) + at, load(acc, at, lanes), lanes)
        else:
            tile.finish(acc, *self._place(target, row, rows), self.width)

    def _nth(self, places: Sequence[Matrix], i: Expr) -> Matrix:
        """The i-th of places equally far apart."""
        first = places[0]
        if len(places) == 1:
            return first
        return replace(first, at=first.at + i * (places[1].at - first.at))

    def _place(self, quarter: str, row: Expr, rows: int) -> tuple[Expr, int, Expr]:
        """(row, rows, column) of a tile in a quarter of C."""
        half, quarter = self.whole.half, "22" if quarter == "both" else quarter
        first = self.chunk.start + self.rows.start + row + (half.m if quarter[0] == "2" else 0)
        return first, rows, self.column + (half.n if quarter[1] == "2" else 0)

    def _both(self, tile: Tile, acc: Any, row: Expr, rows: int) -> None:
        """P5: x becomes x + P5, and y + P5 is a quarter of C."""
        result = local(rows * self.width)
        for at, lanes in self._elements(rows):
            p5 = T.bind(load(acc, at, lanes))
            x, y = self._sum("x", row) + at, self._sum("y", row) + at
            store(self._scratch, x, load(self._scratch, x, lanes) + p5, lanes)
            store(result, at, load(self._scratch, y, lanes) + p5, lanes)
        tile.finish(result, *self._place("22", row, rows), self.width)

    def _elements(self, rows: int) -> Iterator[tuple[int, int]]:
        """(index in a tile, lanes) of its vectors."""
        for r in range(rows):
            for c, lanes in vectors(self.width, self.ctx.lanes):
                yield r * self.width + c, lanes

    @property
    def _scratch(self) -> Any:
        return self.ctx.workspaces[1]

    @property
    def _base(self) -> Expr:
        whole = self.whole
        return self.worker * (whole.workspaces[1][0] // whole.workers)

    def _sum(self, name: str, row: Expr) -> Expr:
        """Where the partial sums of a row lie."""
        whole = self.whole
        skipped = len(whole.slots) * whole.half.k * whole.nr
        skipped += whole.part * whole.nr if name == "y" else 0
        return self._base + skipped + row * self.width

    def _slot(self, name: str) -> Matrix:
        """A quarter or a sum of B in this worker's scratch."""
        whole = self.whole
        number = whole.slots.index("t3" if name == "b12" else name)  # whose place b12 takes first
        at = self._base + number * whole.half.k * whole.nr
        return Matrix(self._scratch, at, self.width)

    def _quarter(self, name: str) -> Matrix:
        """A quarter of B where its panel is stored row by row: a constant, or B itself."""
        gemm, half, b = self.whole.gemm, self.whole.half, self.ctx.buffers[self.whole.gemm.b]
        if self.whole.packed:
            at = self.column * (4 * half.k) + QUARTERS.index(name) * (half.k * self.width)
            return Matrix(b, at, self.width)
        row, column = (half.k if name[1] == "2" else 0), (half.n if name[2] == "2" else 0)
        if gemm.transpose_b:
            return Matrix(b, (column + self.column) * gemm.k + row, gemm.k)
        return Matrix(b, row * gemm.n + column + self.column, gemm.n)

    def _panel(self, name: str) -> Matrix:
        """A quarter or a sum of B, row by row."""
        raw = name in QUARTERS and not self.whole.turned
        return self._quarter(name) if raw else self._slot(name)

    def _sum_b(self) -> None:
        """The sums of this panel, and its quarters where B is stored [N, K]."""
        whole = self.whole
        if whole.turned:
            for name in QUARTERS:
                copy_transposed(self._quarter(name), self._slot(name), self.width, whole.half.k,
                                self.ctx.lanes)  # fmt: skip
        read: Callable[[str], Matrix] = self._slot if whole.turned else self._quarter
        with T.serial(0, whole.half.k) as k:
            for c, w in vectors(self.width, self.ctx.lanes):
                of = {}
                for name in QUARTERS:
                    matrix = read(name)
                    of[name] = T.bind(load(matrix.buffer, matrix.index(k, c), w))
                t1 = T.bind(of["b12"] - of["b11"])
                t2 = T.bind(of["b22"] - t1)
                of |= {"t1": t1, "t2": t2, "t3": of["b22"] - of["b12"], "t4": of["b21"] - t2}
                for name in SUMS_OF_B:
                    matrix = self._slot(name)
                    store(matrix.buffer, matrix.index(k, c), of[name], w)

    def ask(self, line: Expr, lines: int) -> None:
        """Ask for a share of this panel of B, one of `lines`."""
        if worthwhile(self.ctx, self.whole.gemm.b):
            for name in QUARTERS:
                self._asked(self._quarter(name), 1, 1, lines, 1).emit(zero(), line)

    def _ahead(self, group: int, i: Expr) -> Ahead | None:
        """A quarter of the next panel of B, asked for by each product of the first two groups."""
        whole = self.whole
        if group > 1 or not worthwhile(self.ctx, whole.gemm.b):
            return None
        alone = whole.part < whole.chunk
        following = replace(self, column=self.column + (1 if alone else whole.workers) * whole.nr)
        names = QUARTERS[2 * group : 2 * group + 2]
        matrix = self._nth([following._quarter(name) for name in names], tirx.Min(i, 1))
        tiles_m = ceil_div(self.rows.rows, whole.mr)
        return self._asked(matrix, tiles_m, whole.mr, whole.half.k // UNROLL, UNROLL)

    def _asked(self, quarter: Matrix, tiles_m: int, height: int, steps: int, unroll: int) -> Ahead:
        """A quarter of a panel, shared out over steps as Ahead says."""
        whole, half = self.whole, self.whole.half
        rows, columns, stride = half.k, self.width, quarter.stride
        if whole.packed:
            rows, columns, stride = 1, half.k * self.width, 0
        elif whole.gemm.transpose_b:
            rows, columns = self.width, half.k
        at = T.bind(quarter.at)
        return Ahead(quarter.buffer, at, rows, columns, stride, tiles_m, height, steps, unroll)


def alternatives(group: Group, i: Expr) -> Iterator[tuple[str, str, str, str]]:
    """Every entry of a group, inside the branch where it is number i."""
    if len(group) == 1:
        yield group[0]
        return
    with T.If(i == 0):
        with T.Then():
            yield group[0]
        with T.Else():
            yield from alternatives(group[1:], i - 1)
