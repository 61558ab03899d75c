"""Makes the document of `GET /v1/status` from the daemon's parts.

It only reads, on the event loop.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import os
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import pydantic_core

from rkcached import __version__
from rkcached.api.responses import RecentAnswer, Status, SuggestedPrompt
from rkcached.engines.kinds import VerifyMode
from rkcached.host import disk
from rkcached.host.digests import Reading
from rkcached.host.processes import usage
from rkcached.plan.desired import DesiredModel
from rkcached.plan.records import Assessment, Blocked, Build, DesiredPrompt, State
from rkcached.plan.vocabulary import BUILDING
from rkcached.reconcile.events import Event, Events
from rkcached.reconcile.snapshot import Published, Snapshot
from rkcached.serving.declarable import TOOLS_HINT
from rkcached.serving.report import NOT_MEASURED
from rkcached.sources.records import Key, Trouble
from rkcached.store.sidecar import Imported, StoredArtifact

if TYPE_CHECKING:  # `explain` needs this module, and nothing of the daemon
    from rkcached.host.watch import Watcher
    from rkcached.serving.conversations import Conversations
    from rkcached.serving.dispatcher import Serving
    from rkcached.serving.learning import Learning, Wish
    from rkcached.serving.preload import Preloader
    from rkcached.serving.repeats import Suggestion
    from rkcached.store.store import Store
    from rkcached.worker.pool import Workers

RETIRED_SHOWN = 100
SUGGESTIONS_SHOWN = 10

PIECE = 32
"""Prompts that are written between two turns of the event loop: 0.3 ms of JSON, 1.1 ms of HTML
(10,000 took 95 and 330 ms on an AMD EPYC)."""


RECENT_SHOWN = 40
RECENT_KEPT = 1000


class Recent:
    """The last answers, oldest first."""

    def __init__(self, events: Events) -> None:
        # With the uid of each one's client.
        self._answers: deque[tuple[int, RecentAnswer]] = deque(maxlen=RECENT_KEPT)
        events.listen(self._take)

    def of(self, viewer: int | None) -> list[RecentAnswer]:
        """Those to this user; None: to all."""
        return [answer for owner, answer in self._answers if viewer in (None, owner)]

    def of_prompt(self, key: Key, viewer: int | None) -> list[tuple[int, RecentAnswer]]:
        """Those from the cache of this prompt, with the uid of each one's client, as for `of`."""
        return [
            (owner, answer)
            for owner, answer in self._answers
            if viewer in (None, owner) and (answer.model, answer.prompt) == key
        ]

    def _take(self, event: Event) -> None:
        if event.kind == "answer":
            shown = {name: event.fields[name] for name in ("model", "prompt", "state", "ttft_ms")}
            answer = RecentAnswer(time=round(event.time, 3), **shown)
            self._answers.append((event.fields["owner"], answer))


def status(
    *,
    started: float,
    published: Published,
    serving: Serving,
    workers: Workers,
    store: Store,
    conversations: Conversations,
    preloader: Preloader,
    recent: Recent,
    watcher: Watcher,
    learning: Learning,
    viewer: int | None,
    keys: Sequence[Key] | None = None,
) -> Status:
    """The document for this user; None: on the admin socket. `started` is in Unix seconds.

    Its prompts are those of `keys`, or all of them in the manifest's order.
    """
    snapshot = published.now.seen_by(viewer)
    saved = conversations.of(viewer)
    problems = snapshot.manifest_error.problems if snapshot.manifest_error else ()
    building = [snapshot.building.key] if snapshot.building else []
    if keys is None:
        keys = list(snapshot.assessments)

    document = {
        "format": 1,
        "version": __version__,
        "pid": os.getpid(),
        "started_at": round(started, 3),
        "uptime_s": round(time.time() - started, 1),
        "ready": snapshot.ready,
        "starting": _starting(snapshot),
        "summary": summary(snapshot),
        "manifest": {
            "file": str(snapshot.manifest.file),
            "ok": snapshot.manifest_error is None,
            "problems": list(map(str, problems)),
            "skipped_files": list(snapshot.skipped_files),
        },
        "engine": snapshot.manifest.engine.kind.value,
        "cache": {
            "directory": str(store.root),
            "trouble": snapshot.store_trouble.message if snapshot.store_trouble else "",
            "used_bytes": snapshot.used_bytes(),
            "max_bytes": snapshot.manifest.cache.max_bytes,
            "orphan_bytes": snapshot.orphan_bytes(),
            "retired": len(snapshot.retired),
            "retired_bytes": snapshot.retired_bytes(),
            "foreign_bytes": snapshot.foreign_bytes,
            "quarantine_bytes": snapshot.quarantine_bytes,
            "conversations": len(saved),
            "conversation_bytes": sum(one.record.size_bytes for one in saved),
            "free_bytes": disk.free_bytes(store.root),
        },
        "watching": "polling" if watcher.polling else "inotify",
        "reconcile": {
            "looks": snapshot.looks,
            "last_look_ms": round(snapshot.last_look_ms, 1),
            "builds": snapshot.builds,
        },
        "answers": dict(serving.tally.answers),
        "saved_today_s": round(serving.tally.saved.today_ms() / 1000),
        "recent": recent.of(viewer)[-RECENT_SHOWN:],
        "running": serving.running,
        "models": _models(snapshot, serving, workers, preloader),
        "notices": list(snapshot.desired.notices),
        "suggestions": suggested(learning, viewer)[:SUGGESTIONS_SHOWN],
        "retired": _retired(snapshot),
        "building": next(_prompts(snapshot, serving, building), None),
        "prompts": _prompts(snapshot, serving, keys),
    }
    return Status.model_validate(document)


def _models(
    snapshot: Snapshot, serving: Serving, workers: Workers, preloader: Preloader
) -> list[dict[str, Any]]:
    documents = []
    for name, model in snapshot.desired.models.items():
        document = model_status(name, model, workers, snapshot.desired.unlisted.get(name))
        doubts = snapshot.desired.doubts.get(name, ())
        preload = snapshot.manifest.models[name].preload
        documents.append(
            {
                **document,
                "waiting": serving.waiting(name),
                "preload": None if preload is None else list(preload),
                "preload_trouble": preloader.trouble(name),
                "notices": list(doubts),
            }
        )
    return documents


def suggested(learning: Learning, viewer: int | None) -> list[SuggestedPrompt]:
    """The beginnings that this user repeats; what costs most comes first."""
    return [
        suggested_prompt(suggestion, learning.wish_for(suggestion))
        for suggestion in learning.suggestions(viewer)
    ]


def suggested_prompt(suggestion: Suggestion, wish: Wish | None) -> SuggestedPrompt:
    """A suggestion, and what became of the wish to store it."""
    step = f"`rkcached suggest {suggestion.id} --write NAME` stores it as a prompt"
    if suggestion.system_bytes == 0:
        step = "send it as the system message: only that can become a prompt"
    elif suggestion.beyond_system and suggestion.with_tools:
        step = TOOLS_HINT

    outcome = ""
    if wish is not None:
        outcome = wish.outcome or "waiting"
        step = f"the next request that begins so is stored as {wish.key}"
        if wish.outcome:
            step = wish.hint
    return SuggestedPrompt(
        id=suggestion.id,
        model=suggestion.model,
        uid=suggestion.owner,
        tokens=suggestion.tokens,
        size_bytes=suggestion.size_bytes,
        requests=suggestion.requests,
        prefilled=suggestion.prefilled,
        prefill_ms=round(suggestion.prefill_ms, 1),
        next_step=step,
        prompt=wish.key.prompt if wish is not None else None,
        outcome=outcome,
    )


def _retired(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The caches that were retired last, the latest first."""
    kept_s = snapshot.manifest.cache.keep_retired_s
    last = heapq.nlargest(
        RETIRED_SHOWN, snapshot.retired.values(), key=lambda retired: retired.retired_at
    )
    return [
        {
            "model": retired.key.model,
            "prompt": retired.key.prompt,
            "fingerprint": retired.fingerprint,
            "tokens": retired.tokens,
            "size_bytes": retired.size_bytes,
            "retired_at": round(retired.retired_at, 3),
            "kept_until": round(retired.retired_at + kept_s, 3),
        }
        for retired in last
    ]


def _prompts(snapshot: Snapshot, serving: Serving, keys: Iterable[Key]) -> Iterator[dict[str, Any]]:
    """Each is described when its turn comes: thousands of descriptions at once take memory."""
    for key in keys:
        if key in snapshot.assessments:
            yield prompt_status(key, snapshot, serving)


def _starting(snapshot: Snapshot) -> dict[str, Any] | None:
    if snapshot.ready:
        return None
    reading = snapshot.reading
    if reading is None:
        return {"file": "", "done_bytes": 0, "total_bytes": 0}
    return {
        "file": reading.path,
        "done_bytes": reading.done_bytes,
        "total_bytes": reading.total_bytes,
    }


async def pieces(status: Status) -> AsyncGenerator[bytes]:
    """The document's JSON.

    With thousands of prompts it takes a while, so the event loop turns between the pieces.
    """
    yield pydantic_core.to_json(status, exclude={"prompts"}).removesuffix(b"}") + b',"prompts":['

    prompts = iter(status.prompts)
    comma = b""
    while some := tuple(itertools.islice(prompts, PIECE)):
        yield comma + b",".join(map(pydantic_core.to_json, some))
        comma = b","
        await asyncio.sleep(0)
    yield b"]}"


def summary(snapshot: Snapshot) -> str:
    """One line: "12 fresh, 1 building qwen3-0.6b/system, 0 blocked", and the troubles.

    These are of manifest and store. Before the first look is over, the line is about that look.
    """
    if not snapshot.ready:
        return _first_look(snapshot.reading)

    counts: Counter[State] = Counter()
    for key, assessment in snapshot.assessments.items():
        if not snapshot.is_building(key):
            counts[assessment.state] += 1

    parts = [f"{counts.pop(State.FRESH, 0)} fresh"]
    blocked = f"{counts.pop(State.BLOCKED, 0)} blocked"
    if snapshot.building is not None:
        parts.append(f"1 building {snapshot.building.key}")
    parts += [f"{count} {state}" for state, count in counts.items()]
    parts.append(blocked)
    if snapshot.held:
        parts.append(f"builds wait {snapshot.held}")

    if snapshot.store_trouble is not None:
        parts.append(f"store not readable: {snapshot.store_trouble.message}")
    if snapshot.manifest_error is not None:
        parts.append(f"manifest rejected: {snapshot.manifest_error.problems[0]}")
    return ", ".join(parts)


def _first_look(reading: Reading | None) -> str:
    if reading is None:
        return "starting: looking at every file"
    done, total = reading.done_bytes / 1e9, reading.total_bytes / 1e9
    return f"starting: reading {reading.path}, {done:.1f} of {total:.1f} GB"


def model_status(
    name: str, model: DesiredModel | Trouble, workers: Workers, unlisted: Trouble | None = None
) -> dict[str, Any]:
    """A model and its worker. `unlisted`: the reason why some of its prompts are not known."""
    document: dict[str, Any] = {
        "name": name,
        "embedding": isinstance(model, DesiredModel) and model.config.embedding,
        "rerank": isinstance(model, DesiredModel) and model.config.rerank,
        "worker": "stopped",
        "runtime": None,
        "measures_reuse": None,
        "state_s": None,
        "pid": None,
        "memory_bytes": None,
        "cpu_s": None,
        "model_load_ms": None,
        "restarts": 0,
        "last_failure": "",
        "trouble": str(model) if isinstance(model, Trouble) else str(unlisted or ""),
    }
    worker = next((worker for worker in workers.all() if worker.model.name == name), None)
    if worker is not None:
        document |= {
            "worker": worker.state.value,
            "state_s": round(time.monotonic() - worker.since, 1),
            "pid": worker.pid,
            "model_load_ms": None if worker.load_ms is None else round(worker.load_ms, 1),
            "restarts": worker.restarts,
            "last_failure": worker.last_failure,
        }
        if worker.pid is not None and (used := usage(worker.pid)) is not None:
            document |= {"memory_bytes": used.memory_bytes, "cpu_s": round(used.cpu_s, 1)}
    if worker is not None and worker.info is not None:
        document |= {
            "runtime": worker.info.runtime_version,
            "measures_reuse": worker.info.measures_prefill,
        }
    return document


def prompt_status(key: Key, snapshot: Snapshot, serving: Serving) -> dict[str, Any]:
    """A prompt, its use and its cache."""
    assessment = snapshot.assessments[key]
    building = snapshot.building if snapshot.is_building(key) else None
    reason = assessment.reason
    hint = assessment.hint
    if building:
        reason = building.reason
    elif snapshot.held and isinstance(assessment.action, Build):
        reason = f"{reason}; waits {snapshot.held}"
        hint = hint or "`rkcached wait MODEL/PROMPT` has it built now"
    use = serving.tally.uses.get(key)
    desired = snapshot.desired.prompts.get(key)
    tools = None
    if desired is not None:
        tools = desired.tools

    shown: dict[str, Any] = {
        "model": key.model,
        "prompt": key.prompt,
        "state": state_of(key, snapshot),
        "reason": reason,
        "hint": hint,
        "retry_at": _retry_at(assessment),
        "description": assessment.description,
        "learned": key in snapshot.desired.learned,
        "tools": list(tools.names) if tools is not None else [],
        "hits": use.hits if use else 0,
        "misses": use.misses if use else 0,
        "last_used": use.last_used if use else None,
    }
    if building:
        shown["progress"] = {
            "done_tokens": building.done_tokens,
            "total_tokens": building.total_tokens,
            "elapsed_ms": round((time.monotonic() - building.started) * 1000),
        }

    artifact = snapshot.artifacts.get(key)
    if artifact is None or artifact.corrupt:
        return shown
    if not _is_of(desired, artifact):
        return shown

    shown["artifact"] = artifact_figures(artifact)
    if assessment.state is State.FRESH:
        figures = artifact.sidecar.figures
        if not figures.gain:
            shown["reason"] = no_gain(artifact)
        elif figures.verified == VerifyMode.TIME:
            shown["reason"] = f"fresh; {NOT_MEASURED}, so its proof is the time that it saves"
    return shown


def _retry_at(assessment: Assessment) -> float | None:
    """Unix seconds; None where time alone does not help."""
    if not isinstance(assessment.action, Blocked):
        return None
    return assessment.action.retry_at or None


def state_of(key: Key, snapshot: Snapshot) -> str:
    """The state of a prompt as people are shown it."""
    return BUILDING if snapshot.is_building(key) else snapshot.assessments[key].state.value


def _is_of(prompt: DesiredPrompt | None, artifact: StoredArtifact) -> bool:
    """Whether the artifact was made from the prompt as it is declared now, or is undeclared."""
    if prompt is None:
        return True
    if prompt.fingerprint is None:
        return False
    return prompt.fingerprint.digest == artifact.sidecar.fingerprint


def artifact_figures(artifact: StoredArtifact) -> dict[str, Any]:
    """Size and measured figures of an artifact."""
    sidecar = artifact.sidecar
    figures = sidecar.figures
    imported = None
    if isinstance(sidecar.imported, Imported):
        imported = msgspec.structs.asdict(sidecar.imported)
    return {
        "tokens": sidecar.tokens,
        "reused_tokens": figures.reused_tokens,
        "size_bytes": sidecar.size_bytes,
        "built_at": sidecar.built_at,
        "build_ms": round(sidecar.build_ms, 1),
        "prefill_ms": round(figures.prefill_ms, 1),
        "load_ms": round(figures.load_ms, 1),
        "cold_ttft_ms": round(figures.cold_ttft_ms, 1),
        "warm_ttft_ms": round(figures.warm_ttft_ms, 1),
        "gain": figures.gain,
        "verified": figures.verified,
        "fingerprint": sidecar.fingerprint,
        "imported": imported,
    }


def no_gain(artifact: StoredArtifact) -> str:
    """The reason in the status of a cache that saves no time."""
    figures = artifact.sidecar.figures
    return (
        f"no gain: {figures.warm_ttft_ms:.0f} ms with the cache, "
        f"{figures.cold_ttft_ms:.0f} ms without"
    )
