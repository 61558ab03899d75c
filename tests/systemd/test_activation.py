"""From `make install` to the first answer.

Sockets, readiness, permissions, the sandbox as systemd sees it.
"""

from __future__ import annotations

import re

import pytest
from machine import ADMIN_SOCKET, SOCKET, STORE, UNIT, Machine, make

from tests.waiting import wait_until

UNITS = (UNIT, "rkcached.socket", "rkcached-admin.socket")


def test_the_first_connection_starts_the_daemon_and_is_answered(machine: Machine) -> None:
    """With only the socket enabled.

    A question comes before there is a daemon, and gets its answer.
    """
    machine.systemctl("enable", "rkcached.socket")
    assert machine.show("ActiveState") == "inactive"
    answer = machine.ask("m/a")
    assert answer["usage"]["completion_tokens"] == 8
    assert machine.show("ActiveState") == "active"
    assert machine.wait_line("2 fresh") == "2 fresh, 0 blocked"
    assert machine.ask("m/a")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_ready_does_not_wait_for_builds(machine: Machine) -> None:
    """`systemctl start` returns when the plan exists.

    The status line then says what is being built.
    """
    machine.declare(
        {"a": "You are prompt A.\n" * 50, "b": "You are prompt B.\n" * 50},
        prefill_us_per_token=3000,
    )
    machine.systemctl("start", UNIT)
    assert machine.show("ActiveState") == "active"
    assert machine.wait_line("building") == "0 fresh, 1 building m/a, 1 missing, 0 blocked"
    assert machine.wait_line("1 fresh") == "1 fresh, 1 building m/b, 0 blocked"
    assert machine.wait_line("2 fresh") == "2 fresh, 0 blocked"


SLOW_IMPORT = """
import sys
import time


class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "starlette":
            time.sleep(7)


sys.meta_path.insert(0, Slow())
"""


@pytest.mark.long
def test_a_start_whose_imports_take_longer_than_its_time(machine: Machine) -> None:
    """As on an emulated machine: the daemon asks for more time before them, and systemd waits."""
    packages = machine.run("sh", "-c", "echo /usr/local/lib/rkcached/lib/python3.*/site-packages")
    folder = packages.stdout.strip()
    machine.write(f"{folder}/slow_import.py", SLOW_IMPORT)
    machine.write(f"{folder}/slow_import.pth", "import slow_import\n")
    machine.drop_in("hurry", "[Service]\nTimeoutStartSec=4\n")
    try:
        machine.systemctl("start", UNIT)
    finally:
        machine.run("rm", f"{folder}/slow_import.py", f"{folder}/slow_import.pth")
    started = int(machine.show("ExecMainStartTimestampMonotonic"))
    active = int(machine.show("ActiveEnterTimestampMonotonic"))
    assert active - started > 7e6
    assert machine.show("NRestarts") == "0"


def test_nothing_is_lost_while_the_daemon_restarts(machine: Machine) -> None:
    """Requests that come during a restart wait in the socket for the next daemon."""
    machine.ask("m/a")
    before = machine.main_pid
    curl = (
        f"curl -sS --max-time 50 --unix-socket {SOCKET} -o /dev/null -w '%{{http_code}}\\n' "
        "http://d/v1/models"
    )
    asking = f"for i in $(seq 30); do {curl}; done & "
    codes = machine.run(
        "sh", "-c", f"{asking * 4} systemctl restart {UNIT}; systemctl restart {UNIT}; wait"
    ).stdout
    assert codes.split() == ["200"] * 120
    assert machine.main_pid not in (0, before)


def test_every_stream_of_a_socket_unit_is_served(machine: Machine) -> None:
    """A drop-in adds a second ListenStream to the unit: the daemon answers on both."""
    folder, more = "/etc/systemd/system/rkcached.socket.d", "/run/rkcached/more.sock"
    machine.write(f"{folder}/more.conf", f"[Socket]\nListenStream={more}\n")
    try:
        machine.systemctl("daemon-reload")
        machine.systemctl("restart", "rkcached.socket")
        for path in (more, SOCKET):
            told = machine.run(
                "curl", "-sS", "--max-time", "100", "--unix-socket", path, "http://d/v1/models"
            ).stdout
            assert '"m/a"' in told
    finally:
        machine.run("rm", "-rf", folder)
        machine.systemctl("daemon-reload")


def test_who_may_do_what(machine: Machine) -> None:
    """The group may ask; changes are root's.

    Anybody else gets permission denied, and no listing of names.
    """
    machine.run(
        "sh", "-c", "id member || useradd -G rkcached member; id stranger || useradd stranger"
    )
    assert machine.ask("m/a", user="member")
    body = {"cache_name": "notes", "content": "Remember."}
    status, answer = machine.curl("/v1/cache/m", body, user="member")
    assert (status, answer["error"]["code"]) == (403, "admin_only")
    status, answer = machine.curl("/v1/reload", {}, user="member")
    assert (status, answer["error"]["code"]) == (403, "admin_only")
    assert "to server" in machine.curl("/v1/reload", {}, user="member", admin=True)[1]["curl"]
    assert "to server" in machine.curl("/v1/status", user="stranger")[1]["curl"]
    assert machine.curl("/v1/cache/m", body, admin=True)[0] == 200
    said = machine.run("rkcached", "status", user="stranger", code=77).stderr
    assert f"permission denied on {SOCKET}" in said
    assert "3 fresh" in machine.run("rkcached", "status", user="member").stdout
    said = machine.run("rkcached", "reload", user="member", code=77).stderr
    assert f"permission denied on {ADMIN_SOCKET}" in said
    # The sandbox leaves the daemon's view of others alone: the journal tells who asked.
    uid = machine.run("id", "-u", "member").stdout.strip()
    asked = [entry for entry in machine.journal("EVENT=request") if entry["UID"] == uid]
    assert {("/v1/chat/completions", "200"), ("/v1/cache/m", "403")} <= {
        (e["PATH"], e["STATUS"]) for e in asked
    }


def test_modes_and_owners(machine: Machine) -> None:
    """A KV state is as good as its text: nothing of ours is for everybody."""
    machine.ask("m/a")
    machine.wait_line("2 fresh")
    places = [
        "/etc/rkcached",
        "/run/rkcached",
        "/run/rkcached-work",
        SOCKET,
        ADMIN_SOCKET,
        STORE,
        f"{STORE}/m",
        f"{STORE}/m/a.bin",
    ]
    shown = machine.run("stat", "-c", "%A %U:%G", *places, "/var/lib/rkcached").stdout.splitlines()
    assert dict(zip([*places, "/var/lib/rkcached"], shown, strict=True)) == {
        "/etc/rkcached": "drwxr-x--- root:rkcached",
        "/run/rkcached": "drwxr-x--- root:rkcached",
        "/run/rkcached-work": "drwx------ rkcached:rkcached",
        SOCKET: "srw-rw---- rkcached:rkcached",
        ADMIN_SOCKET: "srw------- root:root",
        STORE: "drwxr-x--- rkcached:rkcached",
        f"{STORE}/m": "drwxr-x--- rkcached:rkcached",
        f"{STORE}/m/a.bin": "-rw-r----- rkcached:rkcached",
        "/var/lib/rkcached": "drwxr-x--- rkcached:rkcached",
    }


def test_systemd_finds_nothing_wrong_with_the_units(installed: Machine) -> None:
    """`verify` is silent, and the exposure is 0.8 or lower."""
    files = [f"/etc/systemd/system/{unit}" for unit in UNITS]
    verified = installed.run("systemd-analyze", "verify", "--man=no", *files)
    assert verified.stdout + verified.stderr == ""
    said = installed.run("systemd-analyze", "security", "--no-pager", UNIT).stdout
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert found is not None
    assert float(found[1]) <= 0.8


@pytest.mark.long
def test_the_system_s_places_are_found(machine: Machine) -> None:
    """Root needs no flags: manifest, store and socket are the system's."""
    machine.ask("m/a")
    machine.wait_line("2 fresh")
    assert "ok" in machine.run("rkcached", "check").stdout
    assert "m/a" in machine.run("rkcached", "verify").stdout
    assert machine.run("rkcached", "plan", "--exit-code", code=0)
    regenerated = machine.run("rkcached", "regenerate", "m/a")
    assert "m/a" in regenerated.stdout


@pytest.mark.long
def test_an_upgrade_in_place_keeps_caches(machine: Machine) -> None:
    """`make install` again.

    The manifest stays, the running daemon is restarted, and nothing is rebuilt.
    """
    machine.ask("m/a")
    machine.wait_line("2 fresh")
    before, manifest = machine.main_pid, machine.read("/etc/rkcached/manifest.yaml")
    assert "rkcached init" not in make(machine, "install")  # it is declared long ago
    wait_until(lambda: machine.main_pid not in (0, before), "the daemon was restarted")
    assert machine.wait_line("fresh") == "2 fresh, 0 blocked"
    assert machine.status()["reconcile"]["builds"] == 0
    assert machine.read("/etc/rkcached/manifest.yaml") == manifest


@pytest.mark.long
def test_a_package_with_other_bytes_is_not_installed(machine: Machine) -> None:
    """`make install` ends, what was installed goes on, and nothing of the attempt is left."""
    machine.ask("m/a")
    before = machine.main_pid
    machine.run("cp", "-r", "/wheels", "/srv/spoiled")
    machine.run("sh", "-c", "for file in /srv/spoiled/uvicorn-*.whl; do echo >>$file; done")
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/srv/spoiled"}
    install = ["make", "-C", "/src", "install", "PYTHON=/usr/bin/python3"]
    try:
        said = machine.run(*install, code=2, **pip).stderr
    finally:
        machine.run("rm", "-r", "/srv/spoiled")
    assert "DO NOT MATCH THE HASHES" in said
    assert "uvicorn" in said
    assert machine.run("sh", "-c", "ls -d /usr/local/lib/rkcached* /tmp/tmp.* || true").stdout == (
        "/usr/local/lib/rkcached\n"
    )
    assert machine.main_pid == before
    assert machine.ask("m/a")["usage"]["completion_tokens"] == 8
