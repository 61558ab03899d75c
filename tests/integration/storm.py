"""A storm over the real reconciler, store, observer, watcher and serving.

It is a Hypothesis state machine.

The event loop only runs inside a rule, so a storm decides what has been seen of it and what has
not. `calm` lets everything settle and then compares the daemon with a model of what it must be: the
answer of every prompt, the plan, what was built, and every file of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Coroutine, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from rkcached.api.prepare import Preparation
from rkcached.api.requests import ChatRequest
from rkcached.engines.memory import MemoryEngine, expected_text
from rkcached.errors import RequestError, StoreLocked
from rkcached.host import disk
from rkcached.host.logs import log
from rkcached.host.watch import Watcher
from rkcached.plan.desired import DesiredModel
from rkcached.plan.planner import plan
from rkcached.plan.records import Blocked, State
from rkcached.reconcile import actions, bases, failures, loop, observer, wake
from rkcached.reconcile.events import Event, Events
from rkcached.reconcile.loop import Reconciler
from rkcached.reconcile.observer import Observer
from rkcached.reconcile.snapshot import Published
from rkcached.reconcile.wake import Wake
from rkcached.serving.conversations import Conversations
from rkcached.serving.dispatcher import Serving
from rkcached.serving.job import End, Text
from rkcached.sources.manifest_file import ManifestFile, read_manifest
from rkcached.sources.records import Key
from rkcached.sources.stored_texts import StoredTexts
from rkcached.store.quarantine import MAX_QUARANTINED
from rkcached.store.store import Store
from rkcached.worker import building, pool
from rkcached.worker.gate import Gates
from rkcached.worker.model import Backoff
from rkcached.worker.pool import Workers
from tests.integration.threaded_worker import ThreadedWorker

CALM_S = 20.0
"""A storm that has not calmed down by then is a failure; a rescan by the clock would come after a
minute only."""

MODELS = ("m", "n")
FILES = ("a.md", "b.md", "c.md")
TEXTS = (
    "You are one.\n",
    "You are two.\n",
    "You are a longer third text.\n",
    "",
    "  \n",
    "long " * 11_000,
)
"""Of the last one, max_bytes holds two."""
MAX_BYTES = 1 << 20
CONTEXT_TOKENS = 65536
SEEDS = ("x", "y")
NAMES = ("a", "b", "c", "link")
STATE_BYTES = 9  # of the memory engine, for each token
HEADER_BYTES = 20

steps = 0
"""Rules that were run in this process."""

prompts_st = st.lists(st.sampled_from(NAMES), unique=True, max_size=4)
key_st = st.builds(Key, st.sampled_from(MODELS), st.sampled_from(NAMES))


class Clock:
    """The wall clock of the modules that make decisions by it.

    What it measures goes on with real time.
    """

    def __init__(self) -> None:
        self.offset_s = 0.0
        self.perf_counter, self.monotonic, self.time_ns = (
            time.perf_counter,
            time.monotonic,
            time.time_ns,
        )

    def time(self) -> float:
        return time.time() + self.offset_s


@contextlib.contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


class Storm(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="storm-"))
        self.cache = self.root / "cache"
        self.clock = Clock()
        self.full = self.muted = self.unseen = False
        self.kills = 0
        self.damaged: set[Path] = set()
        """Nobody knows any more that these are the store's, once the rest of their artifact is
        gone."""
        self.may_build: set[Key] = set()
        self.built: list[Key] = []
        self.outside = contextlib.ExitStack()
        self.outside.callback(log.setLevel, log.logger.level)
        log.setLevel(logging.CRITICAL + 1)
        write_new, save = disk.write_new, MemoryEngine.save

        def full_write_new(path: Path, data: bytes, *mode: int) -> None:
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write_new(path, data, *mode)

        def full_save(engine: MemoryEngine, path: Path) -> int:
            return save(engine, Path("/dev/full") if self.full else path)

        self.outside.enter_context(
            replaced(
                (wake, "SETTLE_S", 0.004),
                (loop, "time", self.clock),
                (observer, "time", self.clock),
                (failures, "time", self.clock),
                (actions, "time", self.clock),
                (pool, "Worker", ThreadedWorker),
                (disk, "write_new", full_write_new),
                (MemoryEngine, "save", full_save),
                (bases, "worth_loading", lambda *_: True),  # else these builds are too quick
                (building, "KEEP_MS", 0.0),
            )
        )
        self.runner = asyncio.Runner()
        self.talks: dict[tuple[Key, int], list[dict[str, str]]] = {}

    # The daemon

    def during(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def start(self) -> None:
        self.store = Store(self.cache)
        try:
            self.store.open()
        except StoreLocked:  # until exec, a program that a thread here starts has our files, too
            await asyncio.sleep(0.1)
            self.store.open()
        self.events = Events()
        self.events.listen(self._on_event)
        self.published = Published(self.good, self.store.digests)
        self.conversations = Conversations(self.store.conversations, self.published)
        self.workers = Workers(
            backoff=Backoff(base_s=0.001, limit_s=0.002), keeper=self.conversations
        )
        gates = Gates()

        def look_again(changed: Collection[str]) -> None:
            if self.muted:
                self.unseen = True
                return
            self.reconciler.look_again(changed)

        self.watcher = Watcher(look_again)
        stored = StoredTexts(self.root / "state")
        self.reconciler = Reconciler(
            published=self.published,
            wake=Wake(),
            store=self.store,
            stored=stored,
            workers=self.workers,
            gates=gates,
            watcher=self.watcher,
            events=self.events,
        )
        self.serving = Serving(
            reconciler=self.reconciler,
            workers=self.workers,
            gates=gates,
            events=self.events,
            conversations=self.conversations,
        )
        self.preparation = Preparation(self.published)
        self.observer = Observer(Store(self.cache), stored)
        await self.conversations.open()
        self.running = asyncio.create_task(self.reconciler.run())
        await asyncio.wait(
            {asyncio.create_task(self.reconciler.ready.wait()), self.running},
            return_when="FIRST_COMPLETED",
        )

    async def stop(self) -> None:
        self.watcher.close()
        self.running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.running
        self.events.close()
        self.preparation.close()
        await self.serving.close(1.0)
        await self.workers.stop()
        await self.conversations.close()
        self.store.close()

    def _on_event(self, event: Event) -> None:
        if event.kind == "artifact" and event.fields["state"] == "building":
            self.built.append(Key(event.fields["model"], event.fields["prompt"]))

    # The model

    @initialize()
    def begin(self) -> None:
        self.manifest = self.root / "manifest.yaml"
        (self.root / "prompts").mkdir()
        for name, text in zip(FILES, TEXTS, strict=False):
            (self.root / "prompts" / name).write_text(text)
        (self.root / "prompts/link.md").symlink_to("a.md")
        for model in MODELS:
            self._write_model(model, "x")
        self.declare({"m": ["a", "b", "link"], "n": ["a"]}, {"m": 0.0, "n": 0.0}, None)
        self.good = read_manifest(self.manifest)
        self.recent_models: dict[str, set[bytes]] = {}
        self.recent_texts: dict[Key, set[str | None]] = {}
        self.forget()
        self.may_build = {Key(model, name) for model in MODELS for name in NAMES}
        self.during(self.start())

    def declare(
        self,
        prompts: dict[str, list[str]],
        temperatures: dict[str, float],
        max_bytes: int | None,
        idle_s: float = 0.0,
    ) -> None:
        self.declared, self.max_bytes = prompts, max_bytes
        lines = ["version: 1", "engine: {kind: memory}", "cache:"]
        lines += [f"  build: {{idle_s: {idle_s}}}"]
        lines += [f"  max_bytes: {max_bytes}"] if max_bytes else []
        lines += ["models:"]
        for model in MODELS:
            named = ", ".join(f"{name}: prompts/{name}.md" for name in prompts[model])
            lines += [
                f"  {model}:",
                f"    path: {model}.model",
                (
                    f"    params: {{temperature: {temperatures[model]}, max_context_len: "
                    f"{CONTEXT_TOKENS}}}"
                ),
            ]
            lines += [f"    prompts: {{{named}}}"] if named else []
        self._replace(self.manifest, "\n".join(lines) + "\n")

    def _write_model(self, model: str, seed: str) -> None:
        self._replace(
            self.root / f"{model}.model",
            json.dumps(
                {
                    "rkcached_memory_model": 1,
                    "seed": seed,
                    "context_tokens": CONTEXT_TOKENS,
                    "states": 1 + MODELS.index(model) % 2,
                }
            ),
        )

    def _replace(self, path: Path, text: str) -> None:
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text)
        temporary.replace(path)

    def text_of(self, key: Key) -> str | None:
        """The prompt's text on disk now; None if it has none."""
        try:
            text = (self.root / "prompts" / f"{key.prompt}.md").read_text().rstrip("\r\n")
        except OSError:
            return None
        return text if text.strip() else None

    def forget(self) -> None:
        self.recent_models = {model: set() for model in MODELS}
        self.recent_texts = {Key(model, name): set() for model in MODELS for name in NAMES}
        self.remember()

    def remember(self) -> None:
        for model, seen in self.recent_models.items():
            seen.add((self.root / f"{model}.model").read_bytes())
        for key, texts in self.recent_texts.items():
            texts.add(self.text_of(key))

    def changed(self, *keys: Key) -> None:
        """Something was done from outside; these prompts may be built for it."""
        self.may_build.update(keys)
        self.remember()

    def all_of(self, *names: str) -> list[Key]:
        """A file's prompts; a link may lead to any of them."""
        return [Key(model, name) for model in MODELS for name in {*names, "link"}]

    # What happens

    def step(self) -> None:
        global steps  # noqa: PLW0603 - counted over all storms
        steps += 1

    @rule(
        name=st.sampled_from(FILES),
        text=st.sampled_from(TEXTS),
        how=st.sampled_from(("write", "replace", "recreate")),
    )
    def edit(self, name: str, text: str, how: str) -> None:
        self.step()
        path = self.root / "prompts" / name
        if how == "write":
            path.write_text(text)
        elif how == "replace":
            self._replace(path, text)
        else:
            path.unlink(missing_ok=True)
            self.remember()
            path.write_text(text)
        self.changed(*self.all_of(name.removesuffix(".md")))

    @rule(name=st.sampled_from(FILES))
    def touch(self, name: str) -> None:
        self.step()
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / "prompts" / name)

    @rule(name=st.sampled_from(FILES))
    def delete(self, name: str) -> None:
        self.step()
        (self.root / "prompts" / name).unlink(missing_ok=True)
        self.changed(*self.all_of(name.removesuffix(".md")))

    @rule(old=st.sampled_from(FILES), new=st.sampled_from(FILES))
    def rename(self, old: str, new: str) -> None:
        self.step()
        with contextlib.suppress(FileNotFoundError):
            (self.root / "prompts" / old).rename(self.root / "prompts" / new)
        self.changed(*self.all_of(old.removesuffix(".md"), new.removesuffix(".md")))

    @rule(name=st.sampled_from((*FILES, "nowhere.md")))
    def retarget(self, name: str) -> None:
        self.step()
        link = self.root / "prompts/.link"
        link.symlink_to(name)
        link.rename(self.root / "prompts/link.md")
        self.changed(*self.all_of())

    @rule(
        m=prompts_st,
        n=prompts_st,
        warm=st.sampled_from((0.0, 0.5)),
        max_bytes=st.sampled_from((None, None, None, MAX_BYTES)),
        idle_s=st.sampled_from((0.0, 0.0, 0.02)),
    )
    def manifest_well(
        self, m: list[str], n: list[str], warm: float, max_bytes: int | None, idle_s: float
    ) -> None:
        self.step()
        self.declare({"m": m, "n": n}, {"m": warm, "n": 0.0}, max_bytes, idle_s)
        self.good = read_manifest(self.manifest)
        self.changed(*self.recent_texts)

    @rule(how=st.sampled_from(("garbage", "key", "empty", "gone", "name")))
    def manifest_badly(self, how: str) -> None:
        """The last good one stays in force, until it is written again."""
        self.step()
        text = self.manifest.read_text()
        bad = {
            "garbage": "{[\0",
            "key": "version: 1\nmodles: {}\n",
            "empty": "",
            "name": "version: 1\nmodels: {A/..: 1}\n",
        }
        if how == "gone":
            self.manifest.unlink()
        else:
            self.manifest.write_text(bad[how])
        self.breathe(20)
        self._replace(self.manifest, text)

    @rule(model=st.sampled_from(MODELS), seed=st.sampled_from(SEEDS))
    def replace_model(self, model: str, seed: str) -> None:
        self.step()
        self._write_model(model, seed)
        self.changed(*(Key(model, name) for name in NAMES))

    @rule(
        key=key_st,
        what=st.sampled_from((".memory_cache", ".bin", ".json")),
        how=st.sampled_from(("truncate", "flip", "delete", "append", "directory")),
    )
    def damage(self, key: Key, what: str, how: str) -> None:
        self.step()
        path = self.cache / key.model / (key.prompt + what)
        # Without its sidecar, a prompt cache that nobody declares is a stranger's, and stays.
        suffixes = [".bin", ".json", *([".memory_cache"] if what == ".json" else [])]
        self.damaged |= {Path(key.model, key.prompt + suffix) for suffix in suffixes}
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if how == "truncate":
                path.write_bytes(data[: len(data) // 2])
            elif how == "flip":
                path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
            elif how == "append":
                path.write_bytes(data + b"\0")
            else:
                path.unlink()
                if how == "directory":
                    path.mkdir()
        self.unseen = True  # nobody watches the store: the rescan looks at it
        self.changed(key)

    @rule(
        one=key_st,
        other=key_st,
        what=st.lists(st.sampled_from((".memory_cache", ".bin", ".json")), min_size=1, unique=True),
    )
    def swap(self, one: Key, other: Key, what: list[str]) -> None:
        self.step()
        for suffix in what:
            first, second = (self.cache / key.model / (key.prompt + suffix) for key in (one, other))
            between = self.root / "between"
            if one != other and first.is_file() and second.is_file():
                first.rename(between)
                second.rename(first)
                between.rename(second)
                if suffix == ".json":
                    # Where nobody declares them, such sidecars are strangers', and what they name.
                    self.damaged |= {
                        Path(key.model, key.prompt + stray)
                        for key in (one, other)
                        for stray in (".memory_cache", ".bin", ".json")
                    }
        self.unseen = True
        self.changed(one, other)

    @rule(model=st.sampled_from(MODELS))
    def kill_worker(self, model: str) -> None:
        self.step()
        for worker in self.workers.all():
            if worker.model.name == model and worker._process.handle is not None:
                worker._process.handle.kill()
                self.kills += 1

    @rule()
    def restart(self) -> None:
        """In order; a daemon that is killed is the part of the test beside this one."""
        self.step()
        self.during(self.stop())
        for model in MODELS:  # what a build of a daemon that was killed leaves
            if (self.cache / model).is_dir():
                (self.cache / model / ".stage-a-00112233").write_bytes(b"half")
        self.during(self.start())

    @rule(full=st.booleans())
    def disk(self, full: bool) -> None:
        self.step()
        self.full = full

    @rule(s=st.sampled_from((-86400.0, -60.0, 1.0, 60.0, 86400.0 * 365)))
    def jump_clock(self, s: float) -> None:
        self.step()
        self.clock.offset_s += s

    @rule(muted=st.booleans())
    def drop_events(self, muted: bool) -> None:
        self.step()
        self.muted = muted

    @rule(turns=st.integers(1, 40))
    def breathe(self, turns: int) -> None:
        self.step()

        async def some_turns() -> None:
            for _ in range(turns):
                await asyncio.sleep(0.0002)

        self.during(some_turns())

    @rule(key=key_st, question=st.sampled_from(("hello", "and now?")))
    def ask(self, key: Key, question: str) -> None:
        """In the middle of the storm.

        From a text and a model that there were since it was calm, whole.
        """
        self.step()
        answer = self.during(self._ask(key, question))
        if answer is None:
            return
        text, job, _ = answer
        models = self.recent_models[key.model]
        texts = {t for t in self.recent_texts[key] if t is not None}
        right = {
            expected_text(model, _render(job.model, t, question), job.sampling)
            for model in models
            for t in texts
        }
        assert text in right, f"a wrong answer for {key}: {job.prompt!r}"

    @rule(key=key_st, owner=st.sampled_from((1000, 1001)))
    def talk(self, key: Key, owner: int) -> None:
        """A user goes on with a conversation.

        Each answer is right, wherever its state comes from: memory, a prompt cache or a saved file.
        """
        self.step()
        said = self.talks.setdefault((key, owner), [])
        del said[:-6]
        while said and said[0]["role"] != "user":
            del said[0]
        messages = [*said, {"role": "user", "content": f"and then, {owner}? " * 4}]
        answer = self.during(self._ask_on(key, messages, owner))
        if answer is None:
            return
        text, job, _ = answer
        models = self.recent_models[key.model]
        right = {expected_text(model, job.prompt, job.sampling) for model in models}
        assert text in right, f"a wrong answer for {key}: {job.prompt!r}"
        said[:] = [*messages, {"role": "assistant", "content": text}]

    async def _ask(self, key: Key, question: str) -> Any:
        return await self._ask_on(key, [{"role": "user", "content": question}])

    async def _ask_on(self, key: Key, messages: list[dict[str, str]], owner: int = 1) -> Any:
        request = ChatRequest.model_validate(
            {
                "model": f"{key.model}/{key.prompt}",
                "messages": messages,
                "max_tokens": 12,
            }
        )
        try:
            job, _ = await self.preparation.chat(request, time.monotonic(), owner, 0)
            parts = [part async for part in self.serving.run(job)]
        except RequestError:
            return None
        return (
            "".join(part.text for part in parts if isinstance(part, Text)),
            job,
            next(p for p in parts if isinstance(p, End)),
        )

    # Calm

    @rule()
    def calm(self) -> None:
        self.step()
        self.full = False
        self.during(self._calm())

    def teardown(self) -> None:
        try:
            if hasattr(self, "running"):
                self.full = False
                self.during(self._calm())
        finally:
            try:
                if hasattr(self, "running"):
                    self.during(self.stop())
            finally:
                self.runner.close()
                self.outside.close()
                shutil.rmtree(self.root)

    async def _calm(self) -> None:
        await self._wait_for_calm()
        self.forget()
        await self._check()

    async def _wait_for_calm(self) -> None:
        """No rescan, unless events were dropped or only the passing of time helps.

        Else events must do it.
        """
        end = time.monotonic() + CALM_S
        if self.muted or self.unseen:
            self.muted = self.unseen = False
            self.reconciler.look_again(now=True)
        patience, jumps = time.monotonic() + 0.05, 0
        while True:
            await asyncio.sleep(0.002)
            assert not self.running.done(), self.running
            reconciler = self.reconciler
            assessments = reconciler.snapshot.assessments.values()
            busy = (
                reconciler.snapshot.building is not None
                or len(reconciler._queue)
                or reconciler._builds.paused
                or reconciler._wake.is_set()
            )
            retries = [
                a for a in assessments if isinstance(a.action, Blocked) and a.action.retry_at
            ]
            if not busy and retries:
                self.clock.offset_s += 61.0
                jumps += 1
                assert jumps < 20, "time does not help, as if the clock had been set back for good"
                reconciler.look_again(now=True)
            elif not busy and not self._to_do():
                return
            elif time.monotonic() > end:
                msg = (
                    f"not calm after {CALM_S} s: busy={busy}, {self._to_do()}, {list(assessments)}"
                )
                raise AssertionError(msg)
            elif time.monotonic() > patience:
                await asyncio.sleep(0.01)

    def _to_do(self) -> list[Any]:
        """What an independent look at the disk finds to do."""
        manifest = ManifestFile(self.manifest, self.reconciler._manifest_file.last_good).read()
        look = self.observer.observe(
            manifest, self.reconciler._failures.verdicts(self.reconciler.snapshot.desired)
        )
        todo: list[Any] = [
            action for action in plan(look.assessments) if not isinstance(action, Blocked)
        ]
        if {k: a.state for k, a in self.reconciler.snapshot.assessments.items()} != {
            a.key: a.state for a in look.assessments if not a.retired
        }:
            todo.append("the snapshot is behind")
        if self.reconciler.snapshot.retired.keys() != look.inventory.retired.keys():
            todo.append("the snapshot is behind about retired artifacts")
        return todo

    def expected_states(self) -> dict[Key, State]:
        """Which prompts must be fresh, by the rule of the budget: in manifest order, what fits."""
        states: dict[Key, State] = {}
        used = 0
        for model in MODELS:
            for name in self.declared[model]:
                key = Key(model, name)
                text = self.text_of(key)
                if text is None:
                    states[key] = State.BLOCKED
                    continue
                prefix = self.reconciler.snapshot.desired.models[model].template.prefix(text)  # type: ignore[union-attr]
                size = HEADER_BYTES + STATE_BYTES * len(prefix.encode())
                fits = self.max_bytes is None or used + size <= self.max_bytes
                states[key] = State.FRESH if fits else State.BLOCKED
                used += size if fits else 0
        return states

    async def _check(self) -> None:
        snapshot = self.reconciler.snapshot
        unexpected = [key for key in self.built if key not in self.may_build]
        assert not unexpected, f"rebuilt without a reason: {unexpected}"
        states = {key: assessment.state for key, assessment in snapshot.assessments.items()}
        expected = self.expected_states()
        quarantined = {key for key, state in states.items() if state is State.QUARANTINED}
        assert not quarantined or self.kills >= 3, quarantined
        wrong = {
            key: (
                states.get(key),
                state,
                snapshot.assessments[key].reason if key in snapshot.assessments else "",
            )
            for key, state in expected.items()
            if states.get(key) is not state and key not in quarantined
        }
        assert not wrong, f"not what they must be (is, must be, reason): {wrong}"
        assert states.keys() == expected.keys()
        for key, state in states.items():
            answer = await self._ask(key, "hello")
            text = self.text_of(key)
            if text is None:
                assert answer is None, key
                continue
            if answer is None:
                answer = await self._ask(key, "hello")  # the worker had been killed
            assert answer is not None, key
            said, job, end = answer
            (model,) = self.recent_models[key.model]
            assert said == expected_text(model, _render(job.model, text, "hello"), job.sampling), (
                key
            )
            # A build or a kill may have made it cold once; its cache is used as long as it is
            # fresh.
            if state is State.FRESH and end.report.state != "hit":
                _, _, end = await self._ask(key, "hello")
                assert end.report.state == "hit", (key, end.report)
        self._check_files(set(states))
        self.built.clear()
        self.may_build.clear()
        if quarantined or self.kills:
            self.may_build.update(quarantined)
        self.kills = 0 if not quarantined else self.kills

    def _check_files(self, kept: set[Key]) -> None:
        allowed = {
            Path(".lock"),
            Path("CACHEDIR.TAG"),
            Path(".digests.json"),
            Path(".digests.json.tmp"),
        }  # the last: a look may just be ending
        allowed |= {
            Path(key.model, key.prompt + suffix)
            for key in kept
            for suffix in (".memory_cache", ".bin", ".json")
        }
        allowed |= self.damaged
        allowed |= {
            Path(".verdicts", key.model, f"{key.prompt}.json")
            for key in self.reconciler.snapshot.assessments
        }
        retired = self.reconciler.snapshot.retired.values()
        allowed |= {
            Path(".retired", one.fingerprint, one.key.prompt + suffix)
            for one in retired
            for suffix in (".memory_cache", ".bin", ".json")
        }
        files = {
            path.relative_to(self.cache) for path in self.cache.rglob("*") if not path.is_dir()
        }
        elsewhere = {".quarantine", ".conversations"}
        stray = {path for path in files - allowed if path.parts[0] not in elsewhere}
        assert not stray, f"stray files: {stray}"
        artifacts = self.reconciler.snapshot.artifacts.values()
        used = sum(one.size_bytes for one in (*artifacts, *retired))
        assert self.max_bytes is None or used <= self.max_bytes
        quarantine = self.cache / ".quarantine"
        assert not quarantine.is_dir() or len(list(quarantine.iterdir())) <= MAX_QUARANTINED


def _render(model: DesiredModel, system: str, question: str) -> str:
    return model.template.render(
        [{"role": "system", "content": system}, {"role": "user", "content": question}]
    )
