"""Turn one graph into a program: kernels for its nodes, buffers for its values.

Views become aliases, an update becomes an alias of its parameter, workspaces become buffers, and a
constant is laid out as its kernel asks. A group that no rule takes as a whole is split into its
nodes, each with a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pocktvm.errors import InternalError, PockError
from pocktvm.ir.graph import ITEMSIZE, Graph, Node, Value
from pocktvm.ir.kernels import Buffer, Call, Program
from pocktvm.ir.ops import VIEWS, joins_loops
from pocktvm.ir.target import Target
from pocktvm.schedule.compile_kernel import Compiled, KernelCompiler, NoRule
from pocktvm.schedule.pack import apply_pack
from pocktvm.schedule.rule import Task


class ProgramBuilder:
    """Collects the calls and buffers of one graph; `consts` is shared between programs."""

    def __init__(
        self,
        graph: Graph,
        target: Target,
        compiler: KernelCompiler,
        consts: dict[str, np.ndarray],
    ) -> None:
        self.graph, self.target, self.compiler, self.consts = graph, target, compiler, consts
        self.values = dict(graph.values)
        self.buffers: dict[str, Buffer] = {}
        self.calls: list[Call] = []
        self.literals = {
            name: array.item() for name, array in graph.consts.items() if array.shape == ()
        }
        self.replaces = {value: param for param, value in graph.updates.items()}

    def build(self, progress: Callable[[str], None] | None = None) -> Program:
        """The program; raises PockError for an operator without any kernel."""
        self._declare_sources()
        for node in self.graph.nodes:
            if progress:
                progress(node.layer or node.op)
            self._node(node)
        for param, value in self.graph.updates.items():
            self._finish_update(param, value)
        outputs = {key: self._materialised(name) for key, name in self.graph.outputs.items()}
        return Program(
            self.graph.name,
            tuple(self.calls),
            self.buffers,
            self.graph.inputs,
            outputs,
            dict(self.graph.scalars),
        )

    def _declare_sources(self) -> None:
        for name in self.graph.inputs:
            self._buffer(self.values[name], "input")
        for name in self.graph.scalars:
            self._buffer(self.values[name], "scalar")
        for name, param in self.graph.params.items():
            self._buffer(self.values[name], param.kind)

    def _buffer(self, value: Value, kind: str, alias_of: str | None = None) -> None:
        nbytes = max(value.size, 1) * ITEMSIZE[value.dtype]
        self.buffers[value.name] = Buffer(
            value.name, value.shape, value.dtype, nbytes, kind, alias_of
        )

    def _frozen(self, name: str) -> str:
        """Declare a constant as the graph lays it out."""
        if name not in self.buffers:
            self.consts[name] = np.ascontiguousarray(self.graph.consts[name])
            self._buffer(self.values[name], "frozen")
        return name

    def _node(self, node: Node) -> None:
        if node.op in VIEWS:
            source = node.inputs[0]
            if source in self.graph.consts:
                self._frozen(source)
            out = self.values[node.outputs[0]]
            self._buffer(out, self.buffers[source].kind, alias_of=source)
            return
        task = self._task(node)
        try:
            compiled = self.compiler.compile(task)
        except NoRule as reasons:
            if not node.body:
                raise PockError(
                    f"no kernel for '{node.op}' (layer '{node.layer}').\n  {reasons}\n"
                    "  Write the model without it, or add a rule to pocktvm/schedule/rules/."
                ) from None
            for part in node.body:
                self._node(part)
            return
        self._call(task.node, compiled)

    def _task(self, node: Node) -> Task:
        bare = not node.body and joins_loops(node.op)
        if bare and any(name in self.literals for name in node.inputs):  # they need a body
            attrs = {"anchor": None, "kind": "elementwise"}
            node = Node("group", node.inputs, node.outputs, attrs, node.layer, (node,))
        literals = self.literals if node.body else {}
        inputs = tuple(i for i in node.inputs if i not in literals)
        names = node.names()
        frozen = frozenset(k for k, name in enumerate(inputs) if name in self.graph.consts)
        return Task(
            node=replace(node, inputs=inputs),
            values={n: self.values[n] for n in names},
            literals={n: literals[n] for n in names if n in literals},
            frozen=frozen,
            target=self.target,
        )

    def _call(self, node: Node, compiled: Compiled) -> None:
        args = []
        for index, name in enumerate(node.inputs):
            if name in self.graph.consts:
                name = self._constant(name, index, compiled)
            args.append(name)
        for name in node.outputs:
            self._output(self.values[name], node, compiled)
            args.append(name)
        number = len(self.calls)
        for index, (size, dtype) in enumerate(compiled.workspaces):
            value = Value(f"workspace.{number}.{index}", (size,), dtype)
            self._buffer(value, "workspace")
            args.append(value.name)
        kernel = compiled.kernel
        label = "+".join(n.op for n in node.kernel_nodes())
        if node.layer:
            label = f"{node.layer}: {label}"
        self.calls.append(
            Call(
                kernel.symbol, tuple(args), kernel.n_inputs, kernel.n_outputs, label,
                kernel.inplace,
            )
        )  # fmt: skip

    def _constant(self, name: str, index: int, compiled: Compiled) -> str:
        pack = compiled.pack.get(index)
        if pack is None:
            return self._frozen(name)
        text = ",".join(f"{k}={v}" for k, v in sorted(pack.params.items()))
        packed = f"{name}@{pack.name}({text})"
        if packed not in self.buffers:
            if packed not in self.consts:
                array = self.graph.consts[name]
                self.consts[packed] = apply_pack(pack.name, array, dict(pack.params))
            array = self.consts[packed]
            self._buffer(Value(packed, array.shape, str(array.dtype)), "frozen")
        return packed

    def _output(self, value: Value, node: Node, compiled: Compiled) -> None:
        """Declare an output; an update that its kernel can write in place is its parameter."""
        param = self.replaces.get(value.name)
        if param is not None and self._may_overwrite(value.name, param, node, compiled):
            self._buffer(value, self.buffers[param].kind, alias_of=param)
            return
        if node.op in ("put", "take_update"):
            raise InternalError(f"{self.graph.name}: {node} is not the update of its table")
        self._buffer(value, value.role)

    def _may_overwrite(self, name: str, param: str, node: Node, compiled: Compiled) -> bool:
        """True unless this very kernel reads the parameter in a way that forbids it."""
        out = len(node.inputs) + node.outputs.index(name)
        reads = [i for i, source in enumerate(node.inputs) if self._root(source) == param]
        return all((out, i) in compiled.kernel.inplace for i in reads)

    def _root(self, name: str) -> str:
        while name in self.buffers and (alias := self.buffers[name].alias_of) is not None:
            name = alias
        return name

    def _finish_update(self, param: str, value: str) -> None:
        """Copy a new value that could not be written over its parameter."""
        if value in self.graph.consts:
            self._frozen(value)
        if self._root(value) == param:
            return
        shape, dtype = self.values[param].shape, self.values[param].dtype
        new = Value(f"{param}.next", shape, dtype)
        self.values[new.name] = new
        self.replaces[new.name] = param
        self._node(Node("copy", (value,), (new.name,), layer=param))

    def _materialised(self, name: str) -> str:
        if name in self.graph.consts:
            self._frozen(name)
        return name
