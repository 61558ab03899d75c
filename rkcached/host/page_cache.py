"""Has the kernel read a file before somebody needs it (the page cache of Linux)."""

from __future__ import annotations

import re
from pathlib import Path

from rkcached.host.regular import open_regular

SHARE = 0.5
"""A file is read ahead if it takes no more than this share of the memory that is available: what is
read would else push out what is needed more."""

# POSIX_FADV_WILLNEED reads no more than a megabyte or so of a file (mm/readahead.c).
_CHUNK_BYTES = 1 << 20


def read_ahead(path: Path) -> bool:
    """Read a file, and keep nothing of it. Returns whether it was read. Blocking."""
    try:
        if path.stat().st_size > SHARE * _available_bytes():
            return False

        chunk = bytearray(_CHUNK_BYTES)
        with open_regular(path, follow=False) as stream:
            while stream.readinto(chunk):
                pass
    except OSError:
        return False
    return True


def _available_bytes() -> int:
    """Memory that processes can have without swapping. Errors: OSError."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
