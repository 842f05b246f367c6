"""Ranks that are threads of this process: collectives in milliseconds, for what a task does with its World."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttricks.system.distributed import World

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Threads(World):
    """Ranks that are threads of this process: the collectives of World by a barrier and a shared list."""

    barrier_: Any = None
    shared: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.shared[self.rank] = value
        self.barrier_.wait(30)
        values = list(self.shared)
        self.barrier_.wait(30)
        return values

    def collect(self, value: Any) -> list[Any]:
        values = self.gather(value)
        return values if self.is_main else []

    def sum_(self, values: Tensor) -> Tensor:
        total = sum(self.gather(values.clone()))
        return values.copy_(torch.as_tensor(total))


def ranks(size: int) -> list[Threads]:
    barrier, shared = threading.Barrier(size), [None] * size
    return [Threads(r, size, r, size, CPU, barrier_=barrier, shared=shared) for r in range(size)]
