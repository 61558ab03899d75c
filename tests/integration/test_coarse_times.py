"""File systems whose times are whole seconds.

What is remembered of a file must not outlive a second change in one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkcached.host.digests import Digests, settled, signature_of
from rkcached.sources.manifest_file import ManifestFile, read_manifest
from rkcached.sources.parser import parse
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import Key, ModelSource, PromptSource
from tests.exfat import exfat
from tests.waiting import wait_until

ROUNDS = 50
"""Two saves of a round are milliseconds apart, so that nearly all fall into one second."""

SECOND_NS = 1_000_000_000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with exfat(tmp_path) as place:
        yield place


NOW_NS = 1_800_000_000 * SECOND_NS + 123_456_789


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still."""
    monkeypatch.setattr(time, "time_ns", lambda: NOW_NS)


def info(modified_ns: int, changed_ns: int) -> os.stat_result:
    """A file of these times."""
    return os.stat_result([0] * 10, {"st_mtime_ns": modified_ns, "st_ctime_ns": changed_ns})


@pytest.mark.usefixtures("now")
@pytest.mark.parametrize(
    ("unit_ns", "age_ms", "expected"),
    [
        (1, 0, False),
        (1, 49, False),
        (1, 51, True),
        (1, -51, True),
        (10_000_000, 20, False),
        (10_000_000, 70, True),
        (100_000_000, 150, False),
        (100_000_000, 450, True),
        (SECOND_NS, 0, False),
        (SECOND_NS, 2000, False),
        (SECOND_NS, 4000, True),
        (SECOND_NS, -4000, True),
    ],
)
def test_the_coarser_the_times_the_longer_until_they_are_relied_on(
    unit_ns: int, age_ms: int, expected: bool
) -> None:
    """A file's own times show how coarse its file system may be: by what they are multiples of."""
    moment = (NOW_NS - age_ms * 1_000_000) // unit_ns * unit_ns
    assert settled(info(moment, moment)) is expected


@pytest.mark.usefixtures("now")
def test_either_time_may_be_the_coarse_one() -> None:
    """Some file systems show a time of the last change that is none."""
    coarse = NOW_NS // SECOND_NS * SECOND_NS
    assert not settled(info(coarse, 0))
    assert not settled(info(1, coarse))
    assert settled(info(1, 2))


def test_the_times_are_as_coarse_as_is_said(disk: Path) -> None:
    """Or these tests would show nothing."""
    path = disk / "f"
    same = 0
    for number in range(ROUNDS):
        path.write_bytes(b"a%04d" % number)
        before = signature_of(path.stat())
        path.write_bytes(b"b%04d" % number)
        same += before == signature_of(path.stat())
    assert same > ROUNDS // 2


def test_a_digest_is_of_the_second_of_two_saves(disk: Path) -> None:
    """Regression: the first was remembered, and nothing of the file told that it had changed."""
    path, digests = disk / "f", Digests(disk / "memory.json")
    for number in range(ROUNDS):
        path.write_bytes(b"a%04d" % number)
        first = digests.digest(path)
        digests.save()
        path.write_bytes(b"b%04d" % number)
        assert digests.digest(path) != first
        again = Digests(disk / "memory.json")
        assert again.digest(path) == digests.digest(path)


def test_a_file_at_rest_is_remembered(disk: Path) -> None:
    """The price of coarse times is paid for a few seconds after a change, and no longer."""
    path, digests = disk / "f", Digests()
    path.write_bytes(b"one")
    wait_until(lambda: settled(path.stat()), "it has settled", 10)
    for _ in range(5):
        digests.digest(path)
    assert digests.hashed_files == 1


def test_a_model_that_just_came_is_read_once(disk: Path) -> None:
    """It is waited for until it has settled, as it may have gigabytes."""
    path, digests = disk / "f", Digests()
    path.write_bytes(b"one")
    for _ in range(3):
        digests.let_settle(path)
        digests.digest(path)
    assert digests.hashed_files == 1


def test_a_prompt_has_the_text_of_the_second_save(disk: Path) -> None:
    """And a template, which is remembered in the same way."""
    manifest = parse(
        "version: 1\nengine: {kind: memory}\n"
        "models: {m: {path: m.model, chat_template: t.jinja, prompts: {p: p.md}}}\n",
        file=disk / "manifest.yaml",
    )
    (disk / "m.model").write_bytes(b'{"rkcached_memory_model": 1}')
    reader = SourceReader(Digests())
    for number in range(ROUNDS):
        for text in (f"a{number:04}", f"b{number:04}"):
            for name in ("p.md", "t.jinja"):
                (disk / name).write_text(text)
            sources = reader.scan(manifest)
            source, model = sources.prompts[Key("m", "p")].source, sources.models["m"]
            assert isinstance(source, PromptSource)
            assert isinstance(model, ModelSource)
            assert (source.text, model.template.text) == (text, text)


def test_a_manifest_is_that_of_the_second_save(disk: Path) -> None:
    """The same for the manifest itself."""
    path = disk / "manifest.yaml"
    text = "version: 1\nengine: {{kind: memory}}\nmodels: {{m{}: {{path: m.model}}}}\n"
    path.write_text(text.format("0000"))
    file = ManifestFile(path, read_manifest(path))
    for number in range(ROUNDS):
        for name in (f"a{number:04}", f"b{number:04}"):
            path.write_text(text.format(name))
            assert list(file.read().models) == [f"m{name}"]
