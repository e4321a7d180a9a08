"""Artifacts of the tiny network, built once a session, and ways to run them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import runtime_case as case

from pocktvm.manifest import emulator_of
from pocktvm.targets import load_target


def emulator(name):
    """Command prefix for a target, or skip with the reason."""
    target = load_target(name)
    if target.is_host:
        return []
    if shutil.which(target.emulator[0]) is None:
        pytest.skip(f"no {target.emulator[0]} on this machine")
    return emulator_of({"emulator": target.emulator, "target": name})


def artifact(tmp_path_factory, name, **changes):
    """The folder of an artifact that the tests share and must not change."""
    key = name + repr(sorted(changes))
    if key not in _BUILT:
        _BUILT[key] = case.build(name, tmp_path_factory.mktemp("artifact") / "tiny", **changes)
    return _BUILT[key]


_BUILT: dict[str, Path] = {}


def run(folder, *options, prefix=(), check=True):
    """pocktvm-run; the JSON it prints, or the completed process when `check` is off."""
    command = [*prefix, str(folder / "pocktvm-run"), str(folder), *map(str, options)]
    if check:
        command.append("--json")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if not check:
        return done
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
