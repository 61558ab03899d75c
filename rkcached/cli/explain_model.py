"""The part of `rkcached explain` about a model: its chat template, special tokens and state."""

from __future__ import annotations

import contextlib
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from rkcached.api import words
from rkcached.cli.windows import context_bytes
from rkcached.engines.registry import ENGINES, EngineEntry
from rkcached.engines.states import StateKind
from rkcached.errors import SourceError
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.observer import Observation
from rkcached.sources.names import hint_for
from rkcached.sources.records import TemplateOrigin, Trouble

_ORIGINS: Final = {
    TemplateOrigin.BUILT_IN: "built in, named by the manifest",
    TemplateOrigin.FILE: "named by the manifest",
    TemplateOrigin.MODEL: "the model's own",
    TemplateOrigin.ASSUMED: "assumed, as nothing states one",
}


def model_data(look: Observation, name: str) -> dict[str, Any]:
    """The explanation as data. Errors: SourceError for a model that nobody declares."""
    model = look.desired.models.get(name)
    if model is None:
        raise SourceError(f"there is no model {name!r}", hint=hint_for(name, look.desired.models))

    data: dict[str, Any] = {
        "model": name,
        "engine": look.manifest.engine.kind.value,
        "path": str(look.manifest.models[name].path),
        "trouble": None,
        "hint": "",
        "template": None,
        "special_tokens": None,
        "recommended_sampling": {},
        "state": {
            "kind": StateKind.UNKNOWN.value,
            "window_tokens": 0,
            "context_bytes": 0,
            "explanation": "",
        },
        "prompts": {},
    }
    if isinstance(model, Trouble):
        return data | {"trouble": model.message, "hint": model.hint}

    engine = ENGINES[look.manifest.engine.kind]
    return data | _model_facts(model) | {"state": _state(engine, model)}


def _state(engine: EngineEntry, model: DesiredModel) -> dict[str, Any]:
    """The kind of state that a prompt cache saves, and what it means."""
    state = model.source.state
    explanation = state.explanation()
    taken_bytes = 0
    with contextlib.suppress(OSError):
        taken_bytes = context_bytes(engine, model.config, model.source)
    if taken_bytes:
        explanation += (
            f"; the context takes {words.size(taken_bytes)} of memory, as windows are kept in full"
        )

    return {
        "kind": state.kind.value,
        "window_tokens": state.window_tokens,
        "context_bytes": taken_bytes,
        "explanation": explanation,
    }


def _model_facts(model: DesiredModel) -> dict[str, Any]:
    source = model.source
    own = source.tokenizer
    template_date = None
    if model.template_date is not None:
        template_date = model.template_date.isoformat()
    control = None
    if model.special.control is not None:
        control = len(model.special.control)

    return {
        "template": {
            "name": source.template.name,
            "origin": source.template.origin.value,
            "digest": model.template.digest,
            "date": template_date,
            "variables": model.config.template_variables(),
        },
        "special_tokens": {
            "bos": model.special.bos,
            "eos": model.special.eos,
            "ends": list(own.ends),
            "engine_adds_bos": model.special.adds_bos,
            "control_tokens": control,
            "control_tokens_of": own.special_origin if control is not None else "",
        },
        "recommended_sampling": dict(own.sampling),
        "prompts": {
            prompt: {"variables": model.config.template_variables(prompt)}
            for prompt in model.prompt_templates
        },
    }


def print_model(console: Console, data: dict[str, Any]) -> None:
    """Print the explanation for people."""
    data = words.printable_all(data)

    def line(text: str, style: str = "") -> None:
        console.print(Text(f"  {text}", style=style), soft_wrap=True)

    heading = Text(f"{data['model']}: {data['engine']}, {data['path']}", style="bold")
    console.print(heading, soft_wrap=True)
    if data["trouble"] is not None:
        line(data["trouble"])
        line(data["hint"], "dim")
        return

    template = data["template"]
    origin = _ORIGINS[TemplateOrigin(template["origin"])]
    line(f"chat template: {template['name']} ({origin}), digest {template['digest'][:12]}")
    if template["date"] is not None:
        line(f"date: {template['date']}")
    if template["variables"]:
        line(f"variables: {_pairs(template['variables'])}")
    for prompt, own in data["prompts"].items():
        line(f"variables of {prompt}: {_pairs(own['variables'])}")

    for text in _token_lines(data["special_tokens"]):
        line(text)
    if explanation := data["state"]["explanation"]:
        line("state: " + explanation.replace("; ", "\n    "))
    if data["recommended_sampling"]:
        recommended = _pairs(data["recommended_sampling"])
        line(f"sampling recommended by its makers, not applied (set params): {recommended}")


def _token_lines(tokens: dict[str, Any]) -> list[str]:
    bos = f"BOS: {tokens['bos'] or 'none known'}"
    if tokens["engine_adds_bos"]:
        bos += ", added by the engine"

    eos = f"EOS: {tokens['eos'] or 'none known'}"
    if tokens["ends"]:
        eos += f"; an answer ends with {', '.join(tokens['ends'])}"

    control = "control tokens: not known, so their usual forms are guessed"
    if tokens["control_tokens"] is not None:
        control = (
            f"control tokens: {tokens['control_tokens']}, stated by {tokens['control_tokens_of']}"
        )
    return [bos, eos, control]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
