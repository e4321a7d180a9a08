"""The command line's promises: exit codes, one message, one JSON object."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pocktvm.cli import app
from pocktvm.cli import run as run_command
from pocktvm.cli.build import model_name
from pocktvm.errors import InternalError, PockError

PLAN = {
    "arena_bytes": 12_000_000,
    "lower_bound_bytes": 11_000_000,
    "total_bytes": 20_000_000,
    "by_class": {"trained": 1000, "activations": 11_000_000},
}


@pytest.fixture
def artifact(tmp_path):
    """A folder that looks like an artifact; its program is a script."""
    folder = tmp_path / "art"
    folder.mkdir()
    runner = folder / "pocktvm-run"
    runner.write_text(
        '#!/bin/sh\necho \'{"losses": [2.0, 1.0], "step_ms_median": 1.5, "peak_rss_bytes": 9}\'\n'
    )
    runner.chmod(0o755)
    manifest = {
        "target": "host",
        "model": "mlp",
        "scheme": "full",
        "batch": 4,
        "loss": "cross_entropy",
        "updated": {f"layer{i}.weight": 1.0 for i in range(30)},
        "plan": PLAN,
        "kernels": {"tuned": 0, "rule": 12, "fallback": 1, "untuned": 3},
        "inputs": [
            {"name": "x", "shape": [4, 2], "dtype": "float32"},
            {"name": "y", "shape": [4], "dtype": "int32", "bound": 3},
        ],
        "files": {"pocktvm-run": {"sha256": hashlib.sha256(runner.read_bytes()).hexdigest()}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def call(*words: object):
    return CliRunner().invoke(app, [str(w) for w in words])


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "words",
    [
        ("build", "mlp", "--batch", "0"),
        ("build", "mlp", "--batch", "many"),
        ("build", "mlp", "--budget", "lots"),
        ("build", "mlp", "--lr", "nan"),
        ("build", "mlp", "--lr", "-1"),
        ("build", "mlp", "--threads", "0"),
        ("build", "mlp", "--no-such-option"),
        ("run",),
        ("run", "x", "--steps", "0"),
        ("run", "x", "--save-every", "soon", "--save", "f"),
        ("run", "x", "--save-every", "1s"),
        ("eval", "x"),
        ("launch",),
    ],
    ids=" ".join,
)
def test_the_parser_refuses_with_2(words):
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "mlp", "--target", "rpi"), "no target 'rpi'; did you mean"),
        (("build", "mlp", "--scheme", "blocsk:2"), "scheme"),
        (("build", "mlp", "--weights", "none.safetensors"), "no weights at none.safetensors"),
        (("run", "nowhere"), "nowhere is no artifact"),
        (("eval", "nowhere", "--data", "d"), "nowhere is no artifact"),
        (("inspect", "nowhere"), "nowhere is no artifact"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_what_the_user_can_mend_is_1_and_one_message(words, message):
    result = call(*words)
    assert result.exit_code == 1
    assert message in result.stderr and "Traceback" not in result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) <= 25


def test_our_bug_is_3_with_the_place_of_the_report(monkeypatch, artifact):
    def broken(*_, **__):
        raise InternalError("kernel 7 disagrees")

    monkeypatch.setattr(run_command, "read_manifest", broken)
    result = call("run", artifact)
    assert result.exit_code == 3
    assert "Traceback" in result.stderr and "kernel 7 disagrees" in result.stderr
    assert "report.txt" in result.stderr and "POCKTVM_DUMP" in result.stderr


def test_long_messages_are_cut(monkeypatch, artifact):
    def long(*_, **__):
        raise PockError("\n".join(f"line {i}" for i in range(80)))

    monkeypatch.setattr(run_command, "read_manifest", long)
    result = call("run", artifact)
    assert result.exit_code == 1 and len(result.stderr.splitlines()) == 25


def test_full_disk_is_the_users(monkeypatch, artifact):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "c.part")

    monkeypatch.setattr(run_command, "read_manifest", full)
    result = call("run", artifact)
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: No space left on device: c.part"


def test_inspect_json_is_the_contract(artifact):
    result = call("inspect", artifact, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    wanted = {"target", "model", "scheme", "batch", "updated", "plan", "kernels", "seconds"}
    assert wanted <= facts.keys()
    assert set(PLAN) <= facts["plan"].keys()
    assert set(facts["kernels"]) == {"tuned", "rule", "fallback", "untuned"}


def test_inspect_prints_a_page(artifact):
    text = call("inspect", artifact).stdout
    for words in ("arena", "12.0 MB", "lower bound", "12 rule, 1 fallback", "30 tensors"):
        assert words in text


def test_run_json_is_one_object_on_stdout(artifact):
    command = [sys.executable, "-m", "pocktvm", "run", str(artifact), "--steps", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "losses": [2.0, 1.0],
        "step_ms_median": 1.5,
        "peak_rss_bytes": 9,
        "emulated": False,
    }
    assert done.stderr == "", "stderr is no terminal"


def test_emulated_memory_is_not_reported(artifact):
    edit(artifact, target="rpi4", emulator=["env"])
    command = [sys.executable, "-m", "pocktvm", "run", str(artifact), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    assert facts["emulated"] is True and facts["peak_rss_bytes"] is None


def test_missing_emulator_says_what_to_install(artifact):
    edit(artifact, target="rpi4", emulator=["qemu-nosuch", "-L", "/usr/aarch64-linux-gnu"])
    result = call("run", artifact)
    assert result.exit_code == 1
    assert "rpi4" in result.stderr and "apt-get install qemu-user" in result.stderr


def test_a_changed_artifact_is_refused(artifact):
    (artifact / "pocktvm-run").write_text("#!/bin/sh\n")
    result = call("run", artifact)
    assert result.exit_code == 1 and "pocktvm-run (changed)" in result.stderr


def test_a_truncated_manifest_is_refused(artifact):
    (artifact / "manifest.json").write_text('{"target": ')
    result = call("inspect", artifact)
    assert result.exit_code == 1 and "damaged or not pocktvm's" in result.stderr


def test_a_trainer_killed_by_a_signal_is_our_bug(artifact):
    script = "#!/bin/sh\nkill -SEGV $$\n"
    (artifact / "pocktvm-run").write_text(script)
    digest = hashlib.sha256(script.encode()).hexdigest()
    edit(artifact, files={"pocktvm-run": {"sha256": digest}})
    result = call("run", artifact, "--json")
    assert result.exit_code == 3 and "signal 11" in result.stderr


def test_checkpoint_paths_are_checked_before_a_step(artifact, tmp_path):
    result = call("run", artifact, "--save", tmp_path / "no" / "c.safetensors")
    assert result.exit_code == 1 and "create it" in result.stderr
    result = call("run", artifact, "--resume", tmp_path / "c.safetensors")
    assert result.exit_code == 1 and "no checkpoint" in result.stderr


def test_targets_and_doctor_json():
    targets = json.loads(call("targets", "--json").stdout)
    assert {"host", "rpi4"} <= targets.keys() and targets["rpi4"]["checked"] == "emulated"
    doctor = json.loads(call("doctor", "--json").stdout)
    assert {"python", "torch", "zig", "rpi4"} <= {c["name"] for c in doctor["checks"]}


def test_help_names_every_command():
    text = call("--help").stdout
    for name in ("build", "run", "eval", "inspect", "report", "targets", "doctor"):
        assert name in text


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("mobilenetv2:width=0.35,image=128", "mobilenetv2"),
        ("ViT_Tiny", "vit-tiny"),
        ("dir/nets.py:tiny", "nets_tiny"),
        ("dir/net.onnx", "net"),
    ],
)
def test_model_names(spec, name):
    assert model_name(spec) == name
