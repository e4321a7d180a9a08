"""Compute again in the backward pass what is too large to keep until then.

    h = f(x); …forward…; loss; …backward…; dw = g(h)
    →  h = f(x); …; loss; …; h~again = f(x); dw = g(h~again)

The memory of a training step is what the forward pass leaves for the backward pass; most of it is
cheap to make again from something small that is kept anyway (MobileNetV2's expansions from the
block's input: six times larger, one 1x1 convolution away).

Greedy: of all nodes whose results wait over a gap in which too many bytes live, the one with the
most bytes over the limit taken away per second added is cloned in front of its first late reader;
again, until the peak is under the limit. Operands of a clone that are gone by then either live
longer, which counts, or are made again with it, up to DEPTH kernels back (attention's weights from
queries and keys). At the end every choice that is not needed after all is taken back. What one
clone gains shrinks as others are made, so nodes wait in a heap by what they were last worth, and
only the first of it is weighed again (Minoux 1978); all are every REFRESH choices.

Runs on groups, after fuse and order; `order` runs again behind it. A clone is the same kernel.
Source: Kumar et al. 2019 (greedy, memory per recomputation time); Chen et al. 2016.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from pocktvm.ir.graph import Graph, Node, Value
from pocktvm.ir.ops import VIEWS
from pocktvm.passes.costs import seconds
from pocktvm.passes.liveness import Lifetimes

AGAIN = "~again"  # what the names of values made again end with
TRIALS = 12  # dearest choices that are tried without, as long as all of it makes no more than
CLONES = 1000  # clones
DEPTH = 3  # kernels behind a value that are made again with it
REFRESH = 16  # choices after which every node is weighed anew: some have become worth more
PATIENCE = 64  # choices in a row that do not lower the peak, then the limit is out of reach
Chain = tuple[str, ...]  # values: the one that is read late, then what it is made from
Cost = Callable[[Node, dict[str, Value]], float]


def rematerialize(graph: Graph, limit: int, cost: Cost | None = None) -> Graph:
    """The graph with clones, its transient peak at most `limit` bytes where that can be reached,
    else as low as single clones bring it."""
    state = _State(graph, graph.nodes, dict(graph.values), limit, _priced(cost or seconds))
    chosen: list[Chain] = []
    lowest, since, queue = state, 0, _Queue()
    while state.excess() > 0 and since < PATIENCE and (best := queue.best(state)) is not None:
        chosen.append(best)
        state = state.clone_all(best)
        since = 0 if state.peak < lowest.peak else since + 1
        lowest = state if since == 0 else lowest
    if state.excess() == 0:
        return _without_needless(graph, chosen, state).graph()
    return lowest.graph()


def _priced(cost: Cost) -> Cost:
    """The cost, asked once a node: the search weighs the same ones again and again."""
    known: dict[str, float] = {}

    def priced(node: Node, values: dict[str, Value]) -> float:
        key = node.outputs[0]  # what a node makes is its name: clones have names of their own
        if key not in known:
            known[key] = cost(node, values)
        return known[key]

    return priced


def is_again(node: Node) -> bool:
    """True for a clone (of an operator or of a view)."""
    return bool(node.outputs) and node.outputs[0].endswith(AGAIN)


def _without_needless(graph: Graph, chosen: Sequence[Chain], state: _State) -> _State:
    """Later clones may have made earlier ones superfluous: try without each, dearest first."""
    first = _State(graph, graph.nodes, dict(graph.values), state.limit, state.cost)
    makers = graph.producers()
    price = {chain: sum(first.seconds_of(makers[n]) for n in chain) for chain in chosen}
    kept = list(chosen)
    trials = min(TRIALS, CLONES // max(1, len(chosen)))
    for chain in sorted(chosen, key=lambda c: -price[c])[:trials]:
        fewer = [c for c in kept if c != chain]
        trial = first
        for other in fewer:
            trial = trial.clone_all(other)
        if trial.excess() == 0:
            kept, state = fewer, trial
    return state


class _Queue:
    """Candidates by what each was worth when it was last weighed."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, str]] = []
        self.age = REFRESH

    def best(self, state: _State) -> Chain | None:
        """The values that are best made again now."""
        if self.age < REFRESH and (found := self._first(state)) is not None:
            self.age += 1
            return found
        worth = ((state.weigh(name)[0], name) for name in state.candidates())
        self.heap = [(-score, name) for score, name in worth if score > 0]
        heapq.heapify(self.heap)
        self.age = 1
        return self._first(state)

    def _first(self, state: _State) -> Chain | None:
        while self.heap:
            _, name = heapq.heappop(self.heap)
            score, chain = state.weigh(name)
            if chain is not None and (not self.heap or score >= -self.heap[0][0]):
                return chain
            if chain is not None:
                heapq.heappush(self.heap, (-score, name))
        return None


@dataclass(frozen=True)
class _Gap:
    """Positions between which a node's results wait, and which of them are read afterwards."""

    start: int
    end: int
    late: tuple[str, ...]


class _State:
    """A sequence of nodes and its live bytes."""

    def __init__(
        self, graph: Graph, nodes: Sequence[Node], values: dict[str, Value], limit: int, cost: Cost
    ) -> None:
        self.source, self.nodes, self.values = graph, tuple(nodes), values
        self.limit, self.cost = limit, cost
        self.life = Lifetimes(graph, self.nodes, values)
        self.at = {out: i for i, n in enumerate(self.nodes) for out in n.outputs}
        self.results = graph.results()

    @cached_property
    def live(self) -> np.ndarray:
        """Bytes alive at each node."""
        return self.life.live()

    def graph(self) -> Graph:
        """The sequence as a graph."""
        return self.source.with_(nodes=self.nodes, values=self.values).check()

    @property
    def peak(self) -> int:
        """Most bytes at any position."""
        return int(self.live.max(initial=0))

    def excess(self) -> int:
        """Bytes over the limit, summed over the sequence."""
        return self._excess

    @cached_property
    def _excess(self) -> int:
        return int(np.maximum(self.live - self.limit, 0).sum())

    def seconds_of(self, node: Node) -> float:
        """What running the node once more costs."""
        return self.cost(node, self.values)

    def candidates(self) -> list[str]:
        """One value of every node that may be made again."""
        nodes = (n for n in self.nodes if n.op not in VIEWS and not is_again(n))
        return [n.outputs[0] for n in nodes if self._repeatable(n)]

    def weigh(self, name: str) -> tuple[float, Chain | None]:
        """Bytes over the limit taken away per second added, and what is made again for that: the
        value alone or with some that it is made from. (0, None) where it does not pay."""
        node = self.nodes[self.at[name]]
        gap = self.gap(name) if self._repeatable(node) else None
        if gap is None or self.live[gap.start + 1 : gap.end].max(initial=0) <= self.limit:
            return 0.0, None
        best, chosen = 0.0, None
        for chain in self._chains(node, gap):
            live = self._live_after(chain, gap)
            gain = self.excess() - int(np.maximum(live - self.limit, 0).sum())
            score = gain / sum(map(self.seconds_of, chain))
            if gain > 0 and score > best:
                best, chosen = score, tuple(n.outputs[0] for n in chain)
        return best, chosen

    def _chains(self, node: Node, gap: _Gap) -> Iterator[list[Node]]:
        """The node alone; with the makers of its operands that are gone; with theirs; …"""
        chain = [node]
        yield chain
        for _ in range(DEPTH):
            gone = (self.at[u] for n in chain for u in self._gone(n, gap) if u in self.at)
            makers = {i: self.nodes[i] for i in gone if self.nodes[i] not in chain}
            if not makers or not all(
                self._repeatable(m) and not is_again(m) and self._unchanged(m, gap.end)
                for m in makers.values()
            ):
                return
            chain = [*chain, *(makers[i] for i in sorted(makers, reverse=True))]
            yield chain

    def _gone(self, node: Node, gap: _Gap) -> list[str]:
        """Operands nobody reads any more when the gap ends."""
        operands = dict.fromkeys(self.life.root.get(i, i) for i in node.inputs)
        return [u for u in operands if u in self.life.first and self.life.last(u) < gap.end]

    def _repeatable(self, node: Node) -> bool:
        """No result of the program, and nothing but kernels' values among its outputs."""
        inner = {o for part in (node, *node.body) for o in part.outputs}
        done = any(o + AGAIN in self.values for o in inner)
        kept = all(o in self.life.first for o in node.outputs)
        return kept and not done and not inner & self.results

    def gap(self, name: str) -> _Gap | None:
        """The longest stretch over which no result of this value's node is read, with readers
        behind it; None where there is none or an operand has changed by then."""
        node = self.nodes[self.at[name]]
        touched = sorted({self.at[name], *(t for o in node.outputs for t in self.life.touched[o])})
        pairs = list(itertools.pairwise(touched))
        if not pairs:
            return None
        start, end = max(pairs, key=lambda p: p[1] - p[0])
        late = tuple(o for o in node.outputs if self.life.last(o) >= end)
        if end - start < 2 or end >= len(self.nodes) or not self._unchanged(node, end):
            return None
        return _Gap(start, end, late)

    def _unchanged(self, node: Node, at: int) -> bool:
        """True when every parameter the node reads still has its old value at `at`."""
        new = (self.source.updates.get(self.life.root.get(i, i)) for i in node.inputs)
        return all(self.at[value] >= at for value in new if value in self.at)

    def _live_after(self, chain: Sequence[Node], gap: _Gap) -> np.ndarray:
        """Live bytes with the chain cloned, about: its operands live longer, what it makes on the
        way lives where the gap ends."""
        live = self.live.copy()
        for name in gap.late:
            early = [t for t in self.life.touched[name] if t <= gap.start]
            live[max([self.at[name], *early]) + 1 : gap.end] -= self.life.size(name)
        made = {o for n in chain for o in n.outputs}
        for name in dict.fromkeys(u for n in chain for u in self._gone(n, gap)):
            begin = gap.end if name in made else self.life.last(name) + 1
            live[begin : gap.end + 1] += self.life.size(name)
        return live

    def clone_all(self, chain: Chain) -> _State:
        """The first value's node made again, then what its clone reads; what has no gap is left."""
        state = self
        for name in chain:
            if name + AGAIN not in state.values and state.gap(name) is not None:
                state = state.clone(name)
        return state

    def clone(self, name: str) -> _State:
        """The state with the node of `name` made again in front of its first late reader."""
        gap = self.gap(name)
        assert gap is not None, name
        node, values = self.nodes[self.at[name]], dict(self.values)
        made = _only(node, gap.late)
        renamed = {o: o + AGAIN for part in (made, *made.body) for o in part.outputs}
        copies = [_renamed(made, renamed)]
        for view in self.nodes[self.at[name] + 1 :]:
            if view.op in VIEWS and view.inputs[0] in renamed:
                renamed[view.outputs[0]] = view.outputs[0] + AGAIN
                copies.append(_renamed(view, renamed))
        values |= {new: replace(values[old], name=new) for old, new in renamed.items()}
        early, late = self.nodes[: gap.end], self.nodes[gap.end :]
        read = {i for n in late for i in n.inputs}
        needed = _reached(copies, read)
        views = [c for c in copies[1:] if c.outputs[0].removesuffix(AGAIN) in needed]
        behind = [
            n if renamed.keys().isdisjoint(n.inputs) else n.with_inputs(renamed) for n in late
        ]
        nodes = [*early, copies[0], *views, *behind]
        return _State(self.source, nodes, values, self.limit, self.cost)


def _reached(copies: Sequence[Node], read: set[str]) -> set[str]:
    """Names of views that late readers need, through other views too."""
    needed = set(read)
    for copy in reversed(copies[1:]):
        if copy.outputs[0].removesuffix(AGAIN) in needed:
            needed.add(copy.inputs[0].removesuffix(AGAIN))
    return needed


def _only(node: Node, wanted: Sequence[str]) -> Node:
    """The group without what these results do not need."""
    if not node.body or set(wanted) == set(node.outputs):
        return node
    needed, body = set(wanted), list[Node]()
    for part in reversed(node.body):
        if needed & set(part.outputs):
            body.insert(0, part)
            needed |= set(part.inputs)
    if len(body) == 1:
        return body[0]
    anchor = node.anchor if node.attrs.get("anchor") is not None else None
    index = next((i for i, part in enumerate(body) if part is anchor), None)
    inside = {o for part in body for o in part.outputs}
    inputs = dict.fromkeys(i for part in body for i in part.inputs if i not in inside)
    order = {name: k for k, name in enumerate(node.inputs)}
    return replace(
        node,
        inputs=tuple(sorted(inputs, key=order.__getitem__)),
        outputs=tuple(o for o in node.outputs if o in wanted),
        attrs={**node.attrs, "anchor": index},
        body=tuple(body),
    )


def _renamed(node: Node, names: dict[str, str]) -> Node:
    """The node with other names for what it makes, and for what it reads of that."""
    return replace(
        node,
        inputs=tuple(names.get(i, i) for i in node.inputs),
        outputs=tuple(names.get(o, o) for o in node.outputs),
        body=tuple(_renamed(part, names) for part in node.body),
    )
