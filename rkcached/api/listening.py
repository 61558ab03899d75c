"""The sockets and ports that the daemon opens by itself.

A stale socket is replaced; one that a live daemon answers on, and a file that is no socket, are
never touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from rkcached.api.server import HttpServer
from rkcached.errors import SocketError
from rkcached.host.addresses import Address, parse_address
from rkcached.host.logs import log

MAX_PATH_BYTES = 107
"""sockaddr_un has room for 108 bytes, the last of which is zero (unix(7))."""

SOCKET_CHECK_S = 5.0
"""A socket that somebody deleted is back after this time."""

SOCKET_MODE = 0o660

ADMIN_MODE = 0o600


OPTIONS = {
    SOCKET_MODE: "--socket or RKCACHED_SOCKET",
    ADMIN_MODE: "--admin-socket or RKCACHED_ADMIN_SOCKET",
}
"""By the mode of a socket: how its path is named."""


def open_socket(path: Path, mode: int = SOCKET_MODE) -> socket.socket:
    """Listen on a Unix socket at `path`. Errors: SocketError with the next step."""
    option = OPTIONS[mode]
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise SocketError(
            f"the socket path has {length} bytes, the system allows {MAX_PATH_BYTES}: {path}",
            hint=f"name a shorter one with {option}",
        )
    try:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        _clear_stale(path, option)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(128)
    except OSError as error:
        raise SocketError(
            f"cannot listen on {path}: {error.strerror}",
            hint=f"choose another path with {option}",
        ) from error
    listener.setblocking(False)
    return listener


def open_port(text: str) -> socket.socket:
    """Listen on HOST:PORT over TCP. Errors: SettingsError, SocketError with the next step."""
    address = parse_address(text)
    family = socket.AF_INET6 if address.host.version == 6 else socket.AF_INET
    try:
        return _listening(family, address)
    except OSError as error:
        why = error.strerror
        raise SocketError(
            f"cannot listen on {address}: {why}", hint=_port_hint(error, address)
        ) from error


def _listening(family: socket.AddressFamily, address: Address) -> socket.socket:
    """Errors: OSError."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((str(address.host), address.port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _port_hint(error: OSError, address: Address) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"stop the program that has this port, `ss -ltnp sport = {address.port}` "
                "shows it, or choose another port"
            )
        case errno.EACCES:
            return "ports below 1024 are root's: choose a higher one"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address: `ip addr` lists its own"
        case errno.EAFNOSUPPORT | errno.EPERM:
            return "the service opens no port itself: use `sudo rkcached port enable ADDRESS`"
        case _:
            return "choose another address with --listen"


def remove_socket(path: Path, inode: int) -> None:
    """Remove our socket, but not another one that has taken its path."""
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


class OwnSocket:
    """A socket of ours in the file system, which others may delete. Errors: SocketError."""

    def __init__(self, path: Path, mode: int) -> None:
        self._path = path
        self._mode = mode
        self._last_error = ""
        self._open()

    def _open(self) -> None:
        self.listener = open_socket(self._path, self._mode)
        self._inode = self._path.lstat().st_ino

    def close(self) -> None:
        self.listener.close()
        remove_socket(self._path, self._inode)

    async def keep(self, server: HttpServer) -> None:
        """Open it again whenever it is gone, for as long as the daemon runs."""
        while True:
            await asyncio.sleep(SOCKET_CHECK_S)
            try:
                if self._path.lstat().st_ino == self._inode:
                    continue
            except FileNotFoundError:
                pass
            except OSError:
                continue
            try:
                self._open()
            except SocketError as error:  # taken, or no directory: logged once, tried again
                if error.message != self._last_error:
                    log.error("socket lost", socket=str(self._path), error=error.message)
                self._last_error = error.message
                continue

            self._last_error = ""
            log.warning("socket made again", socket=str(self._path), reason="it was deleted")
            await server.listen(self.listener)


def _clear_stale(path: Path, option: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketError(
            f"{path} exists and is not a socket",
            hint=f"remove that file, or choose another path with {option}",
        )

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # nobody listens: left behind by a daemon that was killed
            return
        except FileNotFoundError:
            return
        except TimeoutError:
            pass
    raise SocketError(
        f"another daemon listens on {path}",
        hint=f"stop it, or choose another path with {option}",
    )
