"""Matrix products and 1x1 convolutions: register tiles over panels of B.

Forms, by where B comes from:

- *packed*: B is a build-time constant, stored as panels [panel][K][NR];
- *direct*: B[K, N] is read in place, NR columns at a time;
- *local*: each worker copies its panel, K block by K block, to a workspace. For B
  stored transposed, for weight gradients (K counts pixels), for matrices beyond the caches;
- *copied*: all of B is copied to panels first, so that rows of a large A and C are walked once, in
  the order of memory (input gradient from 96 to 576 channels: 107 GFLOP/s instead of 90).

and three more: *strassen*, with 7 products of halves instead of 8, where all axes are long
(schedule/gemm_strassen.py); *walk*, for weight gradients with a small C (schedule/gemm_walk.py);
and *dot*: lanes run along K. For few rows against B[N, K], or very few columns.

Tasks are tiles of C, so sums never depend on the number of threads. Measured on one AVX2 core:
79-98 GFLOP/s on MobileNetV2's layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.ir.target import Isa
from pocktvm.schedule.emit import build
from pocktvm.schedule.gemm import Gemm, describe
from pocktvm.schedule.gemm_dot import dot_tile, emit_dot
from pocktvm.schedule.gemm_strassen import LEAST, SECOND, Strassen, divides, saved, short
from pocktvm.schedule.gemm_tile import register_tile
from pocktvm.schedule.gemm_tiled import Tiled
from pocktvm.schedule.gemm_walk import Walk, oriented, walk_depth, walks
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.prefetch import gains
from pocktvm.schedule.rule import Emitted, Knob, Task
from pocktvm.schedule.special import grouped

Expr = Any
SMALL_B = 160 * 1024  # bytes of B below which rows go outside: B stays in L2
PANEL_BYTES = 32 * 1024  # of a panel's block a worker copies, or an eighth of the L2
FEW_ROWS = 128  # for which B is copied transposed: in blocks of K of at most
SHORT = 256


class Matmul:
    """matmul, and the 1x1 convolutions of NHWC tensors with their gradients."""

    name = "matmul"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, batch axes that broadcast, and non-float32."""
        gemm = describe(task)
        return gemm if isinstance(gemm, str) else None

    def knobs(self, task: Task) -> Mapping[str, Knob]:
        """form, mr, nr, order (which loop is outside), kc (depth of a local block)."""
        gemm, isa = _describe(task), task.target.isa
        mr, nr = register_tile(isa, gemm, task.is_frozen(gemm.b))
        forms = _forms(task, gemm)
        form = _default_form(task, gemm, mr, nr, forms)
        depth = _depth(gemm, nr, isa)
        if form == "walk":
            inner = oriented(isa, gemm)
            mr, nr = register_tile(isa, inner, False)
            depth = walk_depth(isa, inner, nr)
        if form == "strassen":
            mr, nr = Strassen.tile(task, gemm)
        return {
            "form": Knob(forms, form),
            "mr": Knob(_around(mr, (2, 4, 6, 7, 8, 10, 12, 14), gemm.m), mr),
            "nr": Knob(_around(nr, tuple(isa.lanes * v for v in (1, 2, 3, 4)), gemm.n), nr),
            "order": Knob(("rows", "panels"), _default_order(gemm, form)),
            "kc": Knob((64, 128, 256, 512, 1024), depth),
        }

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """The loop nest of one form."""
        gemm = _describe(task)
        pairs = inplace_pairs(task)
        if knobs["form"] == "dot":
            return emit_dot(task, gemm, pairs)
        if knobs["form"] == "walk":
            walk = Walk.of(gemm, task.target.isa, knobs["mr"], knobs["nr"], knobs["kc"])
            func = build(task, walk.emit, walk.workspaces)
            return Emitted(func, walk.workspaces, pairs, flops=gemm.flops)
        if knobs["form"] == "strassen":
            half = Strassen.of(task, gemm, knobs["mr"], knobs["nr"])
            func = build(task, half.emit, half.workspaces)
            return Emitted(func, half.workspaces, pairs, half.packs(task), gemm.flops)
        plan = self.plan(task, knobs)
        func = build(task, plan.emit, plan.workspaces)
        return Emitted(func, plan.workspaces, pairs, plan.packs(task), gemm.flops)

    def describe(self, task: Task) -> Gemm:
        """The product of a task it does not decline."""
        return _describe(task)

    def plan(self, task: Task, knobs: Mapping[str, Any], beside: int = 1) -> Tiled:
        """The tiles of any form but dot and walk; `beside`: products that share the cores."""
        gemm, mr, nr = _describe(task), knobs["mr"], knobs["nr"]
        return Tiled(task, gemm, mr, nr, knobs["order"], knobs["kc"], knobs["form"], beside)


def _describe(task: Task) -> Gemm:
    gemm = describe(task)
    assert isinstance(gemm, Gemm), gemm
    return gemm


def _forms(task: Task, gemm: Gemm) -> tuple[str, ...]:
    forms = ["local"]
    if not gemm.transpose_b:
        forms.append("direct")
    if task.is_frozen(gemm.b) and not gemm.b_batched:
        forms.append("packed")
    if not gemm.transpose_a and not gemm.b_batched and gemm.batch == 1:
        forms.append("copied")
    if walks(task.target.isa, gemm) and not grouped(task):
        forms.append("walk")
    if divides(task.target.isa, gemm):
        forms.append("strassen")
    if dot_tile(task, gemm) is not None and not grouped(task):  # its columns begin anywhere
        forms.append("dot")
    return tuple(forms)


def _default_form(task: Task, gemm: Gemm, mr: int, nr: int, forms: tuple[str, ...]) -> str:
    lanes, isa = task.target.isa.lanes, task.target.isa
    if "dot" in forms and gemm.k >= 4 * lanes:
        few_columns = gemm.n <= max(1, lanes // 4)
        few_rows = gemm.transpose_b and gemm.m < 32 and "packed" not in forms
        if few_columns or few_rows:
            return "dot"
    if "strassen" in forms and _by_halves(task, gemm):
        return "strassen"
    if "packed" in forms:
        return "packed"
    if "walk" in forms:
        return "walk"
    if "direct" not in forms:
        return "copied" if "copied" in forms and _rows_count(gemm, nr, isa) else "local"
    if gemm.transpose_a:
        return "local" if gemm.k >= 64 and gemm.m > 2 * mr else "direct"
    if gains(isa) and 4 * gemm.k * nr > isa.l2_bytes // 2 and gemm.m >= 8:
        return "local"  # a panel and the next one, asked for ahead, are more than the L2 holds
    if gemm.k > 4096 and gemm.m >= 8:  # blocks of K: faster or equal, and sums of sums are exacter
        return "local"
    # rows of B a power of two apart fall on the same cache sets: copy them once there is use for it
    # unless they are asked for ahead
    aliased = (gemm.n * 4) % 2048 == 0 and gemm.k * gemm.n * 4 > isa.l2_bytes // 4
    return "local" if aliased and gemm.m >= 8 * mr and not gains(isa) else "direct"


def _by_halves(task: Task, gemm: Gemm) -> bool:
    """Does Strassen's scheme pay? A second result to write, from four quarters in turn, takes what
    a product of middle size gains (a feed-forward matrix that keeps what its gelu reads: 21.3 ms
    plain and 22 to 23 so, 0.75 and 0.83 on two threads)."""
    whole = [o for o in task.node.outputs if task.shape(o) == task.shape(gemm.c)]
    least = LEAST + SECOND * (len(whole) > 1)
    return saved(task.target.isa, gemm) >= least and short(task.target.isa, gemm)


def _rows_count(gemm: Gemm, nr: int, isa: Isa) -> bool:
    """Is A or C so large, and B so small, that whole rows in the order of memory are worth a copy
    of B that stays in the second-level cache?"""
    small = 4 * gemm.k * gemm.n <= isa.l2_bytes // 4
    return small and gemm.n > nr and 4 * gemm.m * max(gemm.k, gemm.n) > isa.l2_bytes


def _default_order(gemm: Gemm, form: str) -> str:
    if form == "copied":
        return "rows"
    if gemm.transpose_a:
        return "panels"
    return "rows" if gemm.k * gemm.n * 4 <= SMALL_B or gemm.batch > 1 else "panels"


def _depth(gemm: Gemm, nr: int, isa: Isa) -> int:
    """The depth of a block of K: all of it when it nearly fits, else a divisor near the limit."""
    k = gemm.k
    # sums in memory cost more than B from the L2
    most = max(8, max(PANEL_BYTES, isa.l2_bytes // 8) // (4 * nr))
    if gains(isa) and gemm.transpose_b and gemm.m <= FEW_ROWS:
        most = min(most, SHORT)  # 100 GFLOP/s instead of 88, for 64 rows and K = 512
    if k <= most * 5 // 4:
        return max(k, 1)
    for depth in range(most - most % 4, most // 2, -4):
        if k % depth == 0:
            return depth
    return most - most % 4


def _around(default: int, options: tuple[int, ...], limit: int) -> tuple[int, ...]:
    return tuple(sorted({default, *(o for o in options if o <= limit)}))
