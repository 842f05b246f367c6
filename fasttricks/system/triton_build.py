"""Triton's launcher: the module in C, built on the user's machine, that starts every kernel on a GPU."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

import torch

from fasttricks.config import ConfigError

_INSTALL = "apt install gcc python3-dev, or take an image that has them (-devel)"


def check_triton(device: torch.device) -> None:
    """Raise ConfigError where Triton cannot start kernels on `device`, a GPU; on a CPU it asks nothing.

    Every precision needs them: the images' colours and the losses are kernels, and for fp16 the optimizer. It lets Triton do its
    own build, so it asks about the compiler, the headers, the driver's library and the cache just as Triton does. A launcher in
    the cache needs no compiler. Cost: a second at the first time on a machine, as the first kernel would have; then
    milliseconds. (Triton before 3.8 builds a launcher for each kind of arguments too, by the same compiler.)
    """
    if device.type != "cuda":
        return
    try:
        from triton import knobs
        from triton.runtime import driver

        _ = knobs.nvidia.ptxas, driver.active.utils
    except (RuntimeError, ImportError, AssertionError, OSError, subprocess.SubprocessError) as error:
        rule = f"Triton cannot build or load the launcher of its kernels: {_reason(error)}"
        raise ConfigError(f"device = {device.type!r}: {rule}") from error


def _reason(error: Exception) -> str:
    """The missing part, and the way out."""
    said = str(error).partition("\n")[0].rstrip(".")
    compiler, file = os.environ.get("CC"), getattr(error, "filename", None)
    if isinstance(error, subprocess.CalledProcessError) and error.cmd[0] != "/sbin/ldconfig":
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        if not header.is_file():
            return f"{header} is missing; {_INSTALL}"
        way_out = "set CC to another compiler, or unset it"
        return f"{error.cmd[0]} ended with exit status {error.returncode}, and its message is above; {way_out}"
    if "C compiler" in said:
        return f"the PATH has neither gcc nor clang; {_INSTALL}, or set CC to a compiler"
    if compiler is not None and file == compiler:
        return f"CC = {compiler!r} is no program that can be started; correct it, or unset it"
    if "libcuda" in said or "ldconfig" in said:
        return f"the driver's libcuda.so.1 is not found ({said}); name its folder in TRITON_LIBCUDA_PATH"
    if "ptxas" in said:
        return f"{said}; the triton wheel brings it, or name yours in TRITON_PTXAS_PATH"
    if isinstance(error, (OSError, ImportError)):
        return f"{said}; name a folder that can be written to, and whose files can be run, in TRITON_CACHE_DIR"
    return f"{said}; see that nvidia-smi works"
