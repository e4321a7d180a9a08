"""Optimizers: the update of one tensor, written as elementwise nodes behind its gradient.

Semantics are torch.optim's (Lion: arXiv 2302.06675). State starts at zero and is a parameter of
kind "optimizer" named `<state>/<tensor>`. Nothing that changes at run time is baked in: `lr` and
the bias corrections are scalars the runtime computes in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from pocktvm.autodiff.partial import put_part, take_parts, take_rates
from pocktvm.autodiff.to_graph import GraphBuilder
from pocktvm.errors import PockError
from pocktvm.ir.graph import Param
from pocktvm.ir.options import parse_options
from pocktvm.ir.part import Part
from pocktvm.ir.rates import Rates


class _Maths:
    """Nodes of one tensor's update, named after it. `value` is what learns: the tensor, or the
    slice of it that does; all nodes have its shape."""

    def __init__(self, builder: GraphBuilder, tensor: str, value: str = "") -> None:
        self.builder = builder
        self.tensor = tensor
        self.value = value or tensor
        self.lr = "lr"  # or a tensor of rates, where they are an input (ir/rates.py)
        self.layer = tensor.rpartition(".")[0]

    def __call__(self, op: str, *args: str | float) -> str:
        names = [a if isinstance(a, str) else self.builder.const(np.float32(a)) for a in args]
        name = f"{self.tensor}:{op}_update"
        return self.builder.node(op, *names, role="gradient", layer=self.layer, name=name)

    def state(self, kind: str) -> str:
        """A tensor of zeros beside what learns."""
        zeros = np.zeros(self.builder.values[self.value].shape, "float32")
        return self.builder.param(Param(f"{kind}/{self.tensor}", zeros, "optimizer"))

    def decayed(self, grad: str, weight_decay: float) -> str:
        """grad + weight_decay * parameter."""
        if not weight_decay:
            return grad
        return self("add", grad, self("multiply", self.value, weight_decay))

    def shrunk(self, weight_decay: float) -> str:
        """parameter * (1 - lr * weight_decay)."""
        if not weight_decay:
            return self.value
        factor = self("subtract", 1.0, self("multiply", self.lr, weight_decay))
        return self("multiply", self.value, factor)

    def mix(self, old: str, new: str, beta: float) -> str:
        """old + (new - old) * (1 - beta): torch's lerp."""
        return self("add", old, self("multiply", self("subtract", new, old), 1.0 - beta))


class Optimizer:
    """`lr` is the stored default of a run-time input. `clip_norm` bounds the norm of all gradients
    together (every gradient then lives until the last one is known: the price is memory);
    `clip_tensor` bounds each tensor's norm by itself, for free."""

    name: ClassVar[str] = ""

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.0,
        *,
        clip_norm: float | None = None,
        clip_tensor: float | None = None,
    ) -> None:
        _check(self.name, "lr", lr, lambda v: v >= 0, "at least 0")
        _check(self.name, "weight_decay", weight_decay, lambda v: v >= 0, "at least 0")
        for key, value in (("clip_norm", clip_norm), ("clip_tensor", clip_tensor)):
            if value is not None:
                _check(self.name, key, value, lambda v: v > 0, "positive")
        self.lr = float(lr)
        self.weight_decay = float(weight_decay)
        self.clip_norm = None if clip_norm is None else float(clip_norm)
        self.clip_tensor = None if clip_tensor is None else float(clip_tensor)

    def apply(
        self,
        builder: GraphBuilder,
        gradients: Mapping[str, str],
        parts: Mapping[str, Part] | None = None,
        rates: Rates | None = None,
    ) -> dict[str, str]:
        """Append every update; parameter or state -> the value that replaces it. Of a tensor in
        `parts` only that slice is updated; with `rates` each has factors of its own to lr."""
        builder.scalar("lr")
        updates: dict[str, str] = {}
        gradients, slices = take_parts(builder, gradients, parts or {})
        for tensor, grad in self._clipped(builder, gradients).items():
            value = slices.get(tensor, tensor)
            maths = _Maths(builder, tensor, value)
            if rates is not None:
                maths.lr = maths("multiply", "lr", take_rates(builder, rates, tensor))
            made = self.update(maths, value, grad)
            if parts and tensor in parts:
                made[tensor] = put_part(builder, tensor, parts[tensor], made.pop(value))
            updates |= made
        return updates

    def update(self, m: _Maths, tensor: str, grad: str) -> dict[str, str]:
        """Append the nodes of one tensor's update; what is replaced -> its new value."""
        raise PockError(f"the optimizer {type(self).__name__} has no update.")

    def _clipped(self, builder: GraphBuilder, gradients: Mapping[str, str]) -> Mapping[str, str]:
        """Gradients scaled by min(1, bound / (norm + 1e-6)), as torch's clip_grad_norm_."""
        if self.clip_tensor is not None:
            factors = {t: _factor(builder, t, [g], self.clip_tensor) for t, g in gradients.items()}
        elif self.clip_norm is not None:
            one = _factor(builder, "", list(gradients.values()), self.clip_norm)
            factors = dict.fromkeys(gradients, one)
        else:
            return gradients
        return {t: _Maths(builder, t)("multiply", g, factors[t]) for t, g in gradients.items()}

    def options(self) -> dict[str, Any]:
        """Every option by name, `lr` among them."""
        return dict(vars(self))

    def __str__(self) -> str:
        defaults = vars(KINDS[self.name][0]())
        changed = {k: v for k, v in vars(self).items() if v != defaults[k] and k != "lr"}
        text = ",".join(f"{k}={_shown(v)}" for k, v in changed.items())
        return f"{self.name}:{text}" if text else self.name

    def __repr__(self) -> str:
        text = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({text})"


class SGD(Optimizer):
    """d = g + wd*p; buf = momentum*buf + d; p -= lr * (buf, or d + momentum*buf for Nesterov)."""

    name = "sgd"

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        clip_norm: float | None = None,
        clip_tensor: float | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, clip_norm=clip_norm, clip_tensor=clip_tensor)
        _check(self.name, "momentum", momentum, lambda v: 0 <= v < 1, "in [0, 1)")
        if nesterov and not momentum:
            raise PockError("nesterov needs a momentum: SGD(momentum=0.9, nesterov=True).")
        self.momentum = float(momentum)
        self.nesterov = bool(nesterov)

    def update(self, m: _Maths, tensor: str, grad: str) -> dict[str, str]:
        """A zero buffer gives torch's first step, which copies the gradient."""
        d, updates = m.decayed(grad, self.weight_decay), {}
        if self.momentum:
            buffer = m.state("momentum_buffer")
            moved = m("add", m("multiply", buffer, self.momentum), d)
            updates[buffer] = moved
            d = m("add", d, m("multiply", moved, self.momentum)) if self.nesterov else moved
        return {tensor: m("subtract", tensor, m("multiply", m.lr, d)), **updates}


class Adam(Optimizer):
    """Kingma & Ba with torch's form: p -= lr/bc1 * m / (sqrt(v)/sqrt(bc2) + eps)."""

    name = "adam"

    def __init__(
        self,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        clip_norm: float | None = None,
        clip_tensor: float | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, clip_norm=clip_norm, clip_tensor=clip_tensor)
        self.betas = _betas(self.name, betas)
        _check(self.name, "eps", eps, lambda v: v > 0, "positive")
        self.eps = float(eps)

    def update(self, m: _Maths, tensor: str, grad: str) -> dict[str, str]:
        """L2 decay goes through the moments."""
        return self._moments(m, tensor, m.decayed(grad, self.weight_decay), tensor)

    def _moments(self, m: _Maths, tensor: str, grad: str, start: str) -> dict[str, str]:
        beta1, beta2 = self.betas
        first, second = m.state("exp_avg"), m.state("exp_avg_sq")
        c1, c2 = (m.builder.scalar(f"bias_correction:{b!r}") for b in self.betas)
        mean = m.mix(first, grad, beta1)
        square = m("multiply", m("square", grad), 1.0 - beta2)
        square = m("add", m("multiply", second, beta2), square)
        root = m("divide", m("sqrt", square), m("sqrt", c2))
        ratio = m("divide", mean, m("add", root, self.eps))
        moved = m("subtract", start, m("multiply", ratio, m("divide", m.lr, c1)))
        return {tensor: moved, first: mean, second: square}


class AdamW(Adam):
    """Adam with decoupled decay: p *= 1 - lr*wd before the step."""

    name = "adamw"

    def __init__(
        self,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        clip_norm: float | None = None,
        clip_tensor: float | None = None,
    ) -> None:
        clips = {"clip_norm": clip_norm, "clip_tensor": clip_tensor}
        super().__init__(lr, betas, eps, weight_decay, **clips)

    def update(self, m: _Maths, tensor: str, grad: str) -> dict[str, str]:
        """Decay acts on the parameter itself."""
        return self._moments(m, tensor, grad, m.shrunk(self.weight_decay))


class Lion(Optimizer):
    """p = p*(1 - lr*wd) - lr * sign(b1*m + (1-b1)*g); m = b2*m + (1-b2)*g."""

    name = "lion"

    def __init__(
        self,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        clip_norm: float | None = None,
        clip_tensor: float | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, clip_norm=clip_norm, clip_tensor=clip_tensor)
        self.betas = _betas(self.name, betas)

    def update(self, m: _Maths, tensor: str, grad: str) -> dict[str, str]:
        """One state, half of Adam's memory."""
        beta1, beta2 = self.betas
        state = m.state("exp_avg")

        def blend(beta: float) -> str:
            return m("add", m("multiply", state, beta), m("multiply", grad, 1.0 - beta))

        step = m("multiply", m.lr, m("sign", blend(beta1)))
        moved = m("subtract", m.shrunk(self.weight_decay), step)
        return {tensor: moved, state: blend(beta2)}


_CLIPS = {"clip_norm": None, "clip_tensor": None}
_DECAY = {"weight_decay": 0.0, **_CLIPS}
_ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "betas": None, **_DECAY}

# name -> (class, options of the command line with their defaults)
KINDS: Mapping[str, tuple[Callable[..., Optimizer], Mapping[str, Any]]] = {
    "sgd": (SGD, {"momentum": 0.0, "nesterov": False, **_DECAY}),
    "momentum": (SGD, {"momentum": 0.9, "nesterov": False, **_DECAY}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, **_DECAY}),
    "adam": (Adam, _ADAM),
    "adamw": (AdamW, {**_ADAM, "weight_decay": 0.01}),
    "lion": (Lion, {"beta1": 0.9, "beta2": 0.99, "betas": None, **_DECAY}),
}


def parse_optimizer(spec: str | Optimizer, lr: float | None = None) -> Optimizer:
    """`name` or `name:option=value,…`; `lr` replaces the default one.

    Raises PockError with the names or options there are.
    """
    if isinstance(spec, Optimizer):
        if lr is not None:
            spec.lr = lr
        return spec
    tables = {name: {"lr": None, **options} for name, (_, options) in KINDS.items()}
    name, options = parse_options(spec, "optimizer", tables)
    if "beta1" in options:
        betas = options.pop("beta1"), options.pop("beta2")
        options["betas"] = options["betas"] or betas
    given = options.pop("lr") if lr is None else lr
    if lr is not None:
        options.pop("lr", None)
    return KINDS[name][0](**options, **({} if given is None else {"lr": given}))


def _factor(builder: GraphBuilder, tensor: str, gradients: Sequence[str], bound: float) -> str:
    """min(1, bound / (norm + 1e-6)) of some gradients together."""
    m, total = _Maths(builder, tensor), ""
    for grad in gradients:
        axes = tuple(range(len(builder.values[grad].shape)))
        square = m("square", grad)
        attrs = {"role": "gradient", "layer": m.layer, "name": f"{tensor}:norm"}
        if axes:
            square = builder.node("sum", square, shape=(), axes=axes, keepdims=False, **attrs)
        total = m("add", total, square) if total else square
    ratio = m("divide", bound, m("add", m("sqrt", total), 1e-6))
    return m("minimum", ratio, 1.0)


def _betas(name: str, betas: Sequence[float]) -> tuple[float, float]:
    if len(betas) != 2:
        raise PockError(f"{name} takes two betas, not {betas!r}.")
    for beta in betas:
        _check(name, "beta", beta, lambda v: 0 <= v < 1, "in [0, 1)")
    return float(betas[0]), float(betas[1])


def _check(name: str, option: str, value: Any, good: Callable[[float], bool], wanted: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not np.isfinite(value) or not good(value):
        raise PockError(f"{name}'s {option}={value!r} must be {wanted}.")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(repr, value))}]" if isinstance(value, tuple) else repr(value)
