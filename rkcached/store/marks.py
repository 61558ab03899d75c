"""Which folder is a store, and which names in it are the store's own.

A store has the file CACHEDIR.TAG, as the Cache Directory Tagging standard has it (backups skip such
folders), with a line that says whose it is: other programs tag their folders, too. Earlier versions
wrote no tag; what they left is known by its names and its sidecars. Any other folder that is not
empty belongs to somebody else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from rkcached.host import beneath, disk
from rkcached.sources.problems import NAME
from rkcached.sources.records import Key
from rkcached.store.scan import CACHE_SUFFIXES, prompt_of, read_sidecar
from rkcached.store.sidecar import Sidecar

LOCK, DIGESTS, TAG = ".lock", ".digests.json", "CACHEDIR.TAG"
VERDICTS, QUARANTINE, RETIRED = ".verdicts", ".quarantine", ".retired"
CONVERSATIONS = ".conversations"

OWN_FILES = frozenset({LOCK, DIGESTS, TAG, "README.md", ".gitignore"})
"""At the top of a store; the last two come with a checkout."""

OWN_FOLDERS = frozenset({VERDICTS, QUARANTINE, RETIRED, CONVERSATIONS})
"""At the top of a store, beside the models' folders."""

OF_THE_DISK = frozenset({"lost+found"})
"""At the top of a file system of its own."""

# A folder with these alone counts as empty.
_LEAVES_EMPTY = frozenset({"README.md", ".gitignore"}) | OF_THE_DISK

_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"
_OURS = b"created by rkcached"
_TAG_TEXT = b"""\
%b
# This file is a cache directory tag %b.
# It marks a store of prompt caches, which are built again when they are missing: backups may
# skip this folder.
# For information about cache directory tags see https://bford.info/cachedir/
""" % (_SIGNATURE, _OURS)

_TEMPORARY = re.compile(r"\.(digests\.json|CACHEDIR\.TAG-[0-9a-f]+)\.tmp")
ASIDE = ".aside-"
"""A folder of the quarantine that begins so holds what others put where a file of ours goes: it
stays."""

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_VERDICT = re.compile(rf"{NAME.pattern}\.json|\.{NAME.pattern}\.json\.tmp")
_QUARANTINED = re.compile(rf"{NAME.pattern}--{NAME.pattern}--[0-9a-f]+")


def is_own(name: str) -> bool:
    """Whether the store itself gives this name to something at its top.

    Models' folders are not meant.
    """
    return name in OWN_FILES or name in OWN_FOLDERS or name in OF_THE_DISK or is_temporary(name)


def is_temporary(name: str) -> bool:
    """Whether the store writes a file of its top under this name first."""
    return _TEMPORARY.fullmatch(name) is not None


def is_quarantined(name: str) -> bool:
    """Whether the store names a folder of its quarantine so."""
    return _QUARANTINED.fullmatch(name) is not None


def is_retired(name: str) -> bool:
    """Whether the store names the folder of a retired artifact so: by its fingerprint."""
    return _FINGERPRINT.fullmatch(name) is not None


def is_verdict(name: str) -> bool:
    """Whether the store names a verdict so, or one that it has not finished writing."""
    return _VERDICT.fullmatch(name) is not None


def why_no_store(root: Path) -> str:
    """Why this folder is no store: a sentence; nothing if it is one. Errors: OSError."""
    try:
        names = os.listdir(root)  # noqa: PTH208 - names
    except FileNotFoundError:
        return "it does not exist"
    except NotADirectoryError:
        return "it is not a folder"

    if _is_tagged(root):
        return ""
    theirs = [name for name in names if name not in _LEAVES_EMPTY]
    if not theirs:
        return "it is empty"
    return _who_else(theirs, root)


def why_not_ours(root: Path) -> str:
    """Why no store may be made of this folder: a sentence; nothing if one may, or is there.

    Errors: OSError.
    """
    if _is_tagged(root):
        return ""
    names = os.listdir(root)  # noqa: PTH208 - names
    return _who_else([name for name in names if name not in _LEAVES_EMPTY], root)


def _who_else(names: list[str], root: Path) -> str:
    """Which of the things in a folder without a tag cannot be a store's: a sentence.

    Errors: OSError.
    """
    locked = LOCK in names
    strangers = sorted(name for name in names if not _is_left_by_earlier(root, name, locked=locked))
    if not strangers:
        return ""
    if strangers == [TAG]:
        return f"its {TAG} is that of another program, whose cache it is"
    more = f" and {len(strangers) - 1:,} more" if len(strangers) > 1 else ""
    return f"it contains {strangers[0]!r}{more}, but not the {TAG} that marks a store"


def tag(root: Path) -> None:
    """Mark a store. Nothing happens if it is marked, or if its disk takes no more."""
    if _is_tagged(root):
        return
    temporary = root / f".{TAG}-{secrets.token_hex(4)}.tmp"

    with contextlib.suppress(OSError):  # the next start tries it again
        try:
            disk.write_new(temporary, _TAG_TEXT)
            if os.geteuid() == 0:  # by root's gc, and the daemon's user must read it
                owner = root.stat()
                os.chown(temporary, owner.st_uid, owner.st_gid)

            temporary.replace(root / TAG)
        finally:
            temporary.unlink(missing_ok=True)


def _is_tagged(root: Path) -> bool:
    """A link is no tag, nor is the tag of another program.

    Errors: OSError when it cannot be read.
    """
    try:
        fd = os.open(root / TAG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return False
        raise

    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        text = os.pread(fd, 4096, 0)
    finally:
        os.close(fd)

    return text.startswith(_SIGNATURE) and _OURS in text


def _is_left_by_earlier(root: Path, name: str, *, locked: bool) -> bool:
    """Whether an earlier version, which wrote no tag, may have made this of a store.

    Errors: OSError.
    """
    if name == TAG:  # somebody else's
        return False
    path = root / name
    if name in OWN_FOLDERS:
        return not path.is_symlink()
    if is_own(name):
        return not path.is_dir()
    if not NAME.fullmatch(name) or not beneath.is_folder(path):
        return False
    inside = os.listdir(path)  # noqa: PTH208 - names
    if locked and (
        not inside or any(prompt_of(file) and file.endswith(CACHE_SUFFIXES) for file in inside)
    ):
        return True

    return any(_sidecars(path, inside))


def _sidecars(folder: Path, names: list[str]) -> Iterator[Sidecar]:
    for name in names:
        if name.endswith(".json") and (prompt := prompt_of(name)):
            with contextlib.suppress(FileNotFoundError):
                sidecar = read_sidecar(folder / name, Key(folder.name, prompt))
                if isinstance(sidecar, Sidecar):
                    yield sidecar
