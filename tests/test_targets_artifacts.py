"""Every device that ships: a build leaves what its loader takes, and it trains like the host.

Formats, exports and needed libraries are read from the files' headers. Where an emulator is
installed, ten steps give the host's losses; Apple's library cannot run here, so its kernels, for
the same core, are linked for Linux and run under qemu.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from binary_headers import Binary, read_binary

from pocktvm.cli.targets import lacks
from pocktvm.targets import FOLDER, load_target

pytestmark = pytest.mark.build
ROOT = Path(__file__).parent.parent
FUNCTIONS = set(re.findall(r"^POCKTVM_API .*?(pocktvm_\w+)\(",
                           (ROOT / "pocktvm/runtime/c/pocktvm.h").read_text(), re.M))  # fmt: skip
MODELS = {  # spec, batch, lr, scheme
    "mlp": ("mlp:inputs=20,hidden=24,depth=3,classes=5", 4, 0.05, "full"),
    "cnn": ("cnn:channels=8,depth=3,image=12,classes=5", 4, 0.01, "full"),
    "encoder": (
        "bert:depth=2,dim=32,heads=2,hidden=64,vocab=60,positions=24,tokens=12", 2, 0.01, "full",
    ),
    # Its published scheme. With every tensor learning, one ReLU6 that rounding puts on the other
    # side changes all gradients below it by some 1e-5, and ten steps on two samples amplify that:
    # two targets then agree for some steps and part.
    "mobilenetv2": ("mobilenetv2:width=0.35,image=64", 2, 0.001, "pockengine"),
}  # fmt: skip
EMULATED = ("rpi3", "rpi4", "rpi5", "armv7", "hexagon-v67")
LIBC = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"}
SLOW = [pytest.param(m, marks=pytest.mark.slow) for m in MODELS if m != "mlp"]
_FOLDER = tempfile.TemporaryDirectory(prefix="pocktvm-targets-")  # gone with the process
WORK = Path(_FOLDER.name)


def cli(*words: object) -> dict:
    """A command's JSON object."""
    done = subprocess.run(
        [sys.executable, "-m", "pocktvm", *map(str, words), "--json"],
        capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def build(model: str, target: str) -> Path:
    """The artifact of a model, built once."""
    spec, batch, lr, scheme = MODELS[model]
    out = WORK / Path(target).stem / model
    cli("build", spec, "--target", target, "--batch", batch, "--lr", lr, "--scheme", scheme,
        "-o", out)  # fmt: skip
    return out


@functools.cache
def train(model: str, target: str) -> dict:
    """Ten steps of the generated batch, which is the same on every target."""
    return cli("run", build(model, target), "--steps", 10)


def assert_equal_losses(found: dict, target: str, host: dict) -> None:
    worst = max(
        abs(a - b) / max(abs(b), 0.01)
        for a, b in zip(found["losses"], host["losses"], strict=True)
    )
    assert worst <= 1e-4, f"{target}: {found['losses']}\nhost: {host['losses']}"
    assert host["losses"][-1] < host["losses"][0]


def headers(target: str) -> tuple[Binary, Binary]:
    """The library's and the runner's headers, with what holds on every device."""
    folder, toolchain = build("mlp", target), load_target(target).toolchain
    files = sorted(p.name for p in folder.iterdir())
    assert [n for n in files if n.startswith("model.")] == [toolchain.library]
    library, runner = read_binary(folder / toolchain.library), read_binary(folder / "pocktvm-run")
    assert library.library and not library.writable_code and not runner.writable_code
    assert library.machine == runner.machine == load_target(target).arch
    assert os.access(folder / "pocktvm-run", os.X_OK)
    return library, runner


@pytest.mark.parametrize("target", ["rpi3", "rpi4", "rpi5", "armv7"])
def test_linux_artifacts_need_libc_alone(target):
    library, runner = headers(target)
    assert library.format == "elf" and library.exports == FUNCTIONS
    assert library.soname == "model.so" and library.hard_float
    for binary in (library, runner):
        loader = {n for n in binary.needed if n.startswith("ld-linux")}
        assert set(binary.needed) - loader <= LIBC
        for name in binary.versions - {"GLIBC_PRIVATE"}:
            assert tuple(map(int, name.removeprefix("GLIBC_").split("."))) <= (2, 28), name


def test_hexagon_artifacts_need_nothing():
    library, runner = headers("hexagon-v67")
    assert (library.format, library.bits) == ("elf", 32) and library.exports == FUNCTIONS
    assert library.needed == runner.needed == [] and not runner.library
    assert library.flags & 0xFF == 0x67, "code for V67"
    known = (ROOT / "pocktvm/runtime/c/elf_imports.c").read_text()
    names = set(re.findall(r'OURS\((\w+)\)|\{"(\w+)"', known))
    math = re.findall(r"MATH\((\w+)\)", known)
    offered = {n for pair in names for n in pair if n} | {*math, *(f"{m}f" for m in math)}
    assert library.imports <= offered


def test_m1_artifacts_are_signed_mach_o():
    library, runner = headers("m1")
    for binary in (library, runner):
        assert binary.format == "mach-o" and binary.bits == 64
        assert binary.needed == ["/usr/lib/libSystem.B.dylib"]
        assert binary.minimum_os == (11, 0)
        assert binary.signed_pages > 0, "macOS on Apple silicon runs only signed code"
    markers = {"__mh_dylib_header", "___dso_handle"}
    assert library.exports - markers == {f"_{name}" for name in FUNCTIONS}
    assert library.soname == "@rpath/model.dylib"
    assert runner.flags & 0x200000, "position-independent, as macOS demands"


def test_m1_is_not_run_here():
    done = subprocess.run(
        [sys.executable, "-m", "pocktvm", "run", str(build("mlp", "m1"))],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if not lacks(load_target("m1")):
        pytest.skip("this is a Mac")
    assert done.returncode == 1 and "runs on macOS" in done.stderr, done.stderr


@pytest.mark.emulated
@pytest.mark.parametrize("model", ["mlp", *SLOW])
@pytest.mark.parametrize("target", EMULATED)
def test_ten_steps_are_the_hosts(target, model):
    if missing := lacks(load_target(target)):
        pytest.skip(missing)
    found = train(model, target)
    assert found["emulated"] is True
    assert_equal_losses(found, target, train(model, "host"))


def m1_on_linux() -> str:
    """A target file: m1's kernels, word for word, linked for Linux and run by qemu."""
    text = (FOLDER / "m1.toml").read_text()
    for old, new in (
        ('"arm64-apple-macos11"', '"aarch64-linux-gnu"'),
        ('"aarch64-macos.11.0"', '"aarch64-linux-gnu.2.28"'),
        ('"model.dylib"', '"model.so"'),
        ('os = "darwin"', 'os = "linux"\nemulator = ["qemu-aarch64", "-cpu", "max", "-L", '
         '"/usr/aarch64-linux-gnu"]'),
        ('"inspected"', '"emulated"'),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    path = WORK / "m1-linux.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.emulated
@pytest.mark.parametrize("model", ["mlp", *SLOW])
def test_m1s_kernels_are_the_hosts(model):
    target = m1_on_linux()
    if missing := lacks(load_target(target)):
        pytest.skip(missing)
    assert_equal_losses(train(model, target), target, train(model, "host"))


@pytest.mark.emulated
def test_a_damaged_library_is_refused_by_our_own_loader():
    if missing := lacks(load_target("hexagon-v67")):
        pytest.skip(missing)
    folder = build("mlp", "hexagon-v67")
    data = (folder / "model.so").read_bytes()
    broken = WORK / "broken"
    broken.mkdir()
    emulator = load_target("hexagon-v67").emulator
    for change, why in (
        (data[: len(data) // 2], "truncated"),
        (b"nothing", "is not a library"),
        (data[:18] + b"\x3e\0" + data[20:], "another machine"),
        (data.replace(b"\0sched_yield\0", b"\0sched_yiell\0"), "'sched_yiell'"),
    ):
        (broken / "model.so").write_bytes(change)
        words = [*emulator, str(folder / "pocktvm-run"), str(broken), "--steps", "1"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and why in done.stderr, done.stderr
