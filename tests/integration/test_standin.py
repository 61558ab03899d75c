"""The stand-in for librkllmrt.so keeps the promises that the tests of the RKLLM engine rest on."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.rkllm_standin.standin import ABIS, build, build_driver, write_model

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None,
    reason="needs a C compiler",
)

EVERY_GROUP = pytest.mark.parametrize("group", ABIS)
FIRST = {
    "rkllm_abort",
    "rkllm_createDefaultParam",
    "rkllm_destroy",
    "rkllm_init",
    "rkllm_is_running",
    "rkllm_load_lora",
    "rkllm_load_prompt_cache",
    "rkllm_release_prompt_cache",
    "rkllm_run",
    "rkllm_run_async",
}
SINCE_C = FIRST | {"rkllm_clear_kv_cache", "rkllm_set_chat_template"}
SINCE_D = SINCE_C | {
    "rkllm_get_kv_cache_size",
    "rkllm_set_function_tools",
    "rkllm_set_cross_attn_params",
}
FUNCTIONS = {"B": FIRST, "C": SINCE_C, "C1": SINCE_C, "D": SINCE_D, "E": SINCE_D}
VERSION = re.compile(rb"RKLLM SDK \(version: ([0-9][0-9A-Za-z.]*)")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("standin")


def drive(driver: Path, does: str, model: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [driver, does, model, cache], capture_output=True, text=True, timeout=60, check=False
    )


def reply(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("reply "))


@EVERY_GROUP
def test_exports_exactly_the_functions_of_its_group(group: str, built: Path) -> None:
    """A binding that probes symbols sees what the vendor's library of this group would show."""
    command = ["nm", "-D", "--defined-only", build(group, built)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in listed.splitlines()} == FUNCTIONS[group]


@EVERY_GROUP
def test_names_its_version_in_the_file_since_c(group: str, built: Path) -> None:
    """A binding that scans the file finds the version, except in group B."""
    assert VERSION.findall(build(group, built).read_bytes()) == (
        [] if group == "B" else [ABIS[group].encode()]
    )


def test_its_version_can_be_another_or_missing(built: Path) -> None:
    """Tests of version detection get a library that lies, and one that says nothing."""
    assert VERSION.findall(build("B", built, version="1.9.9b2").read_bytes()) == [b"1.9.9b2"]
    assert VERSION.findall(build("D", built, defines={"NO_VERSION": "1"}).read_bytes()) == []


def test_builds_once_for_each_content(built: Path) -> None:
    """The second build is the first one's file."""
    before = build("D", built).stat().st_mtime_ns
    assert build("D", built).stat().st_mtime_ns == before


@EVERY_GROUP
@pytest.mark.parametrize(
    "keys", [{}, {"callback_thread": "own", "null_text": "yes", "waiting": "bytes"}]
)
def test_a_reply_from_a_loaded_cache_equals_the_reply_before(
    group: str, keys: dict[str, str], built: Path, tmp_path: Path
) -> None:
    """Saved, cleared, loaded and run again.

    In the same process and in another one, the text is the same.
    """
    driver, cache = build_driver(group, built), tmp_path / "c.bin"
    model = write_model(tmp_path / "m.rkllm", **keys)
    first = reply(drive(driver, "live", model, cache))
    assert reply(drive(driver, "load", model, cache)) == first


@EVERY_GROUP
def test_a_flipped_byte_of_the_state_loads_and_changes_the_reply(
    group: str, built: Path, tmp_path: Path
) -> None:
    """Damage inside the state goes unnoticed by the runtime, at every position.

    Only the text shows it.
    """
    driver, cache = build_driver(group, built), tmp_path / "c.bin"
    model = write_model(tmp_path / "m.rkllm")
    first = reply(drive(driver, "live", model, cache))
    whole = cache.read_bytes()
    tokens = int.from_bytes(whole[8:12], "little")
    start = 12 + 4 * tokens + 8
    for flipped in (start, (start + len(whole)) // 2, start + 56 * (tokens - 1) - 1):
        cache.write_bytes(whole[:flipped] + bytes([whole[flipped] ^ 1]) + whole[flipped + 1 :])
        assert reply(drive(driver, "load", model, cache)) != first


@EVERY_GROUP
def test_a_damaged_cache_file_does_not_load(group: str, built: Path, tmp_path: Path) -> None:
    """Truncated, extended or of another kind: the load fails and says why."""
    driver, cache = build_driver(group, built), tmp_path / "c.bin"
    model = write_model(tmp_path / "m.rkllm")
    reply(drive(driver, "live", model, cache))
    whole = cache.read_bytes()
    for damaged in (
        b"",
        whole[:11],
        whole[:-1],
        whole[: len(whole) // 2],
        whole + b"x",
        b"xxxx" + whole[4:],
    ):
        cache.write_bytes(damaged)
        done = drive(driver, "load", model, cache)
        assert done.returncode == 3
        assert "E rkllm: prompt cache" in done.stdout


def test_a_cache_of_another_architecture_loads_and_changes_the_reply(
    built: Path, tmp_path: Path
) -> None:
    """The runtime does not protect against another model's cache: fingerprints have to."""
    driver, cache = build_driver("D", built), tmp_path / "c.bin"
    model, other = (
        write_model(tmp_path / "m.rkllm"),
        write_model(tmp_path / "o.rkllm", arch="llama"),
    )
    first = reply(drive(driver, "live", model, cache))
    reply(drive(driver, "live", other, cache))
    assert reply(drive(driver, "load", model, cache)) != first


def test_a_model_that_cannot_be_cached_warns_and_writes_nothing(
    built: Path, tmp_path: Path
) -> None:
    """The run that was to save succeeds all the same."""
    driver, cache = build_driver("D", built), tmp_path / "c.bin"
    done = drive(driver, "live", write_model(tmp_path / "m.rkllm", saves="no"), cache)
    assert "reply " in done.stdout
    assert "W rkllm: this model does not support saving prompt cache" in done.stdout
    assert not cache.exists()


@EVERY_GROUP
def test_a_run_after_an_aborted_save_crashes(group: str, built: Path, tmp_path: Path) -> None:
    """The aborted run itself ends with FINISH; the next one is a segmentation fault."""
    model = write_model(tmp_path / "m.rkllm", prefill_tps=20)
    done = drive(build_driver(group, built), "abort", model, tmp_path / "c.bin")
    assert done.returncode == -signal.SIGSEGV
    assert "aborted " in done.stdout


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "failed to open model"),
        ("", "model file is empty"),
        ("GGUF\nrkllm-toolkit version: 1.1.0\n", "not an RKLLM model"),
        ("RKLLM-STANDIN-MODEL 1\narch = qwen3\nrkllm-toolkit ver", "model file is truncated"),
        (
            "RKLLM-STANDIN-MODEL 1\nrkllm-toolkit version: 1.9.0\n",
            "model was converted with rkllm-toolkit 1.9.0, newer than this runtime 1.2.3",
        ),
        (
            "RKLLM-STANDIN-MODEL 1\nsavse = no\nrkllm-toolkit version: 1.1.0\n",
            "unknown model key: savse",
        ),
    ],
)
def test_a_bad_model_fails_init_with_its_reason(
    content: str | None, reason: str, built: Path, tmp_path: Path
) -> None:
    """Each kind of bad model file has its line on stdout."""
    model = tmp_path / "m.rkllm"
    if content is not None:
        model.write_text(content)
    done = drive(build_driver("D", built), "live", model, tmp_path / "c.bin")
    assert done.returncode == 2
    assert f"E rkllm: {reason}" in done.stdout


@pytest.mark.parametrize(
    ("fault", "ends"),
    [
        ("init:segv", -signal.SIGSEGV),
        ("run:ill", -signal.SIGILL),
        ("token3:abort", -signal.SIGABRT),
        ("save:segv", -signal.SIGSEGV),
        ("load:segv", -signal.SIGSEGV),
        ("destroy:abort", -signal.SIGABRT),
        ("init:oom", 2),
        ("init:platform", 2),
        ("run:error", 1),
        ("token3:error", 1),
        ("destroy:error", 4),
    ],
)
def test_a_planned_fault_is_real_and_counted(
    fault: str, ends: int, built: Path, tmp_path: Path
) -> None:
    """Signals are real ones, errors are return codes, and each leaves a byte in the count file."""
    count, switch = tmp_path / "count", tmp_path / "switch"
    model = write_model(
        tmp_path / "m.rkllm", fault=fault, fault_count_file=count, fault_file=switch
    )
    driver, cache = build_driver("D", built), tmp_path / "c.bin"
    reply(drive(driver, "live", model, cache))
    assert not count.exists()
    switch.touch()
    assert drive(driver, "live", model, cache).returncode == ends
    assert count.read_bytes() == b"x"
