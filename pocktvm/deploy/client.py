"""Who we are to a device's lock, so that our own dead deployments hold nobody up."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import platform
import re
from pathlib import Path


def client_name() -> str:
    """`user@machine:HASH:PID:START`: one word; HASH is of this boot and its process numbers."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no name for the user's number
        user = str(os.getuid())
    who = re.sub(r"[^A-Za-z0-9._@-]", "_", f"{user}@{platform.node()}")
    return f"{who}:{_machine()}:{os.getpid()}:{_started(os.getpid())}"


def is_gone(client: str) -> bool:
    """Whether `client` is a process of this machine that has ended."""
    parts = client.split(":")
    if len(parts) != 4 or parts[1] != _machine() or not parts[2].isdigit():
        return False
    return _started(int(parts[2])) != parts[3]


def _machine() -> str:
    facts = [platform.node()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        with contextlib.suppress(OSError):
            facts.append(read())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _started(pid: int) -> str:
    """When the process started, in ticks since boot; empty when there is none."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        try:  # a system without /proc
            os.kill(pid, 0)
        except OSError:
            return ""
        return "-"
    return "" if words[0] == "Z" else words[19]
