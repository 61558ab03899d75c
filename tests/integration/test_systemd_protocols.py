"""What goes to systemd and to the journal, over real sockets, and who feeds the watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import queue
import select
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from conftest import Workspace

from rkcached.api.passed import refuse_waiting
from rkcached.errors import ManifestError, Problem
from rkcached.host import logs
from rkcached.host.journal import Journal
from rkcached.host.systemd import Service, listen_fds
from rkcached.reconcile.snapshot import BuildProgress
from rkcached.sources.records import Key
from rkcached.store.sidecar import Inventory
from rkcached.store.store import Store
from rkcached.worker.model import Deadlines
from tests.integration.reconciling import reconciling
from tests.waiting import DEADLINE_S, wait_until


class Listener:
    """The other end of a datagram socket: systemd's, or the journal's."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(DEADLINE_S)

    def next(self) -> bytes:
        return self.socket.recv(1 << 20)

    def silent_for(self, seconds: float) -> bool:
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(1 << 20)
        except TimeoutError:
            return True
        else:
            return False
        finally:
            self.socket.settimeout(DEADLINE_S)

    def drain(self) -> None:
        while not self.silent_for(0.01):
            pass


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A notification socket, in the environment as a unit with a watchdog of 0.2 s has it."""
    listener = Listener(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    with listener.socket:
        yield listener


def close(service: Service) -> None:
    assert service._notifier is not None
    service._notifier.socket.close()


def test_a_start_asks_for_time_until_it_is_ready(manager: Listener) -> None:
    """Signs of life extend the time limit only while systemd waits.

    The watchdog is fed all along.
    """
    service = Service()
    assert service.pulse_s == 0.1
    service.beat()
    assert manager.next() == b"WATCHDOG=1\nEXTEND_TIMEOUT_USEC=60000000"
    service.ready()
    assert manager.next() == b"READY=1"
    service.beat()
    assert manager.next() == b"WATCHDOG=1"
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    service.reloading()
    first, second = manager.next().decode().split("\n")
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= before + 1_000_000
    service.beat()
    assert b"EXTEND_TIMEOUT_USEC" in manager.next()
    service.stopping(grace_s=1)
    assert manager.next() == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=7000000"
    close(service)


def test_a_manager_that_does_not_read_holds_nothing_up(manager: Listener) -> None:
    """Its queue is full after some ten messages.

    What did not fit is sent when it reads again, the last of each name, without a further message
    that pushes it.
    """
    service = Service()

    async def lines() -> list[bytes]:
        before = time.monotonic()
        for i in range(100):
            service.status(f"{i} of 100")
        service.ready()
        assert time.monotonic() - before < 1
        found = []
        while b"READY=1" not in found:
            found += (await asyncio.to_thread(manager.next)).split(b"\n")
        return found

    found = asyncio.run(lines())
    assert found[0] == b"STATUS=0 of 100"
    assert found[-2:] == [b"STATUS=99 of 100", b"READY=1"]
    assert len(found) < 100
    close(service)


def test_imports_get_on_while_the_manager_does_not_read(manager: Listener) -> None:
    """Each of them asks for time, far more often than the manager's queue holds.

    A message that does not fit imports nothing: it is sent from within an import.
    """
    script = (
        "import sys\n"
        "from rkcached.host import systemd\n"
        "assert 'asyncio' not in sys.modules\n"
        "systemd._IMPORT_PULSE_S = 0\n"
        "with systemd.asking_for_time():\n"
        "    import asyncio, http.server, unittest.mock\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert manager.next() == b"EXTEND_TIMEOUT_USEC=60000000"


SLOW_START = """
import os
import sys


class Gates:
    "Holds the import of each of these modules, which it names, until a byte comes."

    closed = set(sys.argv[1:])

    def find_spec(self, name, path=None, target=None):
        if name in self.closed:
            self.closed.remove(name)
            os.write(1, name.encode())
            os.read(0, 1)


sys.meta_path.insert(0, Gates())
from rkcached.host import systemd
systemd._IMPORT_PULSE_S = 0
sys.argv[1:] = ["run"]
assert not {"click", "pydantic", "starlette", "uvicorn"} & set(sys.modules)
"""
ENTRIES = {
    "module": "import runpy; runpy.run_module('rkcached', run_name='__main__')",
    "script": "from rkcached.cli.main import main; main()",
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("entry", "gates"),
    [
        ("module", ["click", "pydantic", "uvicorn"]),
        pytest.param("script", ["pydantic", "uvicorn"], marks=pytest.mark.long),
    ],
)
def test_a_start_asks_for_time_while_its_imports_get_on(
    manager: Listener, space: Workspace, entry: str, gates: list[str]
) -> None:
    """On an emulated machine they take longer than systemd waits.

    The first message comes before what is slow to import. One import that hangs sends none.
    """
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        while (message := manager.next()) != b"over":
            messages.put(message)

    def heard() -> set[bytes]:
        found = set()
        with contextlib.suppress(queue.Empty):
            while True:
                found.add(messages.get(timeout=0.3))
        return found

    listening_to_it = threading.Thread(target=listen)
    listening_to_it.start()
    hand, gate = socket.socketpair()
    hand.settimeout(DEADLINE_S)
    try:
        with space.log.open("ab") as log:
            space.process = subprocess.Popen(
                [sys.executable, "-c", SLOW_START + ENTRIES[entry], *gates],
                env=space.environment,
                stdin=gate,
                stdout=gate,
                stderr=log,
                cwd=space.root,
            )
        gate.close()  # so the end of the process is an end of file
        for name in gates:
            assert hand.recv(20) == name.encode(), space.log_text()
            assert heard() == {b"EXTEND_TIMEOUT_USEC=60000000"}
            assert heard() == set()
            hand.sendall(b"\n")

        wait_until(lambda: messages.get(timeout=DEADLINE_S) == b"READY=1", "the daemon is ready")
        assert not [message for message in heard() if b"EXTEND" in message]
        assert space.stop() == 0
    finally:
        hand.close()
        gate.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"over", manager.socket.getsockname())
        listening_to_it.join()


def test_the_status_is_one_line_sent_when_it_changed(manager: Listener) -> None:
    """Names may have any letters; what looks like another assignment is none."""
    service = Service()
    service.status("1 fresh, manifest rejected: /etc/ü/→.yaml:3: bad\nREADY=1")
    assert (
        manager.next().decode() == "STATUS=1 fresh, manifest rejected: /etc/ü/→.yaml:3: bad READY=1"
    )
    service.status("1 fresh, manifest rejected: /etc/ü/→.yaml:3: bad READY=1")
    assert manager.silent_for(0.05)
    close(service)


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told, nothing is awaited, no socket is taken."""
    for name in ("NOTIFY_SOCKET", "LISTEN_PID", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    service = Service()
    service.beat()
    service.ready()
    service.status("1 fresh")
    assert (service.notified, service.pulse_s, listen_fds()) == (False, None, {})


def test_what_is_meant_for_another_process_is_left_alone(
    manager: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that inherited the environment is neither watched nor given sockets."""
    monkeypatch.setenv("WATCHDOG_PID", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "2")
    service = Service()
    service.ready()
    assert manager.next() == b"READY=1"
    assert (service.pulse_s, listen_fds()) == (None, {})
    close(service)


def start_by_sockets(space: Workspace, names: str, listeners: list[socket.socket]) -> None:
    """Start the daemon as systemd does, with these sockets under the names of LISTEN_FDNAMES.

    Ours are closed.
    """
    order = " ".join(f"{fd}<&{listener.fileno()}" for fd, listener in enumerate(listeners, 3))
    said = f"LISTEN_PID=$$ LISTEN_FDS={len(listeners)} LISTEN_FDNAMES={names}"
    with space.log.open("ab") as log:
        space.process = subprocess.Popen(
            ["bash", "-c", f"{said} exec '{sys.executable}' -m rkcached run {order}"],
            env=space.environment,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno() for listener in listeners],
            cwd=space.root,
        )
    for listener in listeners:
        listener.close()


def listening(path: Path) -> socket.socket:
    """A socket as systemd opens it. Its descriptor is none of those that the daemon gets it by."""
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))
        path.chmod(0o777)
        opened.listen()
        return socket.socket(fileno=fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 20))


@pytest.fixture
def space(tmp_path: Path) -> Iterator[Workspace]:
    space = Workspace(tmp_path)
    space.memory_model()
    space.write("prompts/a.md", "You are prompt A.\n")
    space.declare("{a: prompts/a.md}")
    yield space
    if space.process is not None:
        space.process.kill()
        space.process.wait()


def test_passed_sockets_are_used_and_stay(space: Workspace) -> None:
    """As systemd starts us.

    The daemon answers on both, and neither changes their modes nor removes them.
    """
    paths = {"rkcached": space.root / "s.sock", "admin": space.root / "admin.sock"}
    # The other way round than they are asked for: the names count.
    start_by_sockets(
        space, "admin:rkcached", [listening(paths["admin"]), listening(paths["rkcached"])]
    )
    wait_until(lambda: space.status()["ready"], "the daemon is ready")
    assert space.request("POST", "/v1/reload", admin=True).status_code == 200
    assert space.request("POST", "/v1/reload").status_code == 403
    assert space.stop(signal.SIGTERM) == 0
    for path in paths.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o777


def test_every_socket_of_a_name_is_served(space: Workspace) -> None:
    """A unit may have several ListenStream: the daemon answers on each, as its name says."""
    names = ("s", "admin", "other", "more")
    listeners = [listening(space.root / f"{name}.sock") for name in names]
    start_by_sockets(space, "rkcached:admin:rkcached:admin", listeners)
    wait_until(lambda: space.status()["ready"], "the daemon is ready")
    codes = {}
    for name in names:
        transport = httpx.HTTPTransport(uds=str(space.root / f"{name}.sock"), verify=False)
        with httpx.Client(transport=transport, base_url="http://d", timeout=DEADLINE_S) as client:
            codes[name] = client.post("/v1/reload").status_code
    assert codes == {"s": 403, "admin": 200, "other": 403, "more": 200}
    assert space.stop() == 0


@pytest.mark.long
def test_a_port_among_the_sockets_for_changes(
    space: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for admin keys only, also where the loopback needs no key."""
    monkeypatch.setenv("RKCACHED_OPEN_LOOPBACK", "1")
    admin, other = (
        space.cli("key", "add", *words).stdout.strip() for words in (["a", "--admin"], ["b"])
    )
    listeners = [listening(space.root / f"{name}.sock") for name in ("s", "admin")]
    ports = []
    for _ in range(2):
        with socket.create_server(("127.0.0.1", 0)) as opened:
            ports.append(opened.getsockname()[1])
            listeners.append(socket.socket(fileno=fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, 20)))
    start_by_sockets(space, "rkcached:admin:rkcached:admin", listeners)
    wait_until(lambda: space.status()["ready"], "the daemon is ready")

    def codes(port: int) -> list[int]:
        url = f"http://127.0.0.1:{port}/v1/reload"
        keys = ({}, {"x-api-key": other}, {"x-api-key": admin})
        return [httpx.post(url, headers=headers).status_code for headers in keys]

    for_everyone, for_changes = ports
    assert codes(for_everyone) == [403, 403, 200]
    assert codes(for_changes) == [401, 403, 200]
    assert httpx.get(f"http://127.0.0.1:{for_everyone}/v1/models").status_code == 200
    assert httpx.get(f"http://127.0.0.1:{for_changes}/v1/models").status_code == 401
    assert space.stop() == 0


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [
        (
            "rkcached:my.socket",
            socket.SOCK_STREAM,
            "named 'my.socket', which rkcached does not know",
        ),
        ("rkcached", socket.SOCK_STREAM, "named 'unknown', which rkcached does not know"),
        ("rkcached:admin", socket.SOCK_DGRAM, "'admin' does not listen for connections"),
    ],
)
def test_a_socket_that_nobody_would_serve(
    space: Workspace, names: str, kind: int, said: str
) -> None:
    """The daemon does not start.

    It says what to set in the unit, and tells those that wait at its sockets.
    """
    listener = listening(space.root / "s.sock")
    other = socket.socket(socket.AF_UNIX, kind)
    other.bind(str(space.root / "other.sock"))
    if kind == socket.SOCK_STREAM:
        other.listen()
    with other, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(space.root / "s.sock"))
        client.sendall(b"GET / HTTP/1.1\r\nHost: d\r\n\r\n")
        moved = socket.socket(fileno=fcntl.fcntl(other, fcntl.F_DUPFD_CLOEXEC, 20))
        start_by_sockets(space, names, [listener, moved])
        assert space.process is not None
        assert space.process.wait(DEADLINE_S) == os.EX_CONFIG
        client.settimeout(DEADLINE_S)
        answer = client.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert said in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    told = space.log_text()
    assert said in told
    assert "hint: " in told
    assert "Traceback" not in told


def test_a_manifest_that_never_was_good(space: Workspace) -> None:
    """Who waits is told its problems, and ends as with a daemon that runs: with 78, not 69."""
    space.write("manifest.yaml", "version: 7\n")
    for command in (["wait"], ["status"], ["regenerate", "m/a"]):
        listener = listening(space.root / "s.sock")
        with subprocess.Popen(
            space.command(*command), env=space.environment, stderr=subprocess.PIPE, text=True
        ) as client:
            assert select.select([listener], [], [], DEADLINE_S)[0]  # it is connected
            start_by_sockets(space, "rkcached", [listener])
            _, error = client.communicate(timeout=DEADLINE_S)
        assert client.returncode == os.EX_CONFIG, error
        assert error.startswith(f"{space.manifest}:1: ")
        assert space.process is not None
        assert space.process.wait(DEADLINE_S) == os.EX_CONFIG
        (space.root / "s.sock").unlink()


# The journal


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[tuple[Journal, Listener]]:
    listener = Listener(tmp_path / "journal")
    journal = Journal(str(tmp_path / "journal"))
    with listener.socket, journal._socket:
        yield journal, listener


def fields(datagram: bytes) -> dict[str, str]:
    """Parse an entry as journald does."""
    found = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        found[name.decode()] = value.decode()
        datagram = rest
    return found


def test_an_event_is_an_entry_with_fields(journald: tuple[Journal, Listener]) -> None:
    """The words are the event's, in capitals; the state has a name that is ours."""
    journal, listener = journald
    journal.send(
        level="warning",
        message="said",
        event="prompt not cached",
        fields={"model": "m", "state": "blocked"},
    )
    assert fields(listener.next()) == {
        "MESSAGE": "said",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "rkcached",
        "EVENT": "prompt not cached",
        "MODEL": "m",
        "ARTIFACT_STATE": "blocked",
    }


def test_an_event_that_the_journal_does_not_take_is_a_line(
    journald: tuple[Journal, Listener], capsys: pytest.CaptureFixture[str]
) -> None:
    journal, listener = journald
    line = logging.StreamHandler()
    line.setFormatter(logs._Line())
    entries = logs._Entries(journal, otherwise=line)
    record = logging.LogRecord("rkcached", logging.ERROR, "", 0, "built", (), None)
    record.fields = {"model": "m", "why": "", "exception": "its traceback"}

    entries.handle(record)
    assert fields(listener.next()) == {
        "MESSAGE": "built model=m\nits traceback",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "rkcached",
        "EVENT": "built",
        "MODEL": "m",
    }
    assert capsys.readouterr().err == ""

    listener.socket.close()
    entries.handle(record)
    assert capsys.readouterr().err[9:] == "error   built model=m\nits traceback\n"


def test_a_value_cannot_forge_a_field(journald: tuple[Journal, Listener]) -> None:
    """Line breaks are data.

    Our own fields, and names that the journal does not take, are not overwritten.
    """
    journal, listener = journald
    bad = {
        "reason": "a\nPRIORITY=0",
        "priority": "0",
        "message": "x",
        "_uid": "0",
        "1st": "x",
        "ümlaut": "x",
    }
    journal.send(level="error", message="first\nsecond", event="e", fields=bad)
    entry = fields(listener.next())
    assert (entry["MESSAGE"], entry["PRIORITY"], entry["REASON"]) == (
        "first\nsecond",
        "3",
        "a\nPRIORITY=0",
    )
    assert entry.keys() == {"MESSAGE", "PRIORITY", "SYSLOG_IDENTIFIER", "EVENT", "REASON"}


def test_an_entry_fits_a_datagram(journald: tuple[Journal, Listener]) -> None:
    """However long its values are."""
    journal, listener = journald
    journal.send(level="info", message="→" * 1_000_000, fields={"error": "\ud800" * 10})
    assert len(fields(listener.next())["MESSAGE"]) == 16 << 10


# The watchdog


class SlowDisk(Store):
    """A store whose scan takes until it is let go."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.scanning = threading.Event()
        self.go_on = threading.Event()

    def scan(self) -> Inventory:
        self.scanning.set()
        self.go_on.wait(DEADLINE_S)
        return super().scan()


@pytest.fixture
def nothing(tmp_path: Path) -> Workspace:
    space = Workspace(tmp_path)
    space.memory_model()
    space.declare("{}")
    return space


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    close(service)


async def test_a_stuck_look_starves_the_watchdog(
    manager: Listener, nothing: Workspace, service: Service
) -> None:
    """The event loop runs, but the reconcile loop waits for a disk.

    No sign of life, unless the reading gets on.
    """
    store = SlowDisk(nothing.cache)
    async with reconciling(nothing, store, service):
        await asyncio.to_thread(store.scanning.wait, 5)
        await asyncio.to_thread(manager.silent_for, 0.3)  # what was read before counts once
        assert await asyncio.to_thread(manager.silent_for, 0.5)
        store.digests.steps += 1
        assert b"WATCHDOG=1" in await asyncio.to_thread(manager.next)
        assert await asyncio.to_thread(manager.silent_for, 0.5)
        store.go_on.set()
        for _ in range(3):
            assert b"WATCHDOG=1" in await asyncio.to_thread(manager.next)


async def test_a_build_past_every_deadline_starves_the_watchdog(
    manager: Listener, nothing: Workspace, service: Service
) -> None:
    """A build may take minutes; one that no deadline ended is stuck."""
    async with reconciling(nothing, Store(nothing.cache), service) as reconciler:
        await reconciler.ready.wait()
        limit_s = Deadlines().start_s + 30
        young, old = time.monotonic() - limit_s + 20, time.monotonic() - limit_s - 1
        progress = BuildProgress(key=Key("m", "a"), reason="", fingerprint="", started=young)
        reconciler._published.change(building=progress)
        manager.drain()
        assert b"WATCHDOG=1" in await asyncio.to_thread(manager.next)
        reconciler._published.change(building=replace(progress, started=old))
        await asyncio.sleep(0)
        manager.drain()
        assert await asyncio.to_thread(manager.silent_for, 0.5)
        reconciler._published.change(building=None)
        assert b"WATCHDOG=1" in await asyncio.to_thread(manager.next)


def test_a_broken_manifest_is_not_told_over_a_port(tmp_path: Path) -> None:
    """Who waits there has shown no key. On a Unix socket every problem is told."""
    problem = Problem(file="/etc/rkcached/manifest.yaml", line=3, message="secret-model is wrong")
    unix, tcp = listening(tmp_path / "s.sock"), socket.create_server(("127.0.0.1", 0))
    for listener, is_told in ((unix, True), (tcp, False)):
        with socket.socket(listener.family) as client, listener:
            client.connect(listener.getsockname())
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            listener.setblocking(False)
            refuse_waiting(listener, ManifestError((problem,)))
            answer = client.recv(1 << 16).decode()
        assert answer.startswith("HTTP/1.1 503 ")
        assert ("secret-model" in answer) is is_told
