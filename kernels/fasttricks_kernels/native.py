"""C compiled on the user's machine at first use and kept in a cache: ctypes and a C compiler, nothing of Python's or torch's.

The file's name in the cache is a fingerprint of the source, the headers beside it, the compiler, its flags and the CPU, so that
an edit or another machine on a shared home folder never meets old code. It is written under another name and renamed: ranks that
start at once may each compile, half a second, and none sees half a file.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_COMPILERS = ("cc", "gcc", "clang")
# without -fno-trapping-math gcc vectorises no choice between two values for AVX2, as a mask is; the bits are the same
FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
# the widest vectors of this CPU
_NATIVE = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"


_OTHER_CACHE = "set XDG_CACHE_HOME to a folder that this user can write"


class NativeError(RuntimeError):
    """The compiled code is not available here; the message gives the reason and the way out."""


def load(source: Path, flags: Sequence[str] = (), *, cache: Path | None = None) -> ctypes.CDLL:
    """The functions of `source`; compiles it with FLAGS and `flags` first where `cache` (cache_folder()) lacks it.

    Raises NativeError where there is no compiler, where it fails, and where the cache cannot be written or loaded.
    """
    path = build(source, flags, cache=cache_folder() if cache is None else cache)
    try:
        return ctypes.CDLL(str(path))  # loaded once a process, never unloaded
    except OSError as error:
        raise NativeError(f"{path} cannot be loaded ({error}); remove it, or {_OTHER_CACHE}") from None


def entry(library: ctypes.CDLL, name: str, argument: type[ctypes.Structure], result: Any = None) -> Callable[..., Any]:
    """The C function `name` as a function of an argument and a number of threads. It takes the argument's address, the number and
    thread_pool().

    result: its ctypes type; None: void. Both are set here, once, and not at each call.
    """
    function, pool = getattr(library, name), thread_pool()
    function.argtypes, function.restype = (ctypes.POINTER(argument), ctypes.c_uint32, ctypes.c_void_p), result
    return lambda given, threads: function(given, threads, pool)


def thread_pool() -> ctypes.c_void_p | None:
    """The address of GOMP_parallel, with which C code runs in the threads that torch has; a look at the loaded libraries.

    torch loads its OpenMP for all to see, so import torch before. None where there is no such function, as on macOS: one thread
    then does the work.
    """
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p)


def build(source: Path, flags: Sequence[str] = (), *, cache: Path) -> Path:
    """The shared library in `cache`, compiled where it is not there. Raises NativeError."""
    compiler = find_compiler()
    command = [*compiler, *FLAGS, _NATIVE, *flags]
    path = cache / f"{source.stem}-{_fingerprint(source, command)}.so"
    try:
        if path.is_file():
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{source.stem}-") as folder:
            made = Path(folder) / path.name
            _run([*command, "-o", str(made), str(source), "-lm"])
            made.replace(path)
    except OSError as error:
        raise NativeError(f"{cache} cannot be used ({error.strerror or error}); {_OTHER_CACHE}") from None
    return path


def cache_folder() -> Path:
    """fasttricks in $XDG_CACHE_HOME, or in ~/.cache. Raises NativeError where this user has no home."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    if os.path.isabs(xdg):
        return Path(xdg, "fasttricks")
    try:
        return Path.home() / ".cache" / "fasttricks"
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in a container under any uid
        raise NativeError(f"this user has no home folder; {_OTHER_CACHE}, or HOME to one") from None


def find_compiler() -> list[str]:
    """The command that compiles C: $CC, else the first of cc, gcc and clang. Raises NativeError where there is none."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise NativeError(f"CC={os.environ['CC']} is no command ({error}); correct it, or unset it") from None
    for command in [named] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    sought = f"CC={named[0]}" if named else ", ".join(_COMPILERS)
    raise NativeError(f"no C compiler ({sought}); install gcc or clang, or name one in CC")


def _fingerprint(source: Path, command: list[str]) -> str:
    sources = [path.read_text("utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    parts = [*sources, " ".join(command), _run([command[0], "--version"]), platform.platform(), _cpu()]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _cpu() -> str:
    """The facts that -march=native depends on: the CPU's model and its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "cpu family", "model\t")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _run(command: list[str]) -> str:
    """The output of `command`. Raises NativeError where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"`{command[0]}` does not run: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise NativeError(f"`{' '.join(command)}` failed with status {done.returncode}: {said[0]}")
    return done.stdout
