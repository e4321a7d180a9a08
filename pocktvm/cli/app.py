"""The command list and what every failure looks like.

2: the parser refuses (typer's own). 1: PockError, one message. 3: a bug of ours, with the
traceback and the folder that holds what a report needs.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer
import typer.core

from pocktvm.cli import (
    build,
    deploy,
    doctor,
    evaluate,
    inspect,
    merge,
    report,
    run,
    scheme,
    targets,
    tune,
)
from pocktvm.cli.crash import report_crash
from pocktvm.errors import PockError

# What the disk or the user's rights refuse; anything else from the system is a bug of ours.
_USERS_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_MAX_LINES = 25


class Commands(typer.core.TyperGroup):
    """The group of commands: turns exceptions into exit codes, for the process and for tests."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; see the module's docstring for the codes."""
        try:
            return super().invoke(ctx)
        except PockError as error:
            _fail(str(error))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except OSError as error:
            if error.errno not in _USERS_ERRNO:
                raise typer.Exit(report_crash(error)) from error
            _fail(f"{error.strerror}: {error.filename or 'while writing'}")
        except Exception as error:
            # typer's own (usage errors, Exit) carry an exit code and are for typer to print.
            if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):
                raise
            raise typer.Exit(report_crash(error)) from error


def _fail(message: str) -> None:
    lines = message.rstrip().splitlines()
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], f"  … and {len(lines) - _MAX_LINES + 1} more lines"]
    print("error: " + "\n".join(lines), file=sys.stderr)
    raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A PyTorch model in, one shared library out that trains on the device that holds it.",
)
app.command("build")(build.build)
app.command("run")(run.run)
app.command("eval")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("merge")(merge.merge)
app.command("report")(report.report)
app.command("scheme")(scheme.scheme)
app.command("tune")(tune.tune)
app.command("deploy")(deploy.deploy)
app.command("targets")(targets.targets)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """The entry point of the `pocktvm` command."""
    app(prog_name="pocktvm")
