"""What schedule/ makes: compiled kernels, and programs that are lists of calls to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pocktvm.errors import InternalError
from pocktvm.ir.graph import ITEMSIZE, Param

ALIGN = 64  # bytes; what TVM's packed kernels assume of every buffer


def aligned(nbytes: int) -> int:
    """Bytes rounded up to the alignment of every buffer; at least one unit."""
    return max(ALIGN, -(-nbytes // ALIGN) * ALIGN)


@dataclass(frozen=True)
class ArgSpec:
    """One argument as the kernel declares it; buffers are dense."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One start of a GPU function. `args` are indices of the kernel's arguments, in the order the
    function takes their addresses; grid and block are counted in blocks and threads (x, y, z)."""

    entry: str
    args: tuple[int, ...]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


@dataclass(frozen=True)
class Kernel:
    """One compiled loop nest, shared by every call with the same signature.

    Its packed symbol is `__tvm_ffi_<symbol>`; arguments are inputs, outputs, workspaces, in order.
    On a GPU `object` is CUDA C and `launches` are started one after the other.
    `inplace`: pairs (output index among args, input index among args) that may share memory.
    """

    symbol: str
    object: bytes
    args: tuple[ArgSpec, ...]
    n_inputs: int
    n_outputs: int
    rule: str
    tuned: bool = False
    knobs: int = 1  # points its rule could be tuned over; 1: nothing to tune
    flops: int = 0
    inplace: tuple[tuple[int, int], ...] = ()
    launches: tuple[Launch, ...] = ()


@dataclass(frozen=True)
class Call:
    """One kernel launch; `args` are buffer names in the kernel's argument order."""

    symbol: str
    args: tuple[str, ...]
    n_inputs: int
    n_outputs: int
    label: str = ""  # layer and operators, for reports
    inplace: tuple[tuple[int, int], ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the buffers it reads."""
        return self.args[: self.n_inputs]

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the buffers it writes, workspaces included."""
        return self.args[self.n_inputs :]


@dataclass(frozen=True)
class Buffer:
    """A named piece of memory.

    kind: input | scalar | frozen | trained | optimizer | activation | gradient | workspace.
    `alias_of`: this name is another buffer's memory (a view, or an update written over its
    parameter); chains are allowed, `Program.root` follows them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    kind: str
    alias_of: str | None = None


@dataclass(frozen=True)
class Program:
    """A straight list of calls over buffers."""

    name: str  # step | predict
    calls: tuple[Call, ...]
    buffers: Mapping[str, Buffer]
    inputs: tuple[str, ...]
    outputs: Mapping[str, str]  # "loss"/"output" -> buffer
    scalars: Mapping[str, str] = field(default_factory=dict)  # buffer -> formula (ir/graph.py)

    def root(self, name: str) -> str:
        """The buffer whose memory `name` is."""
        seen = set()
        while (alias := self.buffers[name].alias_of) is not None:
            if name in seen:
                raise InternalError(f"alias cycle at '{name}'")
            seen.add(name)
            name = alias
        return name


@dataclass(frozen=True)
class Kernels:
    """Everything codegen needs besides offsets."""

    kernels: Mapping[str, Kernel]
    programs: Mapping[str, Program]
    params: Mapping[str, Param]
    consts: Mapping[str, np.ndarray]  # frozen buffers' bytes, packed as their kernels read them

    def check(self) -> Kernels:
        """Raise InternalError where a call and its kernel or buffers disagree."""
        for program in self.programs.values():
            for call in program.calls:
                kernel = self.kernels.get(call.symbol)
                if kernel is None or len(kernel.args) != len(call.args):
                    raise InternalError(f"{program.name}: {call} does not fit its kernel")
                for arg, spec in zip(call.args, kernel.args, strict=True):
                    if arg not in program.buffers:
                        raise InternalError(f"{program.name}: no buffer '{arg}' for {call.symbol}")
                    buffer = program.buffers[arg]
                    # a kernel that only moves data may take a value's bits as another type
                    if ITEMSIZE[buffer.dtype] != ITEMSIZE[spec.dtype]:
                        raise InternalError(
                            f"{call.symbol}: '{arg}' is {buffer.dtype}, kernel wants {spec.dtype}"
                        )
        return self

    def by_rule(self) -> dict[str, int]:
        """Calls per schedule rule, over all programs."""
        counts: dict[str, int] = {}
        for program in self.programs.values():
            for call in program.calls:
                rule = self.kernels[call.symbol].rule
                counts[rule] = counts.get(rule, 0) + 1
        return counts
