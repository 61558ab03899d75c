"""Workers as real processes.

Whatever they do, the daemon knows how they ended and nothing of them stays behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil
import pytest

from rkcached.engines.base import FinishReason, ModelSpec, Sampling
from rkcached.engines.kinds import VerifyMode
from rkcached.engines.memory import Fault, MemoryModel, expected_text
from rkcached.errors import (
    EngineError,
    GrammarStuck,
    ModelLoadError,
    WorkerDied,
    WorkerError,
    WorkerTimeout,
    WorkerUnavailable,
)
from rkcached.host import isolated, landlock
from rkcached.serving.failures import as_request_error
from rkcached.worker import memory, protocol, scratch
from rkcached.worker.model import Backoff, Deadlines, WorkerModel
from rkcached.worker.pool import Workers
from rkcached.worker.process import MAX_WAITING_BYTES
from rkcached.worker.supervisor import Worker, WorkerState
from tests.waiting import DEADLINE_S, wait_until

ROOT = Path(__file__).parents[2]
MEMORY = "rkcached.engines.memory:MemoryEngine"
PROMPT = "You keep a café. Was gibt es heute?"
SAMPLING = Sampling(max_new_tokens=20, temperature=0.0)
SLOW = MemoryModel(decode_us_per_token=20_000)
ENDLESS = Sampling(max_new_tokens=4000, temperature=0.0)
PATIENT = Deadlines(start_s=DEADLINE_S, silence_s=DEADLINE_S, stop_s=5.0)
HASTY = Deadlines(start_s=DEADLINE_S, silence_s=1.0, stop_s=0.3)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def is_gone(pid: int | None) -> bool:
    try:
        return pid is None or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Site:
    """Where workers live: their model file and scratch directories, and every process they had."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scratch = root / "scratch"
        self.scratch.mkdir()
        self.pids: set[int] = set()
        self.workers: list[Worker] = []
        self.model = root / "model.json"

    def worker(
        self,
        model: MemoryModel | None = None,
        *,
        implementation: str = MEMORY,
        deadlines: Deadlines = PATIENT,
        backoff: Backoff | None = None,
        idle_unload_s: float | None = None,
    ) -> Worker:
        spec = self.spec(model, implementation=implementation, idle_unload_s=idle_unload_s)
        worker = Worker(spec, deadlines=deadlines, backoff=backoff or Backoff())
        self.workers.append(worker)
        return worker

    def spec(
        self,
        model: MemoryModel | None = None,
        *,
        implementation: str = MEMORY,
        idle_unload_s: float | None = None,
        identity: str = "1",
        name: str = "m",
    ) -> WorkerModel:
        self.model.write_bytes(msgspec.json.encode(model or MemoryModel()))
        return WorkerModel(
            name=name,
            identity=identity,
            implementation=implementation,
            spec=ModelSpec(path=str(self.model), context_tokens=4096),
            idle_unload_s=idle_unload_s,
        )

    def misbehaving(
        self, name: str, *, deadlines: Deadlines = PATIENT, max_memory_bytes: int | None = None
    ) -> Worker:
        worker = self.worker(
            implementation=f"tests.integration.misbehaving:{name}", deadlines=deadlines
        )
        worker.model = replace(worker.model, max_memory_bytes=max_memory_bytes)
        return worker

    async def ask(self, worker: Worker, sampling: Sampling = SAMPLING) -> tuple[str, protocol.Done]:
        await worker.ensure()
        self.note(worker)
        pieces: list[str] = []

        def on_event(event: protocol.FromWorker) -> None:
            if isinstance(event, protocol.Piece):
                pieces.append(event.text)

        done = await worker.run(protocol.Generate(prompt=PROMPT, sampling=sampling), on_event)
        assert isinstance(done, protocol.Done)
        return "".join(pieces), done

    async def answers(self, worker: Worker) -> bool:
        """Whether it gives the right answer now."""
        text, _ = await self.ask(worker)
        return text == expected_text(self.model.read_bytes(), PROMPT, SAMPLING)

    def note(self, worker: Worker) -> int:
        pid = worker.pid
        assert pid is not None
        self.pids.add(pid)
        return pid

    def is_clean(self) -> bool:
        return all(map(is_gone, self.pids)) and not list(self.scratch.iterdir())


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(site.scratch))
    for name in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    ours = isolated.folders()
    monkeypatch.setattr(
        isolated, "folders", lambda: [*ours, str(ROOT)]
    )  # where the misbehaving engines are
    yield site
    for worker in site.workers:
        await worker.stop()
        assert worker.pid is None
    assert site.is_clean()


# --- a good life ---


async def test_a_worker_starts_answers_and_stops(site: Site) -> None:
    """Its process and its scratch directory live as long as it does; stopping twice is one."""
    worker = site.worker()
    assert (worker.state, worker.pid) == (WorkerState.STOPPED, None)
    info = await worker.ensure()
    assert (info.context_tokens, worker.state) == (4096, WorkerState.READY)
    assert len(list(site.scratch.iterdir())) == 1
    pid = site.note(worker)
    assert await site.answers(worker)
    assert await site.answers(worker)
    assert (worker.pid, worker.state) == (pid, WorkerState.READY)
    await worker.stop()
    await worker.stop()
    assert (worker.state, worker.pid, worker.info, site.is_clean()) == (
        WorkerState.STOPPED,
        None,
        None,
        True,
    )
    assert await site.answers(worker)


async def test_a_build_reports_progress_and_proves_itself(site: Site) -> None:
    """Through the wire as in a test of the session alone."""
    worker, events = site.worker(), list[protocol.FromWorker]()
    operation = protocol.Build(
        prefix="You keep",
        probe=PROMPT,
        path=str(site.root / "built"),
        verify=VerifyMode.EXACT,
        min_tokens=0,
    )
    built = await worker.run(operation, events.append)
    site.note(worker)
    assert isinstance(built, protocol.Built)
    assert built.tokens == 8
    assert events[-1] == protocol.Progress(id=operation.id, done_tokens=8, total_tokens=8)


async def test_an_engines_refusal_leaves_the_worker_running(site: Site) -> None:
    """It is the request that was wrong."""
    worker = site.worker(MemoryModel(faults=(Fault(op="generate", kind="error", at=3),)))
    with pytest.raises(EngineError, match="fault at generate 3"):
        await site.ask(worker)
    pid = worker.pid
    assert await site.answers(worker)
    assert (worker.pid, worker.restarts, worker.retry_in_s()) == (pid, 0, 0.0)


async def test_what_a_library_prints_disturbs_nobody(site: Site) -> None:
    """Garbage, endless lines, more than a pipe holds."""
    worker = site.worker(MemoryModel(faults=(Fault(op="generate", kind="garbage_stdout", at=2),)))
    assert await site.answers(worker)
    assert await site.answers(site.misbehaving("Chatty"))


async def test_the_environment_is_scrubbed_and_the_session_its_own(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What systemd tells the daemon is not for its children, and Ctrl-C at the terminal neither."""
    for name in (
        "NOTIFY_SOCKET",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "yes")
    worker = site.misbehaving("ShowsEnvironment")
    facts = json.loads((await worker.ensure()).runtime_version)
    assert facts["pid"] == facts["session"] == site.note(worker)
    assert facts["environment"]["KEPT"] == "yes"
    assert not [
        name
        for name in facts["environment"]
        if name.startswith(("NOTIFY_", "LISTEN_", "WATCHDOG_"))
    ]


# --- scratch folders ---


async def test_a_worker_whose_scratch_folder_is_deleted_is_replaced(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    """Cleaners of temporary files do so.

    The very next request is answered, without a pause, and the log says why.
    """
    worker = site.worker()
    assert await site.answers(worker)
    first = site.note(worker)
    (folder,) = site.scratch.iterdir()
    shutil.rmtree(folder)
    assert await site.answers(worker)
    assert is_gone(first)
    assert (worker.restarts, worker.last_failure) == (
        1,
        f"its scratch folder was deleted: {folder}",
    )
    assert "worker restarted" in caplog.messages
    assert len(list(site.scratch.iterdir())) == 1


async def test_a_worker_whose_socket_is_deleted_is_replaced(site: Site) -> None:
    """Some cleaners take files one by one. Another file of the library may come and go."""
    worker = site.misbehaving("Listens")
    await site.ask(worker)
    first = site.note(worker)
    (folder,) = site.scratch.iterdir()
    (folder / "temporary").unlink()
    await site.ask(worker)
    assert worker.pid == first
    (folder / "listening").unlink()
    await site.ask(worker)
    assert worker.pid != first


async def test_a_scratch_folder_that_is_deleted_while_answering(site: Site) -> None:
    """The engine fails, and the request is run once more, on another worker."""
    worker = site.misbehaving("LosesItsScratch")
    assert await site.answers(worker)
    assert worker.restarts == 1


async def test_a_scratch_folder_that_is_deleted_at_each_try(site: Site) -> None:
    """The second failure is told; nobody tries for ever."""
    worker = site.misbehaving("AlwaysLosesItsScratch")
    with pytest.raises(EngineError, match="the link cannot be made"):
        await site.ask(worker)
    assert worker.restarts == 1


HOLDER = """
import sys, tempfile
from rkcached.worker.scratch import Scratch
print(Scratch().path, flush=True)
sys.stdin.read()
"""


def test_scratch_folders_are_swept_by_their_lock(site: Site) -> None:
    """Whose holder lives is left alone, whatever its pid; who was killed leaves it behind.

    Others' are not ours.
    """
    others = site.scratch / "rkcached-1-old"
    others.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(site.scratch)},
    ) as holder:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        (folder / "file").touch()
        scratch.sweep()
        assert (folder / "file").exists()
        holder.kill()
    assert folder.exists()
    scratch.sweep()
    assert not folder.exists()
    others.rmdir()


def test_a_name_makes_no_scratch_folder(site: Site) -> None:
    """A user's folder of such a name stays, with any mark that is not ours."""
    notes = site.scratch / f"{scratch.PREFIX}mynotes"
    notes.mkdir(mode=0o700)
    (notes / "precious").write_text("keep me")
    scratch.sweep()
    (notes / scratch.MARK).symlink_to(notes / "precious")
    scratch.sweep()
    (notes / scratch.MARK).unlink()
    (notes / scratch.MARK).write_text("a text of somebody else")
    scratch.sweep()
    assert (notes / "precious").read_text() == "keep me"
    shutil.rmtree(notes)


def test_scratch_folders_are_in_the_runtime_directory(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In systemd's for the daemon, in the user's own, never in one that others may write.

    Where there is none, it is in the temporary folder.
    """
    runtime, user, open_to_all = (site.root / name for name in ("runtime", "user", "open"))
    for folder in (runtime, user, open_to_all):
        folder.mkdir(mode=0o700)
    open_to_all.chmod(0o777)
    assert scratch.parent() == str(site.scratch)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(user))
    assert scratch.parent() == str(user)
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{runtime}:/other")
    assert scratch.parent() == str(runtime)
    for useless in (open_to_all, site.root / "none", "relative"):
        monkeypatch.setenv("RUNTIME_DIRECTORY", str(useless))
        assert scratch.parent() == str(user)
    made = scratch.Scratch()
    assert Path(made.path).parent == user
    assert Path(made.path).stat().st_mode & 0o777 == 0o700
    made.remove()
    made.remove()
    assert list(user.iterdir()) == []


# --- deaths ---

ENDINGS = {
    "segfault": "was killed by SIGSEGV",
    "abort": "was killed by SIGABRT",
    "exit": "exited with code 3",
}


@pytest.mark.parametrize("kind", ENDINGS)
async def test_a_crash_while_answering_is_told_and_the_next_request_works(
    site: Site, kind: str
) -> None:
    """The running request fails with the cause; the first failure costs no delay."""
    worker = site.worker(
        MemoryModel(faults=(msgspec.convert({"op": "generate", "kind": kind, "at": 30}, Fault),))
    )
    assert await site.answers(worker)
    with pytest.raises(WorkerDied, match=ENDINGS[kind]):
        await site.ask(worker)
    assert (worker.state, worker.pid, worker.restarts) == (WorkerState.BACKOFF, None, 1)
    assert ENDINGS[kind] in worker.last_failure
    assert await site.answers(worker)


@pytest.mark.parametrize("kind", ENDINGS)
async def test_a_crash_at_start_is_told(site: Site, kind: str) -> None:
    """As a death, not as an endless wait."""
    worker = site.worker(
        MemoryModel(faults=(msgspec.convert({"op": "init", "kind": kind}, Fault),))
    )
    with pytest.raises(WorkerDied, match=ENDINGS[kind]):
        await worker.ensure()
    assert (worker.state, worker.pid) == (WorkerState.BACKOFF, None)


async def test_a_crash_while_building_is_told(site: Site) -> None:
    """During the prefill."""
    worker = site.worker(MemoryModel(faults=(Fault(op="prefill", kind="segfault"),)))
    with pytest.raises(WorkerDied, match="SIGSEGV"):
        await worker.run(
            protocol.Build(
                prefix="a",
                probe="ab",
                path="/dev/null",
                verify=VerifyMode.OFF,
                min_tokens=0,
            )
        )


async def test_a_death_tells_the_last_words(site: Site) -> None:
    """A native library gives its reason in the log only."""
    with pytest.raises(WorkerDied, match=r"exited with code 4; its last line: rknn: out of memory"):
        await site.misbehaving("FailsToLoad").ensure()


async def test_a_defect_in_an_engine_is_a_death_with_its_traceback(site: Site) -> None:
    """The last line names the exception."""
    with pytest.raises(WorkerDied, match="ZeroDivisionError: a defect"):
        await site.ask(site.misbehaving("Raises"))


async def test_a_model_that_cannot_be_loaded_is_a_refusal_and_rests(site: Site) -> None:
    """The engine's own error comes through; trying again at once would be of no use."""
    worker = site.worker(backoff=Backoff(base_s=60.0))
    site.model.write_bytes(b"{}")
    for _ in range(2):
        with pytest.raises(ModelLoadError, match="is not a memory model"):
            await worker.ensure()
    with pytest.raises(WorkerUnavailable, match="is backing off after 2 consecutive failures"):
        await worker.ensure()
    assert worker.state is WorkerState.BACKOFF


@pytest.mark.parametrize("op", ["init", "generate"])
async def test_a_hang_is_killed_at_its_deadline(site: Site, op: str) -> None:
    """Loading and answering have their own."""
    model = MemoryModel(faults=(msgspec.convert({"op": op, "kind": "hang", "at": 1}, Fault),))
    never_s = 10 * DEADLINE_S
    loading, answering = (1.0, never_s) if op == "init" else (never_s, 0.3)
    worker = site.worker(
        model, deadlines=Deadlines(start_s=loading, silence_s=answering, stop_s=0.3)
    )
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(WorkerTimeout, match="sent nothing for"):
            await site.ask(worker)
    assert (worker.state, worker.pid) == (WorkerState.BACKOFF, None)


async def test_a_slow_answer_that_keeps_coming_is_not_a_hang(site: Site) -> None:
    """The deadline is for silence, not for the whole."""
    worker = site.worker(MemoryModel(decode_us_per_token=80_000), deadlines=HASTY)
    _, done = await site.ask(worker)
    assert done.stats.decode_ms > HASTY.silence_s * 1000


@pytest.mark.parametrize("name", ["Garbage", "NotJson", "OutOfTurn", "SecondReady"])
async def test_what_breaks_the_protocol_is_killed(site: Site, name: str) -> None:
    """After garbage on the wire nothing that comes from it can be believed."""
    worker = site.misbehaving(name)
    with pytest.raises(WorkerDied, match="broke the protocol"):
        await site.ask(worker)
    assert (worker.state, worker.pid) == (WorkerState.BACKOFF, None)


@pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")
async def test_a_library_that_needs_more_than_it_may_have_is_explained(site: Site) -> None:
    """Nobody knows all vendors' libraries."""
    worker = Worker(
        site.spec(implementation="tests.integration.misbehaving:NeedsAnotherFile"),
        deadlines=PATIENT,
        backoff=Backoff(),
        reach=lambda _: landlock.Reach(read=(str(ROOT / "tests"),)),  # where it lies
    )
    site.workers.append(worker)
    with pytest.raises(ModelLoadError) as caught:
        await worker.ensure()
    assert "confine: false" in caught.value.hint
    worker.model = replace(worker.model, confine=False)
    await asyncio.sleep(worker.retry_in_s())
    await worker.ensure()
    site.note(worker)


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("AnswersWithoutEnd", r"broke the protocol: sent an answer of \d{2,3},\d{3} letters"),
        ("AnswersAnotherQuestion", "broke the protocol: answered Generate with Checked"),
    ],
)
async def test_a_worker_that_lies_is_ended(site: Site, engine: str, why: str) -> None:
    """Its words would fill the daemon's memory, or reach a client as something else."""
    worker = site.misbehaving(engine)
    await worker.ensure()
    site.note(worker)
    operation = protocol.Generate(prompt=PROMPT, sampling=SAMPLING)
    (site.root / "operation").write_text(str(operation.id))
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(WorkerDied, match=why):
            await worker.run(operation)


async def test_a_worker_that_says_what_no_engine_can_is_ended(site: Site) -> None:
    worker = site.misbehaving("HasManyStates")
    with pytest.raises(WorkerDied, match="broke the protocol"):
        await worker.ensure()


async def test_what_an_idle_worker_sends_is_left_in_its_socket(site: Site) -> None:
    """Nobody takes it, so it would be kept in memory until the worker ends."""
    worker = site.misbehaving("TalksToItself")
    await worker.ensure()
    site.note(worker)
    link = worker._process._link
    assert link is not None
    await until(lambda: link._waiting_bytes > MAX_WAITING_BYTES)
    held = link._waiting_bytes
    assert held < MAX_WAITING_BYTES + (1 << 20)
    for _ in range(20):
        await asyncio.sleep(0)
    assert link._waiting_bytes == held


async def test_a_schema_for_which_no_token_is_found_is_refused(site: Site) -> None:
    """Long before a worker that says nothing is ended otherwise; and only with a schema."""
    worker = site.misbehaving("FindsNoToken", deadlines=replace(PATIENT, grammar_s=0.3))
    await site.ask(worker)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(GrammarStuck, match=r"no token that fits this schema within 0.3 s"):
            await site.ask(worker, msgspec.structs.replace(SAMPLING, json_schema="{}"))
    assert worker.state is WorkerState.BACKOFF
    refusal = as_request_error(GrammarStuck("it is stuck"))
    assert (refusal.status, refusal.code) == (400, "invalid_schema")
    await site.ask(worker)


async def test_a_process_that_a_library_left_behind_holds_nobody_up(site: Site) -> None:
    """Regression: it keeps the worker's output open, and the supervisor waited for its end."""
    worker = site.misbehaving(
        "LeavesAChild", deadlines=Deadlines(start_s=20.0, silence_s=20.0, stop_s=0.3)
    )
    worker.model = replace(worker.model, confine=False)  # else it cannot
    descriptors = psutil.Process().num_fds()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(
            WorkerDied, match="exited with code 5; its last line: sleeper"
        ) as caught:
            await site.ask(worker)
    os.kill(int(caught.value.message.split()[-1]), signal.SIGKILL)
    await until(lambda: psutil.Process().num_fds() <= descriptors)


async def test_a_death_while_idle_is_noticed(site: Site) -> None:
    """Nobody has to ask; the next request starts another one."""
    worker = site.worker()
    await worker.ensure()
    os.kill(site.note(worker), signal.SIGKILL)
    await until(lambda: worker.state is WorkerState.BACKOFF)
    assert worker.last_failure == "was killed by SIGKILL while idle"
    assert await site.answers(worker)


async def test_a_defect_of_ours_in_a_start_leaves_no_process(site: Site) -> None:
    """Regression: a setting that could not be sent left a process that nobody knew.

    The next try left another.
    """
    worker = site.worker()
    worker.model = replace(worker.model, max_memory_bytes=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        await worker.ensure()
    assert (worker.state, worker.pid, list(site.scratch.iterdir())) == (
        WorkerState.STOPPED,
        None,
        [],
    )
    assert not psutil.Process().children()


# --- memory ---

LIMIT = 256 << 20
REFUSED = (
    "it wanted more than engine.max_memory_bytes (268,435,456 bytes); raise that in the manifest"
)


async def test_by_default_a_worker_may_take_far_more_than_its_model_needs(site: Site) -> None:
    """But not all that the machine has."""
    worker = site.worker()
    await worker.ensure()
    spec = worker.model.spec
    limit, _ = psutil.Process(worker.pid).rlimit(psutil.RLIMIT_DATA)
    assert limit == memory.default_limit(Path(spec.path), spec.context_tokens)
    machine_bytes = psutil.virtual_memory().total
    needed_bytes = spec.context_tokens * (512 << 10)
    assert min(needed_bytes + (2 << 30), machine_bytes // 2) < limit < machine_bytes


def test_the_default_grows_with_the_model_and_the_context(tmp_path: Path) -> None:
    model = tmp_path / "m"
    model.write_bytes(b"x")
    small = memory.default_limit(model, 1024)
    large = memory.default_limit(model, 2048)
    assert small is not None
    assert large is not None
    assert large - small in (0, 1024 << 20)
    assert memory.default_limit(tmp_path / "missing", 1024) is None


async def test_a_worker_that_eats_memory_dies_of_its_limit_and_says_so(site: Site) -> None:
    """The request fails, with the next step.

    The machine's memory is not used up, and the next worker starts.
    """
    worker = site.misbehaving("EatsMemory", max_memory_bytes=LIMIT)
    with pytest.raises(WorkerDied) as caught:
        await site.ask(worker)
    assert REFUSED in caught.value.message
    assert REFUSED in worker.last_failure
    assert worker.state is WorkerState.BACKOFF
    await worker.ensure()


async def test_a_model_that_does_not_fit_into_the_limit_is_a_refusal_that_says_so(
    site: Site,
) -> None:
    """A library that notices its failed allocation refuses the model; the process did not crash."""
    worker = site.misbehaving("EatsMemoryAtLoad", max_memory_bytes=LIMIT)
    with pytest.raises(ModelLoadError) as caught:
        await worker.ensure()
    assert caught.value.message.startswith(f"m cannot be loaded: {REFUSED}")


async def test_without_a_limit_a_worker_takes_what_it_needs(site: Site) -> None:
    """The default is the machine's own limit."""
    await site.misbehaving("EatsMemoryAtLoad").ensure()


def test_a_mapped_model_file_is_not_counted(tmp_path: Path) -> None:
    """A file four times the limit may be mapped and read, as llama.cpp does.

    Its pages are the kernel's to take.
    """
    weights = tmp_path / "weights"
    with weights.open("wb") as file:
        file.truncate(4 * LIMIT)
    code = (
        "import mmap, sys; from rkcached.worker import memory; memory.limit(int(sys.argv[2]));"
        "file = open(sys.argv[1], 'rb'); mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ);"
        "print(len(mapped[::4096])); bytearray(int(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(weights), str(LIMIT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == f"{4 * LIMIT // 4096}\n", done.stderr
    assert done.stderr.endswith("MemoryError\n")


def test_a_worker_that_the_kernel_killed_for_memory_is_told_from_another_kill(
    tmp_path: Path,
) -> None:
    """By the count of the daemon's own cgroup.

    Where there is none, SIGKILL is all that is known.
    """
    own, group = tmp_path / "cgroup", tmp_path / "system.slice/rkcached.service"
    assert memory.kernel_kills(own, tmp_path) == 0
    own.write_text("4:memory:/x\n0::/system.slice/rkcached.service\n")
    assert memory.kernel_kills(own, tmp_path) == 0
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\nhigh 7\nmax 3\noom 2\noom_kill 5\n")
    assert memory.kernel_kills(own, tmp_path) == 5
    now = memory.kernel_kills()
    assert memory.killed(-signal.SIGKILL, now) == ""
    assert memory.killed(-signal.SIGSEGV, now - 1) == ""
    assert "as memory ran out" in memory.killed(-signal.SIGKILL, now - 1)


# --- backoff ---


def test_the_backoff_doubles_up_to_a_limit() -> None:
    """The first failure is forgiven; no number of failures overflows."""
    backoff = Backoff(base_s=0.25, limit_s=30.0)
    assert [backoff.delay(n) for n in (0, 1, 2, 3, 4, 8, 9, 10, 10_000)] == [
        0,
        0,
        0.25,
        0.5,
        1,
        16,
        30,
        30,
        30,
    ]


async def test_failures_in_a_row_make_the_worker_rest_and_a_success_is_a_fresh_start(
    site: Site,
) -> None:
    """While it rests it says for how long; after the rest it is started by whoever asks."""
    crash = MemoryModel(faults=(Fault(op="generate", kind="exit", at=30),))
    worker = site.worker(crash, backoff=Backoff(base_s=0.2, limit_s=60.0))
    for _ in range(2):
        assert await site.answers(worker)
        with pytest.raises(WorkerDied):
            await site.ask(worker)
        assert worker.retry_in_s() == 0.0  # a success came before: each failure is the first again
    site.worker(MemoryModel(faults=(Fault(op="generate", kind="exit"),)))  # rewrites the model file
    with pytest.raises(WorkerDied):
        await site.ask(worker)
    assert 0.0 < worker.retry_in_s() <= 0.2
    with pytest.raises(
        WorkerUnavailable, match="is backing off after 2 consecutive failures: exited with code 3"
    ):
        await worker.ensure()
    await until(lambda: worker.retry_in_s() == 0.0)
    with pytest.raises(WorkerDied):
        await site.ask(worker)
    assert 0.2 < worker.retry_in_s() <= 0.4
    assert worker.restarts == 4
    site.worker()
    await until(lambda: worker.retry_in_s() == 0.0)
    assert await site.answers(worker)


# --- idle ---


async def test_an_idle_worker_is_unloaded_and_comes_back(site: Site) -> None:
    """The time counts from the end of the last request."""
    worker = site.worker(idle_unload_s=0.2)
    assert await site.answers(worker)
    assert await site.answers(worker)
    assert len(site.pids) == 1
    await until(lambda: worker.state is WorkerState.STOPPED)
    assert site.is_clean()
    assert await site.answers(worker)
    assert len(site.pids) == 2


async def test_a_busy_worker_is_not_unloaded(site: Site) -> None:
    """However long the request takes."""
    worker = site.worker(SLOW, idle_unload_s=0.1)
    await site.ask(worker)
    assert worker.restarts == 0


# --- cancelling ---


async def test_cancelling_a_request_aborts_it_and_keeps_the_worker(site: Site) -> None:
    """The engine stops within a token; the next request finds the same process."""
    worker = site.worker(SLOW)
    await worker.ensure()
    pid = site.note(worker)
    asking = asyncio.create_task(site.ask(worker, ENDLESS))
    await until(lambda: worker.state is WorkerState.BUSY)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (worker.state, worker.pid) == (WorkerState.READY, pid)
    assert await site.answers(worker)


async def test_a_request_that_is_cancelled_twice_still_ends_in_order(site: Site) -> None:
    """Regression: the second cancellation left the answer unread, and the next request met it."""
    worker = site.worker(SLOW)
    await worker.ensure()
    site.note(worker)
    asking = asyncio.create_task(site.ask(worker, ENDLESS))
    await until(lambda: worker.state is WorkerState.BUSY)
    for _ in range(3):
        asking.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await site.answers(worker)
    assert worker.restarts == 0


async def test_an_abort_ends_the_request_with_what_it_has(site: Site) -> None:
    """It still gets its answer, marked as aborted. An abort of another operation ends nothing."""
    worker = site.worker(SLOW)
    await worker.ensure()
    site.note(worker)
    events: list[protocol.FromWorker] = []
    operation = protocol.Generate(prompt=PROMPT, sampling=ENDLESS)
    running = asyncio.create_task(worker.run(operation, events.append))
    await until(lambda: worker.state is WorkerState.BUSY)

    await worker.abort(protocol.Generate(prompt=PROMPT, sampling=ENDLESS))
    await until(lambda: any(isinstance(event, protocol.Piece) for event in events))
    assert not running.done()

    await worker.abort(operation)
    done = await running
    assert isinstance(done, protocol.Done)
    assert done.stats.finish is FinishReason.ABORT
    text = "".join(event.text for event in events if isinstance(event, protocol.Piece))
    assert expected_text(site.model.read_bytes(), PROMPT, ENDLESS).startswith(text)


async def test_an_engine_that_ignores_an_abort_is_killed(site: Site) -> None:
    """Within the time for stopping; the next request starts another one without delay."""
    never_s = 10 * DEADLINE_S
    worker = site.misbehaving(
        "Stubborn", deadlines=Deadlines(start_s=never_s, silence_s=never_s, stop_s=0.3)
    )
    asking = asyncio.create_task(site.ask(worker))
    await until(lambda: worker.state is WorkerState.BUSY)
    asking.cancel()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(asyncio.CancelledError):
            await asking
    assert (worker.state, worker.pid, site.is_clean()) == (WorkerState.STOPPED, None, True)


@pytest.mark.parametrize("turns", [1, 2, 5, 20])
async def test_cancelling_a_start_leaves_nothing_behind(site: Site, turns: int) -> None:
    """At whatever point of it."""
    worker = site.worker(MemoryModel(load_ms=2000))
    starting = asyncio.create_task(worker.ensure())
    for _ in range(turns):
        await asyncio.sleep(0)
    pid = worker.pid
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert (worker.state, worker.pid, is_gone(pid), list(site.scratch.iterdir())) == (
        WorkerState.STOPPED,
        None,
        True,
        [],
    )


@pytest.mark.parametrize("turns", [1, 2, 5, 20])
async def test_stopping_during_a_start_leaves_nothing_behind(site: Site, turns: int) -> None:
    """Whoever waited for it is told."""
    worker = site.worker(MemoryModel(load_ms=2000))
    starting = asyncio.create_task(worker.ensure())
    for _ in range(turns):
        await asyncio.sleep(0)
    await worker.stop()
    with pytest.raises(WorkerUnavailable, match="was stopped"):
        await starting
    assert (worker.state, worker.pid, list(site.scratch.iterdir())) == (
        WorkerState.STOPPED,
        None,
        [],
    )
    assert not psutil.Process().children()


async def test_stopping_ends_a_running_request_with_an_error(site: Site) -> None:
    """At a shutdown nobody waits for an answer that will not come."""
    worker = site.worker(SLOW, idle_unload_s=60.0)
    asking = asyncio.create_task(site.ask(worker, ENDLESS))
    await until(lambda: worker.state is WorkerState.BUSY)
    await worker.stop()
    with pytest.raises(WorkerError):
        await asking
    assert (worker.state, site.is_clean()) == (WorkerState.STOPPED, True)


# --- all workers ---


async def test_workers_are_replaced_when_their_model_changes(site: Site) -> None:
    """The same model has the same worker.

    Another identity has another process, and the old one goes.
    """
    workers = Workers(deadlines=PATIENT)
    first = workers.get(site.spec())
    assert workers.get(site.spec()) is first
    await first.ensure()
    old = site.note(first)
    second = workers.get(site.spec(identity="2"))
    await second.ensure()
    site.note(second)
    assert second is not first
    await until(lambda: is_gone(old))
    assert workers.all() == (second,)
    await workers.stop()
    assert site.is_clean()


async def test_workers_of_models_that_are_gone_are_stopped(site: Site) -> None:
    """The others keep running."""
    workers = Workers(deadlines=PATIENT)
    a, b = workers.get(site.spec(name="a")), workers.get(site.spec(name="b"))
    for worker in (a, b):
        await worker.ensure()
    gone = site.note(a)
    site.note(b)
    workers.drop("a")
    await until(lambda: is_gone(gone))
    assert (workers.all(), b.state) == ((b,), WorkerState.READY)
    await workers.stop()
    assert site.is_clean()


# --- the child on its own ---


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_child_leaves_when_the_daemons_end_closes(tmp_path: Path, busy: bool) -> None:
    """At once and with code 0, also in the middle of an answer.

    Its scratch directory goes with it.
    """
    model, scratch = tmp_path / "m.json", tmp_path / "scratch"
    model.write_bytes(msgspec.json.encode(MemoryModel(decode_us_per_token=50_000)))
    scratch.mkdir()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = subprocess.Popen(
            isolated.command("rkcached.worker.child", str(theirs.fileno())),
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        spec = ModelSpec(path=str(model), context_tokens=0, scratch_dir=str(scratch))
        ours.sendall(protocol.frame(protocol.Start(implementation=MEMORY, spec=spec)))
        (ready,) = protocol.FrameReader().feed(ours.recv(9999))
        assert isinstance(protocol.decode_from_worker(ready), protocol.Ready)
        if busy:
            ours.sendall(protocol.frame(protocol.Generate(id=1, prompt=PROMPT, sampling=ENDLESS)))
            assert ours.recv(9999)
    assert child.wait(timeout=DEADLINE_S) == 0
    assert not scratch.exists()


DAEMON = """
import asyncio, sys, time
from rkcached.engines.base import ModelSpec
from rkcached.worker.model import Backoff, Deadlines, WorkerModel
from rkcached.worker.supervisor import Worker
async def main():
    model = WorkerModel(name="m", identity="", implementation=sys.argv[2],
                        spec=ModelSpec(path=sys.argv[1], context_tokens=64), idle_unload_s=None)
    worker = Worker(model, deadlines=Deadlines(), backoff=Backoff())
    await worker.ensure()
    print(worker.pid, flush=True)
    time.sleep(60)
asyncio.run(main())
"""


def test_a_child_goes_with_a_daemon_that_is_killed(tmp_path: Path) -> None:
    """Nobody is left to stop it."""
    model = tmp_path / "m.json"
    model.write_bytes(msgspec.json.encode(MemoryModel()))
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(model), MEMORY],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as daemon:
        assert daemon.stdout is not None
        pid = int(next(line for line in daemon.stdout if line.strip().isdigit()))
        assert not is_gone(pid)
        daemon.kill()
    wait_until(lambda: is_gone(pid), "the child has gone")
