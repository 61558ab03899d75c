"""Places of files and sockets: from flags, the environment, or defaults, in this order.

The environment has RKCACHED_* and systemd's *_DIRECTORY. Every command reads these, so no library
is imported here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from rkcached.errors import SettingsError
from rkcached.host import places

LOG_LEVELS = ("debug", "info", "warning", "error")

_PLACES = ("manifest", "cache_dir", "state_dir", "socket", "admin_socket")

NAMES = (*_PLACES, "log_level")
"""Of all settings: each has a flag, and a variable RKCACHED_*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every path is absolute."""

    manifest: Path
    cache_dir: Path
    state_dir: Path
    socket: Path
    admin_socket: Path
    """The socket for changes; by default it lies beside the other one."""
    log_level: str
    """One of LOG_LEVELS."""
    given: frozenset[str]
    """The names of the places that a flag or the environment gave."""

    @classmethod
    def read(cls, *, log_level: str | None = None, **flags: Path | None) -> Self:
        """Of the flags, None means that it was not given. Errors: SettingsError."""
        given = {name: path for name in _PLACES if (path := _given(name, flags)) is not None}
        manifest = given.get("manifest") or places.manifest()
        cache_dir = given.get("cache_dir") or places.cache_dir(manifest)
        state_dir = given.get("state_dir") or places.state_dir(cache_dir)
        socket = given.get("socket") or places.socket_to_open()
        admin_socket = given.get("admin_socket") or socket.parent / places.ADMIN_NAME
        return cls(
            manifest=_absolute(manifest),
            cache_dir=_absolute(cache_dir),
            state_dir=_absolute(state_dir),
            socket=_absolute(socket),
            admin_socket=_absolute(admin_socket),
            log_level=_log_level(log_level),
            given=frozenset(given),
        )

    def of_client(self) -> Self:
        """The settings of a client: the sockets where a daemon is found, unless they were given."""
        if "socket" in self.given:
            return self

        socket = places.socket_to_ask()
        admin_socket = self.admin_socket
        if "admin_socket" not in self.given:
            admin_socket = socket.parent / places.ADMIN_NAME
        return replace(self, socket=_absolute(socket), admin_socket=_absolute(admin_socket))


def _given(name: str, flags: dict[str, Path | None]) -> Path | None:
    """The path from its flag or its variable. A variable that is empty gives none."""
    if (flag := flags.get(name)) is not None:
        return flag
    value = os.environ.get(f"RKCACHED_{name.upper()}")
    return Path(value) if value else None


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - it keeps links


def _log_level(flag: str | None) -> str:
    level = flag or os.environ.get("RKCACHED_LOG_LEVEL") or "info"
    if level not in LOG_LEVELS:
        raise SettingsError(
            f"log-level: {level!r} is none of {', '.join(LOG_LEVELS)}",
            hint="correct RKCACHED_LOG_LEVEL, or the flag of that name",
        )
    return level
