"""`rkcached explain`: why a prompt cache is in its state, component by component."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.text import Text

from rkcached.api import words
from rkcached.api.status import artifact_figures
from rkcached.cli import explain_model, looks, names, output
from rkcached.cli.plan import action_data
from rkcached.cli.status import show
from rkcached.errors import SourceError
from rkcached.host.settings import Settings
from rkcached.reconcile.observer import Observation
from rkcached.sources.records import Key


def run(settings: Settings, name: str, *, want_json: bool) -> int:
    """Explain MODEL/PROMPT, or MODEL."""
    if "/" not in name:
        return _run_model(settings, name, want_json=want_json)

    looks.need_place(settings)
    look = looks.look_as_service(settings, ask=True)
    data = explain_data(look, names.key_of(name)) | {"store": str(settings.cache_dir)}
    if want_json:
        output.print_json(data)
    else:
        print_explanation(output.console(), data)

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


def explain_data(look: Observation, key: Key) -> dict[str, Any]:
    """The explanation as data.

    Errors: SourceError for a prompt that nobody declares and the store does not have.
    """
    assessment = next((a for a in look.assessments if a.key == key), None)
    if assessment is None:
        known = (str(a.key) for a in look.assessments)
        raise SourceError(f"there is no prompt {key}", hint=names.hint_for(str(key), known))

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
    if assessment.action:
        action = action_data(assessment.action)

    return {
        "model": key.model,
        "prompt": key.prompt,
        "state": assessment.state.value,
        "reason": assessment.reason,
        "hint": assessment.hint,
        "description": assessment.description,
        "tools": list(tools.names) if tools is not None else [],
        "changes": [
            {"component": c.component, "old": c.old, "new": c.new} for c in assessment.changes
        ],
        "action": action,
        "wanted": components,
        "artifact": figures,
        "lines": [str(change) for change in assessment.changes],
    }


# The next step of the daemon, by action.
_NEXT = {
    "build": "the daemon builds it at its next check",
    "adopt": "the daemon adopts that prompt cache at its next check, without a prefill",
    "retire": "the daemon retires it at its next check",
}


def print_explanation(console: Console, data: dict[str, Any]) -> None:
    data = words.printable_all(data)
    console.print(Text(f"{data['model']}/{data['prompt']}: {data['state']}", style="bold"))
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

    action = ""
    if data["action"]:
        action = data["action"]["action"]
    if action in _NEXT:
        console.print(Text(f"  {_NEXT[action]}"))

    console.print(Text(f"  store {data['store']}", style="dim"), soft_wrap=True)


def _print_artifact(console: Console, artifact: dict[str, Any]) -> None:
    came = f"built {show.when(artifact['built_at'])}"
    if imported := artifact["imported"]:
        proof = "compared with a prefill"
        if imported["signed_by"]:
            proof = f"signed by {imported['signed_by']}"
        came = f"imported {show.when(imported['at'])}, {proof}"

    size = words.size(artifact["size_bytes"])
    console.print(Text(f"  {came}: {artifact['tokens']} tokens, {size}"))
    if artifact["verified"] != "off":
        gain = ""
        if not artifact["gain"]:
            gain = "; no gain"

        console.print(
            Text(
                f"  time to first token {artifact['cold_ttft_ms']:.0f} ms cold, "
                f"{artifact['warm_ttft_ms']:.0f} ms warm{gain} (verified: "
                f"{artifact['verified']})"
            )
        )
