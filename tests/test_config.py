"""Every field of a config has a range that is enforced, and a config survives JSON. The help is tested in test_cli.py."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_type_hints

import pytest

from fasttricks.config import (
    ConfigError,
    DataConfig,
    ScheduleConfig,
    TrainConfig,
    TricksConfig,
    from_dict,
    get_at,
    replace_at,
)
from lib.configs import leaves

nan, inf = math.nan, math.inf
PLAIN = TrainConfig(recipe="test", epochs=120, global_batch_size=256)

OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "epochs": (0, -1),
    "global_batch_size": (0, -256),
    "accumulate": (0, -1),
    "precision": ("fp8", "BF16"),
    "compile": ("on", ""),
    "device": ("gpu", ""),
    "seed": (-1,),
    "ema_decay": (1.0, -0.1, nan),
    "checkpoint_epochs": (0,),
    "log_steps": (0,),
    "checkpoint_steps": (-1,),
    "on_bad_loss": ("go",),
    "max_loss": (-1.0, inf, nan),
    "timeout_s": (0, -1),
    "data.max_bad": (-0.1, 1.1, nan),
    "data.max_pixels": (0,),
    "data.image_size": (7, 0, -224),
    "data.val_resize": (223, 0),
    "data.area": ((0.0, 1.0), (0.5, 1.1), (0.9, 0.1), (nan, 1.0), (0.1,), (0.1, 0.5, 1.0)),
    "data.aspect": ((0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (1.0, inf), (nan, nan)),
    "data.flip": (-0.1, 1.1, nan),
    "data.color": ("hsv",),
    "data.color_jitter": (-0.1, 1.1, nan),
    "data.pca_noise": (-0.1, inf, nan),
    "data.interpolation": ("bilinear",),
    "data.operators": ("fast",),
    "data.threads": (-1,),
    "data.prefetch": (0, -1),
    "model.num_classes": (-1,),
    "model.stem_stride": (3, 0, 8),
    "model.width": (0.0, -1.0, 17.0, nan),
    "optim.base_lr": (0.0, -0.1, inf, nan),
    "optim.momentum": (-0.1, 1.0, nan),
    "optim.weight_decay": (-1e-4, 1.0, nan),
    "optim.backend": ("triton", ""),
    "optim.loss_scale": (-1.0, inf, nan),
    "optim.loss_scale_steps": (0, -1),
    "schedule.decay": ("linear",),
    "schedule.warmup_epochs": (-1.0, inf, nan, 120),
    "schedule.step_epochs": ((0,), (-1, 30), (30, 30), (60, 30), (30, nan)),
    "schedule.step_factor": (0.0, 1.0, 10.0, nan),
    "schedule.first_size": (0.0, 1.1, nan, 0.01),
    "schedule.size_steps": (0,),
    "schedule.full_size_at": (0.0, 1.0, nan),
    "loss.smoothing": (-0.1, 1.0, nan),
    "loss.smoothing_over": ("both",),
    "loss.mixup_alpha": (-0.2, inf, nan),
    "distill.temperature": (0.0, -1.0, inf, nan),
    "distill.hard_weight": (-0.1, inf, nan),
    "distill.soft_weight": (-0.1, inf, nan),
    "loss.aux_weight": (0.0, -0.4, inf, nan),
    "eval.every_epochs": (0, -1),
    "eval.batch_size": (-1,),
}
# The largest and smallest that each rule lets pass, where the edge itself is allowed.
EDGES: dict[str, tuple[Any, ...]] = {
    "epochs": (6,),
    "global_batch_size": (1,),
    "seed": (0,),
    "ema_decay": (0.0,),
    "data.val_resize": (224,),
    "data.area": ((0.5, 0.5), (1.0, 1.0)),
    "data.aspect": ((1.0, 1.0),),
    "data.flip": (0.0, 1.0),
    "data.color_jitter": (0.0, 1.0),
    "data.pca_noise": (0.0,),
    "data.prefetch": (1,),
    "model.width": (16.0,),
    "optim.momentum": (0.0,),
    "optim.weight_decay": (0.0,),
    "optim.loss_scale": (0.0, 128.0),
    "optim.loss_scale_steps": (1,),
    "schedule.warmup_epochs": (0.0, 0.5, 119.5),
    "schedule.step_epochs": ((), (0.5,)),
    "loss.smoothing": (0.0,),
    "loss.mixup_alpha": (0.0,),
    "eval.batch_size": (0,),
}


def rows(table: dict[str, tuple[Any, ...]]) -> list[tuple[str, Any]]:
    return [(path, value) for path, values in table.items() for value in values]


@pytest.mark.parametrize(("path", "value"), rows(OUT_OF_RANGE), ids=str)
def test_a_value_out_of_range_is_refused_with_field_value_and_rule(path: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        replace_at(PLAIN, path, value)
    name, _, rest = str(caught.value).partition(" = ")
    shown, _, rule = rest.partition(": ")
    assert (name, shown) == (path, repr(value))
    assert len(rule) > 8


@pytest.mark.parametrize(("path", "value"), rows(EDGES), ids=str)
def test_the_edge_of_a_range_is_allowed(path: str, value: object) -> None:
    assert get_at(replace_at(PLAIN, path, value), path) == value


def test_every_field_that_has_a_range_is_in_the_table() -> None:
    free = {  # text, switches and lists of names; tricks' own rules are tested below and in test_tricks.py
        path for path, cls, name in leaves(TrainConfig) if get_type_hints(cls)[name] in (str, bool, tuple[str, ...])
    }
    assert {path for path, _, _ in leaves(TrainConfig)} - free == set(OUT_OF_RANGE)


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
