"""benchmarks.emulated: reading machine code, the plugin, and the inner loops of rpi4's kernels."""

import shutil
import struct
import sys

import pytest
import torch

import pocktvm
from benchmarks.counting import AROUND, _last_step, count_step
from benchmarks.emulated import ratios
from benchmarks.inner_loops import inner_loops
from pocktvm.ir.graph import Node, Value
from pocktvm.schedule.compile_kernel import compile_object
from pocktvm.schedule.rule import Task, defaults
from pocktvm.schedule.rules.conv import Conv
from pocktvm.schedule.rules.matmul import Matmul
from pocktvm.targets import load_target
from pocktvm.tuning.counter import CannotCount, Counts, build_plugin

pytestmark = pytest.mark.build

FMLA, LOAD, ADD = 0x4E20CC00, 0x3DC00000, 0x11000400  # fmla v0.4s; ldr q0, [x0]; add w0, w0, 1
SPILL = 0x3DC003E0  # ldr q0, [sp]
LANE = 0x4F801000  # fmla v0.4s, v0.4s, v0.s[0]


def back(words):
    """b.ne to `words` instructions earlier."""
    return 0x54000001 | ((-words & 0x7FFFF) << 5)


def elf(words):
    """An ELF file with one executable section of these instructions."""
    code = struct.pack(f"<{len(words)}I", *words)
    names = b"\0.text\0.names\0"
    body = 64 + len(code) + len(names)
    sections = [(0, 0, 0, 0, 0, 0), (1, 1, 6, 0, 64, len(code)), (7, 3, 0, 0, 64 + len(code), 13)]
    table = b"".join(struct.pack("<IIQQQQIIQQ", *s, 0, 0, 0, 0) for s in sections)
    head = b"\x7fELF\x02\x01".ljust(40, b"\0") + struct.pack("<Q", body)
    return head.ljust(58, b"\0") + struct.pack("<HHH", 64, 3, 2) + code + names + table


def test_loops_are_found_and_counted():
    inner = [LOAD, FMLA, LANE, back(3)]
    outer = [ADD, *inner, SPILL, back(6)]
    (loop,) = inner_loops(elf([ADD, *outer]), least_fma=1)
    assert (loop.start, loop.instructions, loop.fma, loop.spills) == (8, 4, 2, 0)
    (loop,) = inner_loops(elf([FMLA, SPILL, back(2)]), least_fma=1)
    assert (loop.fma, loop.spills) == (1, 1)
    assert inner_loops(elf([ADD, back(1)])) == []


def test_the_last_step_is_cut_at_the_kernels():
    marks = [Counts(instructions=10 * i) for i in range(2 * (2 + AROUND))]
    found = _last_step(marks, calls=2, steps=2)
    assert found.step.instructions == 40  # two kernels, and what is around them
    assert [k.instructions for k in found.kernels] == [10, 10]
    with pytest.raises(CannotCount, match="saw the clock"):
        _last_step(marks[1:], calls=2, steps=2)


def test_what_the_machine_lacks_is_one_line(tmp_path):
    with pytest.raises(CannotCount, match="install qemu-user"):
        build_plugin("qemu-nowhere", tmp_path)
    with pytest.raises(CannotCount, match="without plugins"):
        build_plugin(sys.executable, tmp_path)


def test_ratios_are_ours_over_theirs():
    result = {"step": {"l2_misses": 3e6}, "peers_millions": {"tf": {"l2_misses": 6.0}}}
    assert ratios(result) == {"tf": {"l2_misses": 0.5}}


@pytest.mark.emulated
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="no qemu-user")
def test_a_step_is_counted(tmp_path):
    module = torch.nn.Sequential(
        torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8)
    )
    artifact = pocktvm.compile(module, torch.randn(16, 256), target="rpi4", out=tmp_path / "a")
    found = count_step(artifact.path)
    inner = sum(k.fma_vector for k in found.kernels)
    macs = 16 * 128 * (2 * 256 + 3 * 8)  # the first layer's input needs no gradient
    assert macs / 4 <= inner <= 1.2 * macs / 4
    assert inner <= found.step.fma_vector < found.step.instructions
    assert sum(k.instructions for k in found.kernels) <= found.step.instructions
    assert found.step.l2_misses < 100  # all of it stays in 1 MiB
    assert 0 < found.step.l1_misses < found.step.loads + found.step.stores


def kernel_loops(rule, node, values, frozen):
    """Inner loops of the kernel a rule makes for a Raspberry Pi 4."""
    task = Task(node, values, {}, frozen, load_target("rpi4"))
    assert rule.decline(task) is None
    func = rule.emit(task, defaults(rule.knobs(task))).func
    return inner_loops(compile_object(func, "kernel", task), least_fma=16)


@pytest.mark.parametrize(
    ("m", "n", "k", "transposed"),
    [
        (2048, 192, 32, ""),
        (512, 64, 384, ""),
        (128, 960, 160, ""),
        (128, 1280, 320, "b"),
        (512, 768, 768, ""),
        (384, 64, 512, "a"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_matrix_products_do_not_spill_on_cortex_a72(m, n, k, transposed, frozen):
    shapes = {"a": (k, m) if "a" in transposed else (m, k),
              "b": (n, k) if "b" in transposed else (k, n), "c": (m, n)}  # fmt: skip
    values = {name: Value(name, shape) for name, shape in shapes.items()}
    attrs = {f"transpose_{name}": True for name in transposed}
    node = Node("matmul", ("a", "b"), ("c",), attrs)
    loops = kernel_loops(Matmul(), node, values, frozenset({1} if frozen else ()))
    assert loops
    assert not [loop for loop in loops if loop.spills]
    # instructions a multiply-add: 1.13 with A as stored, 1.25 by rows
    assert max(loop.density for loop in loops) >= 0.78


@pytest.mark.parametrize(
    ("channels", "width", "size", "kernel", "stride"),
    [(3, 32, 32, 3, 2), (64, 64, 16, 3, 1), (32, 48, 16, 3, 2), (16, 32, 14, 5, 1)],
)
def test_convolutions_do_not_spill_on_cortex_a72(channels, width, size, kernel, stride):
    out, pad = -(-size // stride), kernel // 2
    shapes = {"x": (2, size, size, channels), "w": (kernel, kernel, channels, width),
              "y": (2, out, out, width)}  # fmt: skip
    values = {name: Value(name, shape) for name, shape in shapes.items()}
    attrs = {"strides": (stride, stride), "padding": (pad,) * 4, "dilation": (1, 1), "groups": 1,
             "layout": "NHWC"}  # fmt: skip
    node = Node("conv2d", ("x", "w"), ("y",), attrs)
    loops = kernel_loops(Conv(), node, values, frozenset({1}))
    assert loops
    assert not [loop for loop in loops if loop.spills]
    assert max(loop.density for loop in loops) >= 0.7
