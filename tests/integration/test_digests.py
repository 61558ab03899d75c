"""Digests of real files: read once, and again whenever anything about them changed."""

from __future__ import annotations

import hashlib
import json
import os
from io import BufferedReader
from pathlib import Path

import pytest

from rkcached.errors import SourceUnsettled
from rkcached.host.digests import Digests, settled, signature_of
from tests.waiting import wait_until


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def settle(*paths: Path) -> None:
    """Wait until a later change is certain to show in the signature."""
    wait_until(lambda: settled(*(path.stat() for path in paths)), "they have settled")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.write_bytes(b"one")
    settle(path)
    return path


def test_an_unchanged_file_is_read_once(file: Path) -> None:
    """However often it is asked for."""
    digests = Digests()
    assert {sha256(b"one")} == {digests.digest(file) for _ in range(5)}
    assert digests.hashed_files == 1


def test_a_touched_file_is_read_again(file: Path) -> None:
    """And has the same digest."""
    digests = Digests()
    before = digests.digest(file)
    file.touch()
    assert before == digests.digest(file)
    assert digests.hashed_files == 2


def test_a_rewrite_with_the_same_size_and_mtime_is_noticed(file: Path) -> None:
    """The ctime, which nobody can set, gives it away."""
    digests = Digests()
    digests.digest(file)
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (stat.st_size, stat.st_mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)
    assert sha256(b"two") == digests.digest(file)


def test_a_replaced_file_is_noticed(file: Path) -> None:
    """As editors save: another inode under the same name, with the old times."""
    digests = Digests()
    digests.digest(file)
    stat = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"two")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert sha256(b"two") == digests.digest(file)


def test_a_link_that_is_turned_is_noticed(tmp_path: Path, file: Path) -> None:
    """As a ConfigMap is updated."""
    other, link = tmp_path / "other", tmp_path / "link"
    other.write_bytes(b"two")
    link.symlink_to(file)
    digests = Digests()
    assert sha256(b"one") == digests.digest(link)
    link.unlink()
    link.symlink_to(other)
    assert sha256(b"two") == digests.digest(link)


def test_two_changes_within_one_tick_of_the_clock_are_both_noticed(tmp_path: Path) -> None:
    """A file that just changed is not remembered.

    For a second change might leave the same signature.
    """
    path, digests = tmp_path / "f", Digests()
    for number in range(200):
        path.write_bytes(b"a%04d" % number)
        digests.digest(path)
        path.write_bytes(b"b%04d" % number)
        assert sha256(b"b%04d" % number) == digests.digest(path)


def test_the_memory_survives_a_restart(tmp_path: Path, file: Path) -> None:
    """A model of many gigabytes is not read again because the daemon was restarted."""
    memory = tmp_path / "memory.json"
    first = Digests(memory)
    first.digest(file)
    first.save()
    assert memory.stat().st_mode & 0o777 & ~0o640 == 0
    second = Digests(memory)
    assert sha256(b"one") == second.digest(file)
    assert second.hashed_files == 0


def test_what_an_earlier_version_remembered_is_read_again(tmp_path: Path, file: Path) -> None:
    """It relied on times that a coarse file system does not have."""
    memory = tmp_path / "digests.json"
    first = Digests(memory)
    first.digest(file)
    first.save()
    kept = json.loads(memory.read_text())
    memory.write_text(json.dumps(kept["files"]))
    again = Digests(memory)
    again.digest(file)
    assert again.hashed_files == 1


def test_a_change_while_nobody_looked_is_noticed(tmp_path: Path, file: Path) -> None:
    """The memory holds signatures, not promises."""
    memory = tmp_path / "memory.json"
    first = Digests(memory)
    first.digest(file)
    first.save()
    file.write_bytes(b"two")
    assert sha256(b"two") == Digests(memory).digest(file)


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", b"[]", b'{"x":1}', b'{"\xff":[[1,1,1,1,1],"aa"]}', b'{"x":' + b"[" * 9999],
    ids=["empty", "no-json", "list", "wrong-type", "not-utf8", "deep"],
)
def test_a_damaged_memory_costs_only_reading(tmp_path: Path, file: Path, content: bytes) -> None:
    """It is never an error, and is replaced by a good one."""
    memory = tmp_path / "memory.json"
    memory.write_bytes(content)
    digests = Digests(memory)
    assert sha256(b"one") == digests.digest(file)
    digests.save()
    again = Digests(memory)
    again.digest(file)
    assert again.hashed_files == 0


def test_files_nobody_asks_for_are_forgotten(tmp_path: Path, file: Path) -> None:
    """The memory does not grow with every name a model ever had."""
    memory, other = tmp_path / "memory.json", tmp_path / "other"
    other.write_bytes(b"two")
    settle(other)
    first = Digests(memory)
    first.digest(file)
    first.digest(other)
    first.save()
    second = Digests(memory)
    second.digest(file)
    other.write_bytes(b"three")
    settle(other)
    file.touch()
    settle(file)
    second.digest(file)
    second.save()
    assert str(other) not in memory.read_text()
    assert str(file) in memory.read_text()


def test_nothing_is_written_when_nothing_is_new(tmp_path: Path, file: Path) -> None:
    """A quiet daemon does not wake the disk."""
    memory = tmp_path / "memory.json"
    first = Digests(memory)
    first.digest(file)
    first.save()
    before = signature_of(memory.stat())
    second = Digests(memory)
    second.digest(file)
    second.save()
    assert before == signature_of(memory.stat())


def test_a_trusted_digest_is_not_computed(file: Path) -> None:
    """For the very file that has the signature, and no other."""
    digests = Digests()
    digests.trust(file, file.stat(), "known")
    assert (digests.digest(file), digests.hashed_files) == ("known", 0)
    file.write_bytes(b"two")
    assert sha256(b"two") == digests.digest(file)


def test_a_file_that_never_holds_still_is_an_error(file: Path) -> None:
    """Half of a copy must not become a digest."""

    class WhileWritten(Digests):
        def _sha256(self, stream: BufferedReader) -> str:
            with file.open("ab") as other:
                other.write(b"x")
            return super()._sha256(stream)

    with pytest.raises(SourceUnsettled, match="is being written to"):
        WhileWritten().digest(file)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    """The caller knows what the file was for."""
    with pytest.raises(FileNotFoundError):
        Digests().digest(tmp_path / "nothing")
