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
    if os.path.exists(here):  # noqa: PTH110 - a folder that may not be searched is no error
        return here
    return SYSTEM_MANIFEST


def cache_dir(manifest: Path) -> Path:
    """The store: the system's belongs to the system's manifest only, as others would empty it."""
    if given := _given("CACHE_DIRECTORY"):
        return Path(given)
    if Path(os.path.abspath(manifest)) == SYSTEM_MANIFEST:  # noqa: PTH100 - links are not followed
        return SYSTEM_CACHE
    return Path("cache")


def state_dir(cache_dir: Path) -> Path:
    if given := _given("STATE_DIRECTORY"):
        return Path(given)
    if cache_dir == SYSTEM_CACHE:
        return SYSTEM_STATE
    return cache_dir.parent / "state"


def socket_to_open() -> Path:
    """The socket that a daemon opens."""
    given = _given("RUNTIME_DIRECTORY") or os.environ.get("XDG_RUNTIME_DIR")
    return Path(given or SYSTEM_RUNTIME) / SOCKET_NAME


def socket_to_ask() -> Path:
    """The socket that a client asks: the system's if only that one is there, else the user's own.

    Where a user may not look for the system's, it is taken to be there.
    """
    own = socket_to_open()
    systems = SYSTEM_RUNTIME / SOCKET_NAME
    is_closed = SYSTEM_RUNTIME.is_dir() and not os.access(SYSTEM_RUNTIME, os.X_OK)
    if not os.path.lexists(own) and (os.path.lexists(systems) or is_closed):
        return systems
    return own


def admin_socket_to_ask() -> Path:
    """The socket that the environment names, else the one beside the other socket."""
    if given := os.environ.get("RKCACHED_ADMIN_SOCKET"):
        return Path(given)
    return Path(os.environ.get("RKCACHED_SOCKET") or socket_to_ask()).parent / ADMIN_NAME


def _given(name: str) -> str:
    """Read a variable of systemd. It may name several directories; ours is the first."""
    return os.environ.get(name, "").split(":")[0]
