"""`rkcached explain`: why a prompt cache is in its state, component by component."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from rkcached.api import words
from rkcached.api.status import artifact_figures
from rkcached.cli import explain_model, looks, names, output
from rkcached.cli.plan import action_data
from rkcached.cli.text_diff import TextDiff, text_diff
from rkcached.errors import SourceError, UsageError, counted, harmless, printable
from rkcached.host.settings import Settings
from rkcached.plan.vocabulary import STEPS, step_of
from rkcached.reconcile.observer import Observation
from rkcached.sources.names import hint_for
from rkcached.sources.records import Key

if TYPE_CHECKING:
    from rkcached.cli import forms


def run(settings: Settings, name: str, *, want_diff: bool, want_json: bool) -> int:
    """Explain MODEL/PROMPT, or MODEL."""
    if "/" not in name:
        if want_diff:
            raise UsageError(
                "--diff needs a prompt, not a model", hint=f"name one of its prompts: {name}/PROMPT"
            )
        return _run_model(settings, name, want_json=want_json)

    looks.need_place(settings)
    look = looks.look_as_service(settings, ask=True)
    key = names.key_of(name)
    data = explain_data(look, key, settings.cache_dir)
    diff = None
    if want_diff:
        diff = text_diff(look, key)
        data["diff"] = {
            "of": diff.of,
            "why": diff.why,
            "lines": list(diff.lines),
            "left_out": diff.left_out,
        }

    if want_json:
        output.print_json(data)
    else:
        console = output.console()
        print_explanation(console, data)
        if diff is not None:
            print_diff(console, diff)

    looks.need_store(settings)
    return os.EX_OK


def _run_model(settings: Settings, name: str, *, want_json: bool) -> int:
    """Explain a model: it needs no store."""
    look = looks.look_as_service(settings, ask=True)
    data = explain_model.model_data(look, name)
    if want_json:
        output.print_json(data)
    else:
        explain_model.print_model(output.console(), data)
    return os.EX_OK


def explain_data(look: Observation, key: Key, store: Path) -> forms.ExplainedPrompt:
    """The explanation as data.

    Errors: SourceError for a prompt that nobody declares and the store does not have.
    """
    assessment = next((a for a in look.assessments if a.key == key), None)
    if assessment is None:
        known = (str(a.key) for a in look.assessments)
        raise SourceError(f"there is no prompt {key}", hint=hint_for(str(key), known))

    wanted = look.desired.fingerprint(key)
    components = None
    if wanted:
        components = dict(wanted.components)

    tools = None
    if key in look.desired.prompts:
        tools = look.desired.prompts[key].tools

    artifact = look.inventory.artifacts.get(key)
    figures = None
    if artifact:
        figures = artifact_figures(artifact)

    action = None
    next_step = ""
    if assessment.action:
        action = action_data(assessment.action)
        next_step = STEPS[step_of(assessment.action)].next_step

    return {
        "format": 1,
        "store": str(store),
        "model": key.model,
        "prompt": key.prompt,
        "state": assessment.state.value,
        "learned": key in look.desired.learned,
        "reason": assessment.reason,
        "hint": assessment.hint,
        "description": assessment.description,
        "tools": list(tools.names) if tools is not None else [],
        "changes": [
            {"component": c.component, "old": c.old, "new": c.new} for c in assessment.changes
        ],
        "action": action,
        "next_step": next_step,
        "wanted": components,
        "artifact": figures,
        "lines": [str(change) for change in assessment.changes],
    }


def print_explanation(console: Console, explanation: forms.ExplainedPrompt) -> None:
    data: dict[str, Any] = words.printable_all(explanation)
    console.print(Text(f"{words.name_of(data)}: {words.state_of(data)}", style="bold"))
    if data["description"]:
        console.print(Text(f"  {data['description']}", style="dim"))

    if data["tools"]:
        console.print(Text(f"  tools: {', '.join(data['tools'])}", style="dim"))

    if data["lines"]:
        for line in data["lines"]:
            console.print(Text(f"  {line}"))
    elif data["reason"] not in ("", data["state"]):
        console.print(Text(f"  {data['reason']}"))

    if data["hint"]:
        console.print(Text(f"  {data['hint']}", style="dim"))
    if data["artifact"]:
        _print_artifact(console, data["artifact"])

    if data["next_step"]:
        console.print(Text(f"  {data['next_step']}"))

    console.print(Text(f"  store {data['store']}", style="dim"), soft_wrap=True)


# What is compared, and the two sides of it.
_SIDES = {
    "text": ("the prompt's text when its prompt cache was built", "its text now"),
    "rendered": ("the rendered text when the prompt cache was built", "the rendered text now"),
}

_DIFF_STYLES = {"-": "red", "+": "green", "@": "cyan"}


def print_diff(console: Console, diff: TextDiff) -> None:
    if diff.why:
        console.print(Text(printable(f"diff: {diff.why}")))
        return

    old, new = _SIDES[diff.of]
    console.print(Text(f"--- {old}\n+++ {new}", style="bold"))
    for line in diff.lines:
        style = _DIFF_STYLES.get(line[0], "")
        console.print(Text(harmless(line), style=style), soft_wrap=True)
    if diff.left_out:
        left_out = counted(diff.left_out, "more line")
        console.print(Text(f"{left_out} of the difference are not shown", style="dim"))


def _print_artifact(console: Console, artifact: dict[str, Any]) -> None:
    came = f"built {words.when(artifact['built_at'])}"
    if imported := artifact["imported"]:
        proof = "compared with a prefill"
        if imported["signed_by"]:
            proof = f"signed by {imported['signed_by']}"
        came = f"imported {words.when(imported['at'])}, {proof}"

    tokens = words.number(artifact["tokens"])
    size = words.size(artifact["size_bytes"])
    console.print(Text(f"  {came}: {tokens} tokens, {size}"))
    if artifact["verified"] != "off":
        gain = ""
        if not artifact["gain"]:
            gain = "; no gain"

        console.print(
            Text(
                f"  time to first token {words.milliseconds(artifact['cold_ttft_ms'])} cold, "
                f"{words.milliseconds(artifact['warm_ttft_ms'])} warm{gain} (verified: "
                f"{artifact['verified']})"
            )
        )
