"""The ranks of a run, and what a trainer may set for its own process. One process without torchrun is a world of one.

Under torchrun every rank is a process with one device: nccl joins GPUs, gloo joins CPUs.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fasttricks.config import ConfigError


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The device in words: the GPU's name, or the CPU's with its number of threads."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{cpu_name()}, {torch.get_num_threads()} threads"

    def gather(self, value: bytes) -> list[bytes]:
        """`value` of every rank, by rank, on every rank. A collective, and a sync."""
        if self.size == 1:
            return [value]
        values: list[bytes] = [b""] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_(self, values: Tensor) -> Tensor:
        """Sum `values`, (any shape, on the rank's device), over all ranks, in place. A collective: every rank must call it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def cpu_name() -> str:
    """The CPU's model name as Linux gives it, or its architecture."""
    with open("/proc/cpuinfo") as file:
        names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        return next(names, platform.machine())


def resolve_device(wanted: str, local_rank: int) -> torch.device:
    """The torch device for `wanted` (auto, cpu or cuda). Raises ConfigError for cuda where there is none."""
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        built = f"this torch ({torch.__version__}) finds no CUDA device"
        raise ConfigError(
            f"device = 'cuda': {built}; use --device cpu, or see that nvidia-smi works and suits this torch build"
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        rule = f"needs {local_rank + 1} GPUs on this machine, which has {torch.cuda.device_count()}; lower --nproc-per-node"
        raise ConfigError(f"local rank = {local_rank}: {rule}")
    return torch.device("cuda", local_rank)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Join the ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), and leave them at the end.

    After an error the group is left standing: to tear it down would break the collective that another rank waits in, and
    its traceback would bury the message that matters. torchrun ends all ranks once one has exited.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    world = World(rank, size, local_rank, local_size, resolve_device(device, local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if size > 1:
        dist.init_process_group("nccl" if world.device.type == "cuda" else "gloo")
    yield world
    if size > 1:
        dist.destroy_process_group()


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed activations for the next step. Returns whether it was told (False: another C library).

    By default glibc hands large blocks back to the system when they are freed and asks for them anew, zeroed page by page, in
    every step. mallopt's constants are those of <malloc.h>: no mmap, no trimming, grow by 256 MiB. Costs memory that was used
    once and stays with the process; nothing on a GPU run's device.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 256 << 20))
    accepted = [mallopt(option, value) == 1 for option, value in settings]
    return all(accepted)
