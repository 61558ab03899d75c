"""Plain `pytest` does not collect these: `make test-programs` installs the programs first."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from conftest import Workspace, workspace

from tests.programs.served import ANSWER, MODEL, PROMPT, TOOL, Served

__all__ = ["workspace"]

collect_ignore_glob = [] if "RKCACHED_PROGRAMS" in os.environ else ["test_*.py"]

TEXT = "You look after a greenhouse. You answer in one sentence, and you name the plant.\n"
CALL = '<tool_call>\n{"name": "water", "arguments": {"plant": "fern"}}\n</tool_call>'


@pytest.fixture
def served(workspace: Workspace) -> Iterator[Served]:
    """A daemon with a port, a key, and the prompts `assistant` and, with a tool, `gardener`."""
    script = {"user\nhello": ANSWER, "Water the fern": CALL, "watered fern": ANSWER}
    workspace.memory_model(context_tokens=200_000, prefill_us_per_token=2, script=script)
    workspace.write("prompts/assistant.md", TEXT)
    workspace.write("prompts/gardener.tools.json", json.dumps([TOOL]))
    served = Served(workspace)
    served.declare(
        {
            PROMPT: "prompts/assistant.md",
            "gardener": {"files": "prompts/assistant.md", "tools": "prompts/gardener.tools.json"},
        }
    )
    served.start()
    assert served.space.prompt(PROMPT, MODEL)["hits"] == 0
    return served
