"""The file that a command writes for a user: where it goes, and what is never replaced."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rkcached.errors import StoreError


def place_for(path: Path, *, replace: bool, remedy: str) -> Path:
    """Where a file of this name is written: a link stays one, and what it leads to is written.

    Only a regular file is ever replaced, and only if `replace` says so; root could make a file of a
    device. `remedy`: the next step where a file exists. Errors: StoreError.
    """
    another = "name another file"
    if str(path) == "-":
        raise StoreError("a file is needed: this does not go to standard output", hint=another)
    try:
        place = path.resolve()
        exists, is_file = os.path.lexists(place), stat.S_ISREG(_mode(place))
        is_folder, has_folder = stat.S_ISDIR(_mode(place)), stat.S_ISDIR(_mode(place.parent))
        beside = os.path.lexists(place.parent)
    except RuntimeError as error:
        raise StoreError(f"{path} is a link that leads back to itself", hint=another) from error
    except OSError as error:
        raise StoreError(f"{path} cannot be used: {error.strerror}", hint=another) from error

    if is_folder:
        raise StoreError(f"{path} is a folder", hint="name a file in it")
    if not has_folder and beside:
        raise StoreError(f"{place.parent} is not a folder", hint=another)
    if not has_folder:
        raise StoreError(f"the folder {place.parent} does not exist", hint="make it, or " + another)
    if exists and not is_file:
        raise StoreError(f"{path} is a device, a pipe or a socket", hint=another)
    if exists and not replace:
        raise StoreError(f"{path} exists", hint=remedy)
    return place


def _mode(path: Path) -> int:
    """The mode of what is there; 0 if nothing is. Errors: OSError if that cannot be known."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
