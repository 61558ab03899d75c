"""The headers of each engine's prompt cache files, for engines and `rkcached inspect`.

    llama.cpp  u32 'ggsq'        u32 version  u32 n  n i32 values      (llama_state_seq_save_file)
    RKLLM      u32 magic         u32 8        u32 n  n i32 ids         (undocumented)
    memory     8 bytes RKCMEMKV  u32 version  u64 n  n bytes, the tokens, then 8 bytes for each

All numbers are little-endian. The header of RKLLM was seen in a file of 1.1 (magic 'ggsn', from
llama.cpp, which it descends from) and reported for later versions (since 1.2.3 the magic is an
architecture number). It is good for showing and counting, never a reason by itself to reject a
file.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from rkcached.host.regular import open_regular

WORDS: Final = struct.Struct("<III")
"""Magic, version and n of llama.cpp and RKLLM."""

SEQUENCE_MAGIC: Final = 0x67677371
"""ggsq: llama.cpp, the state of one sequence."""

SESSION_MAGIC: Final = 0x6767736E
"""ggsn: llama.cpp, a whole session; RKLLM 1.1."""

RKLLM_VERSION: Final = 8

MEMORY: Final = struct.Struct("<8sIQ")
MEMORY_MAGIC: Final = b"RKCMEMKV"


def rkllm_tokens(path: Path) -> int | None:
    """The tokens that a file of RKLLM has by its header.

    None if it is missing, unreadable or too short.
    """
    try:
        with open_regular(path) as file:
            data = file.read(WORDS.size)
    except OSError:
        return None

    if len(data) < WORDS.size:
        return None

    _, _, n_tokens = WORDS.unpack(data)
    return int(n_tokens)
