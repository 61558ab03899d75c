"""What is installed is what was tested: exact versions, in files of the SHA-256 that is pinned."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.wheel_files import write_wheel

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "packaging" / "locks"
PLATFORMS = list(product(["3.11", "3.12", "3.13"], ["x86_64", "aarch64"]))


@pytest.fixture(scope="module")
def tools() -> Iterator[SimpleNamespace]:
    """The modules that collect wheels; they import each other by their bare names."""
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        import pins
        import wheels

        yield SimpleNamespace(pins=pins, wheels=wheels)
    finally:
        sys.path.remove(str(ROOT / "packaging"))


def asked() -> dict[str, list[str]]:
    """What pyproject.toml asks for, by the name of the file that pins it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return {"base": project["dependencies"], "cpu": extras["cpu"], "rkllm": extras["rkllm"]}


# What is pinned


@pytest.mark.parametrize(("python", "machine"), PLATFORMS)
@pytest.mark.parametrize("name", ["base", "cpu", "rkllm"])
def test_all_that_the_project_asks_for_is_pinned(
    tools: SimpleNamespace, name: str, python: str, machine: str
) -> None:
    """On each Python and architecture, one version that pyproject.toml allows.

    Where it is not, call `make lock`.
    """
    environment = tools.wheels.Target(machine=machine, python=python).environment("")
    pins = tools.pins.read_pins(name)
    for line in asked()[name]:
        requirement = Requirement(line)
        versions = [
            pin.version
            for pin in tools.pins.select(pins, [requirement.name])
            if pin.holds(environment)
        ]
        assert len(versions) == 1, line
        assert versions[0] in requirement.specifier, line


def test_what_the_pinned_packages_ask_for_is_pinned(tools: SimpleNamespace) -> None:
    """And these versions are the ones that the tests run with, as `make test` installs them."""
    pins = tools.pins.read_pins("base", "cpu", "rkllm")
    environment = tools.wheels.Target(
        machine=os.uname().machine, python=f"3.{sys.version_info.minor}"
    ).environment("")
    versions = {pin.name: pin.version for pin in pins if pin.holds(environment)}
    assert versions == {name: importlib.metadata.version(name) for name in versions}
    for name in versions:
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate(environment):
                pinned = versions[canonicalize_name(requirement.name)]
                assert pinned in requirement.specifier, f"{name}: {line}"


def test_every_pin_has_hashes_and_no_address(tools: SimpleNamespace) -> None:
    """Where files come from is for the settings of pip to say."""
    for file in LOCKS.glob("*.txt"):
        pins = tools.pins.read_pins(file.stem)
        assert pins
        assert [pin.name for pin in pins if not pin.hashes] == []
        stated = re.sub(r"(?m)#.*$|;.*$|--hash=sha256:\S{64}", "", file.read_text())
        assert "/" not in stated
        assert "--" not in stated


def test_the_files_agree(tools: SimpleNamespace) -> None:
    """An installation takes several of them at once."""
    pins = tools.pins.read_pins(*(file.stem for file in LOCKS.glob("*.txt")))
    names = [pin.name for pin in pins]
    assert len(names) == len(set(names))


# What is refused


@pytest.fixture
def collecting(
    tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """A package in a folder of wheels, its pin, and what collects it for a Python elsewhere."""
    index = tmp_path / "index"
    good = write_wheel(index, "greeting", "1.0", {"greeting.py": "hello"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    (tmp_path / "locks").mkdir()
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    (tmp_path / "locks/base.txt").write_text(
        f"# A comment\ngreeting==1.0 ; sys_platform == 'linux' \\\n    --hash=sha256:{digest}\n"
    )
    target = tools.wheels.Target(machine="aarch64", python="3.13")
    pins = tools.pins.read_pins("base", folder=tmp_path / "locks")

    def collect(wanted: str = "greeting>=1") -> list[Path]:
        taken = tools.wheels.collect([Requirement(wanted)], [], target, tmp_path / "kept", pins)
        return [wheel.file for wheel in taken]

    return SimpleNamespace(index=index, collect=collect)


def test_a_wheel_as_it_is_pinned_is_taken(collecting: SimpleNamespace) -> None:
    """And kept: the second time nothing is downloaded."""
    (kept,) = collecting.collect()
    assert kept.name == "greeting-1.0-py3-none-any.whl"
    for file in collecting.index.iterdir():
        file.unlink()
    assert collecting.collect() == [kept]


def test_a_downloaded_wheel_with_other_bytes_is_refused(collecting: SimpleNamespace) -> None:
    """Nothing of it is kept for the next time."""
    write_wheel(collecting.index, "greeting", "1.0", {"greeting.py": "hullo"})
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"a package differs from what packaging/locks pins"):
            collecting.collect()


def test_a_kept_wheel_with_other_bytes_is_refused(collecting: SimpleNamespace) -> None:
    """Wheels stay in build/ for weeks."""
    (kept,) = collecting.collect()
    write_wheel(kept.parent, "greeting", "1.0", {"greeting.py": "hullo"})
    with pytest.raises(SystemExit, match=f"{kept} differs from what packaging/locks pins"):
        collecting.collect()


def test_what_is_not_pinned_is_not_taken(collecting: SimpleNamespace) -> None:
    """Also when the index has it."""
    write_wheel(collecting.index, "greeting", "2.0", {"greeting.py": "hello"})
    with pytest.raises(SystemExit, match=r"nothing is pinned that meets greeting>=2: make lock"):
        collecting.collect("greeting>=2")


@pytest.mark.long
def test_an_installation_refuses_other_bytes(tools: SimpleNamespace, tmp_path: Path) -> None:
    """Before it changes anything. Here the first packages that it takes are others than pinned."""
    index, root = tmp_path / "index", tmp_path / "root"
    for pin in tools.pins.read_pins("build"):
        write_wheel(index, pin.name, pin.version, {})
    named = {"TARGET_PYTHON": "3.13", "TARGET_MACHINE": "aarch64", "TARGET_SYSTEMD": "257"}
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", str(ROOT / "scripts/install.sh")],
        env={**os.environ, **named, **offline, "DESTDIR": str(root), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert [file for file in root.rglob("*") if not file.is_dir()] == []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index", "root"]


def test_an_engine_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """With the names of those that are."""
    done = subprocess.run(
        ["sh", str(ROOT / "scripts/install.sh")],
        env={**os.environ, "DESTDIR": str(tmp_path), "EXTRAS": "cpu,gpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == os.EX_USAGE
    assert "there is no engine gpu; name cpu, rkllm, or both" in done.stderr
