"""A deployment cut anywhere: what was there stays whole, and the next try ends well."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from deploy_case import *  # noqa: F403 (fixtures)
from deploy_case import current, is_clean, place
from waiting import PATIENCE, wait_until

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc"),
]


def deploy(rig, artifact, *words: object) -> dict:
    return json.loads(rig.cli("deploy", artifact, "--ssh", "device", "--json", *words).stdout)


def ssh_of(client) -> int:
    path = Path(f"/proc/{client.pid}/task/{client.pid}/children")
    wait_until(lambda: path.read_text().split(), client)
    return int(path.read_text().split()[0])


def stall(rig, program: str, number: int = 1) -> Path:
    """The device's `program` stops at its call `number`; the file that it makes says so."""
    mark, calls = rig.folder / "stalled", rig.folder / "calls"
    mark.unlink(missing_ok=True)
    calls.write_text("")
    real = f"/usr/bin/{program}" if Path(f"/usr/bin/{program}").exists() else f"/bin/{program}"
    rig.shim(
        program,
        f'echo >>{calls}\n[ $(wc -l <{calls}) != {number} ] || {{ : >{mark}; sleep 300; }}\n'
        f'exec {real} "$@"',
    )  # fmt: skip
    return mark


# (the device's program that is running, which of its calls)
MOMENTS = {
    "upload": ("tar", 1),
    "verify": ("sha256sum", 1),
    "switch": ("sync", 1),
    "after": ("sync", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_cut(rig, artifact, second, moment):
    """ssh dies; the session it leaves behind still holds the lock, and the next try ends it."""
    first = deploy(rig, artifact)["version"]
    mark = stall(rig, *MOMENTS[moment])
    client = rig.start("deploy", second, "--ssh", "device")
    wait_until(mark.exists, client)
    os.kill(ssh_of(client), signal.SIGKILL)
    message = client.communicate(timeout=PATIENCE)[1]
    assert client.returncode == 1 and "connection to device was lost" in message
    assert (current(rig) == first) == (moment != "after")
    (rig.shims / MOMENTS[moment][0]).unlink()
    again = deploy(rig, second)
    assert current(rig) == again["version"] != first and again["previous"] == first
    assert is_clean(rig) and len(list((place(rig) / "versions").glob("*.sha256"))) == 2


def test_a_client_that_is_killed_leaves_no_trainer(rig, artifact):
    client = rig.start("deploy", artifact, "--ssh", "device", "--steps", 100_000_000)
    wait_until(lambda: trainers(rig), client)
    client.kill()
    client.wait()
    wait_until(lambda: not trainers(rig))
    assert len(deploy(rig, artifact, "--steps", 3)["losses"]) == 3 and is_clean(rig)


def trainers(rig) -> list[str]:
    """Running programs of this rig's device."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
            if b"--die-with-parent" in words and (path.parent / "cwd").resolve() == place(rig):
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_user_who_stops_gets_the_checkpoint(rig, artifact, tmp_path):
    saved = tmp_path / "user.safetensors"
    words = ("deploy", artifact, "--ssh", "device", "--steps", 100_000_000, "--fetch", saved)
    client = rig.start(*words)
    wait_until(lambda: trainers(rig), client)
    time.sleep(0.3)
    client.send_signal(signal.SIGINT)
    assert client.wait(PATIENCE) == 130 and saved.stat().st_size > 100_000
    done = rig.cli("run", artifact, "--resume", saved, "--steps", 1, "--json")
    assert json.loads(done.stdout)["steps"] > 1


def test_two_deployments_do_not_interleave(rig, artifact, second):
    mark = stall(rig, "tar")
    client = rig.start("deploy", artifact, "--ssh", "device")
    wait_until(mark.exists, client)
    said = rig.cli("deploy", second, "--ssh", "device", code=1).stderr
    assert "another deployment of this model to device is under way" in said and "rm " in said
    client.kill()
    client.wait()
    (rig.shims / "tar").unlink()
    deploy(rig, second)
    assert is_clean(rig)


def test_a_lock_from_before_a_reboot_is_stale(rig, artifact):
    place(rig).mkdir(parents=True)
    (place(rig) / "lock").symlink_to(f"{os.getpid()} 1 other-boot someone@else:x:1:1 0")
    (place(rig) / "incoming.0123").mkdir()
    deploy(rig, artifact)
    assert is_clean(rig)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_cut_at_random(rig, artifact, second, seed):
    chance = random.Random(seed)
    first = deploy(rig, artifact)["version"]
    client = rig.start("deploy", second, "--ssh", "device", "--steps", 2000)
    time.sleep(chance.uniform(0.2, 3))
    victim = client.pid if seed % 2 else (children(client.pid) or [client.pid])[0]
    os.kill(victim, signal.SIGKILL)
    client.communicate(timeout=PATIENCE)
    assert (place(rig) / "current/model.so").is_file()
    version = deploy(rig, second, "--steps", 3)["version"]
    assert current(rig) == version != first and is_clean(rig)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(p) for p in path.read_text().split()] if path.exists() else []
