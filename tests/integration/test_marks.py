"""Which folders become a store, and which are left to whom they belong."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from rkcached.errors import StoreError
from rkcached.store import marks
from rkcached.store.store import Store
from rkcached.store.writer import check_place
from tests.integration.test_store import P, publish

SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"
"""The first 43 bytes of the file, as the Cache Directory Tagging standard says."""


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file beneath a folder with its bytes; folders with None, links with where they lead."""
    found: dict[str, bytes | None] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = bytes(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def opened(root: Path) -> Store:
    store = Store(root)
    store.open()
    store.close()
    return store


def refused(root: Path) -> str:
    """The folder is refused with the next step, and nothing in it changes. Returns the message."""
    before = content(root)
    with pytest.raises(StoreError, match=r"is not taken as a store: (it contains|its) ") as error:
        Store(root).open()
    assert "--cache-dir" in error.value.hint
    assert content(root) == before
    assert marks.why_no_store(root)
    return error.value.message


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def earlier(root: Path) -> Path:
    """The store of a version that wrote no tag, with one artifact."""
    store = Store(root)
    store.open()
    publish(store, P)
    store.close()
    (root / "CACHEDIR.TAG").unlink()
    return root


@pytest.mark.parametrize("names", [None, [], [".gitignore", "README.md"], ["lost+found/"]], ids=str)
def test_a_store_is_made_where_nothing_is(root: Path, names: list[str] | None) -> None:
    """In a missing folder, an empty one, a fresh checkout's, a fresh file system's.

    Its tag is the standard's.
    """
    for name in names or []:
        (root / name).mkdir(parents=True) if name.endswith("/") else None
        root.mkdir(exist_ok=True)
        (root / name).is_dir() or (root / name).write_text("as it came")
    if names == []:
        root.mkdir()
    assert marks.why_no_store(root) in ("it does not exist", "it is empty")
    store = opened(root)
    assert (root / "CACHEDIR.TAG").read_bytes()[:43] == SIGNATURE
    assert marks.why_no_store(root) == ""
    assert store.scan().foreign == {}


@pytest.mark.parametrize(
    "name",
    [
        "manifest.yaml",
        "prompts/a.md",
        ".git/config",
        "m.gguf",
        "src/package.json",
        ".lock/file",
        "Models/m/a.json",
    ],
)
def test_another_folder_is_refused_and_nothing_in_it_changes(root: Path, name: str) -> None:
    """Whatever is in it, also beside files with names that a store has."""
    for one in (name, "README.md", ".gitignore"):
        (root / one).parent.mkdir(parents=True, exist_ok=True)
        (root / one).write_text("{}")
    assert repr(name.split("/", maxsplit=1)[0]) in refused(root)


def test_the_folder_of_another_program_s_cache_is_refused(root: Path) -> None:
    """It has a tag, too, but not ours; nor is a link to ours a tag."""
    root.mkdir()
    (root / "CACHEDIR.TAG").write_bytes(SIGNATURE + b"\n# created by pytest\n")
    refused(root)
    (root / "CACHEDIR.TAG").unlink()
    (root / "CACHEDIR.TAG").symlink_to(opened(root.parent / "other").root / "CACHEDIR.TAG")
    refused(root)


def test_a_project_that_an_earlier_version_took_for_its_store_is_refused(root: Path) -> None:
    """`--cache-dir .` of that version left a lock and a model's folder in the project."""
    store = Store(root)
    store.open()
    publish(store, P)
    store.close()
    (root / "CACHEDIR.TAG").unlink()
    (root / "manifest.yaml").write_text("version: 1")
    (root / "prompts").mkdir()
    (root / "prompts/a.md").write_text("mine")
    assert "'manifest.yaml' and 1 more" in refused(root)


def test_the_store_of_an_earlier_version_is_known_and_marked(earlier: Path) -> None:
    """By its names and sidecars; files of others beside its artifacts do not matter.

    Nothing is lost.
    """
    (earlier / "m/notes.txt").write_text("a stranger's")
    before = content(earlier)
    assert marks.why_no_store(earlier) == ""
    store = opened(earlier)
    now = content(earlier)
    assert {name: now[name] for name in before} == before | {".lock": now[".lock"]}
    assert (now["CACHEDIR.TAG"] or b"")[:43] == SIGNATURE
    assert store.scan().artifacts[P].corrupt == ""


@pytest.mark.parametrize("damage", ["no lock", "no sidecar", "empty", "only its own"])
def test_what_is_left_of_an_earlier_store_is_enough(earlier: Path, damage: str) -> None:
    """Artifacts copied without the files that begin with a dot; after a crash.

    Before the first build.
    """
    match damage:
        case "no lock":
            for name in (".lock", ".digests.json"):
                (earlier / name).unlink(missing_ok=True)
        case "no sidecar":
            (earlier / "m/p.json").write_bytes(b"")
        case "empty":
            shutil.rmtree(earlier / "m")
            (earlier / "m").mkdir()
        case _:
            shutil.rmtree(earlier / "m")
    opened(earlier)
    assert (earlier / "CACHEDIR.TAG").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_tag_that_root_writes_is_the_owner_s_of_the_store(earlier: Path) -> None:
    """`sudo rkcached gc` after an upgrade.

    Else the daemon's user could not read whose the folder is.
    """
    os.chown(earlier, 12345, 23456)
    opened(earlier)
    info = (earlier / "CACHEDIR.TAG").stat()
    assert (info.st_uid, info.st_gid) == (12345, 23456)


def test_a_folder_that_takes_the_place_of_an_open_store_is_refused(root: Path) -> None:
    """Under the open store its folder is moved away, and another one with files comes.

    None of them changes.
    """
    store = Store(root)
    store.open()
    try:
        publish(store, P)
        root.rename(root.parent / "moved")
        root.mkdir()
        (root / "thesis.txt").write_text("years of work")
        with pytest.raises(StoreError, match="thesis"):
            publish(store, P)
        assert content(root) == {"thesis.txt": b"years of work"}
    finally:
        store.close()


def test_a_lock_that_is_a_link_is_not_written_through(root: Path) -> None:
    """The file that it leads to keeps its content."""
    opened(root)
    victim = root.parent / "victim"
    victim.write_text("mine")
    (root / ".lock").unlink()
    (root / ".lock").symlink_to(victim)
    with pytest.raises(StoreError, match=r"\.lock in it is a link"):
        Store(root).open()
    assert victim.read_text() == "mine"


# The words for a folder that is not taken


def said(root: Path) -> str:
    """The error of opening a store there, which the check without opening it foresees."""
    with pytest.raises(StoreError) as foreseen:
        check_place(root)
    store = Store(root)
    with pytest.raises(StoreError) as caught:
        store.open()
    store.close()
    assert (foreseen.value.message, foreseen.value.hint) == (
        caught.value.message,
        caught.value.hint,
    )
    return f"{caught.value.message}; {caught.value.hint}"


def test_a_file_or_a_link_to_nowhere_in_its_place(root: Path) -> None:
    """It was "File exists; create it for this user"."""
    root.write_text("mine")
    words = "name another folder with --cache-dir or RKCACHED_CACHE_DIR"
    assert said(root).endswith(f"cannot be written: {root} is not a folder; {words}")
    assert said(root / "in/it").endswith(f": {root} is not a folder; {words}")
    root.unlink()
    root.symlink_to("nowhere")
    assert said(root).endswith(
        f": it is a link to nowhere, which does not exist; make that folder, or {words}"
    )
    (root.parent / "nowhere").mkdir()
    check_place(root)
    opened(root)


def test_the_tag_of_another_program_is_called_that(root: Path) -> None:
    """It was "it contains 'CACHEDIR.TAG', but not the CACHEDIR.TAG that marks a store"."""
    root.mkdir()
    (root / "CACHEDIR.TAG").write_bytes(SIGNATURE + b"\n# created by pytest\n")
    assert "its CACHEDIR.TAG is that of another program" in said(root)


def test_folders_that_are_foreseen_to_be_taken(root: Path, earlier: Path) -> None:
    """A store, an empty folder and one that can be made; nothing is made by asking."""
    check_place(earlier)
    check_place(root.parent / "new/store")
    assert [path.name for path in root.parent.iterdir()] == [earlier.name]
    (root.parent / "empty").mkdir()
    check_place(root.parent / "empty")
    assert list((root.parent / "empty").iterdir()) == []


def test_a_folder_of_others_is_foreseen_to_be_refused(root: Path) -> None:
    """By its content, its mode and its lock."""
    root.mkdir()
    (root / "thesis.txt").write_text("mine")
    assert "is not taken as a store: it contains 'thesis.txt'" in said(root)
    (root / "thesis.txt").unlink()
    (root / ".lock").symlink_to("lock")
    assert ".lock in it is a link; remove the link" in said(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
def test_a_folder_that_another_user_may_write_is_foreseen_to_be_refused() -> None:
    """Also one that is to be made there; and where another user will write, it is no reason."""
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        parent.chmod(0o755)
        groups = os.getgroups()
        os.setgroups([])
        os.seteuid(1)
        try:
            for place in (parent, parent / "new"):
                assert "cannot be written: Permission denied; create it for this user" in said(
                    place
                )
                check_place(place, may_write=False)
        finally:
            os.seteuid(0)
            os.setgroups(groups)
    finally:
        parent.rmdir()
