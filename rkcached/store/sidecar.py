"""The commit record of an artifact: its form on disk, and artifacts that were compared with it.

A sidecar is believed only if it belongs to its place, names a file beside it, and its components
give its fingerprint. Pure.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from rkcached.host.digests import Signature
from rkcached.host.integers import Int64
from rkcached.plan.fingerprint import fingerprint, owner_in
from rkcached.plan.records import Artifact, Retired, Verdict
from rkcached.sources.records import Key
from rkcached.store.seal import Signed

FORMAT_VERSION = 1


_SUFFIX = re.compile(r"[a-z0-9]+_cache")


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The measurements of a build. Times in milliseconds."""

    prefill_ms: float
    """Reading the prefix into an empty KV state."""
    load_ms: float
    """Loading the prompt cache from its file."""
    cold_ttft_ms: float
    """First token of the probe without the cache: prefilling the prefix, then the probe on it in
    memory."""
    warm_ttft_ms: float
    """First token of the probe with the cache: loading the file, then the probe."""
    verified: str
    """How the artifact was proven: exact, hit or off."""
    reused_tokens: Int64 = 0
    """The build took these from another prompt cache; the rest was read."""

    @property
    def gain(self) -> bool:
        """Whether the cache was measured to help; one that was not measured counts as helping."""
        return self.verified == "off" or self.warm_ttft_ms < self.cold_ttft_ms


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt cache came in a bundle instead of being built here."""

    at: float
    """Unix seconds."""
    signed_by: str = ""
    """The trusted key that signed the bundle, by its name. Empty: none, and the prompt cache was
    compared with a prefill."""


class Sidecar(Signed, frozen=True, kw_only=True):
    """The commit record of an artifact, as it stands on disk."""

    format: Int64 = FORMAT_VERSION
    model: str
    prompt: str
    artifact: str
    """File name of the prompt cache, beside this file."""
    fingerprint: str
    components: Mapping[str, str]
    size_bytes: Int64
    sha256: str
    text_sha256: str
    tokens: Int64
    built_at: float
    """Unix seconds."""
    build_ms: float
    figures: Figures
    answer_sha256: str = ""
    """Of the answer that proved it, by which a build that goes on from it sees that it is as it
    was. Empty: it was not proven so."""
    imported: Imported | msgspec.UnsetType = msgspec.UNSET
    """Unset in all that was built here, so that the codes of older sidecars stay valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArtifact:
    """An artifact whose files were just compared with its sidecar."""

    folder: Path
    sidecar: Sidecar
    signature: Signature | None
    """Of the prompt cache file with the sidecar's digest: the file that may be loaded. None when
    corrupt."""
    corrupt: str = ""
    unsigned: bool = False
    """That it is corrupt only means that nobody knows who made it."""
    text: bytes = b""
    """The prefix that the prompt cache was made from (UTF-8), where that is not corrupt."""

    @property
    def path(self) -> Path:
        """Of the prompt cache."""
        return self.folder / self.sidecar.artifact

    @property
    def fingerprint(self) -> str:
        return self.sidecar.fingerprint

    @property
    def components(self) -> Mapping[str, str]:
        return self.sidecar.components

    @property
    def owner(self) -> int:
        """The uid of the only user whom it serves, or NOBODY."""
        return owner_in(self.sidecar.components)

    @property
    def tokens(self) -> int:
        return self.sidecar.tokens

    @property
    def size_bytes(self) -> int:
        """Of the prompt cache."""
        return self.sidecar.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreadable:
    """An artifact without a usable sidecar: why, and what its prompt cache takes all the same."""

    corrupt: str
    size_bytes: int
    ours: bool
    """Whether its sidecar, though damaged, begins as one that the store wrote for this place."""
    fingerprint: str = ""
    components: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    unsigned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """One look at the store.

    `unreadable` are commit records that cannot be read: their artifacts are corrupt.
    """

    artifacts: dict[Key, StoredArtifact] = field(default_factory=dict)
    unreadable: dict[Key, Unreadable] = field(default_factory=dict)
    verdicts: dict[Key, Verdict] = field(default_factory=dict)
    staged: list[Path] = field(default_factory=list)
    """Files of builds that run, or that left them."""
    quarantined: dict[Path, int] = field(default_factory=dict)
    """Folders that are kept in the quarantine, with their bytes; the oldest first."""
    foreign: dict[Path, int] = field(default_factory=dict)
    """Files where the store puts its own, with their bytes, that are none of its."""
    retired: dict[str, Retired] = field(default_factory=dict)
    """By fingerprint: artifacts that were put aside, because no prompt uses them now."""
    incomplete: list[Path] = field(default_factory=list)
    """Folders among the retired ones that hold no whole artifact: a crash cut their making off."""

    def observed(self) -> dict[Key, Artifact]:
        """All of them, as the planner sees them."""
        return {**self.artifacts, **self.unreadable}


def parse_sidecar(data: bytes, key: Key | None) -> Sidecar | str:
    """The sidecar of `key`, or why it is none. A retired one belongs to no place: `key` is None."""
    try:
        sidecar = msgspec.json.decode(data, type=Sidecar)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or not a sidecar
        return f"the sidecar is damaged: {error}"

    if sidecar.format != FORMAT_VERSION:
        return f"the sidecar has format {sidecar.format}, this program writes {FORMAT_VERSION}"
    named = Key(sidecar.model, sidecar.prompt)
    key = key or named
    if key != named or not names_artifact(sidecar.artifact, named.prompt):
        return f"the sidecar belongs to {named}"
    made = fingerprint(sidecar.components)
    if made.digest != sidecar.fingerprint:
        return "the sidecar is damaged: its components do not have its fingerprint"
    return msgspec.structs.replace(  # what thousands have in common is kept once
        sidecar,
        model=key.model,
        prompt=key.prompt,
        fingerprint=made.digest,
        components=made.components,
        sha256=sys.intern(sidecar.sha256),
        text_sha256=sys.intern(sidecar.text_sha256),
    )


def names_artifact(name: str, prompt: str) -> bool:
    """Whether `name` is a prompt cache of `prompt`: a sidecar must not point elsewhere."""
    stem, _, suffix = name.rpartition(".")
    return stem == prompt and _SUFFIX.fullmatch(suffix) is not None
