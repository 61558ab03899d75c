"""Files that the kernel has read before somebody needs them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkcached.host import page_cache
from rkcached.host.page_cache import read_ahead

SIZE = 8 << 20


@pytest.fixture
def file() -> Iterator[Path]:
    """Of 8 MB, on a disk if there is one, and not in the kernel's memory."""
    path = Path("/var/tmp") / f"rkcached-test-{os.getpid()}"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield path
    finally:
        path.unlink()


def resident(path: Path) -> float:
    """The share of its pages that the kernel has in memory (mincore(2))."""
    pages = SIZE // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    with (
        path.open("rb") as stream,
        mmap.mmap(
            stream.fileno(), SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        ) as memory,
    ):
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(place), ctypes.c_size_t(SIZE), found) == 0
    return sum(page & 1 for page in found) / pages


def test_all_of_a_file_is_read(file: Path) -> None:
    """Not only its beginning, as POSIX_FADV_WILLNEED does."""
    if resident(file) > 0.5:
        pytest.skip("this file system is memory")
    assert read_ahead(file)
    assert resident(file) == 1


def test_a_file_that_would_push_out_others_is_not_read(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "SHARE", 0.0)
    assert not read_ahead(file)


def test_a_file_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not read_ahead(tmp_path / "none")
