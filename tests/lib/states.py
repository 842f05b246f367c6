"""The content of a checkpoint: one that is made up, and whether two are equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttricks.runs.checkpoint import KEYS


def state(step: int = 3, size: int = 100) -> dict[str, Any]:
    return dict.fromkeys(KEYS) | {
        "config": '{"epochs": 3}',
        "classes": ["cat", "dog"],
        "step": step,
        "train_seconds": 1.5,
        "model": {"weight": torch.full((size,), float(step)), "count": torch.tensor(7)},
        "ranks": [{"loader": '{"epoch": 1}'}],
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and plain values are equal, bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)
