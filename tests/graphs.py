"""Small graphs for the tests of passes: a builder with one method a node."""

import numpy as np

from pocktvm.ir.graph import Graph, Node, Param, Value
from pocktvm.reference import evaluate


class Build:
    """Collects nodes; shapes are given, or taken from the first operand."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.values, self.nodes, self.inputs = {}, [], []
        self.consts, self.params, self.scalars = {}, {}, {}

    def _name(self, hint):
        name, k = hint, 1
        while name in self.values:
            k += 1
            name = f"{hint}_{k}"
        return name

    def input(self, *shape, dtype="float32", name="x"):
        name = self._name(name)
        self.values[name] = Value(name, shape, dtype)
        self.inputs.append(name)
        return name

    def const(self, array, name="c"):
        array = np.asarray(array, None if np.asarray(array).dtype != np.float64 else np.float32)
        name = self._name(name)
        self.values[name] = Value(name, array.shape, str(array.dtype))
        self.consts[name] = array
        return name

    def randn(self, *shape):
        return (self.rng.standard_normal(shape) * 0.5).astype(np.float32)

    def param(self, *shape, name="w", kind="trained"):
        name = self._name(name)
        self.values[name] = Value(name, shape)
        self.params[name] = Param(name, self.randn(*shape), kind)
        return name

    def scalar(self, formula="lr"):
        self.values[formula] = Value(formula, ())
        self.scalars[formula] = formula
        return formula

    def op(self, op, *inputs, shape=None, dtype="float32", role="activation", layer="", **attrs):
        if shape is None:
            shape = np.broadcast_shapes(*(self.values[i].shape for i in inputs))
        name = self._name(op)
        self.values[name] = Value(name, tuple(shape), dtype, role)
        self.nodes.append(Node(op, tuple(inputs), (name,), attrs, layer))
        return name

    def conv(self, x, w, *, stride=1, pad=None, groups=1, op="conv2d", shape=None):
        kh, kw = self.values[w].shape[2:] if op != "conv2d_weight_grad" else shape[2:]
        p = (kh // 2, kw // 2) if pad is None else (pad, pad)
        if shape is None:
            n, _, h, wd = self.values[x].shape
            out = [
                (d + 2 * q - k) // stride + 1 for d, q, k in zip((h, wd), p, (kh, kw), strict=True)
            ]
            shape = (n, self.values[w].shape[0], *out)
        return self.op(
            op,
            x,
            w,
            shape=shape,
            strides=(stride, stride),
            padding=(*p, *p),
            dilation=(1, 1),
            groups=groups,
            layout="NCHW",
        )

    def graph(self, updates=None, **outputs):
        return Graph(
            name="step",
            values=self.values,
            nodes=tuple(self.nodes),
            inputs=tuple(self.inputs),
            outputs=outputs,
            scalars=self.scalars,
            params=self.params,
            consts=self.consts,
            updates=updates or {},
        ).check()


def ops(graph):
    """Operators in order, bodies flattened."""
    return [n.op for node in graph.nodes for n in node.kernel_nodes()]


def same_numbers(before, after, tolerance=1e-4, seed=1):
    """Assert that both graphs compute the same outputs and updates (in torch's layout)."""
    from pocktvm.passes.compare import random_inputs

    after.check()
    inputs = random_inputs(before, seed)
    old, new = evaluate(before, inputs), evaluate(after, inputs)
    assert old.outputs.keys() == new.outputs.keys()
    for key, array in old.outputs.items():
        np.testing.assert_allclose(new.outputs[key], array, rtol=tolerance, atol=tolerance)
    for key, array in old.updates.items():
        got = new.updates.get(key, after.params[key].value)
        np.testing.assert_allclose(
            after.params[key].in_torch(got),
            before.params[key].in_torch(array),
            rtol=tolerance,
            atol=tolerance,
        )


def inverted_residual_step(batch=2, channels=8, size=6, trained=True, scale_trained=False):
    """A pointwise + depthwise + pointwise block with batch norms and a skip, its loss and SGD step,
    as differentiation would write it."""
    b = Build()
    x = b.input(batch, channels, size, size)
    y = b.input(batch, dtype="int32", name="y")
    lr = b.scalar("lr")
    hidden = 2 * channels
    w1 = b.param(hidden, channels, 1, 1, name="pw1.weight") if trained else None
    w1 = w1 or b.const(b.randn(hidden, channels, 1, 1), "pw1.weight")
    w2 = b.const(b.randn(hidden, 1, 3, 3), "dw.weight")
    w3 = b.const(b.randn(channels, hidden, 1, 1), "pw2.weight")
    wf = b.param(4, channels, name="fc.weight")
    beta = b.param(hidden, name="bn1.bias")
    stem = b.const(b.randn(channels, channels, 3, 3), "stem.weight")

    def scale(c):
        return b.const(np.abs(b.randn(1, c, 1, 1)) + 0.5, "scale")

    def bn(v, c, s, shift=None):
        v = b.op("multiply", v, s)
        return b.op("add", v, shift or b.const(b.randn(1, c, 1, 1), "shift"))

    s0, s1, s2, s3 = scale(channels), scale(hidden), scale(hidden), scale(channels)
    x0 = b.op("relu6", bn(b.conv(x, stem), channels, s0))
    c1 = b.conv(x0, w1)
    beta_v = b.op("reshape", beta, shape=(1, hidden, 1, 1))
    r1 = b.op("relu6", bn(c1, hidden, s1, beta_v))
    r2 = b.op("relu6", bn(b.conv(r1, w2, groups=hidden), hidden, s2))
    z = b.op("add", bn(b.conv(r2, w3), channels, s3), x0)
    m = b.op("mean", z, shape=(batch, channels, 1, 1), axes=(2, 3), keepdims=True)
    f = b.op("reshape", m, shape=(batch, channels))
    wt = b.op("permute_dims", wf, shape=(channels, 4), axes=(1, 0))
    logits = b.op("matmul", f, wt, shape=(batch, 4))
    attrs = dict(axis=1, label_smoothing=0.0, ignore_index=-100)
    loss = b.op("cross_entropy", logits, y, shape=(), **attrs)

    one = b.const(np.float32(1), "one")
    g = dict(role="gradient")
    dl = b.op("cross_entropy_grad", logits, y, one, shape=(batch, 4), **attrs, **g)
    df = b.op("matmul", dl, wf, shape=(batch, channels), **g)
    ft = b.op("permute_dims", f, shape=(channels, batch), axes=(1, 0), **g)
    dwt = b.op("matmul", ft, dl, shape=(channels, 4), **g)
    dwf = b.op("permute_dims", dwt, shape=(4, channels), axes=(1, 0), **g)
    dm = b.op("reshape", df, shape=(batch, channels, 1, 1), **g)
    dm = b.op("divide", dm, b.const(np.float32(size * size), "pixels"), **g)
    dz = b.op("broadcast_to", dm, shape=b.values[z].shape, **g)
    d3 = b.op("multiply", dz, s3, **g)
    dr2 = b.conv(d3, w3, op="conv2d_input_grad", shape=b.values[r2].shape)
    d2 = b.op("multiply", b.op("relu6_grad", dr2, r2, **g), s2, **g)
    dr1 = b.conv(d2, w2, groups=hidden, op="conv2d_input_grad", shape=b.values[r1].shape)
    d1 = b.op("relu6_grad", dr1, r1, **g)
    db = b.op("sum", d1, shape=(1, hidden, 1, 1), axes=(0, 2, 3), keepdims=True, **g)
    db = b.op("reshape", db, shape=(hidden,), **g)
    d1s = b.op("multiply", d1, s1, **g)

    def sgd(p, d):
        return b.op("subtract", p, b.op("multiply", d, lr, **g))

    updates = {wf: sgd(wf, dwf), beta: sgd(beta, db)}
    if trained:
        dw1 = b.conv(x0, d1s, op="conv2d_weight_grad", pad=0, shape=b.values[w1].shape)
        velocity = b.param(hidden, channels, 1, 1, name=f"momentum/{w1}", kind="optimizer")
        v = b.op("add", b.op("multiply", velocity, b.const(np.float32(0.9))), dw1)
        updates |= {w1: sgd(w1, v), velocity: v}
        if scale_trained:
            dx0 = b.conv(d1s, w1, op="conv2d_input_grad", shape=b.values[x0].shape)
            ds = b.op("sum", b.op("multiply", dx0, x0, **g), shape=(channels,), axes=(0, 2, 3))
            p = b.param(channels, name="stem.scale")
            updates[p] = sgd(p, ds)
    return b.graph(updates, loss=loss, output=logits)
