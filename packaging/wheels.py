"""Collects the wheels of a package: rkcached and what it requires, for several Pythons.

They are those that `locks/*.txt` pin: other bytes are refused. pip downloads for another
Python and machine, but reads the conditions of requirements (`; python_version < "3.13"`) as if for
its own. So they are read here as the target would read them, and so is what came.
"""

from __future__ import annotations

import contextlib
import email
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version
from pins import Pin, select

GLIBC_MINORS = range(36, 16, -1)
"""Debian 12 has glibc 2.36, and wheels for 2.17 or newer run on it."""

WITHOUT_WHEELS = frozenset({"sdnotify"})
"""Published as source only. Nothing in them is compiled, so one wheel made here serves every
target."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The Python and machine that a wheel must run on."""

    machine: str
    python: str

    @property
    def platforms(self) -> list[str]:
        names = [f"manylinux_2_{minor}_{self.machine}" for minor in GLIBC_MINORS]
        return [*names, f"manylinux2014_{self.machine}"]

    @cached_property
    def tags(self) -> frozenset[Tag]:
        major, minor = map(int, self.python.split("."))
        interpreter = f"cp{major}{minor}"
        return frozenset(
            [
                *cpython_tags((major, minor), platforms=self.platforms),
                *compatible_tags((major, minor), interpreter, self.platforms),
            ]
        )

    def environment(self, extra: str) -> dict[str, str]:
        return {
            **{key: str(value) for key, value in default_environment().items()},
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_version": f"{self.python}.0",
            "platform_machine": self.machine,
            "sys_platform": "linux",
            "extra": extra,
        }


@dataclass(frozen=True, kw_only=True)
class Wheel:
    file: Path
    name: str
    version: Version
    tags: frozenset[Tag]

    @classmethod
    def read(cls, file: Path) -> Wheel:
        name, version, _, tags = parse_wheel_filename(file.name)
        return cls(file=file, name=name, version=version, tags=tags)

    @cached_property
    def metadata(self) -> email.message.Message:
        with zipfile.ZipFile(self.file) as archive:
            member = next(
                name for name in archive.namelist() if name.endswith(".dist-info/METADATA")
            )
            return email.message_from_bytes(archive.read(member))

    @property
    def licence(self) -> str:
        """As its metadata states it, in one line."""
        stated = self.metadata["License-Expression"] or ""
        classified = [
            line.rpartition(" :: ")[2]
            for line in self.metadata.get_all("Classifier", [])
            if line.startswith("License :: ") and not line.endswith(":: OSI Approved")
        ]
        return (
            stated
            or ", ".join(classified)
            or (self.metadata["License"] or "see the wheel").splitlines()[0]
        )

    def requires(self, extras: frozenset[str], target: Target) -> Iterator[Requirement]:
        for line in self.metadata.get_all("Requires-Dist", []):
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(
                marker.evaluate(target.environment(extra)) for extra in (*extras, "")
            ):
                yield requirement


def needed(
    roots: list[Requirement], wheels: list[Wheel], target: Target
) -> tuple[set[Wheel], set[str]]:
    """The wheels that `roots` need on the target, and the requirements that none of them meets."""
    taken: set[Wheel] = set()
    missing: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = list(roots)
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        fitting = [
            wheel
            for wheel in wheels
            if wheel.name == name
            and wheel.tags & target.tags
            and wheel.version in requirement.specifier
        ]
        if not fitting:
            wanted = f"[{','.join(sorted(extras))}]" if extras else ""
            missing.add(f"{requirement.name}{wanted}{requirement.specifier}")
            continue
        best = max(fitting, key=lambda wheel: wheel.version)
        taken.add(best)
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += best.requires(extras, target)
    return taken, missing


def collect(
    roots: list[Requirement], own: list[Wheel], target: Target, cache: Path, pins: list[Pin]
) -> set[Wheel]:
    """The wheels of everything that `roots` need on the target, in the versions of `pins`.

    What is not among our `own` is kept in `cache`.

    Raises SystemExit where a wheel differs from the one that is pinned, or none is.
    """
    made_here = {wheel.name for wheel in own}
    environment = target.environment("")
    fitting = [pin for pin in pins if pin.name not in made_here and pin.holds(environment)]

    folder = cache / f"{target.machine}-{target.python}"
    stamp = folder / "requirements.txt"
    content = "".join(sorted(pin.line for pin in fitting))
    if not stamp.exists() or stamp.read_text() != content:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _download(content, target, folder)
        stamp.write_text(content)

    wheels = [Wheel.read(file) for file in sorted(folder.glob("*.whl"))]
    for wheel in wheels:
        _check(wheel, fitting)
    taken, missing = needed(roots, [*own, *wheels], target)
    if missing:
        raise SystemExit(
            f"for Python {target.python} on {target.machine} nothing is pinned that meets "
            f"{', '.join(sorted(missing))}: make lock"
        )
    return taken


def collect_all(
    roots: list[Requirement], own: list[Wheel], targets: list[Target], cache: Path, pins: list[Pin]
) -> dict[Target, set[Wheel]]:
    """The wheels for each target."""
    with ThreadPoolExecutor(3) as pool:
        collected = pool.map(lambda target: collect(roots, own, target, cache, pins), targets)
        return dict(zip(targets, collected, strict=True))


def _check(wheel: Wheel, pins: list[Pin]) -> None:
    """Compare a wheel that may have been kept for long with what is pinned."""
    named = [pin for pin in select(pins, [wheel.name]) if pin.version == str(wheel.version)]
    found = sha256(wheel.file)
    if not any(found in pin.hashes for pin in named):
        raise SystemExit(
            f"{wheel.file} differs from what packaging/locks pins: its SHA-256 is {found}, "
            "which is of no published file of that version. Remove it, and find out who changed it."
        )


def build_own(source: Path, folder: Path, pins: list[Pin]) -> list[Wheel]:
    """The project's wheel, made from `source`, and those that nobody publishes.

    They are built by what is installed beside this Python, from locks/build.txt.
    """
    for old in folder.glob("*.whl"):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    _pip("wheel", *options, str(source))
    with _requirements("".join(pin.line for pin in select(pins, WITHOUT_WHEELS))) as file:
        _pip("wheel", *options, "--require-hashes", "--requirement", file)

    made = [Wheel.read(file) for file in folder.glob("*.whl")]
    for wheel in made:
        assert any(tag.abi == "none" and tag.platform == "any" for tag in wheel.tags), (
            f"{wheel.file} is not pure"
        )
    return made


def unpack(wheels: set[Wheel], target: Target, folder: Path) -> None:
    """Put the packages of these wheels into a folder of the target, without their commands."""
    files = sorted(str(wheel.file) for wheel in wheels)
    # They were chosen for the target; pip would compare what Python they require with its own.
    options = [
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--only-binary=:all:",
        "--ignore-requires-python",
    ]
    _pip("install", *options, *_for(target), "--target", str(folder), *files)
    shutil.rmtree(folder / "bin", ignore_errors=True)
    for origin in folder.glob("*.dist-info/direct_url.json"):  # where the wheel was on this machine
        origin.unlink()


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(requirements: str, target: Target, folder: Path) -> None:
    options = ["--only-binary=:all:", "--no-deps", "--require-hashes", "--dest", str(folder)]
    with _requirements(requirements) as file:
        _pip("download", *options, *_for(target), "--requirement", file)


@contextlib.contextmanager
def _requirements(content: str) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        yield file.name


def _for(target: Target) -> list[str]:
    """Options that make pip choose wheels for another target."""
    interpreter = f"cp{target.python.replace('.', '')}"
    tags = ["--implementation", "cp", *(f"--abi={abi}" for abi in (interpreter, "abi3", "none"))]
    platforms = [f"--platform={platform}" for platform in target.platforms]
    return ["--python-version", target.python, *tags, *platforms]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"{' '.join(command)}\n{done.stderr}"
        if "DO NOT MATCH THE HASHES" in done.stderr:
            reason = f"a package differs from what packaging/locks pins.\n{reason}"
        raise SystemExit(reason)
