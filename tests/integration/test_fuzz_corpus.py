"""The start corpus of the fuzzer, without the fuzzer: each input does what its target promises."""

from __future__ import annotations

from pathlib import Path

import pytest

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
