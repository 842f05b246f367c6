"""FP16 with masters trains to the accuracy of FP32: paired runs on a part of CIFAR-10, five seeds."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fasttricks.config.cli import parse_recipe
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.tiny import ALONE

SEEDS = range(5)
STUDENT_T = 2.776
"""97.5 % quantile of Student's t with 4 degrees of freedom: two-sided 95 % of five pairs."""
# A small net, few and small images: FP16 convolutions are many times slower than FP32's on a CPU.
SETTINGS = shlex.split(
    "--epochs 6 --schedule.warmup-epochs 1 --global-batch-size 64 --model.name resnet8d --model.width 0.25 "
    "--model.stem-stride 2 --data.image-size 16 --data.val-resize 18 --eval.every-epochs 6 --ema-decay 0 --device cpu"
)


def link_part(source: Path, target: Path, a_class: int) -> None:
    """Links to the first `a_class` images of each class of the folder `source`."""
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        (target / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:a_class]:
            (target / folder.name / image.name).symlink_to(image.resolve())


@pytest.mark.slow
@pytest.mark.timeout(1500)  # minutes alone; the usual limit is too short beside other work
def test_fp16_is_as_good_as_fp32_over_five_seeds(
    test_data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)
    cifar = test_data("cifar10")
    link_part(cifar / "train", tmp_path / "data" / "train", 400)
    link_part(cifar / "val", tmp_path / "data" / "val", 200)
    top1: dict[str, list[float]] = {}
    for precision in ("fp32", "fp16"):
        for seed in SEEDS:
            where = ["--data.root", str(tmp_path / "data"), "--run-dir", str(tmp_path / f"{precision}-{seed}")]
            args = ["cifar10", *SETTINGS, *where, "--precision", precision, "--seed", str(seed)]
            top1.setdefault(precision, []).append(fit(build(parse_recipe(args, prog="test"), ALONE))["top1"])
    differences = np.subtract(top1["fp16"], top1["fp32"])
    half = STUDENT_T * differences.std(ddof=1) / np.sqrt(len(differences))
    low, high = differences.mean() - half, differences.mean() + half
    what = f"top-1 fp32 {top1['fp32']}, fp16 {top1['fp16']}; fp16 - fp32: {differences.mean():+.2f} points"
    record_property("figures", f"{what}, 95 % interval {low:+.2f} to {high:+.2f}")
    assert min(top1["fp32"]) > 30, "the runs hardly learned: nothing was shown"
    assert differences.mean() >= -1.0
