"""Two daemons in one place, sockets that go away, and clients that are slow, wrong or many."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S, wait_until

BODY = b'{"model": "m/a", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}'
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n" % len(BODY)


def connected(space: Workspace) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE_S)
    client.connect(str(space.socket))
    return client


def answer(client: socket.socket) -> bytes:
    """Everything until the other end closes."""
    data = b""
    try:
        while part := client.recv(1 << 16):
            data += part
    except ConnectionError:
        pass
    return data


def fds(space: Workspace) -> int:
    assert space.process is not None
    return psutil.Process(space.process.pid).num_fds()


@pytest.fixture
def watchful(workspace: Workspace) -> None:
    """The daemon looks after its sockets more often."""
    workspace.hurry(api__listening__SOCKET_CHECK_S=0.5)


@pytest.fixture
def impatient(workspace: Workspace) -> None:
    """The daemon waits for the head of a request for 3 s instead of 10."""
    workspace.hurry(api__connection__HEAD_TIMEOUT_S=3.0)


@pytest.fixture
def settled(two_prompts: Workspace) -> Iterator[Workspace]:
    """A daemon that must be as well afterwards as before.

    Answering from its cache, with no descriptor lost.
    """
    two_prompts.ask("m/a")
    before = fds(two_prompts)
    yield two_prompts
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"
    wait_until(lambda: fds(two_prompts) <= before + 1, "no descriptor is lost")
    assert "request crashed" not in two_prompts.log_text()


def test_second_daemon_is_refused(settled: Workspace) -> None:
    """On the same cache, and on the same socket with another cache: it says why.

    The first does not notice.
    """
    on_cache = settled.cli("run", "--socket", str(settled.root / "other.sock"), code=75)
    on_socket = settled.cli("run", "--cache-dir", str(settled.root / "other"), code=73)

    assert "belongs to another daemon" in on_cache.stderr
    assert "another daemon listens" in on_socket.stderr


def test_stale_lock_and_sockets(two_prompts: Workspace) -> None:
    """What a killed daemon leaves, its pid in the lock file included, keeps nobody out."""
    assert two_prompts.stop(9) == -9
    assert two_prompts.socket.exists()
    assert (two_prompts.cache / ".lock").read_text().strip()
    two_prompts.start()
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


@pytest.mark.usefixtures("watchful")
@pytest.mark.parametrize("name", ["s.sock", "admin.sock"])
def test_deleted_socket_comes_back(settled: Workspace, name: str) -> None:
    """A daemon that cannot be reached is of no use.

    The socket is made again, with its mode, and goes at the end.
    """
    path = settled.root / name
    mode = path.stat().st_mode
    for _ in range(2):
        path.unlink()
        wait_until(lambda: answers(path), "the socket is back")
        assert settled.request("GET", "/healthz", admin=name == "admin.sock").status_code == 200
        assert path.stat().st_mode == mode
    settled.logged("socket made again")


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.mark.usefixtures("watchful")
def test_socket_taken_by_another_is_left_alone(two_prompts: Workspace) -> None:
    """A file in the place of the deleted socket is not ours to remove.

    When it goes, the socket comes back.
    """
    two_prompts.socket.unlink()
    two_prompts.socket.write_text("mine")
    two_prompts.logged("socket lost")
    assert two_prompts.socket.read_text() == "mine"
    two_prompts.socket.unlink()
    wait_until(lambda: answers(two_prompts.socket), "the socket is back")
    assert two_prompts.ask("m/a")["rkcached"]["state"] == "hit"


@pytest.mark.usefixtures("impatient")
def test_hundred_clients_that_dribble(settled: Workspace) -> None:
    """Each sends a byte of its headers now and then.

    Others are answered meanwhile, and after the time for a head, here 3 s, they are closed.
    """
    with ExitStack() as stack:
        slow = [stack.enter_context(connected(settled)) for _ in range(100)]
        started = time.monotonic()
        sent, closed = 0, False
        while not closed and time.monotonic() - started < DEADLINE_S:
            for client in slow:
                try:
                    client.send(HEAD[sent : sent + 1])
                except OSError:
                    closed = True
            sent += 1
            asked = time.monotonic()
            assert settled.ask("m/a")["rkcached"]["state"] == "hit"
            wait_until(lambda at=asked: time.monotonic() - at > 0.5, "they wait")  # type: ignore[misc]
        assert closed
        assert time.monotonic() - started > 2.5
        assert sent > 1  # others had their answers before
        assert all(answer(client).startswith(b"HTTP/1.1 408 ") for client in slow)


@pytest.mark.usefixtures("impatient")
def test_slow_body_that_makes_progress(settled: Workspace) -> None:
    """Longer than the headers' deadline in all, in pieces: it is read to its end and answered."""
    with connected(settled) as client:
        started = time.monotonic()
        client.sendall(HEAD + b"Connection: close\r\n\r\n")
        for at in range(0, len(BODY), 7):
            client.sendall(BODY[at : at + 7])
            end = time.monotonic() + 0.3
            wait_until(lambda end=end: time.monotonic() > end, "it pauses")  # type: ignore[misc]
        assert time.monotonic() - started > 3
        assert answer(client).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "cut", [5, len(HEAD), len(HEAD) + 2, len(HEAD) + 20, len(HEAD) + len(BODY)]
)
def test_half_requests(settled: Workspace, cut: int) -> None:
    """Clients that go away in the middle of a request, at each part of it, are no error of ours."""
    for _ in range(20):
        with connected(settled) as client:
            client.sendall((HEAD + b"\r\n" + BODY)[:cut])


@pytest.mark.parametrize(
    "junk",
    [
        HEAD + b"X-Giant: " + b"a" * 1_000_000 + b"\r\n\r\n",
        HEAD + b"".join(b"X-%d: y\r\n" % n for n in range(50_000)) + b"\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: d\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 100,
        b"\r\n" * 10_000 + b"NONSENSE\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: d\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n",
        (
            b"GET /nowhere HTTP/1.1\r\nHost: d\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n"
            b"\r\n0\r\n\r\n"
        ),
    ],
)
def test_giant_and_wrong_headers(settled: Workspace, junk: bytes) -> None:
    """A refusal and a closed connection; the memory does not grow with what is sent."""
    with connected(settled) as client:
        try:
            client.sendall(junk)
            client.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        said = answer(client)
    assert said == b"" or said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.1 431 "))


def test_pipelined_requests(settled: Workspace) -> None:
    """Five hundred requests in one write are answered in order."""
    request = b"GET /v1/models/m HTTP/1.1\r\nHost: d\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n"
    with connected(settled) as client:
        client.sendall(request * 500 + last)
        said = answer(client)
    assert said.count(b"HTTP/1.1 200 OK") == 501
    assert said.rstrip().endswith(b"}")
    assert b'"ok"' in said[-200:]


def test_thousand_connections(settled: Workspace) -> None:
    """Beyond the limit each is told so at once.

    The daemon has files left for its work, and all is well afterwards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(connected(settled)) for _ in range(1000)]
            assert answer(clients[-1]).startswith(b"HTTP/1.1 503 ")
            assert fds(settled) < 600
            Path(settled.root / "prompts/a.md").write_text("You are prompt A, edited.\n")
            wait_until(lambda: settled.built().count("a") == 2, "a build goes on meanwhile")
            kept = sum(1 for client in clients if not _refused(client))
            assert 16 <= kept <= 400
            warnings = settled.log_text().count(
                "warning connections refused status=503 reason='too many connections'"
            )
            assert 1 <= warnings < 100
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_until(lambda: fds(settled) < 100, "they are gone")


def test_running_out_of_files_is_said_once(workspace: Workspace) -> None:
    """It costs no traceback, no prompt and no socket; who comes later is served.

    The daemon may have 110 files here, more of which are connections than it has left itself.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    workspace.hurry(api__connection__OTHER_FILES=-500)
    workspace.memory_model()
    workspace.write("a.md", "You are prompt A.\n")
    workspace.declare("{a: a.md}")
    workspace.start()
    workspace.wait_state("a", "fresh")
    assert workspace.process is not None
    resource.prlimit(workspace.process.pid, resource.RLIMIT_NOFILE, (110, hard))
    with ExitStack() as stack:
        clients = [stack.enter_context(connected(workspace)) for _ in range(120)]
        workspace.logged("warning out of files")
        time.sleep(2.5)  # asyncio accepts again after a second each
        assert len(clients) == 120
        assert workspace.log_text().count("out of files") == 1
    wait_until(lambda: fds(workspace) < 60, "they are gone")
    workspace.write("a.md", "You are prompt A, edited.\n")
    wait_until(lambda: workspace.built().count("a") == 2, "the prompt is built")
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
    assert "Traceback" not in workspace.log_text()
    assert workspace.stop() == 0


def _refused(client: socket.socket) -> bool:
    client.settimeout(0.001)
    try:
        client.recv(1)
    except TimeoutError:
        return False
    except OSError:
        pass
    return True
