"""Make one kernel of a frozen inverted residual block.

    e = group[conv1x1 + add + relu6](x, w1, b1)
    d = group[depthwise + add + relu6](e, wd, bd)      →   y = group[e, d, y](x, w1, b1, wd, bd,
    y = group[conv1x1 + add + add](d, w2, b2, x)               w2, b2): inverted_residual

The block's expanded tensors are its largest values by far (6 times the input's channels), and where
nothing in front of them learns nobody reads them but the next operator. One kernel computes them a
row at a time and keeps the rows in cache (schedule/rules/inverted_residual.py): MobileNetV2's first
six blocks take 6.1 instead of 8.2 ms, and the step's peak of live bytes falls from 15.7 to 12.5 MB
(batch 8 at 128x128, last seven blocks learn, one AVX-512 core).

A block whose expansion is missing (depthwise straight on the input) is one too. Nothing is joined
where an intermediate is read elsewhere (by a gradient, say), a weight is no constant, or an operand
of the first two epilogues depends on the pixel. The parts stay whole groups inside, so that the
rule may still decline and each be a kernel of its own.

Runs after fuse, on its groups. Source of the fusion: MCUNet's patch-based inference has its halo
(Lin et al., arXiv 2110.15352); rows instead of patches need none within an image.
"""

from __future__ import annotations

from itertools import takewhile

from pocktvm.ir.graph import Graph, Node

KIND = "inverted_residual"
NARROWEST = 16  # output columns below which a row is too short a matrix (measured: no gain at 8)


def fuse_blocks(graph: Graph) -> Graph:
    """Replace every chain expand → depthwise → project by one group of the three."""
    finder = _Finder(graph)
    taken: dict[int, Node] = {}
    gone: set[int] = set()
    for index, node in enumerate(graph.nodes):
        parts = finder.block(node)
        if parts is not None:
            taken[index] = _joined(graph, [graph.nodes[i] for i in parts])
            gone.update(parts)
    nodes = (taken.get(i, n) for i, n in enumerate(graph.nodes) if i not in gone or i in taken)
    return graph.with_(nodes=tuple(nodes)) if taken else graph


class _Finder:
    """Answers which nodes make a block."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.maker = {out: i for i, n in enumerate(graph.nodes) for out in n.outputs}
        self.users = graph.users()
        self.results = graph.results()

    def block(self, project: Node) -> list[int] | None:
        """Indices of the parts of the block that ends with `project`, in order; None if none."""
        if not self._pointwise(project):
            return None
        middle = self._source(project)
        if middle is None or not self._depthwise(self.graph.nodes[middle]):
            return None
        depthwise = self.graph.nodes[middle]
        parts = [middle, self.maker[project.outputs[0]]]
        first = self._source(depthwise)
        if first is not None and self._expands(self.graph.nodes[first]):
            parts.insert(0, first)
        return parts

    def _source(self, node: Node) -> int | None:
        """The node that computes what the anchor of `node` reads, if nobody else reads it."""
        name = _anchor(node).inputs[0]
        private = name in self.maker and name not in self.results
        if not private or len(self.users[name]) != 1 or _reads(node, name) != 1:
            return None
        maker = self.graph.nodes[self.maker[name]]
        return self.maker[name] if maker.outputs == (name,) else None

    def _expands(self, node: Node) -> bool:
        return self._pointwise(node) and self._per_channel(node)

    def _pointwise(self, node: Node) -> bool:
        """A frozen 1x1 convolution in front of its epilogue."""
        kernel = self._kernel(node)
        if kernel is None or kernel[:2] != (1, 1):
            return False
        attrs = _anchor(node).attrs
        strides, groups = tuple(attrs.get("strides", (1, 1))), attrs.get("groups", 1)
        return strides == (1, 1) and groups == 1 and not any(attrs.get("padding", ()))

    def _depthwise(self, node: Node) -> bool:
        """A frozen depthwise convolution that keeps the number of channels, on wide enough maps."""
        kernel = self._kernel(node)
        if kernel is None:
            return False
        anchor = _anchor(node)
        channels, shape = kernel[3], self._shape(anchor.outputs[0])
        depthwise = anchor.attrs.get("groups", 1) == channels == self._shape(anchor.inputs[0])[3]
        return depthwise and channels > 1 and shape[2] >= NARROWEST and self._per_channel(node)

    def _kernel(self, node: Node) -> tuple[int, ...] | None:
        """Shape of the frozen weight of an NHWC convolution that begins a group, else None."""
        anchor = _anchor(node)
        if anchor.op != "conv2d" or anchor.attrs.get("layout") != "NHWC":
            return None
        weight = anchor.inputs[1]
        if (node.body and node.attrs["anchor"] != 0) or weight not in self.graph.consts:
            return None
        names = (*node.inputs, *node.outputs)
        if any(self.graph.values[n].dtype != "float32" for n in names) or len(node.outputs) != 1:
            return None
        return self._shape(weight)

    def _per_channel(self, node: Node) -> bool:
        """Every operand of the epilogue is a constant that is the same for all pixels."""
        anchor = _anchor(node)
        others = [n for n in node.inputs if n not in anchor.inputs]
        return all(
            name in self.graph.consts and all(extent == 1 for extent in self._shape(name)[:-1])
            for name in others
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.graph.values[name].shape)


def _anchor(node: Node) -> Node:
    """The operator a group was built around; the node itself where there is none."""
    return node.anchor or node


def _reads(node: Node, name: str) -> int:
    """How often a node or the nodes of its group read a value."""
    return sum(part.inputs.count(name) for part in node.kernel_nodes())


def _joined(graph: Graph, parts: list[Node]) -> Node:
    inside = {out for part in parts for out in part.outputs}
    inputs = dict.fromkeys(n for part in parts for n in part.inputs if n not in inside)
    attrs = {"anchor": len(parts) - 1, "kind": KIND}
    return Node("group", tuple(inputs), parts[-1].outputs, attrs, _layer(parts), tuple(parts))


def _layer(parts: list[Node]) -> str:
    """The module that holds all parts: blocks.1 of blocks.1.pw1.0, blocks.1.dw.0, …"""
    levels = zip(*(part.layer.split(".") for part in parts), strict=False)
    shared = takewhile(lambda level: len(set(level)) == 1, levels)
    return ".".join(level[0] for level in shared) or parts[-1].layer
