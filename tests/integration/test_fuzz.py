"""Fuzz, bounded in time.

Text and bytes that nobody meant, at every place where this program reads some.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from rkcached import errors
from rkcached.cli.launcher import small_model
from rkcached.engines.memory import MemoryModel
from rkcached.errors import ManifestError, SourceError
from rkcached.host import isolated
from rkcached.host.digests import Digests
from rkcached.plan.fingerprint import fingerprint
from rkcached.plan.records import MAX_RETRY_S
from rkcached.reconcile.failures import verdict_on
from rkcached.sources.parser import parse
from rkcached.sources.records import Key
from rkcached.store.sidecar import Figures, Sidecar, names_artifact, parse_sidecar
from rkcached.store.store import Store
from rkcached.worker import protocol

EXAMPLES = int(os.environ.get("RKCACHED_FUZZ_EXAMPLES", "10")) * 6
fuzz = hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
KEY = Key("m", "p")

GOOD_MANIFEST = (Path(__file__).parents[2] / "etc/rkcached/manifest.example.yaml").read_text()
YAML_PIECES = st.sampled_from(
    [
        *("version: 1", "models:", "m:", "path: x", "prompts:", "{", "}", "[", "]", ": "),
        *("\n", "\n  ", "\n    ", "\t"),
        *("&a ", "*a", "<<: ", "!!python/object:os.system ", "!!int ", "!!binary "),
        *("|", ">", "'", '"', "#", "---"),
        *("1e999", ".nan", "-.inf", "9" * 5000, "0x10", "~", "null"),
        *("\u2028", "\x00", "\ud800", "\ufeff", "%YAML 9\n"),
        *("params: {temperature: ", "max_bytes: ", "chat_template: ", "engine: {kind: "),
        *("../" * 50, "a" * 10_000),
    ]
)  # fmt: skip


def parsed(text: str) -> None:
    try:
        parse(text, file=Path("/m/manifest.yaml"))
    except ManifestError as error:
        problems = error.problems
    else:
        return
    assert problems
    assert all(problem.line >= 0 and problem.message for problem in problems)


@fuzz
@hypothesis.given(st.lists(YAML_PIECES, max_size=30).map("".join) | st.text(max_size=200))
def test_manifest_of_pieces(text: str) -> None:
    """Whatever the text, it is a manifest or a ManifestError with problems."""
    parsed(text)


@fuzz
@hypothesis.given(st.data())
def test_manifest_with_a_flaw(data: st.DataObject) -> None:
    """The example manifest with pieces cut out, doubled and put in."""
    text = GOOD_MANIFEST
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(begin, min(len(text), begin + 60)))
        text = (
            text[:begin] + data.draw(st.just("") | YAML_PIECES | st.text(max_size=8)) + text[end:]
        )
    parsed(text)


# Files of the store


def a_sidecar(**changes: Any) -> dict[str, Any]:
    components = {"model.digest": "x", "prefix.digest": "y"}
    figures = Figures(prefill_ms=1, load_ms=1, cold_ttft_ms=2, warm_ttft_ms=1, verified="exact")
    sidecar = Sidecar(
        model="m", prompt="p", artifact="p.mem_cache", fingerprint=fingerprint(components).digest,
        components=components, size_bytes=3, sha256="0" * 64, text_sha256="1" * 64,
        tokens=3, built_at=1.0, build_ms=1.0, figures=figures,
    )  # fmt: skip
    return {**msgspec.to_builtins(sidecar), **changes}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
DAMAGED_RECORD = st.one_of(
    st.binary(max_size=300),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.tuples(st.sampled_from(sorted(a_sidecar())), JSON).map(
        lambda c: json.dumps(a_sidecar(**{c[0]: c[1]})).encode()
    ),
    st.tuples(st.integers(0, 700), st.binary(max_size=4)).map(
        lambda c: (data := json.dumps(a_sidecar()).encode())[: c[0]] + c[1] + data[c[0] + 1 :]
    ),
    st.text(max_size=12).map(
        lambda name: json.dumps(a_sidecar(artifact=f"p.{name}_cache")).encode()
    ),
    st.just(b"[" * 100_000),
)


@fuzz
@hypothesis.given(DAMAGED_RECORD)
def test_sidecar_and_verdict_of_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """A look never fails, and gives nothing to load that is not the sidecar's own file."""
    store = Store(tmp_path_factory.getbasetemp() / "fuzzed")
    for folder in (store.root / "m", store.root / ".verdicts/m"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "p.json").write_bytes(data)
    (store.root / "m/p.memory_cache").write_bytes(b"abc")

    found = store.scan()

    assert KEY in found.unreadable or found.artifacts[KEY].corrupt
    parse_sidecar(data, KEY)
    assert KEY in found.observed()


@pytest.mark.parametrize(
    "name", ["p.\0_cache", "p.a/b_cache", "p..._cache", "../p.a_cache", "p.A\n_cache", "p._cache"]
)
def test_sidecar_cannot_name_another_file(name: str) -> None:
    """A name with a NUL reached stat(2), whose ValueError ended the look.

    It also ended the daemon's reconciler.
    """
    assert not names_artifact(name, "p")
    assert isinstance(parse_sidecar(json.dumps(a_sidecar(artifact=name)).encode(), KEY), str)


def test_pipes_and_giants_in_the_store_are_not_read(tmp_path: Path) -> None:
    """Opening a FIFO would wait for its writer for ever.

    A record of gigabytes would fill the memory.
    """
    store = Store(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / ".verdicts/m").mkdir(parents=True)
    os.mkfifo(tmp_path / "m/fifo.json")
    os.mkfifo(tmp_path / ".verdicts/m/fifo.json")
    for name in ("m/giant.json", ".verdicts/m/giant.json"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(1 << 40)
    os.mkfifo(tmp_path / "m/text.bin")
    for name in (
        "m/fifo.memory_cache",
        "m/giant.memory_cache",
    ):  # else the records would be a stranger's
        (tmp_path / name).write_bytes(b"abc")

    found = store.scan()

    assert set(found.unreadable) == {Key("m", "fifo"), Key("m", "giant")}
    assert found.verdicts == {}
    with pytest.raises(SourceError, match="not a regular file"):
        Digests().digest(tmp_path / "m/text.bin")


@pytest.mark.parametrize("attempts", [1, 5, 1024, 10**9])
def test_a_failure_may_repeat_for_days(attempts: int) -> None:
    """At one attempt a minute, 2.0**attempts became too large for a float after 17 hours.

    That ended the reconciler.
    """
    verdict = verdict_on(errors.ModelLoadError("broken"), "f", attempts)

    assert 0 < verdict.retry_at - time.time() <= MAX_RETRY_S


# Worker frames


@fuzz
@hypothesis.given(st.lists(st.binary(max_size=40), max_size=8), st.booleans())
def test_frames_of_any_bytes(pieces: list[bytes], framed: bool) -> None:
    """In both directions: a message, or a ProtocolError.

    Nothing that is not complete is given out.
    """
    reader = protocol.FrameReader()
    try:
        for piece in pieces:
            data = len(piece).to_bytes(4, "little") + piece if framed else piece
            for body in reader.feed(data):
                for decode in (protocol.decode_to_worker, protocol.decode_from_worker):
                    with pytest.raises(protocol.ProtocolError):
                        decode(body)
    except protocol.ProtocolError:
        pass


@fuzz
@hypothesis.given(
    st.sampled_from(
        [
            *("start", "build", "generate", "check", "embed", "rank", "abort"),
            *("ready", "loaded", "piece", "done"),
        ]
    ),
    st.dictionaries(
        st.sampled_from(["id", "prompt", "text", "spec", "stats", "cache", "path", "sampling"]),
        JSON,
    ),
)  # fmt: skip
def test_messages_of_any_fields(tag: str, fields: dict[str, Any]) -> None:
    """A tag that exists with fields of any type: a message or a ProtocolError."""
    body = json.dumps({"type": tag, **fields}).encode()
    for decode in (protocol.decode_to_worker, protocol.decode_from_worker):
        try:
            decode(body)
        except protocol.ProtocolError as error:
            assert "not a message" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff" * 64,
        b"\x02\x00\x00\x00{}",
        (1 << 31).to_bytes(4, "little") + b"x" * 1000,
        protocol.frame(protocol.Abort(id=1)),
        b"\x10\x00\x00\x00" + b"[" * 16,
    ],
)
def test_worker_leaves_when_the_daemon_talks_nonsense(sent: bytes) -> None:
    """A worker that hears what is no message ends by itself; it neither hangs nor answers."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            isolated.command("rkcached.worker.child", str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            ours.sendall(sent)
            ours.shutdown(socket.SHUT_WR)
            child.wait(60)
            assert ours.recv(100) == b""
        finally:
            child.kill()
            child.wait()


# Prompt caches, for each engine's loader

LOAD_MANY = """
import random, sys, pathlib, importlib, tempfile
from rkcached.engines.base import ModelSpec
from rkcached.errors import EngineError
module, name, model, good, rounds = sys.argv[1:]
good = pathlib.Path(good).read_bytes()
chance = random.Random(1)
folder = pathlib.Path(tempfile.mkdtemp(dir=pathlib.Path(sys.argv[4]).parent))
engine = getattr(importlib.import_module(module), name)(
    ModelSpec(path=model, context_tokens=256, threads=1, scratch_dir=str(folder)))
refused = 0
for _ in range(int(rounds)):
    data = bytearray(good)
    match chance.randrange(4):
        case 0: data = data[: chance.randrange(len(data))]
        case 1: data = bytearray(chance.randbytes(chance.randrange(2000)))
        case 2: data[: 16] = chance.randbytes(16)
        case 3: data += chance.randbytes(100)
    path = folder / "c"
    path.write_bytes(data)
    try:
        engine.load(path)
    except EngineError:
        refused += 1
print("refused", refused)
"""


def test_memory_engine_refuses_damaged_files(tmp_path: Path) -> None:
    """Random damage: refused with an EngineError, each time, in a process that ends in order."""
    model = tmp_path / "m.model"
    model.write_bytes(msgspec.json.encode(MemoryModel()))
    good = tmp_path / "good"
    good.write_bytes(
        b"RKCMEMKV" + (1).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"hello" + bytes(40)
    )
    done = subprocess.run(
        [
            *(sys.executable, "-c", LOAD_MANY, "rkcached.engines.memory", "MemoryEngine"),
            *(str(model), str(good), "500"),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout.split()[1]) >= 480


LLAMA_LOADS = """
import pathlib, random, sys
from rkcached.engines.base import ModelSpec
from rkcached.engines.llamacpp.engine import LlamaCppEngine
from rkcached.errors import EngineError
model, scratch, kind = sys.argv[1:]
path = pathlib.Path(scratch, "cache")
engine = LlamaCppEngine(ModelSpec(path=model, context_tokens=256, threads=1, scratch_dir=scratch))
engine.prefill("You are a cook. " * 5, save_to=path)
good, chance, refused = path.read_bytes(), random.Random(1), 0
for _ in range(10):
    match kind:
        case "random": data = chance.randbytes(chance.randrange(1, 3000))
        case "header": data = chance.randbytes(16) + good[16:]
        case "cut": data = good[: chance.randrange(len(good))]
    path.write_bytes(data)
    try:
        engine.load(path)
    except EngineError:
        refused += 1
print("refused", refused)
engine.close()
"""


@pytest.mark.model
@pytest.mark.parametrize("kind", ["random", "header", "cut"])
def test_llamacpp_refuses_or_ends_its_own_process(tmp_path: Path, kind: str) -> None:
    """Random bytes are refused.

    A file that is cut off ends the process: why size and digest are compared before.
    """
    done = subprocess.run(
        [sys.executable, "-c", LLAMA_LOADS, str(small_model()), str(tmp_path), kind],
        capture_output=True,
        timeout=120,
        check=False,
    )

    if kind == "cut":
        assert done.returncode == -signal.SIGABRT or b"refused 10" in done.stdout
    else:
        assert (done.returncode, done.stdout.split()) == (0, [b"refused", b"10"])
