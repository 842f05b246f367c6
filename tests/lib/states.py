"""The content of a checkpoint: one that is made up, and whether two are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
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


def digest(state: Any) -> str:
    """SHA-256, in hexadecimal, of a nest of dicts, lists, tensors and plain values, without the `seconds` of a rank's log."""
    sha256 = hashlib.sha256()
    _feed(sha256.update, state)
    return sha256.hexdigest()


def _feed(update: Callable[[bytes], object], value: Any) -> None:
    if isinstance(value, Tensor):
        update(str((value.dtype, tuple(value.shape))).encode())
        update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for name in value:
            if name == "seconds":
                continue
            update(f"{name}:".encode())
            _feed(update, value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(update, item)
    else:
        update(json.dumps(value).encode())
