"""`rkcached verify`: compare artifacts with their sidecars; with --deep, also load them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from rkcached.cli import looks, names, output
from rkcached.errors import RkcachedError, counted, printable
from rkcached.host import logs
from rkcached.host.settings import Settings
from rkcached.plan.desired import DesiredModel
from rkcached.plan.probe import texts_of
from rkcached.plan.records import State
from rkcached.plan.vocabulary import state_words
from rkcached.plan.worker_model import worker_model
from rkcached.reconcile.observer import Observation
from rkcached.sources.records import Key
from rkcached.store.seal import read_seal
from rkcached.store.sidecar import StoredArtifact
from rkcached.store.store import Store
from rkcached.worker import protocol
from rkcached.worker.pool import Workers

if TYPE_CHECKING:
    from rkcached.cli import forms


def run(
    settings: Settings, prompts: Sequence[str], *, deep: bool, prove: bool, want_json: bool
) -> int:
    logs.configure("error")
    looks.need_store(settings)
    look = looks.look_as_service(settings)
    stored = [Key(*key) for key in (*look.inventory.artifacts, *look.inventory.unreadable)]
    chosen = stored
    if prompts:
        chosen = names.matching(prompts, stored)

    results = []
    for result in verify_artifacts(looks.store_of(settings), look, chosen, deep=deep, prove=prove):
        results.append(result)
        if not want_json:
            mark = "FAILED"
            if result["ok"]:
                mark = "ok"
            name = f"{result['model']}/{result['prompt']}"
            state = state_words(result["state"], learned=result["learned"])
            click.echo(printable(f"{mark:<7} {name} ({state})  {result['detail']}"))

    good = sum(result["ok"] for result in results)
    signatures_checked = read_seal(settings.state_dir) is not None
    if want_json:
        verified: forms.Verified = {
            "format": 1,
            "store": str(settings.cache_dir),
            "signatures_checked": signatures_checked,
            "artifacts": results,
        }
        output.print_json(verified)
    else:
        what = "no artifacts"
        if results:
            what = f"{good} of {len(results)} good"
        click.echo(printable(f"{what} in the store {settings.cache_dir}"))
        if retired := len(look.inventory.retired):
            click.echo(f"{counted(retired, 'retired prompt cache')} left unchecked")
        if not signatures_checked:
            click.echo("signatures were not checked: only root and the daemon can read the key")

    if good == len(results):
        return os.EX_OK
    return os.EX_DATAERR


def verify_artifacts(
    store: Store, look: Observation, keys: Sequence[Key], *, deep: bool, prove: bool
) -> Iterator[forms.VerifiedArtifact]:
    """One result for each key: whether it is good, and the finding in words."""
    with asyncio.Runner() as runner:
        workers = Workers(reach=store.reach_of)
        try:
            for key in keys:
                finding = store.verify(key)
                detail = finding or "matches its sidecar"
                artifact = look.inventory.artifacts.get(key)
                if (deep or prove) and not finding and artifact is not None:
                    finding, detail = _deep(runner, workers, look, key, artifact, prove=prove)

                yield {
                    "model": key.model,
                    "prompt": key.prompt,
                    "state": _state_of(look, key).value,
                    "learned": key in look.desired.learned,
                    "ok": not finding,
                    "detail": finding or detail,
                }
        finally:
            runner.run(workers.stop())


def _state_of(look: Observation, key: Key) -> State:
    return next(assessment.state for assessment in look.assessments if assessment.key == key)


def _deep(
    runner: asyncio.Runner,
    workers: Workers,
    look: Observation,
    key: Key,
    artifact: StoredArtifact,
    *,
    prove: bool,
) -> tuple[str, str]:
    """Load it; `prove`: and ask it what its text is asked, too.

    A prompt cache that is not fresh belongs to another model or runtime, and is not risked.
    """
    model = look.desired.models.get(key.model)
    state = _state_of(look, key)
    if (
        state is not State.FRESH
        or not isinstance(model, DesiredModel)
        or artifact.signature is None
    ):
        return "", f"matches its sidecar; not loaded, because it is {state.value}"

    cache = protocol.CacheFile(
        path=str(artifact.path),
        signature=artifact.signature,
        fingerprint=artifact.sidecar.fingerprint,
    )
    probe = ""
    if prove:
        desired = look.desired
        template = model.template_for(key.prompt)
        _, probe = texts_of(template, desired.texts[key], desired.prompts[key].tools)
    worker = workers.get(worker_model(look.manifest.engine, model))
    try:
        checked = runner.run(worker.run(protocol.Check(cache=cache, probe=probe)))
    except RkcachedError as error:
        return error.message, ""

    tokens = 0
    if isinstance(checked, protocol.Checked):
        tokens = checked.tokens
    if tokens != artifact.sidecar.tokens:
        return f"loads, but has {tokens} tokens instead of {artifact.sidecar.tokens}", ""
    done = "matches its sidecar; loads, " + ("and answers as its text does, " if prove else "")
    return "", f"{done}{tokens} tokens"
