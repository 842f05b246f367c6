"""The message where the machine refuses a command: a file, a disk, memory. In one line, with the way out. No torch."""

from __future__ import annotations

import errno
import os

_OTHER_PLACE = "give another place"
_WAYS_OUT = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give this user the right to it, or name another place"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "check the path, and that no other program removed it"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), f"free some room, or {_OTHER_PLACE}"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN),
        "its disk or server does not answer as it should: check it, mount it again, and give the same command",
    ),
    errno.EROFS: f"the disk is read-only: {_OTHER_PLACE}",
    errno.ELOOP: "its links form a circle: repair them",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOMEM: "close other programs, or take a smaller batch",
}


def refusal(error: BaseException) -> str:
    """The message of `error` in one line with the way out; empty where it is a fault of the program.

    The machine's errors are an OSError that the kernel gave, want of memory on the host or a GPU, and the end of a process that
    reads images, which the kernel ends where memory is short.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return f"{place_of(error) or 'a file or a connection'}: {error.strerror or os.strerror(error.errno)}; {way_out(error)}"
    if is_out_of_memory(error):
        rule = "not enough memory; lower --eval.batch-size or --data.image-size, or raise --accumulate where you train"
        return f"{rule} ({_first_line(error)})" if _first_line(error) else rule
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        rule = "a process that reads images has ended; is memory short? lower --data.threads or --data.prefetch"
        return f"{rule}, and resume ({_first_line(error).rstrip('. ')})"
    return ""


def place_of(error: OSError) -> str:
    """The path that `error` names; empty where it names none, as a failed write does."""
    # an error of os.replace() has two names; the second is the one that the user knows
    names = [os.fsdecode(name) for name in (error.filename2, error.filename) if isinstance(name, (str, bytes))]
    return names[0] if names else ""


def way_out(error: OSError) -> str:
    """The action that the user can take."""
    return _WAYS_OUT.get(error.errno or 0, "check the disk or network that it is on")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, or torch's, on the host or a GPU. torch is known by name, as it may be absent."""
    said = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in said or "out of memory" in said))
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
