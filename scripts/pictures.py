"""Draw the pictures of docs/page.md: the page in four forms, and `status --watch`.

    make pictures     (it needs Chromium and systemd-socket-proxyd)

A daemon of its own with the memory engine has something of each kind to show. Its model takes 1 ms
for each token, so the times say nothing about a real one.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/system")]

from browser import Browser, Port  # noqa: E402 - its folder is no package

from rkcached.api import words  # noqa: E402
from rkcached.cli.client import Client  # noqa: E402
from rkcached.cli.launcher import Daemon, Workspace, is_settled  # noqa: E402
from rkcached.cli.status.browsing import Browsing  # noqa: E402
from rkcached.cli.status.picture import picture  # noqa: E402

PICTURES = ROOT / "docs/pictures"
WIDTHS = {"wide": 1440, "narrow": 390}
SCHEMES = ("light", "dark")

MOST_BYTES = 150_000
"""A picture must be smaller, as every clone has it."""

MODEL = "qwen3-0.6b"
MANIFEST = f"""\
version: 1
engine: {{kind: memory}}
cache: {{max_bytes: 2000000}}
models:
  {MODEL}:
    path: model
    params: {{max_context_len: 4096}}
    prompts:
      system: system.md
      coding_rules: {{files: coding_rules.md, description: house rules for code}}
      greenhouse: {{files: greenhouse.md, description: sensors and valves}}
      reviewer: reviewer.md
"""
LINES = {"system": 30, "coding_rules": 85, "greenhouse": 46, "reviewer": 67, "travel": 50}
NO_LONGER_DECLARED = "      travel: travel.md\n"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="rkcached-pictures-") as folder:
        space = Workspace.at(Path(folder))
        model = {"rkcached_memory_model": 1, "prefill_us_per_token": 1000}
        (space.root / "model").write_text(json.dumps(model))
        for name, count in LINES.items():
            _write(space, name, count)
        space.manifest.write_text(MANIFEST + NO_LONGER_DECLARED)

        with Daemon(space, log=space.log) as daemon:
            _wait_until(daemon, is_settled)
            space.manifest.write_text(MANIFEST)
            _wait_until(daemon, lambda status: bool(status["retired"]))

        with Daemon(space, log=space.log) as daemon:
            _wait_until(daemon, is_settled)
            _use(daemon)
            _write(space, "reviewer", 400)
            _wait_until(daemon, _reviewer_is_blocked)
            _draw_page(space)
            _draw_terminal(daemon.status())


def _write(space: Workspace, name: str, count: int) -> None:
    (space.root / f"{name}.md").write_text(_text(name, count))


def _text(name: str, count: int) -> str:
    return "".join(f"{name}, line {number}: be kind and brief.\n" for number in range(count))


def _wait_until(daemon: Daemon, happened: Callable[[dict[str, Any]], bool]) -> None:
    """Errors: StillWaiting."""
    for status in daemon.statuses(timeout_s=60):
        if happened(status):
            return


def _reviewer_is_blocked(status: dict[str, Any]) -> bool:
    return any(
        (one["prompt"], one["state"]) == ("reviewer", "blocked") for one in status["prompts"]
    )


def _use(daemon: Daemon) -> None:
    """Some answers of each kind."""
    with daemon.client() as client:
        for name, count in {"greenhouse": 9, "reviewer": 4, "coding_rules": 5}.items():
            for _ in range(count):
                _ask(client, f"{MODEL}/{name}")
        for _ in range(2):
            _ask(client, f"{MODEL}/greenhouse", cache=False)
        text = _text("coding_rules", 60) + "From here on it is another text."
        _ask(client, MODEL, system=text)
        _ask(client, f"{MODEL}/system")


def _ask(client: Client, model: str, *, system: str = "", **more: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    client.chat({"model": model, "messages": messages, "max_tokens": 4, **more})


def _draw_page(space: Workspace) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="rkcached-profile-") as profile,
        Port(space.socket) as port,
        Browser(Path(profile)) as browser,
    ):
        for form, width in WIDTHS.items():
            for scheme in SCHEMES:
                _draw(browser, port.url, PICTURES / f"page-{form}-{scheme}.png", width, scheme)


def _draw(browser: Browser, url: str, file: Path, width: int, scheme: str) -> None:
    """The whole page as it is in a window of this width."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[feature])
    metrics = {"width": width, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.call("Emulation.setDeviceMetricsOverride", height=400, **metrics)
    browser.open(url)
    height = browser.run("document.documentElement.scrollHeight")
    browser.call("Emulation.setDeviceMetricsOverride", height=height, **metrics)
    shot = browser.call("Page.captureScreenshot", format="png")
    _keep(file, base64.b64decode(shot["data"]))


def _draw_terminal(status: dict[str, Any]) -> None:
    console = Console(record=True, file=io.StringIO(), width=100, height=20, force_terminal=True)
    second = words.name_of(Browsing().rows(status["prompts"])[1])
    drawn = picture(words.shown(status), console, browsing=Browsing(chosen=second))
    console.print(*drawn.parts, sep="\n")
    text = console.export_svg(title="rkcached status --watch", unique_id="rkcached")
    _keep(PICTURES / "status.svg", text.encode())


def _keep(file: Path, data: bytes) -> None:
    if len(data) >= MOST_BYTES:
        sys.exit(f"{file.name} has {len(data):,} bytes, and must have fewer than {MOST_BYTES:,}")
    file.write_bytes(data)
    print(f"{file.relative_to(ROOT)}: {len(data):,} bytes")


if __name__ == "__main__":
    main()
