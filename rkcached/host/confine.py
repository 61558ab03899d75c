"""Takes from a process what it does not need, so that foreign code in it gets no further.

A worker runs a vendor's library on files from strangers. It gets no privileges by any program
(prctl(2), PR_SET_NO_NEW_PRIVS), cannot be looked into (PR_SET_DUMPABLE), and a filter (seccomp(2))
refuses the system calls by which it would start programs, reach into or signal other processes,
open sockets other than Unix ones, or use parts of the kernel that no engine needs. Other processes
of the same user are out of its reach that way; files are not: it can open what the user can.

The numbers of system calls are the kernel's (asm/unistd.h of x86_64 and of aarch64, which has the
generic table); they never change.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_MODE_FILTER = 2

# Instructions of classic BPF (linux/filter.h), and the fields of struct seccomp_data.
_LOAD, _EQUAL, _LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CALL, _ARCH, _ARGUMENT = 0, 4, 16
_ALLOW = 0x7FFF0000
_FAIL = 0x00050000  # with the number of an error
_X32 = 0x40000000  # x86_64 has a second table of calls from here on
_CLONE_NEWUSER = 0x10000000
_AF_UNIX = 1


@dataclass(frozen=True, slots=True)
class _Table:
    arch: int
    """AUDIT_ARCH_..., linux/audit.h."""
    socket: int
    clone: int
    clone3: int
    signals: tuple[int, ...]
    """Calls that signal a process, which is their first argument."""
    refused: tuple[int, ...]


# ptrace, process_vm_readv, process_vm_writev, kcmp, pidfd_getfd, pidfd_send_signal; execve,
# execveat; io_uring_setup, _enter, _register; bpf, perf_event_open, userfaultfd; add_key,
# request_key, keyctl; mount, umount2, pivot_root, chroot, setns, unshare; init_module,
# finit_module, delete_module, kexec_load; open_by_handle_at; reboot.
_TABLES = {
    "x86_64": _Table(
        arch=0xC000003E,
        socket=41,
        clone=56,
        clone3=435,
        signals=(62, 200, 234, 129, 297),
        refused=(
            *(101, 310, 311, 312, 438, 424),
            *(59, 322),
            *(425, 426, 427),
            *(321, 298, 323),
            *(248, 249, 250),
            *(165, 166, 155, 161, 308, 272),
            *(175, 313, 176, 246),
            *(304, 169),
        ),
    ),
    "aarch64": _Table(
        arch=0xC00000B7,
        socket=198,
        clone=220,
        clone3=435,
        signals=(129, 130, 131, 138, 240),
        refused=(
            *(117, 270, 271, 272, 438, 424),
            *(221, 281),
            *(425, 426, 427),
            *(280, 241, 282),
            *(217, 218, 219),
            *(40, 39, 41, 51, 268, 97),
            *(105, 273, 106, 104),
            *(265, 142),
        ),
    ),
}


def undumpable() -> None:
    """From now on, no other process of this user can look into this one, nor trace it."""
    _prctl(_PR_SET_DUMPABLE, 0)


def confine() -> str:
    """Take away, for good, what a worker does not need; returns what the kernel lacks for that."""
    undumpable()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    table = _TABLES.get(platform.machine())
    if table is None:
        return f"no table of system calls for {platform.machine()}"

    program = _program(table)
    code = ctypes.create_string_buffer(b"".join(program))
    described = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    if _prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.c_char_p(described)):
        return f"the kernel takes no filter of system calls: {os.strerror(ctypes.get_errno())}"
    return ""


def _program(table: _Table) -> list[bytes]:
    program = [
        _instruction(_LOAD, _ARCH),
        _instruction(_EQUAL, table.arch, 1, 0),
        _refuse(errno.EPERM),
        _instruction(_LOAD, _CALL),
    ]
    if table.arch == _TABLES["x86_64"].arch:
        program += [_instruction(_LEAST, _X32, 0, 1), _refuse(errno.EPERM)]

    # A C library that is told so uses clone.
    program += [_instruction(_EQUAL, table.clone3, 0, 1), _refuse(errno.ENOSYS)]
    for call in table.refused:
        program += [_instruction(_EQUAL, call, 0, 1), _refuse(errno.EPERM)]

    for calls, test, value, is_allowed in (
        ((table.socket,), _EQUAL, _AF_UNIX, True),
        ((table.clone,), _ANY_BIT, _CLONE_NEWUSER, False),
        (table.signals, _EQUAL, os.getpid(), True),
    ):
        for call in calls:
            program += [
                _instruction(_EQUAL, call, 0, 4),
                _instruction(_LOAD, _ARGUMENT),
                _instruction(test, value, int(not is_allowed), int(is_allowed)),
                _instruction(_RETURN, _ALLOW),
                _refuse(errno.EPERM),
            ]
    return [*program, _instruction(_RETURN, _ALLOW)]


def _instruction(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    """`if_so`, `if_not`: so many instructions are jumped over then."""
    return struct.pack("HBBI", code, if_so, if_not, value)


def _refuse(error: int) -> bytes:
    return _instruction(_RETURN, _FAIL | error)


def _prctl(option: int, first: int, second: object = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    third = second if isinstance(second, ctypes.c_char_p) else zero
    return int(libc.prctl(option, ctypes.c_ulong(first), third, zero, zero))
