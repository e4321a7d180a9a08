"""The command line: one file a command, loaded without torch or TVM until one needs them."""

from __future__ import annotations

from pocktvm.cli.app import app, main

__all__ = ["app", "main"]
