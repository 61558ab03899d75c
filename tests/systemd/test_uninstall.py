"""`make uninstall`: last, as it takes away what the other tests use."""

from __future__ import annotations

from machine import STORE, UNIT, Machine, make

OURS = "/usr/local/lib/rkcached /usr/local/bin/rkcached /etc/systemd/system/rkcached*.*"


def test_uninstall_keeps_what_is_the_administrator_s_and_purge_does_not(machine: Machine) -> None:
    """Program and units go; manifest, prompts and caches stay, unless PURGE=1."""
    machine.systemctl("enable", "--now", UNIT)
    machine.wait_line("2 fresh")
    make(machine, "uninstall")
    assert machine.run("sh", "-c", f"ls -d {OURS}", code=2).stdout == ""
    assert "0 unit files" in machine.systemctl("list-unit-files", "rkcached*", code=None)
    assert machine.run("ls", "/etc/rkcached").stdout.split() == ["manifest.yaml", "prompts"]
    assert "a.json" in machine.run("ls", f"{STORE}/m").stdout
    make(machine, "uninstall", PURGE="1")
    places = f"{OURS} /etc/rkcached /run/rkcached {STORE} /var/lib/rkcached"
    assert machine.run("sh", "-c", f"ls -d {places}", code=2).stdout == ""
