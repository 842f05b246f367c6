"""The recipes of section 6 of the paper: functions () -> TrainConfig, as in recipes.py, which lists them."""

from __future__ import annotations

from fasttricks.config.schema import DataConfig, ModelConfig, OptimConfig, ScheduleConfig, TrainConfig
from fasttricks.config.transfer import DetectConfig, SegmentConfig


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


def detect_voc() -> TrainConfig:
    """Faster R-CNN for Pascal VOC on a base network that --init names: VOC 07+12, 20 epochs, test on 07 (section 6.1).

    Source: the paper for the data and the linear warm-up; its authors' gluon-cv for the rest: short side 600, long side 1000 at
    most, mirror, stem, first stage and batch norm frozen, lr 0.001 an image, a tenth of it after 14 epochs, decay 5e-4 of all
    weights, overlaps above 0.3 removed, FP32. It judges regions of one map of stride 16 (C4); a feature pyramid stands here,
    with the anchors and samples of torchvision's and of gluon-cv's own. Other than there: a batch of 8, Nesterov momentum and
    no clipped gradients; the warm-up has about the 1000 steps of torchvision's.
    Command: torchrun --nproc-per-node 8 -m fasttricks.train detect-voc --data.root VOCdevkit --init RUN
    """
    return TrainConfig(
        recipe="detect-voc",
        task="detection",
        epochs=20,
        global_batch_size=8,
        precision="fp32",
        data=DataConfig(color="none", pca_noise=0.0),
        model=ModelConfig(name="resnet50d", freeze=("stem", "layer1", "batch_norm")),
        optim=OptimConfig(base_lr=0.256, linear_scaling=True, weight_decay=5e-4, bias_decay=True),
        schedule=ScheduleConfig(decay="step", warmup_epochs=0.5, step_epochs=(14,), step_factor=0.1),
        detect=DetectConfig(
            base_size=600,
            max_size=1000,
            channels=256,
            head_features=1024,
            anchor_scales=(8.0,),
            anchor_ratios=(0.5, 1.0, 2.0),
            train_proposals=2000,
            test_proposals=1000,
            train_samples=512,
            score_threshold=1e-4,
            nms_threshold=0.3,
            most_detections=100,
            average="voc07",
        ),
    )
