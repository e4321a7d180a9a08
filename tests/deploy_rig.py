"""A device on this machine: a real sshd on 127.0.0.1 with keys, users' files and shims of its own.

Every command that reaches it goes through a wrapper, as with ForceCommand on a locked-down board:
it gives the "device" a home folder and a PATH whose first folder holds a test's shims.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner
from waiting import wait_until

from pocktvm.cli.app import app

ROOT = Path(__file__).parent.parent
SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
MISSING = SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None
REASON = "no OpenSSH client and server (apt-get install openssh-client openssh-server)"


class Rig:
    """One sshd; `home` and the shims are changed from test to test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.shims = folder / "shims"
        self.prelude = folder / "prelude.sh"
        self.known_hosts = folder / "known_hosts"
        self.config = folder / "ssh_config"
        self.port = _free_port()
        for key in ("host_key", "user_key", "other_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(command, check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        self._write_server()
        self._write_client()
        self.reset()
        self._start()

    def reset(self) -> None:
        """A new home, no shims, the right host key."""
        for path in (self.home, self.shims):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        self.prelude.write_text("")
        self.know("host_key")

    def know(self, key: str) -> None:
        """What the client takes for the device's host key; empty: nothing."""
        entry = (self.folder / f"{key}.pub").read_text() if key else ""
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {entry}" if entry else "")

    def shim(self, name: str, script: str) -> None:
        """A program of the device's, in place of the real one."""
        path = self.shims / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def cli(self, *words: object, code: int = 0) -> Any:
        """`pocktvm …` in this process, with the rig's ssh; the exit code is checked."""
        done = CliRunner().invoke(app, [str(w) for w in words], env=self.env())
        assert done.exit_code == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def start(self, *words: object) -> subprocess.Popen:
        """`pocktvm …` in a process that a test can kill."""
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        command = [sys.executable, "-m", "pocktvm", *map(str, words)]
        return subprocess.Popen(command, stdout=null, stderr=pipe, text=True, env=self.env())

    def env(self) -> dict[str, str]:
        """The user's environment: `ssh` reads the rig's configuration."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def stop(self) -> None:
        """End the server; sessions that are left end with their clients."""
        self._server.terminate()
        self._server.wait(10)

    def _write_server(self) -> None:
        wrapper = self.folder / "wrapper.sh"
        wrapper.write_text(
            f"export HOME={self.home} PATH={self.shims}:$PATH\ncd $HOME\n. {self.prelude}\n"
            'exec sh -c "$SSH_ORIGINAL_COMMAND"\n'
        )
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder / 'host_key'}\n"
            f"AuthorizedKeysFile {self.folder / 'authorized_keys'}\nStrictModes no\nUsePAM no\n"
            f"PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"PidFile none\nForceCommand exec sh {wrapper}\nMaxStartups 100\n"
        )

    def _write_client(self) -> None:
        self.config.write_text(
            f"Host device\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"  IdentityFile {self.folder / 'user_key'}\n"
            f"Host stranger\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"  IdentityFile {self.folder / 'other_key'}\n"
            f"Host closed\n  HostName 127.0.0.1\n  Port {_free_port()}\n"
            f"Host *\n  User {getpass.getuser()}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {self.known_hosts}\n  GlobalKnownHostsFile none\n"
            "  StrictHostKeyChecking yes\n"
        )
        bin_folder = self.folder / "bin"
        bin_folder.mkdir()
        program = bin_folder / "ssh"
        program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.config} "$@"\n')
        program.chmod(0o755)

    def _start(self) -> None:
        assert SSHD is not None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where a server run by root confines itself
        with (self.folder / "sshd.log").open("wb") as log:
            command = [SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self._server = subprocess.Popen(command, stderr=log)
        try:
            wait_until(self._answers, self._server)
        except AssertionError as error:
            said = (self.folder / "sshd.log").read_text()
            raise RuntimeError(f"sshd does not start: {said}") from error

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
