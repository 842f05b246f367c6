"""Figures that others published of the same networks on GPUs: labels beside measured figures. None of it was measured here."""

from __future__ import annotations

from typing import NamedTuple

from rich.table import Table

IMAGENET_IMAGES = 1_281_167
MODELS = {
    "resnet50b": "ResNet-50",
    "resnet50d": "ResNet-50-D",
    "inception_v3": "Inception-V3",
    "mobilenet_v1": "MobileNet",
}


class Published(NamedTuple):
    """A published training rate over all GPUs of a machine, 224 pixels (Inception-V3: 299)."""

    model: str
    machine: str
    precision: str
    images_per_sec: float
    source: str


def _of_minutes(minutes: float) -> float:
    return IMAGENET_IMAGES / minutes / 60


PAPER, RECALLED = "the paper, table 3", "the paper, table 3, as recalled, unverified"
NVIDIA = "NVIDIA's PyTorch ConvNets"
PUBLISHED = (
    Published("resnet50b", "8 x V100", "fp32", 1605, PAPER),
    Published("resnet50b", "8 x V100", "fp16", 4853, PAPER),
    Published("resnet50d", "8 x V100", "fp16", 4993, "the authors' log"),
    Published("inception_v3", "8 x V100", "fp32", _of_minutes(19.8), RECALLED),
    Published("inception_v3", "8 x V100", "fp16", _of_minutes(8), PAPER),
    Published("mobilenet_v1", "8 x V100", "fp32", _of_minutes(6.2), RECALLED),
    Published("mobilenet_v1", "8 x V100", "fp16", _of_minutes(3.7), RECALLED),
    Published("resnet50b", "1 x V100", "fp16", 1200, NVIDIA),
    Published("resnet50b", "8 x V100", "fp16", 8322, NVIDIA),
    Published("resnet50b", "1 x A100-80", "fp16", 2470, NVIDIA),
    Published("resnet50b", "8 x A100-80", "fp16", 16621, NVIDIA),
    Published("resnet50b", "1 x A100-80", "fp16", 3410, "NVIDIA's MXNet"),
    Published("resnet50b", "8 x A100-80", "fp16", 26674, "NVIDIA's MXNet"),
    Published("resnet50b", "1 x RTX 3090", "fp16", 1218, "timm, AMP, channels-last"),
    Published("resnet50d", "1 x RTX 3090", "fp16", 1078, "timm, AMP, channels-last"),
    Published("inception_v3", "1 x RTX 3090", "fp16", 782, "timm, AMP, channels-last"),
)


def minutes_an_epoch(images_per_sec: float) -> float:
    """Number of ImageNet's training images."""
    return IMAGENET_IMAGES / images_per_sec / 60


def table(measured: dict[tuple[str, str, str], float]) -> Table:
    """Measured rates, (model, machine, precision) -> images a second, among the published ones, fastest first."""
    rows = [(*entry, "published, not measured here") for entry in PUBLISHED]
    rows += [(*key, rate, "", "measured") for key, rate in measured.items()]
    out = Table("", "machine", "precision", "imgs/sec", "min an epoch", "", "source", title_justify="left")
    out.title = "ImageNet: minutes an epoch, beside published figures"
    for model, where, precision, rate, source, label in sorted(rows, key=lambda row: -row[3]):
        out.add_row(MODELS[model], where, precision, f"{rate:,.0f}", f"{minutes_an_epoch(rate):.1f}", label, source)
    return out
