"""Figures that others published of the same networks on GPUs: labels beside measured figures. None of it was measured here.

ResNet-50 is variant A in the paper and v1 in its authors' logs; NVIDIA, MLPerf, timm and FFCV train B (v1.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rich.table import Table

IMAGENET_IMAGES = 1_281_167
MODELS = {
    "resnet50a": "ResNet-50-A",
    "resnet50b": "ResNet-50-B",
    "resnet50c": "ResNet-50-C",
    "resnet50d": "ResNet-50-D",
    "inception_v3": "Inception-V3",
    "mobilenet_v1": "MobileNet",
}
LABEL = "published, not measured here"


class Published(NamedTuple):
    """A published training rate over all GPUs of a machine, 224 pixels (Inception-V3: 299)."""

    model: str
    machine: str
    precision: str
    """Empty: the source at hand does not say."""
    images_per_sec: float
    source: str


class Reached(NamedTuple):
    """A published time to an accuracy: of a whole run by its own recipe, with its own loader and image sizes."""

    model: str
    machine: str
    top1: float
    """Percent of ImageNet's validation images."""
    minutes: float
    epochs: int | None
    """None: the source at hand does not say."""
    source: str


def _of_minutes(minutes: float) -> float:
    return IMAGENET_IMAGES / minutes / 60


PAPER, RECALLED = "the paper, table 3", "the paper, table 3, as recalled, unverified"
CONFIRMED = "the paper, table 3, as recalled; the authors' log agrees"
LOGS = "the authors' logs, median"
NVIDIA, MXNET, TIMM = "NVIDIA's PyTorch ConvNets", "NVIDIA's MXNet", "timm, AMP, channels-last"
MLPERF, FFCV = "MLPerf Training v{}, NVIDIA", "FFCV's ImageNet runs"
PUBLISHED = (
    Published("resnet50a", "8 x V100", "fp32", 1605, PAPER),
    Published("resnet50a", "8 x V100", "fp16", 4853, PAPER),
    Published("inception_v3", "8 x V100", "fp32", _of_minutes(19.8), RECALLED),
    Published("inception_v3", "8 x V100", "fp16", _of_minutes(8), CONFIRMED),
    Published("mobilenet_v1", "8 x V100", "fp32", _of_minutes(6.2), RECALLED),
    Published("mobilenet_v1", "8 x V100", "fp16", _of_minutes(3.7), CONFIRMED),
    Published("resnet50a", "8 x V100", "fp16", 4808, LOGS),
    Published("resnet50b", "8 x V100", "fp16", 5122, LOGS),
    Published("resnet50c", "8 x V100", "fp16", 4736, LOGS),
    Published("resnet50d", "8 x V100", "fp16", 4992, LOGS),
    Published("inception_v3", "8 x V100", "fp16", 2732, LOGS),
    Published("mobilenet_v1", "8 x V100", "fp16", 5639, LOGS),
    Published("resnet50b", "1 x V100", "fp16", 1200, NVIDIA),
    Published("resnet50b", "8 x V100", "fp16", 8322, NVIDIA),
    Published("resnet50b", "1 x A100-80", "fp16", 2470, NVIDIA),
    Published("resnet50b", "8 x A100-80", "fp16", 16621, NVIDIA),
    Published("resnet50b", "1 x A100-80", "fp16", 3410, MXNET),
    Published("resnet50b", "8 x A100-80", "fp16", 26674, MXNET),
    Published("resnet50b", "8 x A100", "", 27164, MLPERF.format("2.1")),
    Published("resnet50b", "8 x H100", "", 57256, MLPERF.format("4.0")),
    Published("resnet50b", "1 x RTX 3090", "fp16", 1218, TIMM),
    Published("resnet50d", "1 x RTX 3090", "fp16", 1078, TIMM),
    Published("inception_v3", "1 x RTX 3090", "fp16", 782, TIMM),
)
REACHED = (
    Reached("resnet50b", "8 x H100", 75.9, 13.27, None, MLPERF.format("4.0")),
    Reached("resnet50b", "8 x A100", 75.9, 28.7, None, MLPERF.format("2.1")),
    Reached("resnet50b", "8 x A100", 73.8, 14.9, 16, FFCV),
    Reached("resnet50b", "8 x A100", 78.4, 77.2, 88, FFCV),
)


def minutes_an_epoch(images_per_sec: float) -> float:
    """Minutes that an epoch of ImageNet takes at this rate."""
    return IMAGENET_IMAGES / images_per_sec / 60


def rates_table(measured: Mapping[tuple[str, str, str], float]) -> Table:
    """Measured rates, (model, machine, precision) -> images a second, among the published ones, fastest first."""
    rows = [(*entry, LABEL) for entry in PUBLISHED]
    rows += [(*key, rate, "", "measured") for key, rate in measured.items()]
    out = Table("network", "machine", "precision", "imgs/sec", "min an epoch", "kind", "source", title_justify="left")
    out.title = "ImageNet: minutes an epoch, beside published figures"
    for model, where, precision, rate, source, label in sorted(rows, key=lambda row: -row[3]):
        out.add_row(MODELS[model], where, precision, f"{rate:,.0f}", f"{minutes_an_epoch(rate):.1f}", label, source)
    return out


def reached_table() -> Table:
    """The published times to an accuracy, the highest accuracy first."""
    out = Table("network", "machine", "top-1, %", "minutes", "epochs", "kind", "source", title_justify="left")
    out.title = "ImageNet: minutes of a whole run to an accuracy"
    for run in sorted(REACHED, key=lambda run: (-run.top1, run.minutes)):
        epochs = "" if run.epochs is None else f"{run.epochs}"
        out.add_row(MODELS[run.model], run.machine, f"{run.top1:.1f}", f"{run.minutes:g}", epochs, LABEL, run.source)
    return out
