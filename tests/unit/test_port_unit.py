"""The drop-ins of a port below a root folder, with a systemctl that only notes what it is told."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from rkcached.errors import SettingsError, SocketError
from rkcached.host.addresses import Address, parse_address, parse_host
from rkcached.host.port_unit import PortUnit, _Failed

FOLDER = Path("etc/systemd/system")


class Systemctl:
    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.fails = False

    def __call__(self, *words: str) -> None:
        self.told.append(words)
        if self.fails and words[0] == "restart":
            raise _Failed("Job for rkcached.socket failed.")


@pytest.fixture
def systemctl() -> Systemctl:
    return Systemctl()


@pytest.fixture
def unit(tmp_path: Path, systemctl: Systemctl) -> PortUnit:
    return PortUnit(tmp_path, systemctl)


@pytest.fixture
def free() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return parse_address(f"127.0.0.1:{server.getsockname()[1]}")


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root / FOLDER)): path.read_text()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def test_enable_and_disable(
    tmp_path: Path, unit: PortUnit, systemctl: Systemctl, free: Address
) -> None:
    """Each does its work once, and leaves nothing behind; the drop-ins of others stay."""
    other = tmp_path / FOLDER / "rkcached.socket.d" / "other.conf"
    other.parent.mkdir(parents=True)
    other.write_text("[Socket]\n")
    assert unit.enable([free], open_loopback=False)
    written = files(tmp_path)
    assert list(written) == ["rkcached.socket.d/other.conf", "rkcached.socket.d/port.conf"]
    lines = written["rkcached.socket.d/port.conf"].splitlines()
    assert lines[1:] == ["[Socket]", f"ListenStream={free}"]
    assert unit.opened == (str(free),)
    assert systemctl.told == [("daemon-reload",), ("restart", "rkcached.socket")]

    assert not unit.enable([free], open_loopback=False)
    assert len(systemctl.told) == 2
    assert unit.enable([free], open_loopback=True)
    assert "RKCACHED_OPEN_LOOPBACK=1" in files(tmp_path)["rkcached.service.d/port.conf"]

    assert unit.disable()
    assert list(files(tmp_path)) == ["rkcached.socket.d/other.conf"]
    assert not (tmp_path / FOLDER / "rkcached.service.d").exists()
    assert not unit.disable()
    assert len(systemctl.told) == 6


def test_an_address_that_may_appear_later(tmp_path: Path, unit: PortUnit, free: Address) -> None:
    """As that of a container's network, at boot: systemd need not wait for it."""
    bridge = Address(parse_host("192.0.2.77"), free.port)
    assert unit.enable([free, bridge], open_loopback=False)
    text = files(tmp_path)["rkcached.socket.d/port.conf"]
    assert f"ListenStream={free}\nListenStream={bridge}\nFreeBind=yes\n" in text


def test_a_port_that_is_taken_is_found_before(
    tmp_path: Path, unit: PortUnit, systemctl: Systemctl, free: Address
) -> None:
    """A socket unit that cannot open one of its addresses would close the others."""
    with (
        socket.create_server(("127.0.0.1", free.port)),
        pytest.raises(SocketError, match="in use"),
    ):
        unit.enable([free], open_loopback=False)
    assert files(tmp_path) == {}
    assert systemctl.told == []


def test_what_systemd_refuses_is_taken_back(
    tmp_path: Path, unit: PortUnit, systemctl: Systemctl, free: Address
) -> None:
    assert unit.enable([free], open_loopback=False)
    before = files(tmp_path)
    systemctl.fails = True
    with pytest.raises(SocketError, match=r"Job for rkcached\.socket failed"):
        unit.enable([Address(parse_host("::1"), free.port)], open_loopback=True)
    assert files(tmp_path) == before
    assert systemctl.told[-2:] == [("daemon-reload",), ("restart", "rkcached.socket")]


@pytest.mark.parametrize(
    ("text", "shown", "url"),
    [
        ("127.0.0.1:8080", "127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
        ("localhost:80", "127.0.0.1:80", "http://127.0.0.1:80/v1"),
        ("[::1]:8080", "[::1]:8080", "http://[::1]:8080/v1"),
        ("[0:0::1]:8080", "[::1]:8080", "http://[::1]:8080/v1"),
        ("0.0.0.0:8080", "0.0.0.0:8080", "http://localhost:8080/v1"),
    ],
)
def test_addresses(text: str, shown: str, url: str) -> None:
    address = parse_address(text)
    assert (str(address), address.url) == (shown, url)


@pytest.mark.parametrize(
    "text", ["", "8080", ":8080", "a:8080", "1.2.3.4", "1.2.3.4:", "1.2.3.4:x", "::1:80", "[a]:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(SettingsError):
        parse_address(text)
