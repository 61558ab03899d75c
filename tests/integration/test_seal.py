"""A prompt cache is served only if this installation has made it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from rkcached.host.digests import Digests, _Entry, signature_of
from rkcached.sources.records import Key
from rkcached.store.conversations import Record
from rkcached.store.seal import KEY_BYTES, NAME, UNSIGNED, Seal, make_seal, read_seal
from rkcached.store.sidecar import Sidecar
from rkcached.store.store import Store
from tests.integration.test_store import contents, make_sidecar, publish

P, Q = Key("m", "p"), Key("m", "q")


@pytest.fixture
def seal(tmp_path: Path) -> Seal:
    made = make_seal(tmp_path / "state")
    assert made is not None
    return made


@pytest.fixture
def store(tmp_path: Path, seal: Seal) -> Iterator[Store]:
    opened = Store(tmp_path / "cache", seal=seal)
    opened.open()
    yield opened
    opened.close()


def test_the_key_is_made_once_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    first = make_seal(tmp_path)
    key = tmp_path / NAME
    assert len(key.read_bytes()) == KEY_BYTES
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    second = make_seal(tmp_path)
    assert key.read_bytes() == before
    assert first is not None
    assert second is not None


def test_without_a_place_for_the_key_nothing_is_signed(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    assert make_seal(tmp_path / "state") is None


def test_a_damaged_key_is_replaced(tmp_path: Path) -> None:
    """What it signed is built again."""
    (tmp_path / NAME).write_bytes(b"short")
    assert read_seal(tmp_path) is None
    assert make_seal(tmp_path) is not None
    assert len((tmp_path / NAME).read_bytes()) == KEY_BYTES


def found(store: Store, key: Key = P) -> str:
    """Why the artifact cannot be used, by a look that remembers nothing, and by `verify`."""
    again = Store(store.root, Digests(), seal=store._seal)
    artifact = again.scan().observed()[key]
    assert bool(store.verify(key)) == bool(artifact.corrupt)
    assert artifact.unsigned == (artifact.corrupt == UNSIGNED)
    return artifact.corrupt


def record(store: Store, key: Key = P) -> Path:
    return store.root / key.model / f"{key.prompt}.json"


def test_what_was_committed_here_is_believed(store: Store, seal: Seal) -> None:
    committed = publish(store, P)
    assert seal.has_signed(committed.sidecar)
    assert found(store) == ""
    assert store.scan().artifacts[P] == committed


def changed(**fields: object) -> Callable[[Sidecar], Sidecar]:
    def change(sidecar: Sidecar) -> Sidecar:
        return msgspec.structs.replace(sidecar, **fields)

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed(mac=""),
        changed(mac="0" * 64),
        changed(mac="é" * 64),
        changed(tokens=3),
        changed(built_at=99.0),
        changed(answer_sha256="ab"),
        lambda sidecar: Seal(b"another installation's key" + b"." * 6).signed(sidecar),
    ],
)
def test_one_changed_word_is_enough(store: Store, change: Callable[[Sidecar], Sidecar]) -> None:
    committed = publish(store, P)
    forged = change(committed.sidecar)
    record(store).write_bytes(msgspec.json.encode(forged, enc_hook=dict))
    assert found(store) == UNSIGNED
    assert store.scan().artifacts[P].signature is None


def test_another_prompts_state_under_a_right_fingerprint_is_not_served(store: Store) -> None:
    """Whoever can write to the store made the sidecar himself: it agrees with its files."""
    publish(store, P)
    data, prefix = contents("something else")
    _, declared = contents("one")
    right = make_sidecar(P, data, declared)
    folder = store.root / "m"
    (folder / right.artifact).write_bytes(data)
    record(store).write_bytes(msgspec.json.encode(right, enc_hook=dict))
    del prefix
    assert found(store) == UNSIGNED
    # Without a seal, it would be.
    assert Store(store.root).scan().artifacts[P].corrupt == ""


def test_an_older_version_of_the_same_is_what_it_was(store: Store, tmp_path: Path) -> None:
    """Its own text and its own state: that it was put back makes it wrong for nobody."""
    publish(store, P)
    shutil.copytree(store.root / "m", tmp_path / "older")
    publish(store, P, "two")
    shutil.rmtree(store.root / "m")
    shutil.copytree(tmp_path / "older", store.root / "m")
    assert found(store) == ""
    assert (
        store.scan().artifacts[P].sidecar.fingerprint
        == make_sidecar(P, *contents("one")).fingerprint
    )


def test_one_prompts_sidecar_is_not_anothers(store: Store) -> None:
    publish(store, P)
    for suffix in (".json", ".bin", ".memory_cache"):
        shutil.copy(store.root / "m" / f"p{suffix}", store.root / "m" / f"q{suffix}")
    assert "belongs to m/p" in store.scan().unreadable[Q].corrupt


def test_an_unsigned_artifact_that_was_put_aside_is_not_adopted(store: Store) -> None:
    committed = publish(store, P)
    store.retire(P)
    folder = store.retired.folder(committed.fingerprint)
    assert committed.fingerprint in store.scan().retired
    forged = msgspec.structs.replace(committed.sidecar, mac="")
    (folder / "p.json").write_bytes(msgspec.json.encode(forged, enc_hook=dict))
    assert committed.fingerprint not in store.scan().retired


def test_what_is_adopted_is_signed_for_its_new_place(store: Store) -> None:
    committed = publish(store, P)
    adopted = store.adopt(Q, committed.fingerprint, source=P, take=False)
    assert found(store, Q) == ""
    assert adopted.sidecar.mac != committed.sidecar.mac


def test_a_forged_digest_is_not_believed(store: Store, seal: Seal) -> None:
    """The file of digests spares reading: an entry of one's own would make any file pass."""
    committed = publish(store, P)
    size = committed.path.stat().st_size
    store.close()
    committed.path.write_bytes(b"x" * size)
    forger = Digests(store.root / ".digests.json")
    forger.trust(committed.path, committed.path.stat(), committed.sidecar.sha256)
    forger._entries[str(committed.path)] = _Entry(
        signature_of(committed.path.stat()), committed.sidecar.sha256
    )
    forger._dirty = True
    forger.save()
    assert Store(store.root).scan().artifacts[P].corrupt == "", "without a seal, it is believed"
    again = Store(store.root, seal=seal)
    assert "does not have the SHA-256 of its sidecar" in again.scan().artifacts[P].corrupt


def test_digests_that_were_saved_here_spare_reading(store: Store, seal: Seal) -> None:
    committed = publish(store, P)
    file = store.root / ".digests.json"
    digests = Digests(file, sign=seal.code)
    digests._entries[str(committed.path)] = _Entry(signature_of(committed.path.stat()), "ab")
    digests._dirty = True
    digests.save()
    assert Digests(file, sign=seal.code).digest(committed.path) == "ab"
    other = Seal(b"another installation's key" + b"." * 6)
    assert Digests(file, sign=other.code).digest(committed.path) == committed.sidecar.sha256


def test_a_forged_conversation_is_removed(store: Store) -> None:
    """It would be loaded for a user who did not have it."""
    path = store.conversations.place("m")
    path.write_bytes(b"state")
    record = Record(
        model="m",
        identity="i",
        owner=1,
        text="Hello",
        asked_bytes=5,
        tokens=5,
        size_bytes=0,
        sha256="",
        used_at=1.0,
    )
    saved = store.conversations.seal(path, record)
    path = saved.path
    assert [found.record for found in store.conversations.all()] == [saved.record]
    forged = msgspec.structs.replace(saved.record, owner=2)
    path.with_suffix(".json").write_bytes(msgspec.json.encode(forged))
    assert store.conversations.all() == []
    assert not path.exists()
