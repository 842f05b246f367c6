"""Files that the kernel refuses: to this process as to an ordinary user, though root runs it, or as a broken disk does."""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_OVERRIDES = 1 << 1 | 1 << 2 | 1 << 3  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER of <linux/capability.h>
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
