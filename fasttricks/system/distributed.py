"""The ranks of a run, and the settings of a trainer for its own process. One process without torchrun is a world of one.

Under torchrun every rank is a process with one device: nccl joins GPUs, gloo joins CPUs.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fasttricks.config import ConfigError, read_launch, require, show_name
from fasttricks.system.affinity import stay_near
from fasttricks.system.failures import lost_rank
from fasttricks.system.process import restart_count


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks, and its device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    timeout_s: int = 600
    """How long a collective waits for a rank that hangs."""
    near_cores: int = 0
    """The CPU cores beside the device that this rank's threads are kept to (affinity.py); 0: to none."""

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """That of one process with one device."""
        return cls(rank=0, size=1, local_rank=0, local_size=1, device=device)

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

    def collect(self, value: bytes) -> list[bytes]:
        """As gather(), for large values: on the main rank only, and empty on the others."""
        if self.size == 1:
            return [value]
        values: list[bytes] | None = [b""] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values or []

    def sum_(self, values: Tensor) -> Tensor:
        """Sum `values`, (any shape, on the rank's device), over all ranks, in place. A collective: every rank must call it.

        Floating values come from all ranks and are added up in the ranks' order, so the backend's order does not decide their
        last bits. For small values. Integers, exact in any order, are all-reduced.
        """
        if self.size > 1 and values.is_floating_point():
            parts = [torch.empty_like(values) for _ in range(self.size)]
            dist.all_gather(parts, values)
            values.copy_(add_up(parts))
        elif self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def add_up(parts: Iterable[Tensor]) -> Tensor:
    """((first + second) + third) + ..., of any one shape and dtype: each element's rounding is the same wherever it lies."""
    return reduce(torch.add, parts)


def leave(world: World, error: RuntimeError, way_out: str = "") -> NoReturn:
    """Say in one line that another rank was lost, which is for that rank to explain, and end this process with exit code 1.

    At once, because a usual exit would wait for the rest of the collective.
    """
    reason = f"another rank ended, or did not answer within timeout_s = {world.timeout_s}; the first error says why"
    shown = str(error).partition("\n")[0].partition(". ")[0]
    line = f"error: rank {world.rank}: {reason} ({shown}){way_out and f'; {way_out}'}"
    print(show_name(line), file=sys.stderr, flush=True)
    os._exit(1)


def host_group(world: World) -> dist.ProcessGroup:
    """A group of all ranks, of several, over gloo, whatever joins their devices. A collective."""
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=world.timeout_s)))


class Vote:
    """Whether any rank says yes, the same answer on all ranks: a sum on the host, through gloo beside the device's backend.

    The constructor is a collective. With several ranks a call returns the answers to the previous call, most of which have
    arrived by then. So no rank waits for one that is less than a call behind, and none waits for a device.
    """

    def __init__(self, world: World) -> None:
        self._alone = world.size == 1
        self._group: dist.ProcessGroup | None = None
        if not self._alone:
            self._group = host_group(world)
        self._pending: tuple[Tensor, dist.Work] | None = None

    def __call__(self, yes: bool) -> bool:
        """Cast this rank's vote; True where any rank's was yes (the last time, with several). A collective."""
        if self._alone:
            return yes
        answer, ballot = self._take(), torch.tensor([int(yes)], dtype=torch.int32)
        self._pending = ballot, dist.all_reduce(ballot, group=self._group, async_op=True)
        return answer

    def _take(self) -> bool:
        if self._pending is None:
            return False
        (ballot, work), self._pending = self._pending, None
        work.wait()
        return bool(ballot.item())

    def close(self) -> None:
        """Wait for the votes that are still under way."""
        self._take()


def cpu_name() -> str:
    """The CPU's model name as Linux gives it, or its architecture."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        return next(names, platform.machine())


def resolve_device(wanted: str, local_rank: int) -> torch.device:
    """The torch device for `wanted` (auto, cpu or cuda): of several GPUs the one of the rank's number on this machine.

    The only one that the process sees is its own, whatever its number: a launcher or CUDA_VISIBLE_DEVICES has divided them.
    That no two ranks have the same one shows when they join. Raises ConfigError for cuda where there is none, or too few.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        built = f"this torch ({torch.__version__}) finds no CUDA device"
        raise ConfigError(
            f"device = 'cuda': {built}; use --device cpu, or see that nvidia-smi works and suits this torch build"
        )
    if wanted == "cpu" or not available:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    if local_rank >= count:
        way_out = "lower --nproc-per-node, or give each rank one GPU by its own CUDA_VISIBLE_DEVICES"
        raise ConfigError(
            f"local rank = {local_rank}: needs {local_rank + 1} GPUs, and this process sees {count}; {way_out}"
        )
    return torch.device("cuda", local_rank)


@contextmanager
def join_world(device: str, timeout_s: int = 600) -> Iterator[World]:
    """Join the ranks that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE), and leave them at the end.

    On a machine of several sockets and GPUs, this process is kept to the cores beside its GPU from here on (affinity.py).
    timeout_s: how long a collective waits for a rank that hangs before it raises. Each restart by torchrun meets under
    keys of its own in torchrun's store: among those of the failed one before, ranks of both would find each other.
    After an error the group is left standing: to tear it down would break the collective that another rank waits in before
    the message that matters is out. torchrun ends all ranks once one has exited. A rank that has lost another says so in one
    line and ends with exit code 1, by leave(), wherever in the block it waits.
    """
    rank, size, local_rank, local_size = read_launch()
    own = resolve_device(device, local_rank)
    near_cores = stay_near(own, local_size)  # before the driver and all others start their threads
    world = World(rank, size, local_rank, local_size, own, timeout_s, near_cores)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    try:
        if size > 1:
            _join(world)
        yield world
    except RuntimeError as error:
        if size == 1 or not lost_rank(error):
            raise
        leave(world, error)
    if size > 1:
        dist.destroy_process_group()


def _join(world: World) -> None:
    timeout = timedelta(seconds=world.timeout_s)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    own = dist.PrefixStore(f"fasttricks_{restart_count()}", store)
    options: dict[str, Any] = {"store": own, "rank": world.rank, "world_size": world.size, "timeout": timeout}
    if world.device.type == "cpu":
        dist.init_process_group("gloo", **options)
        return
    check_own_gpus(world, own)
    # with the device nccl connects here and not in the first collective, and a barrier need not guess, of which it would warn
    dist.init_process_group("nccl", device_id=world.device, **options)


def check_own_gpus(world: World, store: dist.Store) -> None:
    """Raise ConfigError, on every rank, where two ranks have the same GPU, which nccl cannot join. A collective, over `store`."""
    keys = [f"gpu_{rank}" for rank in range(world.size)]
    store.set(keys[world.rank], gpu_of(world.device))
    ranks: dict[str, list[int]] = {}
    for rank, name in enumerate(store.multi_get(keys)):
        ranks.setdefault(name.decode(), []).append(rank)
    store.set(f"{keys[world.rank]}_read", "")
    if world.is_main:  # the store may be in this process: not to end before all have read
        store.wait([f"{key}_read" for key in keys])
    for gpu, sharing in ranks.items():
        who = " and ".join(map(str, sharing))
        rule = f"must each have a GPU of their own, and share {gpu}: lower --nproc-per-node to the number of GPUs"
        way_out = "or give each rank another one by its own CUDA_VISIBLE_DEVICES"
        require(len(sharing) == 1, "ranks", who, f"{rule}, {way_out}")


def gpu_of(device: torch.device) -> str:
    """A name that no other GPU and no other MIG slice has: the UUID, and where CUDA_VISIBLE_DEVICES names a slice that too."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"{uuid} {visible}" if visible.startswith("MIG-") else uuid


def keep_freed_memory() -> bool:
    """Have glibc keep freed activations for the next step. Returns whether it does; another C library does as it did.

    By default glibc returns large blocks to the system when they are freed and asks for them again, zeroed page by page, in
    every step. Set here: no mmap, never trim, grow by 256 MiB. Cost: memory that was used once stays with the process. No
    effect on the memory of a GPU. docs/log.md has the alternatives.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # as <malloc.h> numbers them
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # never trim is -1: any other threshold would be an int's 2 GiB at most, which a step's activations exceed
    settings = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 256 << 20))
    return all(mallopt(option, value) == 1 for option, value in settings)
