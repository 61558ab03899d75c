"""Lists the files that a prompts_from pattern names.

Paths are strings here, and the entries of one listing are used: there may be thousands of files.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path


def links(pattern: str) -> list[Path]:
    """The links among the files that a prompts_from pattern names. Errors: OSError."""
    return [Path(entry.path) for entry in _matching(pattern) if entry.is_symlink()]


def matches(pattern: str) -> Iterator[str]:
    """The files that a prompts_from pattern names, sorted; and the links that cannot be followed.

    Errors: OSError.
    """
    for entry in _matching(pattern):
        if entry.is_file(follow_symlinks=False) or (
            entry.is_symlink() and _may_be_read(entry.path)
        ):
            yield entry.path


def stem(path: str) -> str:
    """The name of a file without its ending.

    As `Path.stem` has it, which for thousands of files takes long.
    """
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name


def _matching(pattern: str) -> list[os.DirEntry[str]]:
    """List what a prompts_from pattern names, sorted; no hidden files, no editors' backups.

    Errors: OSError.
    """
    folder, _, wanted = pattern.rpartition("/")
    is_wanted = re.compile(fnmatch.translate(wanted)).match

    with os.scandir(folder or "/") as entries:
        matching = [
            entry
            for entry in entries
            if entry.name[0] != "." and entry.name[-1] != "~" and is_wanted(entry.name)
        ]

    return sorted(matching, key=lambda entry: entry.name)


def _may_be_read(link: str) -> bool:
    """Whether it leads to a file.

    One that leads nowhere is a prompt in trouble: what was made of it is kept.
    """
    try:
        return stat.S_ISREG(os.stat(link).st_mode)  # noqa: PTH116
    except OSError:
        return True
