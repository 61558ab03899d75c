"""Finds the places whose change may change a path: folders, and the names in them that matter.

Folders, not files, because editors replace files. Of each path these are every folder in which a
link on the way lies, so that a retargeted link or a swapped `..data` folder is noticed; and each
folder on the way, for being moved or deleted itself. A folder that does not exist yet is awaited in
its nearest existing ancestor.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

REMOTE = frozenset(
    [
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse",
        "lustre",
        "nfs",
        "nfs4",
        "smb3",
        "vboxsf",
        "virtiofs",
    ]
)
"""Types of file systems that may change without an event on this machine; so may all named
`fuse.*`."""

# As the kernel's own limit for links on one path.
_MAX_LINKS = 40

# Stands for a file of a folder, whatever its name.
_ANY = "any"


@dataclass(frozen=True, slots=True)
class Place:
    """The parts of a folder that matter."""

    names: set[str] | None
    """None: everything in it; empty: only the folder itself."""
    identity: tuple[int, int] | None
    """Device and inode, which the folder that replaces it does not share. None: it is not there."""
    remote: bool = False
    """Whether it may change without an event, because other machines use its file system, too."""

    @property
    def is_only_itself(self) -> bool:
        """Whether nothing in the folder matters, only that it is moved or deleted."""
        return self.names is not None and not self.names

    def follows(self, name: str) -> bool:
        return self.names is None or name in self.names


def places(files: Iterable[Path], folders: Iterable[Path]) -> dict[str, Place]:
    """The places where these files and folders may change; they need not exist.

    Reads links: may block.
    """
    entries: dict[str, set[str] | None] = {}

    def add(folder: str, name: str) -> None:
        if (names := entries.setdefault(folder, set())) is not None and name:
            names.add(name)

    by_folder: dict[Path, list[str]] = defaultdict(list)
    for path in files:
        by_folder[path.parent].append(path.name)
    everything = set(folders)

    for parent in by_folder.keys() | everything:
        *way, (folder, last) = trail(parent / _ANY)
        for place in way:
            add(*place)
        add(folder, last)
        if last != _ANY:  # the folder does not exist
            continue

        if parent in everything:
            entries[folder] = None

        for name in by_folder.get(parent, ()):
            for place in _trail_in(folder, name, parent):
                add(*place)

    remote = _remote_devices()
    return {folder: _place(folder, names, remote) for folder, names in entries.items()}


def _trail_in(folder: str, name: str, parent: Path) -> list[tuple[str, str]]:
    """The trail of a file in `parent`, whose own trail is known and ends in `folder`."""
    # Paths are strings here, as events carry them.
    if os.path.islink(os.path.join(folder, name)):  # noqa: PTH114, PTH118
        return trail(parent / name)
    return [(folder, name)]


def trail(path: Path) -> list[tuple[str, str]]:
    """The places (folder, name) whose change may change `path`, the file's real folder last.

    Every link on the way is a place; so is each folder, without a name. If something on the way
    does not exist, the last place is where it would appear.
    """
    places: list[tuple[str, str]] = []
    folder = "/"
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - it keeps links
    rest = [part for part in absolute.parts if part != "/"]
    links = 0

    while rest:
        name = rest[0]
        rest = rest[1:]
        here = os.path.join(folder, name)  # noqa: PTH118 - strings, as events carry them

        if os.path.islink(here) and links < _MAX_LINKS:  # noqa: PTH114
            links += 1
            places.append((folder, name))
            target = os.path.join(folder, os.readlink(here))  # noqa: PTH115, PTH118
            folder = "/"
            rest = [part for part in os.path.normpath(target).split("/") if part] + rest
        elif rest and os.path.isdir(here):  # noqa: PTH112
            folder = here
            places.append((folder, ""))
        else:
            places.append((folder, name))
            break

    return places


def _place(folder: str, names: set[str] | None, remote_devices: Collection[int]) -> Place:
    try:
        info = os.stat(folder)  # noqa: PTH116
    except OSError:
        return Place(names, None)
    return Place(names, (info.st_dev, info.st_ino), remote=info.st_dev in remote_devices)


def _remote_devices() -> set[int]:
    """The devices of all mounted file systems that may change without an event."""
    devices = set()
    with contextlib.suppress(OSError):  # without /proc, none is known
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            mount, _, source = line.partition(" - ")
            kind = source.partition(" ")[0]
            if kind in REMOTE or kind.startswith("fuse."):
                major, minor = mount.split()[2].split(":")
                devices.add(os.makedev(int(major), int(minor)))

    return devices
