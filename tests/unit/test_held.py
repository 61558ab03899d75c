"""What is left in the engine for whom, and when a prompt cache is loaded."""

from __future__ import annotations

import msgspec
import pytest

from rkcached.engines.base import EngineInfo, Sampling
from rkcached.worker import protocol
from rkcached.worker.held import NOBODY, Held, Step, state_for

CACHE = protocol.CacheFile(path="/cache/m/a.cache", signature=(1, 2, 3, 4, 5), fingerprint="f")
PROMPT = "You are a cook. What is for dinner?"
LONG = "You are a cook. " * 15 + "What is for dinner, and who comes? " * 2
TALK = LONG[:245].encode() + b"Something else was said here. " * 4
ANN, BOB = 1000, 1001
INFO = EngineInfo(
    runtime_version="1", context_tokens=100, measures_prefill=True, aborts_prefill=True
)


def asked(
    *,
    cache: bool = True,
    common: int = 15,
    load: float = 0.0,
    owner: int = ANN,
    cold: bool = False,
    whole: bool = True,
    prompt: str = PROMPT,
) -> protocol.Generate:
    return protocol.Generate(
        prompt=prompt,
        sampling=Sampling(),
        cache=CACHE if cache else None,
        common_bytes=common if cache else 0,
        load_bytes=load,
        is_whole=whole,
        owner=owner,
        cold=cold,
    )


@pytest.mark.parametrize(
    ("held", "operation", "step"),
    [
        (Held(), asked(), Step.LOAD),
        (Held(), asked(cache=False), Step.KEEP),
        # The state has as much of the prompt as the file, or more.
        (Held(b"You are a cook. Hello!", ANN), asked(), Step.KEEP),
        (Held(PROMPT.encode() + b" Fish.", ANN), asked(cache=False), Step.KEEP),
        (Held(b"You are a cook.", NOBODY), asked(), Step.KEEP),
        # It has less.
        (Held(b"You are a carpenter.", ANN), asked(), Step.LOAD),
        # What loading gains is not worth the time that it takes.
        (Held(b"You are a carpenter.", ANN), asked(load=20.0), Step.KEEP),
        (Held(), asked(common=6, load=8.0), Step.KEEP),
        # Nothing that is private is reused for another user, however much it would spare.
        (Held(PROMPT.encode(), ANN), asked(owner=BOB), Step.LOAD),
        (Held(PROMPT.encode(), ANN), asked(owner=BOB, cache=False), Step.CLEAR),
        (Held(PROMPT.encode(), ANN), asked(owner=BOB, common=6, load=8.0), Step.CLEAR),
        # The client wants nothing to be reused.
        (Held(PROMPT.encode(), ANN), asked(cache=False, cold=True), Step.CLEAR),
    ],
)
def test_the_step_before_a_run(held: Held, operation: protocol.Generate, step: Step) -> None:
    assert held.step(operation, INFO) is step


def test_an_engine_that_forgets_after_each_run_loads_each_time() -> None:
    held = Held(PROMPT.encode(), ANN)
    assert held.step(asked(), msgspec.structs.replace(INFO, keeps_state=False)) is Step.LOAD


@pytest.mark.parametrize(
    ("held", "operation", "step"),
    [
        (Held(b"You are a cook.", ANN), asked(), Step.KEEP),
        (Held(b"You are a cook. Hello!", ANN), asked(), Step.LOAD),
        (Held(), asked(whole=False), Step.KEEP),
    ],
)
def test_a_state_that_cannot_go_back_is_only_continued(
    held: Held, operation: protocol.Generate, step: Step
) -> None:
    """As those of recurrent models."""
    assert held.step(operation, msgspec.structs.replace(INFO, rewinds=False)) is step


@pytest.mark.parametrize(
    ("helds", "operation", "state"),
    [
        # An empty state before one that is used; the least recently used before the others.
        ({0: Held(b"x" * 99, ANN), 1: Held()}, asked(), 1),
        ({1: Held(b"x" * 99, ANN), 0: Held(b"y" * 99, ANN)}, asked(), 1),
        # The state that has more of the prompt than the file.
        ({0: Held(), 1: Held(LONG.encode(), ANN)}, asked(prompt=LONG), 1),
        # The prompt cache that was loaded before is in memory still.
        ({1: Held(), 0: Held(LONG[:240].encode())}, asked(prompt=LONG, common=240), 0),
        # A conversation that begins with the prompt cache is not replaced by another one.
        (
            {0: Held(TALK, ANN, len(TALK), goes_on=True), 1: Held()},
            asked(prompt=LONG, common=240),
            1,
        ),
        ({0: Held(TALK[:-90], ANN, 270), 1: Held()}, asked(prompt=LONG, common=240), 0),
        # Another user's is no choice. A run that is to be cold replaces what it could have reused.
        ({0: Held(LONG.encode(), BOB), 1: Held()}, asked(prompt=LONG), 1),
        ({1: Held(), 0: Held(LONG.encode(), ANN)}, asked(prompt=LONG, cache=False, cold=True), 0),
    ],
)
def test_the_state_for_a_run(
    helds: dict[int, Held], operation: protocol.Generate, state: int
) -> None:
    assert state_for(helds, operation, INFO) == state
