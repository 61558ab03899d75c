"""Builds that go on from a prompt cache, on the stand-in of RKLLM's library.

Nobody documents what a save-run makes of a loaded prompt cache. So a model that does it rightly is
believed after one comparison with a state that was read as a whole, and one that does anything else
is found out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rkcached.engines.base import ModelSpec, Sampling
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.rkllm.engine import RkllmEngine
from rkcached.errors import VerifyFailed
from rkcached.host.digests import signature_of
from rkcached.worker import protocol
from rkcached.worker.operations import Session
from tests.rkllm_standin import standin
from tests.rkllm_standin.tokens import byte_tokenizer

OLD = "You keep a cafe in Zurich. You never forget the salt. " * 4
NEW = OLD + "Nor the pepper."
TAIL = "What are you for?"
BOS = 1


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtime")


class Bench:
    def __init__(self, folder: Path, libraries: Path, group: str, **keys: object) -> None:
        group, _, tokens = group.partition("-")
        self.folder = folder
        model = standin.write_model(folder / "m.rkllm", **keys)
        self.spec: dict[str, Any] = {
            "path": str(model),
            "context_tokens": 1024,
            "library": str(standin.build(group, libraries)),
            "abi": "1.1.0" if group == "B" else "",
            "sampling": Sampling(max_new_tokens=20, temperature=0.0),
            "tokenizer": str(byte_tokenizer(folder / "tokenizer.json")) if tokens else "",
        }
        self.bos = 0 if tokens else BOS
        self.session = Session(RkllmEngine(ModelSpec(**self.spec)))

    def build(self, text: str, base: protocol.Base | None = None) -> protocol.Built:
        operation = protocol.Build(
            id=1,
            prefix=text,
            probe=text + TAIL,
            path=str(self.folder / "staged"),
            verify=VerifyMode.EXACT,
            min_tokens=0,
            base=base,
        )
        return self.session.build(operation, lambda _: None, lambda: False)

    def base(self) -> protocol.Base:
        built = self.build(OLD)
        path = (self.folder / "staged").rename(self.folder / "base")
        return protocol.Base(
            cache=protocol.CacheFile(
                path=str(path), signature=signature_of(path.stat()), fingerprint="b"
            ),
            tokens=built.tokens,
            prefill_ms=built.prefill_ms,
            probe=OLD + TAIL,
            answer=built.answer,
        )


@pytest.mark.parametrize("group", ["D", "E", "D-tokens", "E-tokens"])
def test_a_runtime_that_continues_a_cache_reads_only_the_rest(
    tmp_path: Path, libraries: Path, group: str
) -> None:
    """It says so itself, in its count of prefilled tokens; the file is as long as a whole one."""
    bench = Bench(tmp_path, libraries, group)
    base = bench.base()
    for _ in range(2):
        built = bench.build(NEW, base)
        assert (built.reused_tokens, built.tokens, built.base_error) == (
            len(OLD) + bench.bos,
            len(NEW) + bench.bos,
            "",
        )
    whole = bench.build(NEW)
    assert (whole.answer, whole.tokens) == (built.answer, built.tokens)
    bench.session.engine.close()


@pytest.mark.parametrize("group", ["D", "E-tokens"])
def test_a_runtime_that_reads_everything_all_the_same_builds_rightly(
    tmp_path: Path, libraries: Path, group: str
) -> None:
    """Nothing is reused, and nothing is claimed to be."""
    bench = Bench(tmp_path, libraries, group, continued="ignored")
    built = bench.build(NEW, bench.base())
    assert (built.reused_tokens, built.tokens) == (0, len(NEW) + bench.bos)
    assert bench.build(NEW).answer == built.answer
    bench.session.engine.close()


@pytest.mark.parametrize("group", ["D", "E"])
def test_a_runtime_that_continues_wrongly_is_found_out(
    tmp_path: Path, libraries: Path, group: str
) -> None:
    """What is in memory and what is in the file agree with each other, and are both wrong."""
    bench = Bench(tmp_path, libraries, group, continued="spoilt")
    base = bench.base()
    with pytest.raises(VerifyFailed, match="as a whole"):
        bench.build(NEW, base)
    assert bench.build(NEW).verified is VerifyMode.EXACT
    bench.session.engine.close()


@pytest.mark.parametrize("group", ["B", "C", "C1"])
def test_a_runtime_that_counts_nothing_is_not_asked_to(
    tmp_path: Path, libraries: Path, group: str
) -> None:
    """Nobody could tell whether it helped."""
    bench = Bench(tmp_path, libraries, group, prefill_tps=2000)
    built = bench.build(NEW, bench.base())
    assert (built.reused_tokens, "count" in built.base_error) == (0, True)
    bench.session.engine.close()
