"""The CPU cores beside a rank's GPU, as NVML knows them: on a machine of several sockets, the rank's threads stay on them.

A thread on another socket reaches its memory, and the GPU's, over the link between the sockets.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from fasttricks.system.monitor import find_gpu
from fasttricks.system.process import keep_to, threads_per_rank

_WORD = 64
"""Cores in a number of NVML's mask."""


def stay_near(device: torch.device, ranks: int) -> int:
    """Keep this process, which is one of `ranks` on this machine, to the cores beside its GPU. Returns how many they are.

    0, and nothing is changed, on a CPU, without pynvml or a driver, where NVML does not know the cores, where the process may
    use no others as it is, and where the ranks beside them would have fewer cores each than all cores divided among all ranks.
    """
    if device.type != "cuda":
        return 0
    allowed = os.sched_getaffinity(0)
    near, sharing = _beside(device, ranks)
    near &= allowed
    if near == allowed or len(near) < threads_per_rank() * sharing:
        return 0
    return len(near) if keep_to(near) else 0


def _beside(device: torch.device, ranks: int) -> tuple[set[int], int]:
    """(the cores beside the GPU, empty where they are not known; how many of the ranks may have a GPU beside the same ones)."""
    try:
        import pynvml
    except ImportError:
        return set(), 1
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return set(), 1
    try:
        gpu = find_gpu(pynvml, str(torch.cuda.get_device_properties(device).uuid))
        near = set() if gpu is None else _cores(pynvml, gpu)
        every = [pynvml.nvmlDeviceGetHandleByIndex(number) for number in range(pynvml.nvmlDeviceGetCount())]
        return near, min(ranks, sum(_cores(pynvml, other) == near for other in every))
    except (pynvml.NVMLError, AttributeError):  # the second: a pynvml too old for a call
        return set(), 1
    finally:
        pynvml.nvmlShutdown()


def _cores(nvml: Any, gpu: Any) -> set[int]:
    """By number. Raises NVMLError where the driver does not know them."""
    words = -(-(os.cpu_count() or 1) // _WORD)
    mask = nvml.nvmlDeviceGetCpuAffinity(gpu, words)
    return {_WORD * at + bit for at, word in enumerate(mask) for bit in range(_WORD) if word >> bit & 1}
