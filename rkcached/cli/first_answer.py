"""How long the first answer after a start takes, for `rkcached doctor`.

By figures that were measured: loading the model by the running daemon, the prompt cache and a
question when the cache was built. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rkcached.cli.board import Check, Outcome
from rkcached.sources.manifest import Manifest, ModelConfig

_BENCH = "rkcached bench"


def checks(manifest: Manifest, status: dict[str, Any] | None) -> Iterator[Check]:
    """A check for each model that answers. `status` is the running daemon's."""
    known = {model["name"] for model in status["models"]} if status is not None else set()
    for name, config in manifest.models.items():
        if config.pools or (status is not None and name not in known):
            continue
        title = f"first answer of {name}"
        if status is None:
            finding = "not measured: no daemon runs with this manifest"
            yield Check(title, Outcome.SKIP, finding, f"start it, then run `{_BENCH} {name}`")
            continue
        yield _of_model(title, name, config, status)


def _of_model(title: str, name: str, config: ModelConfig, status: dict[str, Any]) -> Check:
    model: dict[str, Any] = next(m for m in status["models"] if m["name"] == name)
    if trouble := model.get("preload_trouble"):
        next_step = "the daemon's log says what to do: `journalctl -u rkcached`"
        return Check(title, Outcome.WARN, f"it could not be preloaded: {trouble}", next_step)

    prompt = _first_prompt(name, config, status)
    artifact = prompt.get("artifact") or {}
    if not artifact.get("warm_ttft_ms"):
        finding = "not measured yet: none of its prompts has a proven cache"
        return Check(title, Outcome.SKIP, finding, "`rkcached status` says why")

    is_ahead = config.preload is not None and model["worker"] in ("ready", "busy")
    load_ms = artifact["load_ms"]
    parts = {"question": artifact["warm_ttft_ms"] - load_ms}
    if not is_ahead or prompt["prompt"] not in (config.preload or ())[:1]:
        parts["cache"] = load_ms
    if not is_ahead:
        if model.get("model_load_ms") is None:
            finding = "not measured yet: the model was not loaded since the daemon started"
            return Check(title, Outcome.SKIP, finding, f"run `{_BENCH} {name}`")
        parts["model"] = model["model_load_ms"]

    shown = ", ".join(f"{part} {_seconds(ms)}" for part, ms in reversed(parts.items()))
    finding = f"{_seconds(sum(parts.values()))} with {prompt['prompt']} ({shown}), as last measured"
    next_step = ""
    if config.preload is None:
        next_step = f"`preload: {prompt['prompt']}` loads model and cache before somebody asks"
    return Check(title, Outcome.OK, finding, next_step)


def _first_prompt(name: str, config: ModelConfig, status: dict[str, Any]) -> dict[str, Any]:
    """The first preloaded prompt that is fresh, or the first one; empty if there is none."""
    fresh: dict[str, dict[str, Any]] = {
        prompt["prompt"]: prompt
        for prompt in status["prompts"]
        if prompt["model"] == name and prompt["state"] == "fresh"
    }
    for wanted in config.preload or ():
        if wanted in fresh:
            return fresh[wanted]
    return next(iter(fresh.values()), {})


def _seconds(ms: float) -> str:
    if ms < 1000:
        return f"{ms:.0f} ms"
    return f"{ms / 1000:.1f} s"
