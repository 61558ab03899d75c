"""Default places: systemd's *_DIRECTORY, the user's own, or the system's.

Apart from `settings` so that a command which must be quick needs no validation library.
"""

from __future__ import annotations

import os
from pathlib import Path

SYSTEM_MANIFEST = Path("/etc/rkcached/manifest.yaml")
SYSTEM_CACHE = Path("/var/cache/rkcached")
SYSTEM_STATE = Path("/var/lib/rkcached")
SYSTEM_RUNTIME = Path("/run/rkcached")

SOCKET_NAME = "rkcached.sock"
ADMIN_NAME = "admin.sock"


def manifest() -> Path:
    here = Path("manifest.yaml")
    return here if here.exists() else SYSTEM_MANIFEST


def cache_dir(manifest: Path) -> Path:
    """The store: the system's belongs to the system's manifest only, as others would empty it."""
    of_the_system = Path(os.path.abspath(manifest)) == SYSTEM_MANIFEST  # noqa: PTH100 - links are not followed
    return Path(_given("CACHE_DIRECTORY") or (SYSTEM_CACHE if of_the_system else "cache"))


def state_dir(cache_dir: Path) -> Path:
    return Path(
        _given("STATE_DIRECTORY")
        or (SYSTEM_STATE if cache_dir == SYSTEM_CACHE else cache_dir.parent / "state")
    )


def socket_to_open() -> Path:
    """The socket that a daemon opens."""
    return (
        Path(_given("RUNTIME_DIRECTORY") or os.environ.get("XDG_RUNTIME_DIR") or SYSTEM_RUNTIME)
        / SOCKET_NAME
    )


def socket_to_ask() -> Path:
    """The socket that a client asks: the user's own if there is one, else the system's."""
    own = socket_to_open()
    return (
        own if os.path.lexists(own) or not SYSTEM_RUNTIME.is_dir() else SYSTEM_RUNTIME / SOCKET_NAME
    )


def admin_socket_to_ask() -> Path:
    """As the environment says, or beside the other one."""
    if given := os.environ.get("RKCACHED_ADMIN_SOCKET"):
        return Path(given)
    return Path(os.environ.get("RKCACHED_SOCKET") or socket_to_ask()).parent / ADMIN_NAME


def _given(name: str) -> str:
    """A variable of systemd may name several directories; ours is the first."""
    return os.environ.get(name, "").split(":")[0]
