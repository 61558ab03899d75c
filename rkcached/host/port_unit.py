"""The drop-ins by which systemd opens a TCP port for the service.

The service itself cannot: its sandbox has no network. systemd listens, as for the Unix sockets,
and passes the port on. `port.conf` of `rkcached.socket` names the addresses; that of
`rkcached.service` says whether the loopback is open without a key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import re
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, NamedTuple

from rkcached.errors import NotPermitted, SocketError
from rkcached.host.addresses import Address

SOCKET_UNIT: Final = "rkcached.socket"
SERVICE_UNIT: Final = "rkcached.service"
BRIDGES: Final = ("docker0", "podman0", "cni-podman0")
"""The networks that Docker and Podman give to containers by default."""

_FOLDER = Path("etc/systemd/system")
_HEAD = "# Written by `rkcached port enable`; `rkcached port disable` removes it.\n"
_SIOCGIFADDR = 0x8915
_ANSWER_S = 90.0


class _Failed(Exception):
    """systemctl failed, for this reason."""


class Files(NamedTuple):
    """The contents of the drop-ins; None for one that is not to be there."""

    socket: str | None
    service: str | None


def files_for(addresses: Iterable[Address], *, open_loopback: bool) -> Files:
    """The drop-ins that open these addresses.

    FreeBind= lets the socket be opened before its address is there, as Docker's is at boot.
    """
    addresses = tuple(addresses)
    lines = [f"ListenStream={address}\n" for address in addresses]
    if not all(address.host.is_loopback for address in addresses):
        lines.append("FreeBind=yes\n")

    service = None
    if open_loopback:
        service = f"{_HEAD}[Service]\nEnvironment=RKCACHED_OPEN_LOOPBACK=1\n"
    return Files(f"{_HEAD}[Socket]\n{''.join(lines)}", service)


def _systemctl(*words: str) -> None:
    """Errors: _Failed."""
    command = ["systemctl", *words]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=True)
    except subprocess.CalledProcessError as error:
        raise _Failed(" ".join(error.stderr.split())) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise _Failed(str(error)) from error


class PortUnit:
    """The drop-ins below a root folder."""

    def __init__(self, root: Path = Path("/"), systemctl: Callable[..., None] = _systemctl) -> None:
        self._socket = root / _FOLDER / f"{SOCKET_UNIT}.d" / "port.conf"
        self._service = root / _FOLDER / f"{SERVICE_UNIT}.d" / "port.conf"
        self._systemctl = systemctl

    @property
    def opened(self) -> tuple[str, ...]:
        """The addresses that the drop-in opens now, as it has them."""
        text = _read(self._socket) or ""
        return tuple(re.findall(r"^ListenStream=(.+)$", text, re.MULTILINE))

    def enable(self, addresses: Sequence[Address], *, open_loopback: bool) -> bool:
        """Open these addresses instead of those before. Returns whether that changed something.

        Errors: NotPermitted, SocketError; then everything is as it was.
        """
        for address in addresses:
            if str(address) not in self.opened:
                _check_free(address)
        return self._change(files_for(addresses, open_loopback=open_loopback))

    def disable(self) -> bool:
        """Close the port. Returns whether one was open. Errors: NotPermitted, SocketError."""
        return self._change(Files(None, None))

    def _change(self, wanted: Files) -> bool:
        before = Files(_read(self._socket), _read(self._service))
        if wanted == before:
            return False

        self._write(wanted)
        try:
            self._restart()
        except _Failed as error:
            self._write(before)
            with contextlib.suppress(_Failed):
                self._restart()
            raise SocketError(
                f"systemd did not open the port: {error}",
                hint="nothing was changed; see `journalctl -u rkcached.socket`",
            ) from error
        return True

    def _write(self, files: Files) -> None:
        """Errors: NotPermitted, SocketError."""
        try:
            _put(self._socket, files.socket)
            _put(self._service, files.service)
        except PermissionError as error:
            raise not_root() from error
        except OSError as error:
            raise SocketError(f"{error.filename} cannot be written: {error.strerror}") from error

    def _restart(self) -> None:
        """A socket that runs takes no new address, so it is opened anew, and its service with it.

        Errors: _Failed.
        """
        self._systemctl("daemon-reload")
        self._systemctl("restart", SOCKET_UNIT)


def not_root() -> NotPermitted:
    return NotPermitted(
        "only root may open and close ports of the service",
        hint="use sudo; without systemd, use `rkcached run --listen ADDRESS`",
    )


def bridge_address() -> tuple[str, IPv4Address] | None:
    """The name and address of the network of containers on this machine; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for name in BRIDGES:
            request = struct.pack("256s", name.encode())
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
                return name, IPv4Address(answer[20:24])
    return None


def _check_free(address: Address) -> None:
    """Find out by trying, as a socket that systemd cannot open would take the others with it.

    Errors: SocketError.
    """
    family = socket.AF_INET6 if address.host.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trying:
            trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trying.bind((str(address.host), address.port))
            trying.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL and not address.host.is_loopback:
            return  # it may appear later
        raise SocketError(
            f"{address} cannot be opened: {error.strerror}",
            hint=f"`ss -ltnp sport = {address.port}` shows who has the port; or choose another",
        ) from error


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _put(path: Path, text: str | None) -> None:
    """Errors: OSError."""
    if text is None:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # others may have drop-ins there
        return

    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(".port.conf.new")
    new.write_text(text, encoding="utf-8")
    new.chmod(0o644)
    new.replace(path)
