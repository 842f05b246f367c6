"""A recipe that depends on the data and the weights it starts from, made for them. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from fasttricks.config import (
    NETWORKS,
    PLACE,
    TIMM,
    TORCHVISION,
    DataConfig,
    TrainConfig,
    UserError,
    get_at,
    replace_at,
    replace_fields,
)
from fasttricks.config.fields import own_kinds
from fasttricks.config.recipes import FITTED, OF_THE_WEIGHTS, find_recipe
from fasttricks.data.sources import find_dataset
from fasttricks.runs.exported import describe
from fasttricks.runs.folder import read_config
from fasttricks.runs.stored import RAW, run_of_best


def fit_recipe(recipe: str, value_of: Callable[[str], str]) -> TrainConfig:
    """The recipe of that name; one that is fitted, to the training images of data.root; one that follows the weights `init`, with
    their network.

    value_of: the value of a field by its path, as it was given, else empty; plan's `images` stands for the data. A root or
    weights that cannot be read are left to the checks of the run. Reads the names of the images.
    """
    if recipe not in FITTED:
        return like_weights(find_recipe(recipe)(), value_of("init"))
    number, root = value_of("images"), value_of("data.root")
    images = int(number) if number.isascii() and number.isdigit() else 0
    if root and not images:
        with contextlib.suppress(UserError, ValueError, OSError):
            images = len(find_dataset(_place(value_of))[0])
    return like_weights(FITTED[recipe](images) if images else find_recipe(recipe)(), value_of("init"))


def _place(value_of: Callable[[str], str]) -> DataConfig:
    """The place that the given values name. Raises ValueError and ConfigError for one that is out of range."""
    kinds = own_kinds(DataConfig)
    given = {name: value for name in PLACE if (value := value_of(f"data.{name}"))}
    read = {name: kinds[name](value) if kinds[name] in (int, float) else value for name, value in given.items()}
    return DataConfig(**read)  # type: ignore[arg-type]


def like_weights(config: TrainConfig, init: str) -> TrainConfig:
    """`config` with the network of the weights `init`, where its recipe follows them and their name, their run's config.json, or
    the description in an export says which it is."""
    name, follows = init.removesuffix(RAW), OF_THE_WEIGHTS.get(config.recipe, ())
    if not name or not follows:
        return config
    if name.startswith((TIMM, TORCHVISION)):
        library, _, theirs = name.partition(":")
        bare = theirs.partition(".")[0]  # resnet50.a1_in1k
        same = [info for info in NETWORKS.values() if getattr(info, library) == bare]
        if not same:
            return replace_at(config, "model.name", TIMM + bare) if library == "timm" else config
        sizes = {"data.image_size": same[-1].image_size, "data.val_resize": same[-1].val_resize}
        found = {"model.name": same[-1].name, **sizes}
        return replace_fields(config, {path: value for path, value in found.items() if path in follows})
    try:
        run = _run_of(Path(name))
    except (UserError, OSError):
        return config
    return replace_fields(config, {path: get_at(run, path) for path in follows})


def _run_of(weights: Path) -> TrainConfig:
    """The config of the run whose weights these are: a run, RUN@best, a checkpoint in a run, or an export.

    Raises UserError or OSError where none is known.
    """
    if (found := describe(weights)) and found.settled:
        return found.config
    in_run = weights.parent.parent if weights.parent.name == "checkpoints" and weights.is_file() else weights
    return read_config(run_of_best(weights) or in_run)
