"""Whose code runs: no command and no child of one loads a module from the current folder.

A folder that somebody else can write may hold a `msgspec.py`, and `sudo rkcached check` would run
it as root. And however the package was installed, its children run the very package of their
parent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Workspace

from tests.waiting import DEADLINE_S

PROGRAM = str(Path(sys.executable).with_name("rkcached"))
ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
HOSTILE = (
    "click",
    "ctypes",
    "json",
    "jinja2",
    "logging",
    "msgspec",
    "multiprocessing",
    "pickle",
    "pydantic",
    "rkcached",
)
HOSTILE += (
    "runpy",
    "signal",
    "site",
    "sitecustomize",
    "socket",
    "subprocess",
    "usercustomize",
    "xllamacpp",
)


def prepare(space: Workspace) -> None:
    """Two prompts whose chat template is rendered in a child, on a model that a child hosts."""
    space.memory_model()
    space.write("t.jinja", TEMPLATE)
    space.write("a.md", "You are prompt A.\n" * 20)
    space.write(
        "manifest.yaml",
        "version: 1\nengine: {kind: memory}\nmodels:\n  m:\n    path: m.model\n"
        "    chat_template: t.jinja\n"
        "    params: {max_context_len: 4096}\n    prompts: {a: a.md}\n",
    )


@pytest.fixture
def hostile(workspace: Workspace) -> Path:
    """A folder that everybody can write, full of modules that leave a mark when they are run."""
    folder, mark = workspace.root / "hostile", workspace.root / "mark"
    folder.mkdir()
    folder.chmod(0o777)
    said = (
        f"import sys\nwith open({str(mark)!r}, 'a') as mark:\n"
        "    print(__name__, sys.argv, file=mark)\n"
    )
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(said)
    (folder / "encodings").mkdir()
    (folder / "encodings/__init__.py").write_text(said)
    (folder / "pyvenv.cfg").write_text(f"home = {folder}\n")
    (folder / "x.pth").write_text(f"import sys; open({str(mark)!r}, 'a').write('pth')\n")
    return folder


def marks(space: Workspace) -> str:
    mark = space.root / "mark"
    return mark.read_text() if mark.exists() else ""


def call(space: Workspace, folder: Path, *arguments: str, code: int = 0) -> str:
    """Run the installed program in that folder."""
    done = subprocess.run(
        [PROGRAM, *arguments],
        cwd=folder,
        env=space.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == code, (arguments, done.stdout, done.stderr)
    return done.stdout


@pytest.mark.long
def test_nothing_of_the_current_folder_is_run(workspace: Workspace, hostile: Path) -> None:
    """Each command is called in a hostile folder, and so is the daemon.

    None of the folder's modules is run.
    """
    prepare(workspace)
    workspace.launcher = [PROGRAM]
    workspace.folder = hostile
    assert "ok" in call(workspace, hostile, "check")
    workspace.start()
    workspace.wait_settled()
    results = [str(workspace.root / name) for name in ("a.json", "b.json")]
    artifact = str(workspace.cache / "m/a.memory_cache")
    for arguments in (
        ("check",),
        ("plan",),
        ("explain", "m/a"),
        ("status",),
        ("reload",),
        ("regenerate", "m/a"),
        ("verify", "--deep"),
        ("gc",),
        ("inspect", artifact),
        ("chat", "m/a", "hello"),
        ("bench", "--runs", "1", "-o", results[0]),
        ("bench", "--runs", "1", "--no-direct", "-o", results[1]),
        ("compare", *results),
        ("schema",),
        ("--version",),
        ("--help",),
    ):
        call(workspace, hostile, *arguments)
        assert marks(workspace) == "", arguments
    subprocess.run(
        [PROGRAM, "doctor"],
        cwd=hostile,
        env=workspace.environment,
        capture_output=True,
        check=False,
    )
    direct = json.loads(Path(results[0]).read_text())
    assert direct["direct"] == ""  # the engine alone was measured, in a child of the command's own
    assert marks(workspace) == ""


@pytest.mark.long
@pytest.mark.model
def test_nothing_of_the_current_folder_is_run_by_the_demo(
    workspace: Workspace, hostile: Path
) -> None:
    """The demo starts a daemon of its own, which loads an engine with native code.

    It need not build to its end.
    """
    with subprocess.Popen(
        [PROGRAM, "demo", "--dir", str(workspace.root / "demo")],
        cwd=hostile,
        env=workspace.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as demo:
        try:
            assert demo.stderr is not None
            assert any("model loaded" in line for line in demo.stderr)
            demo.terminate()
            demo.communicate(timeout=DEADLINE_S)
        finally:
            demo.kill()
    assert marks(workspace) == ""


def test_children_live_in_folders_of_their_own(workspace: Workspace, hostile: Path) -> None:
    """A library that writes into its current folder.

    Or loads from it, gets one that is nobody else's.
    """
    prepare(workspace)
    workspace.launcher, workspace.folder = [PROGRAM], hostile
    workspace.start()
    workspace.wait_settled()
    workspace.ask("m/a")
    children = workspace.children()
    assert len(children) == 2
    for child in children:
        folder = Path(child.cwd())
        mode = folder.stat()
        assert folder != hostile
        if folder == Path("/"):  # of a machine where anybody may write into it, all is lost
            assert mode.st_uid == 0
        else:
            assert (mode.st_uid, mode.st_mode & 0o022) == (os.geteuid(), 0)
        assert child.cmdline()[1:3] == ["-I", "-P"]
        assert not [name for name in child.environ() if name.startswith("PYTHON")]


def test_without_isolation_the_current_folder_is_left_early(
    workspace: Workspace, hostile: Path
) -> None:
    """`python -m` looks there first by itself; nothing is taken from it once our own code runs."""
    for path in hostile.iterdir():
        if path.stem in {
            "runpy",
            "rkcached",
            "site",
            "encodings",
            "sitecustomize",
            "usercustomize",
        }:
            path.rename(
                workspace.root / f"away-{path.name}"
            )  # read by Python itself, before any code of ours
    prepare(workspace)
    done = subprocess.run(
        [sys.executable, "-m", "rkcached", "check"],
        cwd=hostile,
        env=workspace.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert marks(workspace) == ""


# Layouts


def plant(folder: Path) -> Path:
    """What pip would put into `folder`.

    The package and what it needs, without any path to the sources.
    """
    folder.mkdir(parents=True)
    (folder / "rkcached").symlink_to(ROOT / "rkcached")
    (site_packages,) = {
        Path(path)
        for path in sys.path
        if path.endswith("site-packages") and path.startswith(sys.prefix)
    }
    for path in site_packages.iterdir():
        if path.suffix != ".pth" and not path.name.startswith(("rkcached", "_", "__editable__")):
            (folder / path.name).symlink_to(path)
    return folder


def base_python() -> str:
    """The interpreter below the tests' environment: it knows none of the packages."""
    python = str(getattr(sys, "_base_executable", sys.executable))
    has_it = (
        subprocess.run(
            [python, "-Ic", "import rkcached"], capture_output=True, check=False
        ).returncode
        == 0
    )
    if python == sys.executable or has_it:
        pytest.skip("needs an environment over an interpreter that does not have rkcached itself")
    return python


@pytest.mark.parametrize(
    "layout", ["PYTHONPATH", "user site", "-Im in an environment", "console script"]
)
def test_children_run_the_package_of_their_parent(
    workspace: Workspace, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install --target` with PYTHONPATH, `pip install --user`, the .deb's way and pip's.

    All of it works.
    """
    package = ROOT / "rkcached"
    if layout == "PYTHONPATH":
        package = plant(workspace.root / "target") / "rkcached"
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        workspace.launcher = [base_python(), "-m", "rkcached"]
    elif layout == "user site":
        monkeypatch.setenv("PYTHONUSERBASE", str(workspace.root / "user"))
        command = [base_python(), "-c", "import site; print(site.getusersitepackages())"]
        folder = Path(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        )
        package = plant(folder) / "rkcached"
        workspace.launcher = [base_python(), "-m", "rkcached"]
    else:
        workspace.launcher = (
            [sys.executable, "-Im", "rkcached"] if layout.startswith("-Im") else [PROGRAM]
        )
    workspace.folder = workspace.root  # not the sources, where -m would find another package
    prepare(workspace)
    workspace.start()
    workspace.wait_settled()
    assert workspace.ask("m/a")["rkcached"]["state"] == "hit"
    children = workspace.children()
    assert len(children) == 2
    assert all(str(package / "host" / "isolated.py") in child.cmdline() for child in children)
