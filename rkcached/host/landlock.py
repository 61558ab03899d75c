"""Closes all files to a process but those that it is to work with (Landlock, landlock(7)).

The kernel takes rules of what may be done beneath which folder, and refuses everything else: to
open, make, rename and remove files, and from later versions on to send signals to processes outside
and to use their sockets without a name. It has no rules for the sockets that have one, and for what
was open before. Linux has it since 5.13, where it is switched on; what an older version cannot
refuse stays allowed.

The numbers are the kernel's (linux/landlock.h), the same for all architectures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION_FLAG = 1
_BENEATH_PATH = 1

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE = 1 << 4, 1 << 5
_MAKE_REGULAR, _MAKE_SOCKET, _MAKE_LINK = 1 << 8, 1 << 9, 1 << 12
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15

# What each version of the interface knows of files: so many bits from the lowest on.
_FILE_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_TCP = 0b11  # to bind and to connect, from version 4 on
_OUTSIDE = 0b11  # sockets without a name, and signals, from version 6 on

_READ = _READ_FILE | _READ_DIR
_FILL = _READ | _WRITE_FILE | _TRUNCATE | _MAKE_REGULAR | _REMOVE_FILE
_OWN = _FILL | _MAKE_SOCKET | _MAKE_LINK | _REMOVE_DIR
_DEVICE = _READ_FILE | _WRITE_FILE | _IOCTL
# The others say something of what is in a folder.
_OF_A_FILE = _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL

SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/proc", "/sys")
"""Code, and what a C library and an engine ask the system. Of the memory in /proc, a process that
is restricted so sees only its own."""

_SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero")


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """Absolute paths that stay open, beside those of the system and of this program."""

    read: tuple[str, ...] = ()
    """Files and folders."""
    fill: tuple[str, ...] = ()
    """Folders in which regular files may be made, written and removed."""
    own: tuple[str, ...] = ()
    """Folders in which sockets and links may be made, too."""
    devices: tuple[str, ...] = ()
    """Device nodes, or folders of them: to be read, written and controlled."""


def version() -> int:
    """The version of the kernel's interface; 0 if it has none, or it is switched off."""
    return max(0, _call(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG)))


def restrict(reach: Reach) -> str:
    """Close everything else, for good, to this thread and those that it starts.

    Paths that do not exist are left out. Returns why the kernel does not do it; empty if it does.
    It needs PR_SET_NO_NEW_PRIVS.
    """
    known = version()
    if not known:
        return "the kernel has no Landlock, or it is switched off"
    handled = (1 << _FILE_BITS[min(known, max(_FILE_BITS))]) - 1
    attributes = [handled]
    if known >= 4:
        attributes.append(_TCP)
    if known >= 6:
        attributes.append(_OUTSIDE)
    packed = struct.pack(f"={len(attributes)}Q", *attributes)
    ruleset = _call(_CREATE, packed, ctypes.c_size_t(len(packed)), ctypes.c_uint(0))
    if ruleset < 0:
        return f"the kernel takes no rules of files: {os.strerror(ctypes.get_errno())}"

    try:
        for rights, paths in (
            (_READ, (*SYSTEM, *_SYSTEM_FILES, *_code(), *reach.read)),
            (_DEVICE, ("/dev/null", *reach.devices)),
            (_FILL, reach.fill),
            (_OWN, reach.own),
        ):
            for path in paths:
                _allow(ruleset, path, rights & handled)
        if _call(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint(0)) < 0:
            return f"the kernel takes no rules of files: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(ruleset)
    return ""


def _code() -> Iterable[str]:
    """The folders of this program, the interpreter and its modules, and the dynamic linker."""
    package = Path(__file__).parents[1]
    # What else lies beside a checkout of ours is nobody's business; beside an installed package lie
    # those that it needs.
    around = str(package.parent)
    paths = [path for path in sys.path if path != around or any(package.parent.glob("*.dist-info"))]
    linked = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    places = (str(package), sys.prefix, sys.base_prefix, sys.exec_prefix, *paths, *linked)
    return {place for place in places if place.startswith(os.sep)}


def _allow(ruleset: int, path: str, rights: int) -> None:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= _OF_A_FILE
            rule = struct.pack("=Qi", rights, fd)
            _call(
                _ADD_RULE,
                ctypes.c_int(ruleset),
                ctypes.c_int(_BENEATH_PATH),
                rule,
                ctypes.c_uint(0),
            )
        finally:
            os.close(fd)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result: int = libc.syscall(ctypes.c_long(number), *arguments)
    return result
