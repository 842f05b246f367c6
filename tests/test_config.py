"""Every field of a config has a range that is enforced, and a config survives JSON. The help is tested in test_cli.py."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, get_type_hints

import pytest

from fasttricks.config import (
    ConfigError,
    DataConfig,
    ScheduleConfig,
    TrainConfig,
    TricksConfig,
    field_rules,
    from_dict,
    get_at,
    replace_at,
)
from lib.configs import edges, leaves

PLAIN = TrainConfig(recipe="test", epochs=120, global_batch_size=256)

SCALE = "on the scale of 0 to 255; multiply those of the scale of 0 to 1 by 255"
RANGES = {
    "epochs": "1 to 1000000",
    "global_batch_size": "1 to 10000000",
    "accumulate": "1 or more",
    "precision": "one of auto, fp32, bf16, fp16",
    "compile": "one of off, default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs",
    "deterministic": "one of on, off",
    "device": "one of auto, cpu, cuda",
    "seed": "0 or more and below 2^63",
    "ema_decay": "0 (none) or more and below 1",
    "checkpoint_epochs": "1 or more",
    "checkpoint_steps": "0 (off) or more",
    "log_steps": "1 or more",
    "on_bad_loss": "one of stop, skip",
    "max_loss": "above 0, or 0 (any finite loss)",
    "timeout_s": "1 to 10000000 seconds",
    "data.image_size": "8 to 8192 pixels",
    "data.nested": "one of error, top, leaf",
    "data.val_share": "0 (off) to 1",
    "data.limit_per_class": "0 (all) or more",
    "data.area": "two numbers with 0 < first <= second <= 1",
    "data.aspect": "two numbers with 0 < first <= second <= inf",
    "data.flip": "0 to 1",
    "data.color": "one of paper, published, none",
    "data.color_jitter": "0 to 1",
    "data.pca_noise": "0 (off) or more",
    "data.balance": "0 (off) to 1",
    "data.interpolation": "one of linear, cubic, lanczos3",
    "data.operators": "one of auto, fused, dali",
    "data.threads": "0 (choose) to 1024",
    "data.readers": "1 to 1024",
    "data.prefetch": "1 to 1024",
    "data.max_bad": "0 to 1",
    "data.max_pixels": "1 or more pixels",
    "task": "one of classification, multilabel, segmentation, detection",
    "model.num_classes": "2 or more, or 0 (from the data)",
    "model.stem_stride": "one of 4, 2, 1",
    "model.width": "above 0 and at most 16",
    "model.norm": "one of auto, fused, torch",
    "optim.backbone_lr": "above 0",
    "optim.bias_lr": "above 0",
    "data.mean": f"three numbers, of R, G and B, each 0 to 255, {SCALE}",
    "data.std": f"three numbers, of R, G and B, each 1 to 255, {SCALE}",
    "optim.base_lr": "above 0",
    "optim.momentum": "0 or more and below 1",
    "optim.weight_decay": "0 or more and below 1",
    "optim.backend": "one of auto, torch, fused, apex",
    "optim.loss_scale": "above 0, or 0 (dynamic)",
    "optim.loss_scale_steps": "1 or more",
    "schedule.decay": "one of cosine, step, poly",
    "schedule.warmup_epochs": "0 or more",
    "schedule.step_epochs": "rising and above 0",
    "schedule.step_factor": "above 0 and below 1",
    "schedule.poly_power": "above 0",
    "schedule.first_size": "above 0 and at most 1",
    "schedule.size_steps": "1 or more",
    "schedule.full_size_at": "above 0 and below 1",
    "loss.smoothing": "0 or more and below 1",
    "loss.smoothing_over": "one of others, all",
    "loss.mixup_alpha": "0 (off) or more",
    "loss.aux_weight": "above 0",
    "distill.temperature": "above 0",
    "distill.hard_weight": "0 (off) or more",
    "distill.soft_weight": "0 (off) or more",
    "eval.every_epochs": "1 or more",
    "eval.patience": "0 (off) or more",
    "eval.batch_size": "0 (as in training) to 65536",
    "segment.base_size": "8 to 8192 pixels",
    "segment.base_side": "one of short, long",
    "segment.scale": "two numbers with 0 < first <= second <= 16",
    "segment.blur": "0 to 1",
    "segment.output_stride": "one of 8, 16, 32",
    "segment.aux_weight": "0 (no auxiliary head) or more",
    "segment.test_scales": "rising and above 0",
    "detect.base_size": "8 to 8192 pixels",
    "detect.channels": "8 to 4096",
    "detect.head_features": "8 to 16384",
    "detect.anchor_scales": "one number or more, rising and above 0",
    "detect.anchor_ratios": "one number or more, rising and above 0",
    "detect.train_proposals": "1 to 100000",
    "detect.test_proposals": "1 to 100000",
    "detect.train_samples": "4 to 100000",
    "detect.score_threshold": "0 or more and below 1",
    "detect.nms_threshold": "above 0 and at most 1",
    "detect.most_detections": "1 to 100000",
    "detect.average": "one of voc07, area",
}
"""What each field of a run may be; test_ranges.py has what the words mean, and values at their edges."""
LEAVES = list(leaves(TrainConfig))
OUTSIDE = [(p, value) for p, cls, name in LEAVES if name in field_rules(cls) for value in edges(cls, name)[1]]
# Rules that relate two fields, on both sides of the edge: PLAIN has 120 epochs and images of 224 pixels.
RELATED = [
    ("data.val_resize", 223, 224, r"must be at least data\.image_size \(224\), which is cropped from it"),
    ("schedule.warmup_epochs", 120, 119.5, r"must be below epochs \(120\); warm-up is a part of the run"),
    ("schedule.first_size", 0.035, 0.036, r"makes images of fewer than 8 pixels of data\.image_size \(224\)"),
    ("epochs", 5, 6, r"schedule\.warmup_epochs = 5\.0: must be below epochs \(5\)"),
]


def test_the_ranges_are_these() -> None:
    found = {path: field_rules(cls)[name].words for path, cls, name in LEAVES if name in field_rules(cls)}
    assert found == RANGES


def test_every_field_but_text_and_switches_has_a_range() -> None:
    free = {path for path, cls, name in LEAVES if get_type_hints(cls)[name] in (str, bool, tuple[str, ...])}
    assert {path for path, _, _ in LEAVES} - free == {*RANGES, "data.val_resize", "detect.max_size"}


@pytest.mark.parametrize(("path", "value"), OUTSIDE, ids=str)
def test_a_value_out_of_range_is_refused_with_field_value_and_rule(path: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(f'{path} = {value!r}: must be {RANGES[path]}')}(; .*)?$"):
        replace_at(PLAIN, path, value)


@pytest.mark.parametrize(("path", "outside", "inside", "rule"), RELATED)
def test_a_value_that_another_field_rules_out_is_refused(path: str, outside: object, inside: object, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        replace_at(PLAIN, path, outside)
    assert get_at(replace_at(PLAIN, path, inside), path) == inside


def test_a_trick_cannot_be_on_and_off() -> None:
    with pytest.raises(ConfigError, match=r"tricks\.off = \['mixup'\]: cannot be switched on and off"):
        TricksConfig(on=("mixup", "cosine"), off=("mixup",))


def test_a_config_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.data.flip = 0.0  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------- derived


@pytest.mark.parametrize(
    ("batch", "linear_scaling", "peak_lr"),
    [(256, True, 0.1), (1024, True, 0.4), (64, True, 0.025), (1024, False, 0.1), (1, False, 0.1)],
)
def test_peak_lr_scales_with_the_global_batch(batch: int, linear_scaling: bool, peak_lr: float) -> None:
    config = replace_at(replace_at(PLAIN, "global_batch_size", batch), "optim.linear_scaling", linear_scaling)
    assert config.peak_lr == pytest.approx(peak_lr, rel=1e-15)


def test_micro_batch_divides_the_global_batch_among_ranks_and_passes() -> None:
    config = dataclasses.replace(PLAIN, global_batch_size=1024, accumulate=4)
    assert [config.micro_batch_size(ranks) for ranks in (1, 8, 64)] == [256, 32, 4]


@pytest.mark.parametrize(("batch", "nearest"), [(100, 96), (5, 24), (36, 48), (37, 48)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(batch: int, nearest: int) -> None:
    config = dataclasses.replace(PLAIN, global_batch_size=batch, accumulate=3)
    with pytest.raises(ConfigError, match=rf"global_batch_size = {batch}: .*\(8 x 3\); the nearest is {nearest}$"):
        config.micro_batch_size(8)


# ------------------------------------------------------------------------------------------------- paths and JSON


def test_replace_at_changes_one_field_of_a_copy() -> None:
    changed = replace_at(PLAIN, "schedule.warmup_epochs", 2.0)
    assert changed.schedule == ScheduleConfig(warmup_epochs=2.0)
    assert dataclasses.replace(changed, schedule=PLAIN.schedule) == PLAIN
    assert PLAIN.schedule.warmup_epochs == 5.0


def test_json_round_trip() -> None:
    config = dataclasses.replace(
        PLAIN,
        data=DataConfig(root="x", area=(0.25, 0.75), color="published"),
        schedule=ScheduleConfig(decay="step", step_epochs=(10, 20.5), warmup_epochs=0.1),
        tricks=TricksConfig(off=("mixup", "cosine")),
    )
    back = from_dict(TrainConfig, json.loads(json.dumps(dataclasses.asdict(config))))
    assert back == config
    assert isinstance(back.data.area, tuple)
    assert hash(back) == hash(config)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"epoch": 3}, r"TrainConfig = \['epoch'\]: is not a field; the fields are recipe, epochs"),
        ({"optim": {"lr": 3}}, r"OptimConfig = \['lr'\]: is not a field; the fields are base_lr"),
        ({"optim": {"base_lr": -1}}, r"optim\.base_lr = -1: "),
        ({"precision": "fp8"}, r"precision = 'fp8': must be one of auto, fp32, bf16, fp16"),
        ({"epochs": "many"}, r"^epochs = 'many': must be of the kind int"),
        ({"epochs": True}, r"^epochs = True: must be of the kind int"),
        ({"optim": {"momentum": True}}, r"^optim\.momentum = True: must be of the kind float"),
        ({"compile_fallback": {}}, r"^compile_fallback = \{\}: must be of the kind bool"),
        ({"resume": 1}, r"^resume = 1: must be of the kind bool"),
        ({"schedule": {"step_epochs": [3, "x"]}}, r"^schedule\.step_epochs = 'x': must be of the kind float"),
        ({"tricks": {"on": "mixup"}}, r"^tricks\.on = 'mixup': must be a list"),
        ({"data": 3}, r"DataConfig = 3: must be a table"),
    ],
)
def test_json_that_is_no_config_is_refused(edit: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, {"recipe": "x", "epochs": 120, "global_batch_size": 8} | edit)


def test_json_without_a_required_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        from_dict(TrainConfig, {"recipe": "x", "epochs": 120})
