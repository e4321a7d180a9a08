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


def group_of(anchor, *body, outputs):
    """A group of nodes behind an anchor (or, with None, of nodes alone); its inputs follow."""
    nodes = (*([anchor] if anchor else []), *body)
    made = {o for n in nodes for o in n.outputs}
    inputs = tuple(dict.fromkeys(i for n in nodes for i in n.inputs if i not in made))
    attrs = {"anchor": 0 if anchor else None, "kind": anchor.op if anchor else "elementwise"}
    return Node("group", inputs, outputs, attrs, "", nodes)


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
