"""Every trick on every recipe: switching changes its own fields alone, off and on is where one started."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fasttricks.config import (
    ConfigError,
    DoesNotApplyError,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    get_at,
    replace_at,
)
from fasttricks.config.networks import OPTION_TRICKS, OPTIONS
from fasttricks.config.recipes import (
    RECIPES,
    resnet50_baseline,
    resnet50_efficient,
    resnet50d_tricks,
    resnet50d_tricks_distill,
)
from fasttricks.config.tricks import TRICKS, applies, apply_tricks, find_trick, is_off, is_on
from lib.configs import FAMILIES, OF_CLASSIFIERS, has_use_for

# Typed from the paper's sections: the field of a trick, and its value with the trick and without.
FIELDS: dict[str, tuple[str, str, Any, Any]] = {
    "linear_scaling": ("3.1", "optim.linear_scaling", True, False),
    "warmup": ("3.1", "schedule.warmup_epochs", 5, 0),
    "zero_gamma": ("3.1", "model.zero_gamma", True, False),
    "no_bias_decay": ("3.1", "optim.bias_decay", False, True),
    "low_precision": ("3.2", "precision", "auto", "fp32"),
    "resnet_d": ("4", "model.name", "resnet50d", "resnet50a"),
    "cosine": ("5.1", "schedule.decay", "cosine", "step"),
    "label_smoothing": ("5.2", "loss.smoothing", 0.1, 0.0),
    "distillation": ("5.3", "distill.teacher", "runs/resnet152d-teacher", ""),
    "mixup": ("5.4", "loss.mixup_alpha", 0.2, 0.0),
    "whitening": ("none", "model.whitening", True, False),
    "identity_init": ("none", "model.identity_init", True, False),
    "bias_lr": ("none", "optim.bias_lr", 64.0, 1.0),
    "alternate_flip": ("none", "data.alternate_flip", True, False),
    "progressive_resizing": ("none", "schedule.first_size", 0.5, 1.0),
}
FOR_RESNETS = tuple(trick for trick, family in FAMILIES.items() if family == "resnet")
OURS = ("whitening", "identity_init", "bias_lr", "alternate_flip", "progressive_resizing")
"""Not the paper's, and off in its recipes."""
WITH_OURS = ("cifar10-fast",)
"""Recipes that are not the paper's."""
PAPERS = tuple(trick for trick in FIELDS if trick not in OURS)
EVERY = [(recipe, trick) for recipe in OF_CLASSIFIERS for trick in FIELDS if has_use_for(recipe, trick)]


def test_the_tricks_are_these() -> None:
    assert {name: (trick.section, *trick.on) for name, trick in TRICKS.items()} == {
        name: (section, path) for name, (section, path, _, _) in FIELDS.items()
    }
    assert all(trick.name == name and trick.on.keys() == trick.off.keys() for name, trick in TRICKS.items())
    assert all(len(trick.summary) > 15 for trick in TRICKS.values())


def test_the_switches_of_a_networks_options_are_the_tricks_that_edit_them() -> None:
    edits = {path: name for name, trick in TRICKS.items() for path in trick.on}
    assert tuple(option for option in OPTIONS if edits.get(f"model.{option}") == option) == OPTION_TRICKS


@pytest.mark.parametrize("trick", PAPERS)
def test_on_and_off_give_the_papers_values(trick: str) -> None:
    _, path, with_trick, without = FIELDS[trick]
    everything, nothing = resnet50d_tricks_distill(), resnet50_baseline()
    assert get_at(everything, path) == with_trick
    assert is_on(everything, trick)
    assert get_at(nothing, path) == without
    assert not is_on(nothing, trick)
    assert get_at(apply_tricks(everything, off=[trick]), path) == without
    assert get_at(apply_tricks(nothing, on=[trick]), path) == with_trick


def test_a_decay_that_is_neither_has_cosine_neither_on_nor_off() -> None:
    poly = replace_at(resnet50d_tricks(), "schedule.decay", "poly")
    assert not is_on(poly, "cosine") and not is_off(poly, "cosine")
    assert apply_tricks(poly, on=["cosine"]).schedule.decay == "cosine"
    assert apply_tricks(poly, off=["cosine"]).schedule.decay == "step"


@pytest.mark.parametrize(("recipe", "trick"), EVERY)
def test_switching_changes_the_tricks_own_field_alone(recipe: str, trick: str) -> None:
    config, path = RECIPES[recipe](), FIELDS[trick][1]
    before = get_at(config, path)
    for switch in ({"on": [trick]}, {"off": [trick]}):
        switched = apply_tricks(config, **switch)
        assert replace_at(switched, path, before) == config
        assert is_on(switched, trick) == ("on" in switch)
        assert is_off(switched, trick) == ("off" in switch)
        assert (is_on if "on" in switch else is_off)(config, trick) == (switched == config)


@pytest.mark.parametrize(("recipe", "trick"), EVERY)
def test_a_trick_that_is_on_keeps_the_recipes_value(recipe: str, trick: str) -> None:
    config = RECIPES[recipe]()
    if is_on(config, trick):
        assert apply_tricks(config, on=[trick]) == config
    if trick == "warmup" and config.epochs <= FIELDS["warmup"][2]:  # the paper's warm-up is longer than the run
        with pytest.raises(ConfigError, match=r"schedule\.warmup_epochs = 5\.0: must be below epochs"):
            apply_tricks(apply_tricks(config, off=[trick]), on=[trick])
        return
    again = apply_tricks(apply_tricks(config, off=[trick]), on=[trick])
    assert is_on(again, trick)
    assert apply_tricks(again, on=[trick]) == again


@pytest.mark.parametrize("recipe", OF_CLASSIFIERS)
def test_what_is_not_the_papers_is_off_in_its_recipes(recipe: str) -> None:
    on = [trick for trick in OURS if is_on(RECIPES[recipe](), trick)]
    assert on == (list(OURS) if recipe in WITH_OURS else [])


def test_off_and_on_brings_every_paper_recipe_back() -> None:
    for recipe in (resnet50_efficient(), resnet50d_tricks(), resnet50d_tricks_distill()):
        used = [trick for trick in TRICKS if is_on(recipe, trick)]
        bare = apply_tricks(recipe, off=used)
        assert not any(is_on(bare, trick) for trick in TRICKS)
        assert apply_tricks(bare, on=used) == recipe


def test_the_papers_recipes_differ_by_their_tricks_batch_and_length() -> None:
    """The whole ladder of the paper is the baseline plus tricks: so what the table does not name, no recipe changes."""
    ladder = apply_tricks(resnet50_baseline(), on=PAPERS)
    top = resnet50d_tricks_distill()
    assert dataclasses.replace(ladder, recipe=top.recipe, epochs=200, global_batch_size=1024) == top


def test_tricks_work_on_every_model_with_variants() -> None:
    config = replace_at(resnet50d_tricks(), "model.name", "resnet101b")
    assert apply_tricks(config, on=["resnet_d"]).model.name == "resnet101d"
    assert apply_tricks(config, off=["resnet_d"]).model.name == "resnet101a"


@pytest.mark.parametrize("recipe", ["inceptionv3-tricks", "mobilenet-tricks"])
def test_tricks_of_residual_blocks_are_refused_where_there_are_none(recipe: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.zero_gamma = True: .*zero gamma does not apply"):
        apply_tricks(RECIPES[recipe](), on=["zero_gamma"])
    with pytest.raises(ConfigError, match=r"has no variants a to d, so the trick resnet_d does not apply"):
        apply_tricks(RECIPES[recipe](), on=["resnet_d"])
    assert apply_tricks(RECIPES[recipe](), off=["zero_gamma"]) == RECIPES[recipe]()
    used = [trick for trick in TRICKS if is_on(RECIPES[recipe](), trick)]
    assert used == [trick for trick in PAPERS if trick not in (*FOR_RESNETS, "distillation")]


def test_the_other_networks_recipes_are_the_resnets_but_for_what_does_not_apply() -> None:
    for network in ("inceptionv3", "mobilenet"):
        for kind, resnet in {
            "baseline": resnet50_baseline(),
            "efficient": resnet50_efficient(),
            "tricks": resnet50d_tricks(),
        }.items():
            other = RECIPES[f"{network}-{kind}"]()
            same = dataclasses.replace(resnet, recipe=other.recipe, model=other.model, data=other.data)
            assert same == other


@pytest.mark.parametrize(
    "name", ["resnet8a", "resnet34c", "resnet50d", "inception_v3", "mobilenet_v1", "cifarnet", "timm:resnet50", "?"]
)
@pytest.mark.parametrize("trick", TRICKS)
def test_a_question_about_a_trick_is_answered_for_every_network(trick: str, name: str) -> None:
    """On, off, neither, or does not apply; never an exception. What does not apply is off already, and cannot be on."""
    for recipe in (resnet50_baseline, resnet50d_tricks_distill):
        bare = apply_tricks(recipe(), off=TRICKS)
        config = dataclasses.replace(bare, model=ModelConfig(name=name))
        states = is_on(config, trick), is_off(config, trick)
        assert not all(states)
        if applies(config, trick):
            assert is_off(apply_tricks(config, off=[trick]), trick)
        else:
            assert trick in FAMILIES and not is_on(config, trick)
            assert apply_tricks(config, off=[trick]) == config
            with pytest.raises(DoesNotApplyError, match="does not apply"):
                apply_tricks(config, on=[trick])


def test_a_warm_up_that_is_longer_than_the_run_applies_and_is_refused() -> None:
    config = TrainConfig(recipe="x", epochs=3, global_batch_size=1, schedule=ScheduleConfig(warmup_epochs=0))
    assert applies(config, "warmup")
    with pytest.raises(ConfigError, match=r"schedule\.warmup_epochs = 5\.0: must be below epochs \(3\)"):
        apply_tricks(config, on=["warmup"])


@pytest.mark.parametrize(
    ("wrong", "right"), [("mixpu", "mixup"), ("zero-gamma", "zero_gamma"), ("smoothing", "label_smoothing")]
)
def test_a_misspelt_trick_is_answered_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=rf"trick = '{wrong}': unknown; did you mean '{right}'\?; the tricks are lin"):
        find_trick(wrong)


def test_a_name_that_is_near_nothing_gets_the_list() -> None:
    with pytest.raises(
        ConfigError, match=r"trick = 'xyzzy': unknown; the tricks are linear_scaling, .*, progressive_resizing$"
    ):
        apply_tricks(TrainConfig(recipe="x", epochs=6, global_batch_size=1), on=["xyzzy"])
