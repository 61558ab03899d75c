"""Removing beneath a folder.

Nothing outside of it, nothing through a link, nothing that came in between.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rkcached.host import beneath


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A folder `a` with a file and a link that leads out, beside the folder `outside`."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/kept").write_text("mine")
    (tmp_path / "top/a/b").mkdir(parents=True)
    (tmp_path / "top/a/b/file").write_text("x")
    (tmp_path / "top/a/out").symlink_to(tmp_path / "outside")
    return tmp_path / "top"


def test_a_folder_goes_with_its_links_but_not_with_what_they_lead_to(top: Path) -> None:
    """Links are removed as links."""
    assert beneath.remove(top, "a")
    assert list(top.iterdir()) == []
    assert (top.parent / "outside/kept").read_text() == "mine"


def test_no_folder_is_reached_through_a_link(top: Path) -> None:
    """Neither to remove in it nor to list it; a link at the end is itself."""
    with pytest.raises(NotADirectoryError):
        beneath.remove(top, "a", "out", "kept")
    assert beneath.names_in(top, "a", "out") == []
    assert (top.parent / "outside/kept").exists()
    assert beneath.remove(top, "a", "out")
    assert not (top / "a/out").is_symlink()


@pytest.mark.parametrize("instead", ["folder", "link", "another file"])
def test_what_came_in_the_place_of_what_was_seen_stays(top: Path, instead: str) -> None:
    """The kind or the file behind the name is another one than when it was listed."""
    place = top / "note"
    place.write_text("old")
    seen = beneath.identity(top, "note")
    place.rename(top / "kept")  # or its inode might be used again
    match instead:
        case "folder":
            place.mkdir()
        case "link":
            place.symlink_to(top.parent / "outside")
        case _:
            place.write_text("new")
    assert not beneath.remove(top, "note", only=seen)
    assert os.path.lexists(place)


def test_what_is_spared_stays_with_its_folders(top: Path) -> None:
    """The rest goes, and the answer is no."""
    (top / "a/b/model").write_text("named")
    model = (top / "a/b/model").stat()
    assert not beneath.remove(top, "a", spare=lambda info: info.st_ino == model.st_ino)
    assert [str(path.relative_to(top)) for path in sorted(top.rglob("*"))] == [
        "a",
        "a/b",
        "a/b/model",
    ]


def test_what_is_gone_already_is_gone(top: Path) -> None:
    assert beneath.remove(top, "nothing", "there")
    assert beneath.identity(top, "nothing", "there") is None


def test_folders_without_end_are_an_error(top: Path) -> None:
    """No recursion error, and no descriptor is lost."""
    deep = top / "deep"
    for _ in range(beneath.MAX_DEPTH + 1):
        deep = deep / "d"
    deep.mkdir(parents=True)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="folders are nested more than"):
        beneath.remove(top, "deep")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
