"""Files that the kernel refuses: to this process as to an ordinary user, though root runs it, or as a broken disk does."""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_OVERRIDES = 1 << 1 | 1 << 2 | 1 << 3  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER of <linux/capability.h>
_READ_ALL = 1 << 2  # CAP_DAC_READ_SEARCH
_ASK = (
    *((os, name) for name in ("open", "stat", "lstat", "scandir", "listdir", "mkdir", "access", "readlink")),
    *((module, "open") for module in (io, builtins)),
)


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Within the block the modes of files hold for this thread, and those that it starts, though root runs the tests."""
    before = _effective()
    _set_effective(before & ~_OVERRIDES)
    try:
        yield
    finally:
        _set_effective(before)


@contextmanager
def no_file_beyond(num_bytes: int) -> Iterator[None]:
    """The kernel refuses every write beyond `num_bytes` of a file, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def become_user(uid: int) -> None:
    """For good, where root runs the tests: the user of that uid, who may write to nothing but his own.

    He and his children may read all, so that they find a Python that lies in root's home.
    """
    libc, keep_capabilities, ambient, add = _libc(), 8, 47, 2  # as <linux/prctl.h> numbers them
    assert libc.prctl(keep_capabilities, 1, 0, 0, 0) == 0
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    header, sets = _capabilities()
    sets[0] = sets[1] = sets[2] = _READ_ALL
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
    assert libc.prctl(ambient, add, _READ_ALL.bit_length() - 1, 0, 0) == 0


def _effective() -> int:
    header, sets = _capabilities()
    assert _libc().capget(header, sets) == 0
    return int(sets[0])


def _set_effective(capabilities: int) -> None:
    header, sets = _capabilities()
    assert _libc().capget(header, sets) == 0
    sets[0] = capabilities
    assert _libc().capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def _capabilities() -> tuple[Any, Any]:
    """A header for this thread, and room for (effective, permitted, inheritable), lower and upper halves."""
    return (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def forbid(path: Path, patch: pytest.MonkeyPatch) -> None:
    """No mode: EACCES for an ordinary user."""
    path.chmod(0)


def loop(path: Path, patch: pytest.MonkeyPatch) -> None:
    """A link to itself in its place: ELOOP."""
    path.rename(path.with_name("away"))
    path.symlink_to(path.name)


def failing(number: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """Each system call on the path, or on what lies below it, fails with that error, as on a broken disk or a lost server."""

    def fail(path: Path, patch: pytest.MonkeyPatch) -> None:
        prefix = str(path)

        def refuses(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(file: Any, *args: Any, **options: Any) -> Any:
                name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""
                if f"{name}/".startswith(f"{prefix}/"):
                    raise OSError(number, os.strerror(number), name)
                return original(file, *args, **options)

            return call

        for module, name in _ASK:
            patch.setattr(module, name, refuses(getattr(module, name)))

    return fail


REASONS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "EACCES": forbid,
    "ELOOP": loop,
    "EIO": failing(errno.EIO),
    "ESTALE": failing(errno.ESTALE),
}
"""Ways in which a path cannot be used."""
