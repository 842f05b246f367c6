"""A recipe that depends on the data and the weights it starts from, made for them. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from fasttricks.config import NETWORKS, TIMM, TORCHVISION, TrainConfig, UserError, get_at, replace_at, replace_fields
from fasttricks.config.recipes import FITTED, OF_THE_WEIGHTS, find_recipe
from fasttricks.data.sources import find_dataset
from fasttricks.runs.folder import read_config
from fasttricks.runs.stored import RAW


def fit_recipe(recipe: str, value_of: Callable[[str], str]) -> TrainConfig:
    """The recipe of that name; one that is fitted, to the training images of data.root and the network of the weights `init`.

    value_of: the value of a field by its path, as it was given, else empty; plan's `images` stands for the data. A root or
    weights that cannot be read are left to the checks of the run. Reads the names of the images.
    """
    if recipe not in FITTED:
        return find_recipe(recipe)()
    number, root = value_of("images"), value_of("data.root")
    images = int(number) if number.isascii() and number.isdigit() else 0
    if root and not images:
        with contextlib.suppress(UserError, OSError):
            images = len(find_dataset(root, value_of("data.class_order") or "codepoint")[0])
    return like_weights(FITTED[recipe](images) if images else find_recipe(recipe)(), value_of("init"))


def like_weights(config: TrainConfig, init: str) -> TrainConfig:
    """`config` with the network of the weights `init`, where their name or their run's config.json says which it is."""
    name = init.removesuffix(RAW)
    if name.startswith((TIMM, TORCHVISION)):
        library, _, theirs = name.partition(":")
        bare = theirs.partition(".")[0]  # resnet50.a1_in1k
        same = [info for info in NETWORKS.values() if getattr(info, library) == bare]
        if not same:
            return replace_at(config, "model.name", TIMM + bare) if library == "timm" else config
        sizes = {"data.image_size": same[-1].image_size, "data.val_resize": same[-1].val_resize}
        return replace_fields(config, {"model.name": same[-1].name, **sizes})
    try:
        run = read_config(Path(name))
    except (UserError, OSError):
        return config
    return replace_fields(config, {path: get_at(run, path) for path in OF_THE_WEIGHTS})
