"""The documents' commands for the service, typed on a booted machine.

Root types them, so `sudo` is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from machine import UNIT, Machine

from tests.documents import DOCS, README, ROOT, blocks, commands

MODEL = "/srv/models/qwen3-0.6b.rkllm"
BY_OTHERS = (
    "make ",
    "sudo make ",
    "sudo apt ",
    "sudo rkcached demo ",
    "sudo rkcached init ",
    "sudoedit ",
    "curl ",
    "ssh ",
    "rkcached ",
)
"""What others run: test_readme.py names them."""


@pytest.fixture
def fresh(machine: Machine) -> Iterator[Machine]:
    """What `make install` leaves.

    With the engine `memory` and its model where the shipped manifest looks for one.
    """
    text = (ROOT / "etc/rkcached/manifest.yaml").read_text()
    assert f"path: {MODEL}" in text
    machine.write("/etc/rkcached/manifest.yaml", text.replace("kind: rkllm", "kind: memory"))
    machine.run("sh", "-c", "rm /etc/rkcached/prompts/*")
    machine.write(
        "/etc/rkcached/prompts/assistant.md",
        (ROOT / "etc/rkcached/prompts/assistant.md").read_text(),
    )
    machine.write(MODEL, '{"rkcached_memory_model": 1}')
    machine.run("useradd", "me")
    yield machine
    machine.run("sh", "-c", "userdel me; rm -rf /srv/models /usr/lib/librkllmrt.so")
    machine.systemctl("disable", UNIT)


def typed(machine: Machine, command: str) -> str:
    """In the folder where the user's own files are."""
    line = command.removeprefix("sudo ").replace("sudo ", "")
    return machine.run("sh", "-c", f"mkdir -p /typed && cd /typed && {line}", USER="me").stdout


def test_readme(fresh: Machine) -> None:
    """From a package to the first answer: `wait` returns with the line that README shows.

    A member may ask.
    """
    for command in commands(README):
        if command.startswith(BY_OTHERS):
            continue
        shown = typed(fresh, command)
        if "rkcached wait" in command:
            assert shown.startswith("1 fresh")
    assert fresh.ask("qwen3-0.6b/assistant", user="me")["rkcached"]["state"] == "hit"


@pytest.mark.long
def test_operating(fresh: Machine) -> None:
    """The page about the service, in its order.

    A prompt that is installed as it says becomes fresh.
    """
    fresh.write("/typed/new.md", "You are a new prompt.\n" * 20)
    shown = {}
    for command in commands(DOCS / "systemd.md"):
        if not command.startswith(BY_OTHERS):
            shown[command] = typed(fresh, command)
        if "enable --now" in command:
            fresh.wait_line("1 fresh")
    assert "ok, 1 model, 1 prompt" in shown["sudo rkcached check"]
    assert "Status: " in shown["systemctl status rkcached"]
    assert "qwen3-0.6b" in shown["journalctl -u rkcached MODEL=qwen3-0.6b"]
    fresh.wait_line("2 fresh")
    assert (
        fresh.run("stat", "-c", "%A %U:%G", "/etc/rkcached/prompts/new.md").stdout
        == "-rw-r----- root:rkcached\n"
    )
    places = re.findall(r"^\| `(/\S+)`", (DOCS / "systemd.md").read_text(), re.MULTILINE)
    assert len(places) == 8
    fresh.run("ls", "-d", *places)


@pytest.mark.parametrize(
    "page", ["manifest.md", pytest.param("rkllm.md", marks=pytest.mark.long), "troubleshooting.md"]
)
def test_other_pages(fresh: Machine, page: str) -> None:
    """Library, model and prompt are put in place, the service starts.

    Every question is answered.
    """
    for name in (
        "new.md",
        "librkllmrt.so",
        "qwen3-0.6b.rkllm",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        fresh.write(f"/typed/{name}", '{"rkcached_memory_model": 1}')
    fresh.systemctl("start", UNIT)
    fresh.wait_line("1 fresh")
    for command in commands(DOCS / page):
        if not command.startswith(BY_OTHERS):
            assert (
                typed(fresh, command)
                or " install " in command
                or ">" in command
                or "systemctl" in command
            )


@pytest.mark.long
def test_the_port(fresh: Machine) -> None:
    """The page's commands open a port on the loopback. It answers as the page shows."""
    text = (DOCS / "page.md").read_text()
    for command in commands(DOCS / "page.md"):
        if command.startswith(("sudo", "curl")):
            shown = typed(fresh, command)
    assert f"`curl` answers `{shown}`" in text
    fresh.run("rkcached", "port", "disable")


@pytest.mark.long
def test_ports_and_keys(fresh: Machine) -> None:
    """Every command of the page, on a machine with Docker's network; the first shows what it shows.

    `port disable` names the keys that remain.
    """
    fresh.run("ip", "link", "add", "docker0", "type", "bridge")
    fresh.run("ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
    shown = [typed(fresh, line) for line in commands(DOCS / "port.md") if line.startswith("sudo")]
    (example,) = [block for block in blocks(DOCS / "port.md", "") if block.startswith("open: ")]
    assert re.sub(r"rkc_[\w-]{43}", "KEY", shown[0]) == re.sub(r"rkc_[\w-]{43}", "KEY", example)
    assert len(shown) == 8
    closed = fresh.run("rkcached", "port", "disable").stdout
    assert "these keys remain: default, laptop, deploy;" in closed
    fresh.run("ip", "link", "delete", "docker0")


@pytest.mark.long
def test_the_drop_in(fresh: Machine) -> None:
    """The page's lines for a model in /home open that folder and nothing else of it."""
    (drop_in,) = blocks(DOCS / "systemd.md", "ini")
    fresh.run("mkdir", "-p", "/home/me/models")
    fresh.write("/home/me/models/q.rkllm", '{"rkcached_memory_model": 1}')
    manifest = fresh.read("/etc/rkcached/manifest.yaml")
    fresh.write("/etc/rkcached/manifest.yaml", manifest.replace(MODEL, "/home/me/models/q.rkllm"))
    fresh.drop_in("home", drop_in)
    fresh.systemctl("start", UNIT)
    fresh.wait_line("1 fresh")
    fresh.run("rm", "-r", "/home/me")
