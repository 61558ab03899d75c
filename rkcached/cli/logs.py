"""`rkcached logs`: the service's lines in systemd's journal, of all or of one model or prompt."""

from __future__ import annotations

import os
import shutil
import sys

from rkcached.errors import SourceError
from rkcached.host import unit
from rkcached.host.settings import Settings


def run(settings: Settings, name: str | None, *, follow: bool, lines: int) -> int:
    """Become journalctl, with the fields that our entries have. Errors: SourceError."""
    program = shutil.which("journalctl")
    if program is None or unit.installed() is None:
        raise SourceError(
            "the service is not installed here, so its lines are not in a journal",
            hint=f"a daemon that was started with `rkcached run` writes them to its terminal "
            f"(its socket is {settings.socket})",
        )

    arguments = ["--unit", unit.NAME, "--no-pager", "--lines", str(lines)]
    if follow:
        arguments.append("--follow")
    if name is not None:
        model, _, prompt = name.partition("/")
        arguments.append(f"MODEL={model}")
        if prompt:
            arguments.append(f"PROMPT={prompt}")

    sys.stdout.flush()
    os.execv(program, ["journalctl", *arguments])  # noqa: S606 - no shell is wanted
