"""Where things are when nobody says.

For a user of this machine, for its root, and for the daemon under systemd.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkcached.host import places
from rkcached.host.settings import Settings


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A temporary directory whose path leaves room for the name of a socket."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path).resolve()


@pytest.fixture
def home(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user in an empty directory on a machine with the system's manifest and daemon."""
    for name in ("MANIFEST", "CACHE_DIR", "STATE_DIR", "SOCKET", "ADMIN_SOCKET"):
        monkeypatch.delenv(f"RKCACHED_{name}", raising=False)
    for name in ("CACHE", "STATE", "RUNTIME"):
        monkeypatch.delenv(f"{name}_DIRECTORY", raising=False)
        monkeypatch.setattr(places, f"SYSTEM_{name}", short_path / "system" / name.lower())
    monkeypatch.setattr(places, "SYSTEM_MANIFEST", short_path / "system" / "manifest.yaml")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path / "user"))
    for folder in ("home", "user", "system/runtime"):
        (short_path / folder).mkdir(parents=True)
    (short_path / "system" / "manifest.yaml").touch()
    monkeypatch.chdir(short_path / "home")
    return short_path


def test_who_asks_finds_the_system_s_daemon(home: Path) -> None:
    """Unless this user has one, or somebody said where it is."""
    (home / "system/runtime/rkcached.sock").touch()
    assert Settings().of_client().socket == home / "system/runtime/rkcached.sock"
    assert Settings().of_client().admin_socket == home / "system/runtime/admin.sock"
    assert places.admin_socket_to_ask() == home / "system/runtime/admin.sock"
    assert Settings(socket=Path("/elsewhere/x")).of_client().admin_socket == Path(
        "/elsewhere/admin.sock"
    )
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(home / "user/rkcached.sock"))
        assert Settings().of_client().socket == home / "user/rkcached.sock"


def test_a_daemon_never_takes_the_system_s_socket_by_itself(home: Path) -> None:
    """A user's `rkcached run` listens in the user's directory."""
    assert Settings().socket == home / "user/rkcached.sock"


def test_without_a_system_s_daemon_the_user_s_socket_is_named(home: Path) -> None:
    """The message then says what a person would start.

    Regression: the folder alone was enough, and a client of one's own daemon, which was only about
    to open its socket, waited for the system's.
    """
    assert Settings().of_client().socket == home / "user/rkcached.sock"
    (home / "system/runtime").rmdir()
    assert Settings().of_client().socket == home / "user/rkcached.sock"


def test_the_system_s_store_belongs_to_the_system_s_manifest(home: Path) -> None:
    """A daemon on another manifest would remove from it what it does not declare."""
    assert (Settings().cache_dir, Settings().state_dir) == (
        home / "system/cache",
        home / "system/state",
    )
    other = Settings(manifest=Path("other.yaml"))
    assert (other.cache_dir, other.state_dir) == (home / "home/cache", home / "home/state")
    (home / "home/manifest.yaml").touch()
    assert Settings().cache_dir == home / "home/cache"


@pytest.mark.usefixtures("home")
def test_systemd_s_directories_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several in one variable, ours is the first."""
    for name in ("CACHE", "STATE", "RUNTIME"):
        monkeypatch.setenv(f"{name}_DIRECTORY", f"/{name.lower()}/rkcached:/other")
    settings = Settings()
    assert settings.cache_dir == Path("/cache/rkcached")
    assert settings.state_dir == Path("/state/rkcached")
    assert settings.socket == Path("/runtime/rkcached/rkcached.sock")
