"""Pins the packages that are installed with rkcached, each with the SHA-256 of all its files.

    make lock             keeps the versions that are pinned, as far as pyproject.toml allows them
    make lock UPGRADE=1   takes the newest ones

`locks/base.txt` is for the daemon, `cpu.txt` and `rkllm.txt` are for the extras of these
names, and `build.txt` for what makes and installs packages. They hold for every Python and
architecture. uv resolves all of them together first, so that the files agree.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "packaging" / "locks"
OPTIONS = (
    "--quiet",
    "--universal",
    "--python-version=3.11",
    "--fork-strategy=fewest",
    "--no-annotate",
    "--custom-compile-command=make lock",
)


def requirements() -> dict[str, list[str]]:
    """What is asked for, by the name of the file that pins it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    build = re.sub(r" *#.*", "", (LOCKS / "build.in").read_text(encoding="utf-8"))
    return {
        "base": project["dependencies"],
        "cpu": extras["cpu"],
        "rkllm": extras["rkllm"],
        "build": build.split(),
    }


def pin(wanted: list[str], file: Path, *options: str) -> None:
    """Have uv write the file; it prefers the versions that are in it."""
    command = [sys.executable, "-m", "uv", "pip", "compile", *OPTIONS, *options]
    done = subprocess.run(
        [*command, "--output-file", str(file), "-"],
        input="\n".join(wanted),
        stdout=subprocess.DEVNULL,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        raise SystemExit(f"uv could not pin {file.stem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    arguments = parser.parse_args()

    asked = requirements()
    files = {name: LOCKS / f"{name}.txt" for name in asked}
    with tempfile.TemporaryDirectory() as folder:
        together = Path(folder) / "together.txt"
        if not arguments.upgrade:
            pinned = [file.read_text(encoding="utf-8") for file in files.values() if file.exists()]
            together.write_text("".join(pinned), encoding="utf-8")
        pin(list(itertools.chain.from_iterable(asked.values())), together)

        made = {name: Path(folder) / f"{name}.txt" for name in asked}
        for name, wanted in asked.items():
            pin(wanted, made[name], "--generate-hashes", f"--constraint={together}")
        for name, file in made.items():
            shutil.copyfile(file, files[name])


if __name__ == "__main__":
    main()
