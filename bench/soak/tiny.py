"""The run that is killed over and over: 40 steps of a network of 20,000 weights, with everything on that has a state."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fasttricks.runs.checkpoint import load_checkpoint

EPOCHS, STEPS_PER_EPOCH = 8, 5
STEPS = EPOCHS * STEPS_PER_EPOCH
FIELDS = {
    "epochs": EPOCHS,
    "global-batch-size": 16,
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


def arguments(data: Path, run_dir: Path, **more: Any) -> list[str]:
    """Of fasttricks.train; `more` are fields, with underscores, that are set besides."""
    fields = FIELDS | {name.replace("_", "-"): value for name, value in more.items()}
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return ["cifar10", *words, "--data.root", str(data), "--run-dir", str(run_dir)]


def digest(run_dir: Path) -> str:
    """SHA-256 of all that the newest checkpoint holds but times and names: weights, average, momentum, scale, position."""
    state = load_checkpoint(run_dir)
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
