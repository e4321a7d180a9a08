"""One script run on a device through the user's own OpenSSH client.

The user's configuration, agent and known hosts apply; host keys are checked as ssh checks them.
The command line that reaches the remote shell is the same few words each time: they read exactly
the script's bytes from stdin and run them, and what follows on stdin is for the script. A script
cut short is no complete function and does nothing. Values are quoted assignments in front of it.

What a script says are lines `pocktvm:WORD TEXT` on stdout, and files as `pocktvm:file NAME BYTES
SHA256` followed by the bytes. Lines before `pocktvm:hello` are a login shell's, lines without the
prefix the trainer's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pocktvm.deploy.failures import DeviceError, ssh_failure
from pocktvm.errors import PockError

SCRIPTS = Path(__file__).parent / "sh"
# BatchMode: a question nobody answers is an error. Silence of 30 s is a lost connection. The rest
# keeps what a user's configuration adds to interactive logins out of the way.
OPTIONS = (
    "-T", "-a", "-x", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15",
    "-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=3",
    "-o", "RemoteCommand=none", "-o", "ClearAllForwardings=yes",
)  # fmt: skip
_HOST = re.compile(
    r"(ssh://)?([A-Za-z0-9_][A-Za-z0-9._+~-]*@)?[A-Za-z0-9_:\[][A-Za-z0-9._:%\[\]-]*"
)
_PREFIX = b"pocktvm:"


def parse_host(text: str) -> str:
    """`pi@host`, a Host of the user's ssh configuration, or ssh://… . ValueError says which."""
    if not _HOST.fullmatch(text):
        raise ValueError(
            f"{text!r} is no host: write user@name, or a Host of ~/.ssh/config "
            "(there go ports, keys and jump hosts)"
        )
    return text


@dataclass
class Script:
    """What to run: a file of sh/, its values and arguments, and what to do with what it says.

    `payload` writes to the script's stdin; `hold` keeps that open until the script ends or the
    user interrupts. `on_file` reads exactly the bytes it is told of. `stage` is told in errors.
    """

    name: str
    values: Mapping[str, str]
    arguments: Sequence[str] = ()
    payload: Callable[[IO[bytes]], None] | None = None
    hold: bool = False
    on_event: Callable[[str, str], None] = lambda word, text: None
    on_line: Callable[[str], None] = lambda line: None
    on_file: Callable[[str, int, str, IO[bytes]], None] | None = None


@dataclass
class _Talk:
    """What is known of a conversation so far."""

    stage: str = "connecting"
    greeted: bool = False
    done: bool = False
    interrupted: bool = False
    failure: tuple[str, str] | None = None
    payload_error: PockError | OSError | None = None
    errors: deque[str] = field(default_factory=lambda: deque(maxlen=60))


def run_script(host: str, script: Script) -> bool:
    """Run to the end; whether the user interrupted.

    PockError: no connection, or it was lost (see failures.py). DeviceError: the script refused.
    """
    text = compose(script)
    command = [_client(), *OPTIONS, "--", host, _bootstrap(len(text))]
    talk = _Talk()
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},  # its messages are read
        start_new_session=True,  # Ctrl-C is for us to pass on
    )
    threads = [
        threading.Thread(target=_feed, args=(child, text, script, talk), daemon=True),
        threading.Thread(target=_collect, args=(child.stderr, talk.errors), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        with _interrupts(child, talk) if script.hold else contextlib.nullcontext():
            _listen(child.stdout, script, talk)
        code = child.wait()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for thread in threads:
            thread.join(1)  # a shared connection's master keeps stderr open
    _check(host, code, talk)
    return talk.interrupted


def compose(script: Script) -> bytes:
    """Values, then one function with the whole script, then its call with the arguments."""
    values = [f"{name}={shlex.quote(value)}" for name, value in script.values.items()]
    body = [(SCRIPTS / f"{name}.sh").read_text() for name in ("common", script.name)]
    call = " ".join(["pocktvm_script", *map(shlex.quote, script.arguments)])
    return "\n".join([*values, "pocktvm_script() {", *body, "}", call, ""]).encode()


def _bootstrap(nbytes: int) -> str:
    """Read the script and nothing behind it: sh's own `sh -s` may read further ahead."""
    return f"exec sh -c 'eval \"$(dd bs=1 count={nbytes} 2>/dev/null)\"'"


def _client() -> str:
    program = shutil.which("ssh")
    if program is None:
        raise PockError(
            "no ssh program here: deploying uses OpenSSH.\n  apt-get install openssh-client"
        )
    return program


def _feed(child: subprocess.Popen, text: bytes, script: Script, talk: _Talk) -> None:
    """Write the script and its payload; a pipe that breaks is told by how ssh ends."""
    pipe = child.stdin
    assert pipe is not None
    try:
        pipe.write(text)
        pipe.flush()
        if script.payload is not None:
            script.payload(pipe)
    except BrokenPipeError:
        pass
    except (PockError, OSError, ValueError) as error:  # a file of ours, gone or changed meanwhile
        if not isinstance(error, ValueError):
            talk.payload_error = error
        child.kill()
    if not script.hold:
        with contextlib.suppress(OSError, ValueError):
            pipe.close()


def _collect(pipe: IO[bytes] | None, lines: deque[str]) -> None:
    for line in pipe or ():
        lines.append(line.decode(errors="replace").rstrip())


@contextlib.contextmanager
def _interrupts(child: subprocess.Popen, talk: _Talk) -> Iterator[None]:
    """The first Ctrl-C ends the script's stdin, so that a trainer saves; the second ends us."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        talk.interrupted = True
        with contextlib.suppress(OSError, ValueError):
            child.stdin.close()  # type: ignore[union-attr]

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _listen(pipe: IO[bytes] | None, script: Script, talk: _Talk) -> None:
    assert pipe is not None
    for line in iter(pipe.readline, b""):
        if not line.startswith(_PREFIX):
            if talk.greeted:
                script.on_line(line.decode(errors="replace").rstrip("\n"))
            continue
        word, _, rest = line[len(_PREFIX) :].decode(errors="replace").strip().partition(" ")
        if word == "hello":
            talk.greeted = True
        elif word == "fail":
            kind, _, detail = rest.partition(" ")
            talk.failure = (kind, detail.strip())
        elif word == "file" and script.on_file is not None:
            name, size, digest = rest.split()
            script.on_file(name, int(size), digest, pipe)
        else:
            talk.stage = rest if word == "stage" else talk.stage
            talk.done |= word == "done"
            script.on_event(word, rest)


def _check(host: str, code: int, talk: _Talk) -> None:
    if isinstance(talk.payload_error, OSError):
        name = talk.payload_error.filename or "a file to upload"
        raise PockError(f"cannot read {name}: {talk.payload_error.strerror or 'it changed'}")
    if talk.payload_error is not None:
        raise talk.payload_error
    if talk.failure is not None:
        raise DeviceError(*talk.failure)
    if code != 0 or not talk.done:
        raise ssh_failure(host, list(talk.errors), talk.stage if talk.greeted else None, code)
