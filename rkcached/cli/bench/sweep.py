"""Prompts of chosen lengths, stored in the running daemon for as long as they are measured.

No tokenizer is needed: three answers show how many tokens a text of words has. What is reported is
the length that the prompt cache really has.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rkcached.cli.bench.asking import ANSWER_TOKENS, QUESTION
from rkcached.cli.client import Client
from rkcached.errors import DaemonUnreachable, RequestError, SourceError
from rkcached.sources.records import Key

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
"""Tokens."""

_LINE = (
    "the roof of the house opens when water and air are warm enough for the plants but never at "
    "night or in rain"
)
_WORDS = _LINE.split()
# Words of the two texts that give the number of tokens of a word.
_SAMPLES = (20, 100)
_NAME = re.compile(r"bench-(\d+)-\d+")
_PROC = Path("/proc")


@dataclass(slots=True)
class Stored:
    """Prompts that a sweep has stored."""

    lengths: dict[Key, int] = field(default_factory=dict)
    """Tokens that were chosen for each."""
    refused: list[str] = field(default_factory=list)
    """Prompts that could not be stored, with the reason."""
    left: list[Key] = field(default_factory=list)
    """At the end: those that could not be removed, for the daemon was gone."""


@contextmanager
def stored(
    socket: Path,
    admin_socket: Path,
    models: Sequence[str],
    context_tokens: Callable[[str], int | None],
    on_step: Callable[[str, str], None],
) -> Iterator[Stored]:
    """The prompts, of every model that takes some. Removed at the end, however it comes.

    What earlier sweeps had to leave is removed first. `on_step` gets the model and what is done.
    Errors: DaemonUnreachable; RequestError, SourceError if none could be stored.
    """
    tried: list[Key] = []
    kept = Stored()
    try:
        with Client(socket) as asking, Client(admin_socket) as admin:
            _remove_leftovers(asking, admin)
            for model in models:
                try:
                    head, per_word = _measure(asking, model)
                except (RequestError, SourceError) as error:
                    if len(models) == 1:
                        raise
                    kept.refused.append(f"{model}: {error.message}")
                    continue

                for tokens in lengths(context_tokens(model), head):
                    key = Key(
                        model, f"bench-{os.getpid()}-{tokens:05d}"
                    )  # the budget goes by name: short ones first
                    on_step(model, f"building a prompt of {tokens:,} tokens")
                    tried.append(key)

                    try:
                        admin.store(*key, text(tokens, round((tokens - head) / per_word)))
                    except RequestError as error:
                        kept.refused.append(f"{model}, {tokens:,} tokens: {error.message}")
                    else:
                        kept.lengths[key] = tokens

        if not kept.lengths:
            raise SourceError(
                f"no prompt could be stored: {'; '.join(kept.refused)}",
                hint="raise params.max_context_len or cache.max_bytes in the manifest",
            )

        yield kept
    finally:
        kept.left = _remove(admin_socket, tried)


def _remove_leftovers(asking: Client, admin: Client) -> None:
    """Delete what sweeps stored whose process was killed.

    The daemon refuses to delete what the manifest declares.
    """
    for prompt in asking.status()["prompts"]:
        key = Key(prompt["model"], prompt["prompt"])
        named = _NAME.fullmatch(key.prompt)
        if named is not None and not _is_bench(int(named[1])):
            _delete(admin, key)


def _is_bench(pid: int) -> bool:
    """Whether another process of this number is a running `rkcached bench`."""
    if pid == os.getpid():
        return False

    try:
        words = (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False

    return b"bench" in words and any(b"rkcached" in word for word in words)


def _delete(admin: Client, key: Key) -> None:
    """Errors: DaemonUnreachable; RequestError unless it is gone already or was never stored."""
    try:
        admin.delete(*key)
    except RequestError as error:
        if error.status not in (404, 409):
            raise


def lengths(context_tokens: int | None, head: int) -> list[int]:
    """Those of LENGTHS that leave room for question and answer.

    The first that does not is cut to the room there is.
    """
    if not context_tokens:
        return list(LENGTHS)

    room = context_tokens - head - ANSWER_TOKENS - 2 * len(QUESTION)
    fitting = [tokens for tokens in LENGTHS if tokens <= room]
    largest = 0
    if fitting:
        largest = fitting[-1]
    if largest < LENGTHS[-1] and room > largest * 1.25:
        fitting.append(room)
    return fitting


def text(number: int, words: int) -> str:
    """So many words.

    Texts of different numbers differ from the start, so that no cache serves another's prompt.
    """
    return " ".join(
        [f"{number}.", *(_WORDS[index % len(_WORDS)] for index in range(max(1, words)))]
    )


def _measure(client: Client, model: str) -> tuple[int, float]:
    """Tokens of a system message without its words, and of each word.

    One more turn shows what is not the message's.
    """
    user = {"role": "user", "content": "?"}
    assistant = {"role": "assistant", "content": "?"}

    def count(words: int, *turns: dict[str, str]) -> int:
        messages = [{"role": "system", "content": text(words, words)}, *turns]
        answer = client.chat(
            {"model": model, "messages": messages, "max_tokens": 1, "cache": False}
        )
        return int(answer["usage"]["prompt_tokens"])

    few, many = _SAMPLES
    short = count(few, user)
    long = count(many, user)
    longer = count(many, user, assistant, user)
    per_word = (long - short) / (many - few)

    if per_word <= 0:
        raise SourceError(
            f"{model} does not say how many tokens a request has", hint="measure declared prompts"
        )

    return max(0, round(short - per_word * few - (longer - long))), per_word


def _remove(admin_socket: Path, keys: Sequence[Key]) -> list[Key]:
    """Delete what was stored, also what was being stored; what is left because the daemon is gone.

    No second signal keeps it from that.
    """
    kept_off = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in kept_off]
    left = list(keys)

    try:
        with Client(admin_socket) as admin:
            while left:
                _delete(admin, left[0])
                del left[0]
    except DaemonUnreachable:
        pass  # the next sweep removes them
    finally:
        for number, handler in zip(kept_off, before, strict=True):
            signal.signal(number, handler)

    return left
