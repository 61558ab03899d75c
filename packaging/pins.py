"""Reads which packages are pinned: exact versions, and the SHA-256 of each of their files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = Path(__file__).parent / "locks"


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One version of one package."""

    name: str
    version: str
    marker: Marker | None
    hashes: frozenset[str]
    """The SHA-256 of every file that was published of this version."""

    @property
    def line(self) -> str:
        """For a file of requirements, without the marker: pip would read it as for its Python."""
        hashes = "".join(f" --hash=sha256:{digest}" for digest in sorted(self.hashes))
        return f"{self.name}=={self.version}{hashes}\n"

    def holds(self, environment: dict[str, str]) -> bool:
        return self.marker is None or self.marker.evaluate(environment)


def read_pins(*names: str, folder: Path = LOCKS) -> list[Pin]:
    """The pins of these files, each once; the files agree, as they are made together."""
    pins = {}
    for name in names:
        text = (folder / f"{name}.txt").read_text(encoding="utf-8")
        for pin in _parse(text):
            pins[pin.name, pin.version] = pin
    return list(pins.values())


def select(pins: Iterable[Pin], names: Iterable[str]) -> list[Pin]:
    wanted = {canonicalize_name(name) for name in names}
    return [pin for pin in pins if pin.name in wanted]


def _parse(text: str) -> Iterator[Pin]:
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        if not line or line.startswith("#"):
            continue
        stated = Requirement(line.partition(" --hash=")[0].strip())
        (specifier,) = stated.specifier
        yield Pin(
            name=canonicalize_name(stated.name),
            version=specifier.version,
            marker=stated.marker,
            hashes=frozenset(re.findall(r" --hash=sha256:([0-9a-f]{64})", line)),
        )
