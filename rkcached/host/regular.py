"""Opens files that anybody may have put there, or may exchange at any moment.

Opening a pipe waits for its writer, and a device may do anything; a link leads elsewhere; a file
may say that it has 100 GB. So what is opened is looked at by its descriptor, and it is a regular
file or an error; and nothing reads more than it asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def open_regular(path: Path, *, follow: bool = True) -> BufferedReader:
    """Open a regular file to read it. `follow`: it may be a link to one.

    Errors: OSError, with EINVAL or EISDIR where it is something else, and ELOOP for a link that is
    not meant.
    """

    def opener(name: str, _: int) -> int:
        return os.open(name, _FLAGS if follow else _FLAGS | os.O_NOFOLLOW)

    stream = open(path, "rb", opener=opener)  # noqa: SIM115 - Path.open takes no opener
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        return stream
    stream.close()
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_regular(path: Path, max_bytes: int, *, follow: bool = True) -> bytes:
    """The content of a regular file. Errors: as `open_regular`; EFBIG where it has more."""
    with open_regular(path, follow=follow) as stream:
        size_bytes = min(os.fstat(stream.fileno()).st_size, max_bytes)
        data = stream.read(size_bytes + 1)
        if len(data) > size_bytes:  # it has grown, or said that it is empty
            data += stream.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return data
