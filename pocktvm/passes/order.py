"""Choose the order in which kernels run.

    …, dw1, …, dw9, update1, …, update9   →   …, dw9, update9, …, dw1, update1

What lives between its producer and its last reader is memory, and the order decides how much of it
lives at once. Three legal orders are compared by their peak and the lowest wins: the given one, the
given one with late-bound nodes (those that only read parameters, such as a scaled weight) moved in
front of their first reader, and a greedy list schedule that runs first whatever frees more than it
allocates. So the pass never hurts.

Legal means: operands first, and *an update after every reader of the old parameter* (the memory
plan writes the new value over it, so an earlier update would corrupt a later reader).

Runs on groups; behind it only join_products, which keeps the peak. Source of the greedy rule: list
scheduling for register pressure (Goodman and Hsu 1988), with bytes for registers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from pocktvm.errors import InternalError
from pocktvm.ir.graph import Graph, Node
from pocktvm.ir.ops import VIEWS


def order(graph: Graph) -> Graph:
    """The legal order with the lowest peak of live bytes."""
    dag = Dag(graph)
    given = dag.stable(lambda i: i)
    sunk = dag.stable(dag.late_positions(given).__getitem__)
    candidates = [given, sunk, dag.greedy(given), dag.greedy(sunk)]
    best = min(candidates, key=dag.peak)  # the first of equals
    return graph.with_(nodes=tuple(graph.nodes[i] for i in best))


def peak_bytes(graph: Graph) -> int:
    """Largest sum of live transient bytes in the graph's own order."""
    return Dag(graph).peak(range(len(graph.nodes)))


class Dag:
    """Dependences between node indices, and the bytes each transient value holds."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.before: list[set[int]] = [set() for _ in self.nodes]
        maker = {out: i for i, n in enumerate(self.nodes) for out in n.outputs}
        for i, node in enumerate(self.nodes):
            self.before[i] = {maker[name] for name in node.inputs if name in maker} - {i}
        self._owners()
        self._updates_after_readers(maker)
        self.after: list[set[int]] = [set() for _ in self.nodes]
        for i, sources in enumerate(self.before):
            for source in sources:
                self.after[source].add(i)
        self._memory()

    def _owners(self) -> None:
        """Views share their operand's memory."""
        self.owner: dict[str, str] = {}
        for node in self.nodes:
            if node.op in VIEWS:
                self.owner[node.outputs[0]] = self.root(node.inputs[0])

    def root(self, name: str) -> str:
        """The value whose memory `name` is."""
        return self.owner.get(name, name)

    def _updates_after_readers(self, maker: dict[str, int]) -> None:
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.inputs:
                readers.setdefault(self.root(name), []).append(i)
        for param, value in self.graph.updates.items():
            writer = maker.get(self.root(value))
            if writer is not None:
                self.before[writer].update(r for r in readers.get(param, ()) if r != writer)

    def _memory(self) -> None:
        """Bytes by transient root; what each node defines and reads; results never die."""
        graph = self.graph
        free = {*graph.inputs, *graph.scalars, *graph.params, *graph.consts}
        free |= {self.root(v) for v in graph.updates.values()}  # written over the parameter
        kept = {self.root(v) for v in graph.outputs.values()}
        self.bytes: dict[str, int] = {}
        self.defines: list[list[str]] = []
        self.reads: list[list[str]] = []
        self.reader_count: dict[str, int] = {}
        for node in self.nodes:
            made = [] if node.op in VIEWS else [o for o in node.outputs if o not in free]
            for name in made:
                self.bytes[name] = graph.values[name].nbytes
                self.reader_count[name] = 1 if name in kept else 0
            self.defines.append(made)
            roots = dict.fromkeys(self.root(i) for i in node.inputs)
            self.reads.append([r for r in roots if r in self.bytes])
            for name in self.reads[-1]:
                self.reader_count[name] += 1

    def stable(self, key: Callable[[int], float]) -> list[int]:
        """A legal order that follows `key` where it can."""
        waiting = [len(s) for s in self.before]
        ready = [(key(i), i) for i, count in enumerate(waiting) if count == 0]
        heapq.heapify(ready)
        result: list[int] = []
        while ready:
            _, i = heapq.heappop(ready)
            result.append(i)
            for reader in self.after[i]:
                waiting[reader] -= 1
                if waiting[reader] == 0:
                    heapq.heappush(ready, (key(reader), reader))
        if len(result) != len(self.nodes):
            stuck = next(n for i, n in enumerate(self.nodes) if waiting[i])
            raise InternalError(f"{self.graph.name}: an update must precede its reader: {stuck}")
        return result

    def late_positions(self, given: Sequence[int]) -> list[float]:
        """Sort keys that put nodes without transient operands just before their first reader, and
        updates right behind the last node they wait for."""
        position = {i: float(at) for at, i in enumerate(given)}
        keys = [position[i] for i in range(len(self.nodes))]
        for i in reversed(given):
            if not self.reads[i] and self.after[i]:
                keys[i] = min(keys[r] for r in self.after[i]) - 0.5
        for i in given:
            if not self.after[i] and not self.defines[i] and self.before[i]:
                keys[i] = max(keys[b] for b in self.before[i]) + 0.25
        return keys

    def greedy(self, given: Sequence[int]) -> list[int]:
        """Run the ready node that frees most; when none frees, the next of the given order."""
        rank = {i: at for at, i in enumerate(given)}
        waiting = [len(s) for s in self.before]
        left = dict(self.reader_count)
        ready = {i for i, count in enumerate(waiting) if count == 0}
        result: list[int] = []

        def grows(i: int) -> int:
            freed = sum(self.bytes[n] for n in self.reads[i] if left[n] == 1)
            return sum(self.bytes[n] for n in self.defines[i]) - freed

        while ready:
            *_, i = min((min(grows(i), 1), rank[i], i) for i in ready)
            ready.discard(i)
            result.append(i)
            for name in self.reads[i]:
                left[name] -= 1
            for reader in self.after[i]:
                waiting[reader] -= 1
                if waiting[reader] == 0:
                    ready.add(reader)
        return result

    def peak(self, sequence: Sequence[int]) -> int:
        """Largest sum of live bytes over the sequence."""
        left = dict(self.reader_count)
        live = highest = 0
        for i in sequence:
            live += sum(self.bytes[n] for n in self.defines[i])
            highest = max(highest, live)
            for name in self.reads[i]:
                left[name] -= 1
                if left[name] == 0:
                    live -= self.bytes[name]
            live -= sum(self.bytes[n] for n in self.defines[i] if self.reader_count[n] == 0)
        return highest


def describe(node: Node) -> str:
    """One line for reports: the layer and the operators of a kernel."""
    return f"{node.layer or '-'}: {' + '.join(n.op for n in node.kernel_nodes())}"
