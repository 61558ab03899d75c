"""The store on a real file system.

An artifact is what its sidecar says, or it is reported and rebuilt.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import pwd
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from rkcached.errors import StoreError, StoreLocked
from rkcached.host.digests import Digests
from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.records import Retired, Verdict, VerdictKind
from rkcached.sources.records import Key, Trouble
from rkcached.store.marks import TAG
from rkcached.store.quarantine import MAX_QUARANTINED
from rkcached.store.scan import STAGING, STAGING_FOLDER
from rkcached.store.sidecar import Figures, Sidecar, StoredArtifact
from rkcached.store.store import Store
from tests.integration.test_digests import settle

P, Q = Key("m", "p"), Key("m", "q")
FIGURES = Figures(prefill_ms=2.0, load_ms=1.0, cold_ttft_ms=3.0, warm_ttft_ms=1.5, verified="exact")
VERDICT = Verdict(
    fingerprint="aa" * 32,
    kind=VerdictKind.FAILED,
    trouble=Trouble(message="no room: 🎉", hint="make some"),
    attempts=2,
    retry_at=12.5,
)


def make_sidecar(key: Key, data: bytes, prefix: bytes, artifact: str = "") -> Sidecar:
    made = fingerprint(
        {"prefix.digest": hashlib.sha256(prefix).hexdigest(), "prefix.bytes": len(prefix)}
    )
    return Sidecar(
        model=key.model,
        prompt=key.prompt,
        artifact=artifact or f"{key.prompt}.memory_cache",
        fingerprint=made.digest,
        components=dict(made.components),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        text_sha256=hashlib.sha256(prefix).hexdigest(),
        tokens=len(prefix),
        built_at=1.0,
        build_ms=2.0,
        figures=FIGURES,
    )


def contents(content: str) -> tuple[bytes, bytes]:
    """A prompt cache and its text.

    Of one length for contents of one length, as parameters alone change.
    """
    return f"state of {content}".encode() * 50, f"You are {content}.".encode()


def publish(
    store: Store, key: Key, content: str = "one", artifact: str = "", *, retire: bool = False
) -> StoredArtifact:
    data, prefix = contents(content)
    staged = store.staging.begin(key)
    staged.write_bytes(data)
    size_bytes, sha256 = store.staging.seal(staged)
    sidecar = make_sidecar(key, data, prefix, artifact)
    assert (sidecar.size_bytes, sidecar.sha256) == (size_bytes, sha256)
    return store.commit(key, staged, sidecar, prefix, retire=retire)


def corrupt(store: Store, key: Key = P) -> str:
    """Why the artifact is corrupt.

    A scan, a scan that remembers nothing and a full check agree on it.
    """
    said = {
        inventory.observed()[key].corrupt
        for inventory in (store.scan(), Store(store.root, Digests()).scan())
    }
    assert len(said) == 1
    (why,) = said
    assert bool(store.verify(key)) == bool(why)
    return why


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "cache")
    store.open()
    yield store
    store.close()


@pytest.fixture
def folder(store: Store) -> Path:
    """Of the model `m`, with one artifact."""
    publish(store, P)
    return store.root / "m"


def names(folder: Path) -> set[str]:
    """Of all that is in it, also in the folder for what is being built."""
    return {path.name for path in folder.rglob("*")} - {STAGING_FOLDER}


# --- publishing ---


def test_a_published_artifact_is_found_as_its_sidecar_says(store: Store) -> None:
    """The same by the committer, by a later look, and by a reader without the lock."""
    committed = publish(store, P)
    for reader in (store, Store(store.root)):
        found = reader.scan().artifacts[P]
        assert committed == found
        assert found.corrupt == ""
    assert store.verify(P) == ""
    assert committed.path.read_bytes() == contents("one")[0]
    assert (store.root / "m/p.bin").read_bytes() == contents("one")[1]


def test_publishing_again_replaces_the_artifact(store: Store) -> None:
    """One set of files, the new one."""
    publish(store, P, "one")
    committed = publish(store, P, "two")
    assert committed == store.scan().artifacts[P]
    assert names(store.root / "m") == {"p.memory_cache", "p.bin", "p.json"}


def test_publishing_for_another_engine_removes_the_other_engines_file(store: Store) -> None:
    """Nobody would ever count it or delete it; a neighbour with a longer name keeps its own."""
    publish(store, P)
    publish(store, Key("m", "p.memory"))
    publish(store, P, artifact="p.llama_cache")
    assert {name for name in names(store.root / "m") if name.endswith("_cache")} == {
        "p.llama_cache",
        "p.memory.memory_cache",
    }
    assert corrupt(store) == ""


def test_names_with_dots_do_not_meet(store: Store) -> None:
    """Prompts may be named like each other's files."""
    keys = [Key("m", name) for name in ("a", "a.json", "a.bin", "a.memory_cache", "a.b", "json")]
    for key in keys:
        publish(store, key, key.prompt)
    assert set(keys) == set(store.scan().artifacts)
    assert {corrupt(store, key) for key in keys} == {""}
    store.remove(keys[0])
    assert set(keys[1:]) == set(store.scan().observed())
    assert {corrupt(store, key) for key in keys[1:]} == {""}


def test_files_are_private(store: Store) -> None:
    """A KV state is as good as the prompt's text.

    0640 in 0750, whatever the umask allows and the engine left.

    Only the tag, which tells nothing, is for everybody.
    """
    before = os.umask(0)
    try:
        publish(store, P)
        publish(store, Q)
        store.quarantine(Q)
        store.verdicts.write(Q, VERDICT)
        settle(store.root / "m/p.memory_cache")
        store.scan()
        store.close()
    finally:
        os.umask(before)
    modes = {
        path: path.stat().st_mode & 0o777 for path in store.root.rglob("*") if path.name != TAG
    }
    assert set(modes.values()) == {0o640, 0o750}
    assert {path for path, mode in modes.items() if mode == 0o750} == {
        path for path in modes if path.is_dir()
    }


def test_a_commit_clears_the_verdict_on_earlier_attempts(store: Store) -> None:
    """It succeeded."""
    store.verdicts.write(P, VERDICT)
    publish(store, P)
    assert store.scan().verdicts == {}


def test_a_commit_that_fails_leaves_the_old_artifact_and_no_rubbish(store: Store) -> None:
    """The staged file vanished: the store says so in words."""
    old = publish(store, P)
    staged = store.staging.begin(P)
    data, prefix = contents("two")
    with pytest.raises(StoreError, match="cannot be written: No such file"):
        store.commit(P, staged, make_sidecar(P, data, prefix), prefix)
    assert old == store.scan().artifacts[P]
    assert names(store.root / "m") == {"p.memory_cache", "p.bin", "p.json"}


def test_what_was_changed_after_it_was_hashed_is_not_published_as_good(store: Store) -> None:
    """A worker may have kept its file open."""
    staged = store.staging.begin(P)
    staged.write_bytes(contents("one")[0])
    with staged.open("r+b") as kept_open:
        size_bytes, sha256 = store.staging.seal(staged)
        data, prefix = contents("one")
        sidecar = make_sidecar(P, data, prefix)
        assert (sidecar.size_bytes, sidecar.sha256) == (size_bytes, sha256)
        time.sleep(0.02)  # so that the time of the change is another one
        kept_open.write(b"x")
        kept_open.flush()
        with pytest.raises(StoreError, match="was changed while it was published"):
            store.commit(P, staged, sidecar, prefix)
    found = store.scan().artifacts.get(P)
    assert found is None or found.corrupt


def test_a_discarded_stage_is_gone(store: Store) -> None:
    """Also if it was never written, and twice."""
    staged = store.staging.begin(P)
    store.staging.discard(staged)
    staged.write_bytes(b"x")
    for _ in range(2):
        store.staging.discard(staged)
    assert names(store.root / "m") == set()


def test_sealing_a_file_that_is_not_there_is_a_store_error(store: Store) -> None:
    """Never a bare OSError."""
    with pytest.raises(StoreError):
        store.staging.seal(store.staging.begin(P))


# --- what can be wrong with an artifact ---


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": (
        "p.memory_cache",
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "its sidecar says 600",
    ),
    "longer": (
        "p.memory_cache",
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        "its sidecar says 600",
    ),
    "flipped-bit": (
        "p.memory_cache",
        flip,
        "p.memory_cache does not have the SHA-256 of its sidecar",
    ),
    "missing": ("p.memory_cache", Path.unlink, "p.memory_cache is missing"),
    "directory": ("p.memory_cache", as_directory, "p.memory_cache"),
    "text-flipped": ("p.bin", flip, "p.bin does not have the SHA-256 of its sidecar"),
    "text-directory": ("p.bin", as_directory, "p.bin"),
    "text-missing": ("p.bin", Path.unlink, "p.bin is missing"),
    "sidecar-missing": ("p.json", Path.unlink, "the sidecar is missing"),
    "sidecar-empty": ("p.json", lambda path: path.write_bytes(b""), "the sidecar is damaged"),
    "sidecar-cut": (
        "p.json",
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "the sidecar is damaged",
    ),
    "sidecar-no-json": (
        "p.json",
        lambda path: path.write_bytes(b"\0\1\2"),
        "the sidecar is damaged",
    ),
    "sidecar-not-utf8": (
        "p.json",
        lambda path: path.write_bytes(path.read_bytes().replace(b"exact", b"ex\xffct")),
        "the sidecar is damaged",
    ),
    "sidecar-deep": (
        "p.json",
        lambda path: path.write_bytes(b'{"x":' + b"[" * 100_000),
        "the sidecar is damaged",
    ),
    "sidecar-directory": (
        "p.json",
        as_directory,
        "the sidecar is damaged: it is no file of that kind",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_artifact_is_reported_and_can_be_replaced(
    store: Store, folder: Path, case: str
) -> None:
    """In words; publishing again makes it good, also where a directory is in the way."""
    name, spoil, words = DAMAGES[case]
    store.scan()
    spoil(folder / name)
    assert words in corrupt(store)
    publish(store, P, "two")
    assert corrupt(store) == ""


@pytest.mark.parametrize("name", ["p.memory_cache", "p.bin", "p.json"])
def test_a_directory_in_the_place_of_a_file_does_not_keep_an_artifact_from_being_removed(
    store: Store, folder: Path, name: str
) -> None:
    """It was refused for ever, and the reconciler tried it again without a pause.

    A file in the directory is kept.
    """
    as_directory(folder / name)
    (folder / name / "thesis").write_text("years")
    store.remove(P)
    assert not folder.exists()
    assert [path.parent.name for path in store.root.glob(".quarantine/*/*/thesis")] == [name]


@pytest.mark.parametrize("offset", range(0, 1100, 37))
def test_a_flipped_bit_in_a_sidecar_is_never_served_as_something_else(
    store: Store, folder: Path, offset: int
) -> None:
    """It is reported, or it touched nothing that tells what the artifact is."""
    path = folder / "p.json"
    data = bytearray(path.read_bytes())
    before = store.scan().artifacts[P].sidecar
    data[offset % len(data)] ^= 0x40
    path.write_bytes(data)
    found = store.scan()
    assert set(found.observed()) == {P}
    if P in found.artifacts and not found.artifacts[P].corrupt:
        sidecar = found.artifacts[P].sidecar
        assert (sidecar.fingerprint, sidecar.components) == (before.fingerprint, before.components)
        assert (sidecar.sha256, sidecar.artifact, sidecar.text_sha256) == (
            before.sha256,
            before.artifact,
            before.text_sha256,
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "q"}, "the sidecar belongs to m/q"),
        ({"model": "n"}, "the sidecar belongs to n/p"),
        ({"artifact": "../x"}, "the sidecar belongs to"),
        ({"artifact": "../n/p.memory_cache"}, "the sidecar belongs to"),
        ({"artifact": "p./../../../x_cache"}, "the sidecar belongs to"),
        ({"artifact": "/etc/passwd"}, "the sidecar belongs to"),
        ({"artifact": "q.memory_cache"}, "the sidecar belongs to"),
        ({"artifact": "p.json"}, "the sidecar belongs to"),
        ({"format": 2}, "the sidecar has format 2, this program writes 1"),
        ({"components": {}}, "its components do not have its fingerprint"),
        ({"fingerprint": "bb" * 32}, "its components do not have its fingerprint"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_sidecar_that_is_not_this_artifacts_is_reported(
    store: Store, folder: Path, change: dict[str, object], words: str
) -> None:
    """Copied from elsewhere, pointing elsewhere, or of another version of the program.

    No path is followed.
    """
    path = folder / "p.json"
    document = msgspec.json.decode(path.read_bytes()) | change
    path.write_bytes(msgspec.json.encode(document))
    assert words in corrupt(store)


def test_a_change_of_the_same_size_and_mtime_is_noticed(store: Store, folder: Path) -> None:
    """A look that remembers is as good as one that reads."""
    path = folder / "p.memory_cache"
    settle(path)
    assert corrupt(store) == ""
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "SHA-256" in corrupt(store)


def test_unchanged_artifacts_are_read_once(store: Store, folder: Path) -> None:
    """The text and the prompt cache, once they have settled."""
    settle(*folder.iterdir())
    store.scan()
    before = store.digests.hashed_files
    for _ in range(3):
        store.scan()
    assert before == store.digests.hashed_files


def test_strange_files_are_no_artifacts(store: Store, folder: Path) -> None:
    """Names that no prompt can have, texts alone, files beside the models' folders."""
    for name in (
        "Big.json",
        ".hidden.json",
        "notes.txt",
        "alone.bin",
        "Big.memory_cache",
        "_cache",
    ):
        (folder / name).write_bytes(b"x")
    (store.root / "file.json").write_bytes(b"x")
    (store.root / "Big").mkdir()
    (store.root / "Big/p.json").write_bytes(b"x")
    (store.root / "link").symlink_to(folder)
    assert set(store.scan().observed()) == {P}


def test_an_empty_or_missing_store_is_an_empty_inventory(tmp_path: Path) -> None:
    """The command line may look before the daemon ever ran."""
    assert Store(tmp_path / "nothing").scan().observed() == {}


def test_a_store_that_cannot_be_listed_is_a_store_error(tmp_path: Path) -> None:
    """In words."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be read: Not a directory"):
        Store(tmp_path / "file").scan()


def test_a_reader_sees_a_folder_vanish_without_harm(store: Store) -> None:
    """Regression: a look without the lock failed while the last artifact of a model was removed."""
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            publish(store, P)
            store.remove(P)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(300):
            assert set(Store(store.root).scan().observed()) <= {P}
    finally:
        done.set()
        thread.join()


# --- removing and quarantine ---


def test_removing_takes_all_files_and_an_empty_folder(store: Store) -> None:
    """The neighbour's stay."""
    publish(store, P)
    publish(store, Q)
    store.remove(P)
    assert set(store.scan().observed()) == {Q}
    assert names(store.root / "m") == {"q.memory_cache", "q.bin", "q.json"}
    store.remove(Q)
    assert not (store.root / "m").exists()
    store.remove(Q)


def test_a_file_that_the_manifest_names_is_neither_removed_nor_overwritten(
    store: Store, folder: Path
) -> None:
    """Though it has the name of one of ours, as a LoRA may: also by another path to the store."""
    mine = folder / "p.bin"
    for way in (mine, mine.resolve()):
        store.spare([way, Path("/elsewhere/q.bin")])
        with pytest.raises(StoreError, match=r"p\.bin is named by the manifest"):
            store.staging.begin(P)
        store.remove(P)
        store.quarantine(P)
        assert mine.read_bytes() == contents("one")[1]
    store.spare([])
    store.remove(P)
    assert not mine.exists()


@pytest.mark.parametrize("name", ["p.bin", "p.json"])
def test_a_file_that_is_not_the_store_s_is_never_overwritten(store: Store, name: str) -> None:
    """Though it lies where a build would put its own.

    It is named, and stays until somebody moves it.
    """
    mine = store.root / "m" / name
    mine.parent.mkdir()
    mine.write_text("notes of mine")
    with pytest.raises(StoreError, match=f"{name} is not the store's") as refused:
        store.staging.begin(P)
    assert "gc --strangers" in refused.value.hint
    assert mine.read_text() == "notes of mine"
    mine.unlink()
    publish(store, P)
    store.staging.discard(store.staging.begin(P))


@pytest.mark.parametrize("take_out", [False, True], ids=["built", "removed"])
def test_a_lone_file_with_the_name_of_a_cache_is_kept(store: Store, take_out: bool) -> None:
    """Without text and sidecar nobody knows whose it is: it is moved, with its bytes."""
    place = store.root / P.model / f"{P.prompt}.memory_cache"
    place.parent.mkdir(exist_ok=True)
    place.write_text("my only copy")

    if take_out:
        store.remove(P)
    else:
        publish(store, P)

    [kept] = (store.root / ".quarantine").rglob("*.memory_cache")
    assert kept.read_text() == "my only copy"
    assert kept.parent.name.startswith(".aside-")
    assert place.exists() is not take_out


def test_a_folder_that_is_a_link_is_neither_written_nor_emptied(
    store: Store, tmp_path: Path
) -> None:
    """A model's, the verdicts' and the quarantine: what they lead to stays as it is."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("p.json", "p.bin", "p.memory_cache", f"{STAGING}x", "m--p--00"):
        (elsewhere / name).write_text("mine")
    before = {path: path.read_text() for path in elsewhere.iterdir()}
    publish(store, Q)
    for name in ("m", ".quarantine", ".verdicts"):
        if (store.root / name).exists():
            (store.root / name).rename(tmp_path / f"was {name}")
        (store.root / name).symlink_to(elsewhere)
    with pytest.raises(StoreError, match="is a link"):
        store.staging.begin(P)
    with pytest.raises(StoreError, match="is a link"):
        store.verdicts.write(P, VERDICT)
    with pytest.raises(StoreError, match="is a link"):
        store.quarantine(P)
    with contextlib.suppress(StoreError):
        store.remove(P)
    store.verdicts.clear(P)
    store.tidy(store.scan(), 0)
    store.close()
    store.open()
    assert {path: path.read_text() for path in elsewhere.iterdir()} == before


@pytest.mark.parametrize("kept", [0, 10, 200])
def test_a_sidecar_is_known_by_its_first_lines(store: Store, folder: Path, kept: int) -> None:
    """Cut off and alone, it is the store's as long as they are there; else it may be anybody's."""
    text = (folder / "p.json").read_bytes()
    (folder / "p.json").write_bytes(text[:kept])
    (folder / "p.memory_cache").unlink()
    found = store.scan()
    assert (P in found.unreadable) == (kept == 200)
    assert (folder / "p.json" in found.foreign) == (kept < 200)


def test_a_folder_with_the_name_of_a_prompt_cache_is_not_taken_for_one(
    store: Store, folder: Path
) -> None:
    """It is somebody's.

    No artifact, and moved aside, not removed, when the artifact needs its name.
    """
    (folder / "other.memory_cache").mkdir()
    (folder / "other.memory_cache/thesis").write_text("years")
    assert Key("m", "other") not in store.scan().observed()
    publish(store, Key("m", "other"))
    for _ in range(MAX_QUARANTINED + 1):
        publish(store, Q)
        store.quarantine(Q)
    store.tidy(store.scan(), 0)
    assert [path.read_text() for path in store.root.glob(".quarantine/*/*/thesis")] == ["years"]


def test_a_folder_into_which_something_is_built_stays(store: Store, folder: Path) -> None:
    """Its last artifact goes while the worker has not written the next one's file yet."""
    staged = store.staging.begin(Q)
    store.remove(P)
    assert names(folder) == set()
    staged.write_bytes(b"the engine's")
    store.staging.discard(staged)
    store.remove(Q)
    assert not folder.exists()


def test_what_a_crash_left_can_be_removed(store: Store, folder: Path) -> None:
    """An artifact without its sidecar."""
    (folder / "p.json").unlink()
    store.remove(P)
    assert store.scan().observed() == {}


def test_a_quarantined_artifact_is_out_of_use_but_kept(store: Store) -> None:
    """With all three files, for a post-mortem."""
    publish(store, P)
    store.quarantine(P)
    assert store.scan().observed() == {}
    (kept,) = (store.root / ".quarantine").iterdir()
    assert names(kept) == {"p.memory_cache", "p.bin", "p.json"}


def test_the_quarantine_is_bounded_and_the_oldest_goes_first(store: Store) -> None:
    """A disk is not filled by a fault that repeats."""
    for number in range(MAX_QUARANTINED + 3):
        publish(store, P, f"{number:02}")
        store.quarantine(P)
    kept = sorted((path / "p.bin").read_text() for path in (store.root / ".quarantine").iterdir())
    assert kept == [f"You are {number:02}." for number in range(3, MAX_QUARANTINED + 3)]


# --- verdicts ---


def test_a_verdict_comes_back_as_it_was_written(store: Store) -> None:
    """Also to a store that was opened later; it can be overwritten and cleared."""
    other = Verdict(
        fingerprint="b",
        kind=VerdictKind.OVER_BUDGET,
        trouble=VERDICT.trouble,
        needed_bytes=5,
        tokens=7,
    )
    store.verdicts.write(P, other)
    store.verdicts.write(P, VERDICT)
    store.verdicts.write(Q, other)
    assert Store(store.root).scan().verdicts == {P: VERDICT, Q: other}
    store.verdicts.clear(P)
    store.verdicts.clear(P)
    assert store.scan().verdicts == {Q: other}


@pytest.mark.parametrize("content", [b"", b"{}", b'{"fingerprint":"\xff"}', b"[" * 9999])
def test_a_damaged_verdict_is_none(store: Store, content: bytes) -> None:
    """It costs one more attempt, no more."""
    store.verdicts.write(P, VERDICT)
    (store.root / ".verdicts/m/p.json").write_bytes(content)
    assert store.scan().verdicts == {}


@pytest.mark.parametrize("name", ["attempts", "tokens", "needed_bytes"])
def test_a_verdict_with_an_endless_number_is_none(store: Store, name: str) -> None:
    """The pause after -10**400 attempts was an OverflowError, which ended the reconciler."""
    store.verdicts.write(P, VERDICT)
    path = store.root / ".verdicts/m/p.json"
    content = msgspec.json.decode(path.read_bytes())
    for number, count in ((-(10**400), 0), (2**63, 0), (2**63 - 1, 1)):
        path.write_text(json.dumps({**content, name: number}))
        assert len(store.scan().verdicts) == count


# --- one owner ---


def test_a_second_owner_is_refused_and_told_who_the_first_is(store: Store) -> None:
    """When the first has closed, the second may."""
    second = Store(store.root)
    with pytest.raises(StoreLocked, match=f"another daemon \\(pid {os.getpid()}\\)"):
        second.open()
    store.close()
    store.close()
    second.open()
    second.close()


def test_the_lock_goes_with_its_process(store: Store) -> None:
    """A crashed daemon does not lock out the next one."""
    store.close()
    code = (
        "import os, sys, pathlib, rkcached.store as s; "
        "s.Store(pathlib.Path(sys.argv[1])).open(); os._exit(1)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(store.root)],
            check=False,
            cwd=Path(__file__).parents[2],
        ).returncode
        == 1
    )
    store.open()


def test_without_the_lock_nothing_is_written(tmp_path: Path) -> None:
    """A reader cannot harm the owner's store."""
    store = Store(tmp_path)
    for write in (
        lambda: store.staging.begin(P),
        lambda: store.remove(P),
        lambda: store.quarantine(P),
        lambda: store.verdicts.write(P, VERDICT),
    ):
        with pytest.raises(StoreError, match="not open for writing"):
            write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/cache", "file"])
def test_a_directory_that_cannot_be_made_is_said_in_words(tmp_path: Path, place: str) -> None:
    """With what to do."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be written") as caught:
        Store(tmp_path / place).open()
    assert "--cache-dir" in caught.value.hint


def test_a_read_only_directory_is_said_in_words() -> None:
    """With what to do. Root may write everywhere, so the tests take another user for it."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        Path(place).chmod(0o555)
        if user == 0:
            os.seteuid(pwd.getpwnam("nobody").pw_uid)
        try:
            with pytest.raises(StoreError, match="cannot be written: Permission denied"):
                Store(Path(place)).open()
        finally:
            os.seteuid(user)


# --- what is not the store's, and what was left ---


def test_what_a_build_could_not_clear_away_goes_at_the_next_look(
    store: Store, folder: Path
) -> None:
    """Its folder was elsewhere when it ended. What is being built now stays."""
    left, running = store.staging.begin(P), store.staging.begin(Q)
    away = folder.rename(folder.with_name("away"))
    store.staging.discard(left)
    away.rename(folder)
    for path in (left, running, running.with_name(running.name + ".bin")):
        path.write_bytes(b"half")
    store.tidy(store.scan(), 0)
    assert names(folder) - {"p.memory_cache", "p.bin", "p.json"} == {
        running.name,
        running.name + ".bin",
    }


def test_the_quarantine_keeps_what_there_is_room_for(store: Store) -> None:
    """The oldest goes first."""
    for content in ("one", "two"):
        publish(store, P, content)
        store.quarantine(P)
    sizes = store.scan().quarantined
    assert len(sizes) == 2
    newest = list(sizes)[-1]
    store.tidy(store.scan(), sizes[newest])
    assert list(store.scan().quarantined) == [newest]


def test_a_sparse_file_counts_by_what_it_takes(store: Store, folder: Path) -> None:
    """Otherwise an empty file of a terabyte would use up the whole budget."""
    with (folder / "notes.txt").open("wb") as stream:
        stream.truncate(1 << 40)
    assert store.scan().foreign[folder / "notes.txt"] < 1 << 20


def test_what_is_not_the_stores_is_counted_once(store: Store, folder: Path) -> None:
    """Files beside artifacts, and in the root.

    Neither what is the store's own, nor folders, nor what links lead to.
    """
    (folder / "notes.txt").write_bytes(b"x" * 10)
    (folder / "lost.bin").write_bytes(b"x" * 20)
    (folder / "inner").mkdir()
    (folder / "inner/file").write_bytes(b"x" * 40)
    (store.root / "stray").symlink_to("/dev/zero")
    store.verdicts.write(Q, VERDICT)
    (folder / "q.memory_cache").write_bytes(b"x" * 80)
    found = store.scan()
    assert found.foreign == {
        folder / "notes.txt": 10,
        folder / "lost.bin": 20,
        store.root / "stray": 9,
    }
    assert found.observed()[Q].size_bytes == 80


def test_a_disk_may_be_remounted_read_only_under_an_open_store(store: Store) -> None:
    """For that, no file of it may be open for writing."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    opened = [path for path in links if str(store.root) in str(path.readlink())]
    assert opened
    for path in opened:
        flags = int(
            Path("/proc/self/fdinfo", path.name).read_text().partition("flags:")[2].split()[0], 8
        )
        assert flags & os.O_ACCMODE == os.O_RDONLY


# --- crashes ---


def test_leftovers_of_a_crash_are_swept_when_the_store_is_opened(
    store: Store, folder: Path
) -> None:
    """What was staged; nothing else."""
    (folder / ".stage-p-0123").write_bytes(b"half")
    (folder / ".stage-p-0123.json").write_bytes(b"half")
    before = corrupt(store)
    store.close()
    store.open()
    assert names(folder) == {"p.memory_cache", "p.bin", "p.json"}
    assert corrupt(store) == before == ""


STEPS = 40
"""More than a commit has."""


@pytest.mark.parametrize("earlier", [None, "one"], ids=["first", "replacement"])
def test_a_crash_at_any_step_of_a_commit_leaves_no_wrong_artifact(
    tmp_path: Path, earlier: str | None
) -> None:
    """The old artifact, the new one, or one that is reported.

    Never a fresh verdict on bytes that do not match.
    """
    for nth in range(1, STEPS + 1):
        store = Store(tmp_path / str(nth))
        store.open()
        if earlier:
            publish(store, P, earlier)
        store.close()
    command = [sys.executable, "-m", "tests.integration.commit_script", str(tmp_path), "two"]
    crashes = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert (crashes.returncode, crashes.stderr) == (0, "")
    steps = int(crashes.stdout)
    assert 8 < steps < STEPS
    seen = {outcome(tmp_path / str(nth)) for nth in range(1, steps + 2)}
    assert seen == {earlier or "nothing", "corrupt", "two"}


def outcome(root: Path) -> str:
    """Opens the store after a crash; which artifact it holds, after comparing every byte of it."""
    store = Store(root)
    store.open()
    try:
        assert [str(path) for path in root.rglob(".stage-*")] == []
        found = store.scan().observed().get(P)
        if found is None:
            return "nothing"
        if found.corrupt:
            assert publish(store, P, "two") == store.scan().artifacts[P]
            return "corrupt"
        (content,) = [
            c for c in ("one", "two") if (root / "m/p.memory_cache").read_bytes() == contents(c)[0]
        ]
        data, prefix = contents(content)
        assert (root / "m/p.bin").read_bytes() == prefix
        assert make_sidecar(P, data, prefix) == store.scan().artifacts[P].sidecar
        return content
    finally:
        store.close()


def test_thousands_of_artifacts_take_little_memory(store: Store) -> None:
    """Regression: stat results and records of integers took 5 KB more for each of them."""
    for number in range(200):
        publish(store, Key("m", f"p{number:03d}"), f"{number:03d}")
    settle(*(store.root / "m").iterdir())
    again = Store(store.root)
    again.scan()  # what is made once, whatever there is
    gc.collect()
    tracemalloc.start()
    try:
        store = Store(store.root)
        seen = store.scan().artifacts
        assert len(seen) == 200
        kept, _ = tracemalloc.get_traced_memory()
        store.scan()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept / 200 < 2_500
    assert most / 200 < 4_500


# --- retired artifacts ---


def fingerprint_of(content: str) -> str:
    return make_sidecar(P, *contents(content)).fingerprint


def only_retired(store: Store) -> Retired:
    (retired,) = store.scan().retired.values()
    return retired


def test_a_retired_artifact_leaves_its_place_and_is_found_by_its_fingerprint(
    store: Store, folder: Path
) -> None:
    """With the time of its retirement; its model's folder goes when nothing is left in it."""
    before = time.time() - 1
    store.retire(P)
    assert not folder.exists()
    retired = only_retired(store)
    assert (retired.key, retired.fingerprint) == (P, fingerprint_of("one"))
    assert before <= retired.retired_at <= time.time() + 1
    assert store.scan().observed() == {}


@pytest.mark.parametrize("take", [True, False])
def test_a_retired_artifact_is_adopted_under_another_name(
    store: Store, folder: Path, take: bool
) -> None:
    """It is what it was, but for its name; taken over, nothing of it is left where it was."""
    store.retire(P)
    artifact = store.adopt(Key("n", "other"), fingerprint_of("one"), source=None, take=take)
    inventory = store.scan()
    assert artifact == inventory.artifacts[Key("n", "other")]
    assert artifact.path.read_bytes() == contents("one")[0]
    assert (artifact.folder / "other.bin").read_bytes() == contents("one")[1]
    assert not store.verify(Key("n", "other"))
    assert len(inventory.retired) == (0 if take else 1)
    assert not folder.exists()


@pytest.mark.parametrize("take", [True, False])
def test_the_artifact_of_another_prompt_is_adopted(store: Store, folder: Path, take: bool) -> None:
    """A renamed prompt takes it over.

    A copied one leaves the first where it is, in a file of its own.
    """
    store.adopt(Q, fingerprint_of("one"), source=P, take=take)
    found = store.scan()
    assert set(found.artifacts) == ({Q} if take else {P, Q})
    assert not any(artifact.corrupt for artifact in found.artifacts.values())
    assert names(folder) == {
        f"{key.prompt}.{end}" for key in found.artifacts for end in ("json", "bin", "memory_cache")
    }
    if not take:
        assert not (folder / "p.memory_cache").samefile(folder / "q.memory_cache")


def test_what_an_adoption_replaces_is_put_aside(store: Store) -> None:
    """A -> B -> A: both stay, and nothing is built."""
    publish(store, P, "one")
    publish(store, P, "two", retire=True)
    assert only_retired(store).fingerprint == fingerprint_of("one")
    store.adopt(P, fingerprint_of("one"), source=None, take=True, retire=True)
    assert only_retired(store).fingerprint == fingerprint_of("two")
    assert store.scan().artifacts[P].fingerprint == fingerprint_of("one")


def test_a_commit_puts_aside_only_another_fingerprint(store: Store) -> None:
    """What is built anew is not kept twice."""
    publish(store, P, "one")
    publish(store, P, "one", retire=True)
    assert store.scan().retired == {}


def test_without_links_the_file_is_copied(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on FAT."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store.adopt(Q, fingerprint_of("one"), source=P, take=True)
    assert names(folder) == {"q.json", "q.bin", "q.memory_cache"}


@pytest.mark.parametrize("file", ["p.memory_cache", "p.bin"])
def test_a_retired_artifact_that_was_changed_is_not_adopted(store: Store, file: str) -> None:
    """The prompt keeps what it had, and the bad source is gone."""
    publish(store, P)
    store.retire(P)
    publish(store, Q, "two")
    flip(store.root / ".retired" / fingerprint_of("one") / file)
    with pytest.raises(StoreError, match="not what its sidecar says"):
        store.adopt(Q, fingerprint_of("one"), source=None, take=True)
    found = store.scan()
    assert (found.retired, found.incomplete, found.staged) == ({}, [], [])
    assert found.artifacts[Q].fingerprint == fingerprint_of("two")
    assert not store.verify(Q)


def test_a_source_that_changed_without_a_trace_is_found_out(store: Store, folder: Path) -> None:
    """Its digest was remembered: the next look reads it again, and says that it is corrupt."""
    settle(folder / "p.memory_cache")
    assert not store.scan().artifacts[P].corrupt
    store.digests.trust(
        folder / "p.memory_cache",
        flipped(folder / "p.memory_cache"),
        make_sidecar(P, *contents("one")).sha256,
    )
    with pytest.raises(StoreError, match="not what its sidecar says"):
        store.adopt(Q, fingerprint_of("one"), source=P, take=False)
    assert "SHA-256" in store.scan().artifacts[P].corrupt


def flipped(path: Path) -> os.stat_result:
    flip(path)
    settle(path)
    return path.stat()


@pytest.mark.parametrize("lost", ["p.json", "p.memory_cache", "p.bin"])
def test_half_a_retired_artifact_is_cleared_away(store: Store, lost: str) -> None:
    """A crash may leave it."""
    publish(store, P)
    store.retire(P)
    place = store.root / ".retired" / fingerprint_of("one")
    (place / lost).unlink()
    inventory = store.scan()
    assert (inventory.retired, inventory.incomplete) == ({}, [place])
    store.tidy(inventory, 0)
    assert not place.exists()


def test_the_oldest_retired_artifacts_give_back_what_is_needed(store: Store) -> None:
    """Not more of them."""
    for at, content in enumerate(("one", "two", "six")):
        publish(store, P, content)
        store.retire(P)
        os.utime(store.root / ".retired" / fingerprint_of(content), (at, at))
    store.retired.release(1)
    assert {one.fingerprint for one in store.scan().retired.values()} == {
        fingerprint_of("two"),
        fingerprint_of("six"),
    }
    store.retired.release(1 << 30)
    assert store.scan().retired == {}


def test_all_retired_artifacts_of_a_prompt_can_be_deleted(store: Store) -> None:
    """Those of others stay."""
    for key, content in ((P, "one"), (P, "two"), (Q, "six")):
        publish(store, key, content)
        store.retire(key)
    store.retired.remove_of(P)
    assert only_retired(store).key == Q


def test_a_retired_artifact_of_a_prompt_without_a_sidecar_is_removed(
    store: Store, folder: Path
) -> None:
    """Nobody knows what it is."""
    (folder / "p.json").write_text("{}")
    store.retire(P)
    assert (store.scan().retired, folder.exists()) == ({}, False)


def test_a_folder_with_a_name_that_is_no_fingerprint_is_left_alone(store: Store) -> None:
    """Nothing but what the store made is touched."""
    publish(store, P)
    store.retire(P)
    stranger = store.root / ".retired/notes"
    stranger.mkdir()
    inventory = store.scan()
    store.tidy(inventory, 0)
    store.retired.release(1 << 30)
    assert stranger.exists()
