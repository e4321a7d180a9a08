"""A device with two memories: what lies in the fast one, and that training does not notice."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory_plan import programs, random_overlap_check, small_step

import pocktvm
from pocktvm.errors import InternalError, PockError
from pocktvm.memory import plan, verify
from pocktvm.runtime.backend import InProcess, _Options
from pocktvm.targets import load_target, read_target


def test_the_densest_buffers_are_fast():
    kernels = small_step()
    result = plan(kernels, 2048)
    verify(kernels, result)
    offsets, split = result.offsets["step"], result.arena_bytes - result.fast_bytes
    assert result.fast_bytes == 2048
    # relu works in place of conv's result and is read twice; what the caller fills or reads is not
    assert offsets["a"] == offsets["r"] == split
    assert all(offsets[name] < split for name in ("x", "w", "loss"))
    assert sum(result.by_class.values()) == result.arena_bytes + 5000
    assert plan(kernels, 0).fast_bytes == 0


@given(programs(), st.integers(0, 40).map(lambda n: 100 * n))
@settings(max_examples=40, deadline=None)
def test_random_programs_split_and_verify(kernels, limit):
    result = plan(kernels, limit)
    verify(kernels, result)
    random_overlap_check(kernels, result)
    assert result.fast_bytes <= limit
    assert result.lower_bound_bytes <= result.arena_bytes


def test_the_verifier_rejects_a_buffer_across_both_memories():
    kernels = small_step()
    result = plan(kernels, 2048)
    split = result.arena_bytes - 2048
    across = {**result.offsets["step"], "dr": split - 64}
    with pytest.raises(InternalError, match="the fast memory begins"):
        verify(kernels, replace(result, offsets={"step": across}))
    fast_input = {**result.offsets["step"], "x": split}
    with pytest.raises(InternalError, match=r"'x' takes .* the fast memory begins"):
        verify(kernels, replace(result, offsets={"step": fast_input}))


class FastMemory(InProcess):
    """The library opened with a caller's arena and fast memory."""

    def __init__(self, folder, fast, fast_bytes):
        self._lib = ctypes.CDLL(str(folder / "model.so"))
        self._declare()
        self._handle = ctypes.c_void_p()
        weights = str(folder / "weights.safetensors").encode()
        options = _Options(weights=weights, threads=1, fast=fast, fast_bytes=fast_bytes)
        status = self._lib.pocktvm_open(ctypes.byref(options), ctypes.byref(self._handle))
        if status:
            raise PockError(self._error())


@pytest.mark.build
def test_training_is_the_same_in_two_memories(tmp_path):
    import torch

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(12, 64), torch.nn.ReLU(), torch.nn.Linear(64, 48), torch.nn.Tanh(),
        torch.nn.Linear(48, 4),
    )  # fmt: skip
    x = torch.randn(8, 12)
    target = replace(load_target("host"), fast_memory_bytes=6000)
    one = pocktvm.compile(net, (x,), target="host", out=tmp_path / "one")
    two = pocktvm.compile(net, (x,), target=target, out=tmp_path / "two")
    fast_bytes = two.plan.fast_bytes
    assert 0 < fast_bytes <= 6000 and one.plan.fast_bytes == 0
    labels = np.arange(8, dtype=np.int32) % 4
    batch = [(x.numpy(), 0), (labels, 1)]
    room = np.full(fast_bytes + 128, 77, np.uint8)
    start = (-room.ctypes.data) % 64
    with one.load(threads=1) as a, two.load(threads=1) as b:
        wanted = [a.step(x.numpy(), labels) for _ in range(5)]
        assert [b.step(x.numpy(), labels) for _ in range(5)] == wanted  # in the arena's end
    apart = FastMemory(two.path, room.ctypes.data + start, fast_bytes)
    assert [apart.step(batch, 1e-3) for _ in range(5)] == wanted
    apart.close()
    used = room[start : start + fast_bytes]
    assert (used != 77).any() and (room[:start] == 77).all()
    assert (room[start + fast_bytes :] == 77).all()
    with pytest.raises(PockError, match=f"fast memory given has {fast_bytes - 1} bytes"):
        FastMemory(two.path, room.ctypes.data + start, fast_bytes - 1)


def test_a_gpu_has_one_memory():
    raw = {"fast_memory_bytes": "1MiB", "description": "", "memory_bytes": "1GiB",
           "tvm": {"kind": "cuda"}, "toolchain": {"zig_target": "x"},
           "isa": {"vector_bytes": 4, "vector_registers": 8, "l1_bytes": 1, "l2_bytes": 1,
                   "cores": 1}}  # fmt: skip
    with pytest.raises(PockError, match="fast_memory_bytes"):
        read_target(raw, name="gpu", where="gpu.toml")
