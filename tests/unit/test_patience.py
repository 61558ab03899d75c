"""When a build may begin of something that keeps changing: by a clock that the tests set."""

from __future__ import annotations

from rkcached.host.watch import Writing
from rkcached.plan.fingerprint import Fingerprint, fingerprint
from rkcached.reconcile.patience import (
    LONGEST_RESTLESS_S,
    LONGEST_WRITING_S,
    QUIET_S,
    SILENT_WRITER_S,
    Patience,
)
from rkcached.sources.records import Key

P, Q = Key("m", "p"), Key("m", "q")
FIRST, SECOND, THIRD = (fingerprint({"text": number}) for number in range(3))


def due(patience: Patience, key: Key = P, **writing: Writing) -> float:
    """Of a build that is made of the files `text` and `model`."""
    return patience.due(key, ("text", "model"), writing)


def wants(**wanted: Fingerprint) -> dict[Key, Fingerprint]:
    return {Key("m", name): value for name, value in wanted.items()}


def test_nothing_is_waited_for_as_a_rule() -> None:
    """An edit is built at once, however often there is one."""
    patience = Patience()
    assert due(patience) == 0
    patience.observed(wants(p=FIRST).get, 10)
    patience.built(P)
    patience.observed(wants(p=SECOND).get, 10.1)
    assert due(patience) == 0


def test_a_file_that_is_open_for_writing() -> None:
    """Of the prompt or of its model; another's does not matter."""
    patience = Patience()
    assert due(patience, text=Writing(100, 102)) == 102 + SILENT_WRITER_S
    assert due(patience, model=Writing(100, 103), text=Writing(100, 102)) == 103 + SILENT_WRITER_S
    assert due(patience, other=Writing(100, 103)) == 0


def test_a_writer_that_never_ends() -> None:
    """Is not waited for for ever."""
    assert due(Patience(), text=Writing(100, 5000)) == 100 + LONGEST_WRITING_S


def test_a_build_that_a_change_stopped_waits_for_quiet() -> None:
    """And longer each time; other prompts do not wait."""
    patience = Patience()
    for stops, quiet_s in enumerate((*QUIET_S, QUIET_S[-1])):
        now = 100.0 * (stops + 1)
        patience.stopped(P, SECOND.digest, now)
        assert due(patience) == now + quiet_s
        assert due(patience, Q) == 0
    patience.built(P)
    assert due(patience) == 0
    patience.stopped(P, SECOND.digest, 1000)
    assert due(patience) == 1000 + QUIET_S[0]


def test_each_change_prolongs_the_wait() -> None:
    """A look that finds the same does not. In the end it is built all the same."""
    patience = Patience()
    patience.stopped(P, FIRST.digest, 100)
    patience.observed(wants(p=FIRST).get, 100.5)
    assert due(patience) == 100 + QUIET_S[0]
    patience.observed(wants(p=SECOND).get, 100.9)
    assert due(patience) == 100.9 + QUIET_S[0]
    for second in range(101, 201):
        patience.observed(wants(p=(FIRST, THIRD)[second % 2]).get, second)
    assert due(patience) == 100 + LONGEST_RESTLESS_S


def test_a_prompt_that_is_gone_is_forgotten() -> None:
    """When it comes back, it is new."""
    patience = Patience()
    patience.stopped(P, FIRST.digest, 100)
    patience.observed(wants(q=FIRST).get, 101)
    assert due(patience) == 0
