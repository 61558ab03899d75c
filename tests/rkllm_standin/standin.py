"""Builds the stand-in for librkllmrt.so and writes its model files: for tests, never installed.

What a model file may say is in model.h (KEYS); what the library then does is in standin.c.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
ABIS = {"B": "1.1.4", "C": "1.2.0", "C1": "1.2.1b1", "D": "1.2.3", "E": "1.3.0"}
"""The ABI groups and the version that the stand-in for each says it is."""

_NUMBERS = {"B": "110", "C": "120", "C1": "1211", "D": "121", "E": "130"}
_FLAGS = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread")


def build(
    group: str,
    directory: Path,
    *,
    version: str | None = None,
    defines: Mapping[str, str] | None = None,
) -> Path:
    """Return the librkllmrt.so of this group, compiled below `directory` if it is not there.

    `version` replaces the version string in the library, and group B, which has none, gets one;
    `defines={"NO_VERSION": "1"}` leaves it out.
    """
    given = {
        "ABI": _NUMBERS[group],
        **({"VERSION_STRING": f'"{version}"'} if version else {}),
        **(defines or {}),
    }
    arguments = [
        *_FLAGS,
        "-fPIC",
        "-shared",
        *(f"-D{name}={value}" for name, value in given.items()),
    ]
    return _compile(HERE / "standin.c", arguments, [], directory, "librkllmrt.so")


def build_driver(group: str, directory: Path) -> Path:
    """Return driver.c as a program that is linked to the stand-in of this group."""
    library = build(group, directory)
    arguments = [*_FLAGS, f"-DABI={_NUMBERS[group]}"]
    return _compile(HERE / "driver.c", arguments, [str(library)], directory, "driver")


def write_model(path: Path, *, toolkit: str = "1.1.4", **keys: object) -> Path:
    """Write a model file; by default one that every group's runtime accepts."""
    lines = ["RKLLM-STANDIN-MODEL 1", *(f"{key} = {value}" for key, value in keys.items())]
    path.write_text("\n".join([*lines, f"rkllm-toolkit version: {toolkit}"]) + "\n")
    return path


def _compile(
    source: Path, arguments: list[str], libraries: list[str], directory: Path, name: str
) -> Path:
    """Run cc once for each content: the target's folder is named after it.

    Without a compiler, the test is skipped.
    """
    if shutil.which("cc") is None:
        raise unittest.SkipTest(
            "the stand-in of the RKLLM runtime needs a C compiler (apt install gcc libc6-dev)"
        )
    content = hashlib.sha256(repr((arguments, libraries)).encode())
    for file in (source, *sorted(HERE.glob("*.h"))):
        content.update(file.read_bytes())
    target = directory / content.hexdigest()[:16] / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=target.parent)
        os.close(handle)
        command = ["cc", *arguments, "-o", unfinished, str(source), *libraries]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiled.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{compiled.stderr}")
        Path(unfinished).replace(target)  # two tests may build the same at once
    return target
