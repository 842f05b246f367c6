"""Recipes: functions () -> TrainConfig. A docstring says source and command; expected.py has result, hardware and time.

The paper's recipes state the global batch; ranks and --accumulate split it (resnet50-efficient on one GPU:
--accumulate 8 makes it 8 x 128).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fasttricks.config.errors import ConfigError, unknown
from fasttricks.config.networks import find_network, model_info
from fasttricks.config.schema import (
    DataConfig,
    DistillConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ScheduleConfig,
    TrainConfig,
)
from fasttricks.config.transfer_recipes import detect_voc, segment_ade20k


def demo() -> TrainConfig:
    """ResNet-10-D on ten classes of drawn shapes that the project makes itself; minutes on 2 CPU cores.

    Source: none, a first run for a newcomer. Command: make train.
    """
    return TrainConfig(
        recipe="demo",
        epochs=20,
        global_batch_size=32,
        ema_decay=0.99,
        data=DataConfig(root="demo", image_size=48, val_resize=54, area=(0.5, 1.0)),
        model=ModelConfig(name="resnet10d", width=0.5, stem_stride=2),
        optim=OptimConfig(base_lr=0.2, weight_decay=5e-4),
        schedule=ScheduleConfig(warmup_epochs=1),
        loss=LossConfig(smoothing=0.1),
    )


def cifar10() -> TrainConfig:
    """ResNet-10-D at 32 pixels, for folders of CIFAR-10 images; about 17 minutes on 2 cores of an Intel Xeon (AVX-512).

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


def cifar10_fast() -> TrainConfig:
    """A convolutional network at 32 pixels, for folders of CIFAR-10 images: as exact as 20 minutes of 2 CPU cores allow.

    Source: the paper's smoothing and warm-up with tricks of the CIFAR-10 speed records (Jordan 2024); chosen in docs/log.md
    on images that are held out of train/.
    Command: python -m fasttricks.train cifar10-fast --data.root DIR
    """
    return TrainConfig(
        recipe="cifar10-fast",
        epochs=16,
        global_batch_size=256,
        ema_decay=0.995,
        data=DataConfig(
            image_size=32,
            val_resize=34,
            area=(0.77, 1.0),
            aspect=(1.0, 1.0),
            color="none",
            pca_noise=0.0,
            alternate_flip=True,
        ),
        model=ModelConfig(name="cifarnet", width=1.5, whitening=True, identity_init=True),
        optim=OptimConfig(base_lr=0.375, momentum=0.85, weight_decay=1.33e-3, bias_lr=64.0),
        schedule=ScheduleConfig(
            decay="poly", poly_power=1.0, warmup_epochs=4, first_size=0.75, size_steps=1, full_size_at=0.55
        ),
        loss=LossConfig(smoothing=0.1),
        eval=EvalConfig(every_epochs=4, flip=True, batch_size=500),
    )


def cifar10_ablate() -> TrainConfig:
    """A bottleneck ResNet small enough to ablate every trick on folders of CIFAR-10; one epoch.

    Every trick is on. The lr is the paper's, 0.1 at 256: four times that hardly trains the large batch without zero gamma
    (docs/ablation.md). The lr decays at the paper's shares of the run (a quarter, a half, three quarters). Warm-up takes a
    tenth of the run, because the paper's share, 5 of 120 epochs, would be 4 steps of the large batch.
    Source: the paper's tables 4 to 6, scaled down. Blocks have a 1x1, a 3x3 and a 1x1 convolution, so that A and B differ.
    Command: python -m fasttricks.ablate table4 table5 table6 cifar10-ablate --data.root DIR
    """
    return TrainConfig(
        recipe="cifar10-ablate",
        epochs=1,
        global_batch_size=512,
        data=DataConfig(
            image_size=20,
            val_resize=22,
            area=(0.6, 1.0),
            aspect=(0.85, 1 / 0.85),
            color="none",
            pca_noise=0.0,
            threads=1,
        ),
        model=ModelConfig(name="resnet11d", width=0.25, stem_stride=2, zero_gamma=True),
        optim=OptimConfig(weight_decay=5e-4),
        schedule=ScheduleConfig(warmup_epochs=0.1, step_epochs=(0.25, 0.5, 0.75)),
        loss=LossConfig(smoothing=0.1, mixup_alpha=0.2),
        eval=EvalConfig(batch_size=500),
    )


def cifar10_teacher() -> TrainConfig:
    """The teacher of cifar10-distill: ResNet-10-D at 24 pixels, for folders of CIFAR-10 images.

    Source: cifar10, shorter and on smaller images.
    Command: python -m fasttricks.train cifar10-teacher --data.root DIR
    """
    recipe = cifar10()
    return dataclasses.replace(
        recipe,
        recipe="cifar10-teacher",
        epochs=3,
        ema_decay=0.99,
        data=dataclasses.replace(recipe.data, image_size=24, val_resize=27),
        optim=OptimConfig(base_lr=0.4, weight_decay=5e-4),
        schedule=ScheduleConfig(warmup_epochs=0.5),
    )


def cifar10_distill() -> TrainConfig:
    """A student of a sixteenth of cifar10-teacher's weights that learns from it; folders of CIFAR-10 images.

    Source: section 5.3, scaled down. The same student alone: --tricks.off distillation. docs/log.md compares them.
    Command: python -m fasttricks.train cifar10-distill --data.root DIR
    """
    return dataclasses.replace(
        cifar10_teacher(),
        recipe="cifar10-distill",
        epochs=1,
        schedule=ScheduleConfig(warmup_epochs=0.1),
        model=ModelConfig(name="resnet8d", width=0.25, stem_stride=2),
        distill=DistillConfig(teacher="runs/cifar10-teacher"),
    )


def resnet50_baseline() -> TrainConfig:
    """ResNet-50 as the paper's baseline (section 2): batch 256, lr 0.1 in steps, 120 epochs, FP32, no trick.

    Source: the paper's tables 2 and 3.
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

    Source: the paper's table 3.
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

    Source: the paper's table 6. Command: torchrun --nproc-per-node 8 -m fasttricks.train resnet50d-tricks --data.root DIR
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


def places365() -> TrainConfig:
    """ResNet-50-D on the scenes of Places365-Standard, with every trick but distillation: resnet50d-tricks on other data.

    Source: the paper's table 7, which compares its tricks with efficient training on this data and, as recalled, states no
    other settings. Efficient training: --tricks.off cosine label_smoothing mixup --epochs 120.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train places365 --data.root places365_standard
    """
    return dataclasses.replace(resnet50d_tricks(), recipe="places365")


def resnet152d_teacher() -> TrainConfig:
    """ResNet-152-D, the paper's teacher (section 5.3), with every trick but distillation.

    Source: section 5.3: trained with cosine and smoothing, and with mixup where the student is (as recalled, unverified).
    Command: torchrun --nproc-per-node 8 -m fasttricks.train resnet152d-teacher --data.root DIR
    """
    tricks = resnet50d_tricks()
    return dataclasses.replace(
        tricks, recipe="resnet152d-teacher", model=ModelConfig(name="resnet152d", zero_gamma=True)
    )


def resnet50d_tricks_distill() -> TrainConfig:
    """ResNet-50-D with every trick of the paper, including distillation from a ResNet-152-D (section 5.3).

    Source: the paper's table 6. Temperature 20, both losses at weight 1. The teacher is the run of resnet152d-teacher.
    timm has one that knows ImageNet: --distill.teacher timm:resnet152d.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train resnet50d-tricks-distill --data.root DIR
    """
    distill = DistillConfig(teacher="runs/resnet152d-teacher")
    return dataclasses.replace(resnet50d_tricks(), recipe="resnet50d-tricks-distill", distill=distill)


def inceptionv3_baseline() -> TrainConfig:
    """Inception-V3 as the paper's baseline (section 2): 299 pixels, batch 256, lr 0.1 in steps, 120 epochs, FP32, no trick.

    Source: the paper's table 2. The paper does not state the validation resize; 342 pixels keep the ratio of 224 to 256.
    No auxiliary head, as in the paper's runs. Dropout 0.5 before the classifier, as in the network's own paper.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train inceptionv3-baseline --data.root DIR
    """
    return _other_network(resnet50_baseline(), "inceptionv3-baseline", "inception_v3")


def inceptionv3_efficient() -> TrainConfig:
    """Inception-V3 trained efficiently (section 3): batch 1024, lr 0.4, warm-up, no bias decay, half precision.

    Source: the paper's table 3. Zero gamma does not apply: the network has no residual blocks.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train inceptionv3-efficient --data.root DIR
    """
    return _other_network(resnet50_efficient(), "inceptionv3-efficient", "inception_v3")


def inceptionv3_tricks() -> TrainConfig:
    """Inception-V3 with cosine, label smoothing and mixup too (section 5), 200 epochs.

    Source: the paper's table 6. Distillation from a ResNet is left out, because it lowered this network's accuracy there.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train inceptionv3-tricks --data.root DIR
    """
    return _other_network(resnet50d_tricks(), "inceptionv3-tricks", "inception_v3")


def mobilenet_baseline() -> TrainConfig:
    """MobileNet-V1 as the paper's baseline (section 2): batch 256, lr 0.1 in steps, 120 epochs, FP32, no trick.

    Source: the paper's table 2. The paper does not say whether ReLU is capped; here it is capped at 6, as in timm.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train mobilenet-baseline --data.root DIR
    """
    return _other_network(resnet50_baseline(), "mobilenet-baseline", "mobilenet_v1")


def mobilenet_efficient() -> TrainConfig:
    """MobileNet-V1 trained efficiently (section 3): batch 1024, lr 0.4, warm-up, no bias decay, half precision.

    Source: the paper's table 3. Zero gamma does not apply: the network has no residual blocks.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train mobilenet-efficient --data.root DIR
    """
    return _other_network(resnet50_efficient(), "mobilenet-efficient", "mobilenet_v1")


def mobilenet_tricks() -> TrainConfig:
    """MobileNet-V1 with cosine, label smoothing and mixup too (section 5), 200 epochs.

    Source: the paper's table 6. Distillation from a ResNet is left out, because it lowered this network's accuracy there.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train mobilenet-tricks --data.root DIR
    """
    return _other_network(resnet50d_tricks(), "mobilenet-tricks", "mobilenet_v1")


def _other_network(resnet: TrainConfig, recipe: str, network: str) -> TrainConfig:
    """The ResNet's recipe for another network: the paper trains all three alike, each on images of its own size."""
    info = model_info(network)
    data = DataConfig(image_size=info.image_size, val_resize=info.val_resize)
    return dataclasses.replace(resnet, recipe=recipe, data=data, model=ModelConfig(name=network))


MIXUP_ABOVE = 50_000
"""Training images above which the recipe finetune mixes them; at 25,000 it lowered top-1 (docs/finetuning.md)."""


def finetune(images: int = 1000) -> TrainConfig:
    """Start from trained weights (--init) and learn the classes of your own folder, of 50 to 50,000 images.

    Fitted to the number of training images: 900 / sqrt(images) epochs, 8 to 50; batches of a tenth of them, 16 to 64; mixup above
    50,000. --init of a run, timm or torchvision gives the network and its image size too.
    Source: measured in docs/finetuning.md. Command: python -m fasttricks.train finetune --data.root DIR --init timm:resnet50d
    """
    batch = max(16, min(64, 1 << max(0, (images // 10).bit_length() - 1)))
    return TrainConfig(
        recipe="finetune",
        epochs=max(8, min(50, round(900 / max(images, 1) ** 0.5))),
        global_batch_size=batch,
        ema_decay=0.99,
        data=DataConfig(area=(0.3, 1.0)),
        optim=OptimConfig(base_lr=0.1),
        schedule=ScheduleConfig(warmup_epochs=1),
        loss=LossConfig(smoothing=0.1, mixup_alpha=0.2 if images > MIXUP_ABOVE else 0.0),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        demo,
        cifar10,
        cifar10_fast,
        cifar10_ablate,
        cifar10_teacher,
        cifar10_distill,
        resnet50_baseline,
        resnet50_efficient,
        resnet50d_tricks,
        resnet152d_teacher,
        resnet50d_tricks_distill,
        inceptionv3_baseline,
        inceptionv3_efficient,
        inceptionv3_tricks,
        mobilenet_baseline,
        mobilenet_efficient,
        mobilenet_tricks,
        places365,
        finetune,
        segment_ade20k,
        detect_voc,
    )
}
FITTED: dict[str, Callable[[int], TrainConfig]] = {"finetune": finetune}
"""The recipes that are fitted to the number of training images: functions of it."""
_OF_THE_NETWORK = ("model.name", "model.width", "model.stem_stride", "data.mean", "data.std")
OF_THE_WEIGHTS: dict[str, tuple[str, ...]] = {
    "finetune": (*_OF_THE_NETWORK, "data.image_size", "data.val_resize"),
    "segment-ade20k": _OF_THE_NETWORK,
    "detect-voc": _OF_THE_NETWORK,
}
"""The recipes whose fields follow the weights of --init: those fields."""
FITTED_FIELDS = ("epochs", "global_batch_size", "loss.mixup_alpha")
"""The fields of FITTED that depend on the images."""


def find_recipe(name: str) -> Callable[[], TrainConfig]:
    """The recipe called `name`. Raises ConfigError with the nearest right name."""
    if name in RECIPES:
        return RECIPES[name]
    if network := find_network(name):
        rule = f"is a network, not a recipe; give a recipe, and the network with --model.name {network}"
        raise ConfigError(f"recipe = {name!r}: {rule}; the recipes are {', '.join(RECIPES)}")
    raise ConfigError(f"recipe = {name!r}: {unknown(name, RECIPES)}; the recipes are {', '.join(RECIPES)}")


def summary(name: str) -> str:
    """The first line of the recipe's docstring."""
    return (find_recipe(name).__doc__ or "").partition("\n")[0]
