"""The environment that the Debian package makes on the target, in roots of several kinds."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Machine

from tests.packaging.wheel_files import write_wheel
from tests.systemd.conftest import lack_of_machine

MAKE_VENV = Path(__file__).parents[2] / "packaging/deb/make-venv"
HOME = "usr/lib/rkcached"
PROGRAM = {
    "rkcached/__init__.py": "",
    "rkcached/__main__.py": "print('rkcached 1.0')",
    "rkcached/daemon.py": "",
}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """This machine's root, with `make-venv` and the wheels of a small program, and few devices."""
    if lack := lack_of_machine():
        pytest.skip(lack)
    machine = Machine(tmp_path, {})
    try:
        machine.mount()
        shutil.rmtree(machine.root / "dev", ignore_errors=True)
        (machine.root / "dev").mkdir()
        for name, minor in {"null": 3, "zero": 5, "urandom": 9}.items():
            os.mknod(machine.root / "dev" / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            (machine.root / "dev" / name).chmod(0o666)
        wheels = machine.root / HOME / "wheels"
        write_wheel(wheels, "rkcached", "1.0", PROGRAM, "Provides-Extra: rkllm\n")
        (pip,) = Path("/usr/share/python-wheels").glob("pip-*.whl")
        shutil.copy(pip, wheels)
        (machine.root / HOME / "make-venv").write_text(MAKE_VENV.read_text())
        (machine.root / HOME / "make-venv").chmod(0o755)
        yield machine.root
    finally:
        machine.close()


@pytest.mark.parametrize("options", [None, "ro", "nr_inodes=1", "rw"])
def test_all_is_compiled_whatever_dev_shm_is(root: Path, options: str | None) -> None:
    """Missing, read-only, full, or as it should be. Nothing is said about it."""
    shm = root / "dev/shm"
    if options is not None:
        shm.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(shm)], check=True)
    try:
        done = subprocess.run(
            ["chroot", str(root), f"/{HOME}/make-venv"],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        if options is not None:
            subprocess.run(["umount", str(shm)], check=True)
    assert (done.returncode, done.stderr) == (0, "")
    environment = root / HOME / done.stdout.strip()
    (packages,) = environment.glob("lib/python3.*/site-packages")
    for path in PROGRAM:
        file = packages / path
        assert list(file.parent.glob(f"__pycache__/{file.stem}.*.pyc")), path
