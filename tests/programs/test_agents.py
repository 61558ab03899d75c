"""Programs with a system message of their own: recorded, declared, and then a hit.

All by the lines of docs/programs.md: the recorder, the import, the program's own settings.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.documents import commands
from tests.ports import free_port
from tests.programs.served import ANSWER, MODEL, PAGE, Served
from tests.waiting import wait_until

OWN = "Programs with a system message of their own"


@contextmanager
def recorder(served: Served) -> Iterator[str]:
    """The page's script on another port; it writes requests.jsonl."""
    port = free_port()
    served.space.write("record.py", served.lines(OWN, "python").replace("8000", str(port)))
    process = subprocess.Popen(
        [sys.executable, "record.py"], cwd=served.space.root, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def aider(served: Served) -> str:
    (command,) = served.lines("aider", "").strip().splitlines()
    _, *options = command.split()
    program = served.installed / "programs-aider/bin/aider"
    return served.run(
        [
            *(program, *options, "--no-check-update", "--analytics-disable", "--no-git"),
            *("--yes-always", "--message", "hello"),
        ],
        code=None,
    )


def opencode(served: Served) -> str:
    # The memory engine's tokens are bytes; near its context OpenCode summarizes again and again.
    lines = served.lines("OpenCode", "json").replace("32768", "200000")
    served.space.write("home/opencode.json", lines)
    program = served.installed / "node_modules/.bin/opencode"
    return served.run([program, "run", "hello"], code=None)


def continue_(served: Served) -> str:
    served.space.write("home/.continue/config.yaml", served.lines("Continue", "yaml"))
    program = served.installed / "node_modules/.bin/cn"
    config = served.home / ".continue/config.yaml"
    return served.run([program, "--config", config, "-p", "hello"], code=None)


def pydantic_ai(served: Served) -> str:
    """An agent with instructions and a tool of its own, asking by chat completions."""
    script = served.space.write(
        "home/script.py",
        "from pydantic_ai import Agent\n"
        "agent = Agent('openai-chat:qwen3-0.6b', instructions='You water plants.')\n"
        "@agent.tool_plain\n"
        "def water(plant: str) -> str:\n"
        "    'Waters a plant.'\n"
        "    return f'watered {plant}'\n"
        "print(agent.run_sync('Water the fern').output)\n",
    )
    return served.run([served.installed / "programs/bin/python", script], code=None)


RUNS: dict[str, tuple[Callable[[Served], str], int]] = {
    "aider": (aider, 1),
    "OpenCode": (opencode, 2),
    "Continue": (continue_, 1),
    "pydantic-ai": (pydantic_ai, 2),
}
"""How each is run, and how many answers it gets: OpenCode asks for a title, too."""


@pytest.mark.parametrize("title", RUNS)
def test_what_was_recorded_is_a_hit(served: Served, title: str) -> None:
    run, answers = RUNS[title]
    real = served.url
    with recorder(served) as url:
        served.url = url
        run(served)
    served.url = real
    recorded = served.space.root / "requests.jsonl"
    assert recorded.exists()

    (command,) = [line for line in commands(PAGE) if line.startswith("rkcached prompts import")]
    printed = served.space.cli(*command.split()[1:]).stdout
    made = yaml.safe_load(printed)["models"][MODEL]["prompts"]
    manifest = yaml.safe_load(served.space.manifest.read_text())
    manifest["models"][MODEL]["prompts"] |= made
    Path(served.space.manifest).write_text(yaml.safe_dump(manifest))
    for name in made:
        wait_until(
            lambda name=name: served.space.prompt(name, MODEL).get("state") == "fresh",
            f"{name} is fresh",
        )

    said = run(served)
    assert ANSWER in said, said
    assert served.was_hit(answers)
