"""A build that goes on from a prompt cache reads only the rest, and proves it as any other."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from rkcached.engines.base import EngineInfo, ModelSpec, OnProgress, RunStats, Sampling
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.memory import MemoryEngine, MemoryModel, expected_text
from rkcached.errors import Aborted, EngineError, VerifyFailed, WorkerDied
from rkcached.host.digests import signature_of
from rkcached.reconcile.bases import Bases
from rkcached.reconcile.index import ArtifactIndex
from rkcached.sources.records import Key
from rkcached.store.sidecar import Figures, Sidecar, StoredArtifact
from rkcached.worker import protocol
from rkcached.worker.building import KEEP_MS
from rkcached.worker.operations import Session

OLD = "You keep a café in Zürich. You never forget the salt. " * 4
NEW = OLD[:-20] + "You never forget the pepper, either. "
COMMON = len(os.path.commonprefix((OLD.encode(), NEW.encode())))  # noqa: RUF071 - of bytes
TAIL = "What are you for?"
SAMPLING = Sampling(max_new_tokens=40, temperature=0.0)


class Unsure(MemoryEngine):
    """Nobody says whether it saves a state right that it has continued."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(super().info, saves_continued=False)


class Spoiling(Unsure):
    """Continues a state wrongly, in memory and in the file alike."""

    def prefill(
        self,
        prompt: str,
        *,
        save_to: Path,
        on_progress: OnProgress | None = None,
        keep_state: bool = False,
    ) -> RunStats:
        if keep_state and self._states:
            self._states[COMMON - 1] ^= 1
        return super().prefill(
            prompt, save_to=save_to, on_progress=on_progress, keep_state=keep_state
        )


class Bench:
    """Sessions over one memory model; files lie beside it."""

    def __init__(self, folder: Path, model: MemoryModel | None = None) -> None:
        self.folder = folder
        self.model = folder / "model.json"
        self.model.write_bytes(msgspec.json.encode(model or MemoryModel()))
        self.events: list[protocol.FromWorker] = []
        self.stopped: Callable[[], bool] = lambda: False

    def session(self, engine: type[MemoryEngine] = MemoryEngine) -> Session:
        return Session(engine(ModelSpec(path=str(self.model), context_tokens=0)))

    def build(
        self,
        session: Session,
        text: str,
        *,
        base: protocol.Base | None = None,
        verify: VerifyMode = VerifyMode.EXACT,
    ) -> protocol.Built:
        self.events.clear()
        operation = protocol.Build(
            id=1,
            prefix=text,
            probe=text + TAIL,
            path=str(self.folder / "staged"),
            verify=verify,
            min_tokens=0,
            base=base,
            partial=str(self.folder / "partial"),
        )
        return session.build(operation, self.events.append, self.stopped)

    def base(self, text: str = OLD) -> protocol.Base:
        """A prompt cache that was built and proven."""
        built = self.build(self.session(), text)
        path = (self.folder / "staged").rename(self.folder / "base")
        return protocol.Base(
            cache=cache_file(path),
            tokens=built.tokens,
            prefill_ms=built.prefill_ms,
            probe=text + TAIL,
            answer=built.answer,
        )

    def is_right(self, text: str) -> bool:
        """Whether the staged file answers as a state that was read as a whole."""
        session = self.session()
        session.engine.load(self.folder / "staged")
        pieces: list[str] = []
        stats = session.engine.generate(
            text + TAIL, SAMPLING, lambda token: bool(pieces.append(token.text))
        )
        assert stats.cached_tokens == len(text.encode())
        return "".join(pieces) == expected_text(self.model.read_bytes(), text + TAIL, SAMPLING)


def cache_file(path: Path) -> protocol.CacheFile:
    return protocol.CacheFile(path=str(path), signature=signature_of(path.stat()), fingerprint="b")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, MemoryModel(prefill_us_per_token=50))


def test_only_what_is_new_is_read(bench: Bench) -> None:
    """The rest comes from the base, and the file is as if all had been read."""
    built = bench.build(bench.session(), NEW, base=bench.base())
    assert (built.reused_tokens, built.base_error) == (COMMON, "")
    assert (built.tokens, built.verified) == (len(NEW.encode()), VerifyMode.EXACT)
    done = [event.done_tokens for event in bench.events if isinstance(event, protocol.Progress)]
    assert (done[0], done[-1]) == (COMMON, built.tokens)
    assert bench.is_right(NEW)


def test_the_time_of_a_whole_prefill_is_that_of_its_parts(bench: Bench) -> None:
    """Else a prompt cache that was built quickly would seem to save nothing."""
    base = bench.base()
    built = bench.build(bench.session(), NEW, base=base)
    assert built.prefill_ms > base.prefill_ms * COMMON / base.tokens
    assert built.cold_ttft_ms > built.warm_ttft_ms
    assert built.proof_ms > 0


@pytest.mark.parametrize("new", [OLD + "And more.", OLD[:100], OLD])
def test_a_base_may_be_a_beginning_longer_or_the_same(bench: Bench, new: str) -> None:
    """At least one token is read anew."""
    built = bench.build(bench.session(), new, base=bench.base())
    assert built.reused_tokens == min(len(OLD.encode()), len(new.encode()) - 1)
    assert bench.is_right(new)


def test_a_wrong_base_is_found_by_its_proof(bench: Bench) -> None:
    """Its tokens are right and its state is not: the build reads everything, and says why."""
    base = bench.base()
    path = Path(base.cache.path)
    data = bytearray(path.read_bytes())
    data[-8 * len(OLD.encode()) + 8 * 50] ^= 1
    for position in range(50, len(OLD.encode())):  # every later number follows from it in truth
        data[-8 * (len(OLD.encode()) - position)] ^= 1
    path.write_bytes(data)
    wrong = msgspec.structs.replace(base, cache=cache_file(path))
    built = bench.build(bench.session(), NEW, base=wrong)
    assert (built.reused_tokens, built.base_error) == (
        0,
        "its answer is another one than when it was proven",
    )
    assert bench.is_right(NEW)


def test_a_base_that_is_gone_is_no_trouble(bench: Bench) -> None:
    """Nor one that was replaced: the build reads everything."""
    base = bench.base()
    Path(base.cache.path).unlink()
    built = bench.build(bench.session(), NEW, base=base)
    assert (built.reused_tokens, "replaced" in built.base_error) == (0, True)
    assert bench.is_right(NEW)


def test_a_base_that_the_library_refuses_is_no_trouble(bench: Bench) -> None:
    """As one that was cut off."""
    base = bench.base()
    path = Path(base.cache.path)
    path.write_bytes(path.read_bytes()[:-1])
    damaged = msgspec.structs.replace(base, cache=cache_file(path))
    built = bench.build(bench.session(), NEW, base=damaged)
    assert (built.reused_tokens, "damaged" in built.base_error) == (0, True)
    assert bench.is_right(NEW)


def test_an_engine_that_continues_wrongly_is_found_out(bench: Bench) -> None:
    """In memory and in the file it is wrong alike, so only a whole read shows it.

    Nothing of the wrong state is left in memory.
    """
    base = bench.base()
    session = bench.session(Spoiling)
    with pytest.raises(VerifyFailed, match="as a whole"):
        bench.build(session, NEW, base=base)
    stats = session.engine.generate(NEW, SAMPLING, lambda _: False)
    assert stats.cached_tokens == 0


def test_an_engine_is_compared_once(bench: Bench) -> None:
    """When it has shown that it continues rightly, a build costs no whole read any more."""
    base = bench.base()
    session = bench.session(Unsure)
    read: list[int] = []
    generate = session.engine.generate

    def counted(*arguments: object, **options: object) -> RunStats:
        stats = generate(*arguments, **options)  # type: ignore[arg-type]
        read.append(stats.prefill_tokens or 0)
        return stats

    session.engine.generate = counted  # type: ignore[method-assign]
    for _ in range(2):
        read.clear()
        assert bench.build(session, NEW, base=base).reused_tokens == COMMON
        whole = [tokens for tokens in read if tokens > len(NEW.encode())]
        assert len(whole) == (1 if _ == 0 else 0)


def test_an_engine_that_nobody_can_compare_reads_everything(bench: Bench) -> None:
    """Without an exact proof there is nothing that would show a wrong state."""
    built = bench.build(bench.session(Unsure), NEW, base=bench.base(), verify=VerifyMode.HIT)
    assert (built.reused_tokens, "compared" in built.base_error) == (0, True)


# --- a build that is stopped ---


def stopped_after(tokens: int, bench: Bench) -> Callable[[], bool]:
    def stopped() -> bool:
        done = [event.done_tokens for event in bench.events if isinstance(event, protocol.Progress)]
        return bool(done) and done[-1] >= tokens

    return stopped


def kept_of(bench: Bench) -> protocol.Kept:
    (kept,) = (event for event in bench.events if isinstance(event, protocol.Kept))
    return kept


def test_a_build_that_is_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    """What it had read is kept, and is not read again."""
    bench = Bench(tmp_path, MemoryModel(prefill_us_per_token=4000))
    bench.stopped = stopped_after(120, bench)
    with pytest.raises(Aborted):
        bench.build(bench.session(), NEW)
    kept = kept_of(bench)
    assert 120 <= kept.tokens < len(NEW.encode())
    assert kept.prefill_ms > KEEP_MS

    bench.stopped = lambda: False
    partial = (tmp_path / "partial").rename(tmp_path / "base")
    base = protocol.Base(cache=cache_file(partial), tokens=kept.tokens, prefill_ms=kept.prefill_ms)
    built = bench.build(bench.session(), NEW, base=base)
    assert (built.reused_tokens, built.verified) == (kept.tokens, VerifyMode.EXACT)
    assert built.prefill_ms >= len(NEW.encode()) * 4 * 0.9
    assert bench.is_right(NEW)


def test_what_took_no_time_is_not_kept(bench: Bench) -> None:
    """Whoever interrupts the build would wait for the write."""
    bench.stopped = stopped_after(1, bench)
    with pytest.raises(Aborted):
        bench.build(bench.session(), NEW)
    assert not (bench.folder / "partial").exists()


def test_a_build_that_is_stopped_in_its_proof_keeps_its_file(tmp_path: Path) -> None:
    """All of it is read: only the proof is made anew."""
    bench = Bench(tmp_path, MemoryModel(prefill_us_per_token=3000))
    bench.stopped = stopped_after(len(NEW.encode()), bench)
    with pytest.raises(Aborted):
        bench.build(bench.session(), NEW)
    assert kept_of(bench).tokens == len(NEW.encode())
    assert not (tmp_path / "staged").exists()
    assert bench.session().engine.load(tmp_path / "partial") == len(NEW.encode())


def test_a_state_that_cannot_be_kept_leaves_no_file(tmp_path: Path) -> None:
    """A full disk costs the work, and nothing else."""

    class Full(MemoryEngine):
        def save(self, path: Path) -> int:
            path.write_bytes(b"half")
            raise EngineError("no space")

    bench = Bench(tmp_path, MemoryModel(prefill_us_per_token=4000))
    bench.stopped = stopped_after(120, bench)
    with pytest.raises(Aborted):
        bench.build(bench.session(Full), NEW)
    assert not (tmp_path / "partial").exists()
    assert not [event for event in bench.events if isinstance(event, protocol.Kept)]


# --- the choice ---


def stored(
    name: str,
    text: str,
    *,
    temperature: str = "0",
    verified: str = "exact",
    **figures: float,
) -> StoredArtifact:
    """An artifact of 1 ms to a byte, which loads in 5 ms and answers in 20."""
    components = {"params.temperature": temperature, "prefix.digest": text}
    return StoredArtifact(
        folder=Path("/cache/m"),
        sidecar=Sidecar(
            model="m",
            prompt=name,
            artifact=f"{name}.memory_cache",
            fingerprint=f"of {name}",
            components=components,
            size_bytes=1,
            sha256="",
            text_sha256="",
            tokens=len(text),
            built_at=0.0,
            build_ms=0.0,
            figures=Figures(
                prefill_ms=figures.get("prefill_ms", float(len(text))),
                load_ms=5.0,
                cold_ttft_ms=0.0,
                warm_ttft_ms=20.0,
                verified=verified,
            ),
            answer_sha256="answer",
        ),
        signature=(1, 2, 3, 4, 5),
        text=text.encode(),
    )


def chosen(artifact: StoredArtifact, text: str = NEW, *, old: bool = False) -> protocol.Base | None:
    by_key = {Key("m", artifact.sidecar.prompt): artifact}
    index = ArtifactIndex({}, by_key) if old else ArtifactIndex(by_key)
    components = {"params.temperature": "0", "prefix.digest": text}
    return Bases().choose(index, "m", components, text, text + TAIL)


@pytest.mark.parametrize("old", [True, False])
def test_what_begins_alike_is_gone_on_from(*, old: bool) -> None:
    """Of another prompt, or of this one before an edit."""
    base = chosen(stored("a", OLD), old=old)
    assert base is not None
    assert (base.cache.path, base.tokens, base.is_beginning) == (
        "/cache/m/a.memory_cache",
        len(OLD),
        False,
    )
    assert (base.probe, base.answer) == (OLD + TAIL, "answer")
    beginning = chosen(stored("a", OLD), OLD + "And more.")
    assert beginning is not None
    assert beginning.is_beginning


def test_what_shares_little_is_not_worth_its_load() -> None:
    """By what was measured: 25 ms to load and ask, against what reading it took."""
    assert chosen(stored("a", NEW[:30] + "another end" * 20)) is not None
    assert chosen(stored("a", NEW[:15] + "another end" * 20)) is None
    assert chosen(stored("a", OLD, prefill_ms=20.0)) is None


def test_what_was_not_proven_is_left_alone() -> None:
    """With `verify: off` nobody measured whether its load is worth it, nor whether it is right."""
    assert chosen(stored("a", OLD, verified="off")) is None


def test_what_differs_in_more_than_its_text_is_left_alone() -> None:
    """Its state may be another one."""
    assert chosen(stored("a", OLD, temperature="1")) is None


def test_a_model_is_given_up_when_its_runtime_shows_that_it_cannot() -> None:
    """A worker that dies may have done so for another reason, once."""
    bases = Bases()
    bases.failed("one", "m", WorkerDied("killed"))
    assert bases.may_help("one")
    bases.helped("one")
    bases.failed("one", "m", WorkerDied("killed"))
    assert bases.may_help("one")
    bases.failed("one", "m", WorkerDied("killed"))
    assert not bases.may_help("one")
    bases.failed("other", "m", VerifyFailed("wrong"))
    assert not bases.may_help("other")
    assert bases.may_help("third")
