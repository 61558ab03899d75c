"""What every engine that ranks promises: a score of a query and a document, by these alone.

llama.cpp's model is a tiny reranker with random weights, written for the test: what its scores are
worth is not shown, but that they come from its head, of the whole text, in its own form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rkcached.engines.base import Engine, ModelSpec
from rkcached.engines.kinds import RANK
from rkcached.engines.llamacpp.engine import LlamaCppEngine
from rkcached.engines.memory import MemoryEngine
from rkcached.errors import ContextExceeded, EngineError
from tests import tiny_models

CONTEXT_TOKENS = 512


def memory_model(path: Path) -> Path:
    path.write_text(f'{{"rkcached_memory_model":1,"context_tokens":{CONTEXT_TOKENS}}}')
    return path


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((MemoryEngine, memory_model), id="memory"),
        pytest.param(
            (LlamaCppEngine, tiny_models.reranker), id="llamacpp", marks=pytest.mark.model
        ),
    ],
)
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    kind: Callable[[ModelSpec], Engine]
    kind, write = request.param
    folder = tmp_path_factory.mktemp("ranking")
    model = write(folder / "m.model")
    spec = ModelSpec(
        path=str(model), context_tokens=CONTEXT_TOKENS, scratch_dir=str(folder), pooling=RANK
    )
    with closing(kind(spec)) as loaded:
        yield loaded


def test_a_score_depends_on_both_texts_alone(engine: Engine) -> None:
    """The same one for the same texts, whatever came between."""
    first = engine.rank("bread recipe", "A recipe: flour, water, yeast and salt make bread.")
    other = engine.rank("bread recipe", "The panda is a bear.")
    asked = engine.rank("panda bear", "A recipe: flour, water, yeast and salt make bread.")
    again = engine.rank("bread recipe", "A recipe: flour, water, yeast and salt make bread.")
    assert again == first
    assert first.score != other.score
    assert first.score != asked.score
    assert first.tokens > other.tokens > len("bread recipe")


def test_the_end_of_a_document_counts(engine: Engine) -> None:
    """Nothing is cut without a word: what does not fit is refused, and the next one is scored."""
    long = "salt and water and " * 12
    assert engine.rank("bread", long + "bread").score != engine.rank("bread", long + "stone").score
    with pytest.raises(ContextExceeded):
        engine.rank("bread", "x " * CONTEXT_TOKENS * 2)
    assert engine.rank("bread", "bread").tokens


def test_the_query_is_not_written_into_the_document(engine: Engine) -> None:
    """A document that has the placeholder of a form keeps it."""
    kept, other = engine.rank("a" * 50, "b\n{query}"), engine.rank("a" * 50, "b\n{querz}")
    assert kept.tokens == other.tokens


def test_a_model_that_was_not_loaded_to_rank_gives_no_score(tmp_path: Path) -> None:
    spec = ModelSpec(
        path=str(memory_model(tmp_path / "m")), context_tokens=64, scratch_dir=str(tmp_path)
    )
    with closing(MemoryEngine(spec)) as answering, pytest.raises(EngineError) as caught:
        answering.rank("a", "b")
    assert caught.value.hint == "set rerank: true in the manifest"
