"""What goes wrong between here and a device, each as one message with the fix."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pocktvm.errors import PockError

# (pattern in what ssh says, what it means, what to do); the first that matches counts.
_SSH = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "{host} shows another host key than the one you know: another machine answers, or the "
        "device was set up again",
        "Compare the fingerprint on the device (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub); "
        "if it is yours:\n  {forget}, then `ssh {host}` once by hand.",
    ),
    (
        r"Host key verification failed|host key is known for|Host key .* revoked",
        "the host key of {host} is not known here",
        "Run `ssh {host}` once by hand, compare the fingerprint it shows, and accept it.",
    ),
    (
        r"Could not resolve hostname|Name or service not known|nodename nor servname",
        "there is no host {host}: its name does not resolve",
        "Check the name (`ssh {host}`), use the address, or add a Host to ~/.ssh/config.",
    ),
    (
        r"Connection refused",
        "{host} refuses connections: no ssh server listens there",
        "On the device: sudo systemctl enable --now ssh (Raspberry Pi OS: raspi-config, "
        "Interface Options); check the port.",
    ),
    (
        r"timed out|No route to host|Network is unreachable|Host is down",
        "{host} does not answer",
        "Is it switched on and in this network? `ssh {host}` must work by hand.",
    ),
    (
        r"Permission denied|Too many authentication failures|Authentication failed"
        r"|No supported authentication methods",
        "{host} does not let you in: no key of yours is accepted (passwords cannot be asked for)",
        "ssh-copy-id {host}, or ssh-add the key that it knows.",
    ),
    (
        r"Bad owner or permissions|Bad configuration option|terminating, \d+ bad configuration"
        r"|UNPROTECTED PRIVATE KEY",
        "your ssh configuration is refused by ssh itself",
        "Mend what it names; `ssh {host}` must work by hand.",
    ),
    (
        r"This account is (currently )?not available|sh: (not found|command not found)",
        "the account on {host} gives no shell",
        "Use a user with a POSIX shell.",
    ),
)  # fmt: skip
_FULL = re.compile(
    r"^153 |Wrote only|No space left|File too large|quota exceeded|File size limit", re.IGNORECASE
)
_SIGNALS = {
    132: "illegal instruction: it was built for a newer CPU than the device's",
    134: "abort", 135: "bus error", 136: "arithmetic error", 137: "killed: was the memory used up?",
    139: "segmentation fault", 159: "bad system call",
}  # fmt: skip


class DeviceError(Exception):
    """A script on the device refused; `explain` makes a PockError of it."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


def ssh_failure(host: str, errors: Sequence[str], stage: str | None, code: int) -> PockError:
    """Why there was no conversation (`stage` None), or that it broke off."""
    said = [
        line for line in errors if line and not line.startswith(("debug", "**", "Warning: Perm"))
    ]
    last = "\n".join(f"  ssh: {line.removeprefix('ssh: ')}" for line in said[-3:])
    if stage is not None:
        return PockError(
            f"the connection to {host} was lost (at: {stage}); what is deployed there is unchanged "
            "or complete.\n  Run the same command again." + ("\n" + last if last else "")
        )
    text = "\n".join(errors)
    for pattern, what, fix in _SSH:
        if re.search(pattern, text, re.IGNORECASE):
            known = re.search(r"ssh-keygen -f .* -R .*", text)  # ssh names the file and the entry
            name = host.rpartition("@")[2].removeprefix("ssh://")
            forget = known[0] if known else f"ssh-keygen -R {name}"
            fix = fix.format(host=host, forget=forget)
            return PockError(f"{what.format(host=host)}.\n  {fix}\n{last}".rstrip())
    return PockError(
        f"ssh to {host} failed (exit code {code}); `ssh {host}` must work by hand, with a POSIX "
        f"shell.\n{last}".rstrip()
    )


def explain(host: str, folder: str, error: DeviceError) -> PockError:
    """The message of a script's refusal."""
    kind, detail = error.kind, error.detail
    if kind in ("upload", "folder", "full") and (kind == "full" or _FULL.search(detail)):
        return PockError(
            f"the disk of {host} is full ({detail}); what is deployed there is unchanged.\n"
            f"  Free space under {folder}, or name another folder with --dir."
        )
    if kind == "upload":
        return PockError(
            f"the upload to {host} did not arrive whole (tar: {detail}).\n  Run the same command "
            "again; what is deployed there is unchanged."
        )
    if kind == "selftest":
        return _self_test_failure(host, detail)
    makers = {
        "tools": (
            f"{host} lacks programs that deploying needs: {detail}",
            "Install them there: sudo apt-get install coreutils tar grep",
        ),
        "folder": (
            f"cannot write to {folder} on {host}: {detail}",
            "Give your user the right, or name another folder with --dir.",
        ),
        "damaged": (
            f"files on {host} differ from what was built: {detail}",
            "Nothing was switched. Run the same command again; if it stays, check the device's "
            "disk or card.",
        ),
        "previous": (
            f"{host} has no earlier version of this model to go back to",
            "Deploy the artifact you want: pocktvm deploy ARTIFACT --ssh " + host,
        ),
        "replaced": (
            f"the version to train was removed from {host} by another deployment",
            "Run the same command again.",
        ),
        "train": (
            f"the trainer on {host} failed: {_exit_reason(detail)}",
            "The version stays deployed; mend what it names and run the same command again.",
        ),
        "busy": (_busy(host, detail), f"Wait for it; if it is gone for good: ssh {host} "
                 f"rm {folder}/lock"),
    }  # fmt: skip
    what, fix = makers.get(kind, (f"{host}: {kind}: {detail}", "Run the same command again."))
    return PockError(f"{what}.\n  {fix}")


def _busy(host: str, detail: str) -> str:
    client, _, seconds = detail.rpartition(" ")
    who = client.partition(":")[0]
    since = f", since {int(seconds)} s" if seconds.isdigit() and int(seconds) else ""
    return f"another deployment of this model to {host} is under way (by {who}{since})"


def _exit_reason(code: str) -> str:
    number = int(code) if code.isdigit() else -1
    if number == 126:
        return "pocktvm-run cannot be executed there (is the folder mounted noexec? --dir)"
    if number == 127:
        return "pocktvm-run finds no loader or library there (is its libc glibc?)"
    return _SIGNALS.get(number, f"exit code {code}")


def _self_test_failure(host: str, detail: str) -> PockError:
    """`CODE {"selftest": …} messages`: computed wrongly, or not at all."""
    code, _, rest = detail.partition(" ")
    if '"selftest"' in rest:
        found = dict(re.findall(r'"(loss_error|output_error|tolerance)": ([^,}]+)', rest))
        what = (
            f"losses {found.get('loss_error')}, outputs {found.get('output_error')} away from "
            f"the recorded ones (allowed {found.get('tolerance')})"
        )
        fix = "The library computes wrongly there: build it again; if it stays, it is our bug."
    else:
        what = _exit_reason(code) + (f" ({rest.strip()})" if rest.strip() else "")
        fix = "Build for this device (`pocktvm doctor --ssh` says what it is) and deploy again."
    return PockError(
        f"the self-test failed on {host}: {what}.\n  Not switched: what was deployed there "
        f"stays.\n  {fix}"
    )
