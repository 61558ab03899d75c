"""The Debian packages.

What is in them, and their life on a machine with a real systemd and without a network.

Building downloads the wheels for each Python and architecture, 200 MB, and keeps them in build/.
Where something is missing these tests are skipped and say what they need, unless RKCACHED_NO_SKIPS
is set.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from machine import Machine

from rkcached import __version__
from rkcached.cli.launcher import small_model
from tests.systemd.conftest import lack_of_machine
from tests.waiting import wait_until

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
NEXT_VERSION = f"{__version__}.1"
SOURCES = (
    "rkcached",
    "etc",
    "systemd",
    "man",
    "completions",
    "packaging",
    "docs",
    "pyproject.toml",
    "Makefile",
)
SOURCES += ("README.md", "CHANGELOG.md", "LICENSE")
MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
TEXTS = {name: f"You are prompt {name}.\n" * 20 for name in ("a", "b")}
ENVIRONMENT = "/usr/lib/rkcached/venv"
MODEL = "/srv/models/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Where a user has put the small model."""


def need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        missing(f"needs {program}: apt-get install {package}")


def missing(what: str) -> None:
    pytest.skip(what)


def build(source: Path, out: Path, *architectures: str) -> dict[str, Path]:
    """Build packages from `source`; by name and architecture."""
    arguments = [f"--work={ROOT / 'build'}", f"--out={out}"]
    arguments += [f"--arch={name}" for name in architectures]
    done = subprocess.run(
        [
            "make",
            "-C",
            str(source),
            "deb",
            f"PYTHON={sys.executable}",
            f"TOOLS={ROOT / 'build/tools'}",
            f"DEB_ARGS={' '.join(arguments)}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        f"{name}:{rest.rpartition('_')[2]}": file
        for file in out.glob("*.deb")
        for name, _, rest in [split(file)]
    }


def split(file: Path) -> tuple[str, str, str]:
    return file.stem.partition("_")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("debs")


@pytest.fixture(scope="module")
def packages(folder: Path) -> dict[str, Path]:
    need("dpkg-deb", "dpkg")
    return build(ROOT, folder / "now", "amd64", "arm64")


@pytest.fixture(scope="module")
def next_packages(folder: Path, packages: dict[str, Path]) -> dict[str, Path]:
    """The same program, a version later, for this machine."""
    source = folder / "source"
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    init = source / "rkcached/__init__.py"
    init.write_text(init.read_text().replace(__version__, NEXT_VERSION))
    assert packages
    return build(source, folder / "next", architecture())


def architecture() -> str:
    return subprocess.run(
        ["dpkg", "--print-architecture"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def wheels() -> Iterator[ModuleType]:
    """The module that collects wheels.

    The build script imports it by its bare name, so it is found the same way.
    """
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        import wheels

        yield wheels
    finally:
        sys.path.remove(str(ROOT / "packaging"))


def unpacked(package: Path, target: Path) -> Path:
    subprocess.run(["dpkg-deb", "-R", str(package), str(target)], check=True)
    return target


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("debian", MACHINES)
def test_each_python_finds_its_wheels(
    packages: dict[str, Path], wheels: ModuleType, tmp_path: Path, debian: str, python: str
) -> None:
    """On each Python and architecture the wheels in the packages are enough.

    They are enough for llama.cpp, too.
    """
    from packaging.requirements import Requirement

    main_roots = [Requirement("rkcached[rkllm]"), Requirement("pip")]
    cpu_roots = [Requirement("rkcached[rkllm,cpu]")]
    target = wheels.Target(machine=MACHINES[debian], python=python)
    main = unpacked(packages[f"rkcached:{debian}"], tmp_path / "main")
    cpu = unpacked(packages[f"rkcached-cpu:{debian}"], tmp_path / "cpu")
    carried = [wheels.Wheel.read(file) for file in (main / "usr/lib/rkcached/wheels").iterdir()]
    taken, lacking = wheels.needed(main_roots, carried, target)
    assert lacking == set()
    assert {"rkcached", "numpy", "tokenizers", "pydantic-core"} <= {wheel.name for wheel in taken}
    assert wheels.needed(cpu_roots, carried, target)[1] == {"xllamacpp>=2026.1", "llguidance>=1.6"}
    carried += [wheels.Wheel.read(file) for file in (cpu / "usr/lib/rkcached/wheels").iterdir()]
    assert wheels.needed(cpu_roots, carried, target)[1] == set()
    others = set(MACHINES.values()) - {MACHINES[debian]}
    assert not [
        wheel.file.name for wheel in carried if any(other in wheel.file.name for other in others)
    ]


def test_lintian(packages: dict[str, Path]) -> None:
    """Lintian finds neither errors nor warnings."""
    need("lintian", "lintian")
    with ThreadPoolExecutor(2) as pool:
        for report in pool.map(lint, packages.values()):
            assert report == ""


def lint(package: Path) -> str:
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{done.stdout}{done.stderr}" if done.returncode else ""


def test_every_file_has_its_place(packages: dict[str, Path]) -> None:
    """Units, rules, manual, completions and the only configuration file that dpkg itself keeps."""
    package = str(packages["rkcached:arm64"])
    lines = subprocess.run(
        ["dpkg-deb", "-c", package], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = {line.split()[5].removeprefix(".") for line in lines if not line.startswith("d")}
    assert {
        "/usr/bin/rkcached",
        "/usr/lib/systemd/system/rkcached.service",
        "/usr/lib/systemd/system/rkcached.socket",
        "/usr/lib/systemd/system/rkcached-admin.socket",
        "/usr/lib/sysusers.d/rkcached.conf",
        "/usr/lib/tmpfiles.d/rkcached.conf",
        "/usr/lib/udev/rules.d/60-rkcached.rules",
        "/usr/share/man/man1/rkcached.1.gz",
        "/usr/share/man/man5/rkcached-manifest.5.gz",
        "/usr/share/bash-completion/completions/rkcached",
        "/usr/share/zsh/vendor-completions/_rkcached",
        "/usr/share/fish/vendor_completions.d/rkcached.fish",
    } <= files
    assert {"/etc/default/rkcached"} == {file for file in files if file.startswith("/etc/")}
    assert {"root/root"} == {line.split()[1] for line in lines}


# On a machine


class Debian:
    """A booted machine to which the packages are installed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def dpkg(self, *arguments: str) -> str:
        """As an administrator without a terminal calls it: a question would be an error."""
        done = self.machine.run(
            "dpkg", *arguments, DEBIAN_FRONTEND="noninteractive", PYTHONPATH="/nonsense"
        )
        return done.stdout + done.stderr

    def install(self, packages: dict[str, Path], *names: str) -> str:
        files = [packages[f"{name}:{architecture()}"] for name in names]
        return self.dpkg("-i", *(f"/debs/{file.parent.name}/{file.name}" for file in files))

    def version(self) -> str:
        return self.machine.run("rkcached", "--version").stdout.split()[1]

    def exists(self, path: str) -> bool:
        return self.machine.run("test", "-e", path, code=None).returncode == 0

    def artifacts(self) -> dict[str, str]:
        """Each prompt cache with its time of change."""
        lines = self.machine.run(
            "find", "/var/cache/rkcached", "-name", "*_cache", "-printf", "%p %T@\n"
        ).stdout
        return dict(line.split() for line in lines.splitlines())

    def wait_fresh(self) -> None:
        wait_until(
            lambda: self.machine.states() == {"a": "fresh", "b": "fresh"},
            lambda: str(self.machine.status()),
        )


@pytest.fixture(scope="module")
def debian(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debian]:
    if lack := lack_of_machine():
        missing(lack)
    machine = Machine(tmp_path_factory.mktemp("machine"), {folder: "/debs", small_model(): MODEL})
    try:
        machine.mount()
        (machine.root / "debs").mkdir()
        (machine.root / MODEL[1:]).parent.mkdir(parents=True)
        (machine.root / MODEL[1:]).touch()
        (machine.root / "usr/sbin/policy-rc.d").unlink(
            missing_ok=True
        )  # CI images forbid packages to start services
        machine.boot()
        yield Debian(machine)
    finally:
        machine.close()


@pytest.fixture
def installed(debian: Debian, packages: dict[str, Path]) -> Debian:
    """Some version is installed and running, with two fresh prompt caches."""
    if not debian.exists(ENVIRONMENT):
        debian.install(packages, "rkcached")
    debian.machine.declare(TEXTS)
    debian.machine.ask("m/a")
    debian.wait_fresh()
    return debian


@pytest.mark.timeout(1800)  # the first test here has the packages built
def test_three_steps_lead_to_a_warm_answer(debian: Debian, packages: dict[str, Path]) -> None:
    """Install, init, ask: each step prints the next one, and the answer is a hit.

    The machine has no network, a model, and a prompt beside it.
    """
    machine = debian.machine
    if debian.exists(ENVIRONMENT):
        debian.dpkg("--purge", "rkcached-cpu", "rkcached")
    machine.write("/srv/models/prompts/keeper.md", "You are the keeper of a lighthouse.\n" * 20)

    def typed(command: str) -> str:
        done = machine.run("sh", "-c", command.removeprefix("sudo "))  # root types it
        return done.stdout + done.stderr

    installed = debian.install(packages, "rkcached", "rkcached-cpu").splitlines()
    (init,) = [line.strip() for line in installed if "rkcached init" in line]
    *start, ask = typed(init).partition("next:\n")[2].splitlines()
    for step in start:
        typed(step.strip())
    assert "[hit on keeper: first token after" in typed(ask.strip())
    debian.dpkg("--purge", "rkcached-cpu", "rkcached")
    machine.run("rm", "-r", "/srv/models/prompts")


def test_install(debian: Debian, packages: dict[str, Path]) -> None:
    """Without a network and without a question.

    The sockets listen, and the first request starts the daemon.
    """
    machine = debian.machine
    debian.install(packages, "rkcached", "rkcached-cpu")
    assert debian.version() == __version__
    for unit in ("rkcached.socket", "rkcached-admin.socket"):
        assert machine.systemctl("is-enabled", unit).strip() == "enabled"
        assert machine.systemctl("is-active", unit).strip() == "active"
    assert machine.systemctl("is-active", "rkcached.service", code=None).strip() == "inactive"
    modes = machine.run(
        "stat", "-c", "%A %U:%G %n", "/etc/rkcached", "/etc/rkcached/manifest.yaml"
    ).stdout
    assert (
        modes == "drwxr-x--- root:rkcached /etc/rkcached\n"
        "-rw-r----- root:rkcached /etc/rkcached/manifest.yaml\n"
    )
    # As it stands, nothing but the runtime library and the model is missing.
    found = machine.run("rkcached", "check", code=os.EX_CONFIG).stderr
    assert "/etc/rkcached/manifest.yaml: 2 problems" in found
    assert "there is no runtime library at /usr/lib/librkllmrt.so" in found
    assert "/srv/models/qwen3-0.6b.rkllm" in found
    assert "MODEL" in machine.run("env", "MANPAGER=cat", "man", "rkcached").stdout
    machine.declare(TEXTS)
    assert machine.ask("m/a")["choices"][0]["message"]["content"]
    debian.wait_fresh()


@pytest.mark.timeout(1800)  # the first test here has the packages built
def test_installed_in_a_chroot_the_image_starts(
    packages: dict[str, Path], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without a running systemd, without /proc and /dev/shm.

    All is compiled, quietly, and it boots.
    """
    if lack := lack_of_machine():
        missing(lack)
    machine = Machine(tmp_path_factory.mktemp("chroot"), {folder: "/debs"})
    try:
        machine.mount()
        (machine.root / "debs").mkdir()
        (machine.root / "usr/sbin/policy-rc.d").unlink(missing_ok=True)
        shutil.rmtree(machine.root / "dev", ignore_errors=True)
        (machine.root / "dev").mkdir()
        for name, minor in {"null": 3, "zero": 5, "urandom": 9}.items():
            os.mknod(machine.root / "dev" / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
            (machine.root / "dev" / name).chmod(0o666)
        package = packages[f"rkcached:{architecture()}"]
        shutil.copy(package, machine.root / "debs")
        done = subprocess.run(
            ["chroot", str(machine.root), "dpkg", "-i", f"/debs/{package.name}"],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBIAN_FRONTEND": "noninteractive",
                "LC_ALL": "C.UTF-8",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        environment = (machine.root / ENVIRONMENT[1:]).resolve()
        assert list(
            environment.glob("lib/python3.*/site-packages/rkcached/__pycache__/daemon.*.pyc")
        )
        machine.boot()
        assert machine.systemctl("is-active", "rkcached.socket").strip() == "active"
        machine.declare(TEXTS)
        machine.ask("m/a")
        Debian(machine).wait_fresh()
    finally:
        machine.close()


def test_llama_cpp_goes_and_the_daemon_goes_on(
    installed: Debian, packages: dict[str, Path]
) -> None:
    """With rkcached-cpu the environment has llama.cpp, without it not.

    A running daemon takes the new one.
    """
    machine = installed.machine
    before, pid = installed.artifacts(), machine.main_pid
    has_it = [f"{ENVIRONMENT}/bin/python", "-c", "import xllamacpp"]
    if machine.run(*has_it, code=None).returncode:
        installed.install(packages, "rkcached-cpu")
        machine.run(*has_it)
    installed.dpkg("--purge", "rkcached-cpu")
    assert machine.run(*has_it, code=None).returncode == 1
    assert machine.main_pid not in (0, pid)
    installed.wait_fresh()
    assert before == installed.artifacts()


def test_another_python(installed: Debian) -> None:
    """When the system gets another Python, dpkg's trigger makes the environment anew.

    It restarts the daemon, too.
    """
    machine = installed.machine
    pid = machine.main_pid
    name = machine.run("readlink", ENVIRONMENT).stdout.strip()
    home, past = ENVIRONMENT.rpartition("/")[0], name.replace("venv-3.", "venv-3.1.")
    machine.run("mv", f"{home}/{name}", f"{home}/{past}")
    machine.run("ln", "-sfn", past, ENVIRONMENT)
    machine.run("dpkg-trigger", "--by-package=python3-minimal", "--no-await", "/usr/bin/python3")
    installed.dpkg("--triggers-only", "rkcached")
    assert name == machine.run("readlink", ENVIRONMENT).stdout.strip()
    assert not installed.exists(f"{home}/{past}")
    assert machine.main_pid not in (0, pid)
    installed.wait_fresh()


def test_upgrade(installed: Debian, next_packages: dict[str, Path]) -> None:
    """An upgrade that fails half way and then succeeds, under load.

    What worked goes on until what is new works; every request is answered, and no prompt cache is
    built again.
    """
    machine = installed.machine
    before, pid = installed.artifacts(), machine.main_pid
    manifest = machine.read("/etc/rkcached/manifest.yaml")
    assert len(before) == 2
    answered: list[dict[str, Any]] = []
    failed: list[BaseException] = []
    over = threading.Event()

    def client() -> None:
        while not over.wait(0.1):
            try:
                answered.append(machine.ask("m/a"))
            except BaseException as error:  # noqa: BLE001 - pytest.fail is no Exception; told below
                failed.append(error)

    thread = threading.Thread(target=client)
    thread.start()
    module = machine.run(
        "/usr/bin/python3", "-c", "import venv; print(venv.__path__[0])"
    ).stdout.strip()
    file = next_packages[f"rkcached:{architecture()}"]
    try:
        machine.run("mv", module, f"{module}.away")
        done = machine.run("dpkg", "-i", f"/debs/{file.parent.name}/{file.name}", code=1)
        machine.run("mv", f"{module}.away", module)
        assert "post-installation" in done.stderr
        assert installed.version() == __version__
        assert machine.main_pid == pid
        assert "rkcached init" not in installed.dpkg("--configure", "rkcached")
    finally:
        over.set()
        thread.join()
    assert failed == []
    assert len(answered) > 3
    assert installed.version() == NEXT_VERSION
    assert machine.main_pid not in (0, pid)
    installed.wait_fresh()
    assert before == installed.artifacts()
    assert manifest == machine.read("/etc/rkcached/manifest.yaml")
    assert machine.run("sh", "-c", f"ls -d {ENVIRONMENT}-* | wc -l").stdout.strip() == "1"


def test_what_the_administrator_changed_stays(installed: Debian) -> None:
    """A disabled socket and a deleted sample prompt do not come back at the next configuration."""
    machine = installed.machine
    machine.run("rm", "-f", "/etc/rkcached/prompts/assistant.md")
    machine.systemctl(
        "disable", "--now", "rkcached-admin.socket", "rkcached.socket", "rkcached.service"
    )
    machine.run(
        "/var/lib/dpkg/info/rkcached.postinst",
        "configure",
        __version__,
        DPKG_MAINTSCRIPT_PACKAGE="rkcached",
    )
    assert not installed.exists("/etc/rkcached/prompts/assistant.md")
    assert machine.systemctl("is-enabled", "rkcached.socket", code=None).strip() == "disabled"
    assert machine.systemctl("is-active", "rkcached.socket", code=None).strip() == "inactive"
    machine.systemctl("enable", "--now", "rkcached.socket", "rkcached-admin.socket")


def test_remove_and_purge(installed: Debian, packages: dict[str, Path]) -> None:
    """Removal keeps configuration, caches and texts, and an installation finds them again.

    A purge leaves nothing.
    """
    machine = installed.machine
    before = installed.artifacts()
    installed.dpkg("--remove", "rkcached")
    assert machine.show("ActiveState") == "inactive"
    for path in (
        "/usr/lib/rkcached",
        "/usr/bin/rkcached",
        "/usr/lib/systemd/system/rkcached.service",
    ):
        assert not installed.exists(path)
    for path in ("/etc/rkcached/manifest.yaml", "/etc/default/rkcached", "/var/lib/rkcached"):
        assert installed.exists(path)
    assert before == installed.artifacts()
    installed.install(packages, "rkcached")
    machine.ask("m/a")
    installed.wait_fresh()
    assert before == installed.artifacts()
    installed.dpkg("--purge", "rkcached")
    for path in (
        "/etc/rkcached",
        "/etc/default/rkcached",
        "/var/cache/rkcached",
        "/var/lib/rkcached",
        "/run/rkcached",
    ):
        assert not installed.exists(path), path
    left = machine.run("find", "/etc/systemd", "/var/lib/systemd", "-name", "*rkcached*").stdout
    assert left == ""
    assert machine.run("dpkg-query", "-W", "rkcached", code=None).returncode == 1
