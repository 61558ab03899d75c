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


class LeadsOut(OSError):
    """A path leads out of the folder that it was to stay in."""


def open_regular(path: Path, *, follow: bool = True, within: Path | None = None) -> BufferedReader:
    """Open a regular file to read it.

    `follow`: it may be a link to one. `within`: the file that is opened must lie below this folder,
    whatever links lead to it.

    Errors: OSError, with EINVAL or EISDIR where it is something else, and ELOOP for a link that is
    not meant; LeadsOut.
    """

    def opener(name: str, _: int) -> int:
        return os.open(name, _FLAGS if follow else _FLAGS | os.O_NOFOLLOW)

    stream = open(path, "rb", opener=opener)  # noqa: SIM115 - Path.open takes no opener
    error: OSError | None = None
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        error = OSError(errno.EINVAL, "it is not a regular file", str(path))
    elif within is not None and not _lies_in(stream.fileno(), within):
        error = LeadsOut(errno.ELOOP, f"it leads out of {within}", str(path))
    if error is None:
        return stream
    stream.close()
    raise error


def _lies_in(fd: int, folder: Path) -> bool:
    """Whether the open file lies below the folder, as the kernel knows it."""
    real = Path(f"/proc/self/fd/{fd}").readlink()
    return real.is_relative_to(folder.resolve())


def read_regular(
    path: Path, max_bytes: int, *, follow: bool = True, within: Path | None = None
) -> bytes:
    """The content of a regular file. Errors: as `open_regular`; EFBIG where it has more."""
    with open_regular(path, follow=follow, within=within) as stream:
        size_bytes = min(os.fstat(stream.fileno()).st_size, max_bytes)
        data = stream.read(size_bytes + 1)
        if len(data) > size_bytes:  # it has grown, or said that it is empty
            data += stream.read(max_bytes + 1 - len(data))
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it has more than {max_bytes:,} bytes", str(path))
    return data
