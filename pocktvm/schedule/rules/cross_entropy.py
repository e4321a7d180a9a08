"""Cross-entropy of logits and integer labels, and its gradient, without keeping a softmax.

Logits are [outer, C, inner] around the class axis. With w the class weights (1 without), e the
label smoothing and D = sum of w[y] over the labels that are not ignored, torch's mean is

    loss = sum_i [ (1-e) w[y_i] (-logp_i[y_i]) + e/C sum_c w_c (-logp_i[c]) ] / D
    d loss / d x_i[c] = [ ((1-e) w[y_i] + e/C W) p_i[c] - (1-e) w[y_i] 1[c=y_i] - e/C w_c ] / D

with W = sum_c w_c. Rows are independent; their losses are added by one thread, in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocktvm.schedule import vector_math as vm
from pocktvm.schedule.emit import Context, build, const, load, local, splat, store, vector_loop
from pocktvm.schedule.row import add, reduce_row, row_max
from pocktvm.schedule.rule import Emitted, Knobless, Task
from pocktvm.tvm_api import T, tirx

Expr = Any
SERIAL_ELEMENTS = 8192


class ClassRows:
    """The shapes and the shared expressions of both kernels."""

    def __init__(self, ctx: Context, weights: str | None) -> None:
        node = ctx.task.node.kernel_nodes()[0]
        shape, axis = ctx.task.shape(node.inputs[0]), node.attrs["axis"]
        self.ctx, self.weights = ctx, weights
        self.classes = shape[axis]
        self.outer = _product(shape[:axis])
        self.inner = _product(shape[axis + 1 :])
        self.count = self.outer * self.inner
        self.smoothing = float(node.attrs.get("label_smoothing", 0.0))
        self.summed = node.attrs.get("reduction") == "sum"
        self.ignore = int(node.attrs.get("ignore_index", -100))
        self.logits, self.labels = ctx.buffers[node.inputs[0]], ctx.buffers[node.inputs[1]]

    def loop(self) -> Any:
        """A loop over rows, parallel when there is work for two threads."""
        size = self.count * self.classes
        return (T.serial if size < SERIAL_ELEMENTS else T.parallel)(0, self.count)

    def row(self, r: Expr) -> tuple[Expr, Expr]:
        """(label, 1.0 or 0.0 for a row that counts)."""
        label = T.bind(load(self.labels, r, 1))
        counts = tirx.Select(tirx.NE(label, tirx.const(self.ignore, "int32")), const(1.0),
                             const(0.0))  # fmt: skip
        safe = tirx.Max(tirx.Min(label, tirx.const(self.classes - 1, "int32")),
                        tirx.const(0, "int32"))  # fmt: skip
        return T.bind(safe), T.bind(counts)

    def weight(self, label: Expr) -> Expr:
        """The weight of the label's class; 1 without weights."""
        if self.weights is None:
            return const(1.0)
        return load(self.ctx.buffers[self.weights], label, 1)

    def at(self, r: Expr, c: Expr) -> Expr:
        """Flat index of class c of row r."""
        if self.inner == 1:
            return r * self.classes + c
        return ((r // self.inner) * self.classes + c) * self.inner + r % self.inner

    def reduce(self, r: Expr, value: Any, combine: Any, start: float) -> Expr:
        """Combine over the classes of a row."""
        if self.inner == 1:
            return reduce_row(self.ctx, self.classes, value, combine, start)
        total = local(1)
        store(total, 0, const(start), 1)
        with T.serial(0, self.classes) as c:
            store(total, 0, combine(load(total, 0, 1), value(c, 1)), 1)
        return T.bind(load(total, 0, 1))

    def own(self, r: Expr) -> Expr:
        """The logit of a row's label."""
        return T.bind(load(self.logits, self.at(r, self.row(r)[0]), 1))

    def statistics(self, r: Expr, into: Any = None) -> tuple[Expr, Expr]:
        """(maximum, sum of exponentials) of a row; `into`: where those are kept (inner 1 only)."""
        if self.inner == 1:
            base = r * self.classes
            top = row_max(self.ctx, self.logits, base, self.classes)

            def exponential(i: Expr, width: int) -> Expr:
                value = vm.exp(load(self.logits, base + i, width) - splat(top, width), width)
                if into is not None:
                    store(into, base + i, value, width)
                return value

            return top, reduce_row(self.ctx, self.classes, exponential, add, 0.0)
        top = self.reduce(
            r, lambda c, w: load(self.logits, self.at(r, c), w), lambda a, b: tirx.Max(a, b),
            -3.4e38,
        )  # fmt: skip
        total = self.reduce(
            r, lambda c, w: vm.exp(load(self.logits, self.at(r, c), w) - splat(top, w), w), add, 0.0
        )
        return top, total

    def loss(self, r: Expr, own: Expr, top: Expr, total: Expr) -> tuple[Expr, Expr]:
        """(loss, weight) of a row, before the division by the sum of weights."""
        label, counts = self.row(r)
        log_sum = T.bind(tirx.log(total) + top)
        weight = T.bind(self.weight(label) * counts)
        loss = weight * (log_sum - own)
        if self.smoothing:

            def behind(c: Expr, width: int) -> Expr:
                x = load(self.logits, self.at(r, c), width)
                return self.weighted(c, width) * (splat(log_sum, width) - x)

            smooth = self.reduce(r, behind, add, 0.0)
            loss = const(1 - self.smoothing) * loss + (
                const(self.smoothing / self.classes) * smooth * counts
            )
        return loss, weight

    def keep_loss(self, r: Expr, losses: Any, loss: Expr, weight: Expr) -> None:
        """A row's loss and weight, for `whole_loss`."""
        store(losses, r, loss, 1)
        store(losses, self.count + r, weight, 1)

    def whole_loss(self, out: str, losses: Any) -> None:
        """The ordered sum of the rows' losses, over that of their weights."""
        total = local(2)
        for k in range(2):
            store(total, k, const(0.0), 1)
        with T.serial(0, self.count) as r:
            for k in range(2):
                store(total, k, load(total, k, 1) + load(losses, k * self.count + r, 1), 1)
        mean = load(total, 0, 1) / load(total, 1, 1)
        self.ctx.store(out, 0, load(total, 0, 1) if self.summed else mean, 1)

    def weighted(self, c: Expr, width: int) -> Expr:
        """The weights of `width` classes from `c` on, as a vector."""
        if self.weights is None:
            return const(1.0, width)
        return load(self.ctx.buffers[self.weights], c, width)


def _product(extents: tuple[int, ...]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result


def _decline(task: Task, op: str) -> str | None:
    node = task.node.kernel_nodes()[0]
    if node.op != op:
        return f"not {op}"
    return "it takes no epilogue" if task.node.body else None


class CrossEntropy(Knobless):
    """The mean loss, a scalar."""

    name = "cross_entropy"

    def decline(self, task: Task) -> str | None:
        """Declines groups and every other operator."""
        return _decline(task, "cross_entropy")

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """Losses of rows into a workspace, then one ordered sum."""
        node = task.node
        weights = node.inputs[2] if len(node.inputs) > 2 else None
        shape, axis = task.shape(node.inputs[0]), node.attrs["axis"]
        count = _product(shape) // shape[axis]

        def body(ctx: Context) -> None:
            rows = ClassRows(ctx, weights)
            losses = ctx.workspaces[0]
            with rows.loop() as r:
                loss = rows.loss(r, rows.own(r), *rows.statistics(r))
                rows.keep_loss(r, losses, *loss)
            rows.whole_loss(node.outputs[0], losses)

        return Emitted(build(task, body, ((2 * count, "float32"),)), ((2 * count, "float32"),))


class CrossEntropyGrad(Knobless):
    """The gradient of the mean loss for the logits, scaled by dloss; and the loss, if wanted."""

    name = "cross_entropy_grad"

    def decline(self, task: Task) -> str | None:
        """Declines groups and every other operator."""
        return _decline(task, "cross_entropy_grad")

    def emit(self, task: Task, knobs: Mapping[str, Any]) -> Emitted:
        """D first, then the rows; the gradient may overwrite the logits."""
        node = task.node
        dloss = node.inputs[2]
        weights = node.inputs[3] if len(node.inputs) > 3 else None
        shape, axis = task.shape(node.inputs[0]), node.attrs["axis"]
        count = _product(shape) // shape[axis]
        workspaces = ((2 * count, "float32"),) if len(node.outputs) > 1 else ()

        def body(ctx: Context) -> None:
            rows = ClassRows(ctx, weights)
            scale = local(1)
            store(scale, 0, const(0.0), 1)
            with T.serial(0, rows.count) as r:
                label, counts = rows.row(r)
                store(scale, 0, load(scale, 0, 1) + rows.weight(label) * counts, 1)
            mean = ctx.load(dloss, 0, 1) / load(scale, 0, 1)
            store(scale, 0, ctx.load(dloss, 0, 1) if rows.summed else mean, 1)
            every = const(float(rows.classes))
            if weights is not None:
                buffer = ctx.buffers[weights]
                every = reduce_row(ctx, rows.classes, lambda i, w: load(buffer, i, w), add, 0.0)
            with rows.loop() as r:
                self._row(ctx, rows, r, load(scale, 0, 1), every)
            if workspaces:
                rows.whole_loss(node.outputs[1], ctx.workspaces[0])

        # the label's logit is read before its row may be written over
        func = build(task, body, workspaces, noalias=False)
        return Emitted(func, workspaces, inplace=((0, 0),))

    def _row(self, ctx: Context, rows: ClassRows, r: Expr, scale: Expr, every: Expr) -> None:
        out = ctx.buffers[ctx.task.node.outputs[0]]
        label, counts = rows.row(r)
        once = rows.inner == 1 and not rows.smoothing  # exponentials wait where the result will be
        own = rows.own(r)  # before it may be overwritten
        top, total = rows.statistics(r, out) if once else rows.statistics(r)
        if ctx.workspaces:
            rows.keep_loss(r, ctx.workspaces[0], *rows.loss(r, own, top, total))
        scale = T.bind(scale * counts)
        hit = T.bind(const(1 - rows.smoothing) * rows.weight(label) * scale)
        smooth = const(rows.smoothing / rows.classes) * scale
        share = T.bind((hit + smooth * every) / total)
        smooth = T.bind(smooth)

        def write(c: Expr, width: int) -> None:
            index = rows.at(r, c)
            if once:
                p = load(out, index, width)
            else:
                p = vm.exp(load(rows.logits, index, width) - splat(top, width), width)
            value = p * splat(share, width)
            if rows.smoothing:
                value = value - splat(smooth, width) * rows.weighted(c, width)
            store(out, index, value, width)

        if rows.inner == 1:
            for start, width in vector_loop(rows.classes, ctx.lanes, 2):
                write(start, width)
        else:
            with T.serial(0, rows.classes) as c:
                write(c, 1)
        index = rows.at(r, label)
        store(out, index, load(out, index, 1) - hit, 1)
