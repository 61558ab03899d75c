"""A worker's memory: its limit, and the reason of a refusal or a death when memory ran out.

The limit is RLIMIT_DATA, what a process takes for itself: heap, private writable mappings, stacks.
A model file that llama.cpp maps is not in it, for the kernel may take its pages back at any time;
RLIMIT_AS would count it, and addresses that are merely reserved. A cgroup for each worker would
count it, too, and needs systemd to delegate ours. None of the three sees the NPU's own buffers,
which come from DMA heaps. Beyond the limit an allocation fails: a library logs that and refuses, or
ends its process.
"""

from __future__ import annotations

import os
import re
import resource
import signal
from collections.abc import Iterable
from pathlib import Path

# The words of C++, Python, glibc and llama.cpp when an allocation fails.
_WANT = re.compile(
    r"bad_alloc|MemoryError|(out of|insufficient) memory"
    r"|(cannot|failed to|unable to) (m?alloc|reserve)",
    re.IGNORECASE,
)


_ANY_ENGINE_BYTES = 4 << 30
_TOKEN_BYTES = 1 << 20
_MACHINE_SHARE = 0.9


def limit(max_bytes: int) -> None:
    """Limit this process, for good. Errors: OSError, ValueError."""
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def default_limit(model: Path, context_tokens: int) -> int | None:
    """The bytes that a worker may take where the manifest sets no limit: far more than it needs.

    A KV state takes some 0.5 MiB a token in a model of 7 billion parameters, less in smaller and
    newer ones; a library that does not map the model's file has it in memory once. None if the
    machine does not say what it has.
    """
    try:
        machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        model_bytes = model.stat().st_size
    except (OSError, ValueError):
        return None
    needed_bytes = _ANY_ENGINE_BYTES + 2 * model_bytes + context_tokens * _TOKEN_BYTES
    return min(int(_MACHINE_SHARE * machine_bytes), needed_bytes)


def refused(lines: Iterable[str], max_bytes: int | None) -> str:
    """The reason and the next step, if `lines` of a process with this limit report a refusal.

    Empty if they do not.
    """
    if max_bytes is None or not any(map(_WANT.search, lines)):
        return ""
    return (
        f"it wanted more than engine.max_memory_bytes ({max_bytes:,} bytes); "
        "raise that in the manifest, or lower params.max_context_len of the model"
    )


def killed(code: int, kills_before: int) -> str:
    """The reason and the next step, if the kernel killed a process because memory ran out.

    `code` is its exit code, `kills_before` the count of `kernel_kills` at its start. Empty if it
    ended otherwise.
    """
    if code != -signal.SIGKILL or kernel_kills() <= kills_before:
        return ""
    return (
        "the kernel ended it, as memory ran out; lower params.max_context_len "
        "or engine.max_loaded, or give the service more (MemoryMax)"
    )


def kernel_kills(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """How many processes of our cgroup (v2) the kernel has killed because memory ran out.

    0 where that cannot be read.
    """
    try:
        lines = proc.read_text().splitlines()
        group = next(line for line in lines if line.startswith("0::"))
        events = (root / group.removeprefix("0::/") / "memory.events").read_text()
        return int(dict(line.split() for line in events.splitlines())["oom_kill"])
    except (OSError, StopIteration, KeyError, ValueError):
        return 0
