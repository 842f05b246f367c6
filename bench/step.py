"""Images a second of the training step of ResNet-50-D at 224 pixels, beside timm's model with torch's loss and optimizer.

Synthetic images that lie on the device: no loader. FP32 on the CPU, bfloat16 autocast on CUDA, for all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttricks.config import LossConfig, ModelConfig, OptimConfig
from fasttricks.losses import Targets, training_loss
from fasttricks.models import build_model
from fasttricks.optim import build_optimizer, set_lr
from fasttricks.precision import make_autocast

IMAGE_SIZE, NUM_CLASSES, SMOOTHING, LR = 224, 1000, 0.1, 0.01


def contestants(device: torch.device, batch_size: int) -> dict[str, Callable[[], float]]:
    """Name -> one training step, returning images a second."""
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), device=device)
    last = images.contiguous(memory_format=torch.channels_last)
    steps = {
        "fasttricks resnet50d": _fasttricks(last, labels),
        "timm resnet50d, channels-last": _timm(last, labels, torch.channels_last),
        "timm resnet50d, default layout": _timm(images, labels, torch.contiguous_format),
    }
    return {name: _timed(step, device, batch_size) for name, step in steps.items()}


def _timed(step: Callable[[], None], device: torch.device, batch_size: int) -> Callable[[], float]:
    repeats = 10 if device.type == "cuda" else 1

    def measure() -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        _wait(device)
        return repeats * batch_size / (time.perf_counter() - start)

    return measure


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fasttricks(images: Tensor, labels: Tensor) -> Callable[[], None]:
    model = build_model(ModelConfig(name="resnet50d", zero_gamma=True), NUM_CLASSES)
    model = model.to(images.device, memory_format=torch.channels_last)
    optimizer = build_optimizer(model, OptimConfig())
    autocast = make_autocast("auto", images.device)
    loss_config = LossConfig(smoothing=SMOOTHING)

    def step() -> None:
        with autocast():
            logits = model(images)
        (training_loss(logits, Targets(labels), loss_config) / len(labels)).backward()
        set_lr(optimizer, LR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _timm(images: Tensor, labels: Tensor, layout: torch.memory_format) -> Callable[[], None]:
    import timm

    model: nn.Module = timm.create_model("resnet50d", zero_init_last=True, num_classes=NUM_CLASSES)
    model = model.to(images.device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    autocast = make_autocast("auto", images.device)

    def step() -> None:
        with autocast():
            loss = functional.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
