"""A daemon as docs/programs.md has it, and the lines of that page with its port and its key."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Workspace, need

from tests.documents import DOCS, blocks_under
from tests.ports import free_port
from tests.waiting import DEADLINE_S

PAGE = DOCS / "programs.md"
MODEL = "qwen3-0.6b"
PROMPT = "assistant"
ANSWER = "Good day."
"""What the model says to `hello`, whatever the prompt."""

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "water",
        "description": "Waters a plant.",
        "parameters": {
            "type": "object",
            "properties": {"plant": {"type": "string"}},
            "required": ["plant"],
        },
    },
}

_PAGE_URL = "http://127.0.0.1:11434"
_PAGE_KEY = "rkc_oB1GhYyqjy4jYw7YwXyJmPpZzX6m1cVv0N5q2S8dE3k"
_RUN_S = 180.0


class Served:
    """A daemon with a port and a key, and a home for the programs."""

    def __init__(self, space: Workspace) -> None:
        self.space = space
        self.url = f"http://127.0.0.1:{free_port()}"
        self.home = space.root / "home"
        self.home.mkdir()
        self.key = ""

    @property
    def installed(self) -> Path:
        """Where `make test-programs` has put the programs."""
        return Path(os.environ["RKCACHED_PROGRAMS"])

    @property
    def admin(self) -> dict[str, Any]:
        """The status with the answers to everybody."""
        status: dict[str, Any] = self.space.request("GET", "/v1/status", admin=True).json()
        return status

    def declare(self, prompts: dict[str, Any]) -> None:
        model = {
            "path": "m.model",
            "chat_template": "qwen3",
            "params": {"max_context_len": 200_000, "max_new_tokens": 400},
            "prompts": prompts,
        }
        manifest = {"version": 1, "engine": {"kind": "memory"}, "models": {MODEL: model}}
        self.space.write("manifest.yaml", yaml.safe_dump(manifest, sort_keys=False))

    def start(self) -> None:
        self.key = self.space.cli("key", "add", "programs").stdout.strip()
        self.space.start("--listen", self.url.removeprefix("http://"))
        self.space.wait_settled()

    # The page

    def lines(self, title: str, language: str, place: int = 0) -> str:
        """A block of the page below a heading, with this daemon's port and key."""
        return self.filled(blocks_under(PAGE, title, language)[place])

    def filled(self, text: str) -> str:
        return text.replace(_PAGE_URL, self.url).replace(_PAGE_KEY, self.key)

    # Programs

    def run(
        self, command: Sequence[str | Path], *, cwd: Path | None = None, code: int | None = 0
    ) -> str:
        """Run a program with the exports of the page; it must exit with `code` (None: any)."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment(),
            cwd=cwd or self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_RUN_S,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def environment(self) -> dict[str, str]:
        """Of a user who pasted the lines of the page, and has nothing else."""
        exports = self.lines("Programs", "") + self.lines("Ollama's client", "")
        pasted = [line.removeprefix("export ") for line in exports.splitlines()]
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "TMPDIR": str(self.space.root),
            **dict(line.split("=", 1) for line in pasted if "=" in line),
        }

    def python(self, code: str, group: str = "programs") -> str:
        """What a script prints with the packages of a group of pyproject.toml."""
        script = self.space.write("home/script.py", code)
        return self.run([self.installed / group / "bin" / "python", script])

    def node(self, code: str) -> str:
        """What a module prints; npm's packages are found from its place."""
        script = self.space.write("home/script.mjs", code)
        modules = self.home / "node_modules"
        if not modules.exists():
            modules.symlink_to(self.installed / "node_modules")
        return self.run([need("node"), "--preserve-symlinks-main", script])

    # What became of it

    def states(self, at_least: int = 1) -> list[str]:
        """Of all answers so far; an answer may be counted after its last byte was read."""
        end = time.monotonic() + DEADLINE_S
        while True:
            recent = self.admin["recent"]
            if len(recent) >= at_least:
                return [answer["state"] for answer in recent]
            if time.monotonic() > end:
                pytest.fail(f"of {at_least} answers there are {recent}")
            time.sleep(0.05)

    def was_hit(self, at_least: int = 1) -> bool:
        """Whether all answers came from a prompt cache."""
        return set(self.states(at_least)) == {"hit"}
