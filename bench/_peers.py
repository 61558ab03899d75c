"""Compares the daemon with llama.cpp's own server, in turns and with the same settings.

One question goes to both before the next one does, the first of them changing from turn to turn.
All are started more than once, as two processes of one program may differ by some per cent for as
long as they live. A second server keeps llama.cpp's own defaults. Besides the figures, what a user
has to do and what is noticed: each row was tried here.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _daemon import BenchError, Daemon, busy_ns
from _peer import Peer
from _results import Figure, Target, difference, of_median
from _workspaces import PEER_CONTEXT, PEER_TOKENS, Bench, peers

from rkcached.cli.bench.alone import look_at
from rkcached.cli.bench.asking import Answer
from rkcached.cli.bench.samples import median
from rkcached.cli.launcher import Workspace, small_model
from rkcached.errors import DaemonUnreachable, RkcachedError
from rkcached.plan.desired import DesiredModel
from rkcached.sources.records import Key
from rkcached.worker.operations import BOUNDARY_TOKENS

MODEL = "small"
ANSWER_TOKENS = 32
LAUNCHES = 4
"""Of the daemon and both servers. Each has one cold run, which costs some twenty seconds at the
longest prompt."""

PAIRS_PER_RUN = 6
"""With 20 pairs the interval of a long prompt's difference was wider than what the daemon may add.
"""

PAUSE_S = 0.05
"""Between two answers: an engine's threads may spin for a moment after their work."""

SHARE, FLOOR_MS = 0.05, 2.0
"""The daemon may be this much slower than the bare server, whichever is larger."""

NOTICE_S = 600.0
BUILD_TIMEOUT_S = 1200.0


@dataclass(slots=True, kw_only=True)
class _Samples:
    ttft: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    """Of it, what is not prefill."""
    per_token: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def add(self, answer: Answer, cpu_ns: int) -> None:
        prefill_ms = answer.report.get("prefill_ms", answer.last("timings").get("prompt_ms"))
        self.ttft.append(answer.ttft_ms)
        self.rest.append(answer.ttft_ms - prefill_ms)
        self.per_token.append(answer.per_token_ms)
        self.cpu.append(cpu_ns / 1e6 / ANSWER_TOKENS)


class _Side:
    """One of the servers over all its launches, and its answers to each kind of request."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: dict[tuple[str, str], _Samples] = {}

    def launched(
        self, ask: Callable[[str, str, str], Answer], pids: Callable[[], list[int]]
    ) -> None:
        self._ask = ask
        self._pids = pids

    def run(self, prompt: str, question: str, how: str) -> None:
        pids = self._pids()
        before = sum(map(busy_ns, pids))
        answer = self._ask(prompt, question, how)
        cpu = sum(map(busy_ns, pids)) - before
        self.samples.setdefault((prompt, how), _Samples()).add(answer, cpu)
        time.sleep(PAUSE_S)


def measure_peers(bench: Bench) -> list[Figure]:
    """The figures, then the table of what a user has to do."""
    workspace = bench.workspace(peers)
    slots = workspace.root / "slots"
    slots.mkdir()
    with Daemon(workspace) as daemon:
        daemon.wait_fresh(timeout_s=BUILD_TIMEOUT_S)
        texts = _Texts(workspace)
    bench.say("what a user has to do")
    facts = list(_facts(workspace, texts))  # first, for they may fail
    shutil.copyfile(
        small_model(), workspace.root / "model.gguf"
    )  # whose weights one of them changed
    sides = [_Side("rkcached"), _Side("llama.cpp, same settings"), _Side("llama.cpp, its defaults")]
    for launch in range(LAUNCHES):
        bench.say(f"launch {launch + 1} of {LAUNCHES}")
        with (
            Daemon(workspace) as daemon,
            Peer(small_model(), PEER_CONTEXT, slots, tuned=True) as same,
            Peer(small_model(), PEER_CONTEXT, slots, tuned=False) as plain,
        ):
            daemon.wait_fresh(timeout_s=BUILD_TIMEOUT_S)
            sides[0].launched(_through_daemon(daemon), lambda: _pids_of(daemon))
            for side, server, kind in zip(
                sides[1:], (same, plain), ("-same.bin", "-plain.bin"), strict=True
            ):
                if not launch:
                    for prompt in PEER_TOKENS:
                        server.save(texts.prefix(prompt), prompt + kind)
                side.launched(_through_peer(server, texts, kind), lambda pid=server.pid: [pid])
            _measure_in_turns(launch, -(-bench.runs * PAIRS_PER_RUN // LAUNCHES), sides)
    return [*_figures(sides, texts), *facts]


class _Texts:
    """The rendered prompts, from the same function that the daemon renders with."""

    def __init__(self, workspace: Workspace) -> None:
        self._look = look_at(workspace.manifest, workspace.store, workspace.root / "state")
        model = self._look.desired.models[MODEL]
        if not isinstance(model, DesiredModel):
            raise BenchError(f"the model cannot be used: {model}")
        self._model = model
        self.tokens = {
            key.prompt: a.sidecar.tokens for key, a in self._look.inventory.artifacts.items()
        }

    def prefix(self, prompt: str) -> str:
        return self._model.template.prefix(self.system(prompt))

    def system(self, prompt: str) -> str:
        return self._look.desired.texts[Key(MODEL, prompt)]

    def request(self, prompt: str, question: str, *, system: str = "") -> str:
        system = system or self.system(prompt)
        return self._model.template.render(
            [{"role": "system", "content": system}, {"role": "user", "content": question}]
        )


# Time to first token, and the tokens after it


def _measure_in_turns(launch: int, runs: int, sides: list[_Side]) -> None:
    count = 200 * launch

    def turn(prompt: str, how: str) -> None:
        nonlocal count
        count += 1
        at = count % len(sides)
        for side in (*sides[at:], *sides[:at]):
            side.run(
                prompt,
                f"{count % 1000:03d}: In one sentence, what is your most important rule?",
                how,
            )

    turn(next(iter(PEER_TOKENS)), "first")  # the daemon loads its model with the first request
    for prompt in PEER_TOKENS:
        turn(prompt, "cold")
        turn(prompt, "first")
    for _ in range(runs):
        for prompt in PEER_TOKENS:
            turn(prompt, "restored")
            turn(prompt, "in memory")


def _through_daemon(daemon: Daemon) -> Callable[[str, str, str], Answer]:
    def ask(prompt: str, question: str, how: str) -> Answer:
        answer = ask_daemon(daemon, f"{MODEL}/{prompt}", question, cold=how == "cold")
        report = answer.report
        if report["state"] != ("cold" if how == "cold" else "hit"):
            raise BenchError(f"{how}: {report}{daemon.last_words()}")
        if how in ("restored", "in memory") and (report["load_ms"] > 0) != (how == "restored"):
            raise BenchError(f"not {how}: {report}")
        return answer

    return ask


def ask_daemon(
    daemon: Daemon, model: str, question: str, *, cold: bool = False, system: str = ""
) -> Answer:
    """Stream an answer.

    With `system`, the client sends the system message itself and names the model only.
    """
    messages = [{"role": "user", "content": question}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": ANSWER_TOKENS}
    return daemon.ask(body | {"cache": False} if cold else body)


def _through_peer(peer: Peer, texts: _Texts, kind: str) -> Callable[[str, str, str], Answer]:
    def ask(prompt: str, question: str, how: str) -> Answer:
        restore = prompt + kind if how in ("restored", "first") else ""
        answer = peer.ask(
            texts.request(prompt, question), ANSWER_TOKENS, restore=restore, cold=how == "cold"
        )
        reused = answer.last("timings")["cache_n"]
        if reused if how == "cold" else reused < texts.tokens[prompt] - BOUNDARY_TOKENS:
            raise BenchError(f"{how}: llama.cpp's server reused {reused} tokens")
        return answer

    return ask


def _pids_of(daemon: Daemon) -> list[int]:
    return [daemon.pid, *(model["pid"] for model in daemon.status()["models"] if model["pid"])]


def _figures(sides: list[_Side], texts: _Texts) -> Iterator[Figure]:
    ours, same, _ = sides
    for prompt in PEER_TOKENS:
        for how in ("cold", "restored", "in memory"):
            name = f"{texts.tokens[prompt]:,} tokens, {how}"
            for side in sides:
                yield of_median(
                    "peers", f"{name}: {side.name}", side.samples[prompt, how].ttft, "ms"
                )
            of_ours, of_same = ours.samples[prompt, how], same.samples[prompt, how]
            limit = round(max(FLOOR_MS, SHARE * median(of_same.ttft)), 1) if how != "cold" else None
            target = Target(limit=limit) if limit is not None else None
            name = "  rkcached less same settings, by pairs"
            yield difference("peers", name, _less(of_ours.ttft, of_same.ttft), target)
            rest = _less(of_ours.rest, of_same.rest)
            yield difference("peers", "    of it not prefill", rest, None)
    for prompt in PEER_TOKENS:
        name = f"a token more, after {texts.tokens[prompt]:,}"
        for side in sides:
            samples = side.samples[prompt, "in memory"]
            cpu = f"CPU of the whole answer {median(samples.cpu):.1f} ms a token"
            yield of_median("peers", f"{name}: {side.name}", samples.per_token, "ms", note=cpu)


def _less(ours: list[float], theirs: list[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


# What a user has to do, and what is noticed


def _facts(workspace: Workspace, texts: _Texts) -> Iterator[Figure]:
    """Each is a number that was seen, and what it means.

    The model is a copy, because it is swapped.
    """
    prompt, question = list(PEER_TOKENS)[1], "What is your most important rule?"
    system, tokens = texts.system(prompt), texts.tokens[prompt]
    edited = f"Edited. {system}"
    yield from _facts_of_peer(workspace, texts, prompt, question, edited)
    ours = "rkcached"
    with Daemon(workspace) as daemon:
        daemon.wait_fresh()
        answer = ask_daemon(daemon, f"{MODEL}/{prompt}", question)
        yield _fact(
            f"first answer after a restart, reused of {tokens}",
            ours,
            answer.report["cached_tokens"],
            "1 call",
        )
        answer = ask_daemon(daemon, MODEL, question, system=system)
        yield _fact(
            "  the client sends the text, names no cache",
            ours,
            answer.report["cached_tokens"],
            "found by text",
        )

        source = workspace.root / "prompts" / f"{prompt}.md"
        seconds = _noticed(daemon, lambda: source.write_text(edited))
        answer = ask_daemon(daemon, f"{MODEL}/{prompt}", question)
        note = f"tokens reused; built anew without a command, {seconds:.1f} s after the save"
        yield _fact("after an edit of the prompt", ours, answer.report["cached_tokens"], note)
        _noticed(daemon, lambda: source.write_text(system))

        for name, damage in (("cut in half", _cut), ("one byte changed", _change_byte)):
            other = next(p for p in PEER_TOKENS if p != prompt)
            ask_daemon(daemon, f"{MODEL}/{other}", question)  # so that the file is needed
            damage(workspace.store / MODEL / f"{prompt}.llama_cache")
            answer = ask_daemon(daemon, f"{MODEL}/{prompt}", question)
            state = answer.report["state"]
            daemon.hang_up()
            healed = _cached_again(daemon, prompt, question)
            note = f"tokens reused, answer {state}; built anew, then {healed:,}"
            yield _fact(f"the file {name}", ours, answer.report["cached_tokens"], note)

        model = workspace.root / "model.gguf"
        daemon.wait_fresh()
        seconds = _noticed(daemon, lambda: _change_weights(model))
        answer = ask_daemon(daemon, f"{MODEL}/{prompt}", question)
        note = (
            f"tokens reused, of a cache that was built with the new model; {seconds:.1f} s after "
            "the change"
        )
        yield _fact(
            "after other weights in the model file", ours, answer.report["cached_tokens"], note
        )


def _facts_of_peer(
    workspace: Workspace, texts: _Texts, prompt: str, question: str, edited: str
) -> Iterator[Figure]:
    theirs, slots, tokens = "llama.cpp", workspace.root / "slots", texts.tokens[prompt]
    model = workspace.root / "swapped.gguf"
    shutil.copyfile(small_model(), model)
    request = texts.request(prompt, question)

    def serve() -> Peer:
        return Peer(model, PEER_CONTEXT, slots, tuned=True)

    with serve() as peer:
        peer.save(texts.prefix(prompt), "kept.bin")
        yield _fact(
            "calls to make one cache",
            theirs,
            peer.calls,
            "prefill, save; its file's name is the user's",
        )
        yield _fact("calls to make one cache", "rkcached", 0, "the prompt's file in the manifest")
        first = peer.calls
        peer.ask(request, 1, restore="kept.bin")
        yield _fact(
            "calls for a warm answer", theirs, peer.calls - first, "restore a named file, ask"
        )
        yield _fact(
            "calls for a warm answer", "rkcached", 1, "names the prompt, or just sends its text"
        )
        peer.restore("kept.bin")
        answer = peer.ask(texts.request(prompt, question, system=edited), 1)
        note = f"of {tokens:,} tokens reused: slow, and nothing says so; save again by hand"
        yield _fact("after an edit of the prompt", theirs, answer.last("timings")["cache_n"], note)
    with serve() as peer:
        answer = peer.ask(request, 1)
        yield _fact(
            f"first answer after a restart, reused of {tokens}",
            theirs,
            answer.last("timings")["cache_n"],
            "no restore",
        )
        answer = peer.ask(request, 1, restore="kept.bin")
        yield _fact("  restored by hand", theirs, answer.last("timings")["cache_n"], "2 calls")

    good = (slots / "kept.bin").read_bytes()
    for name, damage in (("cut in half", _cut), ("one byte changed", _change_byte)):
        (slots / "damaged.bin").write_bytes(good)
        damage(slots / "damaged.bin")
        with serve() as peer:
            try:
                answer = peer.ask(request, 1, restore="damaged.bin")
            except DaemonUnreachable as error:
                end = peer.death() or error.message
                yield _fact(f"the file {name}", theirs, 0, f"the server {end}")
            except RkcachedError as error:
                yield _fact(f"the file {name}", theirs, 0, f"refused: {error.message[:80]}")
            else:
                yield _fact(
                    f"the file {name}",
                    theirs,
                    answer.last("timings")["cache_n"],
                    "tokens reused, nothing is said",
                )
    _change_weights(model)
    with serve() as peer:
        answer = peer.ask(request, 1, restore="kept.bin")
        note = "tokens reused: the old model's state under the new one, and nothing is said"
        yield _fact(
            "after other weights in the model file", theirs, answer.last("timings")["cache_n"], note
        )
    model.unlink()


def _fact(name: str, who: str, value: float, note: str) -> Figure:
    return Figure(part="peers", name=f"{name}: {who}", value=value, unit="", note=note)


def _cached_again(daemon: Daemon, prompt: str, question: str) -> int:
    """The tokens that the first answer from a cache reuses."""
    started = time.perf_counter()
    while time.perf_counter() - started < NOTICE_S:
        report = ask_daemon(daemon, f"{MODEL}/{prompt}", question).report
        if report["state"] == "hit":
            return int(report["cached_tokens"])
        time.sleep(0.05)
    raise BenchError(f"{prompt} was not cached again within {NOTICE_S:.0f} s")


def _noticed(daemon: Daemon, change: Callable[[], object]) -> float:
    """Seconds until every cache that the change made stale was built anew."""
    before = [prompt["artifact"]["fingerprint"] for prompt in daemon.status()["prompts"]]
    started = time.perf_counter()
    change()
    while time.perf_counter() - started < NOTICE_S:
        status = daemon.status()
        now = [prompt.get("artifact", {}).get("fingerprint") for prompt in status["prompts"]]
        if now != before and {prompt["state"] for prompt in status["prompts"]} == {"fresh"}:
            return time.perf_counter() - started
        time.sleep(0.05)
    raise BenchError(f"a change was not noticed within {NOTICE_S:.0f} s{daemon.last_words()}")


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _change_weights(path: Path) -> None:
    """Change some bytes of a tensor near the file's end: the model then answers otherwise."""
    with path.open("r+b") as stream:
        stream.seek(-(1 << 20), 2)
        stream.write(bytes(range(256)) * 64)
