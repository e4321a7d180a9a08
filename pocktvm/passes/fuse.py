"""Group nodes into kernels.

    y = conv2d(x, w); z = add(y, b); r = relu6(z); s = add(r, skip)
    →  group[conv2d + add + relu6 + add](x, w, b, skip) -> s

An elementwise operator of its own reads and writes its whole tensor; behind a convolution or a
matrix product it costs a register. The rules:

- *Epilogue*: an elementwise node joins the group of an operand whose anchor (matmul, convolution,
  pool, reduction) has exactly its result's shape.
- *Chains*: elementwise nodes of one shape join each other; such a group, read by nobody else, then
  joins the group that reads it (gelu(z) in front of an add behind a convolution).
- *Prologue*: an elementwise group read by one reduction only becomes part of that reduction, the
  wide copy of a narrow image part of the depthwise weight gradient that reads it; a node in front
  of a reduction leaves the anchor it follows when that value is stored anyway.
- An update (w - lr * dw, with its states) is elementwise, so it lands behind its weight gradient,
  and the gradient itself is never stored.

A group runs at one *place* in the order, so a node may join only if its other operands exist before
that place. Small operands and views are moved ahead of it where they can be, and elementwise ones
that only this node reads join with it (the `m * decay` of an optimizer); failing that, a group
nobody else reads moves to the place of the node. Values read
outside become outputs of the group: they would be stored anyway. An update never joins a group
that a later reader of the old parameter depends on (it could not be placed behind that reader).
Softmax, layer_norm and cross_entropy stay single: their rules take whole rows. What was saved
narrow never joins the forward group that packed it, whatever it is read with: it would be stored.

Runs after assign_layout and simplify: a view or a permute between two nodes ends a group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pocktvm.ir.graph import Graph, Node
from pocktvm.ir.ops import GROUPED, REDUCTIONS, VIEWS, joins_loops

ANCHORS = REDUCTIONS | frozenset(
    "matmul conv2d conv2d_input_grad conv2d_weight_grad max_pool2d max_pool2d_grad "
    "max_pool2d_indexed max_pool2d_scatter avg_pool2d avg_pool2d_grad".split()
)
SMALL = 16384  # bytes; what may be computed earlier than the given order says
WIDENS = frozenset({"unpack_bf16", "unpack_u8", "unpack_i8"})  # passes/narrow_saved.py
WIDENED_BY_READER = frozenset({"unpack_bf16", "unpack_u8"})
OPERANDS = 12  # distinct tensors a kernel reads; more base addresses spill on every target


@dataclass
class Group:
    """Members by index in the old order; `place` is where the group runs in that order."""

    members: list[int]
    place: float
    shape: tuple[int, ...]
    anchor: int | None  # index of the anchor node
    open: bool  # takes elementwise nodes of `shape`
    prologue: list[int] = field(default_factory=list)  # members ahead of a reduction

    @property
    def elementwise(self) -> bool:
        """True for a group without an anchor that others may swallow."""
        return self.open and self.anchor is None


def fuse(graph: Graph) -> Graph:
    """Partition the nodes into groups; a group of one stays the node it was."""
    fuser = Fuser(graph)
    for index in range(len(graph.nodes)):
        fuser.visit(index)
    return graph.with_(nodes=tuple(fuser.build()))


class Fuser:
    """Puts nodes into groups, greedily, in execution order."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.group_of: dict[int, Group] = {}
        self.maker = {out: i for i, n in enumerate(self.nodes) for out in n.outputs}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in dict.fromkeys(node.inputs):
                self.readers.setdefault(name, []).append(i)
        self.results = graph.results()
        self.updates: dict[str, list[str]] = {}
        for param, value in graph.updates.items():
            self.updates.setdefault(value, []).append(param)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value."""
        return tuple(self.graph.values[name].shape)

    def visit(self, index: int) -> None:
        """Put node `index` into a group."""
        node = self.nodes[index]
        if joins_loops(node.op):
            self._visit_elementwise(index)
            return
        group = Group([index], index, self.shape(node.outputs[0]), index, node.op in ANCHORS)
        self.group_of[index] = group
        if node.op in REDUCTIONS or self._widens_itself(node):
            self._take_prologue(group, node.inputs[0])

    def _widens_itself(self, node: Node) -> bool:
        """True for a gradient whose kernel reads a narrow image: each element once a tap, as
        vectors, so that widening it there costs less than a wide copy in memory."""
        if node.op != "conv2d_weight_grad" or node.attrs.get("layout") != "NHWC":
            return False
        channels = {self.shape(name)[-1] for name in node.inputs}
        maker = self.maker.get(node.inputs[0])
        narrow = maker is not None and self.nodes[maker].op in WIDENED_BY_READER
        return narrow and channels == {node.attrs.get("groups", 1)}

    def _visit_elementwise(self, index: int) -> None:
        node = self.nodes[index]
        shape = self.shape((node.inputs if node.op == "pack_mask" else node.outputs)[0])
        alone = Group([index], index, shape, None, True)
        self.group_of[index] = alone
        if self.nodes[index].op in WIDENS:
            return  # what reads it may take it in
        candidates = [g for g in self._operand_groups(alone) if g.open and g.shape == shape]
        if self._only_reduced(index):
            candidates = [
                g for g in candidates if g.anchor is None or not self._is_stored(g, index)
            ]
        # anchors before plain chains, later ones before earlier
        candidates.sort(key=lambda g: (g.anchor is not None, g.place), reverse=True)
        home = next((g for g in candidates if self._join(g, alone)), alone)
        for group in candidates:
            if group is not home and group.elementwise and self._all_read_by(group, home):
                self._swallow(home, group)

    def _only_reduced(self, index: int) -> bool:
        """True when a reduction is all that reads this node: it will be its prologue."""
        readers = self.readers.get(self.nodes[index].outputs[0], [])
        if self.nodes[index].outputs[0] in self.results:
            return False
        return len(readers) == 1 and self.nodes[readers[0]].op in REDUCTIONS

    def _is_stored(self, group: Group, index: int) -> bool:
        """True when what node `index` reads of the group is kept for others in any case."""
        made = {o for m in group.members for o in self.nodes[m].outputs}
        return any(
            r != index and r not in group.members
            for name in self.nodes[index].inputs
            if name in made
            for r in self.readers.get(name, ())
        )

    def _operand_groups(self, group: Group) -> list[Group]:
        """Groups that compute operands of `group`, each once."""
        found: dict[int, Group] = {}
        for name in self.operands([group]):
            maker = self.maker.get(name)
            if maker is not None and (other := self.group_of[maker]) is not group:
                found[id(other)] = other
        return list(found.values())

    def operands(self, groups: Iterable[Group]) -> list[str]:
        """What the union of these groups reads from outside, in order."""
        members = sorted(m for g in groups for m in g.members)
        inside = {out for m in members for out in self.nodes[m].outputs}
        names = dict.fromkeys(i for m in members for i in self.nodes[m].inputs)
        return [n for n in names if n not in inside]

    def _too_wide(self, groups: Iterable[Group]) -> bool:
        """More tensors than a kernel should read; scalars are free."""
        return sum(self.graph.values[n].size > 1 for n in self.operands(groups)) > OPERANDS

    def _masks_fit(self, groups: Iterable[Group]) -> bool:
        """True when masks and blocks among these groups, merged, can be read and written: by loops
        over whole vectors of channels, and read from memory."""
        groups = list(groups)
        members = [n for g in groups for m in g.members if (n := self.nodes[m]).op in GROUPED]
        packed = {n.outputs[-1] for n in members if n.op.startswith("pack")}
        if packed & {name for n in members for name in n.inputs}:
            return False
        anchors = [self.nodes[g.anchor] for g in groups if g.anchor is not None]
        bits = all(n.op == "apply_mask" for n in members)
        return not members or all(self._whole_vectors(n, bits) for n in anchors)

    def _whole_vectors(self, anchor: Node, bits: bool) -> bool:
        """True for anchors whose vectors begin at multiples of a vector: those of a convolution in
        groups need not, and those of a reduction may be single elements, which only bits allow."""
        if anchor.op in REDUCTIONS:
            return bits
        groups = anchor.attrs.get("groups", 1)
        channels = {self.shape(n)[-1] for n in (anchor.inputs[0], anchor.outputs[0])}
        return groups == 1 or channels == {groups}

    def _all_read_by(self, group: Group, reader: Group) -> bool:
        """True when no node outside `reader` (and `group`) reads what `group` computes."""
        for member in group.members:
            for out in self.nodes[member].outputs:
                for r in self.readers.get(out, ()):
                    other = self.group_of.get(r)
                    if other is None or (other is not reader and other is not group):
                        return False
        return True

    def _join(self, group: Group, late: Group) -> bool:
        """Merge the newest node into `group` at the group's place, or else here."""
        if self._too_wide([group, late]) or not self._masks_fit([group, late]):
            return False
        others = [g for g in self._operand_groups(late) if g is not group]
        joining = self._ahead(group, late, others)
        place = group.place if joining is not None else late.place
        if joining is None and not self._all_read_by(group, late):
            return False
        joining = joining or []
        if place == group.place:
            for other in [g for j in joining for g in self._operand_groups(j)] + others:
                if other is not group and other not in joining:
                    self._hoist(other, place)
        if not self._updates_fit([group, late, *joining], place):
            return False
        if not self._masks_fit([group, late, *joining]):
            return False
        for other in (*joining, late):
            self._merge(group, other, place)
        return True

    def _ahead(self, group: Group, late: Group, others: list[Group]) -> list[Group] | None:
        """How `late` can run at the group's place: the groups that must join with it, all others
        being there or movable; None when it cannot."""
        joining = []
        for other in others:
            if other.place < group.place:
                continue
            ready = all(
                self._can_hoist(g, group) for g in self._operand_groups(other) if g is not group
            )
            alike = other.elementwise and other.shape == group.shape
            alike = alike and not self._widens_early(other, group)
            if ready and alike and self._all_read_by(other, late):
                joining.append(other)
            elif not self._can_hoist(other, group):
                return None
        return None if self._too_wide([group, late, *joining]) else joining

    def _widens_early(self, group: Group, at: Group) -> bool:
        """True for a wide copy that would be made in the forward pass."""
        copies = any(self.nodes[m].op in WIDENS for m in group.members)
        return copies and at.place <= self.maker.get(self.graph.outputs.get("loss", ""), -1)

    def _can_hoist(self, group: Group, ahead_of: Group, depth: int = 6) -> bool:
        """True for a group that runs before another, or can: small or a view, operands too."""
        if group is ahead_of:
            return False
        if group.place < ahead_of.place:
            return True
        cheap = all(
            self.nodes[m].op in VIEWS
            or (joins_loops(self.nodes[m].op) and self._bytes(m) <= SMALL)
            for m in group.members
        )
        return (
            cheap
            and depth > 0
            and all(self._can_hoist(g, ahead_of, depth - 1) for g in self._operand_groups(group))
        )

    def _hoist(self, group: Group, place: float) -> None:
        """Move a group between its operands and `place`."""
        if group.place < place:
            return
        operands = self._operand_groups(group)
        for operand in operands:
            self._hoist(operand, place)
        group.place = (max((g.place for g in operands), default=place - 1) + place) / 2

    def _bytes(self, member: int) -> int:
        return sum(self.graph.values[o].nbytes for o in self.nodes[member].outputs)

    def _updates_fit(self, groups: list[Group], place: float) -> bool:
        """True when updates among these groups, merged at `place`, may run after every reader of
        the old parameter: nobody waits for what is computed here, or all readers are earlier."""
        inside = {m for g in groups for m in g.members}
        outs = [o for m in inside for o in self.nodes[m].outputs]
        params = [p for o in outs for p in self.updates.get(o, ())]
        if not params or all(r in inside for o in outs for r in self.readers.get(o, ())):
            return True
        readers = [r for p in params for r in self.readers.get(p, ()) if r not in inside]
        return all(r in self.group_of and self.group_of[r].place < place for r in readers)

    def _swallow(self, home: Group, group: Group) -> None:
        """An elementwise group only `home` reads moves into it, unless it reads too much."""
        if self._too_wide([home, group]) or group.place > home.place:
            return
        if not self._masks_fit([home, group]):
            return
        if self._before_epilogue(home) & {o for m in group.members for o in self.nodes[m].outputs}:
            return  # what the anchor reads must be in memory when its loops begin
        full = [n for n in self.operands([group]) if self._stays_live(n, group)]
        if len(full) <= 1 and self._updates_fit(
            [home, group], home.place
        ):  # its one result made way for at most one operand kept longer
            self._merge(home, group, home.place)

    def _before_epilogue(self, group: Group) -> set[str]:
        """What the anchor and its prologue read."""
        first = [*group.prologue, *(() if group.anchor is None else (group.anchor,))]
        return {name for member in first for name in self.nodes[member].inputs}

    def _stays_live(self, name: str, group: Group) -> bool:
        """True for a tensor of the group's shape that no later node would have kept anyway."""
        if name not in self.maker or self.shape(name) != group.shape:
            return False
        return max(self.readers[name]) <= max(group.members)

    def _take_prologue(self, reduction: Group, operand: str) -> None:
        maker = self.maker.get(operand)
        if maker is None:
            return
        group = self.group_of[maker]
        if not group.elementwise or not self._all_read_by(group, reduction):
            return
        if group.members != [maker] and self._widens_itself(self.nodes[reduction.members[0]]):
            return
        if any(o in self.results for m in group.members for o in self.nodes[m].outputs):
            return  # a result of the prologue's shape cannot leave the reduction's loops
        if not self._too_wide([reduction, group]) and self._masks_fit([reduction, group]):
            reduction.prologue = list(group.members)
            self._merge(reduction, group, reduction.place)

    def _merge(self, group: Group, other: Group, place: float) -> None:
        group.members = sorted({*group.members, *other.members})
        group.place = place
        for member in other.members:
            self.group_of[member] = group

    def build(self) -> list[Node]:
        """The groups as nodes, in order of their places."""
        groups = {id(g): g for g in self.group_of.values()}
        return [self._node(g) for g in sorted(groups.values(), key=lambda g: g.place)]

    def _anchor_first(self, group: Group) -> list[int]:
        """Members in execution order: a reduction's prologue, the anchor, the epilogue, which is
        everything else, also what does not read the anchor (an optimizer's `m * decay`)."""
        if group.anchor is None:
            return group.members
        head = [m for m in group.members if m in group.prologue]
        rest = [m for m in group.members if m != group.anchor and m not in group.prologue]
        return [*head, group.anchor, *rest]

    def _node(self, group: Group) -> Node:
        if len(group.members) == 1:
            return self.nodes[group.members[0]]
        ordered = self._anchor_first(group)
        body = tuple(self.nodes[m] for m in ordered)
        members = set(ordered)
        outputs = [
            out
            for node in body
            for out in node.outputs
            if out in self.results or any(r not in members for r in self.readers.get(out, ()))
        ]
        anchor = None if group.anchor is None else ordered.index(group.anchor)
        kind = "elementwise" if group.anchor is None else self.nodes[group.anchor].op
        layer = next((n.layer for n in body if n.layer), "")
        if group.anchor is not None and self.nodes[group.anchor].layer:
            layer = self.nodes[group.anchor].layer
        return Node(
            "group",
            tuple(self.operands([group])),
            tuple(outputs),
            {"anchor": anchor, "kind": kind},
            layer,
            body,
        )
