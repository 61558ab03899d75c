"""Real engines under the unit's sandbox.

A build and a chat each, on llama.cpp and on the stand-in for RKLLM.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from machine import UNIT, Machine

from tests.rkllm_standin import standin

PROMPT = "You are the keeper of a lighthouse and answer in short sentences. " * 12
MANIFEST = """\
version: 1
engine: {engine}
models:
  m:
    path: {model}
    chat_template: chatml
    params: {{max_context_len: 1024, max_new_tokens: 16}}{more}
    prompts: {{a: prompts/a.md}}
"""


def warm_chat(machine: Machine, engine: str, model: str, more: str = "") -> None:
    machine.write("/etc/rkcached/prompts/a.md", PROMPT)
    machine.write(
        "/etc/rkcached/manifest.yaml", MANIFEST.format(engine=engine, model=model, more=more)
    )
    machine.systemctl("start", UNIT)
    machine.wait_line("1 fresh", 120)
    answer = machine.ask("m/a", "who are you?")
    assert answer["rkcached"]["state"] == "hit"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
    assert answer["choices"][0]["message"]["content"]


def test_the_npu_is_reachable_in_the_sandbox(machine: Machine) -> None:
    """Its node belongs to the group render, as udev makes it.

    Here another character device stands in for it.
    """
    machine.run(
        "sh", "-c", "mknod /dev/rknpu c 1 5 && chgrp render /dev/rknpu && chmod 660 /dev/rknpu"
    )
    machine.drop_in(
        "probe",
        "[Service]\nExecStartPre=/bin/sh -c 'head -c 4 </dev/rknpu >/var/lib/rkcached/npu'\n",
    )
    machine.systemctl("start", UNIT)
    assert machine.run("stat", "-c", "%s %U", "/var/lib/rkcached/npu").stdout == "4 rkcached\n"


@pytest.mark.model
def test_llama_cpp_under_the_sandbox(machine: Machine) -> None:
    """Threads, memory maps and compiled kernels live with no network and no writable code."""
    machine.run("test", "-r", "/small.gguf")
    warm_chat(machine, "{kind: llamacpp}", "/small.gguf")
    # A worker has a filter of its own, within the unit's.
    assert machine.journal("EVENT=worker not confined") == []
    [worker] = machine.worker_pids()
    status = machine.read(f"/proc/{worker}/status")
    [filters] = [line for line in status.splitlines() if line.startswith("Seccomp_filters:")]
    daemon = machine.read(f"/proc/{machine.main_pid}/status")
    assert filters not in daemon
    assert "Seccomp:\t2" in daemon


def test_rkllm_s_binding_under_the_sandbox(machine: Machine, tmp_path: Path) -> None:
    """Callbacks come from the library's own thread.

    The library and the model are where a board has them.
    """
    library = standin.build("D", tmp_path)
    machine.write("/opt/librkllmrt.so", library.read_bytes())
    machine.write("/opt/m.rkllm", standin.write_model(tmp_path / "m.rkllm").read_bytes())
    warm_chat(machine, "{kind: rkllm, library: /opt/librkllmrt.so}", "/opt/m.rkllm")


def test_a_library_may_pin_its_threads(machine: Machine, tmp_path: Path) -> None:
    """`npu.enabled_cpus` asks for it, and the sandbox refused sched_setaffinity.

    Then the model could not be loaded.
    """
    library = standin.build("D", tmp_path)
    machine.write("/opt/librkllmrt.so", library.read_bytes())
    machine.write(
        "/opt/pins.rkllm", standin.write_model(tmp_path / "m.rkllm", pins="yes").read_bytes()
    )
    more = "\n    npu: {enabled_cpus: [0]}"
    warm_chat(machine, "{kind: rkllm, library: /opt/librkllmrt.so}", "/opt/pins.rkllm", more)
    [worker] = machine.worker_pids()
    assert "Cpus_allowed_list:\t0\n" in machine.read(f"/proc/{worker}/status")
