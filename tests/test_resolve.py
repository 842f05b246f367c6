"""From a recipe and what is asked of it to what is trained: config.json never says what the fields are not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.cells import extend as extend_to_ablate
from fasttricks.commands import train
from fasttricks.commands.plan import extend as extend_to_plan
from fasttricks.config import ConfigError, TrainConfig, TricksConfig, get_at, replace_at
from fasttricks.config.cli import arguments_of, parse_extended, parse_recipe
from fasttricks.config.recipes import RECIPES, resnet50_baseline, resnet50d_tricks
from fasttricks.config.resolve import require_resolved, resolve
from fasttricks.config.tricks import TRICKS, is_on
from fasttricks.planning.planner import PlanConfig, make_plan
from fasttricks.training.build import build
from lib.configs import OF_CLASSIFIERS, has_use_for
from lib.tiny import ALONE, SMALLEST, arguments, call, configure

MIXED = dataclasses.replace(resnet50_baseline(), tricks=TricksConfig(on=("mixup",)))
"""A recipe with a trick that its fields do not have yet."""


def as_python(overrides: dict[str, Any], recipe: TrainConfig) -> TrainConfig:
    return resolve(recipe, overrides)


def as_command(overrides: dict[str, Any], recipe: TrainConfig) -> TrainConfig:
    args = []
    for path, value in overrides.items():
        args += [f"--{path.replace('_', '-')}", *(value if isinstance(value, tuple) else (str(value),))]
    return parse_recipe([recipe.recipe, *args], prog="test")


EVERY = [(recipe, trick) for recipe in OF_CLASSIFIERS for trick in TRICKS if has_use_for(recipe, trick)]
QUARTER = [
    pytest.param(
        recipe, trick, marks=[pytest.mark.slow] * ((OF_CLASSIFIERS.index(recipe) + [*TRICKS].index(trick)) % 4 != 0)
    )
    for recipe, trick in EVERY
]
"""A quarter of them, with each recipe and each trick; the others are slow."""
both_ways = pytest.mark.parametrize("ask", [as_python, as_command])
Ask = Callable[[dict[str, Any], TrainConfig], TrainConfig]


# ------------------------------------------------------------------------------------------------- what is trained
def test_a_trick_that_the_recipe_names_is_trained() -> None:
    assert resolve(MIXED).loss.mixup_alpha == 0.2
    assert resolve(MIXED) == resolve(resnet50_baseline(), {"tricks.on": ("mixup",)})


@both_ways
def test_a_run_without_a_folder_gets_one_of_its_own(ask: Ask) -> None:
    assert ask({}, resnet50_baseline()).run_dir == "runs/resnet50-baseline"
    assert ask({"run_dir": ""}, resnet50_baseline()).run_dir == "runs/resnet50-baseline"
    assert ask({"run_dir": "here"}, resnet50_baseline()).run_dir == "here"


@both_ways
def test_tricks_then_single_fields(ask: Ask) -> None:
    asked = {"loss.mixup_alpha": 0.3, "tricks.off": ("cosine",), "tricks.on": ("mixup", "zero_gamma"), "epochs": 4}
    config = ask(asked | {"schedule.warmup_epochs": 1.0}, resnet50d_tricks())
    found = config.loss.mixup_alpha, config.schedule.decay, config.model.zero_gamma, config.epochs
    assert found == (0.3, "step", True, 4)
    assert config.tricks == TricksConfig(on=("mixup", "zero_gamma"), off=("cosine",))


@both_ways
@pytest.mark.parametrize(
    ("asked", "listed"),
    [
        ({"tricks.on": ("mixup", "cosine"), "loss.mixup_alpha": 0.0}, TricksConfig(on=("cosine",))),
        ({"tricks.off": ("cosine", "mixup"), "loss.mixup_alpha": 0.4}, TricksConfig(off=("cosine",))),
        ({"tricks.off": ("resnet_d",), "model.name": "resnet50b"}, TricksConfig()),
        ({"tricks.on": ("resnet_d",), "model.name": "resnet34d"}, TricksConfig(on=("resnet_d",))),
        ({"tricks.off": ("resnet_d", "zero_gamma"), "model.name": "mobilenet_v1"}, TricksConfig(off=("zero_gamma",))),
    ],
)
def test_a_trick_that_a_single_field_overrode_leaves_its_list(
    ask: Ask, asked: dict[str, Any], listed: TricksConfig
) -> None:
    config = ask(asked, resnet50d_tricks())
    assert config.tricks == listed
    assert {path: get_at(config, path) for path in asked if "tricks" not in path} == {
        path: value for path, value in asked.items() if "tricks" not in path
    }
    assert resolve(config) == config
    require_resolved(config)


def test_what_the_overrides_say_of_a_trick_wins_over_the_recipes_lists() -> None:
    config = resolve(MIXED, {"tricks.off": ("mixup", "cosine")})
    assert (config.loss.mixup_alpha, config.tricks) == (0.0, TricksConfig(off=("mixup", "cosine")))
    back = resolve(config, {"tricks.on": ("mixup",)})
    assert (back.loss.mixup_alpha, back.tricks) == (0.2, TricksConfig(on=("mixup",), off=("cosine",)))
    with pytest.raises(ConfigError, match=r"tricks\.off = \['mixup'\]: cannot be switched on and off"):
        resolve(MIXED, {"tricks.on": ["mixup"], "tricks.off": ["mixup"]})


def test_fields_are_judged_together() -> None:
    """Three epochs alone have no room for a warm-up of five, nor a warm-up of seven alone in the recipe's five."""
    short = dataclasses.replace(resnet50_baseline(), epochs=5)
    config = resolve(short, {"epochs": 8, "schedule.warmup_epochs": 7, "data.val_resize": 300, "data.image_size": 288})
    assert (config.epochs, config.schedule.warmup_epochs, config.data.image_size) == (8, 7, 288)


@pytest.mark.parametrize(("recipe", "trick"), EVERY)
@pytest.mark.parametrize("switch", ["on", "off"])
def test_resolving_twice_is_resolving_once(recipe: str, trick: str, switch: str) -> None:
    plain, (path,) = RECIPES[recipe](), TRICKS[trick].on
    longer = {"epochs": 120} if (trick, switch) == ("warmup", "on") else {}
    once = resolve(dataclasses.replace(plain, **longer), {f"tricks.{switch}": (trick,)})
    assert resolve(once) == once
    assert getattr(once.tricks, switch) == (trick,)
    assert is_on(once, trick) == (switch == "on")
    require_resolved(once)
    other = resolve(dataclasses.replace(plain, **longer), {f"tricks.{'off' if switch == 'on' else 'on'}": (trick,)})
    overridden = resolve(once, {path: get_at(other, path)})  # the field as the other switch has it
    assert overridden.tricks == TricksConfig()
    assert resolve(overridden) == overridden


@pytest.mark.parametrize(("recipe", "trick"), QUARTER)
@pytest.mark.parametrize("switch", ["on", "off"])
def test_its_arguments_are_read_as_it(recipe: str, trick: str, switch: str) -> None:
    longer = {"epochs": 120} if (trick, switch) == ("warmup", "on") else {}
    once = resolve(RECIPES[recipe](), {f"tricks.{switch}": (trick,), **longer})
    assert parse_recipe(arguments_of(once), prog="test") == once


def test_configs_of_other_commands_are_resolved_alike() -> None:
    plan = resolve(extend_to_plan(MIXED), {"gpus": 16, "tricks.off": ["cosine"]})
    assert isinstance(plan, PlanConfig)
    assert (plan.gpus, plan.loss.mixup_alpha, plan.schedule.decay) == (16, 0.2, "step")
    ablate = resolve(extend_to_ablate(RECIPES["cifar10-ablate"]()), {"tricks.off": ["distillation"], "seeds": 5})
    assert isinstance(ablate, AblateConfig)
    assert (ablate.seeds, ablate.distill.teacher, ablate.run_dir) == (5, "", "runs/ablate-cifar10-ablate")
    args = ["cifar10-ablate", "--tricks.off", "distillation", "--seeds", "5"]
    assert parse_extended(args, prog="test", extend=extend_to_ablate) == ablate


# -------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"loss.smothing": 0.1}, r"^field = 'loss\.smothing': unknown; did you mean 'loss\.smoothing'\?"),
        ({"smoothing": 0.1}, r"^field = 'smoothing': unknown; did you mean 'loss\.smoothing'\?"),
        ({"xyzzy": 0.1}, r"^field = 'xyzzy': unknown; the fields have the names of --help$"),
        ({"loss": 0.1}, r"^field = 'loss': is a section; name its fields one by one, as 'loss\.smoothing'$"),
        ({"epochs": "3"}, r"^epochs = '3': must be of the kind int$"),
        ({"epochs": 3.0}, r"^epochs = 3\.0: must be of the kind int$"),
        ({"model.zero_gamma": 1}, r"^model\.zero_gamma = 1: must be of the kind bool$"),
        ({"data.area": 0.5}, r"^data\.area = 0\.5: must be a list$"),
        ({"tricks.on": "mixup"}, r"^tricks\.on = 'mixup': must be a list$"),
        ({"tricks.on": ["mixpu"]}, r"^trick = 'mixpu': unknown; did you mean 'mixup'\?"),
        ({"loss.smoothing": 1.5}, r"^loss\.smoothing = 1\.5: must be 0 or more and below 1$"),
        ({"precision": "fp8"}, r"^precision = 'fp8': must be one of auto, fp32, bf16, fp16$"),
    ],
)
def test_what_is_no_field_or_no_value_of_it_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(resnet50_baseline(), overrides)


@pytest.mark.parametrize(
    ("tricks", "message"),
    [
        (
            {"on": ("cosine", "mixup")},
            r"^tricks\.on = 'mixup': disagrees with the fields: loss\.mixup_alpha would differ; ",
        ),
        (
            {"off": ("mixup", "cosine")},
            r"^tricks\.off = 'cosine': disagrees with the fields: schedule\.decay would differ; ",
        ),
    ],
)
def test_build_and_plan_refuse_a_trick_that_is_not_as_listed(
    tricks: dict[str, Any], message: str, tiny_data: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(configure(tiny_data, tmp_path / "run"), tricks=TricksConfig(**tricks))
    with pytest.raises(ConfigError, match=message + r"call fasttricks\.config\.resolve\.resolve\(config\)"):
        build(config, ALONE)
    with pytest.raises(ConfigError, match=message):
        make_plan(extend_to_plan(config))
    assert list(tmp_path.iterdir()) == []


def test_build_refuses_to_write_into_the_current_folder(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(configure(tiny_data, tmp_path / "run"), run_dir="")
    with pytest.raises(ConfigError, match=r"^run_dir = '': must name a folder; call .*resolve\(config\).*runs/RECIPE"):
        build(config, ALONE)
    assert list(tmp_path.iterdir()) == []
    run = build(resolve(config), ALONE)
    run.log.close()
    assert run.folder == Path("runs/cifar10")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# ------------------------------------------------------------------------------------------------- what is recorded
def test_config_json_says_what_was_trained(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command line, and by Python: mixup is in the list where it was in the loss, and only there."""
    monkeypatch.chdir(tmp_path)
    args = arguments(tiny_data, Path("command"), "--epochs", "1", "--tricks.on", "mixup", "--tricks.off", "cosine")
    assert call(train.main, *args) == 0
    recipe = replace_at(RECIPES["cifar10"](), "tricks.on", ("mixup", "label_smoothing"))
    parsed = parse_recipe(["cifar10", *SMALLEST, "--data.root", str(tiny_data)], prog="test")
    small = {
        path: get_at(parsed, path) for path in ("global_batch_size", "data.root", "data.image_size", "model.width")
    }
    build(resolve(recipe, small | {"loss.smoothing": 0.0, "device": "cpu"}), ALONE).log.close()
    found = {}
    for folder in ("command", "runs/cifar10"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())["config"]
        found[folder] = (saved["tricks"], saved["loss"]["mixup_alpha"], saved["loss"]["smoothing"])
    assert found == {
        "command": ({"on": ["mixup"], "off": ["cosine"]}, 0.2, 0.1),
        "runs/cifar10": ({"on": ["mixup"], "off": []}, 0.2, 0.0),
    }
