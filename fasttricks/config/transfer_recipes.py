"""The recipes of section 6 of the paper: functions () -> TrainConfig, as in recipes.py, which lists them."""

from __future__ import annotations

from fasttricks.config.schema import DataConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from fasttricks.config.transfer import SegmentConfig


def segment_ade20k() -> TrainConfig:
    """FCN for ADE20K on a base network that --init names: 150 classes, crops of 480 pixels, 120 epochs (section 6.2).

    Source: the paper (as recalled: lr 0.01, poly 0.9, 120 epochs, batch 16, crop 480, auxiliary head, synchronised batch norm,
    last two stages dilated); its authors' gluon-cv for the rest: long side 520 times 0.5 to 2, mirror, blur, decay of all
    weights, FP32, and heads at 10 times the lr, so 0.1 with optim.backbone_lr 0.1. The auxiliary weight 0.4 is PSPNet's;
    gluon-cv's script has 0.5. Other than there: Nesterov momentum, and validation of whole images. --schedule.decay cosine is
    the other decay.
    Command: torchrun --nproc-per-node 4 -m fasttricks.train segment-ade20k --data.root ADEChallengeData2016 --init RUN
    """
    return TrainConfig(
        recipe="segment-ade20k",
        task="segmentation",
        epochs=120,
        global_batch_size=16,
        precision="fp32",
        sync_batch_norm=True,
        data=DataConfig(image_size=480, val_resize=520, color="none", pca_noise=0.0),
        model=ModelConfig(name="resnet50d"),
        optim=OptimConfig(base_lr=0.1, linear_scaling=False, backbone_lr=0.1, bias_decay=True),
        schedule=ScheduleConfig(decay="poly", warmup_epochs=0),
        segment=SegmentConfig(
            base_size=520, base_side="long", scale=(0.5, 2.0), blur=0.5, output_stride=8, aux_weight=0.4
        ),
    )
