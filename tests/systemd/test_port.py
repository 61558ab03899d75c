"""A TCP port of the service: systemd opens it, and the sandbox without a network serves it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from machine import SOCKET, UNIT, Machine

ADDRESS = "127.0.0.1:11434"
BRIDGE = "172.17.0.1"
DROP_IN = "/etc/systemd/system/rkcached.socket.d/port.conf"


@pytest.fixture
def board(machine: Machine) -> Iterator[Machine]:
    """The service runs, and no port is open, neither before nor afterwards."""
    machine.systemctl("start", UNIT)
    machine.wait_line("2 fresh")
    yield machine
    machine.run("rkcached", "port", "disable", code=None)
    machine.run("ip", "link", "delete", "docker0", code=None)


def curl(machine: Machine, url: str, key: str = "", body: Any = None) -> tuple[int, dict[str, Any]]:
    command = ["curl", "-sS", "--max-time", "50", "-w", "\n%{http_code}"]
    if key:
        command += ["-H", f"authorization: Bearer {key}"]
    if body is not None:
        command += ["-H", "content-type: application/json", "-d", json.dumps(body)]
    done = machine.run(*command, url, code=None)
    if done.returncode:
        return 0, {"curl": done.stderr.strip()}
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer)


def enable(machine: Machine, *options: str) -> dict[str, Any]:
    done = machine.run("rkcached", "port", "enable", ADDRESS, *options, "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_port_is_opened_and_closed(board: Machine) -> None:
    """From one command to the first answer, over a socket that the sandbox could not open.

    The unit has no network, may use Unix sockets only and denies all addresses. What systemd passes
    belongs to the socket's own unit. The Unix socket is served as before.
    """
    assert board.show("PrivateNetwork") == "yes"
    assert board.show("RestrictAddressFamilies") == "AF_UNIX"
    assert "0.0.0.0/0" in board.show("IPAddressDeny")

    opened = enable(board)
    key = opened["key"]["key"]
    assert opened["base_urls"] == [f"http://{ADDRESS}/v1"]
    assert curl(board, f"http://{ADDRESS}/v1/models")[1]["error"]["code"] == "invalid_api_key"
    hello = [{"role": "user", "content": "hello"}]
    body = {"model": "m/a", "messages": hello, "max_tokens": 8}
    status, answer = curl(board, f"http://{ADDRESS}/v1/chat/completions", key, body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
    assert board.ask("m/a")
    entry = next(e for e in board.journal("EVENT=request") if e.get("KEY") == "default")
    assert entry["PEER"] == "127.0.0.1"
    kept = board.run("stat", "-c", "%a %U:%G", "/var/lib/rkcached/keys.json").stdout.strip()
    assert kept == "600 rkcached:rkcached"

    again = enable(board)
    assert again["changed"] is False
    assert again["key"]["key"] is None
    assert curl(board, f"http://{ADDRESS}/v1/models", key)[0] == 200

    board.run("rkcached", "key", "revoke", "default")
    assert curl(board, f"http://{ADDRESS}/v1/models", key)[0] == 401
    other = board.run("rkcached", "key", "add", "other").stdout.strip()
    assert curl(board, f"http://{ADDRESS}/v1/models", other)[0] == 200

    closed = board.run("rkcached", "port", "disable").stdout
    assert "the port is closed" in closed
    assert "other" in closed
    assert curl(board, f"http://{ADDRESS}/v1/models", other)[0] == 0
    assert board.run("test", "-e", DROP_IN, code=1)
    assert board.ask("m/a")
    board.run("rkcached", "key", "revoke", "other")


@pytest.mark.long
def test_the_first_request_over_the_port_starts_the_daemon(board: Machine) -> None:
    key = enable(board)["key"]["key"]
    board.systemctl("stop", UNIT)
    assert board.show("ActiveState") == "inactive"
    assert curl(board, f"http://{ADDRESS}/v1/models", key)[0] == 200
    assert board.show("ActiveState") == "active"
    board.run("rkcached", "key", "revoke", "default")


@pytest.mark.long
def test_the_loopback_without_a_key(board: Machine) -> None:
    opened = enable(board, "--without-key")
    assert opened["key"] is None
    assert curl(board, f"http://{ADDRESS}/v1/models")[0] == 200
    assert enable(board)["changed"] is True
    assert curl(board, f"http://{ADDRESS}/v1/models")[0] == 401
    board.run("rkcached", "key", "revoke", "default")


@pytest.mark.long
def test_containers(board: Machine) -> None:
    """The port listens on Docker's network, too, before and after that is there.

    Without one, the command says so.
    """
    said = board.run("rkcached", "port", "enable", ADDRESS, "--container", code=66).stderr
    assert "no network of containers" in said
    assert "--container-address" in said

    key = enable(board, "--container-address", BRIDGE)["key"]["key"]
    board.run("ip", "link", "add", "docker0", "type", "bridge")
    board.run("ip", "addr", "add", f"{BRIDGE}/16", "dev", "docker0")
    board.run("ip", "link", "set", "docker0", "up")
    assert curl(board, f"http://{BRIDGE}:11434/v1/models")[0] == 401
    assert curl(board, f"http://{BRIDGE}:11434/v1/models", key)[0] == 200
    opened = enable(board, "--container")
    assert opened["changed"] is False
    assert "http://host.docker.internal:11434/v1" in opened["base_urls"]

    enable(board, "--container", "--without-key")
    said = board.run("rkcached", "port", "enable", ADDRESS, "--container", "--without-key").stdout
    assert "every program on this machine can use the models without a key" in said
    assert curl(board, f"http://{ADDRESS}/v1/models")[0] == 200
    assert curl(board, f"http://{BRIDGE}:11434/v1/models")[0] == 401
    board.run("rkcached", "key", "revoke", "default")


def test_a_port_that_is_taken_leaves_all_as_it_was(board: Machine) -> None:
    board.systemctl("stop", "rkcached-taker.service", code=None)
    taker = "import socket, time; s = socket.create_server(('127.0.0.1', 11434)); time.sleep(600)"
    board.run("systemd-run", "--unit=rkcached-taker", "/usr/bin/python3", "-c", taker)
    board.run(
        "sh", "-c", "for i in $(seq 100); do ss -ltn | grep -q 11434 && exit; sleep 0.1; done"
    )
    said = board.run("rkcached", "port", "enable", ADDRESS, code=73).stderr
    board.systemctl("stop", "rkcached-taker.service")
    assert "Address already in use" in said
    assert board.run("test", "-e", DROP_IN, code=1)
    assert board.run("test", "-S", SOCKET)
    assert board.ask("m/a")
