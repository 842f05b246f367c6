"""The run that is killed over and over: 24 steps of a network of 20,000 weights, in variants that have every state."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fasttricks.runs.checkpoint import load_checkpoint

EPOCHS, STEPS_PER_EPOCH = 6, 4
STEPS = EPOCHS * STEPS_PER_EPOCH
MAX_LOSS = {1: 2.0, 2: 2.0, 3: 2.3, 4: 2.6}
"""Ranks -> nats that a few of the first micro-batches are above: the fewer images one has, the more its mean strays."""
FIELDS: dict[str, Any] = {
    "epochs": EPOCHS,
    "global-batch-size": 24,
    "accumulate": 2,
    "ema-decay": 0.9,
    "checkpoint-steps": 3,
    "log-steps": 1,
    "device": "cpu",
    "schedule.warmup-epochs": 1,
    "data.image-size": 32,
    "data.val-resize": 36,
    "data.threads": 1,
    "model.name": "resnet8d",
    "model.width": 0.125,
    "loss.mixup-alpha": 0.2,
    "optim.loss-scale-steps": 5,
}
PLAIN = "fp32"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {"precision": "fp32"},
    "fp16": {"precision": "fp16"},
    "bf16, growing images": {"precision": "bf16", "accumulate": 1, "schedule.first-size": 0.5},
    "fp32, teacher's cache": {
        "precision": "fp32",
        "accumulate": 1,
        "ema-decay": 0.0,
        "loss.mixup-alpha": 0.0,
        "data.fixed-augmentation": True,
    },
    "fp32, skipped losses": {"precision": "fp32", "on-bad-loss": "skip"},
}
"""Name -> differences from FIELDS, which has two micro-batches a step, mixup and an average of the weights."""
KILLED = tuple(VARIANTS)[1:]
"""Those of the kill runs; together they have all of the first."""


def write_images(root: Path) -> Path:
    """77 training images, so that an epoch's last step is short and the ranks' shares unequal, and 11 for validation."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 77), ("val", 11)):
        for index in range(count):
            folder = root / split / "abc"[index % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draws.integers(0, 256, (*draws.integers(40, 60, 2), 3))
            pixels[..., index % 3] //= 2
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.jpg", quality=90)
    return root


def arguments(data: Path, run_dir: Path, variant: str, **more: Any) -> list[str]:
    """Arguments of fasttricks.train; `more` are fields, with underscores, that are set besides. True is a switch."""
    fields = FIELDS | VARIANTS[variant] | {name.replace("_", "-"): value for name, value in more.items()}
    words = [[f"--{name}"] if value is True else [f"--{name}", str(value)] for name, value in fields.items()]
    return ["cifar10", *chain.from_iterable(words), "--data.root", str(data), "--run-dir", str(run_dir)]


def digest(run_dir: Path) -> str:
    """SHA-256 of all that the newest checkpoint holds but times and names: weights, average, momentum, scale, position."""
    state = load_checkpoint(run_dir)
    state["optimizer"]["state"] = dict(sorted(state["optimizer"]["state"].items()))  # in the order that steps came in
    for name in ("path", "config", "train_seconds", "hardware"):
        del state[name]
    for rank in state["ranks"]:
        del rank["log"]["seconds"]
    return f"step {state['step']}, {digest_of(state)[:32]}"


def digest_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of a nest of dicts, lists, tensors and plain values."""
    sha256 = hashlib.sha256()
    _feed(sha256.update, value)
    return sha256.hexdigest()


def _feed(update: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        update(str((value.dtype, tuple(value.shape))).encode())
        update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for name in value:
            update(f"{name}:".encode())
            _feed(update, value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(update, item)
    else:
        update(json.dumps(value).encode())
