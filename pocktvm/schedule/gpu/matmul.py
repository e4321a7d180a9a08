"""Matrix products, and 1x1 convolutions with their gradients, by gpu/tile.py."""

from __future__ import annotations

from typing import Any

from pocktvm.schedule.emit import Context, build
from pocktvm.schedule.expression import Position, finish
from pocktvm.schedule.gemm import Gemm, describe
from pocktvm.schedule.gpu.launch import MAX_ROWS
from pocktvm.schedule.gpu.tile import Product, emit_product, plan
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.loops import zero
from pocktvm.schedule.rule import Emitted, Knobless, Task

Expr = Any


class Matmul(Knobless):
    """matmul with either operand transposed, batched or not."""

    name = "matmul"

    def decline(self, task: Task) -> str | None:
        """Declines other operators, batch axes that broadcast, and non-float32."""
        gemm = describe(task)
        if isinstance(gemm, str):
            return gemm
        # small batches alone are cut along K, so the layers of a launch are about the batch
        return "more products than a launch has layers" if gemm.batch > MAX_ROWS - 1024 else None

    def emit(self, task: Task, knobs: Any) -> Emitted:
        """One launch, or two where K is cut into parts."""
        gemm = describe(task)
        assert isinstance(gemm, Gemm), gemm
        cut = plan(task.target.isa, gemm.m, gemm.n, gemm.k, gemm.batch)
        workspaces = cut.workspaces(gemm.batch, gemm.m, gemm.n)

        def body(ctx: Context) -> None:
            partial = ctx.workspaces[0] if workspaces else None
            emit_product(_product(ctx, gemm), cut, partial)

        return Emitted(build(task, body, workspaces), workspaces, inplace_pairs(task), {},
                       gemm.flops)  # fmt: skip


def _product(ctx: Context, gemm: Gemm) -> Product:
    shape = ctx.task.shape(gemm.c)

    def a(batch: Expr, m: Expr, k: Expr) -> Expr:
        base = batch * (gemm.m * gemm.k) if gemm.a_batched else zero()
        at = k * gemm.m + m if gemm.transpose_a else m * gemm.k + k
        return ctx.load(gemm.a, base + at, 1)

    def b(batch: Expr, k: Expr, n: Expr) -> Expr:
        base = batch * (gemm.k * gemm.n) if gemm.b_batched else zero()
        at = n * gemm.k + k if gemm.transpose_b else k * gemm.n + n
        return ctx.load(gemm.b, base + at, 1)

    def write(batch: Expr, m: Expr, n: Expr, value: Expr) -> None:
        at = Position(shape, batch * gemm.m + m, n, 1)
        finish(ctx, {gemm.c: value}, at)

    return Product(
        gemm.m, gemm.n, gemm.k, a, b, write, gemm.batch,
        a_along_k=not gemm.transpose_a, b_along_n=not gemm.transpose_b,
    )  # fmt: skip
