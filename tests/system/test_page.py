"""`GET /`: the page as any client gets it, and in a real browser through a port."""

from __future__ import annotations

import getpass
import json
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from browser import Browser, Port
from conftest import Workspace, need

from tests.ports import free_port
from tests.waiting import DEADLINE_S, wait_until

ROOT = Path(__file__).parents[2]
HOSTILE = "<script>document.title = 'taken'</script><img src=http://example.invalid/x>"


@pytest.fixture
def described(workspace: Workspace) -> Workspace:
    """A running daemon with the prompts `a` and `b`; the description of `b` is markup."""
    workspace.memory_model(
        prefill_us_per_token=2000
    )  # no gain, on a busy machine, would be said in place of it
    workspace.write("prompts/a.md", "You are prompt A.\n")
    workspace.write("prompts/b.md", "You are prompt B.\n" * 10)
    workspace.declare(
        f"{{a: prompts/a.md, b: {{files: prompts/b.md, description: {json.dumps(HOSTILE)}}}}}"
    )
    workspace.start()
    workspace.wait_settled()
    return workspace


def test_the_page_on_both_sockets(described: Workspace) -> None:
    """It has what the status has, is bound to itself by its policy, and escapes what it shows."""
    for admin in (False, True):
        with described.http(admin=admin) as client:
            answer = client.get("/")
            assert client.head("/").status_code == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "connect-src 'self'" in policy
        assert not {"http:", "https:", "*", "'unsafe-inline'", "'unsafe-eval'"} & set(
            policy.replace(";", " ").split()
        )
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "m/a" in answer.text
        assert "2 fresh" in answer.text
        assert HOSTILE not in answer.text
        assert "&lt;script&gt;document" in answer.text
        assert answer.text.count("<script") == 1


def test_the_page_in_a_browser(described: Workspace, tmp_path: Path) -> None:
    """It shows the prompts, and follows an edit and an answer without being loaded again.

    It also follows a restart of the daemon.

    It asks nobody but the daemon and has no complaints; a phone's width and a dark scheme are fine.
    """
    with Port(described.socket) as port, Browser(tmp_path / "profile") as browser:
        browser.open(port.url)
        assert browser.run("document.querySelectorAll('#prompts tr').length") == 2
        assert "m/a" in browser.text("#prompts")
        assert HOSTILE in browser.text("#prompts")
        browser.run("globalThis.stays = 1")
        described.write("prompts/a.md", "")
        browser.wait_for("document.querySelector('#prompts .blocked') !== null")
        assert "the prompt is empty" in browser.text("#prompts")
        described.write("prompts/a.md", "Another text.\n")
        browser.wait_for("document.querySelectorAll('#prompts .fresh').length === 2")
        described.ask("m/a")
        browser.wait_for("document.querySelectorAll('#figures rect.good').length === 1")
        assert "1 hit" in browser.text("#figures")
        described.write("manifest.yaml", described.manifest.read_text() + "nonsense: 1\n")
        browser.wait_for("document.querySelector('#head .bad') !== null")
        assert browser.run("globalThis.stays") == 1
        assert browser.run("document.title").endswith("rkcached")
        assert browser.complaints == []
        assert [
            url for url in browser.requests if not url.startswith((port.url, "data:", "about:"))
        ] == []

        light = browser.run("getComputedStyle(document.body).backgroundColor")
        browser.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark"}],
        )
        assert browser.run("getComputedStyle(document.body).backgroundColor") != light
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=360,
            height=740,
            deviceScaleFactor=1,
            mobile=True,
        )
        assert browser.run("document.scrollingElement.scrollWidth") <= 360
        told = (
            "document.addEventListener('securitypolicyviolation', (event) => "
            "done(event.effectiveDirective))"
        )
        asked = f"new Promise((done) => {{ {told}; fetch('http://127.0.0.1:1/').catch(() => 0) }})"
        assert browser.run(asked) == "connect-src"

        described.write(
            "manifest.yaml", described.manifest.read_text().replace("nonsense: 1\n", "")
        )
        assert described.stop() == 0
        browser.wait_for("!document.getElementById('gone').hidden")
        assert "waiting; the figures are of " in browser.text("#gone")
        described.start()
        browser.wait_for(
            "document.getElementById('head').innerText.includes('pid "
            f"{described.status()['pid']},')"
        )
        browser.wait_for("document.getElementById('gone').hidden")
        assert browser.run("globalThis.stays") == 1


LONG_WIDTHS = [pytest.param(width, marks=pytest.mark.long) for width in (1000, 992, 780)]


@pytest.mark.parametrize("width", [1400, *LONG_WIDTHS, 380])
def test_each_width_shows_all(workspace: Workspace, tmp_path: Path, width: int) -> None:
    """Nothing is cut off or off the window.

    Not a name of 64 letters, a state, a figure, a long note or a path.

    Where there is no room for columns, the state stands beside the name, and figures have theirs
    before them.
    """
    workspace.memory_model(prefill_us_per_token=2000)
    workspace.write("prompts/a.md", "You are prompt A.\n" * 10)
    workspace.write("prompts/b.md", "")
    long = f"{'a' * 20}_{'b' * 43}"
    description = json.dumps("w" * 90 + " \u202e words" * 9)
    a = f"{{files: prompts/a.md, description: {description}}}"
    workspace.declare(f"{{{long}: {a}, b: prompts/b.md}}")
    workspace.start()
    workspace.wait_settled()
    with Port(workspace.socket) as port, Browser(tmp_path / "profile") as browser:
        browser.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=700,
            deviceScaleFactor=1,
            mobile=False,
        )
        browser.open(port.url)
        assert browser.run("document.scrollingElement.scrollWidth") <= width
        cells = (
            "[...document.querySelectorAll('tbody tr > *')].filter((cell) => cell.innerText.trim())"
        )
        out = (
            f"{cells}.filter((cell) => cell.scrollWidth > cell.clientWidth || "
            "!cell.checkVisibility()).length"
        )
        assert browser.run(out) == 0
        assert (
            browser.run(f"Math.max(...{cells}.map((cell) => cell.getBoundingClientRect().right))")
            <= width
        )
        text = browser.text("#prompts")
        assert all(
            words in text
            for words in (f"m/{long}", "fresh", "blocked", "the prompt is empty", r"\u202e words")
        )
        where = "document.querySelector('#prompts {}').getBoundingClientRect().{}"
        assert browser.run(where.format(".state", "top")) == browser.run(
            where.format(".name", "top")
        )
        labels = browser.run(
            "getComputedStyle(document.querySelector('[data-label=cold]'), '::before').content"
        )
        assert (labels == "none") == (width > 992)
        assert browser.complaints == []


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Path]:
    """The configuration of an ssh client that knows a host named `board`.

    A real sshd on this machine.
    """
    sshd, port = need("sshd"), free_port()
    for name in ("host", "user"):
        subprocess.run(
            [need("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True
        )
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path / 'host'}\nPidFile none\nUsePAM no\n"
        "StrictModes no\n"
        f"AuthorizedKeysFile {tmp_path / 'user.pub'}\nPermitRootLogin prohibit-password\n"
    )
    (tmp_path / "ssh_config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {tmp_path / 'user'}\n  IdentitiesOnly yes\n  ExitOnForwardFailure yes\n"
        f"  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(
            mode=0o755, exist_ok=True
        )  # where it puts itself; its service makes it
    server = subprocess.Popen(
        [sshd, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: answers(port), "sshd listens")
        yield tmp_path / "ssh_config"
    finally:
        server.terminate()
        server.wait(DEADLINE_S)


def test_the_ssh_command(described: Workspace, desk: Path) -> None:
    """The guide's own line.

    But for port, socket and the desk's configuration, brings the page to a port.
    """
    (command,) = re.findall(r"^ssh -N .*$", (ROOT / "docs/page.md").read_text(), re.MULTILINE)
    port = free_port()
    words = shlex.split(
        command.replace(":8080:/run/rkcached/rkcached.sock", f":{port}:{described.socket}")
    )
    assert f"127.0.0.1:{port}:{described.socket}" in words
    client = subprocess.Popen([need("ssh"), "-F", desk, *words[1:]], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port), "the port is carried")
        assert "2 fresh" in httpx.get(f"http://localhost:{port}/").text
    finally:
        client.terminate()
        client.wait(DEADLINE_S)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
