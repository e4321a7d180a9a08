"""Every GPU rule against the reference: its CUDA C compiled for this machine and replayed.

All kernels of this file are one compilation; the cases are those of tests/cuda_cases.py. Buffers
lie apart, so that a kernel that writes outside its own is seen.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
from cuda_cases import CASES
from cuda_replay import Replay, launches_of

from pocktvm.errors import PockError
from pocktvm.reference import eval_node
from pocktvm.schedule.compile_kernel import choose_rule, compile_source
from pocktvm.schedule.gpu.tile import plan
from pocktvm.targets import load_target

pytestmark = pytest.mark.build

GUARD = 64  # elements on either side of a buffer, which must stay as they were


@pytest.fixture(scope="module")
def compiled() -> tuple[str, dict[str, Any]]:
    """The CUDA C of all cases, and for each its rule's result and its launches."""
    texts, found = [], {}
    for number, (name, case) in enumerate(CASES.items()):
        task = case.task()
        rule = choose_rule(task)
        emitted = rule.emit(task, {})
        source, launches = compile_source(emitted, f"case{number}", task)
        texts.append(source.decode())
        found[name] = rule.name, emitted, launches_of(launches)
    return "\n".join(texts), found


@pytest.fixture(scope="module")
def replay(compiled, tmp_path_factory) -> Replay:
    return Replay(compiled[0], tmp_path_factory.mktemp("replay"))


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the whole, its middle): a copy with a border of a known value."""
    flat = np.ascontiguousarray(array).ravel()
    whole = np.full(flat.size + 2 * GUARD, 1, flat.dtype)
    whole[GUARD : GUARD + flat.size] = flat
    return whole, whole[GUARD : GUARD + flat.size]


@pytest.mark.parametrize("name", CASES)
def test_kernel_gives_the_references_numbers(name, compiled, replay):
    """Whatever the order of threads between two barriers, and the same bits each time."""
    found = [run(name, compiled, replay, backwards) for backwards in (False, True)]
    case = CASES[name]
    expected = eval_node(case.node, case.values, case.arrays)
    for got, again, want in zip(*found, expected, strict=True):
        scale = max(1.0, float(np.abs(want).max()))
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0,
                                   atol=case.tolerance * scale)  # fmt: skip
        np.testing.assert_array_equal(got, again)


def run(name: str, compiled: Any, replay: Replay, backwards: bool) -> list[np.ndarray]:
    """The outputs of a case's launches; buffers start as garbage between guards."""
    case = CASES[name]
    rule, emitted, launches = compiled[1][name]
    assert rule == case.rule
    inputs = [case.arrays[n] for n in case.node.inputs]
    outputs = [np.full(max(case.values[o].size, 1), 77, case.values[o].dtype)
               for o in case.node.outputs]  # fmt: skip
    scratch = [np.full(size, 55, dtype) for size, dtype in emitted.workspaces]
    buffers = [guarded(a) for a in (*inputs, *outputs, *scratch)]
    if case.node.op in ("put", "take_update"):  # right only where the result lies over its table
        buffers[len(inputs)] = buffers[0]
    for launch in launches:
        replay.launch(launch, [middle for _, middle in buffers], backwards=backwards)
    for whole, middle in buffers:
        assert (whole[:GUARD] == 1).all() and (whole[GUARD + middle.size :] == 1).all()
    return [middle for _, middle in buffers[len(inputs) : len(inputs) + len(outputs)]]


def test_a_missing_barrier_is_seen(tmp_path):
    case = CASES["reductions-sum15"]
    task = case.task()
    emitted = choose_rule(task).emit(task, {})
    source, launches = compile_source(emitted, "racy", task)
    assert b"__syncthreads();" in source
    racy = Replay(source.decode().replace("__syncthreads();", ""), tmp_path)
    want = eval_node(case.node, case.values, case.arrays)[0]
    wrong = 0
    for backwards in (False, True):
        out = np.zeros(max(want.size, 1), np.float32)
        scratch = [np.zeros(size, dtype) for size, dtype in emitted.workspaces]
        for launch in launches_of(launches):
            buffers = [np.ascontiguousarray(case.arrays["x"]), out, *scratch]
            racy.launch(launch, buffers, backwards=backwards)
        wrong += not np.allclose(out, want.ravel(), rtol=1e-4)
    assert wrong


@pytest.mark.parametrize("compiler", ["nvrtc", "nvcc"])
def test_ptxas_takes_every_kernel(tmp_path, compiled, compiler, monkeypatch):
    from pocktvm.codegen import cuda

    if not shutil.which("ptxas"):
        pytest.skip("no ptxas: install the CUDA toolkit")
    if compiler == "nvcc":
        monkeypatch.setattr(cuda, "_nvrtc_path", lambda: None)
        if not shutil.which("nvcc"):
            pytest.skip("no nvcc: install the CUDA toolkit")
    elif not cuda._nvrtc_path():
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    ptx = tmp_path / "kernels.ptx"
    ptx.write_bytes(cuda.compile_ptx(compiled[0], "compute_87"))
    done = subprocess.run(
        ["ptxas", "-arch=sm_87", "-v", str(ptx), "-o", str(tmp_path / "kernels.cubin")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_nvcc_serves_where_nvrtc_is_not(monkeypatch):
    from pocktvm.codegen import cuda

    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: install the CUDA toolkit")
    monkeypatch.setattr(cuda, "_nvrtc_path", lambda: None)
    source = 'extern "C" __global__ void f(float* p) { p[threadIdx.x] = 1.0f; }\n'
    assert b".entry f" in cuda.compile_ptx(source, "compute_87")
    assert cuda._compile(source, "sm_87").startswith(b"\x7fELF")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PockError, match="pip install nvidia-cuda-nvrtc-cu12"):
        cuda.compile_ptx(source, "compute_87")


def test_small_products_are_cut_and_large_ones_are_not():
    isa = load_target("jetson-orin").isa
    assert plan(isa, 4096, 512, 256).parts == 1 and plan(isa, 4096, 512, 256).tile.bm >= 64
    cut = plan(isa, 27, 16, 8192)
    assert cut.parts == 8 and cut.parts * cut.depth >= 8192
