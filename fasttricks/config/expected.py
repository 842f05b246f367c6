"""Expected accuracy of each recipe, with source, hardware and time. docs/recipes.md and `RECIPE --help` show it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["measured", "paper", "zoo", "recalled"]
SOURCES: dict[Source, str] = {
    "measured": "measured in this project",
    "paper": "the paper",
    "zoo": "the authors' model zoo",
    "recalled": "the paper, as recalled, unverified",
}
XEON, EPYC_CORE, GPUS = "2 cores of an Intel Xeon (AVX-512)", "1 core of an AMD EPYC (AVX2)", "8 V100"


@dataclass(frozen=True)
class Expected:
    """The accuracy that a run of a recipe should reach."""

    source: Source
    top1: float | None = None
    """Top-1 accuracy on the validation images, percent; None: no figure is known."""
    top5: float | None = None
    """Top-5 accuracy, percent."""
    hardware: str = GPUS
    """Hardware of the figure and of the time."""
    time: str = ""
    """Training time; empty: unknown."""
    note: str = ""
    """Conditions of the figure, or the reason why there is none."""

    def __str__(self) -> str:
        """The accuracy with its source, as `top-1 79.15 %, top-5 94.58 % (the paper)`."""
        known = [f"{name} {v:.2f} %" for name, v in (("top-1", self.top1), ("top-5", self.top5)) if v is not None]
        accuracy = f"{', '.join(known)} ({SOURCES[self.source]})" if known else ""
        return "; ".join(part for part in (accuracy, self.note) if part)


EXPECTED: dict[str, Expected] = {
    "demo": Expected("measured", 96.80, 100.00, XEON, "3 min"),
    "cifar10": Expected("measured", 87.03, None, XEON, "17 min"),
    "cifar10-fast": Expected(
        "measured", 89.53, None, "2 cores of an Intel Xeon (AVX2 alone)", "16 to 17 min", "mean of three seeds"
    ),
    "cifar10-ablate": Expected("measured", hardware=EPYC_CORE, time="1 min", note="docs/ablation.md has its results"),
    "cifar10-teacher": Expected("measured", 74.81, None, EPYC_CORE, "4 min of CPU time"),
    "cifar10-distill": Expected(
        "measured", 59.80, None, EPYC_CORE, "1 min", "mean of three seeds; 56.42 % without the teacher"
    ),
    "resnet50-baseline": Expected("recalled", 75.87, 92.70, time="13.3 min an epoch (the paper)"),
    "resnet50-efficient": Expected("recalled", 76.21, 92.97, time="4.4 min an epoch (the paper)"),
    "resnet50d-tricks": Expected("paper", 79.15, 94.58),
    "resnet152d-teacher": Expected("zoo", 80.61, 95.34, note="the paper gives no figure"),
    "resnet50d-tricks-distill": Expected("paper", 79.29, 94.63),
    "inceptionv3-baseline": Expected("recalled", 77.32, 93.43, time="19.8 min an epoch (as recalled)"),
    "inceptionv3-efficient": Expected(
        "recalled", 77.50, 93.60, time="8 min an epoch (as recalled; the authors' log agrees)"
    ),
    "inceptionv3-tricks": Expected("paper", 78.77, 94.39),
    "mobilenet-baseline": Expected("recalled", 69.03, 88.71, time="6.2 min an epoch (as recalled)"),
    "mobilenet-efficient": Expected(
        "recalled", 71.90, 90.47, time="3.7 min an epoch (as recalled; the authors' log agrees)"
    ),
    "mobilenet-tricks": Expected("paper", 73.28, 91.30),
    "places365": Expected(
        "recalled", 56.70, 87.33, note="on Places365-Standard; 56.34 / 86.87 % by efficient training"
    ),
    "finetune": Expected("measured", hardware="1 CPU core", note="docs/finetuning.md has its results"),
    "segment-ade20k": Expected(
        "recalled",
        note="mIoU 38.88 %, pixel accuracy 78.88 % on a base of 77.16 % top-1 (the paper, as recalled, unverified)",
    ),
    "detect-voc": Expected(
        "recalled",
        note="mAP 78.30 % on a base of 77.16 % top-1, 81.33 % on one of 79.29 % (the paper, as recalled, unverified)",
    ),
}
