"""A real file system whose times have whole seconds: exFAT on a loop device, through FUSE."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SIZE_BYTES = 16 << 20


@contextlib.contextmanager
def exfat(folder: Path) -> Iterator[Path]:
    """Mounted as a new folder `disk` below this one, until the end.

    Needs root and Debian's exfat-fuse, exfatprogs.
    """
    programs = ("mkfs.exfat", "mount.exfat-fuse", "losetup")
    missing = [
        program
        for program in programs
        if shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None
    ]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(programs)}; missing: {missing}")
    image, place = folder / "exfat.img", folder / "disk"
    with image.open("wb") as stream:
        stream.truncate(SIZE_BYTES)
    place.mkdir()
    try:
        device = _run("losetup", "--find", "--show", str(image)).strip()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"there is no loop device here: {error.stderr}")
    try:
        _run("mkfs.exfat", device)
        _run("mount.exfat-fuse", device, str(place))
        try:
            yield place
        finally:
            _run("umount", str(place))
    finally:
        _run("losetup", "--detach", device)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
