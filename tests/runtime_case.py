"""A two-layer network trained by kernels written with TE and a plan that reuses no byte.

Independent of frontend, passes, rules and planner: what the runtime's tests stand on.
    h = relu(x W1 + b1); logits = h W2; loss = cross entropy; momentum on W1, plain SGD on W2
W1 is stored transposed (perm), b1 is frozen, `head.weight` has an alias.
"""

from __future__ import annotations

import numpy as np

from pocktvm.ir.artifact import Identity, SelfTest
from pocktvm.ir.graph import Param
from pocktvm.ir.kernels import ArgSpec, Buffer, Call, Kernel, Kernels, Program
from pocktvm.ir.memory import CLASSES, MemoryPlan
from pocktvm.ir.model import Input
from pocktvm.targets import load_target

N, D, H, C = 8, 12, 32, 5
BETA, LR = 0.9, 0.5
X = Input("x", (N, D), "float32")
Y = Input("y", (N,), "int32", bound=C)


def parameters(seed=0):
    """torch's names and layouts: (out, in) matrices."""
    rng = np.random.default_rng(seed)
    return {
        "fc.weight": rng.normal(0, 0.4, (H, D)).astype(np.float32),
        "fc.bias": rng.normal(0, 0.4, (H,)).astype(np.float32),
        "head.weight": rng.normal(0, 0.4, (C, H)).astype(np.float32),
    }


def batch(seed=1):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(N, D)).astype(np.float32),
        rng.integers(0, C, N).astype(np.int32),
    )


class Reference:
    """The same step in numpy, float64."""

    def __init__(self, state):
        self.w = {k: v.astype(np.float64) for k, v in state.items()}
        self.m = np.zeros_like(self.w["fc.weight"])
        self.t = 0

    def logits(self, x):
        self.h = np.maximum(x @ self.w["fc.weight"].T + self.w["fc.bias"], 0)
        return self.h @ self.w["head.weight"].T

    def step(self, x, y, lr=LR):
        z = self.logits(x)
        z = z - z.max(1, keepdims=True)
        logp = z - np.log(np.exp(z).sum(1, keepdims=True))
        loss = -logp[np.arange(N), y].mean()
        dz = np.exp(logp)
        dz[np.arange(N), y] -= 1
        dz /= N
        dh = (dz @ self.w["head.weight"]) * (self.h > 0)
        self.w["head.weight"] -= lr * dz.T @ self.h
        self.m = BETA * self.m + (1 - BETA) * dh.T @ x
        self.t += 1
        self.w["fc.weight"] -= lr * self.m / (1 - BETA**self.t)
        return loss


def _functions():
    """symbol -> (tensors in argument order, number of inputs, pairs that share memory)."""
    from pocktvm.tvm_api import tvm

    te = tvm.te
    f, i = "float32", "int32"

    def t(name, *shape, dtype=f):
        return te.placeholder(shape, name=name, dtype=dtype)

    def total(size, value):
        k = te.reduce_axis((0, size))
        return te.sum(value(k), axis=k)

    x, y, lr, bc = t("x", N, D), t("y", N, dtype=i), t("lr"), t("bc")
    w1, b1, w2, h0 = t("w1", D, H), t("b1", H), t("w2", C, H), t("h", N, H)
    z0, dz0, dh0, m0 = t("z", N, C), t("dz", N, C), t("dh", N, H), t("m", D, H)

    pre = te.compute((N, H), lambda n, o: total(D, lambda k: x[n, k] * w1[k, o]))
    hidden = te.compute((N, H), lambda n, o: te.max(pre[n, o] + b1[o], tvm.tirx.const(0, f)))
    logits = te.compute((N, C), lambda n, c: total(H, lambda k: h0[n, k] * w2[c, k]))
    exps = te.compute((N,), lambda n: total(C, lambda k: te.exp(z0[n, k])))
    loss = te.compute((), lambda: total(N, lambda k: (te.log(exps[k]) - z0[k, y[k]]) / N))
    dz = te.compute(
        (N, C),
        lambda n, c: (
            (te.exp(z0[n, c]) / exps[n] - tvm.tirx.if_then_else(y[n] == c, 1.0, 0.0).astype(f)) / N
        ),
    )
    dh_all = te.compute((N, H), lambda n, k: total(C, lambda c: dz0[n, c] * w2[c, k]))
    dh = te.compute(
        (N, H),
        lambda n, k: tvm.tirx.if_then_else(h0[n, k] > 0, dh_all[n, k], tvm.tirx.const(0, f)),
    )
    dw2 = te.compute((C, H), lambda c, k: total(N, lambda n: dz0[n, c] * h0[n, k]))
    w2_new = te.compute((C, H), lambda c, k: w2[c, k] - lr[()] * dw2[c, k])
    dw1 = te.compute((D, H), lambda d, k: total(N, lambda n: x[n, d] * dh0[n, k]))
    m_new = te.compute((D, H), lambda d, k: BETA * m0[d, k] + (1 - BETA) * dw1[d, k])
    w1_new = te.compute((D, H), lambda d, k: w1[d, k] - lr[()] * m0[d, k] / bc[()])
    return {
        "fc": ([x, w1, b1, hidden], ()),
        "head": ([h0, w2, logits], ()),
        "loss": ([z0, y, loss], ()),
        "dlogits": ([z0, y, dz], ()),
        "dhidden": ([dz0, w2, h0, dh], ()),
        "update_head": ([dz0, h0, w2, lr, w2_new], ((4, 2),)),
        "momentum": ([x, dh0, m0, m_new], ((3, 2),)),
        "update_fc": ([w1, m0, lr, bc, w1_new], ((4, 0),)),
    }


def compile_kernels(target):
    """One object a kernel; the two matrix products run in parallel."""
    from pocktvm.tvm_api import IRModule, tvm, tvm_target

    kernels = {}
    for symbol, (tensors, inplace) in _functions().items():
        func = tvm.te.create_prim_func(tensors).with_attr("global_symbol", symbol)
        schedule = tvm.s_tir.Schedule(IRModule({symbol: func}))
        schedule.work_on(symbol)
        if symbol in ("fc", "dhidden", "momentum"):
            for block in schedule.get_child_blocks(schedule.get_sblock("root")):
                schedule.parallel(schedule.get_loops(block)[0])
        built = tvm.compile(schedule.mod, tvm_target(target.tvm))
        specs = tuple(ArgSpec(tuple(int(s) for s in t.shape), _dtype(t)) for t in tensors)
        kernels[symbol] = Kernel(
            symbol, _object(built), specs, len(tensors) - 1, 1, "te", inplace=inplace
        )
    return kernels


def _object(built):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        built.mod.write_to_file(str(path), "o")
        return path.read_bytes()


def _buffer(name, shape, kind, dtype="float32", alias_of=None):
    return Buffer(name, shape, dtype, 4 * int(np.prod(shape)), kind, alias_of)


def programs():
    buffers = [
        _buffer("x", (N, D), "input"), _buffer("y", (N,), "input", "int32"),
        _buffer("lr", (), "scalar"), _buffer("bc", (), "scalar"),
        _buffer("fc.weight", (D, H), "trained"), _buffer("head.weight", (C, H), "trained"),
        _buffer("exp_avg/fc.weight", (D, H), "optimizer"), _buffer("fc.bias", (H,), "frozen"),
        _buffer("h", (N, H), "activation"), _buffer("z", (N, C), "activation"),
        _buffer("loss", (), "activation"), _buffer("dz", (N, C), "gradient"),
        _buffer("dh", (N, H), "gradient"),
        _buffer("fc_new", (D, H), "trained", alias_of="fc.weight"),
        _buffer("head_new", (C, H), "trained", alias_of="head.weight"),
        _buffer("m_new", (D, H), "optimizer", alias_of="exp_avg/fc.weight"),
        _buffer("z_view", (N, C), "activation", alias_of="z"),
    ]  # fmt: skip
    table = {b.name: b for b in buffers}
    lists = {
        "fc": "x fc.weight fc.bias h", "head": "h head.weight z", "loss": "z_view y loss",
        "dlogits": "z_view y dz", "dhidden": "dz head.weight h dh",
        "update_head": "dz h head.weight lr head_new",
        "momentum": "x dh exp_avg/fc.weight m_new", "update_fc": "fc.weight m_new lr bc fc_new",
    }  # fmt: skip
    functions = _functions()
    calls = [
        Call(symbol, tuple(names.split()), len(names.split()) - 1, 1, symbol, functions[symbol][1])
        for symbol, names in lists.items()
    ]
    scalars = {"lr": "lr", "bc": f"bias_correction:{BETA}"}
    step = Program("step", tuple(calls), table, ("x", "y"), {"loss": "loss"}, scalars)
    few = {n: table[n] for n in "x fc.weight fc.bias h head.weight z".split()}
    return {
        "step": step,
        "predict": Program("predict", tuple(calls[:2]), few, ("x",), {"output": "z"}),
    }


def naive_plan(kernels):
    """Persistent buffers first, then everything else, one behind the other."""
    at, offsets = 0, {}
    step = kernels.programs["step"]
    roots = [b for b in step.buffers.values() if b.alias_of is None and b.kind != "frozen"]
    lasting = ("trained", "optimizer", "scalar")
    persistent = 0
    for buffer in sorted(roots, key=lambda b: b.kind not in lasting):
        offsets[buffer.name] = at
        at += buffer.nbytes + -buffer.nbytes % 64
        persistent = at if buffer.kind in lasting else persistent
    predict = {n: offsets[n] for n in kernels.programs["predict"].buffers if n in offsets}
    by_class = dict.fromkeys(CLASSES, 0)
    return MemoryPlan(
        at, persistent, at, at + 1000, {"step": offsets, "predict": predict}, by_class
    )


def build(target_name, out, *, state=None, model="tiny", inputs=(X, Y), target=None):
    """Emit the artifact; returns its folder."""
    from pocktvm.codegen import emit_artifact

    target = target or load_target(target_name)
    state = state or parameters()
    params = {
        "fc.weight": Param(
            "fc.weight", np.ascontiguousarray(state["fc.weight"].T), "trained", (1, 0)
        ),
        "head.weight": Param(
            "head.weight", state["head.weight"], "trained", None, ("tied.weight",)
        ),
        "exp_avg/fc.weight": Param(
            "exp_avg/fc.weight", np.zeros((D, H), np.float32), "optimizer", (1, 0)
        ),
    }
    kernels = Kernels(_cached_kernels(target), programs(), params, {"fc.bias": state["fc.bias"]})
    x, y = batch()
    reference = Reference(state)
    output = reference.logits(x).astype(np.float32)
    losses = tuple(reference.step(x, y) for _ in range(3))
    identity = Identity(
        model, target.name, "full", "cross_entropy", "momentum", LR, N, tuple(inputs), (N, C),
        {"fc.weight": 1.0, "head.weight": 1.0}, state,
        aliases={"head.weight": ("tied.weight",)}, versions={"pocktvm": "test"},
    )  # fmt: skip
    test = SelfTest({inputs[0].name: x, inputs[1].name: y}, losses, output, LR)
    return emit_artifact(kernels, naive_plan(kernels), identity, test, target, out)


_KERNELS = {}


def _cached_kernels(target):
    if target.name not in _KERNELS:
        _KERNELS[target.name] = compile_kernels(target)
    return _KERNELS[target.name]


def _dtype(tensor):
    return str(tensor.dtype).removeprefix("T.")
