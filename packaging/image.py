"""Makes the daemon's Python environment in an image; `make install DESTDIR=...` calls it.

Nothing of this machine may show in the image. Its Python and its architecture are read from its
files, or named, and the wheels are those for them. No program of the image has to run here, so one
for another architecture is made as well.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from pathlib import Path

from packaging.requirements import Requirement
from pins import read_pins
from wheels import Target, build_own, collect, unpack

ROOT = Path(__file__).parents[1]
OLDEST = (3, 11)
MACHINES = {62: "x86_64", 183: "aarch64"}
"""By the number in an ELF header."""

MAX_LINKS = 40


def find_target(root: Path, python: str, machine: str) -> Target:
    """The Python and machine of the image.

    `python` and `machine` are what its maker named, or empty.

    Raises SystemExit with the next step where neither the image nor its maker says so.
    """
    if not python or not machine:
        program = _inside(root, Path("/usr/bin/python3"))
        match = re.fullmatch(r"python(3\.\d+)", program.name)
        if match is None or not program.is_file():
            raise SystemExit(
                f"{root} has no /usr/bin/python3 that says which Python the image has: install "
                "Python there first, "
                "or name it: TARGET_PYTHON=3.13 TARGET_MACHINE=aarch64"
            )
        python = python or match[1]
        machine = machine or _machine_of(program)

    if tuple(map(int, python.split("."))) < OLDEST:
        raise SystemExit(f"the image has Python {python}: rkcached needs 3.11 or newer")
    return Target(machine=machine, python=python)


def _inside(root: Path, path: Path) -> Path:
    """The place of a path of the image, with its links followed as they are when it runs."""
    for _ in range(MAX_LINKS):
        place = root / path.relative_to("/")
        if not place.is_symlink():
            return place
        path = Path(
            os.path.normpath(path.parent / place.readlink())
        )  # so that ".." ends at the image's root
    raise SystemExit(f"{root / path.relative_to('/')} is a link to itself")


def _machine_of(program: Path) -> str:
    with program.open("rb") as stream:
        head = stream.read(20)
    machine = (
        MACHINES.get(int.from_bytes(head[18:20], "little")) if head.startswith(b"\x7fELF") else None
    )
    if machine is None:
        raise SystemExit(
            f"{program} is no program for x86_64 or aarch64: there are wheels for these only"
        )
    return machine


def make_environment(folder: Path, root: Path, target: Target, extras: str, work: Path) -> None:
    """A virtual environment in `folder`, as `python -m venv` and pip of the image would make it."""
    pins = read_pins("base", *filter(None, extras.split(",")))
    own = build_own(ROOT, work / "own", pins)
    wanted = Requirement(f"rkcached[{extras}]" if extras else "rkcached")
    wheels = collect([wanted], own, target, work / "wheels", pins)

    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(f"/usr/bin/python{target.python}")
    (folder / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {target.python}\n",
        encoding="utf-8",
    )
    packages = folder / "lib" / f"python{target.python}" / "site-packages"
    unpack(wheels, target, packages)
    _compile(packages, root, target)


def _compile(packages: Path, root: Path, target: Target) -> None:
    """The service cannot write there, so what is not compiled now is compiled at each start again.

    Bytecode is that of one version of Python: the image's own makes it where it can run here, else
    one of the same version. It is valid whatever time the files get in the image.
    """
    options = ["-I", "-m", "compileall", "-qq", "--invalidation-mode", "unchecked-hash"]
    inside = Path("/") / packages.absolute().relative_to(root)
    for python, rest in (
        (["chroot", str(root), f"/usr/bin/python{target.python}"], [str(inside)]),
        ([f"python{target.python}"], ["-s", str(root), "-p", "/", str(packages)]),
    ):
        if _runs([*python, "-I", "-c", ""]):
            # Some of what libraries bring is not for this Python; that is no trouble.
            subprocess.run([*python, *options, *rest], stdin=subprocess.DEVNULL, check=False)
            return
    print(
        f"not compiled, as no Python {target.python} can run here: each start takes a little longer"
    )


def _runs(command: list[str]) -> bool:
    try:
        return (
            subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, check=False
            ).returncode
            == 0
        )
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the environment, below the root")
    parser.add_argument("--root", type=Path, required=True, help="the image")
    parser.add_argument("--python", default="", help="default: the image's")
    parser.add_argument(
        "--machine", default="", choices=["", *MACHINES.values()], help="default: the image's"
    )
    parser.add_argument("--extras", default="")
    parser.add_argument("--work", type=Path, required=True, help="wheels are kept here")
    arguments = parser.parse_args()
    target = find_target(arguments.root.absolute(), arguments.python, arguments.machine)
    make_environment(
        arguments.folder, arguments.root.absolute(), target, arguments.extras, arguments.work
    )


if __name__ == "__main__":
    main()
