"""Losses: what is minimised, written as operators behind the model's output.

Semantics are those of `torch.nn.functional`: the class axis is 1, the result is a mean. Labels are
the program's last input, `y`; their shape and dtype follow from the output's shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pocktvm.autodiff.ops import Emitter, Expr, constant, shape_of
from pocktvm.errors import PockError
from pocktvm.ir.losses import LOSSES
from pocktvm.ir.model import Input
from pocktvm.ir.options import parse_options

# (emitter, output, labels, options) -> scalar
Emit = Callable[[Emitter, Expr, Any, Mapping[str, Any]], Expr]


@dataclass(frozen=True)
class Kind:
    """One kind of loss.

    emit     writes its operators
    labels   what it wants as `y`: "class" (indices), "same" (the output's shape) or "none"
    """

    emit: Emit
    labels: str


@dataclass(frozen=True)
class Loss:
    """A loss by name with its options; `str(loss)` parses back to it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def label_input(self, output_shape: tuple[int, ...]) -> Input | None:
        """The input `y` for a model of this output shape; None when the loss takes no labels.

        Raises PockError when the output has no shape this loss can read.
        """
        labels = KINDS[self.name].labels
        if labels == "none":
            if math.prod(output_shape) != 1:
                raise PockError(
                    f"loss 'none' means the model returns the loss itself, but it returns "
                    f"{list(output_shape)}; return one number, or choose a loss (--loss)."
                )
            return None
        if labels == "same":
            return Input("y", tuple(output_shape), "float32")
        if not output_shape:
            raise PockError("cross_entropy needs logits; the model returns a single number.")
        axis = class_axis(output_shape)
        classes = output_shape[axis]
        self._check_weight(classes)
        shape = tuple(d for i, d in enumerate(output_shape) if i != axis)
        ignored = int(self.options["ignore_index"])
        return Input("y", shape, "int32", bound=classes, ignore_index=ignored)

    def _check_weight(self, classes: int) -> None:
        weight = self.options.get("weight")
        if weight is not None and len(weight) != classes:
            raise PockError(
                f"cross_entropy's weight has {len(weight)} numbers, the output {classes} classes."
            )

    def emit(self, e: Emitter, output: Expr, labels: Expr | None) -> Expr:
        """The scalar loss of `output`."""
        return KINDS[self.name].emit(e, output, labels, self.options)

    def __str__(self) -> str:
        defaults = LOSSES[self.name]
        changed = {k: v for k, v in self.options.items() if v != defaults[k]}
        text = ",".join(f"{k}={json.dumps(v)}" for k, v in changed.items())
        return f"{self.name}:{text}" if text else self.name


def parse_loss(spec: str | Loss) -> Loss:
    """`name` or `name:option=value,…`. Raises PockError with the names or options there are."""
    if isinstance(spec, Loss):
        return spec
    name, options = parse_options(spec, "loss", LOSSES)
    if name == "cross_entropy" and not 0.0 <= options["label_smoothing"] < 1.0:
        raise PockError(f"label_smoothing={options['label_smoothing']} must lie in [0, 1).")
    if name == "huber" and options["delta"] <= 0:
        raise PockError(f"huber's delta={options['delta']} must be positive.")
    return Loss(name, options)


def class_axis(shape: tuple[int, ...]) -> int:
    """1, or 0 where there is one axis only."""
    return 1 if len(shape) > 1 else 0


def _mean(e: Emitter, x: Expr) -> Expr:
    return e.reduce("mean", x, range(len(shape_of(x))))


def _cross_entropy(e: Emitter, output: Expr, y: Expr, options: Mapping[str, Any]) -> Expr:
    weight = options["weight"]
    extra = [] if weight is None else [constant(weight, "float32")]
    output, y, axis = _rows_of_classes(e, output, y)
    attrs: dict[str, Any] = {
        "axis": axis,
        "label_smoothing": float(options["label_smoothing"]),
        "ignore_index": int(options["ignore_index"]),
    }
    return e.op("cross_entropy", output, y, *extra, shape=(), **attrs)


def _rows_of_classes(e: Emitter, output: Expr, y: Expr) -> tuple[Expr, Expr, int]:
    """Logits, labels, class axis. A permutation that only moved the classes from the last axis to
    axis 1, where torch wants them (language models), is taken back: rows are read in memory's
    order, and the logits are neither copied nor their gradient permuted."""
    axis = class_axis(shape_of(output))
    moved = e.call_of(output, "permute_dims")
    if moved is None:
        return output, y, axis
    axes = moved.attrs["axes"]
    others = [a for i, a in enumerate(axes) if i != axis]
    if axes[axis] != len(axes) - 1 or others != sorted(others):
        return output, y, axis
    logits = moved.args[0]
    classes = shape_of(logits)[-1]
    rows = math.prod(shape_of(logits)[:-1])
    return e.reshape(logits, (rows, classes)), e.reshape(y, (rows,)), 1


def _bce_with_logits(e: Emitter, output: Expr, y: Expr, options: Mapping[str, Any]) -> Expr:
    """mean(softplus(x) - x * y); with a pos_weight p: (1-y) x + (1 + (p-1) y) softplus(-x)."""
    p = options["pos_weight"]
    if p is None:
        each = e.subtract(_softplus(e, output), e.multiply(output, y))
        return _mean(e, each)
    factor = e.add(e.multiply(y, float(p) - 1.0), 1.0)
    bent = e.multiply(factor, _softplus(e, e.unary("negative", output)))
    return _mean(e, e.add(e.multiply(e.subtract(1.0, y), output), bent))


def _softplus(e: Emitter, x: Expr) -> Expr:
    return e.unary("softplus", x, beta=1.0, threshold=20.0)


def _mse(e: Emitter, output: Expr, y: Expr, options: Mapping[str, Any]) -> Expr:
    return _mean(e, e.unary("square", e.subtract(output, y)))


def _l1(e: Emitter, output: Expr, y: Expr, options: Mapping[str, Any]) -> Expr:
    return _mean(e, e.unary("abs", e.subtract(output, y)))


def _huber(e: Emitter, output: Expr, y: Expr, options: Mapping[str, Any]) -> Expr:
    """z * (d - z/2) with z = clip(d, -delta, delta): quadratic inside, linear outside."""
    delta = float(options["delta"])
    d = e.subtract(output, y)
    z = e.unary("clip", d, min=-delta, max=delta)
    return _mean(e, e.multiply(z, e.subtract(d, e.multiply(z, 0.5))))


def _kl_div(e: Emitter, output: Expr, y: Expr, options: Mapping[str, Any]) -> Expr:
    """The output holds log-probabilities, y the target distribution (its log: log_target)."""
    if options["log_target"]:
        each = e.multiply(e.unary("exp", y), e.subtract(y, output))
    else:
        log = e.unary("log", e.binary("maximum", y, 1e-38))  # 0 log 0 = 0
        each = e.multiply(y, e.subtract(log, output))
    if options["reduction"] == "mean":
        return _mean(e, each)
    total = e.reduce("sum", each, range(len(shape_of(each))))
    if options["reduction"] == "sum":
        return total
    return e.divide(total, float(shape_of(output)[0]))


def _cosine_embedding(e: Emitter, output: Expr, y: Expr, options: Mapping[str, Any]) -> Expr:
    """mean(1 - cos(output, y)) over rows: the target embedding is y, every pair is alike."""
    axis = len(shape_of(output)) - 1

    def dot(a: Expr, b: Expr) -> Expr:
        return e.reduce("sum", e.multiply(a, b), (axis,))

    squares = e.multiply(e.add(dot(output, output), 1e-12), e.add(dot(y, y), 1e-12))
    cosine = e.divide(dot(output, y), e.unary("sqrt", squares))
    return _mean(e, e.subtract(1.0, cosine))


def _none(e: Emitter, output: Expr, y: Any, options: Mapping[str, Any]) -> Expr:
    return e.reshape(output, ())


# name, as in ir/losses.py -> how it is written, and the labels it wants
KINDS: Mapping[str, Kind] = {
    "cross_entropy": Kind(_cross_entropy, "class"),
    "bce_with_logits": Kind(_bce_with_logits, "same"),
    "mse": Kind(_mse, "same"),
    "l1": Kind(_l1, "same"),
    "huber": Kind(_huber, "same"),
    "kl_div": Kind(_kl_div, "same"),
    "cosine_embedding": Kind(_cosine_embedding, "same"),
    "none": Kind(_none, "none"),
}
