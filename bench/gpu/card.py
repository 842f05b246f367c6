"""The machine: card, driver, versions, clocks, and its roofs (a copy on the device, from the host, a matrix product)."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.gpu.child import attempt
from bench.gpu.clock import device_of, device_seconds
from bench.gpu.parts import BUILDS, CARD, COPY_RATE, CUDA, GPUS, LAUNCHER, Job, Row, is_installed
from fasttricks.config import ConfigError
from fasttricks.runs.folder import releases
from fasttricks.system.distributed import cpu_name
from fasttricks.system.monitor import start_monitor
from fasttricks.system.triton_build import check_triton

SMI = (
    "name,driver_version,vbios_version,pcie.link.gen.current,pcie.link.width.current,power.limit,clocks.max.sm,"
    "clocks.max.memory,mig.mode.current"
)
PACKAGES = ("nvidia.dali", "timm", "torchvision", "liger_kernel", "pynvml", "pytest", "simplejpeg", "tyro")
"""Those without which parts are skipped, or rows left out."""


def measure(job: Job) -> Iterator[Row]:
    """(name, value) of each fact, the rates last."""
    found = torch.cuda.is_available()
    yield _row(CUDA, found)
    device = device_of("cuda" if job.device == "cuda" and found else "cpu")
    yield _row(CARD, torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name())
    yield _row(GPUS, torch.cuda.device_count())
    yield from (_row(*fact) for fact in software().items())
    yield _row(LAUNCHER, launcher(device))
    if job.device == "cuda" and not found:
        return
    if device.type == "cuda":
        yield from attempt({"name": "card's properties"}, lambda: (_row(*fact) for fact in properties(device).items()))
        yield from attempt({"name": "nvidia-smi"}, lambda: (_row(*fact) for fact in smi(SMI).items()))
    monitor = start_monitor(device, period_s=0.2)
    for name, rate in rates(device, tiny=job.tiny).items():
        yield from attempt({"name": name}, lambda rate=rate: iter([{"value": rate()}]))
    yield from (_row(f"{name}, mean under this load", value) for name, value in monitor.take().items())
    if monitor.note:
        yield _row("monitor", monitor.note)
    monitor.close()


def software() -> dict[str, Any]:
    """Versions, and the packages that are there."""
    libraries = {
        "CUDA of torch": torch.version.cuda or "none",
        "cuDNN": torch.backends.cudnn.version() or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none",
        "architectures of torch": " ".join(torch.cuda.get_arch_list()) or "none",
        "driver": _driver(),
        "CPU": f"{cpu_name()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores",
        "system": platform.platform(),
        "cuDNN benchmark, default": torch.backends.cudnn.benchmark,
        "TF32 in cuDNN, default": torch.backends.cudnn.allow_tf32,
    }
    return releases() | libraries | {name: "there" if is_installed(name) else "absent" for name in PACKAGES}


def launcher(device: torch.device) -> str:
    """Whether Triton's kernels can be started on `device`: BUILDS, or the reason and the way out."""
    if device.type != "cuda":
        return "not needed"
    try:
        check_triton(device)
    except ConfigError as error:
        return str(error)
    return BUILDS


def properties(device: torch.device) -> dict[str, Any]:
    """The card as torch describes it."""
    card = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory, bytes": total,
        "memory free at the start, bytes": free,
        "L2, bytes": card.L2_cache_size,
    }


def smi(fields: str) -> dict[str, str]:
    """The answers of nvidia-smi for the first card that CUDA shows. Raises OSError or CalledProcessError."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", first]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=15).stdout
    return {
        f"nvidia-smi {name}": value.strip() for name, value in zip(fields.split(","), answer.split(","), strict=True)
    }


def rates(device: torch.device, *, tiny: bool) -> dict[str, Callable[[], float]]:
    """Name -> a measurement, in bytes or FLOPs a second."""
    size = 1 << (20 if tiny else 29)

    def copy(source: torch.Tensor, *, counted: int, passes: int) -> float:
        target = torch.empty_like(source, device=device)
        return counted * source.nbytes / median(lambda: target.copy_(source, non_blocking=True), device, passes)

    side, dtype = (64, torch.float32) if tiny else (8192, torch.float16)

    def products() -> float:
        a, b, out = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
        return 2 * side**3 / median(lambda: torch.mm(a, b, out=out), device, 10)

    def from_host() -> float:
        source = torch.empty(size, dtype=torch.uint8)
        return copy(source.pin_memory() if device.type == "cuda" else source, counted=1, passes=4)

    return {
        COPY_RATE: lambda: copy(torch.empty(size, dtype=torch.uint8, device=device), counted=2, passes=20),
        "copy rate from pinned host memory": from_host,
        f"FLOP/s of a matrix product, {str(dtype)[6:]}": products,
    }


def median(work: Callable[[], object], device: torch.device, passes: int) -> float:
    """Median of five measurements, seconds a pass, after one that does not count."""
    return statistics.median([device_seconds(work, device, passes) for _ in range(6)][1:])


def _driver() -> str:
    """The kernel module's version line; `none` without one."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").partition("\n")[0].strip() if file.exists() else "none"


def _row(name: str, value: object) -> Row:
    return {"name": name, "value": value}
