"""Asks the engine of one model without the daemon: what a request costs by itself.

It needs what the daemon needs: the manifest, the store, the model, and room in memory for a second
one.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from rkcached.api import words
from rkcached.cli.bench.direct import Ask, DirectEngine
from rkcached.cli.bench.machine import available_bytes
from rkcached.cli.bench.results import DirectRun, ModelFacts, State
from rkcached.cli.board import model_bytes
from rkcached.engines.base import Sampling
from rkcached.engines.registry import ENGINES
from rkcached.errors import RkcachedError
from rkcached.host import cpus
from rkcached.messages.message import Message
from rkcached.plan.desired import DesiredModel
from rkcached.reconcile.observer import Observation, Observer
from rkcached.sources.manifest_file import read_manifest
from rkcached.sources.records import Key
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.store import Store

PAUSE_S = 0.02
"""Between two turns: threads of an engine may spin for a moment after their work."""


class NotPossible(Exception):
    """The engine cannot be measured alone; the message is the reason."""


def look_at(manifest: Path, cache_dir: Path, state_dir: Path) -> Observation:
    """Look at the files as the daemon does. Errors: NotPossible."""
    try:
        return Observer(Store(cache_dir), StoredTexts(state_dir)).observe(read_manifest(manifest))
    except (RkcachedError, OSError) as error:
        raise NotPossible(f"what the daemon reads cannot be read: {error}") from error


def model_facts(
    look: Observation | None, engine: str, runtime: str | None, model: str, daemon: int = 0
) -> ModelFacts:
    """`daemon` is its process, whose cores count where the manifest names no threads."""
    desired = None
    if look is not None:
        desired = look.desired.models.get(model)
    if look is None or not isinstance(desired, DesiredModel):
        return ModelFacts(engine=engine, runtime=runtime)

    params: dict[str, float | int | None] = {**desired.config.sampling(None)}
    params["max_context_len"] = desired.config.params.max_context_len
    return ModelFacts(
        engine=engine,
        runtime=runtime or desired.runtime.version,
        file=str(desired.config.path),
        digest=desired.source.digest,
        params=params,
        threads=_threads(look, daemon),
    )


def _threads(look: Observation, daemon: int) -> int | None:
    """None where the runtime decides."""
    engine = look.manifest.engine
    if engine.threads or not ENGINES[engine.kind].thread_per_core:
        return engine.threads or None

    try:
        return len(cpus.fast(os.sched_getaffinity(daemon)))
    except OSError:
        return len(cpus.fast(cpus.usable()))


class Alone:
    """The engine of a model in a process of this command's own, from `with` to its end.

    Errors: NotPossible.
    """

    def __init__(self, look: Observation, model: str) -> None:
        desired = look.desired.models.get(model)
        if not isinstance(desired, DesiredModel):
            raise NotPossible(f"{model} cannot be used: {desired or 'it is not in the manifest'}")

        needed = model_bytes(look.manifest, desired.config) * 5 // 4
        available = available_bytes()
        if available and available < needed:
            raise NotPossible(
                f"a second {model} needs about {words.size(needed)} of memory, "
                f"{words.size(available)} are available"
            )

        self._look = look
        self._model = desired
        self._stack = contextlib.ExitStack()

        try:
            self._engine = self._stack.enter_context(DirectEngine(look.manifest.engine, desired))
        except RkcachedError as error:
            raise NotPossible(f"a second {model} cannot be loaded: {error.message}") from error

    def close(self) -> None:
        self._stack.close()

    def ask(self, key: Key, state: State, question: str, answer_tokens: int) -> DirectRun:
        """The same request that the daemon got. Errors: NotPossible."""
        artifact = self._look.inventory.artifacts.get(key)
        text = self._look.desired.texts.get(key)
        if text is None or (artifact is None and state is not State.COLD):
            raise NotPossible(f"{key} is not in the store that the manifest belongs to")

        values: dict[str, Any] = {
            **self._model.config.sampling(key.prompt),
            "max_new_tokens": answer_tokens,
        }
        messages = [Message(role="system", content=text), Message(role="user", content=question)]
        declared = self._look.desired.prompts[key].tools
        tools = declared.plain() if declared is not None else []
        ask = Ask(
            load=artifact.path if artifact is not None and state is State.FILE else None,
            prompt=self._model.template_for(key.prompt).render(messages, tools),
            sampling=Sampling(**values),
            cold=state is State.COLD,
        )
        time.sleep(PAUSE_S)

        try:
            answer = self._engine.ask(ask)
        except RkcachedError as error:
            raise NotPossible(error.message) from error

        time.sleep(PAUSE_S)
        return DirectRun(
            ttft_ms=round(answer.ttft_ms, 3),
            load_ms=round(answer.load_ms, 3),
            prefill_ms=round(answer.stats.prefill_ms, 3),
            cached_tokens=answer.stats.cached_tokens,
        )
