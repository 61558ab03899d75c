"""Where things are when nobody says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rkcached.host import places


@pytest.fixture(autouse=True)
def nobody_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE_DIRECTORY", "STATE_DIRECTORY"):
        monkeypatch.delenv(name, raising=False)


def test_the_systems_manifest_has_the_systems_store_by_whatever_path() -> None:
    """`cd /etc/rkcached && rkcached plan` looks at the store of the service."""
    paths = (places.SYSTEM_MANIFEST, Path(os.path.relpath(places.SYSTEM_MANIFEST)))
    assert [places.cache_dir(path) for path in paths] == [places.SYSTEM_CACHE] * 2


def test_another_manifest_has_a_store_beside_the_caller() -> None:
    """It never reaches the system's: its daemon would remove what it does not declare."""
    assert places.cache_dir(Path("manifest.yaml")) == Path("cache")
