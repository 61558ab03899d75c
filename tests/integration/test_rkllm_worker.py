"""A worker on RKLLM whose library hangs: the deadlines end it, and the next one works."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from rkcached.engines.base import ModelSpec, Sampling
from rkcached.engines.kinds import VerifyMode
from rkcached.errors import WorkerTimeout
from rkcached.host.digests import signature_of
from rkcached.worker import protocol
from rkcached.worker.model import Backoff, Deadlines, WorkerModel
from rkcached.worker.supervisor import Worker, WorkerState
from tests.rkllm_standin.standin import build, write_model

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None,
    reason="needs a C compiler",
)

HASTY = Deadlines(start_s=5.0, silence_s=1.0, stop_s=0.5)
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


@pytest.mark.parametrize(
    ("planned", "deadlines"),
    [
        ("run:hang", HASTY),
        ("token3:hang", HASTY),
        ("load:hang", HASTY),
        ("init:hang", Deadlines(start_s=5.0)),
    ],
)
async def test_a_library_that_hangs_is_killed(
    planned: str, deadlines: Deadlines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run, in the middle of an answer, over a cache or while loading.

    A timeout, no process, no scratch left.
    """
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    stuck, cache = tmp_path / "stuck", tmp_path / "a.rkllm_cache"
    model = write_model(tmp_path / "m.rkllm", fault=planned, fault_file=stuck)
    spec = ModelSpec(
        path=str(model),
        context_tokens=4096,
        library=str(build("D", tmp_path)),
        sampling=Sampling(temperature=0.0),
    )
    hosted = WorkerModel(
        name="m",
        identity="1",
        implementation="rkcached.engines.rkllm.engine:RkllmEngine",
        spec=spec,
        idle_unload_s=None,
    )
    worker = Worker(hosted, deadlines=deadlines, backoff=Backoff())

    def operation() -> protocol.Operation:
        if planned == "load:hang" and cache.exists():
            signature = signature_of(cache.stat())
            file = protocol.CacheFile(path=str(cache), signature=signature, fingerprint="1")
            return protocol.Check(cache=file)
        return protocol.Generate(prompt="hello", sampling=GREEDY)

    try:
        await worker.run(
            protocol.Build(
                prefix="You keep a cafe. ",
                probe="You keep a cafe. What is there?",
                path=str(cache),
                verify=VerifyMode.EXACT,
                min_tokens=0,
            )
        )
        if planned == "init:hang":
            await worker.stop()
        stuck.touch()
        with pytest.raises(WorkerTimeout, match=r"sent nothing for \d s"):
            await worker.run(operation())
        assert (worker.state, worker.pid, list(scratch.iterdir())) == (
            WorkerState.BACKOFF,
            None,
            [],
        )
        stuck.unlink()
        await worker.run(operation())
    finally:
        await worker.stop()
    assert (worker.pid, list(scratch.iterdir())) == (None, [])
