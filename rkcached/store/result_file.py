"""The file that a command writes for a user: where it goes, and what is never replaced."""

from __future__ import annotations

import os
from pathlib import Path

from rkcached.errors import StoreError


def place_for(path: Path, *, replace: bool, remedy: str) -> Path:
    """Where a file of this name is written: a link stays one, and what it leads to is written.

    Only a regular file is ever replaced, and only if `replace` says so; root could make a file of a
    device. `remedy`: the next step where a file exists. Errors: StoreError.
    """
    another = "name another file"
    if path.name in ("", "-", ".."):
        raise StoreError(f"{str(path)!r} is no file's name here", hint=another)
    try:
        place = path.resolve()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path} leads nowhere: it is a loop of links", hint=another) from error

    if place.is_dir():
        raise StoreError(f"{path} is a folder", hint="name a file in it")
    if not place.parent.is_dir():
        raise StoreError(f"the folder {place.parent} does not exist", hint="make it, or " + another)
    if os.path.lexists(place) and not place.is_file():
        raise StoreError(f"{path} is a device, a pipe or a socket", hint=another)
    if os.path.lexists(place) and not replace:
        raise StoreError(f"{path} exists", hint=remedy)
    return place
