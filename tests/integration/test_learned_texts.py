"""Learned texts on disk, and the prompts that they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkcached.errors import StoreError
from rkcached.host.digests import Digests
from rkcached.plan.desired import Resolver
from rkcached.sources.learned_texts import LearnedTexts
from rkcached.sources.parser import parse
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import Key, Sources
from rkcached.sources.stored_texts import StoredTexts


@pytest.fixture
def texts(tmp_path: Path) -> LearnedTexts:
    return LearnedTexts(tmp_path / "state")


def scan(folder: Path, learn: str) -> Sources:
    (folder / "m.model").write_text('{"rkcached_memory_model": 1}')
    (folder / "a.md").write_text("You are A.")
    text = (
        f"version: 1\nengine: {{kind: memory}}\ncache: {{{learn}}}\n"
        "models:\n  first: {path: m.model}\n  m: {path: m.model, prompts: {a: a.md}}\n"
    )
    manifest = parse(text, file=folder / "manifest.yaml")
    reader = SourceReader(Digests(folder / "digests"), StoredTexts(folder / "state"))
    return reader.scan(manifest)


def test_two_users_have_two(texts: LearnedTexts) -> None:
    """The name tells neither the text nor that another has the same. A key is a user, too."""
    mine = texts.learned("m", 1000, "You are kind.")
    others = texts.learned("m", (1 << 53) - 1, "You are kind.")  # the owner of a key
    shared = texts.learned("m", None, "You are kind.")
    assert len({mine.key, others.key, shared.key}) == 3
    assert mine == texts.learned("m", 1000, "You are kind.")

    for learned in (mine, others, shared):
        texts.write(learned, "You are kind.")
    assert set(texts.all("m", shared=False)) == {mine, others}
    assert set(texts.all("m", shared=True)) == {mine, others, shared}
    assert mine.path.stat().st_mode & 0o007 == 0
    assert texts.delete(mine.path)
    assert not texts.delete(mine.path)


def test_they_are_read_when_the_manifest_says_so(tmp_path: Path, texts: LearnedTexts) -> None:
    """After all that is declared, of whatever model, and with their owner."""
    mine = texts.learned("first", 1000, "You are kind.")
    texts.write(mine, "You are kind.")
    shared = texts.learned("m", None, "You are kind to all.")
    texts.write(shared, "You are kind to all.")
    declared = Key("m", "a")

    assert list(scan(tmp_path, "").prompts) == [declared]
    assert list(scan(tmp_path, "learn: {}").prompts) == [declared, mine.key]
    found = scan(tmp_path, "learn: {share: true}").prompts
    assert list(found) == [declared, mine.key, shared.key]
    assert [found[key].owner for key in found] == [None, 1000, None]
    assert [found[key].learned for key in found] == [False, True, True]


def test_whose_it_is_makes_another_prompt_cache(tmp_path: Path, texts: LearnedTexts) -> None:
    """So none is adopted for another user, however equal its text."""
    for owner in (1000, 1001, None):
        texts.write(texts.learned("m", owner, "You are A."), "You are A.")
    sources = scan(tmp_path, "learn: {share: true}")
    manifest = parse(
        "version: 1\nengine: {kind: memory}\nmodels:\n  first: {path: m.model}\n"
        "  m: {path: m.model, prompts: {a: a.md}}\n",
        file=tmp_path / "manifest.yaml",
    )
    desired = Resolver().resolve(manifest, sources)
    digests = {
        key: prompt.fingerprint.digest
        for key, prompt in desired.prompts.items()
        if prompt.fingerprint is not None
    }
    assert len(digests) == 4
    assert len(set(digests.values())) == 3
    shared = texts.learned("m", None, "You are A.").key
    assert digests[shared] == digests[Key("m", "a")]
    assert sorted(desired.learned.values()) == [-1, 1000, 1001]


def test_a_link_leads_nowhere(tmp_path: Path, texts: LearnedTexts) -> None:
    """Nothing is written or deleted where a folder on the way is somebody else's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state/learned").mkdir(parents=True)
    (tmp_path / "state/learned/m").symlink_to(tmp_path / "elsewhere")
    learned = texts.learned("m", 1000, "x")
    with pytest.raises(StoreError, match="is a link"):
        texts.write(learned, "x")
    with pytest.raises(StoreError, match="is a link"):
        texts.delete(learned.path)


def test_strange_files_are_no_prompts(tmp_path: Path, texts: LearnedTexts) -> None:
    """Nor are folders of names that no user has."""
    for name in ("1000/notes.md", "1000/learned-x.txt", "ann/learned-x.md", "-1/learned-y.md"):
        path = tmp_path / "state/learned/m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (tmp_path / "state/learned/m/1001").write_text("no folder")
    assert texts.all("m", shared=True) == []
