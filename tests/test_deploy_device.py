"""Deploying to a real sshd: what arrives, what is refused, and what the messages say."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from deploy_case import *  # noqa: F403 (fixtures)
from deploy_case import build, current, is_clean, place
from safetensors.numpy import load_file

from pocktvm.deploy.ssh import Script, compose, parse_host

pytestmark = pytest.mark.build
QEMU = "qemu-aarch64 -cpu cortex-a72 -L /usr/aarch64-linux-gnu"


def facts(rig, artifact, *words: object) -> dict:
    return json.loads(rig.cli("deploy", artifact, "--ssh", "device", "--json", *words).stdout)


def refused(rig, artifact, *words: object) -> str:
    message = rig.cli("deploy", artifact, "--ssh", "device", *words, code=1).stderr
    assert len(message.splitlines()) <= 25
    return message


@pytest.fixture(scope="module")
def data(deploy_folder) -> Path:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((19, 64)).astype(np.float32)
    path = deploy_folder / "data.npz"
    np.savez(path, x=x, y=rng.integers(0, 10, 19))
    return path


def test_training_there_is_training_here(rig, artifact, data, tmp_path):
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    common = ("--data", data, "--steps", 7, "--threads", 1)
    result = facts(rig, artifact, *common, "--fetch", there)
    local = json.loads(rig.cli("run", artifact, *common, "--save", here, "--json").stdout)
    assert result["losses"] == local["losses"] and len(result["losses"]) == 7
    assert there.read_bytes() == here.read_bytes() and "fc.weight" in load_file(there)
    assert result["selftest"]["selftest"] == "pass" and result["switched"] is True
    assert result["device"]["cores"] >= 1 and result["uploaded_bytes"] > 100_000
    assert is_clean(rig) and set(tmp_path.iterdir()) == {here, there}


def test_channels_change_there_as_here(rig, deploy_folder, artifact, data, tmp_path):
    """Four epochs of two steps, other channels in each; refused where there are none to choose."""
    parts = build(deploy_folder / "parts", "host", "--resample", scheme='{"*.weight": 0.25}')
    here, there = tmp_path / "here.safetensors", tmp_path / "there.safetensors"
    common = ("--data", data, "--steps", 7, "--threads", 1, "--resample", 1)
    result = facts(rig, parts, *common, "--fetch", there)
    local = json.loads(rig.cli("run", parts, *common, "--save", here, "--json").stdout)
    fixed = json.loads(rig.cli("run", parts, *common[:6], "--json").stdout)
    assert result["losses"] == local["losses"] != fixed["losses"]
    assert result["losses"][:2] == fixed["losses"][:2]
    assert there.read_bytes() == here.read_bytes()
    assert "give --data" in refused(rig, parts, "--resample", 1)
    assert "build it with --resample" in refused(rig, artifact, "--data", data, "--resample", 1)


def test_a_second_time_nothing_is_sent_and_damage_is_mended(rig, artifact, data):
    facts(rig, artifact, "--data", data, "--steps", 1)
    again = facts(rig, artifact, "--data", data, "--steps", 1)
    assert again["uploaded_bytes"] == 0 and again["switched"] is False
    (place(rig) / "current/weights.safetensors").write_bytes(b"worn card")
    mended = facts(rig, artifact)
    assert mended["uploaded_bytes"] > 100_000 and mended["switched"] is True
    assert mended["previous"] is None  # the worn copy is nothing to go back to
    assert (place(rig) / "current/weights.safetensors").stat().st_size > 100_000


def test_the_version_before_is_kept_and_rolled_back_to(rig, artifact, second):
    first = facts(rig, artifact)["version"]
    assert facts(rig, second)["previous"] == first
    assert (place(rig) / "previous").readlink().name == first
    back = facts(rig, artifact, "--rollback")
    assert back["version"] == first == current(rig)
    assert facts(rig, artifact, "--rollback")["previous"] == first and is_clean(rig)


def test_there_may_be_nothing_to_roll_back_to(rig, artifact):
    facts(rig, artifact)
    assert "no earlier version" in refused(rig, artifact, "--rollback")


def test_a_wrong_kernel_is_caught_there(rig, artifact, wrong):
    version = facts(rig, artifact)["version"]
    message = refused(rig, wrong)
    assert "self-test failed" in message and "Not switched" in message
    assert current(rig) == version and is_clean(rig)
    assert facts(rig, artifact)["switched"] is False


def test_a_library_that_crashes_is_caught_there(rig, artifact):
    rig.shim("crash", "kill -ILL $$")
    rig.prelude.write_text("export POCKTVM_LAUNCHER=crash\n")
    assert "newer CPU" in refused(rig, artifact) and not current(rig)


def test_wrong_architecture(rig, artifact):
    rig.shim("uname", '[ "$1" = -m ] && echo aarch64 || echo Linux')
    message = refused(rig, artifact)
    assert "the device is Linux aarch64" in message and "--target rpi3 or rpi4" in message
    rig.shim("getconf", '[ "$1" = LONG_BIT ] && echo 32 || exec /usr/bin/getconf "$@"')
    assert "with 32-bit programs" in refused(rig, artifact) and not place(rig).exists()


def test_too_little_memory(rig, artifact):
    fake = 'case "$*" in *MemAvailable*) echo "MemAvailable:  300 kB";; '
    rig.shim("grep", fake + '*) exec /usr/bin/grep "$@";; esac')
    message = refused(rig, artifact)
    assert "307.2 kB" in message and "the plan needs" in message and "--budget" in message


def test_too_little_disk_is_known_before(rig, artifact):
    rig.shim("df", "echo Filesystem; echo /dev/root 1000 900 100 90% /")
    message = refused(rig, artifact)
    assert "102.4 kB is free" in message and "--dir" in message and not place(rig).exists()


def test_a_disk_that_fills_up_midway(rig, artifact):
    rig.prelude.write_text("trap '' XFSZ\nulimit -f 100\n")
    message = refused(rig, artifact)
    assert "disk of device is full" in message and not current(rig)
    rig.prelude.write_text("")
    facts(rig, artifact)
    assert is_clean(rig)


def test_an_old_or_a_foreign_libc(rig, artifact):
    rig.shim("getconf", '[ "$1" = GNU_LIBC_VERSION ] && echo glibc 2.3')
    assert "the device has glibc 2.3" in refused(rig, artifact)


def test_missing_programs(rig, artifact):
    needed = "sh cat dd uname df grep tail head tr getconf mkdir date rm ln mv cut readlink sync wc"
    for name in needed.split():
        (rig.shims / name).symlink_to(shutil.which(name))
    rig.prelude.write_text(f"PATH={rig.shims}\n")
    message = refused(rig, artifact)
    assert "tar sha256sum missing" in message and "apt-get install" in message


@pytest.mark.skipif(shutil.which("busybox") is None, reason="no busybox")
def test_a_device_with_busybox_alone(rig, artifact, second):
    applets = subprocess.run(["busybox", "--list"], capture_output=True, text=True).stdout
    for name in applets.split():
        (rig.shims / name).symlink_to(shutil.which("busybox"))
    rig.prelude.write_text(f"PATH={rig.shims}\n")
    first = facts(rig, artifact, "--steps", 3)
    assert len(first["losses"]) == 3 and facts(rig, second)["previous"] == first["version"]
    assert facts(rig, second, "--rollback")["version"] == first["version"] and is_clean(rig)


def test_a_folder_of_ones_own(rig, artifact, tmp_path):
    facts(rig, artifact, "--dir", tmp_path / "it's here")
    assert (tmp_path / "it's here/current/model.so").is_file()
    facts(rig, artifact, "--dir", "~/models")
    assert (rig.home / "models/current").is_symlink()
    (tmp_path / "file").write_text("")
    assert "cannot" in refused(rig, artifact, "--dir", tmp_path / "file")


@pytest.mark.parametrize(
    ("host", "known", "message"),
    [
        ("device", "other_key", "another host key"),
        ("device", "", "is not known here"),
        ("stranger", "host_key", "ssh-copy-id stranger"),
        ("closed", "host_key", "refuses connections"),
        ("nowhere.invalid", "host_key", "does not resolve"),
    ],
)
def test_no_connection_is_one_message_with_the_fix(rig, artifact, host, known, message):
    rig.know(known)
    said = rig.cli("deploy", artifact, "--ssh", host, code=1).stderr
    assert message in said and len(said.splitlines()) <= 8
    assert not place(rig).exists()


def test_a_noisy_login_is_understood(rig, artifact):
    rig.prelude.write_text("echo Welcome; echo pocktvm:; echo hello >&2\n")
    assert facts(rig, artifact)["switched"] is True


def test_doctor_looks_at_the_device(rig):
    checks = json.loads(rig.cli("doctor", "--ssh", "device", "--json").stdout)["checks"]
    found = {c["name"]: c for c in checks}
    assert found["device"]["ok"] and found["programs"]["ok"] and "glibc" in found["libc"]["found"]
    rig.know("other_key")
    checks = json.loads(rig.cli("doctor", "--ssh", "device", "--json", code=1).stdout)["checks"]
    assert "another host key" in checks[-1]["found"] and "ssh-keygen" in checks[-1]["fix"]


@pytest.mark.emulated
@pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None or not Path("/usr/aarch64-linux-gnu").is_dir(),
    reason="no qemu-user or no libc6-arm64-cross",
)
def test_an_emulated_pi_learns(rig, deploy_folder, artifact, tmp_path):
    """The same batch and start as on the host: the same losses, within float32."""
    pi = build(deploy_folder / "pi", "rpi4")
    rig.shim("uname", '[ "$1" = -m ] && echo aarch64 || echo Linux')
    rig.prelude.write_text(f"export POCKTVM_LAUNCHER='{QEMU}'\n")
    result = facts(rig, pi, "--steps", 10, "--fetch", tmp_path / "user.safetensors")
    host = json.loads(rig.cli("run", artifact, "--steps", 10, "--json").stdout)
    assert result["emulated"] is True and result["selftest"]["selftest"] == "pass"
    np.testing.assert_allclose(result["losses"], host["losses"], rtol=1e-4)
    resumed = ("run", artifact, "--resume", tmp_path / "user.safetensors", "--steps", 12, "--json")
    assert json.loads(rig.cli(*resumed).stdout)["losses"][0] < host["losses"][-1]


@pytest.mark.parametrize("text", ["-oProxyCommand=x", "a b", "", "pi@-x", "h;ls", "h\n", "$(x)"])
def test_what_is_no_host(text):
    with pytest.raises(ValueError, match="is no host"):
        parse_host(text)


@pytest.mark.parametrize("text", ["pi", "pi@10.0.0.2", "pi@fe80::1%eth0", "ssh://pi@board:2222"])
def test_what_is_a_host(text):
    assert parse_host(text) == text


def test_values_reach_the_script_as_they_are(tmp_path):
    odd = 'a\'b "$(touch x)"\n`c`\\'
    text = compose(Script("probe", {"folder": odd}, ["--x", odd])).decode()
    body = text.index("pocktvm_script() {")
    printed = text[:body] + 'pocktvm_script() { printf "%s|" "$folder" "$@"; }\n' + text[
        text.rindex("\npocktvm_script ") :
    ]  # fmt: skip
    done = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{odd}|--x|{odd}|" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_script_cut_short_does_nothing(share, tmp_path):
    text = compose(Script("rollback", {"folder": str(tmp_path / "f"), "token": "t"})).decode()
    cut = text[: int(len(text) * share)].rpartition("pocktvm_script")[0] if share > 0.999 else text
    cut = cut[: int(len(text) * share)]
    subprocess.run(["sh", "-c", cut], capture_output=True, text=True, env={"PATH": "/bin:/usr/bin"})
    assert not list(tmp_path.iterdir())
