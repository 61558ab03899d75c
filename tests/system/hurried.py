"""The program with some of its constants replaced, so that what waits by design waits less.

Started by `Workspace.hurry`. A name that the program does not have is an error: a constant that
moved would otherwise keep its value, and the test would wait, or prove nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from rkcached.cli.main import main as program


def main(constants: Mapping[str, Any]) -> None:
    """Run the program with `room__module__NAME` set to these values."""
    for name, value in constants.items():
        module, _, constant = name.replace("__", ".").rpartition(".")
        owner = importlib.import_module(f"rkcached.{module}")
        getattr(owner, constant)
        setattr(owner, constant, value)
    program()
