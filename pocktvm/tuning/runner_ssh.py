"""Candidates on a device reached over the user's own ssh: no Python, no TVM, no server there."""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import tarfile
from pathlib import Path
from typing import IO

import numpy as np

from pocktvm.deploy.failures import DeviceError
from pocktvm.deploy.probe import Device, fitting_targets, probe
from pocktvm.deploy.ssh import Script, parse_host, run_script
from pocktvm.errors import PockError
from pocktvm.ir.target import Target
from pocktvm.tuning.calling import check_equal, seeded_arguments
from pocktvm.tuning.candidate import Candidate
from pocktvm.tuning.program import link_program, read_result
from pocktvm.tuning.runners import TIMEOUT_SECONDS, CandidateError

ROUNDS = 3  # of a comparison


class SshRunner:
    """One device; every candidate is sent, run once and removed."""

    def __init__(self, host: str, target: Target, threads: int | None = None) -> None:
        try:
            self._host = parse_host(host)
        except ValueError as error:
            raise PockError(f"--runner ssh://{host}: {error}") from None
        self._target, self._threads = target, threads or 0
        device = probe(self._host, ".cache")
        check_device(device, target)
        self._expected: list[np.ndarray] | None = None

    def reset(self) -> None:
        """Forget the outputs to agree with."""
        self._expected = None

    def time(self, folder: Path) -> float:
        """Median seconds on the device."""
        seconds, outputs = self._run(folder)
        if self._expected is None:
            self._expected = outputs
        try:
            for got, want in zip(outputs, self._expected, strict=True):
                check_equal(got, want)
        except ValueError as error:
            raise CandidateError(str(error)) from None
        return seconds

    def compare(self, first: Path, second: Path) -> tuple[float, float]:
        """Both medians; the two take turns."""
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for folder, collected in zip((first, second), times, strict=True):
                collected.append(self._run(folder)[0])
        return statistics.median(times[0]), statistics.median(times[1])

    def close(self) -> None:
        """Nothing is held between candidates."""

    def _run(self, folder: Path) -> tuple[float, list[np.ndarray]]:
        candidate = Candidate(folder)
        facts = json.loads(candidate.description.read_text())
        program = link_program(candidate, self._target.toolchain)
        inputs = b"".join(a.tobytes() for a in seeded_arguments(facts)[: facts["n_inputs"]])
        received: list[bytes] = []

        def keep(name: str, size: int, digest: str, pipe: IO[bytes]) -> None:
            data = pipe.read(size)
            if hashlib.sha256(data).hexdigest() == digest:
                received.append(data)

        values = {"seconds": str(int(TIMEOUT_SECONDS)), "threads": str(self._threads)}
        script = Script(
            "kernel", values, payload=lambda pipe: _send(pipe, program, inputs), on_file=keep
        )
        try:
            run_script(self._host, script)
        except DeviceError as error:
            raise CandidateError(error.detail) from None
        if not received:
            raise CandidateError("its result arrived damaged")
        return read_result(received[0], facts)


def check_device(device: Device, target: Target) -> None:
    """PockError where the device cannot run the target's programs."""
    if (device.system.lower(), device.arch) != (target.os, target.arch):
        raise PockError(
            f"{device.host} is {device.system} {device.machine}, the target {target.name} is "
            f"{target.os} {target.arch}.\n  {fitting_targets(device, 'pocktvm tune')}"
        )


def _send(pipe: IO[bytes], program: Path, inputs: bytes) -> None:
    with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        files = (("kernel", program.read_bytes(), 0o755), ("inputs", inputs, 0o644))
        for name, data, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
