"""What goes wrong on boards: a stuck daemon, killed processes, no memory, no power."""

from __future__ import annotations

import pytest
from machine import STORE, UNIT, Machine

from tests.waiting import wait_until

WATCHDOG_S = 3
WATCHED = f"[Service]\nWatchdogSec={WATCHDOG_S}\nTimeoutAbortSec=1\nRestartSec=100ms\n"


@pytest.fixture
def watched(machine: Machine) -> Machine:
    """Both prompts are fresh, and the watchdog is impatient."""
    machine.drop_in("watched", WATCHED)
    machine.systemctl("start", UNIT)
    machine.wait_line("2 fresh")
    return machine


def is_back(machine: Machine, before: int) -> None:
    wait_until(lambda: machine.main_pid not in (0, before), "there is another daemon")
    wait_until(lambda: machine.show("ActiveState") == "active", "it is ready")


def test_a_stuck_daemon_is_killed_and_comes_back_warm(watched: Machine) -> None:
    """SIGSTOP: no sign of life, so the watchdog ends it; the next daemon builds nothing."""
    before = watched.main_pid
    watched.run("kill", "-STOP", str(before))
    is_back(watched, before)
    assert watched.show("StatusText") == "2 fresh, 0 blocked"
    assert watched.status()["reconcile"]["builds"] == 0
    assert watched.ask("m/a")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert any("Watchdog timeout" in str(entry["MESSAGE"]) for entry in watched.journal())


@pytest.mark.long
def test_a_long_build_is_not_taken_for_a_stuck_daemon(watched: Machine) -> None:
    """The loop feeds the watchdog while a build that takes three of its intervals goes on."""
    before = watched.main_pid
    watched.declare(
        {"a": "You are prompt A.\n" * 20, "b": "You are long. " * 140}, prefill_us_per_token=4000
    )
    watched.wait_line("1 building", 10)
    watched.wait_line("2 fresh", 60)
    assert watched.main_pid == before
    built = [entry for entry in watched.journal("PROMPT=b") if entry["EVENT"] == "artifact built"]
    assert float(built[-1]["BUILD_MS"]) > 2 * WATCHDOG_S * 1000


def test_a_killed_daemon_comes_back_warm(watched: Machine) -> None:
    """With kill -9: its worker goes with it, the sockets stay, and nothing is rebuilt."""
    before, workers = watched.main_pid, watched.worker_pids()
    assert workers
    watched.run("kill", "-KILL", str(before))
    assert watched.ask("m/a")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert watched.main_pid not in (0, before)
    for pid in workers:
        assert watched.run("test", "-e", f"/proc/{pid}/exe", code=None).returncode == 1
    assert watched.status()["reconcile"]["builds"] == 0


@pytest.mark.long
def test_a_killed_worker_is_a_failed_request_and_no_dead_service(watched: Machine) -> None:
    """As the kernel does when memory runs out: the daemon goes on and starts another worker."""
    watched.declare(
        {"a": "You are prompt A.\n" * 20, "b": "You are prompt B.\n" * 20},
        decode_us_per_token=50_000,
    )
    watched.systemctl("reload", UNIT)
    watched.wait_line("2 fresh")
    watched.ask("m/a")
    before, [worker] = watched.main_pid, watched.worker_pids()
    body = '{"model": "m/a", "max_tokens": 400, "messages": [{"role": "user", "content": "hello"}]}'
    asking = (
        f"curl -sS --unix-socket /run/rkcached/rkcached.sock -d '{body}' "
        "http://localhost/v1/chat/completions"
    )
    answer = watched.run("sh", "-c", f"{asking} & sleep 0.7; kill -KILL {worker}; wait").stdout
    assert "was killed by SIGKILL" in answer
    assert watched.main_pid == before
    assert watched.ask("m/a")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert watched.worker_pids() not in ([], [worker])


def test_a_worker_is_what_the_kernel_takes_first(watched: Machine) -> None:
    """The daemon is small and keeps the answers' state; a worker is large and is started again."""
    watched.ask("m/a")
    [worker] = watched.worker_pids()
    scores = [int(watched.read(f"/proc/{pid}/oom_score_adj")) for pid in (watched.main_pid, worker)]
    assert scores[1] >= scores[0] + 500
    assert watched.show("OOMPolicy") == "continue"


@pytest.mark.long
def test_a_power_cut_during_a_build(machine: Machine) -> None:
    """Every process ends at once. After the next boot: no half file, no wrong answer, and warm."""
    names = [f"p{number:02}" for number in range(60)]
    machine.declare(
        {name: f"You are prompt {name}.\n" * 20 for name in names}, prefill_us_per_token=100
    )
    machine.systemctl("enable", UNIT)
    machine.systemctl("start", UNIT)
    wait_until(lambda: machine.status()["reconcile"]["builds"] > 5, "some are built")
    machine.cut_power()
    store = machine.root / STORE[1:] / "m"
    whole = {sidecar.stem for sidecar in store.glob("*.json")}
    assert 5 < len(whole) < len(names)
    machine.boot()
    machine.wait_line("60 fresh")
    status = machine.status()
    assert status["reconcile"]["builds"] == len(names) - len(whole)
    assert machine.ask("m/p00")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    left = set(machine.run("find", f"{STORE}/m", "-type", "f", "-printf", "%f ").stdout.split())
    assert left == {f"{name}.{kind}" for name in names for kind in ("bin", "json", "memory_cache")}
    assert machine.run("rkcached", "verify").stdout.count("ok ") == len(names)
    machine.systemctl("disable", UNIT)


@pytest.mark.long
def test_a_power_cut_during_a_long_build(machine: Machine) -> None:
    """What was fresh is served at once; what was being built is built from its beginning."""
    slow = {"prefill_us_per_token": 5000}
    machine.declare({"a": "You are prompt A.\n" * 5}, **slow)
    machine.systemctl("enable", UNIT)
    machine.systemctl("start", UNIT)
    machine.wait_line("1 fresh")
    machine.declare({"a": "You are prompt A.\n" * 5, "c": "You are slow. " * 100}, **slow)
    machine.wait_line("1 fresh, 1 building m/c")
    machine.cut_power()
    machine.boot()
    assert machine.wait_line("1 fresh") == "1 fresh, 1 building m/c, 0 blocked"
    assert machine.ask("m/a")["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    machine.wait_line("2 fresh")
    machine.systemctl("disable", UNIT)
