"""The reference against torch itself, in both layouts, and its own shape checks."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pocktvm.errors import InternalError
from pocktvm.ir import ops
from pocktvm.ir.graph import Graph, Node, Param, Value
from pocktvm.reference import RULES, eval_node, evaluate

rng = np.random.default_rng(0)


def run(op, arrays, out_shapes, **attrs):
    """Evaluate one operator on arrays."""
    values = {f"i{k}": Value(f"i{k}", a.shape, str(a.dtype)) for k, a in enumerate(arrays)}
    outs = []
    for k, shape in enumerate(out_shapes):
        dtype = "float32"
        if isinstance(shape, tuple) and shape and isinstance(shape[-1], str):
            *shape, dtype = shape
        outs.append(f"o{k}")
        values[f"o{k}"] = Value(f"o{k}", tuple(shape), dtype)
    node = Node(op, tuple(f"i{k}" for k in range(len(arrays))), tuple(outs), attrs)
    return eval_node(node, values, {f"i{k}": a for k, a in enumerate(arrays)})


def randn(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def test_vocabulary_is_covered():
    first_words = []
    for line in ops.__doc__.splitlines():
        if m := re.match(r"^([a-z][\w ]*?)\s{2,}\S.*->|^([a-z]\w* [\w ]*?)\s+\S+ ->", line):
            first_words += (m.group(1) or m.group(2)).split()
    named = {w for w in first_words if w.isidentifier() and w not in ("name", "x", "dy", "indices")}
    assert "conv2d" in named and "softmax" in named
    assert (named | ops.ELEMENTWISE | ops.REDUCTIONS | ops.SPATIAL) - set(RULES) == set()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(
    "stride, padding, dilation, groups",
    [(1, (1, 1, 1, 1), 1, 1), (2, (0, 1, 1, 2), 1, 4), (2, (1, 1, 1, 1), 2, 2)],
)
def test_convolution_and_gradients(layout, stride, padding, dilation, groups):
    x, w = randn(2, 4, 9, 8), randn(8, 4 // groups, 3, 3)
    xt, wt = torch.tensor(x, requires_grad=True), torch.tensor(w, requires_grad=True)
    t, left, b, r = padding
    yt = F.conv2d(F.pad(xt, (left, r, t, b)), wt, None, stride, 0, dilation, groups)
    dy = randn(*yt.shape)
    yt.backward(torch.tensor(dy))
    nhwc = layout == "NHWC"
    act = (lambda a: a.transpose(0, 2, 3, 1)) if nhwc else (lambda a: a)
    wei = (lambda a: a.transpose(2, 3, 1, 0)) if nhwc else (lambda a: a)
    attrs = dict(
        strides=(stride, stride),
        padding=padding,
        dilation=(dilation, dilation),
        groups=groups,
        layout=layout,
    )
    expected = act(yt.detach().numpy())
    (y,) = run("conv2d", [act(x), wei(w)], [expected.shape], **attrs)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    (dx,) = run("conv2d_input_grad", [act(dy), wei(w)], [act(x).shape], **attrs)
    np.testing.assert_allclose(dx, act(xt.grad.numpy()), rtol=1e-4, atol=1e-5)
    (dw,) = run("conv2d_weight_grad", [act(x), act(dy)], [wei(w).shape], **attrs)
    np.testing.assert_allclose(dw, wei(wt.grad.numpy()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["max", "avg", "avg_all", "nearest", "linear"])
def test_pooling_and_resize(layout, kind):
    x = randn(2, 3, 8, 6)
    xt = torch.tensor(x, requires_grad=True)
    window = dict(pool=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1), dilation=(1, 1))
    if kind == "max":
        op, yt, attrs = "max_pool2d", F.max_pool2d(xt, 3, 2, 1), window
    elif kind.startswith("avg"):
        include = kind == "avg_all"
        yt = F.avg_pool2d(xt, 3, 2, 1, count_include_pad=include)
        op, attrs = "avg_pool2d", window | {"count_include_pad": include}
    else:
        mode = {"nearest": "nearest", "linear": "bilinear"}[kind]
        op, attrs = "resize2d", dict(method=kind, align_corners=False)
        yt = F.interpolate(xt, (12, 9), mode=mode)
    act = (lambda a: a.transpose(0, 2, 3, 1)) if layout == "NHWC" else (lambda a: a)
    dy = randn(*yt.shape)
    yt.backward(torch.tensor(dy))
    expected = act(yt.detach().numpy())
    (y,) = run(op, [act(x)], [expected.shape], layout=layout, **attrs)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    args = [act(dy), act(x)] if kind == "max" else [act(dy)]
    (dx,) = run(f"{op}_grad", args, [act(x).shape], layout=layout, **attrs)
    np.testing.assert_allclose(dx, act(xt.grad.numpy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "op, attrs",
    [
        ("relu", {}),
        ("relu6", {}),
        ("sigmoid", {}),
        ("tanh", {}),
        ("clip", {"min": -0.5, "max": 0.5}),
        ("gelu", {}),
        ("gelu_tanh", {}),
        ("silu", {}),
        ("softplus", {"beta": 1.0, "threshold": 20.0}),
        ("hardswish", {}),
        ("hardsigmoid", {}),
        ("leakyrelu", {"alpha": 0.1}),
        ("elu", {"alpha": 1.0}),
    ],
)
def test_activation_gradient_is_a_central_difference(op, attrs):
    x = (randn(64) * 3).astype(np.float32)
    x = x[np.abs(np.abs(x) - 0.5) > 1e-2]
    dout, h = randn(*x.shape), 1e-2
    (y,) = run(op, [x], [x.shape], **attrs)
    (up,) = run(op, [x + np.float32(h)], [x.shape], **attrs)
    (down,) = run(op, [x - np.float32(h)], [x.shape], **attrs)
    by_output = op in ("relu", "relu6", "sigmoid", "tanh")
    (dx,) = run(f"{op}_grad", [dout, y if by_output else x], [x.shape], **attrs)
    difference = dout * (up - down) / (2 * h)
    smooth = np.abs(dx - difference) < 5e-3 * (1 + np.abs(dout))
    assert smooth.mean() > 0.9  # a kink may fall between x - h and x + h


def test_norms_and_softmax_gradients():
    x, g, b, dy = randn(2, 5, 8), randn(8), randn(8), randn(2, 5, 8)
    xt = torch.tensor(x, requires_grad=True)
    yt = F.layer_norm(xt, (8,), torch.tensor(g), torch.tensor(b), 1e-5)
    yt.backward(torch.tensor(dy))
    y, mean, rstd = run("layer_norm", [x, g, b], [x.shape, (2, 5), (2, 5)], axes=(2,), eps=1e-5)
    np.testing.assert_allclose(y, yt.detach(), rtol=1e-4, atol=1e-5)
    (dx,) = run("layer_norm_grad", [dy, x, g, mean, rstd], [x.shape], axes=(2,))
    np.testing.assert_allclose(dx, xt.grad, rtol=1e-4, atol=1e-5)

    xt = torch.tensor(x, requires_grad=True)
    F.rms_norm(xt, (8,), torch.tensor(g), 1e-6).backward(torch.tensor(dy))
    _, rstd = run("rms_norm", [x, g], [x.shape, (2, 5, 1)], axes=(2,), eps=1e-6)
    (dx,) = run("rms_norm_grad", [dy, x, g, rstd], [x.shape], axes=(2,))
    np.testing.assert_allclose(dx, xt.grad, rtol=1e-4, atol=1e-5)

    for op, function in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        xt = torch.tensor(x, requires_grad=True)
        function(xt, 1).backward(torch.tensor(dy))
        (y,) = run(op, [x], [x.shape], axis=1)
        (dx,) = run(f"{op}_grad", [dy, y], [x.shape], axis=1)
        np.testing.assert_allclose(dx, xt.grad, rtol=1e-4, atol=1e-5)


def test_cross_entropy_ignores_and_smooths():
    x, y = randn(4, 6), np.array([1, -100, 3, 5], np.int32)
    attrs = dict(axis=1, label_smoothing=0.1, ignore_index=-100)
    xt = torch.tensor(x, requires_grad=True)
    loss = F.cross_entropy(xt, torch.tensor(y).long(), label_smoothing=0.1)
    (loss * 3).backward()
    (got,) = run("cross_entropy", [x, y], [()], **attrs)
    np.testing.assert_allclose(got, loss.detach(), rtol=1e-6)
    (dx,) = run("cross_entropy_grad", [x, y, np.float32(3).reshape(())], [x.shape], **attrs)
    np.testing.assert_allclose(dx, xt.grad, rtol=1e-5, atol=1e-7)


def test_indexing_and_slices():
    table, ids = randn(5, 3), np.array([[0, 4], [4, 2]], np.int32)
    (y,) = run("take", [table, ids], [(2, 2, 3)], axis=0)
    np.testing.assert_array_equal(y, table[ids])
    (dt,) = run("take_grad", [y, ids], [(5, 3)], axis=0, padding_idx=2)
    np.testing.assert_allclose(dt[4], 2 * table[4], rtol=1e-6)
    assert not dt[2].any()
    cut = dict(begin=(1, 0), end=(5, 3), strides=(2, 1))
    (s,) = run("strided_slice", [table], [(2, 3)], **cut)
    np.testing.assert_array_equal(s, table[1:5:2])
    (back,) = run("strided_slice_grad", [s], [(5, 3)], **cut)
    np.testing.assert_array_equal(back[1:5:2], s)
    (p,) = run("pad", [table], [(4, 6)], pad_width=(-1, 0, 2, 1), mode="reflect")
    np.testing.assert_array_equal(p, np.pad(table[1:], ((0, 0), (2, 1)), mode="reflect"))


def test_group_updates_and_scalars():
    values = {
        n: Value(n, s) for n, s in [("x", (3,)), ("w", (3,)), ("lr", ()), ("d", (3,)), ("u", (3,))]
    }
    body = (Node("multiply", ("x", "lr"), ("d",)), Node("subtract", ("w", "d"), ("u",)))
    graph = Graph(
        name="step",
        values=values,
        nodes=(Node("group", ("x", "lr", "w"), ("u",), {"anchor": None}, body=body),),
        inputs=("x",),
        outputs={},
        scalars={"lr": "lr"},
        params={"w": Param("w", np.ones(3, np.float32), "trained")},
        updates={"w": "u"},
    ).check()
    result = evaluate(graph, {"x": np.arange(3, dtype=np.float32)}, lr=0.5)
    np.testing.assert_allclose(result.updates["w"], [1, 0.5, 0])
    assert "d" not in result.values
    assert evaluate(graph, {"x": np.ones(3)}, dtype="float64").updates["w"].dtype == np.float64


def test_a_wrong_shape_is_our_bug():
    with pytest.raises(InternalError, match="declared"):
        run("relu", [randn(3)], [(4,)])
    with pytest.raises(InternalError, match="no reference"):
        run("mystery", [randn(3)], [(3,)])


def test_an_operator_outside_the_vocabulary_runs_through_tvm():
    tvm_api = pytest.importorskip("pocktvm.tvm_api")
    relax = tvm_api.relax
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    attrs = tvm_api.tvm.ir.save_json(relax.op.flip(x, axis=1).attrs)
    array = randn(2, 3)
    values = {name: Value(name, (2, 3)) for name in ("x", "y")}
    node = Node("relax", ("x",), ("y",), {"op": "flip", "relax_attrs": attrs})
    (y,) = eval_node(node, values, {"x": array})
    np.testing.assert_array_equal(y, array[:, ::-1])
    with pytest.raises(InternalError, match="cannot legalize"):
        eval_node(Node("relax", ("x",), ("y",), {"op": "mystery"}), values, {"x": array})
