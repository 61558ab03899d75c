"""Models that are split into several files.

All of them are what the model is, and whatever is wrong is said.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rkcached.engines.llamacpp.gguf import inspect
from rkcached.engines.llamacpp.header import read_header
from rkcached.errors import SourceError
from rkcached.host.digests import Digests
from rkcached.sources.manifest import Manifest
from rkcached.sources.manifest_file import inputs
from rkcached.sources.parser import parse
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import ModelSource, Trouble
from rkcached.sources.stored_texts import StoredTexts
from tests import tiny_models
from tests.gguf_files import STRING, UINT32, gguf, pair, shard, split_pairs, text

COUNT = 3


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """The files of a model that is split into three."""
    paths = [tmp_path / f"m-{number:05}-of-{COUNT:05}.gguf" for number in range(1, COUNT + 1)]
    for number, path in enumerate(paths, 1):
        path.write_bytes(shard(number, COUNT))
    return paths


def manifest_of(path: Path) -> Manifest:
    return parse(
        f"version: 1\nmodels: {{m: {{path: {path}}}}}\n", file=path.parent / "manifest.yaml"
    )


def model(path: Path) -> ModelSource | Trouble:
    return SourceReader(Digests()).scan(manifest_of(path)).models["m"]


def digest(path: Path) -> str:
    found = model(path)
    assert isinstance(found, ModelSource), found
    return found.digest


def trouble(path: Path) -> Trouble:
    found = model(path)
    assert isinstance(found, Trouble), found
    return found


@pytest.mark.parametrize("number", range(1, COUNT + 1))
def test_each_file_of_a_split_model_is_part_of_its_identity(files: list[Path], number: int) -> None:
    """Regression: a second file that was replaced left the caches fresh.

    They answered with another text.
    """
    before = digest(files[0])
    path = files[number - 1]
    path.write_bytes(path.read_bytes() + b"other weights")
    assert digest(files[0]) != before


def test_all_files_of_a_split_model_are_watched(files: list[Path], tmp_path: Path) -> None:
    """Also one that is missing: that it comes is a change."""
    files[1].unlink()
    watched, _ = inputs(manifest_of(files[0]), StoredTexts(tmp_path))
    assert set(files) <= set(watched)


def test_a_worker_is_told_of_all_files(files: list[Path]) -> None:
    """A model whose second file was replaced while it was loaded is another one."""
    found = model(files[0])
    assert isinstance(found, ModelSource)
    assert [str(path) for path in files] == [path for path, _ in found.signatures]


def test_one_file_has_its_own_digest(tmp_path: Path) -> None:
    """A model of one file is what it always was.

    No cache becomes stale by an update of the daemon.
    """
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(pair("llama.context_length", UINT32, 2048)))
    assert digest(path) == Digests().digest(path)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (pair("qwen3.context_length", UINT32, 40960), 40960),
        (pair("llama.context_length", UINT32, 0), None),
    ],
)
def test_the_context_that_a_model_was_trained_for(
    tmp_path: Path, value: bytes, told: int | None
) -> None:
    """The first file's header has it, by the name of its architecture.

    Another key that ends alike is not it.
    """
    stretched = pair("llama.rope.scaling.original_context_length", UINT32, 2048)
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(gguf(stretched, value, *split_pairs(1, 2, 2), tensors=1))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(gguf(*split_pairs(2, 2, 2), tensors=1))
    (tmp_path / "m.gguf").write_bytes(gguf(stretched, value))
    for path in (first, tmp_path / "m.gguf"):
        found = model(path)
        assert isinstance(found, ModelSource), found
        assert found.trained_tokens == told


def test_a_name_alone_makes_no_split_model(tmp_path: Path) -> None:
    """llama.cpp goes by the header, too."""
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf())
    assert digest(path) == Digests().digest(path)


def test_a_missing_file_is_named(files: list[Path]) -> None:
    """With how many there must be, and where."""
    files[1].unlink()
    found = trouble(files[0])
    assert f"{files[0]} is the first of the 3 files of a split model" in found.message
    assert found.message.endswith(f"{files[1].name} cannot be found")
    assert found.hint == f"put all 3 files into {files[0].parent}"
    files[2].unlink()
    assert f"{files[1].name} and 1 more cannot be found" in trouble(files[0]).message


def test_another_file_than_the_first_says_which_to_name(files: list[Path]) -> None:
    """llama.cpp refuses it."""
    found = trouble(files[1])
    assert found.message == f"{files[1]} is file 2 of 3 of a split model"
    assert found.hint == f"name the first: path: {files[0].name}"


def test_another_file_under_another_name(files: list[Path], tmp_path: Path) -> None:
    """The hint cannot know the name, but how it ends."""
    other = files[1].rename(tmp_path / "m.gguf")
    assert "ends with -00001-of-00003.gguf" in trouble(other).hint


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00002.gguf", "m-00002-of-00003.gguf"])
def test_a_first_file_under_another_name(files: list[Path], tmp_path: Path, name: str) -> None:
    """llama.cpp finds the others by the name of the first."""
    path = files[0].rename(tmp_path / name)
    found = trouble(path)
    assert (
        "is the first of the 3 files of a split model, but its name does not say so"
        in found.message
    )
    assert "-00001-of-00003.gguf" in found.hint


def foreign(path: Path) -> None:
    path.write_bytes(shard(2, COUNT + 1))


def other_number(path: Path) -> None:
    path.write_bytes(shard(3, COUNT))


def single(path: Path) -> None:
    path.write_bytes(gguf(tensors=2))


def fewer_tensors(path: Path) -> None:
    path.write_bytes(shard(2, COUNT, tensors=1, all_tensors=6))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (foreign, "is not file 2 of 3 of a split model, as its name says, but 2 of 4"),
        (other_number, "but 3 of 3"),
        (single, "but 0 of 0"),
        (fewer_tensors, "they have 5 tensors, the first says 6"),
        (cut_off, "is damaged or cut off"),
        (fifo, "is not a regular file"),
    ],
)
def test_files_that_do_not_belong_together(
    files: list[Path], spoil: Callable[[Path], None], words: str
) -> None:
    """They are no model, and nothing is waited for."""
    spoil(files[1])
    found = trouble(files[0])
    assert words in found.message
    assert found.hint


def test_a_first_file_that_is_cut_off(files: list[Path]) -> None:
    """Nobody knows what it is the first of."""
    cut_off(files[0])
    assert trouble(files[0]).message == f"the header of {files[0]} is damaged or cut off"


HEADERS = {
    "empty": b"",
    "only-magic": b"GGUF",
    "old-version": gguf(version=1),
    "unknown-version": gguf(version=0x03000000),
    "unknown-type": gguf(text("a") + bytes([99, 0, 0, 0])),
    "list-of-lists": gguf(text("a") + bytes([9, 0, 0, 0, 9, 0, 0, 0]) + bytes(8)),
    "long-name": gguf(b"\xff" * 8 + b"a"),
    "long-text": gguf(text("a") + bytes([STRING, 0, 0, 0]) + b"\xff" * 8),
    "long-list": gguf(text("a") + bytes([9, 0, 0, 0, 4, 0, 0, 0]) + b"\xff" * 8),
    "long-list-of-texts": gguf(
        text("a") + bytes([9, 0, 0, 0, STRING, 0, 0, 0]) + b"\xff" * 8 + bytes(1000)
    ),
    "many-pairs": b"GGUF" + bytes([3, 0, 0, 0]) + bytes(8) + b"\xff" * 8,
}


CUT_OFF = {"empty", "only-magic", "long-text", "long-list", "long-list-of-texts"}
"""The file ends before what its header announces, as after a download that was interrupted."""


@pytest.mark.parametrize("case", sorted(HEADERS.keys() - CUT_OFF))
def test_a_header_that_is_none_is_left_to_the_engine(tmp_path: Path, case: str) -> None:
    """It says best what is wrong with a model file; and nothing is raised, nor read for ever."""
    path = tmp_path / "m.gguf"
    path.write_bytes(HEADERS[case])
    assert read_header(path) is None
    assert inspect(path).files == (path,)


@pytest.mark.parametrize("case", sorted(CUT_OFF))
def test_a_header_that_is_cut_off(tmp_path: Path, case: str) -> None:
    """`check` called it ok, and the engine's words did not say that the file is incomplete."""
    path = tmp_path / "m.gguf"
    path.write_bytes(HEADERS[case])
    assert read_header(path) is None
    with pytest.raises(SourceError, match="is damaged or cut off"):
        inspect(path)


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    """A whole model has them all; of one that was half downloaded, some begin behind its end."""
    path = tiny_models.plain(tmp_path / "m.gguf")
    assert inspect(path).files == (path,)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(SourceError, match=r"is cut off: it has [\d,]+ bytes"):
        inspect(path)
    path.write_bytes(gguf(tensors=1 << 63))
    assert inspect(path).files == (path,)


def test_a_long_header(tmp_path: Path) -> None:
    """What comes after a vocabulary of several megabytes is found."""
    words = b"".join(text("word" * 100) for _ in range(5000))
    tokens = (
        text("tokenizer.ggml.tokens")
        + bytes([9, 0, 0, 0, STRING, 0, 0, 0])
        + (5000).to_bytes(8, "little")
        + words
    )
    path = tmp_path / "m-00001-of-00002.gguf"
    path.write_bytes(gguf(tokens, *split_pairs(1, 2, 0)) + bytes(100))
    assert len(tokens) > 1 << 20
    with pytest.raises(SourceError, match=r"m-00002-of-00002\.gguf cannot be found"):
        inspect(path)
