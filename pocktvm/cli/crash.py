"""What is left behind when pocktvm itself is wrong: a folder to attach to a report."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from importlib import metadata
from pathlib import Path

PACKAGES = ("pocktvm", "apache-tvm", "apache-tvm-ffi", "torch", "numpy", "ziglang", "safetensors")


def versions() -> dict[str, str]:
    """Versions of what a build depends on, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def report_crash(error: BaseException) -> int:
    """Print the traceback and where the report lies; returns the exit code 3."""
    text = "".join(traceback.format_exception(error))
    print(text, file=sys.stderr, end="")
    print("\nThis is a bug of pocktvm, not of yours.", file=sys.stderr)
    try:
        folder = Path(tempfile.mkdtemp(prefix="pocktvm-crash-"))
        facts = "\n".join(f"{k} {v}" for k, v in versions().items())
        command = " ".join(sys.argv)
        (folder / "report.txt").write_text(f"{command}\n{platform.platform()}\n{facts}\n\n{text}")
        print(f"  Please attach {folder / 'report.txt'} to a report.", file=sys.stderr)
    except OSError as failure:
        print(f"  No report could be written ({failure}): attach the above.", file=sys.stderr)
    dump = os.environ.get("POCKTVM_DUMP")
    if dump:
        print(f"  The stages up to the failure lie in {dump}: attach them too.", file=sys.stderr)
    else:
        print("  POCKTVM_DUMP=folder and the same command write every stage.", file=sys.stderr)
    return 3
