"""Prompts of chosen lengths, stored in the running daemon for as long as they are measured.

No tokenizer is needed: three answers tell how many tokens a text of words has. What is reported is the length that the
prompt cache really has.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rkcached.benchmark.asking import ANSWER_TOKENS, QUESTION
from rkcached.client import Client
from rkcached.errors import RequestError, SourceError
from rkcached.plan import Key

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
"""Tokens."""

_LINE = "the roof of the house opens when water and air are warm enough for the plants but never at night or in rain"
_WORDS = _LINE.split()
_SAMPLES = (20, 100)
"""Words of the two texts that tell the number of tokens of a word."""


@contextmanager
def stored(
    socket: Path,
    admin_socket: Path,
    models: Sequence[str],
    context_tokens: Callable[[str], int | None],
    on_step: Callable[[str], None],
) -> Iterator[tuple[dict[Key, int], list[str]]]:
    """The prompts with the length chosen for each, and why some could not be stored. Removed at the end, however it comes.

    Errors: RequestError, DaemonUnreachable; SourceError if none could be stored.
    """
    tried: list[Key] = []
    kept: dict[Key, int] = {}
    refused: list[str] = []
    try:
        with Client(socket) as asking, Client(admin_socket) as admin:
            for model in models:
                head, per_word = _measure(asking, model)
                for tokens in lengths(context_tokens(model), head):
                    key = Key(model, f"bench-{os.getpid()}-{tokens}")
                    on_step(f"{model}: building a prompt of {tokens:,} tokens")
                    tried.append(key)
                    try:
                        admin.store(*key, text(tokens, round((tokens - head) / per_word)))
                    except RequestError as error:
                        if error.status not in (409, 413):
                            raise
                        refused.append(f"{model}, {tokens:,} tokens: {error.message}")
                    else:
                        kept[key] = tokens
        if not kept:
            raise SourceError(f"no prompt could be stored: {'; '.join(refused)}", hint="the manifest says what fits")
        yield kept, refused
    finally:
        _remove(admin_socket, tried)


def lengths(context_tokens: int | None, head: int) -> list[int]:
    """Those of LENGTHS that leave room for question and answer; the first that does not is cut to the room there is."""
    if not context_tokens:
        return list(LENGTHS)
    room = context_tokens - head - ANSWER_TOKENS - 2 * len(QUESTION)
    fitting = [tokens for tokens in LENGTHS if tokens <= room]
    largest = fitting[-1] if fitting else 0
    if largest < LENGTHS[-1] and room > largest * 1.25:
        fitting.append(room)
    return fitting


def text(number: int, words: int) -> str:
    """So many words; texts of different numbers differ from the start, so that no cache serves another's prompt."""
    return " ".join([f"{number}.", *(_WORDS[index % len(_WORDS)] for index in range(max(1, words)))])


def _measure(client: Client, model: str) -> tuple[int, float]:
    """Tokens of a system message without its words, and of each word. A turn more tells what is not the message's."""
    user, assistant = {"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}

    def count(words: int, *turns: dict[str, str]) -> int:
        messages = [{"role": "system", "content": text(words, words)}, *turns]
        answer = client.chat({"model": model, "messages": messages, "max_tokens": 1, "cache": False})
        return int(answer["usage"]["prompt_tokens"])

    few, many = _SAMPLES
    short, long, longer = count(few, user), count(many, user), count(many, user, assistant, user)
    per_word = (long - short) / (many - few)
    if per_word <= 0:
        raise SourceError(f"{model} does not say how many tokens a request has", hint="measure declared prompts")
    return max(0, round(short - per_word * few - (longer - long))), per_word


def _remove(admin_socket: Path, keys: Sequence[Key]) -> None:
    """Delete what was stored, also what was being stored. A second Ctrl-C does not keep it from that."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Client(admin_socket) as admin:
            for key in keys:
                try:
                    admin.delete(*key)
                except RequestError as error:
                    if error.status != 404:
                        raise
    finally:
        signal.signal(signal.SIGINT, before)
