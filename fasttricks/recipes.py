"""Recipes: functions () -> TrainConfig. A docstring says source, expected result, hardware, time and command.

The paper's recipes state the global batch; ranks and --accumulate split it (resnet50-efficient on one GPU:
--accumulate 8 makes it 8 x 128). Figures marked PAPER are the paper's; those marked HERE were measured on 2 CPU cores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fasttricks.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from fasttricks.tricks import nearest


def demo() -> TrainConfig:
    """ResNet-10-D on ten classes of drawn shapes that the project makes itself; 5 minutes on 2 CPU cores.

    HERE: 98.12 % after 286 s of training, another process beside it.
    Source: none, a first run for a newcomer. Command: make train.
    """
    return TrainConfig(
        recipe="demo",
        epochs=16,
        global_batch_size=32,
        ema_decay=0.99,
        data=DataConfig(root="demo", image_size=48, val_resize=54, area=(0.5, 1.0)),
        model=ModelConfig(name="resnet10d", width=0.5, stem_stride=2),
        optim=OptimConfig(base_lr=0.2, weight_decay=5e-4),
        schedule=ScheduleConfig(warmup_epochs=1),
        loss=LossConfig(smoothing=0.1),
    )


def cifar10() -> TrainConfig:
    """ResNet-10-D at 32 pixels, for folders of CIFAR-10 images; about 17 minutes on 2 CPU cores.

    HERE: 87.03 % after 1,022 s of training.
    Source: the paper's tricks; model size, crop and schedule chosen in docs/log.md.
    Command: python -m fasttricks.train cifar10 --data.root DIR
    """
    return TrainConfig(
        recipe="cifar10",
        epochs=21,
        global_batch_size=128,
        ema_decay=0.999,
        data=DataConfig(
            image_size=32, val_resize=36, area=(0.6, 1.0), aspect=(0.85, 1 / 0.85), color="none", pca_noise=0.0
        ),
        model=ModelConfig(name="resnet10d", width=0.5, stem_stride=2),
        optim=OptimConfig(base_lr=0.2, weight_decay=5e-4),
        schedule=ScheduleConfig(warmup_epochs=3),
        loss=LossConfig(smoothing=0.1),
        eval=EvalConfig(flip=True, batch_size=500),
    )


def resnet50_baseline() -> TrainConfig:
    """ResNet-50 as the paper's baseline (section 2): batch 256, lr 0.1 in steps, 120 epochs, FP32, no trick.

    PAPER: 75.87 / 92.70 % (as recalled, unverified), 13.3 minutes an epoch on 8 V100.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train resnet50-baseline --data.root DIR
    """
    return TrainConfig(
        recipe="resnet50-baseline",
        epochs=120,
        global_batch_size=256,
        precision="fp32",
        model=ModelConfig(name="resnet50a"),
        optim=OptimConfig(linear_scaling=False, bias_decay=True),
        schedule=ScheduleConfig(decay="step", warmup_epochs=0),
    )


def resnet50_efficient() -> TrainConfig:
    """ResNet-50 trained efficiently (section 3): batch 1024, lr 0.4, warm-up, zero gamma, no bias decay, half precision.

    PAPER: 76.21 / 92.97 % (as recalled, unverified), 4.4 minutes an epoch on 8 V100.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train resnet50-efficient --data.root DIR
    """
    return TrainConfig(
        recipe="resnet50-efficient",
        epochs=120,
        global_batch_size=1024,
        model=ModelConfig(name="resnet50a", zero_gamma=True),
        schedule=ScheduleConfig(decay="step", warmup_epochs=5),
    )


def resnet50d_tricks() -> TrainConfig:
    """ResNet-50-D with every trick but distillation (sections 3 to 5): cosine, label smoothing, mixup, 200 epochs.

    PAPER: 79.15 / 94.58 %. Command: torchrun --nproc-per-node 8 -m fasttricks.train resnet50d-tricks --data.root DIR
    """
    efficient = resnet50_efficient()
    return dataclasses.replace(
        efficient,
        recipe="resnet50d-tricks",
        epochs=200,
        model=ModelConfig(name="resnet50d", zero_gamma=True),
        schedule=ScheduleConfig(decay="cosine", warmup_epochs=5),
        loss=LossConfig(smoothing=0.1, smoothing_over="others", mixup_alpha=0.2),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (demo, cifar10, resnet50_baseline, resnet50_efficient, resnet50d_tricks)
}


def find_recipe(name: str) -> Callable[[], TrainConfig]:
    """The recipe called `name`. Raises ConfigError with the nearest right name."""
    if name in RECIPES:
        return RECIPES[name]
    raise ConfigError(f"recipe = {name!r}: {nearest(name, RECIPES)}; the recipes are {', '.join(RECIPES)}")


def summary(name: str) -> str:
    """The first line of the recipe's docstring."""
    return (find_recipe(name).__doc__ or "").partition("\n")[0]
