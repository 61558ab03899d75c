"""Takes from a process what it does not need, so that foreign code in it gets no further.

A worker runs a vendor's library on files from strangers. It has no capabilities (capabilities(7))
and gets none by any program (prctl(2), PR_SET_NO_NEW_PRIVS), cannot be looked into
(PR_SET_DUMPABLE), and a filter (seccomp(2)) refuses the system calls by which it would start
programs and processes, trace or signal other ones, open sockets other than Unix ones, or use parts
of the kernel that no engine needs. It holds for all threads. Files are closed to it by `landlock`;
where the kernel lacks that, it can open what the user can, also in /proc the memory of processes of
the same user that have not closed it (`undumpable`).

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
_PR_SET_NO_NEW_PRIVS = 38
# seccomp(2): SECCOMP_SET_MODE_FILTER, SECCOMP_GET_ACTION_AVAIL; SECCOMP_FILTER_FLAG_TSYNC.
_SET_MODE_FILTER, _GET_ACTION, _ALL_THREADS = 1, 2, 1

# linux/capability.h: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
_CAPABILITIES_VERSION = 0x20080522
_CAP_FILES = 1 << 1 | 1 << 2

# Instructions of classic BPF (linux/filter.h), and the fields of struct seccomp_data.
_LOAD, _EQUAL, _LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_CALL, _ARCH, _ARGUMENT = 0, 4, 16
_ALLOW = 0x7FFF0000
_FAIL = 0x00050000  # with the number of an error
_X32 = 0x40000000  # x86_64 has a second table of calls from here on
_FIRST_UNKNOWN = 463  # from setxattrat on (Linux 6.13), the same on all architectures
_CLONE_NEWUSER, _CLONE_THREAD = 0x10000000, 0x00010000
_AF_UNIX = 1

# The kernel signals the owner of a descriptor when that can be read: F_SETOWN, F_SETSIG,
# F_SETOWN_EX; FIOSETOWN, SIOCSPGRP.
_F_OWNERS = (8, 10, 15)
_FIO_OWNERS = (0x8901, 0x8902)


@dataclass(frozen=True, slots=True)
class _Table:
    arch: int
    """AUDIT_ARCH_..., linux/audit.h."""
    seccomp: int
    socket: int
    connect: int
    clone: int
    clone3: int
    fcntl: int
    ioctl: int
    setpriority: int
    prlimit: int
    signals: tuple[int, ...]
    """Calls that signal a process, which is their first argument."""
    refused: tuple[int, ...]


# ptrace, process_vm_readv, process_vm_writev, kcmp, pidfd_getfd, pidfd_send_signal; execve,
# execveat, fork, vfork; io_uring_setup, _enter, _register; bpf, perf_event_open, userfaultfd;
# add_key, request_key, keyctl; mount, umount2, pivot_root, chroot, setns, unshare; init_module,
# finit_module, delete_module, kexec_load; open_by_handle_at; reboot. Landlock has no rules, or only
# late ones, of these: what changes modes, owners and attributes of files; what changes their times,
# inotify_init, fanotify_init, truncate. These act on other processes: sched_setparam,
# sched_setscheduler, sched_setattr, ioprio_set, migrate_pages, move_pages, process_madvise,
# process_mrelease. Shared memory, semaphores and queues of System V, and queues of messages, belong
# to a user and outlive a process.
_TABLES = {
    "x86_64": _Table(
        arch=0xC000003E,
        seccomp=317,
        socket=41,
        connect=42,
        clone=56,
        clone3=435,
        fcntl=72,
        ioctl=16,
        setpriority=141,
        prlimit=302,
        signals=(62, 200, 234, 129, 297),
        refused=(
            *(101, 310, 311, 312, 438, 424),
            *(59, 322, 57, 58),
            *(425, 426, 427),
            *(321, 298, 323),
            *(248, 249, 250),
            *(165, 166, 155, 161, 308, 272),
            *(175, 313, 176, 246),
            *(304, 169),
            *(90, 91, 268, 452, 92, 93, 94, 260, 188, 189, 190, 197, 198, 199),
            *(132, 235, 261, 280, 253, 294, 300, 76),
            *(142, 144, 314, 251, 256, 279, 440, 448),
            *(29, 30, 31, 67, 64, 65, 66, 220, 68, 69, 70, 71),
            *(240, 241, 242, 243, 244, 245),
        ),
    ),
    "aarch64": _Table(
        arch=0xC00000B7,
        seccomp=277,
        socket=198,
        connect=203,
        clone=220,
        clone3=435,
        fcntl=25,
        ioctl=29,
        setpriority=140,
        prlimit=261,
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
            *(52, 53, 452, 54, 55, 5, 6, 7, 14, 15, 16),
            *(88, 26, 262, 45),
            *(118, 119, 274, 30, 238, 239, 440, 448),
            *(194, 195, 196, 197, 190, 191, 192, 193, 186, 187, 188, 189),
            *(180, 181, 182, 183, 184, 185),
        ),
    ),
}


def undumpable() -> None:
    """From now on, no other process of this user can look into this one, nor trace it."""
    _prctl(_PR_SET_DUMPABLE, 0)


def has_filters() -> bool:
    """Whether the kernel filters system calls, and `confine` knows those of this machine."""
    table = _TABLES.get(platform.machine())
    if table is None:
        return False
    action = ctypes.byref(ctypes.c_uint32(_FAIL))
    return not ctypes.CDLL(None).syscall(table.seccomp, _GET_ACTION, 0, action)


def confine(*, with_sockets: bool = True) -> str:
    """Take away, for good, what a worker does not need; returns what the kernel lacks for that.

    `with_sockets`: it may connect to Unix sockets, as llama.cpp does to its own.
    Capabilities are those of a thread: it must be the only one.
    """
    undumpable()
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _drop_capabilities()
    table = _TABLES.get(platform.machine())
    if table is None:
        return f"no table of system calls for {platform.machine()}"

    program = _program(table, with_sockets=with_sockets)
    code = ctypes.create_string_buffer(b"".join(program))
    described = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(table.seccomp, _SET_MODE_FILTER, _ALL_THREADS, ctypes.c_char_p(described)):
        return f"the kernel takes no filter of system calls: {os.strerror(ctypes.get_errno())}"
    return ""


def _drop_capabilities() -> None:
    """Of a process that root started: it keeps the right to open the files of other users."""
    libc = ctypes.CDLL(None)
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    held = ctypes.create_string_buffer(24)
    libc.capget(header, held)
    _, permitted, *_ = struct.unpack("=6I", held.raw)
    kept = permitted & _CAP_FILES
    libc.capset(header, struct.pack("=6I", kept, kept, 0, 0, 0, 0))


def _program(table: _Table, *, with_sockets: bool) -> list[bytes]:
    program = [
        _instruction(_LOAD, _ARCH),
        _instruction(_EQUAL, table.arch, 1, 0),
        _refuse(errno.EPERM),
        _instruction(_LOAD, _CALL),
    ]
    if table.arch == _TABLES["x86_64"].arch:
        program += [_instruction(_LEAST, _X32, 0, 1), _refuse(errno.EPERM)]

    # Nobody knows what a later kernel lets a process do; a C library that is told so does without.
    program += [_instruction(_LEAST, _FIRST_UNKNOWN, 0, 1), _refuse(errno.ENOSYS)]
    # So does one with clone instead.
    program += [_instruction(_EQUAL, table.clone3, 0, 1), _refuse(errno.ENOSYS)]
    refused = table.refused if with_sockets else (*table.refused, table.connect, table.socket)
    for call in refused:
        program += [_instruction(_EQUAL, call, 0, 1), _refuse(errno.EPERM)]

    own = (0, os.getpid())
    program += _allow_only(table.socket, 0, _AF_UNIX)
    for call in table.signals:
        program += _allow_only(call, 0, os.getpid())
    program += _allow_only(table.prlimit, 0, *own)
    program += _allow_only(table.setpriority, 1, *own)
    program += [
        _instruction(_EQUAL, table.clone, 0, 5),
        _instruction(_LOAD, _ARGUMENT),
        _instruction(_ANY_BIT, _CLONE_NEWUSER, 1, 0),
        _instruction(_ANY_BIT, _CLONE_THREAD, 1, 0),
        _refuse(errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    for call, operations in ((table.fcntl, _F_OWNERS), (table.ioctl, _FIO_OWNERS)):
        program += [
            _instruction(_EQUAL, call, 0, 2 + 2 * len(operations)),
            _instruction(_LOAD, _ARGUMENT + 8),
        ]
        for operation in operations:
            program += [_instruction(_EQUAL, operation, 0, 1), _refuse(errno.EPERM)]
        program.append(_instruction(_RETURN, _ALLOW))
    return [*program, _instruction(_RETURN, _ALLOW)]


def _allow_only(call: int, argument: int, *values: int) -> list[bytes]:
    """Refuse a call whose argument, counted from 0, has none of these values."""
    program = [
        _instruction(_EQUAL, call, 0, 2 + 2 * len(values)),
        _instruction(_LOAD, _ARGUMENT + 8 * argument),
    ]
    for value in values:
        program += [_instruction(_EQUAL, value, 0, 1), _instruction(_RETURN, _ALLOW)]
    return [*program, _refuse(errno.EPERM)]


def _instruction(code: int, value: int, if_so: int = 0, if_not: int = 0) -> bytes:
    """`if_so`, `if_not`: so many instructions are jumped over then."""
    return struct.pack("HBBI", code, if_so, if_not, value)


def _refuse(error: int) -> bytes:
    return _instruction(_RETURN, _FAIL | error)


def _prctl(option: int, value: int) -> None:
    zero = ctypes.c_ulong(0)
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), zero, zero, zero)
