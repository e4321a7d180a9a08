"""The cases of tests/test_cuda_rules.py: every GPU rule's operators, with types and inputs.

Shapes are those of the CPU rules' tests where there are such. One function a family yields
(name, case).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from schedule_harness import rng, typed
from test_schedule_conv import SHAPES as CONVOLUTIONS
from test_schedule_conv import geometry as conv_geometry
from test_schedule_cross_entropy import CASES as LOSSES
from test_schedule_elementwise import ATTRS, BOOLEAN, COMPARES, count, operands
from test_schedule_pool import SHAPES as POOLS
from test_schedule_pool import geometry as pool_geometry
from test_schedule_reduce import CASES as REDUCTIONS
from test_schedule_reduce import reduced

from pocktvm.ir.graph import Node, Value
from pocktvm.ir.ops import ELEMENTWISE
from pocktvm.schedule.rule import Task
from pocktvm.targets import load_target
from pocktvm.tvm_api import relax, save_attrs

MORE_LOSSES = [
    ((300, 40), 1, {}, True),
    ((9, 7), 1, {"reduction": "sum", "label_smoothing": 0.1}, True),
]


class Case:
    """A node to compute; `arrays` where normal inputs will not do, `rule` as it should be."""

    def __init__(self, node: Node, values: dict[str, Value], rule: str,
                 arrays: dict[str, np.ndarray] | None = None, tolerance: float = 2e-5) -> None:
        self.node, self.values, self.rule, self.tolerance = node, values, rule, tolerance
        self.arrays = dict(arrays or {})
        for name in node.inputs:
            if name not in self.arrays:
                normal = rng.standard_normal(values[name].shape)
                self.arrays[name] = np.asarray(normal, np.float32)

    def task(self) -> Task:
        return Task(self.node, self.values, {}, frozenset(), load_target("jetson-orin"))


def group(anchor: int | None, inputs: str, outputs: str, *body: Node) -> Node:
    kind = "elementwise" if anchor is None else body[anchor].op
    about = {"anchor": anchor, "kind": kind}
    return Node("group", tuple(inputs.split()), tuple(outputs.split()), about, "", body)


def elementwise() -> Iterator[tuple[str, Case]]:
    for op in sorted(ELEMENTWISE):
        arrays = operands(op, [(3, 37)] * count(op))
        values = {n: Value(n, a.shape, str(a.dtype)) for n, a in arrays.items()}
        boolean = op in COMPARES | BOOLEAN
        values["out"] = Value("out", (3, 37), "bool" if boolean else
                              "int32" if op == "astype" else "float32")  # fmt: skip
        node = Node(op, tuple(arrays), ("out",), ATTRS.get(op, {}))
        yield op, Case(node, values, "elementwise", arrays)
    for other in ((37,), (3, 1), (), (2, 3, 37)):
        node = group(None, "a b", "s y", Node("add", ("a", "b"), ("s",)),
                     Node("multiply", ("s", "a"), ("y",)))  # fmt: skip
        shape = (2, 3, 37)
        yield f"broadcast{len(other)}", Case(
            node, typed(a=shape, b=other, s=shape, y=shape), "elementwise"
        )


def matmuls() -> Iterator[tuple[str, Case]]:
    for m, n, k in ((5, 3, 7), (70, 45, 100), (130, 200, 33), (16, 40, 2100), (300, 260, 64)):
        for ta, tb in ((False, False), (True, False), (False, True)):
            a, b = ((k, m) if ta else (m, k)), ((n, k) if tb else (k, n))
            attrs = {"transpose_a": ta, "transpose_b": tb}
            node = Node("matmul", ("a", "b"), ("c",), attrs)
            yield f"matmul-{m}x{n}x{k}-{ta:d}{tb:d}", Case(
                node, typed(a=a, b=b, c=(m, n)), "matmul", tolerance=5e-5
            )
    node = Node("matmul", ("a", "b"), ("c",), {"transpose_b": True})
    yield "matmul-batched", Case(node, typed(a=(2, 3, 9, 20), b=(2, 3, 11, 20), c=(2, 3, 9, 11)),
                                 "matmul")  # fmt: skip
    node = group(0, "a b v r", "z", Node("matmul", ("a", "b"), ("c",)),
                 Node("add", ("c", "v"), ("d",)), Node("gelu", ("d",), ("e",)),
                 Node("add", ("e", "r"), ("z",)))  # fmt: skip
    out = (4, 19, 33)
    yield "matmul-epilogue", Case(
        node, typed(a=(4, 19, 12), b=(12, 33), c=out, d=out, e=out, z=out, r=out, v=(33,)), "matmul"
    )
    node = group(0, "a b w lr", "z", Node("matmul", ("a", "b"), ("c",), {"transpose_a": True}),
                 Node("multiply", ("c", "lr"), ("d",)), Node("subtract", ("w", "d"), ("z",)))
    shape = (24, 17)
    yield "matmul-update", Case(
        node, typed(a=(1500, 24), b=(1500, 17), w=shape, lr=(), c=shape, d=shape, z=shape),
        "matmul", {"lr": np.array(0.1, np.float32)},
    )  # fmt: skip


def convolutions() -> Iterator[tuple[str, Case]]:
    depthwise = [
        (2, 9, 8, 20, 20, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 20),
        (2, 9, 8, 12, 12, (5, 3), (2, 2), (2, 1, 1, 1), (1, 1), 12),
        (1, 7, 7, 33, 33, (3, 3), (2, 1), (2, 2, 2, 2), (2, 2), 33),
    ]
    for number, shape in enumerate([*CONVOLUTIONS, *depthwise]):
        x, w, y, attrs = conv_geometry(shape)
        types = typed(x=x, w=w, y=y, dx=x, dw=w, dy=y)
        rule = "depthwise" if shape[-1] > 3 else "conv"
        if number == 8:
            types |= {n: Value(n, y) for n in ("t", "z")} | typed(b=y[-1:])
            node = group(0, "x w b", "z", Node("conv2d", ("x", "w"), ("y",), attrs),
                         Node("add", ("y", "b"), ("t",)), Node("relu6", ("t",), ("z",)))
            yield "conv-epilogue", Case(node, types, rule)
        for op, inputs, out in (
            ("conv2d", ("x", "w"), "y"),
            ("conv2d_input_grad", ("dy", "w"), "dx"),
            ("conv2d_weight_grad", ("x", "dy"), "dw"),
        ):
            yield f"{op}{number}", Case(Node(op, inputs, (out,), attrs), types, rule,
                                        tolerance=5e-5)  # fmt: skip
    x, y = (1, 40, 40, 6), (1, 40, 40, 6)
    attrs = dict(strides=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1), groups=6, layout="NHWC")
    node = Node("conv2d_weight_grad", ("x", "dy"), ("dw",), attrs)
    yield "depthwise-parts", Case(node, typed(x=x, dy=y, dw=(3, 3, 1, 6)), "depthwise",
                                  tolerance=5e-5)  # fmt: skip


def spatial() -> Iterator[tuple[str, Case]]:
    for number, shape in enumerate(POOLS):
        x, y, attrs = pool_geometry(shape)
        types = typed(x=x, y=y, dx=x, dy=y)
        few = {"x": rng.integers(0, 3, x).astype(np.float32)}
        for kind in ("max", "avg"):
            yield f"{kind}{number}", Case(Node(f"{kind}_pool2d", ("x",), ("y",), attrs), types,
                                          "pool")  # fmt: skip
            inputs = ("dy", "x") if kind == "max" else ("dy",)
            node = Node(f"{kind}_pool2d_grad", inputs, ("dx",), attrs)
            yield f"{kind}_grad{number}", Case(node, types, "pool", few)
    for kind in ("nearest", "linear", "corners"):
        attrs = dict(method="nearest" if kind == "nearest" else "linear",
                     align_corners=kind == "corners", layout="NHWC")  # fmt: skip
        types = typed(x=(1, 9, 4, 11), y=(1, 5, 11, 11), dy=(1, 5, 11, 11), dx=(1, 9, 4, 11))
        yield f"resize-{kind}", Case(Node("resize2d", ("x",), ("y",), attrs), types, "resize")
        node = Node("resize2d_grad", ("dy",), ("dx",), attrs)
        yield f"resize-{kind}-grad", Case(node, types, "resize")


def reductions() -> Iterator[tuple[str, Case]]:
    more = [((4000, 5), (0,), False), ((3, 5000), (1,), False), ((6000,), (0,), False)]
    for number, case in enumerate([*REDUCTIONS, *more]):
        shape, axes, keep = case
        attrs, out = {"axes": axes, "keepdims": keep}, reduced(*case)
        near = {"x": rng.uniform(0.95, 1.05, shape).astype(np.float32)}
        op = ("sum", "mean", "max", "min", "prod")[number % 5 if number < len(REDUCTIONS) else 0]
        node = Node(op, ("x",), ("y",), attrs)
        yield f"{op}{number}", Case(node, typed(x=shape, y=out), "reduce", near, 1e-4)
        types = typed(x=shape, v=shape[-1:], p=shape, q=shape, y=out, z=out, o=out)
        node = group(2, "x v o", "z", Node("multiply", ("x", "v"), ("p",)),
                     Node("gelu", ("p",), ("q",)), Node("sum", ("q",), ("y",), attrs),
                     Node("subtract", ("y", "o"), ("z",)))  # fmt: skip
        if axes:
            yield f"group{number}", Case(node, types, "reduce", tolerance=1e-4)


def rows() -> Iterator[tuple[str, Case]]:
    for shape in ((5, 3, 64), (3, 37), (2, 1), (9, 131), (3, 768)):
        attrs, last = {"axis": len(shape) - 1}, shape[-1:]
        types = typed(x=shape, y=shape, dy=shape, dx=shape, g=last, b=last, mean=shape[:-1],
                      rstd=shape[:-1])  # fmt: skip
        name = "x".join(map(str, shape))
        for op in ("softmax", "log_softmax"):
            yield f"{op}-{name}", Case(Node(op, ("x",), ("y",), attrs), types, "rows")
            y = rng.dirichlet(np.ones(shape[-1]), shape[:-1]).astype(np.float32)
            node = Node(f"{op}_grad", ("dy", "y"), ("dx",), attrs)
            y = y if op == "softmax" else np.log(y + 1e-9)
            yield f"{op}_grad-{name}", Case(node, types, "rows", {"y": y})
            square = (2, shape[-1], shape[-1])
            lower = typed(x=square, y=square, dy=square, dx=square)
            if op == "softmax" and shape[-1] < 200:
                node = Node(op, ("x",), ("y",), {"axis": 2, "causal": True})
                yield f"causal-{op}-{name}", Case(node, lower, "rows")
                node = Node(f"{op}_grad", ("dy", "y"), ("dx",), node.attrs)
                y = np.tril(rng.dirichlet(np.ones(shape[-1]), square[:-1])).astype(np.float32)
                yield f"causal-{op}_grad-{name}", Case(node, lower, "rows", {"y": y})
        norm = {"axes": (len(shape) - 1,), "eps": 1e-5}
        spread = {"rstd": rng.uniform(0.5, 2, shape[:-1]).astype(np.float32)}
        for node in (
            Node("layer_norm", ("x", "g", "b"), ("y", "mean", "rstd"), norm),
            Node("rms_norm", ("x", "g"), ("y", "rstd"), norm),
            Node("layer_norm_grad", ("dy", "x", "g", "mean", "rstd"), ("dx",), norm),
            Node("rms_norm_grad", ("dy", "x", "g", "rstd"), ("dx",), norm),
        ):
            if shape[-1] > 1:
                yield f"{node.op}-{name}", Case(node, types, "rows", spread)


def losses() -> Iterator[tuple[str, Case]]:
    for number, (shape, axis, options, weighted) in enumerate([*LOSSES, *MORE_LOSSES]):
        attrs = {"axis": axis, "label_smoothing": 0.0, "ignore_index": -100, **options}
        labels = rng.integers(0, shape[1], (shape[0], *shape[2:])).astype(np.int32)
        labels.flat[0] = 1
        arrays = {"y": labels, "dloss": np.array(0.7, np.float32),
                  "w": rng.uniform(0.5, 2, shape[1]).astype(np.float32)}  # fmt: skip
        values = typed(x=shape, dloss=(), loss=(), dx=shape, w=(shape[1],))
        values["y"] = Value("y", labels.shape, "int32")
        weight = ("w",) if weighted else ()
        for node in (
            Node("cross_entropy", ("x", "y", *weight), ("loss",), attrs),
            Node("cross_entropy_grad", ("x", "y", "dloss", *weight), ("dx",), attrs),
            Node("cross_entropy_grad", ("x", "y", "dloss", *weight), ("dx", "loss"), attrs),
        ):
            used = {n: arrays[n] for n in node.inputs if n in arrays}
            yield f"{node.op}{number}-{len(node.outputs)}", Case(node, values, node.op, used)


def tables() -> Iterator[tuple[str, Case]]:
    for axis, width in ((0, 1), (0, 64), (0, 301), (1, 20)):
        table = (11, width) if axis == 0 else (3, 11, width)
        out = (4, 6, width) if axis == 0 else (3, 4, 6, width)
        values = typed(table=table, y=out, dy=out, dtable=table)
        values["i"] = Value("i", (4, 6), "int32")
        indices = {"i": rng.integers(0, 11, (4, 6)).astype(np.int32)}
        attrs = {"axis": axis, "mode": "clip"}
        yield f"take{axis}-{width}", Case(Node("take", ("table", "i"), ("y",), attrs), values,
                                          "take", indices)  # fmt: skip
        for padding in (-1, 3):
            node = Node("take_grad", ("dy", "i"), ("dtable",), {"axis": axis,
                                                                "padding_idx": padding})
            yield f"take_grad{axis}-{width}-{padding}", Case(node, values, "take_grad", indices)
        values |= {"lr": Value("lr", ()), "new": Value("new", table), "rows": Value("rows", out)}
        node = Node("take_update", ("table", "dy", "i", "lr"), ("new",), {"axis": axis})
        yield f"take_update{axis}-{width}", Case(node, values, "take_grad", indices)
        flat = (4, width) if axis == 0 else (3, 4, width)
        some = {**values, "i": Value("i", (4,), "int32"), "rows": Value("rows", flat)}
        node = Node("put", ("table", "i", "rows"), ("new",), {"axis": axis})
        chosen = {"i": np.array([7, 0, 10, 3], np.int32)}
        yield f"put{axis}-{width}", Case(node, some, "put", chosen)


def dropouts() -> Iterator[tuple[str, Case]]:
    arrays = {"seed": np.array(12345, np.int32)}
    values = typed(x=(3, 41), y=(3, 41))
    values["seed"] = Value("seed", (), "int32")
    node = Node("dropout", ("x", "seed"), ("y",), {"p": 0.4, "key": 7})
    yield "dropout", Case(node, values, "elementwise", arrays)
    node = Node("dropout", ("x", "seed"), ("y",), {"p": 0.4, "key": 7, "start": 246})
    yield "dropout-part", Case(node, values, "elementwise", arrays)


def movement() -> Iterator[tuple[str, Case]]:
    def case(op: str, x: Any, y: Any, **attrs: Any) -> Case:
        return Case(Node(op, ("x",), ("y",), attrs), typed(x=x, y=y), "movement")

    yield "permute", case("permute_dims", (3, 5, 7, 2), (7, 3, 2, 5), axes=(2, 0, 3, 1))
    yield "broadcast", case("broadcast_to", (5, 1), (3, 5, 4))
    cut = dict(begin=(1, 8, 0), end=(4, 1, 6), strides=(1, -3, 2))
    yield "slice", case("strided_slice", (4, 9, 6), (3, 3, 3), **cut)
    yield "slice_grad", case("strided_slice_grad", (3, 3, 3), (4, 9, 6), **cut)
    widths = dict(pad_width=(1, 2, 0, 3))
    yield "pad", case("pad", (4, 5), (7, 8), **widths, value=0.5)
    yield "crop", case("pad", (4, 9), (5, 6), pad_width=(2, -1, -2, -1), value=1.0)
    yield "reflect", case("pad", (4, 5), (7, 8), **widths, mode="reflect")
    yield "edge", case("pad", (4, 5), (7, 8), **widths, mode="edge")
    node = Node("concat", ("a", "b", "c"), ("y",), {"axis": 1})
    yield "concat", Case(node, typed(a=(2, 3, 4), b=(2, 1, 4), c=(2, 5, 4), y=(2, 9, 4)),
                         "movement")  # fmt: skip
    values = typed(x=(4, 9), y=(4, 3), dy=(4, 3), dx=(4, 9))
    values["i"] = Value("i", (4, 3), "int32")
    indices = {"i": rng.integers(0, 9, (4, 3)).astype(np.int32)}
    node = Node("gather_elements", ("x", "i"), ("y",), {"axis": 1})
    yield "gather", Case(node, values, "movement", indices)
    node = Node("scatter_add_elements", ("dy", "i"), ("dx",), {"axis": 1})
    yield "scatter", Case(node, values, "movement", indices)
    for exclusive in (False, True):
        for reverse in (False, True):
            attrs = dict(axis=1, exclusive=exclusive, reverse=reverse)
            name = f"cumsum{exclusive:d}{reverse:d}"
            yield name, case("cumsum", (3, 6, 2), (3, 6, 2), **attrs)


def fallbacks() -> Iterator[tuple[str, Case]]:
    values = typed(x=(5, 17, 3))
    for name, out, dtype in (("argmax", (5, 3), "int64"), ("flip", (5, 17, 3), "float32")):
        x = relax.Var("x", relax.TensorType((5, 17, 3), "float32"))
        attrs = save_attrs(getattr(relax.op, name)(x, 1).attrs)
        node = Node("relax", ("x",), ("y",), {"op": name, "relax_attrs": attrs})
        yield name, Case(node, {**values, "y": Value("y", out, dtype)}, "fallback")
    node = Node("softmax", ("x",), ("z",), {"axis": 0})
    yield "softmax-first-axis", Case(node, typed(x=(5, 300), z=(5, 300)), "fallback")
    node = Node("matmul", ("a", "b"), ("c",), {})
    yield "matmul-broadcast", Case(node, typed(a=(2, 1, 4, 5), b=(3, 5, 6), c=(2, 3, 4, 6)),
                                   "fallback")  # fmt: skip


FAMILIES = (elementwise, matmuls, convolutions, spatial, reductions, rows, losses, tables, dropouts,
            movement, fallbacks)  # fmt: skip
CASES = {f"{family.__name__}-{name}": case for family in FAMILIES for name, case in family()}
