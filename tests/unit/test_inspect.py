"""What a prompt cache file is: those that the engines write, and everything that is none."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from rkcached.cli.inspect_cache import UNKNOWN, inspect, print_inspection
from rkcached.cli.launcher import small_model
from rkcached.engines.base import ModelSpec
from rkcached.engines.llamacpp.engine import LlamaCppEngine
from rkcached.engines.memory import MemoryEngine, MemoryModel
from rkcached.errors import FormatError, RkcachedError, SourceError
from rkcached.plan.fingerprint import fingerprint
from rkcached.store.sidecar import Figures, Sidecar

TEXT = "You are a watchman of ünïcode."
Publish = Callable[..., Path]


def llama(
    ids: list[int], magic: int = 0x67677371, version: int = 2, state: bytes = b"state"
) -> bytes:
    return (
        struct.pack("<III", magic, version, len(ids)) + struct.pack(f"<{len(ids)}i", *ids) + state
    )


def rkllm(ids: list[int], magic: int = 0x6767736E) -> bytes:
    return llama(ids, magic, 8)


@pytest.fixture(scope="module")
def memory_cache(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A prompt cache of `TEXT` that the memory engine wrote."""
    folder = tmp_path_factory.mktemp("memory")
    model = folder / "m.model"
    model.write_bytes(msgspec.json.encode(MemoryModel()))
    engine = MemoryEngine(ModelSpec(path=str(model), context_tokens=0, scratch_dir=str(folder)))
    engine.prefill(TEXT, save_to=folder / "cache")
    engine.close()
    return (folder / "cache").read_bytes()


@pytest.fixture
def publish(tmp_path: Path, memory_cache: bytes) -> Publish:
    """Writes an artifact as the store does; returns its prompt cache."""

    def write(prompt: str = "watch.man", *, data: bytes = memory_cache, **changes: object) -> Path:
        made = fingerprint({"prefix.bytes": len(TEXT)})
        record = Sidecar(
            model="m",
            prompt=prompt,
            artifact=f"{prompt}.memory_cache",
            fingerprint=made.digest,
            components=dict(made.components),
            size_bytes=len(memory_cache),
            sha256=hashlib.sha256(memory_cache).hexdigest(),
            text_sha256=hashlib.sha256(TEXT.encode()).hexdigest(),
            tokens=len(TEXT.encode()),
            built_at=1.0,
            build_ms=2.0,
            figures=Figures(
                prefill_ms=2.0, load_ms=1.0, cold_ttft_ms=3.0, warm_ttft_ms=1.5, verified="exact"
            ),
        )
        cache = tmp_path / f"{prompt}.memory_cache"
        cache.write_bytes(data)
        (tmp_path / f"{prompt}.bin").write_text(TEXT)
        (tmp_path / f"{prompt}.json").write_bytes(
            msgspec.json.encode(msgspec.structs.replace(record, **changes))
        )
        return cache

    return write


def refusal(path: Path, kind: type[RkcachedError] = FormatError) -> str:
    with pytest.raises(kind) as caught:
        inspect(path)
    assert caught.value.exit_code == (os.EX_DATAERR if kind is FormatError else os.EX_NOINPUT)
    return caught.value.message


def printed(path: Path) -> str:
    stream = io.StringIO()
    print_inspection(Console(file=stream, width=200), inspect(path))
    return stream.getvalue()


def program(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rkcached", "inspect", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
    )


def test_memory(tmp_path: Path, memory_cache: bytes) -> None:
    """A file of the memory engine: its tokens are the bytes of the text."""
    path = tmp_path / "anything"
    path.write_bytes(memory_cache)
    data = inspect(path)
    ids = list(TEXT.encode())
    assert data["engine"] == "memory"
    assert data["tokens"] == {"count": len(ids), "first": ids[:8], "last": ids[-8:]}
    assert data["size_bytes"] == len(memory_cache)
    assert (data["sidecar"], data["problem"]) == (None, "")
    assert "no sidecar beside it" in printed(path)


@pytest.mark.model
def test_llamacpp(tmp_path: Path) -> None:
    """A file of llama.cpp, written by the real engine: as many tokens as the engine counted."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(mode=0o700)
    engine = LlamaCppEngine(
        ModelSpec(path=str(small_model()), context_tokens=256, scratch_dir=str(scratch))
    )
    path = tmp_path / "p.llama_cache"
    try:
        stats = engine.prefill("You are a watchman. Say what you see.", save_to=path)
    finally:
        engine.close()
    data = inspect(path)
    assert (data["engine"], data["tokens"]["count"]) == ("llamacpp", stats.prompt_tokens)
    assert all(0 <= token < 49152 for token in (*data["tokens"]["first"], *data["tokens"]["last"]))
    assert data["size_bytes"] == path.stat().st_size
    assert data["problem"] == ""


def test_llamacpp_tokens(tmp_path: Path) -> None:
    """Ids stand alone or packed by llama.cpp's server.

    In a packing that is not known they are left out.
    """
    path = tmp_path / "p.llama_cache"
    path.write_bytes(llama([7, 8, 9]))
    assert inspect(path)["tokens"] == {"count": 3, "first": [7, 8, 9], "last": [7, 8, 9]}
    path.write_bytes(llama([-1, 1, 2, 7, 8, 0], version=4))
    assert inspect(path)["tokens"] == {"count": 2, "first": [7, 8], "last": [7, 8]}
    for values in ([-1], [-1, 1], [-1, 2, 2, 7, 8, 0], [-1, 1, 4, 7, 8, 0], [-1, 1, -4, 7]):
        path.write_bytes(llama(values, version=5))
        assert (inspect(path)["engine"], inspect(path)["tokens"]) == ("llamacpp", None)
        assert "an unknown number of tokens" in printed(path)


@pytest.mark.parametrize(
    ("magic", "words"), [(0x6767736E, "RKLLM 1.1"), (26, "architecture number 26")]
)
def test_rkllm(tmp_path: Path, magic: int, words: str) -> None:
    """A file of RKLLM, told by a header that is plausible: both magics that were seen."""
    path = tmp_path / "prompt_cache.bin"
    path.write_bytes(rkllm(list(range(100, 120)), magic))
    data = inspect(path)
    assert (data["engine"], data["tokens"]["count"]) == ("rkllm", 20)
    assert words in data["file_format"]
    assert data["tokens"]["first"] == list(range(100, 108))
    assert "100 101 102 103 104 105 106 107 ... 112" in printed(path)


def test_no_file(tmp_path: Path) -> None:
    """Missing, a directory, a pipe, a loop, an impossible name.

    Each is told, and nothing blocks.
    """
    assert "there is no file" in refusal(tmp_path / "gone", SourceError)
    assert "is a directory" in refusal(tmp_path, SourceError)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe", SourceError)
    assert "not a regular file" in refusal(Path("/dev/null"), SourceError)
    (tmp_path / "loop").symlink_to("loop")
    assert os.strerror(errno.ELOOP) in refusal(tmp_path / "loop", SourceError)
    assert "no file can have this name" in refusal(Path("a\0b"), SourceError)


def test_unreadable(tmp_path: Path) -> None:
    """A file of another user's says who may read it."""
    (tmp_path / "private").touch(mode=0)
    root = os.geteuid() == 0  # who may read everything, so the test becomes nobody
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(SourceError, match="cannot be read: Permission denied") as caught:
            inspect(tmp_path / "private")
    finally:
        if root:
            os.seteuid(0)
    assert "use sudo" in caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"x" * 500,
        bytes(500),
        b"GGUF" + bytes(100),
        "größer als gedacht, dieser Text".encode(),
        rkllm([], 26),
        rkllm([1, 2, -1]),
        rkllm([1, 2, -1], 26),
        rkllm([1, 1 << 30], 26),
        struct.pack("<III", 26, 8, 1000),
        struct.pack("<III", 26, 7, 1) + bytes(8),
    ],
)
def test_unknown(tmp_path: Path, data: bytes) -> None:
    """Anything else is no prompt cache, however near it comes."""
    path = tmp_path / "file"
    path.write_bytes(data)
    assert UNKNOWN in refusal(path)


def test_llama_session(tmp_path: Path) -> None:
    """A session of llama.cpp is told from a sequence state."""
    path = tmp_path / "file"
    path.write_bytes(llama([1, 2], 0x6767736E, 9))
    assert "a session of llama.cpp, version 9" in refusal(path)


def test_truncated(tmp_path: Path, memory_cache: bytes) -> None:
    """Empty files, and known formats cut anywhere within header and tokens, are told as such."""
    path = tmp_path / "file"
    path.touch()
    assert "is empty" in refusal(path)
    ids = list(range(50))
    for data in (llama(ids, state=b""), rkllm(ids)[:-5], memory_cache):
        for length in (4, 8, 11, 12, 19, 30, len(data) - 1):
            path.write_bytes(data[:length])
            assert "is a truncated prompt cache" in refusal(path), (data[:8], length)
    path.write_bytes(memory_cache + b"more")
    assert "is damaged" in refusal(path)
    path.write_bytes(struct.pack("<8sIQ", b"RKCMEMKV", 1, (1 << 64) - 1) + bytes(50))
    assert "18,446,744,073,709,551,615 tokens" in refusal(path)


def test_artifact(publish: Publish) -> None:
    """An artifact, by any of its three files, is told with the model and prompt it belongs to."""
    cache = publish()
    for name in (cache, cache.with_suffix(".json"), cache.with_suffix(".bin")):
        data = inspect(name)
        assert (data["file"], data["given"]) == (str(cache), str(name))
        assert (data["sidecar"]["model"], data["sidecar"]["prompt"]) == ("m", "watch.man")
        assert data["sidecar"]["matches"] == {
            "size": True,
            "sha256": True,
            "tokens": True,
            "text": True,
        }
        assert data["problem"] == ""
    assert "matches its sidecar" in printed(cache)
    assert "artifact of m/watch.man" in printed(cache)
    cache.with_suffix(".bin").unlink()
    data = inspect(cache)
    assert (data["sidecar"]["matches"]["text"], data["problem"]) == (None, "")


def test_artifact_damaged(publish: Publish, memory_cache: bytes) -> None:
    """A prompt cache or text that is not what its sidecar says: which, with the figures."""
    cache = publish(size_bytes=7, tokens=3)
    data = inspect(cache)
    assert f"it has {len(memory_cache)} bytes, its sidecar says 7" in data["problem"]
    assert "tokens, its sidecar says 3" in data["problem"]
    assert "its sidecar says 7" in printed(cache)
    flipped = bytearray(memory_cache)
    flipped[-1] ^= 1
    data = inspect(publish(data=bytes(flipped)))
    assert data["problem"] == "it does not have the SHA-256 of its sidecar"
    assert data["sidecar"]["matches"] == {
        "size": True,
        "sha256": False,
        "tokens": True,
        "text": True,
    }
    cache = publish()
    cache.with_suffix(".bin").write_text("other")
    assert "watch.man.bin does not have the SHA-256" in inspect(cache)["problem"]
    cache.with_suffix(".bin").unlink()
    os.mkfifo(cache.with_suffix(".bin"))
    assert "watch.man.bin does not have the SHA-256" in inspect(cache)["problem"]


def test_sidecar_of_nothing(publish: Publish, tmp_path: Path) -> None:
    """A sidecar whose prompt cache is gone, of another name, damaged.

    Or leading elsewhere is told as such.
    """
    cache = publish()
    cache.unlink()
    assert (
        "belongs to m/watch.man, whose prompt cache watch.man.memory_cache is missing"
        in refusal(cache.with_suffix(".json"))
    )
    (tmp_path / "other.json").write_bytes(cache.with_suffix(".json").read_bytes())
    assert "belongs to m/watch.man, under another name" in refusal(tmp_path / "other.json")
    for damage in (b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"rkcached_memory_model":1}'):
        (tmp_path / "other.json").write_bytes(damage)
        assert "nor the sidecar of one: other.json is no sidecar" in refusal(
            tmp_path / "other.json"
        )
    (tmp_path / "other.json").write_bytes(b" " * (2 << 20))
    assert "too large" in refusal(tmp_path / "other.json")
    for prompt, artifact in (
        ("../../x", "../../x.memory_cache"),
        ("watch.man", "../watch.man.memory_cache"),
    ):
        cache = publish(prompt=prompt if "/" not in prompt else "watch.man", artifact=artifact)
        assert "sidecar" in inspect(cache)["problem"]
        refusal(cache.with_suffix(".json"))


def test_leftover(publish: Publish, tmp_path: Path) -> None:
    """A prompt cache of an engine no longer used is not the one that the sidecar is about."""
    publish()
    old = tmp_path / "watch.man.llama_cache"
    old.write_bytes(llama([1, 2, 3]))
    data = inspect(old)
    assert data["sidecar"] is None
    assert "that of watch.man.memory_cache, so it is a leftover" in data["problem"]
    damaged = tmp_path / "watch.man.json"
    damaged.write_bytes(b"{}")
    assert inspect(old)["problem"] == "watch.man.json is no sidecar, or a damaged one"


HEADS = st.sampled_from(
    [b"", llama([1, 2, 3]), rkllm([1, 2]), rkllm([5], 7), b"RKCMEMKV\1\0\0\0\1"]
)


@settings(max_examples=400, deadline=None)
@given(head=HEADS, cut=st.integers(0, 30), tail=st.binary(max_size=60))
@example(head=llama([1]), cut=8, tail=b"\xff\xff\xff\xff")
def test_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, cut: int, tail: bytes
) -> None:
    """Whatever is in the file, the outcome is a description or a FormatError."""
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(head[:cut] + tail)
    with contextlib.suppress(FormatError):
        data = inspect(path)
        assert (data["tokens"] or {"count": 0})["count"] <= len(head) + len(tail)
        json.dumps(data)


def test_the_command(publish: Publish, tmp_path: Path, memory_cache: bytes) -> None:
    """The command prints a description or JSON.

    Its exit code tells good, damaged and missing.
    """
    cache = publish()
    done = program(cache)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the memory engine" in done.stdout
    assert json.loads(program("--json", cache).stdout)["engine"] == "memory"
    cache = publish(tokens=1)
    done = program("--json", cache)
    assert done.returncode == os.EX_DATAERR
    assert "its sidecar says 1" in json.loads(done.stdout)["problem"]
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.write_bytes(memory_cache)
    assert program(odd).returncode == 0
    assert program("--json", odd).returncode == 0
    for path, code in (
        (Path(__file__), os.EX_DATAERR),
        (tmp_path / "gone", os.EX_NOINPUT),
        (tmp_path, os.EX_NOINPUT),
    ):
        done = program(path)
        assert done.returncode == code
        assert done.stderr.startswith("error: ")
        assert stat.S_ISREG(cache.stat().st_mode)


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (3, "1 2 3"),
        (8, "1 2 3 4 5 6 7 8"),
        (12, "1 2 3 4 5 6 7 8 9 10 11 12"),
        (16, "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"),
        (17, "1 2 3 4 5 6 7 8 ... 10 11 12 13 14 15 16 17"),
    ],
)
def test_no_token_is_shown_twice(tmp_path: Path, count: int, shown: str) -> None:
    """The first and the last ids, or all of them where they would overlap."""
    path = tmp_path / "p.rkllm_cache"
    ids = range(1, count + 1)
    path.write_bytes(struct.pack(f"<III{count}i", 7, 8, count, *ids) + bytes(64))
    console = Console(width=200, record=True, file=io.StringIO())
    print_inspection(console, inspect(path))
    assert f"token ids {shown}\n" in console.export_text()
