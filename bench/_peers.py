"""Compares the daemon with llama.cpp's own server, in turns and with the same settings.

One question goes to both before the next one does, the first of them changing from turn to turn.
All are started more than once, as two processes of one program may differ by some per cent for as
long as they live. A second server keeps llama.cpp's own defaults. Besides the figures, what a user
has to do and what is noticed: each row was tried here.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from _daemon import BenchError, Daemon
from _figures import Figure, difference, of_median
from _peer import Peer, Settings
from _workspaces import PEER_CONTEXT, PEER_TOKENS, Bench, peers

from rkcached.cli.bench.alone import look_at
from rkcached.cli.bench.asking import Answer
from rkcached.cli.bench.samples import median
from rkcached.cli.launcher import Workspace, small_model
from rkcached.errors import DaemonUnreachable, RkcachedError
from rkcached.plan.desired import DesiredModel
from rkcached.sources.records import Key
from rkcached.worker.building import BOUNDARY_TOKENS

MODEL = "small"
OURS, SAME, PLAIN = "rkcached", "llama.cpp, same settings", "llama.cpp, its defaults"
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

Ask = Callable[[str, str, str], Answer]
"""Asks about a prompt, with a question, in a state: "cold", "first", "restored", "in memory"."""

Answers = dict[tuple[str, str, str], list[Answer]]
"""By side, prompt and state."""


def measure_peers(bench: Bench) -> list[Figure]:
    """The figures, then the table of what a user has to do."""
    workspace = bench.workspace(peers)
    slots = workspace.root / "slots"
    slots.mkdir()
    with Daemon(workspace) as daemon:
        daemon.wait_fresh(timeout_s=BUILD_TIMEOUT_S)
        texts = _Texts(workspace)
    bench.say("what a user has to do")
    facts = [*_facts_of_peer(workspace, texts), *_facts(workspace, texts)]  # first: they may fail
    shutil.copyfile(small_model(), workspace.root / "model.gguf")  # one of them changed its weights
    answers: Answers = defaultdict(list)
    for launch in range(LAUNCHES):
        bench.say(f"launch {launch + 1} of {LAUNCHES}")
        with (
            Daemon(workspace) as daemon,
            Peer(small_model(), PEER_CONTEXT, slots) as same,
            Peer(small_model(), PEER_CONTEXT, slots, Settings.DEFAULTS) as plain,
        ):
            daemon.wait_fresh(timeout_s=BUILD_TIMEOUT_S)
            sides: dict[str, Ask] = {
                OURS: partial(_through_daemon, daemon),
                SAME: _through_peer(same, texts, "-same.bin"),
                PLAIN: _through_peer(plain, texts, "-plain.bin"),
            }
            if launch == 0:
                for prompt in PEER_TOKENS:
                    same.save(texts.prefix(prompt), f"{prompt}-same.bin")
                    plain.save(texts.prefix(prompt), f"{prompt}-plain.bin")
            _measure_in_turns(launch, -(-bench.runs * PAIRS_PER_RUN // LAUNCHES), sides, answers)
    return [*_times(answers, texts), *_rates(answers, texts), *facts]


class _Texts:
    """The rendered prompts, from the same function that the daemon renders with."""

    def __init__(self, workspace: Workspace) -> None:
        self._look = look_at(workspace.manifest, workspace.store, workspace.root / "state")
        model = self._look.desired.models[MODEL]
        if not isinstance(model, DesiredModel):
            raise BenchError(f"the model cannot be used: {model}")
        self._model = model
        artifacts = self._look.inventory.artifacts
        self.tokens = {key.prompt: artifact.sidecar.tokens for key, artifact in artifacts.items()}

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


def _measure_in_turns(launch: int, runs: int, sides: dict[str, Ask], answers: Answers) -> None:
    count = 200 * launch

    def turn(prompt: str, state: str) -> None:
        nonlocal count
        count += 1
        question = f"{count % 1000:03d}: In one sentence, what is your most important rule?"
        at = count % len(sides)
        for side in [*sides][at:] + [*sides][:at]:
            answers[side, prompt, state].append(sides[side](prompt, question, state))
            time.sleep(PAUSE_S)

    turn(next(iter(PEER_TOKENS)), "first")  # the daemon loads its model with the first request
    for prompt in PEER_TOKENS:
        turn(prompt, "cold")
        turn(prompt, "first")
    for _ in range(runs):
        for prompt in PEER_TOKENS:
            turn(prompt, "restored")
            turn(prompt, "in memory")


def _through_daemon(daemon: Daemon, prompt: str, question: str, state: str) -> Answer:
    is_cold = state == "cold"
    answer = ask_daemon(daemon, f"{MODEL}/{prompt}", question, cold=is_cold)
    report = answer.report
    if report["state"] != ("cold" if is_cold else "hit"):
        raise BenchError(f"{state}: {report}{daemon.last_words()}")
    if state in ("restored", "in memory") and (report["load_ms"] > 0) != (state == "restored"):
        raise BenchError(f"not {state}: {report}")
    return answer


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


def _through_peer(peer: Peer, texts: _Texts, kind: str) -> Ask:
    def ask(prompt: str, question: str, state: str) -> Answer:
        restore = prompt + kind if state in ("restored", "first") else ""
        request = texts.request(prompt, question)
        answer = peer.ask(request, ANSWER_TOKENS, restore=restore, cold=state == "cold")
        reused = _reused(answer)
        if reused if state == "cold" else reused < texts.tokens[prompt] - BOUNDARY_TOKENS:
            raise BenchError(f"{state}: llama.cpp's server reused {reused} tokens")
        return answer

    return ask


def _times(answers: Answers, texts: _Texts) -> Iterator[Figure]:
    table = "time to first token"
    for prompt in PEER_TOKENS:
        for state in ("cold", "restored", "in memory"):
            name = f"{texts.tokens[prompt]:,} tokens, {state}"
            ttft = {}
            for side in (OURS, SAME, PLAIN):
                ttft[side] = [answer.ttft_ms for answer in answers[side, prompt, state]]
                yield of_median("peers", name, ttft[side], "ms", table=table, column=side)

            aim = None
            if state != "cold":
                aim = round(max(FLOOR_MS, SHARE * median(ttft[SAME])), 1)
            column = "rkcached less same settings, by pairs"
            yield difference(
                "peers", name, ttft[OURS], ttft[SAME], table=table, column=column, aim=aim
            )
            ours, theirs = (
                [answer.ttft_ms - _prefill_ms(answer) for answer in answers[side, prompt, state]]
                for side in (OURS, SAME)
            )
            yield difference("peers", name, ours, theirs, table=table, column="of it not prefill")


def _rates(answers: Answers, texts: _Texts) -> Iterator[Figure]:
    for prompt in PEER_TOKENS:
        name = f"{texts.tokens[prompt]:,} tokens"
        for side in (OURS, SAME, PLAIN):
            samples = [answer.per_token_ms for answer in answers[side, prompt, "in memory"]]
            table = "a token more, after"
            yield of_median("peers", name, samples, "ms", table=table, column=side)


def _prefill_ms(answer: Answer) -> float:
    return float(answer.report.get("prefill_ms", answer.last("timings").get("prompt_ms")))


def _reused(answer: Answer) -> int:
    """Tokens, as llama.cpp's server says."""
    return int(answer.last("timings")["cache_n"])


# What a user has to do, and what is noticed: each a number that was seen, and what it means

_PROMPT = list(PEER_TOKENS)[1]
_QUESTION = "What is your most important rule?"

_ONE_CACHE = "calls to make one cache"
_WARM_ANSWER = "calls for a warm answer"
_EDITED = "after an edit of the prompt"
_RESTARTED = "first answer after a restart"
_WEIGHTS = "after other weights in the model file"


def _fact(name: str, who: str, value: float, note: str) -> Figure:
    table = "what a user has to do"
    return Figure(part="peers", table=table, name=name, column=who, value=value, unit="", note=note)


def _facts(workspace: Workspace, texts: _Texts) -> Iterator[Figure]:
    """The daemon's. The model is a copy, because it is swapped."""
    system = texts.system(_PROMPT)

    def fact(name: str, answer: Answer, note: str) -> Figure:
        return _fact(name, OURS, answer.report["cached_tokens"], note)

    with Daemon(workspace) as daemon:

        def ask() -> Answer:
            return ask_daemon(daemon, f"{MODEL}/{_PROMPT}", _QUESTION)

        daemon.wait_fresh()
        yield fact(_RESTARTED, ask(), "tokens reused, 1 call")
        answer = ask_daemon(daemon, MODEL, _QUESTION, system=system)
        yield fact("the client sends the text, names no cache", answer, "found by text")

        source = workspace.root / "prompts" / f"{_PROMPT}.md"
        seconds = _noticed(daemon, lambda: source.write_text(_edit(system)))
        note = f"tokens reused; built anew without a command, {seconds:.1f} s after the save"
        yield fact(_EDITED, ask(), note)
        _noticed(daemon, lambda: source.write_text(system))

        for name, damage in _DAMAGES.items():
            other = next(iter(PEER_TOKENS))
            ask_daemon(daemon, f"{MODEL}/{other}", _QUESTION)  # so that the file is needed
            damage(workspace.store / MODEL / f"{_PROMPT}.llama_cache")
            answer = ask()
            daemon.hang_up()
            statuses = daemon.statuses(every_s=0.05, timeout_s=NOTICE_S)
            again = (ask().report for _ in statuses)
            healed = next(report["cached_tokens"] for report in again if report["state"] == "hit")
            note = f"tokens reused, answer {answer.report['state']}; built anew, then {healed:,}"
            yield fact(name, answer, note)

        daemon.wait_fresh()
        seconds = _noticed(daemon, lambda: _change_weights(workspace.root / "model.gguf"))
        note = (
            f"tokens reused, of a cache that was built with the new model; {seconds:.1f} s after "
            "the change"
        )
        yield fact(_WEIGHTS, ask(), note)


def _noticed(daemon: Daemon, change: Callable[[], object]) -> float:
    """Seconds until every cache that the change made stale was built anew."""
    before = [prompt["artifact"]["fingerprint"] for prompt in daemon.status()["prompts"]]
    started = time.perf_counter()
    change()

    def is_done(status: dict[str, Any]) -> bool:
        prompts = status["prompts"]
        now = [prompt.get("artifact", {}).get("fingerprint") for prompt in prompts]
        return now != before and {prompt["state"] for prompt in prompts} == {"fresh"}

    next(filter(is_done, daemon.statuses(every_s=0.05, timeout_s=NOTICE_S)))
    return time.perf_counter() - started


def _facts_of_peer(workspace: Workspace, texts: _Texts) -> Iterator[Figure]:
    slots = workspace.root / "slots"
    tokens = texts.tokens[_PROMPT]
    request = texts.request(_PROMPT, _QUESTION)
    model = workspace.root / "swapped.gguf"
    shutil.copyfile(small_model(), model)

    def fact(name: str, value: int, note: str) -> Figure:
        return _fact(name, "llama.cpp's server", value, note)

    def serve() -> Peer:
        return Peer(model, PEER_CONTEXT, slots)

    with serve() as peer:
        peer.save(texts.prefix(_PROMPT), "kept.bin")
        yield _fact(_ONE_CACHE, OURS, 0, "the prompt's file in the manifest")
        yield fact(_ONE_CACHE, peer.calls, "prefill, save; its file's name is the user's")
        first = peer.calls
        peer.ask(request, 1, restore="kept.bin")
        yield _fact(_WARM_ANSWER, OURS, 1, "names the prompt, or just sends its text")
        yield fact(_WARM_ANSWER, peer.calls - first, "restore a named file, ask")
        peer.restore("kept.bin")
        edited = texts.request(_PROMPT, _QUESTION, system=_edit(texts.system(_PROMPT)))
        note = f"of {tokens:,} tokens reused: slow, and nothing says so; save again by hand"
        yield fact(_EDITED, _reused(peer.ask(edited, 1)), note)

    with serve() as peer:
        yield fact(_RESTARTED, _reused(peer.ask(request, 1)), "no restore")
        answer = peer.ask(request, 1, restore="kept.bin")
        yield fact("restored by hand", _reused(answer), "tokens reused, 2 calls")

    for name, damage in _DAMAGES.items():
        shutil.copyfile(slots / "kept.bin", slots / "damaged.bin")
        damage(slots / "damaged.bin")
        with serve() as peer:
            try:
                answer = peer.ask(request, 1, restore="damaged.bin")
            except DaemonUnreachable as error:
                yield fact(name, 0, f"the server {peer.death() or error.message}")
            except RkcachedError as error:
                yield fact(name, 0, f"refused: {error.message[:80]}")
            else:
                yield fact(name, _reused(answer), "tokens reused, nothing is said")

    _change_weights(model)
    with serve() as peer:
        answer = peer.ask(request, 1, restore="kept.bin")
        note = "tokens reused: the old model's state under the new one, and nothing is said"
        yield fact(_WEIGHTS, _reused(answer), note)
    model.unlink()


def _edit(system: str) -> str:
    return f"Edited. {system}"


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _change_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


_DAMAGES = {"the file cut in half": _cut, "the file one byte changed": _change_byte}


def _change_weights(path: Path) -> None:
    """Change some bytes of a tensor near the file's end: the model then answers otherwise."""
    with path.open("r+b") as stream:
        stream.seek(-(1 << 20), 2)
        stream.write(bytes(range(256)) * 64)
