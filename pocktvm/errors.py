"""The two kinds of failure: the user's to mend (PockError) and ours (InternalError)."""

from __future__ import annotations


class PockError(Exception):
    """Something the user can fix. The message says what happened, where, the numbers, and what
    to do next; at most 25 lines. The command line prints it without a traceback, exit code 1."""


class InternalError(Exception):
    """A bug of ours. The command line prints the traceback, says what to attach, exit code 3."""
