"""Where a command writes a file for a user; above all, what it never replaces."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from rkcached.cli.bundles import _opened
from rkcached.errors import SourceError, StoreError
from rkcached.store.result_file import place_for

REMEDY = "replace it"


def refusal(path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        place_for(path, replace=True, remedy=REMEDY)
    assert caught.value.hint
    assert caught.value.exit_code == os.EX_CANTCREAT
    return caught.value.message


def test_only_a_regular_file_is_replaced(tmp_path: Path) -> None:
    """Regression: as root, `export -o /dev/null --force` made a regular file of the device."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for name in ("pipe", "socket"):
            assert "a device, a pipe or a socket" in refusal(tmp_path / name)
    (tmp_path / "link").symlink_to("pipe")
    assert "a device, a pipe or a socket" in refusal(tmp_path / "link")
    assert "a device, a pipe or a socket" in refusal(Path("/dev/null"))
    assert "is a folder" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "no" / "file")
    (tmp_path / "file").touch()
    assert "is not a folder" in refusal(tmp_path / "file" / "x")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    assert place_for(tmp_path / "link", replace=False, remedy=REMEDY) == tmp_path / "file"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="exists") as caught:
        place_for(tmp_path / "link", replace=False, remedy=REMEDY)
    assert caught.value.hint == REMEDY
    assert place_for(tmp_path / "link", replace=True, remedy=REMEDY) == tmp_path / "file"
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    assert "leads back to itself" in refusal(tmp_path / "one")


@pytest.mark.parametrize("name", ["", ".", "..", "-"])
def test_what_is_no_files_name(name: str) -> None:
    """Regression: a traceback for the first two; `-` became a file."""
    refusal(Path(name))


def test_a_closed_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SourceError, match="standard input is closed"):
        _opened(Path("-"))
