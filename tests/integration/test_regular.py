"""Files that are exchanged under the reader's eyes.

It never waits, and reads no more than it wants.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rkcached.errors import ManifestError, RkcachedError, StoreError
from rkcached.host.digests import Digests
from rkcached.host.page_cache import read_ahead
from rkcached.host.regular import open_regular, read_regular
from rkcached.sources.manifest_file import manifest_text, read_manifest
from rkcached.sources.reader import SourceReader
from rkcached.sources.records import PromptSource, Trouble
from rkcached.sources.text_files import read_text
from rkcached.sources.tokenizer_files import _bytes
from rkcached.store.scan import read_sidecar
from rkcached.store.store import Store

LARGE_BYTES = 100 << 30


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def a_large_file(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(LARGE_BYTES)


STRANGE = [a_pipe, a_device, a_folder, a_socket, a_large_file]


@pytest.mark.parametrize("make", STRANGE)
def test_what_is_no_file_of_that_size_is_an_error_at_once(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "x"
    make(path)
    with pytest.raises(OSError, match=str(path)) as caught:
        read_regular(path, 1000)
    assert caught.value.errno in (errno.EINVAL, errno.EISDIR, errno.EFBIG, errno.ENXIO)


def test_a_link_is_followed_where_it_is_meant(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "link").symlink_to("text")
    assert read_regular(tmp_path / "link", 5) == b"hello"
    with pytest.raises(OSError, match="link") as caught:
        open_regular(tmp_path / "link", follow=False)
    assert caught.value.errno == errno.ELOOP


@contextmanager
def exchanged(path: Path, content: str, make: Callable[[Path], None]) -> Iterator[None]:
    """The file is a good one and another thing in turn, as fast as they can be exchanged."""
    good, bad = path.with_name("good"), path.with_name("bad")
    good.write_text(content)
    make(bad)
    stop = threading.Event()
    link = path.with_name("next")

    def exchange() -> None:
        while not stop.is_set():
            for target in (good, bad):
                link.symlink_to(target)
                link.replace(path)

    path.symlink_to(good)
    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


READERS: dict[str, Callable[[Path], object]] = {
    "prompt": read_text,
    "manifest": manifest_text,
    "tokenizer": _bytes,
    "model": lambda path: Digests().digest(path),
    "prompt cache": read_ahead,
}


@pytest.mark.parametrize("make", [a_pipe, a_device, a_folder])
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_what_is_exchanged(
    tmp_path: Path, reader: str, make: Callable[[Path], None]
) -> None:
    """It reads the good file, or says in a sentence why not."""
    read, seen = READERS[reader], 0
    with exchanged(tmp_path / "x", "version: 1\n", make):
        tries = 0
        while tries < 300 or (not seen and tries < 100_000):
            tries += 1
            with contextlib.suppress(RkcachedError, OSError):
                read(tmp_path / "x")
                seen += 1
    assert seen or reader == "prompt cache"


@pytest.mark.parametrize("reader", ["prompt", "manifest", "tokenizer"])
def test_no_reader_takes_memory_by_a_files_claim(tmp_path: Path, reader: str) -> None:
    with exchanged(tmp_path / "x", "version: 1\n", a_large_file):
        for _ in range(50):
            with contextlib.suppress(RkcachedError, OSError):
                assert len(str(READERS[reader](tmp_path / "x"))) < 1000
    a_large_file(tmp_path / "y")
    with pytest.raises((RkcachedError, ManifestError)):
        READERS[reader](tmp_path / "y")


def test_a_staged_link_changes_nobodys_file(tmp_path: Path) -> None:
    """A worker that is not to be trusted put it where its prompt cache should be."""
    from rkcached.sources.records import Key

    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o644)
    store = Store(tmp_path / "cache")
    store.open()
    try:
        staged = store.staging.begin(Key("m", "p"))
        staged.symlink_to(victim)
        with pytest.raises(StoreError):
            store.staging.seal(staged)
        assert victim.stat().st_mode & 0o777 == 0o644
        assert victim.read_text() == "mine"
    finally:
        store.close()


@pytest.mark.parametrize("make", [a_pipe, a_large_file])
def test_a_strange_sidecar_is_damaged(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "p.json")
    assert read_sidecar(tmp_path / "p.json", None) == (
        "the sidecar is damaged: it is no file of that kind"
    )


@pytest.mark.parametrize("follow_links", [True, False])
def test_links_out_of_a_prompts_folder(tmp_path: Path, *, follow_links: bool) -> None:
    """They are followed, or refused with the next step; links within the folder are always good.

    So Kubernetes mounts a ConfigMap: each file is a link into a folder beside it.
    """
    folder = tmp_path / "prompts"
    (folder / "..data").mkdir(parents=True)
    (folder / "..data" / "inner.md").write_text("You are inner.")
    (folder / "inner.md").symlink_to("..data/inner.md")
    (folder / "plain.md").write_text("You are plain.")
    (tmp_path / "secret.md").write_text("The secret.")
    (folder / "outer.md").symlink_to(tmp_path / "secret.md")
    (folder / "hidden.md").symlink_to("..data/further")
    (folder / "..data" / "further").symlink_to(tmp_path / "secret.md")
    (tmp_path / "m.model").write_text('{"rkcached_memory_model": 1}')
    (tmp_path / "manifest.yaml").write_text(
        "version: 1\nengine: {kind: memory}\n"
        f"sources: {{follow_links: {str(follow_links).lower()}}}\n"
        "models: {m: {path: m.model, prompts_from: prompts/*.md}}\n"
    )
    reader = SourceReader(Digests())
    manifest = read_manifest(tmp_path / "manifest.yaml")
    for _ in range(2):
        found = reader.scan(manifest).prompts
        texts = {
            key.prompt: declared.source.text
            for key, declared in found.items()
            if isinstance(declared.source, PromptSource)
        }
        wanted = {"inner": "You are inner.", "plain": "You are plain."}
        if follow_links:
            wanted |= dict.fromkeys(("outer", "hidden"), "The secret.")
        assert texts == wanted
    for key, declared in found.items():
        assert reader.read_again(declared).source == declared.source
        if isinstance(declared.source, Trouble):
            assert (
                f"{key.prompt}.md is a link that leads out of {folder}" in declared.source.message
            )
            assert "sources.follow_links" in declared.source.hint
