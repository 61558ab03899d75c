"""What a GGUF file states of the state that its model keeps, and what follows for its caches."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkcached.engines.llamacpp.gguf import inspect, state_bytes_per_token
from rkcached.engines.llamacpp.header import read_header
from rkcached.engines.states import StateFacts, StateKind
from tests import tiny_models
from tests.gguf_files import UINT32, gguf, pair

FACTS = {
    "plain": StateFacts(kind=StateKind.ATTENTION),
    "sliding-window": StateFacts(kind=StateKind.WINDOW, window_tokens=tiny_models.WINDOW_TOKENS),
    "recurrent": StateFacts(kind=StateKind.RECURRENT),
    "hybrid": StateFacts(kind=StateKind.RECURRENT),
}


@pytest.mark.parametrize("kind", FACTS)
def test_a_file_states_the_kind_of_its_state(tmp_path: Path, kind: str) -> None:
    """By the keys that describe its layers."""
    model = tiny_models.KINDS[kind](tmp_path / "m.gguf")
    assert inspect(model, read_header).state == FACTS[kind]


@pytest.mark.parametrize(
    "key", ["rwkv7.wkv.head_size", "granitehybrid.ssm.state_size", "kimi-linear.kda.head_dim"]
)
def test_recurrences_of_other_names(tmp_path: Path, key: str) -> None:
    """One such layer is enough, whatever attention there is beside it."""
    model = tmp_path / "m.gguf"
    model.write_bytes(gguf(pair("x.attention.head_count", UINT32, 8), pair(key, UINT32, 64)))
    assert inspect(model, read_header).state.kind is StateKind.RECURRENT


def test_a_window_of_none_is_no_window(tmp_path: Path) -> None:
    """Some files state that they have none."""
    model = tmp_path / "m.gguf"
    pairs = (
        pair("x.attention.head_count", UINT32, 8),
        pair("x.attention.sliding_window", UINT32, 0),
    )
    model.write_bytes(gguf(*pairs))
    assert inspect(model, read_header).state.kind is StateKind.ATTENTION


def test_a_file_without_layers_states_nothing(tmp_path: Path) -> None:
    """And nothing is said of it."""
    model = tmp_path / "m.gguf"
    model.write_bytes(gguf())
    state = inspect(model, read_header).state
    assert (state.kind, state.explanation()) == (StateKind.UNKNOWN, "")


def test_the_size_of_a_cache_is_estimated_where_tokens_have_one(tmp_path: Path) -> None:
    """A recurrent state has no size for each token."""
    sizes = {
        kind: state_bytes_per_token(write(tmp_path / "m.gguf"))
        for kind, write in tiny_models.KINDS.items()
    }
    assert sizes == {
        "plain": 2 * 2 * (16 + 16) * 2,
        "sliding-window": 6 * 2 * (16 + 16) * 2,
        "recurrent": None,
        "hybrid": None,
    }
