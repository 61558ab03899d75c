"""Engines that do what no engine should, to be hosted by a real worker process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec

from rkcached.engines.base import EngineInfo, ModelSpec, OnProgress, OnToken, RunStats, Sampling
from rkcached.engines.memory import MemoryEngine
from rkcached.errors import EngineError, ModelLoadError
from rkcached.worker import protocol


class _Misbehaving(MemoryEngine):
    """Misbehaves at each request, then answers it, if it still can."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self.spec = spec

    def misbehave(self) -> None:
        raise NotImplementedError

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_token: OnToken,
        *,
        trace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> RunStats:
        self.misbehave()
        return super().generate(prompt, sampling, on_token, trace=trace, on_progress=on_progress)


def _write_to_socket(data: bytes) -> None:
    os.write(int(sys.argv[1]), data)


class Garbage(_Misbehaving):
    """A library that got hold of the wrong descriptor."""

    def misbehave(self) -> None:
        _write_to_socket(b"\xff\xff\xff\xff garbage")


class NotJson(_Misbehaving):
    """A frame of the right length with nonsense in it."""

    def misbehave(self) -> None:
        _write_to_socket(b"\x04\0\0\0oops")


class OutOfTurn(_Misbehaving):
    """An answer to an operation that nobody asked for."""

    def misbehave(self) -> None:
        _write_to_socket(protocol.frame(protocol.Checked(id=999, tokens=1)))


class SecondReady(_Misbehaving):
    """Says hello twice."""

    def misbehave(self) -> None:
        _write_to_socket(protocol.frame(protocol.Ready(info=self.info, load_ms=0.0)))


class Chatty(_Misbehaving):
    """Prints more than a pipe holds, without a newline, and what is no text."""

    def misbehave(self) -> None:
        for fd in (1, 2):
            os.write(fd, b"\xff\0" * 300_000)
            os.write(fd, b"\nlast words\n")


class Raises(_Misbehaving):
    """A defect of ours in an engine."""

    def misbehave(self) -> None:
        raise ZeroDivisionError("a defect")


class LeavesAChild(_Misbehaving):
    """Starts a process that keeps stdout open, and dies."""

    def misbehave(self) -> None:
        sleeper = os.fork()
        if not sleeper:
            os.closerange(3, 256)  # but for stdout, as a program would have it
            time.sleep(30)
            os._exit(0)
        print(f"sleeper {sleeper}", flush=True)
        os._exit(5)


class ShowsEnvironment(MemoryEngine):
    """Tells its environment, session and arguments as its version."""

    @property
    def info(self) -> EngineInfo:
        facts = {"environment": dict(os.environ), "session": os.getsid(0), "pid": os.getpid()}
        return EngineInfo(
            runtime_version=json.dumps(facts),
            context_tokens=64,
            measures_prefill=True,
            aborts_prefill=True,
        )


class EatsMemory(_Misbehaving):
    """Takes a gigabyte for itself, and uses it."""

    def misbehave(self) -> None:
        self._eaten = b"x" * (1 << 30)


class EatsMemoryAtLoad(MemoryEngine):
    """Wants a gigabyte before it is ready, as a context that is too long does.

    Says in its log what failed.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        try:
            b"x" * (1 << 30)
        except MemoryError as error:
            print(
                "E llama: failed to allocate a buffer of 1073741824 bytes",
                file=sys.stderr,
                flush=True,
            )
            raise ModelLoadError("the model cannot be loaded") from error


class AnswersWithoutEnd(_Misbehaving):
    """Sends pieces of an answer, and never its end."""

    def misbehave(self) -> None:
        piece = protocol.frame(protocol.Piece(id=self.operation_id, text="x" * 60_000))
        while True:
            _write_to_socket(piece)

    @property
    def operation_id(self) -> int:
        return int(Path(self.spec.path).with_name("operation").read_text())


class AnswersAnotherQuestion(AnswersWithoutEnd):
    """Has another kind of answer than what was asked for."""

    def misbehave(self) -> None:
        _write_to_socket(protocol.frame(protocol.Checked(id=self.operation_id, tokens=1)))


class HasManyStates(MemoryEngine):
    """Says that it keeps two million KV states, for each of which a place would be made."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(super().info, states=2_000_000)


class TalksToItself(MemoryEngine):
    """Sends frames that nobody has asked for, without end."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._talking = threading.Thread(target=self._talk, daemon=True)
        self._talking.start()

    def _talk(self) -> None:
        piece = protocol.frame(protocol.Piece(id=1, text="x" * 60_000))
        time.sleep(0.5)  # until it has said that it is ready
        for _ in range(2000):  # 120 MB
            _write_to_socket(piece)


class NeedsAnotherFile(MemoryEngine):
    """A vendor's library that reads a file of its own."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        try:
            Path("/etc/passwd").read_bytes()
        except OSError as error:
            print(f"E vendor: cannot read its settings: {error.strerror}", flush=True)
            raise ModelLoadError("the model cannot be loaded") from error


class Listens(_Misbehaving):
    """Has a socket in its scratch folder, and a file of which nobody knows how long it needs it."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("listening")
        Path("temporary").touch()

    def misbehave(self) -> None:
        pass


class AlwaysLosesItsScratch(_Misbehaving):
    """A cleaner comes by in the middle of an operation."""

    def misbehave(self) -> None:
        shutil.rmtree(Path.cwd())
        raise EngineError("the link cannot be made")


class LosesItsScratch(AlwaysLosesItsScratch):
    """Once: the folder beside it remembers."""

    def misbehave(self) -> None:
        mark = Path.cwd().parent.parent / "lost-once"
        if not mark.exists():
            mark.touch()
            super().misbehave()


class Stubborn(_Misbehaving):
    """Deep in native code: neither an abort nor the end of the socket is looked at for a while."""

    def misbehave(self) -> None:
        time.sleep(30)


class FindsNoToken(MemoryEngine):
    """Reads the prompt, and then looks for a token that its grammar allows, without end."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(super().info, constrains_json=True)

    def generate(
        self,
        prompt: str,
        sampling: Sampling,
        on_token: OnToken,
        *,
        trace: bool = False,
        on_progress: OnProgress | None = None,
    ) -> RunStats:
        stats = super().generate(
            prompt,
            msgspec.structs.replace(sampling, max_new_tokens=0, json_schema=""),
            on_token,
            trace=trace,
            on_progress=on_progress,
        )
        if sampling.json_schema:
            time.sleep(30)
        return stats


class FailsToLoad(MemoryEngine):
    """Dies before it is ready, with its reason in the log only."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        print("rknn: out of memory", file=sys.stderr, flush=True)
        os._exit(4)
