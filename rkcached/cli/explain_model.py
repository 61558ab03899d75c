"""The part of `rkcached explain` about a model: its chat template, special tokens and state."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

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

if TYPE_CHECKING:
    from rkcached.cli import forms

_ORIGINS: Final = {
    TemplateOrigin.BUILT_IN: "built in, named by the manifest",
    TemplateOrigin.FILE: "named by the manifest",
    TemplateOrigin.MODEL: "the model's own",
    TemplateOrigin.ASSUMED: "assumed, as nothing states one",
}


def model_data(look: Observation, name: str) -> forms.ExplainedModel:
    """The explanation as data. Errors: SourceError for a model that nobody declares."""
    model = look.desired.models.get(name)
    if model is None:
        raise SourceError(f"there is no model {name!r}", hint=hint_for(name, look.desired.models))

    data: forms.ExplainedModel = {
        "format": 1,
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
        data["trouble"] = model.message
        data["hint"] = model.hint
        return data

    data["template"] = _template(model)
    data["special_tokens"] = _special_tokens(model)
    data["recommended_sampling"] = dict(model.source.tokenizer.sampling)
    data["state"] = _state(ENGINES[look.manifest.engine.kind], model)
    data["prompts"] = {
        prompt: {"variables": model.config.template_variables(prompt)}
        for prompt in model.prompt_templates
    }
    return data


def _state(engine: EngineEntry, model: DesiredModel) -> forms.ModelState:
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


def _template(model: DesiredModel) -> forms.Template:
    date = None
    if model.template_date is not None:
        date = model.template_date.isoformat()

    return {
        "name": model.source.template.name,
        "origin": model.source.template.origin.value,
        "digest": model.template.digest,
        "date": date,
        "variables": model.config.template_variables(),
    }


def _special_tokens(model: DesiredModel) -> forms.SpecialTokens:
    own = model.source.tokenizer
    control = None
    stated_by = ""
    if model.special.control is not None:
        control = len(model.special.control)
        stated_by = own.special_origin

    return {
        "bos": model.special.bos,
        "eos": model.special.eos,
        "ends": list(own.ends),
        "engine_adds_bos": model.special.adds_bos,
        "control_tokens": control,
        "control_tokens_of": stated_by,
    }


def print_model(console: Console, explanation: forms.ExplainedModel) -> None:
    """Print the explanation for people."""
    data: dict[str, Any] = words.printable_all(explanation)

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
