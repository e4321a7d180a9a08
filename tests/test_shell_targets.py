"""Target files: read strictly, and the host described by what it really has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pocktvm.cli.targets import how_checked
from pocktvm.errors import PockError
from pocktvm.host import count_cores, x86_cpu
from pocktvm.targets import FOLDER, list_targets, load_target
from pocktvm.units import format_bytes, parse_bytes, parse_seconds

RPI4 = (FOLDER / "rpi4.toml").read_text()


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "board.toml"
    path.write_text(text)
    return path


def test_the_folder_at_the_top_is_what_is_read():
    assert FOLDER.resolve() == Path(__file__).parent.parent / "targets"


@pytest.mark.parametrize("target", list_targets(), ids=lambda t: t.name)
def test_every_target_is_consistent(target):
    assert target.description and target.arch
    if not target.is_gpu:
        assert target.tvm["num-cores"] == target.isa.cores
    assert target.isa.l1_bytes < target.isa.l2_bytes
    assert target.is_host == (not target.emulator and target.checked == "run")
    if target.name != "host":
        assert target.sources, "numbers come from somewhere"
        host = target.tvm["host"] if target.is_gpu else target.tvm
        assert host["mcpu"].replace("-", "_") == target.toolchain.zig_cpu


def test_gpu_targets_name_their_code():
    for target in (load_target("cuda"), load_target("jetson-orin")):
        assert target.is_gpu and target.toolchain.cubins and target.toolchain.ptx
        assert target.isa.lanes == 1, "rules for GPUs write scalar code"
        assert "not run on a GPU" in how_checked(target)
    assert not load_target("rpi4").is_gpu


def test_host_and_rpi4():
    host, rpi4 = load_target("host"), load_target("rpi4")
    assert host.is_host and host.isa.cores == count_cores() and host.isa.lanes in (4, 8, 16)
    assert rpi4.tvm["mcpu"] == "cortex-a72" and rpi4.isa.lanes == 4 and rpi4.isa.lane_fma
    assert rpi4.emulator[0] == "qemu-aarch64"
    assert rpi4.memory_bytes == 4 << 30


def test_unknown_name_gives_the_nearest():
    with pytest.raises(PockError, match=r"no target 'rpi_4'; did you mean rpi4 .*There are"):
        load_target("rpi_4")


def test_a_file_of_the_users_own(tmp_path):
    path = write(tmp_path, RPI4.replace("cores = 4", "cores = 2"))
    target = load_target(path)
    assert target.name == "board" and target.isa.cores == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('checked = "emulated"', 'checked = "seen"', "checked = 'seen'; allowed: run, emulated"),
        ('arch = "aarch64"', 'cpu = "aarch64"', r"unknown field 'cpu'\n  allowed: .*arch"),
        ("vector_registers = 32", "", r"\[isa\]: missing 'vector_registers'"),
        ("vector_bytes = 16", 'vector_bytes = "wide"', "vector_bytes: 'wide' is no size"),
        ("vector_bytes = 16", "vector_bytes = 0", "vector_bytes = 0 must be positive"),
        ("lane_fma = true", 'lane_fma = "yes"', "lane_fma = 'yes' is no bool"),
        ("[toolchain]", "[toolchain]\nlinker = 1", r"\[toolchain\]: unknown field 'linker'"),
        ('kind = "llvm"', "", r"\[tvm\]: missing 'kind'"),
        ("[isa]", "[isa", "is no TOML"),
        ('emulator = ["qemu-aarch64"', "emulator = [1", "emulator = .* is no tuple"),
    ],
)
def test_a_wrong_file_is_refused_with_the_field(tmp_path, old, new, message):
    assert old in RPI4
    with pytest.raises(PockError) as caught:
        load_target(write(tmp_path, RPI4.replace(old, new, 1)))
    assert re.search(message, str(caught.value)), caught.value


def test_missing_file():
    with pytest.raises(PockError, match="cannot read the target file"):
        load_target("nowhere.toml")


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "", "x86-64"),
        ("AuthenticAMD", "ssse3 sse4_1 sse4_2 popcnt cx16", "x86-64-v2"),
        ("Other", "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave", "x86-64-v3"),
        # AVX-512 of a machine whose hypervisor hides the rest: no znver4 instructions
        (
            "AuthenticAMD",
            "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave "
            "avx512f avx512bw avx512cd avx512dq avx512vl",
            "x86-64-v4",
        ),
        (
            "GenuineIntel",
            "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave aes pclmulqdq rdrand",
            "haswell",
        ),
    ],
)
def test_cpu_name_needs_every_flag(vendor, flags, expected):
    assert x86_cpu(vendor, set(flags.split())) == expected


def test_sizes_and_durations():
    assert parse_bytes("64MB") == 64_000_000 and parse_bytes("64MiB") == 64 << 20
    assert parse_bytes("1.5 GiB") == 3 << 29 and parse_bytes("4096") == 4096
    assert parse_seconds("500ms") == 0.5 and parse_seconds("2m") == 120
    assert format_bytes(12_340_000) == "12.3 MB" and format_bytes(999) == "999 B"
    for bad in ("lots", "", "-1MB", "0", "64 furlongs"):
        with pytest.raises(ValueError, match="no size"):
            parse_bytes(bad)
    for bad in ("soon", "0s", "-1s"):
        with pytest.raises(ValueError, match="no duration"):
            parse_seconds(bad)
