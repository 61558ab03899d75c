"""Which Python and architecture an image has: read from its files alone, or named by its maker."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def image() -> Iterator[ModuleType]:
    """The module that makes environments in images.

    It imports its neighbours by their bare names.
    """
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        import image

        yield image
    finally:
        sys.path.remove(str(ROOT / "packaging"))


def program(path: Path, machine: int) -> None:
    """The beginning of an ELF program for a machine, by its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little"))


@pytest.mark.parametrize(("number", "machine"), [(183, "aarch64"), (62, "x86_64")])
@pytest.mark.parametrize(
    "link", ["python3.13", "/usr/bin/python3.13", "../../etc/alternatives/python3"]
)
def test_the_image_s_own_python_is_found(
    image: ModuleType, tmp_path: Path, link: str, number: int, machine: str
) -> None:
    """Links are followed as they lead in the image.

    Also absolute ones and those of Debian's alternatives.
    """
    program(tmp_path / "usr/bin/python3.13", number)
    (tmp_path / "usr/bin/python3").symlink_to(link)
    (tmp_path / "etc/alternatives").mkdir(parents=True)
    (tmp_path / "etc/alternatives/python3").symlink_to("/usr/bin/python3.13")
    target = image.find_target(tmp_path, "", "")
    assert (target.python, target.machine) == ("3.13", machine)


def test_what_is_named_needs_no_image(image: ModuleType, tmp_path: Path) -> None:
    """A staging directory for a package has no Python in it."""
    target = image.find_target(tmp_path, "3.12", "aarch64")
    assert (target.python, target.machine) == ("3.12", "aarch64")


def test_an_image_without_python_is_refused(image: ModuleType, tmp_path: Path) -> None:
    """It is never guessed from the machine that makes it; the message has the next step."""
    with pytest.raises(
        SystemExit, match=r"install Python there first, or name it: TARGET_PYTHON=3\.13"
    ):
        image.find_target(tmp_path, "", "")


def test_a_python_that_is_too_old_is_refused(image: ModuleType, tmp_path: Path) -> None:
    """Before anything is downloaded for it."""
    program(tmp_path / "usr/bin/python3.9", 62)
    (tmp_path / "usr/bin/python3").symlink_to("python3.9")
    with pytest.raises(SystemExit, match=r"Python 3\.9: rkcached needs 3\.11 or newer"):
        image.find_target(tmp_path, "", "")


def test_an_architecture_without_wheels_is_refused(image: ModuleType, tmp_path: Path) -> None:
    """Such as a 32-bit image for an ARM board."""
    program(tmp_path / "usr/bin/python3.11", 40)
    (tmp_path / "usr/bin/python3").symlink_to("python3.11")
    with pytest.raises(SystemExit, match="no program for x86_64 or aarch64"):
        image.find_target(tmp_path, "", "")


def test_a_link_to_itself_ends(image: ModuleType, tmp_path: Path) -> None:
    """It is refused with its name, not followed for ever."""
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/python3").symlink_to("python3")
    with pytest.raises(SystemExit, match="is a link to itself"):
        image.find_target(tmp_path, "", "")
