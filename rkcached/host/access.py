"""Explains why this process may not read a file, and how to allow it.

Three things keep a daemon out: the sandbox of its unit, a folder on the way, and the file's own
mode. The sandbox is read from the kernel's list of mounts, so that an administrator's drop-in
counts and nothing is guessed.

A person may be kept from the service's files, too, and on purpose. Then no mode is to be changed,
which could take the file from the service: who asks uses sudo or joins the group.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Final, NamedTuple

HOMES: Final = ("/home", "/root", "/run/user")
"""The folders that ProtectHome= hides."""

GROUP: Final = "rkcached"
"""The service's group, unless its unit names another."""

_CONFIGURATION: Final = "/etc/rkcached"

# What a command says instead of how to change a mode; nothing where it looks at files of its own.
_advice: ContextVar[Callable[[], str]] = ContextVar("advice", default=str)

# The source that systemd mounts over a place that a unit must not see; `host` in a container.
_INACCESSIBLE: Final = re.compile(r"/(systemd|host)/inaccessible/[a-z]+$")

_OWN_TMP: Final = re.compile(r"/systemd-private-[^/]+/tmp$")
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class Refusal(NamedTuple):
    """The reason of a refusal, and the next thing to do."""

    reason: str
    hint: str


def refusal(path: str | Path, error: OSError, *, folder: bool = False) -> Refusal | None:
    """Explain why `path` could not be read, or listed if it is a `folder`.

    Returns None if nobody refuses it: it is not there, or something else is wrong. Never raises.
    """
    if not isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
        return None

    real = Path(os.path.realpath(path))
    if place := hiding(str(real), _mounts_of_this_process()):
        return hidden(place, real if folder else real.parent)

    if isinstance(error, PermissionError):
        return _denied(real, folder=folder)
    return None


@contextlib.contextmanager
def advising(advice: Callable[[], str]) -> Iterator[None]:
    """Until the end, this is the hint of each refusal, unless it is empty.

    It is asked for when something is refused.
    """
    token = _advice.set(advice)
    try:
        yield
    finally:
        _advice.reset(token)


def explained(path: str | Path, error: OSError, *, folder: bool = False, hint: str) -> Refusal:
    """As `refusal`; where nobody refuses it, the error's own words and this hint."""
    refused = refusal(path, error, folder=folder)
    if refused is not None:
        return refused
    return Refusal(error.strerror or str(error), hint)


def how_to_join(group: str) -> str:
    """How this user becomes a member of the group; empty for one who is."""
    try:
        if grp.getgrnam(group).gr_gid in {os.getegid(), *os.getgroups()}:
            return ""
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return ""
    return f"`sudo adduser {user} {group}`, then log in again"


def hidden(place: str, folder: Path) -> Refusal:
    """The words for what lies in `folder`, below a `place` that the unit hides."""
    return Refusal(f"{place} is hidden from the service", _how_to_show(place, folder))


def _how_to_show(place: str, folder: Path) -> str:
    if place in HOMES:
        # Below a folder that ProtectHome=yes closes, systemd mounts nothing.
        named = str(folder).replace("%", "%%")
        if re.search(r"\s", named):
            named = f'"{named}"'
        return (
            "`sudo systemctl edit rkcached`: under [Service] write ProtectHome=tmpfs and "
            f"BindReadOnlyPaths={named}, "
            "then `sudo systemctl restart rkcached`"
        )

    if place in ("/tmp", "/var/tmp"):  # noqa: S108 - compared, not used
        return (
            f"the service has a {place} of its own; keep the file elsewhere, for example below "
            "/var/lib"
        )

    return (
        f"take {place} out of the unit's InaccessiblePaths= (`sudo systemctl edit rkcached`), "
        "or keep the file somewhere else"
    )


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo."""

    root: str
    place: str
    kind: str


def mounts_in(text: str) -> list[Mount]:
    """Parse the text of a mountinfo file: see proc(5)."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) > 5 and after:
            root, place = (
                _ESCAPE.sub(lambda found: chr(int(found[1], 8)), field) for field in fields[3:5]
            )
            mounts.append(Mount(root, place, after.split(" ")[0]))

    return mounts


def hiding(path: str, mounts: Sequence[Mount]) -> str:
    """The place that hides `path` (absolute, without links); empty if nothing does."""
    nearest = Mount("/", "/", "")

    for mount in mounts:  # of two on one place, the later one lies on top
        if len(mount.place) >= len(nearest.place) and is_below(path, mount.place):
            nearest = mount
    if _INACCESSIBLE.search(nearest.root) or _OWN_TMP.search(nearest.root):
        return nearest.place

    # ProtectHome=tmpfs puts a tmpfs over each home; one alone may be a machine's own choice.
    emptied = {mount.place for mount in mounts if mount.kind == "tmpfs"}.issuperset(HOMES)
    if emptied and nearest.place in HOMES:
        return nearest.place
    return ""


def is_below(path: str, place: str) -> bool:
    """Whether `path` is `place` or in it."""
    return path == place or path.startswith(place.rstrip("/") + "/")


@functools.cache
def _mounts_of_this_process() -> tuple[Mount, ...]:
    """A unit's sandbox is complete before its process starts, so it is read once."""
    try:
        return tuple(mounts_in(Path("/proc/self/mountinfo").read_text(errors="surrogateescape")))
    except OSError:
        return ()


def _denied(real: Path, *, folder: bool) -> Refusal:
    """Name the first folder on the way whose mode refuses, else the file itself."""
    for parent in reversed(real.parents):
        if not os.access(parent, os.X_OK, effective_ids=True):
            whose = _whose(parent) or "o"
            command = f"{_sudo(whose)}chmod {whose}+x {shlex.quote(str(parent))}"
            hint = _as_a_person(parent) or f"`{command}`"
            return Refusal(f"permission denied by the folder {parent}", hint)

    return Refusal("permission denied", _as_a_person(real) or _how_to_read(real, folder=folder))


def _as_a_person(path: Path) -> str:
    """The hint for somebody who is kept from the service's files; empty for the service."""
    if advice := _advice.get()():
        return advice
    if _whose(path):
        return ""

    # Of the files themselves only these are known to be the service's.
    try:
        group = grp.getgrnam(GROUP).gr_gid
        shared = path.stat().st_gid == group
    except (KeyError, OSError):
        return ""

    if os.getegid() == group or not (shared or is_below(str(path), _CONFIGURATION)):
        return ""
    return how_to_join(GROUP) or "`sudo rkcached check` says what the service sees"


def _how_to_read(real: Path, *, folder: bool) -> str:
    if folder:
        wanted = os.R_OK | os.X_OK
        rights = "rx"
        grant = "g+rx"
    else:
        wanted = os.R_OK
        rights = "r"
        grant = "640"

    if os.access(real, wanted, effective_ids=True):  # perhaps a security module
        return f"let the group {_our_group()} read it"

    name = shlex.quote(str(real))
    if whose := _whose(real):
        return f"`{_sudo(whose)}chmod {whose}+{rights} {name}`"
    return f"`sudo chgrp {_our_group()} {name} && sudo chmod {grant} {name}`"


def _whose(path: Path) -> str:
    """The letter that chmod has for this process: u or g, empty if it is one of the others."""
    try:
        info = path.stat()
    except OSError:
        return ""

    if info.st_uid == os.geteuid():
        return "u"
    if info.st_gid in {os.getegid(), *os.getgroups()}:
        return "g"
    return ""


def _sudo(whose: str) -> str:
    """The prefix of a command that changes a mode: only the owner may, and root."""
    return "" if whose == "u" else "sudo "


def _our_group() -> str:
    group = os.getegid()
    try:
        return grp.getgrgid(group).gr_name
    except KeyError:
        return str(group)
