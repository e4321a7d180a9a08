"""Candidates on a device reached over the user's own ssh: no Python, no TVM, no server there."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import IO

from pocktvm.deploy.failures import DeviceError
from pocktvm.deploy.probe import Device, fitting_targets, probe
from pocktvm.deploy.ssh import Script, parse_host, run_script
from pocktvm.errors import PockError
from pocktvm.ir.target import Target
from pocktvm.tuning.program import ProgramRunner
from pocktvm.tuning.runners import TIMEOUT_SECONDS, CandidateError


class SshRunner(ProgramRunner):
    """One device; every candidate is sent, run once and removed."""

    def __init__(self, host: str, target: Target, threads: int | None = None) -> None:
        try:
            self._host = parse_host(host)
        except ValueError as error:
            raise PockError(f"--runner ssh://{host}: {error}") from None
        super().__init__(target)
        self._threads = threads or 0
        device = probe(self._host, ".cache")
        check_device(device, target)

    def run_program(self, program: Path, inputs: bytes) -> tuple[float | None, bytes]:
        """Send the program, run it there, fetch what it wrote; its own clock is believed."""
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
        return None, received[0]


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
