"""Talks to systemd: readiness, status and watchdog out, sockets in.

Started by anybody else, everything here does nothing. Facts: sd_notify(3), sd_listen_fds(3),
sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdnotify import SystemdNotifier

if TYPE_CHECKING:
    import asyncio

# SD_LISTEN_FDS_START.
_FIRST_FD = 3

# Time that each sign of life asks for while systemd waits for us: far more than until the next one.
_EXTENSION_S = 60.0

_MORE_TIME = f"EXTEND_TIMEOUT_USEC={int(_EXTENSION_S * 1e6)}"

# Imports of a start report this often that they get on.
_IMPORT_PULSE_S = 5.0

# To stop a build and to end every worker, also one that hangs.
_STOP_S = 6.0

_RETRY_S = 0.1

# Signs of life during a start or a reload when the unit has no watchdog.
_UNWATCHED_PULSE_S = 10.0


class Service:
    """Our side of the notification socket, and the watchdog behind it."""

    def __init__(self) -> None:
        self._notified = bool(os.environ.get("NOTIFY_SOCKET"))
        self._notifier: SystemdNotifier | None = None
        self._watchdog_s: float | None = None
        # What systemd has not taken yet, by name. Its socket holds some ten messages.
        self._unsent: dict[str, str] = {}
        self._retry: asyncio.TimerHandle | None = None
        if self._notified:
            self._notifier = SystemdNotifier()
            self._watchdog_s = _watchdog_s()
            if self._notifier.socket is not None:
                self._notifier.debug = True  # from now on it raises what it would swallow
                self._notifier.socket.setblocking(False)

        self._status = ""
        # systemd waits for us to become ready, with a time limit.
        self._awaited = True

    @property
    def notified(self) -> bool:
        return self._notified

    @property
    def pulse_s(self) -> float | None:
        """The interval of `beat` in seconds; None for never."""
        if self._watchdog_s is not None:
            return self._watchdog_s / 2
        if self._notified and self._awaited:
            return _UNWATCHED_PULSE_S
        return None

    def beat(self) -> None:
        """Report that the caller is alive and gets on with its work.

        Only the reconcile loop may call it.
        """
        states = []
        if self._watchdog_s is not None:
            states.append("WATCHDOG=1")
        if self._awaited:
            states.append(_MORE_TIME)

        self._notify(*states)

    def ask_for_time(self) -> None:
        """Report that a start gets on, before there is a reconcile loop that could.

        It imports nothing, as imports call it. What systemd does not take now is not sent later:
        the next import asks again.
        """
        with contextlib.suppress(OSError):
            self._transmit(_MORE_TIME)

    def ready(self) -> None:
        self._awaited = False
        for name in ("RELOADING", "MONOTONIC_USEC"):  # it is over before systemd heard of it
            self._unsent.pop(name, None)
        self._notify("READY=1")

    def reloading(self) -> None:
        """Report a reload. `ready` has to follow."""
        self._awaited = True
        self._notify(
            "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
        )

    def stopping(self, *, grace_s: float) -> None:
        """Report the stop. It takes a moment longer than `grace_s`, in which answers may end."""
        self._notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int((grace_s + _STOP_S) * 1e6)}")

    def status(self, text: str) -> None:
        """Send the line that `systemctl status` shows, if it changed."""
        line = " ".join(text.split())
        if line != self._status:
            self._status = line
            self._notify(f"STATUS={line}")

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        if self._notifier is not None and self._notifier.socket is not None:
            self._notifier.socket.close()

    def _notify(self, *assignments: str) -> None:
        """Send these, or later if systemd is behind: the event loop does not wait for it."""
        for assignment in assignments:
            name = assignment.partition("=")[0]
            self._unsent.pop(name, None)
            self._unsent[name] = assignment
        if self._retry is None:
            self._send()

    def _send(self) -> None:
        self._retry = None
        if not self._unsent:
            return
        try:
            self._transmit(*self._unsent.values())
        except BlockingIOError:
            import asyncio  # noqa: PLC0415 - a start asks for time before its imports

            with contextlib.suppress(RuntimeError):  # without a loop, with the next message
                self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self._send)
            return
        except OSError:
            pass  # there is no systemd any more
        self._unsent.clear()

    def _transmit(self, *assignments: str) -> None:
        """Send one message now. Errors: OSError; BlockingIOError if systemd's queue is full."""
        if self._notifier is None or self._notifier.socket is None:
            return
        # The package encodes as Latin-1, but systemd reads UTF-8. So it is given the letters that
        # become our bytes.
        text = "\n".join(assignments)
        self._notifier.notify(text.encode(errors="replace").decode("latin-1"))


@contextlib.contextmanager
def asking_for_time() -> Iterator[None]:
    """Have systemd wait for the imports of this block, as long as they get on.

    They take half a second on a PC, but minutes on an emulated machine.
    """
    service = Service()
    if not service.notified:
        yield
        return

    service.ask_for_time()
    pulse = _ImportPulse(service)
    sys.meta_path.insert(0, pulse)
    try:
        yield
    finally:
        sys.meta_path.remove(pulse)
        service.close()


class _ImportPulse:
    """A finder of modules that finds none: it is asked before each import.

    An import that hangs begins no other, so nobody asks for more time, and systemd ends the start.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._next = time.monotonic() + _IMPORT_PULSE_S

    def find_spec(self, _name: str, _path: object = None, _target: object = None) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _IMPORT_PULSE_S
            self._service.ask_for_time()


def listen_fds() -> dict[str, list[socket.socket]]:
    """The sockets that systemd opened for this process, by FileDescriptorName. Call it once.

    One name may have several sockets: each ListenStream of a unit opens its own.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}

    count = int(os.environ.get("LISTEN_FDS", "0"))
    names = list(filter(None, os.environ.get("LISTEN_FDNAMES", "").split(":")))
    names += ["unknown"] * (count - len(names))  # as sd_listen_fds_with_names(3) calls them
    sockets: dict[str, list[socket.socket]] = {}

    for fd, name in zip(range(_FIRST_FD, _FIRST_FD + count), names, strict=False):
        os.set_inheritable(fd, False)
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            passed = socket.socket(fileno=fd)
            passed.setblocking(False)
            sockets.setdefault(name, []).append(passed)

    return sockets


def is_journal(fd: int) -> bool:
    """Whether this descriptor is the journal's stream that systemd opened (JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        info = os.fstat(fd)
        return os.environ.get("JOURNAL_STREAM") == f"{info.st_dev}:{info.st_ino}"
    return False


def _watchdog_s() -> float | None:
    if os.environ.get("WATCHDOG_PID") not in (None, str(os.getpid())):
        return None
    with contextlib.suppress(ValueError):
        return int(os.environ.get("WATCHDOG_USEC", "")) / 1e6
    return None
