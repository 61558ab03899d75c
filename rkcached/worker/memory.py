"""A worker's memory: its limit, and a death for want of memory told as what it is.

The limit is RLIMIT_DATA, what a process takes for itself: heap, private writable mappings, stacks.
A model file that llama.cpp maps is not in it, for the kernel may take its pages back at any time;
RLIMIT_AS would count it, and addresses that are merely reserved. A cgroup for each worker would
count it, too, and needs systemd to delegate ours. None of the three sees the NPU's own buffers,
which come from DMA heaps. Beyond the limit an allocation fails: a library says so in its log and
refuses, or ends its process.
"""

from __future__ import annotations

import re
import resource
import signal
from collections.abc import Iterable
from pathlib import Path

_WANT = re.compile(
    r"bad_alloc|MemoryError|(out of|insufficient) memory|(cannot|failed to|unable to) (m?alloc|reserve)",
    re.IGNORECASE,
)
"""What C++, Python, glibc and llama.cpp say when an allocation fails."""


def limit(max_bytes: int) -> None:
    """Limit this process, for good. Errors: OSError, ValueError."""
    resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def refused(lines: Iterable[str], max_bytes: int | None) -> str:
    """Why memory was refused and what to do, if a process with this limit said in `lines` that it got none."""
    if max_bytes is None or not any(map(_WANT.search, lines)):
        return ""
    return (
        f"it wanted more than engine.max_memory_bytes ({max_bytes:,} bytes); "
        "raise that in the manifest, or lower params.max_context_len of the model"
    )


def killed(code: int, kills_before: int) -> str:
    """Why the kernel killed a process and what to do, if it ended with `code` for want of memory."""
    if code != -signal.SIGKILL or kernel_kills() <= kills_before:
        return ""
    return (
        "the kernel ended it, as memory ran out; lower params.max_context_len or engine.max_loaded, "
        "or give the service more (MemoryMax)"
    )


def kernel_kills(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Processes of our cgroup (v2) that the kernel killed for want of memory, ever; 0 where it does not say."""
    try:
        group = next(
            line for line in proc.read_text().splitlines() if line.startswith("0::")
        ).removeprefix("0::/")
        events = dict(
            line.split() for line in (root / group / "memory.events").read_text().splitlines()
        )
        return int(events["oom_kill"])
    except (OSError, StopIteration, KeyError, ValueError):
        return 0
