"""What the deployment tests share: a rig, artifacts of a small model, spoiled copies of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from deploy_rig import MISSING, REASON, ROOT, Rig

from pocktvm.manifest import sha256

BATCH = 8


@pytest.fixture(scope="session")
def deploy_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("deploy")


@pytest.fixture(scope="session")
def server(deploy_folder):
    if MISSING:
        pytest.skip(REASON)
    rig = Rig(deploy_folder)
    yield rig
    rig.stop()


@pytest.fixture
def rig(server) -> Rig:
    server.reset()
    return server


@pytest.fixture(scope="session")
def artifact(deploy_folder) -> Path:
    return build(deploy_folder / "mlp", "host")


@pytest.fixture(scope="session")
def second(artifact) -> Path:
    """Another build of the same model, equally right."""
    return variant(artifact, "second", lambda folder: (folder / "pocktvm.h").write_text("/* */\n"))


@pytest.fixture(scope="session")
def wrong(artifact) -> Path:
    """Computes other losses than it recorded, as a wrong kernel would."""
    return variant(artifact, "wrong", spoil_recorded_losses)


def build(out: Path, target: str, *options: str, scheme: str = "full") -> Path:
    """The smallest model of the zoo."""
    words = ["build", "mlp", "--batch", str(BATCH), "--scheme", scheme, "--target", target]
    command = [sys.executable, "-m", "pocktvm", *words, *options, "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


def variant(artifact: Path, name: str, change: Callable[[Path], object]) -> Path:
    """A changed copy whose manifest holds the new hashes."""
    folder = artifact.parent / name
    shutil.copytree(artifact, folder)
    change(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file, entry in manifest["files"].items():
        entry["sha256"] = sha256(folder / file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def spoil_recorded_losses(folder: Path) -> None:
    """Find the three recorded losses in the library and move them by a thousandth."""
    import pocktvm
    from pocktvm.manifest import manifest_inputs, read_manifest
    from pocktvm.recorded import synthetic_batch

    batch = synthetic_batch(manifest_inputs(read_manifest(folder)))
    trainer = pocktvm.load(folder)
    losses = [trainer.step(*batch.values()) for _ in range(3)]
    library = folder / "model.so"
    raw = bytearray(library.read_bytes())
    values = np.frombuffer(raw, np.float32, len(raw) // 4)
    with np.errstate(all="ignore"):
        near = [np.isclose(values[i : len(values) - 2 + i], losses[i], rtol=1e-4) for i in range(3)]
    (places,) = np.nonzero(near[0] & near[1] & near[2])
    assert len(places) == 1
    values[places[0] : places[0] + 3] *= 1.001
    library.unlink()  # this process has it mapped
    library.write_bytes(raw)
    (folder / "pocktvm-run").chmod(0o755)


def place(rig: Rig) -> Path:
    """Where the model lies on the device."""
    return rig.home / ".local/share/pocktvm/mlp"


def current(rig: Rig) -> str:
    """The version deployed, by the device's own link."""
    link = place(rig) / "current"
    return link.readlink().name if link.is_symlink() else ""


def is_clean(rig: Rig) -> bool:
    """Nothing but whole versions: no lock, nothing half-made."""
    names = {p.name for p in place(rig).iterdir()}
    return names <= {"current", "previous", "versions", "data", "checkpoint.safetensors"}
