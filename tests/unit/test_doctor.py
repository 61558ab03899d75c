"""Whether the board is ready.

Boards made of files: a /sys, /proc, /dev and /usr/lib below a directory of the test.
"""

from __future__ import annotations

import contextlib
import grp
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from rkcached.cli.doctor import NO_NPU, Check, Outcome, Report, examine, print_report, report_data
from rkcached.engines.rkllm.abi import ABIS
from rkcached.host import confine, landlock
from rkcached.store.marks import tag
from tests.documents import DOCS, blocks
from tests.gguf_files import UINT32, gguf, pair

SIDECAR = json.dumps(
    {
        "model": "q",
        "prompt": "a",
        "artifact": "a.llama_cache",
        "fingerprint": "f",
        "sha256": "s",
        "components": {"prefix.bytes": "500"},
        "size_bytes": 1_000_000,
        "text_sha256": "t",
        "tokens": 90,
        "built_at": 1.0,
        "build_ms": 1.0,
        "figures": {
            "prefill_ms": 1.0,
            "load_ms": 1.0,
            "cold_ttft_ms": 1.0,
            "warm_ttft_ms": 1.0,
            "verified": "off",
        },
    }
)

NPU, GPU = "fdab0000.npu", "fb000000.gpu"


class FakeBoard:
    """A machine as its kernel shows it, and a manifest for it."""

    def __init__(self, root: Path, compiled: Path) -> None:
        self.root = root / "board"
        self.manifest = root / "manifest.yaml"
        self.cache = root / "cache"
        self.model = root / "q.rkllm"
        self._compiled = compiled
        self.root.mkdir()
        self.model.write_bytes(b"x" * 1000 + b"rkllm-toolkit version: 1.2.3\0")
        for prompt in ("a.md", "b.md"):
            (root / prompt).write_text("You are the keeper of a lighthouse. " * 10)
        self.declare("{kind: rkllm}")

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def declare(self, engine: str, *, cache: str = "{}", more: str = "") -> None:
        self.manifest.write_text(
            f"version: 1\nengine: {engine}\ncache: {cache}\nmodels:\n  q:\n    path: {self.model}\n"
            f"    chat_template: chatml\n    prompts: {{a: a.md, b: b.md}}\n{more}"
        )

    def rock5(self) -> None:
        """A Rock 5B on the vendor's kernel, with everything as it should be."""
        self.write("proc/device-tree/model", "Radxa ROCK 5B\0")
        self.write("proc/device-tree/compatible", "radxa,rock-5b\0rockchip,rk3588\0")
        self.write("proc/meminfo", "MemTotal:       16253000 kB\nMemAvailable:   12000000 kB\n")
        for number, device in ((0, GPU), (1, NPU)):
            for node in (f"card{number}", f"renderD{128 + number}"):
                self.write(f"dev/dri/{node}", "").chmod(0o660)
                folder = self.root / "sys/class/drm" / node
                folder.mkdir(parents=True)
                (folder / "device").symlink_to(f"../../../devices/platform/{device}")
        self.write("sys/module/rknpu/version", "0.9.8\n")
        for name, top in (("dmc", 2112), (NPU, 1000)):
            self.write(f"sys/class/devfreq/{name}/governor", "performance\n")
            self.write(f"sys/class/devfreq/{name}/cur_freq", f"{top}000000\n")
            self.write(f"sys/class/devfreq/{name}/max_freq", f"{top}000000\n")
        for policy, top in ((0, 1800), (4, 2400), (6, 2400)):
            self.write(
                f"sys/devices/system/cpu/cpufreq/policy{policy}/scaling_governor", "performance\n"
            )
            self.write(
                f"sys/devices/system/cpu/cpufreq/policy{policy}/scaling_cur_freq", f"{top}000\n"
            )
            self.write(
                f"sys/devices/system/cpu/cpufreq/policy{policy}/scaling_max_freq", f"{top}000\n"
            )
        self.write("usr/lib/librkllmrt.so", self._compiled.read_bytes())

    def examine(self, *, manifest: bool = True) -> Report:
        return examine(self.manifest if manifest else None, self.cache, root=self.root)

    def check(self, name: str, *, manifest: bool = True) -> Check:
        return next(check for check in self.examine(manifest=manifest).checks if check.name == name)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the version and the functions of RKLLM 1.2.3, for this machine."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip(
            "this test compiles a small library and found no C compiler: apt-get install gcc"
        )
    folder = tmp_path_factory.mktemp("library")
    names = next(abi.functions for abi in ABIS if "1.2.3" in abi.versions)
    functions = "".join(f"int {name}(void) {{ return 0; }}\n" for name in names)
    (folder / "l.c").write_text(
        f'{functions}const char banner[] = "RKLLM SDK (version: 1.2.3 | target: linux)";\n'
    )
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "l.so"), str(folder / "l.c")]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "l.so"


@pytest.fixture
def board(compiled: Path) -> Iterator[FakeBoard]:
    """An empty machine, in a directory that every user may enter."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # where another user can get, whatever TMPDIR is
    folder.chmod(0o755)
    yield FakeBoard(folder, compiled)
    shutil.rmtree(folder)


@pytest.fixture
def rock5(board: FakeBoard) -> FakeBoard:
    board.rock5()
    return board


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's rights, who may open everything."""
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


def outcomes(report: Report) -> dict[str, str]:
    return {check.name: check.outcome.value for check in report.checks}


def printed(report: Report) -> str:
    stream = io.StringIO()
    print_report(Console(file=stream, width=250), report)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("version", "filters", "more", "outcome", "words"),
    [
        (7, True, "", "ok", "the system calls that they need (Landlock 7, seccomp)"),
        (0, True, "", "warn", "it cannot deny them files"),
        (0, False, "", "warn", "and it cannot filter their system calls"),
        (7, True, "engine: {kind: llamacpp, confine: false}", "warn", "engine.confine: false"),
    ],
)
def test_how_workers_are_confined_is_said(  # noqa: PLR0917 - a table
    rock5: FakeBoard,
    monkeypatch: pytest.MonkeyPatch,
    version: int,
    filters: bool,
    more: str,
    outcome: str,
    words: str,
) -> None:
    """It is never a failure: a vendor's kernel may be the only one that a board has."""
    monkeypatch.setattr(landlock, "version", lambda: version)
    monkeypatch.setattr(confine, "has_filters", lambda: filters)
    if more:
        rock5.manifest.write_text(f"version: 1\n{more}\nmodels: {{q: {{path: q.gguf}}}}\n")
    report = rock5.examine()
    (check,) = [check for check in report.checks if check.name == "confinement"]
    assert (check.outcome.value, words in check.finding) == (outcome, True), check.finding


def test_everything_right(rock5: FakeBoard) -> None:
    """A board with everything right: all is ok, with the facts that a person wants to see."""
    report = rock5.examine()
    found = outcomes(report)
    assert found.pop("first answer of q") == "skip"  # no daemon runs
    assert found.pop("confinement") in ("ok", "warn")  # the kernel is this machine's
    assert set(found.values()) == {"ok"}, printed(report)
    assert (report.failed, report.npu) == (False, True)
    text = printed(report)
    for words in (
        "Radxa ROCK 5B, RK3588",
        "RKLLM 1.2.3, ABI 1.2.1 (group D)",
        "/dev/dri/renderD129, /dev/dri/card1 can be opened",
        "version 0.9.8",
        "performance (1000 of 1000 MHz)",
        "performance (2112 of 2112 MHz)",
        "performance (1800 of 1800 MHz), performance (2400 of 2400 MHz)",
        "made by rkllm-toolkit 1.2.3 for runtime 1.2.3",
        "12.29 GB available; q, the largest model, needs about",
        "what 2 prompts will take is not known",
        " ok, ",
    ):
        assert words in text, words
    assert NO_NPU not in text
    assert "renderD128" not in text


def test_a_template_that_is_assumed(rock5: FakeBoard) -> None:
    """The model's check warns of it, with the remedy."""
    text = rock5.manifest.read_text()
    rock5.manifest.write_text(text.replace("    chat_template: chatml\n", ""))
    check = rock5.check("model q")
    assert check.outcome is Outcome.WARN
    assert "no chat template is known for q, so chatml is assumed" in check.finding
    assert "set tokenizer to the files of its Hugging Face repository" in check.finding


def test_the_sample_of_the_page(rock5: FakeBoard) -> None:
    """What docs/rkllm.md shows of a board on which all is well is what is printed."""
    (sample,) = blocks(DOCS / "rkllm.md", "text")
    text = " ".join(
        printed(rock5.examine())
        .replace(str(rock5.root), "")
        .replace(str(rock5.model), "MODEL")
        .split()
    )
    lines = [
        " ".join(line.split())
        for line in sample.replace("/srv/models/q.rkllm", "MODEL").splitlines()
    ]
    assert len(lines) >= 6
    assert [line for line in lines if line not in text] == []


def test_no_manifest(rock5: FakeBoard) -> None:
    """Without a manifest the board alone is examined.

    A broken one is a failure beside the board's checks.
    """
    report = rock5.examine(manifest=False)
    assert not report.failed
    assert outcomes(report)["manifest"] == "skip"
    assert not {"model q", "memory", "disk"} & outcomes(report).keys()
    rock5.manifest.write_text("version: 2\n")
    report = rock5.examine()
    assert report.failed
    assert "rkcached check" in report.checks[0].next_step
    assert outcomes(report)["board"] == "ok"


def test_governors(rock5: FakeBoard) -> None:
    """A governor that changes the clock is a warning, with the command that sets it.

    Held at the top is fine.
    """
    rock5.write(f"sys/class/devfreq/{NPU}/governor", "rknpu_ondemand\n")
    rock5.write(f"sys/class/devfreq/{NPU}/cur_freq", "300000000\n")
    rock5.write("sys/class/devfreq/dmc/governor", "dmc_ondemand\n")
    rock5.write("sys/devices/system/cpu/cpufreq/policy4/scaling_governor", "ondemand\n")
    report = rock5.examine()
    assert not report.failed
    npu, ddr, cpu = (rock5.check(f"{name} clock") for name in ("NPU", "DDR", "CPU"))
    assert {npu.outcome, ddr.outcome, cpu.outcome} == {Outcome.WARN}
    assert "rknpu_ondemand (300 of 1000 MHz)" in npu.finding
    assert npu.next_step == f"echo performance | sudo tee /sys/class/devfreq/{NPU}/governor"
    assert ddr.next_step == "echo performance | sudo tee /sys/class/devfreq/dmc/governor"
    assert cpu.next_step.endswith("cpufreq/policy*/scaling_governor")
    rock5.write("sys/class/devfreq/dmc/governor", "userspace\n")
    assert rock5.check("DDR clock").outcome is Outcome.OK
    rock5.write("sys/class/devfreq/dmc/cur_freq", "528000000\n")
    assert rock5.check("DDR clock").outcome is Outcome.WARN
    rock5.write("sys/class/devfreq/dmc/cur_freq", "garbage\n")
    assert rock5.check("DDR clock").outcome is Outcome.WARN
    shutil.rmtree(rock5.root / "sys/class/devfreq/dmc")
    assert rock5.check("DDR clock").outcome is Outcome.SKIP


def test_no_permission(rock5: FakeBoard) -> None:
    """Device nodes that this user may not open are a failure.

    With the group to join or the rule that is missing.
    """
    nodes = [rock5.root / "dev/dri" / name for name in ("card1", "renderD129")]
    for node in nodes:
        node.chmod(0)
    with nobody():
        check = rock5.check("NPU devices")
    assert check.outcome is Outcome.FAIL
    assert "/dev/dri/renderD129, /dev/dri/card1 cannot be opened" in check.finding
    assert "udev" in check.next_step
    nodes[0].chmod(0o666)
    with nobody():
        assert rock5.check("NPU devices").outcome is Outcome.WARN


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to a group")
def test_group_to_join(rock5: FakeBoard) -> None:
    """The group that has the device nodes is named."""
    group = next(entry for entry in grp.getgrall() if entry.gr_gid not in {0, 65534})
    for name in ("card1", "renderD129"):
        os.chown(rock5.root / "dev/dri" / name, 0, group.gr_gid)
    with nobody():
        check = rock5.check("NPU devices")
    assert check.outcome is Outcome.FAIL
    assert check.next_step == f"sudo usermod -aG {group.gr_name} $USER, and log in again"


def test_device_nodes(rock5: FakeBoard) -> None:
    """The NPU's nodes are found by uevent too, or are /dev/rknpu with the DMA heaps.

    Without any it is a failure.
    """
    for node in ("card1", "renderD129"):
        (rock5.root / "sys/class/drm" / node / "device").unlink()
    check = rock5.check("NPU devices")
    assert check.outcome is Outcome.FAIL
    assert "vendor's kernel" in check.next_step
    rock5.write(
        "sys/class/drm/renderD129/device/uevent",
        f"DRIVER=RKNPU\nOF_NAME=npu\nOF_FULLNAME=/npu@{NPU[:8]}\n",
    )
    assert rock5.check("NPU devices").finding == "/dev/dri/renderD129 can be opened by this user"
    shutil.rmtree(rock5.root / "dev/dri")
    rock5.write("dev/rknpu", "")
    rock5.write("dev/dma_heap/system", "")
    assert (
        rock5.check("NPU devices").finding
        == "/dev/rknpu, /dev/dma_heap/system can be opened by this user"
    )


def test_driver(rock5: FakeBoard) -> None:
    """An old driver is a warning; one that cannot be read is skipped.

    The place in debugfs will do.
    """
    rock5.write("sys/module/rknpu/version", "0.9.6\n")
    check = rock5.check("NPU driver")
    assert check.outcome is Outcome.WARN
    assert "0.9.6 is older than 0.9.8" in check.finding
    (rock5.root / "sys/module/rknpu/version").unlink()
    with nobody():
        check = rock5.check("NPU driver")
    assert check.outcome is Outcome.SKIP
    assert "as root: sudo cat /sys/kernel/debug/rknpu/version" in check.next_step
    rock5.write("sys/kernel/debug/rknpu/version", "RKNPU driver: v0.10.1\n")
    assert (rock5.check("NPU driver").outcome, rock5.check("NPU driver").finding) == (
        Outcome.OK,
        "version 0.10.1",
    )


def test_library(rock5: FakeBoard) -> None:
    """A missing or wrong library is a failure with what was found.

    The manifest's engine.library is the one meant.
    """
    library = rock5.root / "usr/lib/librkllmrt.so"
    elsewhere = rock5.root.parent / "elsewhere.so"
    library.rename(elsewhere)
    check = rock5.check("runtime library")
    assert check.outcome is Outcome.FAIL
    assert "there is no runtime library" in check.finding
    assert rock5.check("runtime library", manifest=False).outcome is Outcome.FAIL
    rock5.declare(f"{{kind: rkllm, library: {elsewhere}}}")
    assert rock5.check("runtime library").outcome is Outcome.OK
    rock5.declare(f"{{kind: rkllm, library: {elsewhere}, abi: 1.3.0}}")
    assert "ABI 1.3.0 (group E), as engine.abi says" in rock5.check("runtime library").finding
    elsewhere.write_bytes(elsewhere.read_bytes().replace(b"version: 1.2.3", b"version: 9.9.9"))
    rock5.declare(f"{{kind: rkllm, library: {elsewhere}}}")
    assert "does not know" in rock5.check("runtime library").finding


@pytest.mark.parametrize(
    ("tail", "outcome", "words"),
    [
        (b"rkllm-toolkit version: 1.2.2\0", Outcome.OK, "toolkit 1.2.2 for runtime 1.2.3"),
        (b"rkllm-toolkit version: 1.2.3b1\n", Outcome.OK, "toolkit 1.2.3b1"),
        (
            b"rkllm-toolkit version: 1.3.0",
            Outcome.FAIL,
            "toolkit 1.3.0, which is newer than the runtime, 1.2.3",
        ),
        (b"rkllm-toolkit version: 1.10.0", Outcome.FAIL, "newer"),
        (b"", Outcome.WARN, "not an RKLLM model?"),
        (b"rkllm-toolkit version: 1.3.0" + bytes(70_000), Outcome.WARN, "not an RKLLM model?"),
    ],
)
def test_toolkit(rock5: FakeBoard, tail: bytes, outcome: Outcome, words: str) -> None:
    """A model made by a newer toolkit than the runtime is a failure.

    One that does not say is a warning.
    """
    rock5.model.write_bytes(b"x" * 100_000 + tail)
    check = rock5.check("model q")
    assert (check.outcome, words in check.finding) == (outcome, True), check.finding


def test_model_files(rock5: FakeBoard) -> None:
    """A missing model is a failure; without a runtime the toolkit is only shown.

    A pipe is not waited for.
    """
    (rock5.root / "usr/lib/librkllmrt.so").unlink()
    assert "no runtime to compare" in rock5.check("model q").finding
    rock5.model.unlink()
    assert (
        rock5.check("model q").outcome,
        "source missing: " in rock5.check("model q").finding,
    ) == (
        Outcome.FAIL,
        True,
    )
    assert rock5.check("memory").outcome is Outcome.SKIP
    os.mkfifo(rock5.model)
    assert "is not a regular file" in rock5.check("model q").finding


def test_memory_of_sliding_windows(rock5: FakeBoard) -> None:
    """They are kept in full, so the context counts: it may be larger than the model."""
    facts = {
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "attention.key_length": 256,
        "attention.value_length": 256,
        "attention.sliding_window": 1024,
        "block_count": 34,
        "context_length": 131_072,
        "embedding_length": 2560,
    }
    pairs = [pair(f"gemma3.{name}", UINT32, value) for name, value in facts.items()]
    rock5.model.write_bytes(gguf(*pairs))
    rock5.declare("{kind: llamacpp}")
    check = rock5.check("memory")
    assert check.outcome is Outcome.OK
    assert "570.4 MB of them for its context, as its sliding windows are kept" in check.finding

    rock5.write("proc/meminfo", "MemAvailable: 400000 kB\n")
    check = rock5.check("memory")
    assert check.outcome is Outcome.WARN
    assert "a smaller max_context_len takes less" in check.next_step


def test_memory_and_disk(rock5: FakeBoard) -> None:
    """Too little memory or disk is a warning that names the figures.

    The store's own files count as room.
    """
    with rock5.model.open("ab") as file:
        file.truncate(10_000_000_000)
    check = rock5.check("memory")
    assert check.outcome is Outcome.WARN
    assert "12.29 GB available; q, the largest model, needs about 12.50 GB" in check.finding
    rock5.write("proc/meminfo", "nonsense")
    assert rock5.check("memory").outcome is Outcome.SKIP
    rock5.declare("{kind: rkllm}", cache="{max_bytes: 900TB}")
    check = rock5.check("disk")
    assert check.outcome is Outcome.WARN
    assert "allowed by cache.max_bytes" in check.finding
    rock5.declare("{kind: rkllm}", cache="{max_bytes: 2MiB}")
    assert rock5.check("disk").outcome is Outcome.OK
    (rock5.cache / "q").mkdir(parents=True)
    tag(rock5.cache)
    (rock5.cache / "q/a.rkllm_cache").write_bytes(b"x" * 5000)
    assert "5.0 kB in the store" in rock5.check("disk").finding
    rock5.declare("{kind: rkllm}")
    assert (
        "what 2 prompts will take is not known before one is built" in rock5.check("disk").finding
    )


def test_what_the_caches_will_take(board: FakeBoard) -> None:
    """By the model's header while none is built; by those that are built.

    Never a number out of the air.
    """
    sizes = {
        "block_count": 30,
        "embedding_length": 576,
        "attention.head_count": 9,
        "attention.head_count_kv": 3,
    }
    board.model.write_bytes(
        gguf(*(pair(f"llama.{name}", UINT32, value) for name, value in sizes.items()))
    )
    board.declare("{kind: llamacpp}")
    # 2 prompts of 360 letters are some 180 tokens, of 23,040 bytes each: SmolLM2-135M.
    assert "about 4.1 MB needed by 2 prompts" in board.check("disk").finding
    (board.cache / "q").mkdir(parents=True)
    tag(board.cache)
    (board.cache / "q/broken.json").write_text("{}")
    (board.cache / "q/a.json").write_text(SIDECAR)
    assert "about 1.4 MB needed by 2 prompts" in board.check("disk").finding
    board.model.write_bytes(gguf())
    (board.cache / "q/a.json").unlink()
    assert "what 2 prompts will take is not known" in board.check("disk").finding


def test_a_folder_that_the_daemon_would_refuse(board: FakeBoard) -> None:
    """It is a failure in the words of `rkcached run`; it was "ok, 0 B in the store"."""
    board.model.write_bytes(gguf())
    board.declare("{kind: llamacpp}")
    assert board.check("disk").outcome is Outcome.OK
    board.cache.mkdir()
    assert board.check("disk").outcome is Outcome.OK
    (board.cache / "thesis.txt").write_text("mine")
    check = board.check("disk")
    assert check.outcome is Outcome.FAIL
    assert check.finding.endswith(
        "is not taken as a store: it contains 'thesis.txt', but not the CACHEDIR.TAG that marks a "
        "store"
    )
    assert "--cache-dir" in check.next_step
    (board.cache / "thesis.txt").unlink()
    board.cache.rmdir()
    with nobody():
        check = board.check("disk")
    assert (check.outcome, "Permission denied" in check.finding) == (Outcome.FAIL, True)


def test_an_engine_that_is_not_installed(board: FakeBoard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure with its remedy, said once; `check` fails for the same reason."""
    board.model.write_bytes(gguf())
    board.declare("{kind: llamacpp}")
    assert board.check("engine").outcome is Outcome.OK
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    check = board.check("engine")
    assert (check.outcome, check.finding) == (
        Outcome.FAIL,
        "the package xllamacpp is not installed",
    )
    assert "pip install xllamacpp" in check.next_step
    assert board.check("model q").outcome is Outcome.OK


def test_prompts_that_cannot_be_read(board: FakeBoard) -> None:
    """Each is counted, and the first is told with what to do."""
    board.model.write_bytes(gguf())
    board.declare("{kind: llamacpp}")
    assert board.check("prompts").finding == "2 prompts, all readable"
    (board.root.parent / "a.md").unlink()
    (board.root.parent / "b.md").write_text(" ")
    check = board.check("prompts")
    assert check.outcome is Outcome.FAIL
    assert (
        check.finding == f"source missing: {board.root.parent}/a.md, and 1 more with such problems"
    )
    assert check.next_step


def test_no_npu(board: FakeBoard) -> None:
    """A machine without an NPU says so first.

    That is a failure only where the manifest wants RKLLM.
    """
    names = ("board", "runtime library", "NPU devices", "NPU driver", "NPU clock")
    report = board.examine()
    assert printed(report).startswith(NO_NPU)
    assert {outcomes(report)[name] for name in names} == {"fail"}
    board.model.write_bytes(gguf())
    board.declare("{kind: llamacpp}")
    for report in (board.examine(), board.examine(manifest=False)):
        assert printed(report).startswith(NO_NPU)
        assert {outcomes(report)[name] for name in names} == {"skip"}
        assert not report.failed
        assert not report.npu


def test_other_engine_on_a_board(rock5: FakeBoard) -> None:
    """Where the manifest uses another engine, what RKLLM lacks is a warning.

    Its models are not RKLLM's.
    """
    (rock5.root / "usr/lib/librkllmrt.so").unlink()
    rock5.model.write_bytes(gguf())
    rock5.declare("{kind: llamacpp}")
    report = rock5.examine()
    assert not report.failed
    assert (outcomes(report)["runtime library"], outcomes(report)["model q"]) == ("warn", "ok")


def test_other_boards(rock5: FakeBoard) -> None:
    """Variants of the supported chips are known; a board with another chip is not."""
    for name in ("rk3588s", "rk3576", "rk3562", "rv1126b"):
        rock5.write("proc/device-tree/compatible", f"rockchip,{name}-evb\0rockchip,{name}\0")
        assert rock5.check("board").finding == f"Radxa ROCK 5B, {name.upper()}"
    rock5.write("proc/device-tree/compatible", "rockchip,rk3568\0")
    check = rock5.check("board")
    assert check.outcome is Outcome.FAIL
    assert "RK3588" in check.finding


def test_cpus_that_are_not_there(rock5: FakeBoard) -> None:
    """A warning; nothing where all exist, or where the kernel does not say."""
    rock5.declare("{kind: rkllm}", more="    npu: {enabled_cpus: [4, 7, 9, 10]}\n")
    assert "CPUs" not in outcomes(rock5.examine())
    rock5.write("sys/devices/system/cpu/present", "0-7\n")
    check = rock5.check("CPUs")
    assert (check.outcome, check.finding) == (
        Outcome.WARN,
        "npu.enabled_cpus of q: CPUs 9, 10 do not exist here, this machine has CPUs 0-7",
    )
    rock5.declare("{kind: rkllm}", more="    npu: {enabled_cpus: [4, 7]}\n")
    assert "CPUs" not in outcomes(rock5.examine())


def test_cpus_that_llama_cpp_computes_on(rock5: FakeBoard) -> None:
    """Those that are fast, unless the manifest has a number of threads."""
    rock5.declare("{kind: llamacpp}")
    rock5.write("sys/devices/system/cpu/present", "0-7\n")
    assert rock5.check("CPUs").finding == "llama.cpp computes on all 8 CPUs"
    for cpu in range(8):
        rock5.write(f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", "1024" if cpu > 3 else "414")
    expected = "llama.cpp computes on the 4 fast CPUs of 8: 4-7"
    assert rock5.check("CPUs").finding == expected
    rock5.declare("{kind: llamacpp, threads: 8}")
    assert "CPUs" not in outcomes(rock5.examine())


def test_report_data(rock5: FakeBoard) -> None:
    """The JSON has every check with its next step."""
    data = json.loads(json.dumps(report_data(rock5.examine())))
    assert (data["ready"], data["npu"]) == (True, True)
    assert {"name", "outcome", "finding", "next_step"} == set(data["checks"][0])


def test_this_machine(tmp_path: Path) -> None:
    """The installed program on this machine.

    An exit code that tells, a table or JSON, never a traceback.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RKCACHED_")
    }
    environment["COLUMNS"] = "400"  # no line breaks, however long the folder's name is

    def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rkcached", "doctor", *arguments]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=tmp_path,
            env=environment,
        )
        assert done.stderr == ""
        return done

    done = doctor("--json")
    data = json.loads(done.stdout)
    assert done.returncode == (0 if data["ready"] else 1)
    (tmp_path / "m.model").write_text('{"rkcached_memory_model": 1}')
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text("version: 1\nengine: {kind: memory}\nmodels: {m: {path: m.model}}\n")
    done = doctor()
    assert done.returncode == 0
    assert "engine memory, 1 model" in done.stdout
    manifest.write_text(
        "version: 1\nengine: {kind: rkllm, library: none.so}\nmodels: {m: {path: m.model}}\n"
    )
    done = doctor()
    assert done.returncode == 1
    assert "there is no runtime library" in done.stdout
    assert doctor("--manifest", "gone.yaml").returncode == 1
