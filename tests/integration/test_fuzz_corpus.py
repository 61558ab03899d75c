"""The start corpus of the fuzzer, without the fuzzer: each input does what its target promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz.mutate import Form, mutated
from fuzz.targets import TARGETS

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
INPUTS = sorted(CORPUS.glob("*/*"))

MAX_FILES = 30
MAX_FILE_BYTES = 4096
MAX_BYTES = 300_000


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_corpus_of_a_target(name: str) -> None:
    """No input ends in an error that its parser does not promise."""
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs

    for file in inputs:
        try:
            TARGETS[name].run(file.read_bytes())
        except Exception as error:
            error.add_note(f"the input is {file}")
            raise


def test_the_corpus_is_small() -> None:
    """It is read by everybody who runs the tests, and by the fuzzer at each start."""
    assert {file.parent.name for file in INPUTS} == set(TARGETS)
    sizes = [file.stat().st_size for file in INPUTS]

    assert max(sizes) <= MAX_FILE_BYTES
    assert sum(sizes) <= MAX_BYTES
    assert all(len(list((CORPUS / name).iterdir())) <= MAX_FILES for name in TARGETS)


@given(st.binary(), st.sampled_from([Form(), Form(head=0, between=b"\0"), Form(between=b"--")]))
def test_an_input_is_put_together_as_it_was_taken_apart(data: bytes, form: Form) -> None:
    assert form.joined(form.taken_apart(data)) == data


@given(st.lists(st.binary(max_size=300), min_size=1))
def test_frames_are_put_together_as_they_were_taken_apart(frames: list[bytes]) -> None:
    form = Form(framed=True)
    data = form.joined([b"0", *frames])
    assert form.taken_apart(data) == [b"0", *frames]
    assert form.taken_apart(data[:-1])[:-1] == [b"0", *frames[:-1]]


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.form])
def test_changes_end_and_fit(name: str) -> None:
    """An error of the change would end the fuzzer's process."""
    form = TARGETS[name].form
    assert form is not None

    data = b"0"
    for file in sorted((CORPUS / name).iterdir()):
        data = file.read_bytes()
        for seed in range(100):
            data = mutated(
                data, 4096, seed, form=form, words=["a"], own=lambda part, most: part[:most]
            )
            assert len(data) <= 4096
