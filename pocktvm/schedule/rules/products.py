"""Several matrix products as one parallel kernel: a group of passes/join_products.py.

The tiles of all parts are numbered through and dealt out together. What a part's tile does is the
matmul rule's: its form, its registers, its epilogue, so every number is the one that the part alone
would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocktvm.schedule.emit import Context, build
from pocktvm.schedule.fused_block import part_task
from pocktvm.schedule.gemm_tiled import Tiled
from pocktvm.schedule.inplace import inplace_pairs
from pocktvm.schedule.loops import workers, worth_threads
from pocktvm.schedule.rule import Emitted, Knobless, Pack, Task, defaults
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.tvm_api import T

Expr = Any
KIND = "products"
ENOUGH = 64  # times the work worth two threads: such a product fills all cores by itself


@dataclass(frozen=True)
class _Part:
    """One product: its task, its tiles, and the number of its first one among all."""

    task: Task
    plan: Tiled
    start: int


class Products(Knobless):
    """Independent products of one input, each with the defaults of its own rule's knobs."""

    name = "products"

    def decline(self, task: Task) -> str | None:
        """Declines other groups, one core, large parts, and those that are not only tiles."""
        if task.node.attrs.get("kind") != KIND:
            return "no products of one input"
        isa = task.target.isa
        if isa.cores == 1:
            return "one core: there are no rounds to save"
        rule, total = Matmul(), 0
        for node in task.node.body:
            part = part_task(task, node)
            reason = rule.decline(part)
            if reason is not None:
                return reason
            flops = rule.describe(part).flops
            if worth_threads(isa, flops / ENOUGH):
                return f"a part of {flops} operations fills all cores by itself"
            form = rule.knobs(part)["form"].default
            if form in ("dot", "walk", "copied", "strassen"):
                return f"a part's form, {form}, is more than tiles to deal out"
            total += flops
        return None if worth_threads(isa, total) else "too little work for threads"

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """One loop over the tiles of all parts; scratch is shared: a worker does one at a time."""
        parts = _parts(task)
        total = parts[-1].start + parts[-1].plan.tasks
        count = min(task.target.isa.cores, total)
        sizes = [p.plan.scratch for p in parts]
        most = [max(column) for column in zip(*([*s, 0, 0][:2] for s in sizes), strict=True)]
        workspaces = tuple((count * size, "float32") for size in most if size)

        def body(ctx: Context) -> None:
            inner = [Context(p.task, ctx.buffers, ctx.workspaces) for p in parts]
            for worker, (flat,) in workers((total,), count):
                _deal(list(zip(parts, inner, strict=True)), flat, worker)

        func = build(task, body, workspaces)
        flops = sum(p.plan.gemm.flops for p in parts)
        return Emitted(func, workspaces, _inplace(task, parts), _packs(task, parts), flops)


def _parts(task: Task) -> list[_Part]:
    rule, parts, start = Matmul(), [], 0
    for node in task.node.body:
        part = part_task(task, node)
        plan = rule.plan(part, defaults(rule.knobs(part)), len(task.node.body))
        parts.append(_Part(part, plan, start))
        start += plan.tasks
    return parts


def _deal(parts: Sequence[tuple[_Part, Context]], flat: Expr, worker: Expr) -> None:
    """The tile of whichever part holds number `flat`."""
    (part, ctx), rest = parts[0], parts[1:]
    if not rest:
        part.plan.tile(ctx, flat - part.start, worker)
        return
    with T.If(flat < rest[0][0].start):
        with T.Then():
            part.plan.tile(ctx, flat - part.start, worker)
        with T.Else():
            _deal(rest, flat, worker)


def _packs(task: Task, parts: Sequence[_Part]) -> dict[int, Pack]:
    found: dict[int, Pack] = {}
    for part in parts:
        for index, pack in part.plan.packs(part.task).items():
            found[task.node.inputs.index(part.task.node.inputs[index])] = pack
    return found


def _inplace(task: Task, parts: Sequence[_Part]) -> tuple[tuple[int, int], ...]:
    """Each part's own pairs, of operands that no other part reads."""
    pairs, node = [], task.node
    for part in parts:
        others = {n for p in parts if p is not part for n in p.task.node.inputs}
        for o, i in inplace_pairs(part.task):
            name = part.task.node.inputs[i]
            if name not in others:
                pairs.append((node.outputs.index(part.task.node.outputs[o]),
                              node.inputs.index(name)))  # fmt: skip
    return tuple(pairs)
