"""What every recipe must do, whatever it is. A new recipe is tested here by being registered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fasttricks.config import replace_at
from fasttricks.config.cli import parse_recipe
from fasttricks.config.recipes import RECIPES
from fasttricks.models import head_names
from fasttricks.trainer import train_step
from fasttricks.training.build import build
from lib.tiny import ALONE, DETECT, SHRINK, arguments


@pytest.mark.parametrize("name", RECIPES)
def test_takes_a_step(
    name: str, tiny_data: Path, tiny_masks: Path, tiny_boxes: Path, teacher_run: Path, tmp_path: Path
) -> None:
    """Shrunk by what the command line offers, with its own network, loss, schedule, precision and augmentation."""
    recipe = RECIPES[name]()
    larger = ["--data.image-size", "75", "--data.val-resize", "75"] if recipe.model.name == "inception_v3" else []
    data = {"segmentation": tiny_masks, "detection": tiny_boxes}.get(recipe.task, tiny_data)
    shrink = [*DETECT, "--model.name", recipe.model.name, "--ema-decay", "0"] if recipe.task == "detection" else SHRINK
    args = arguments(data, tmp_path / "run", *larger, recipe=name, shrink=shrink)
    config = parse_recipe(args, prog="test")
    assert (config.model.name, config.loss, config.optim) == (recipe.model.name, recipe.loss, recipe.optim)
    assert (config.data.color, config.data.area, config.ema_decay) == (
        recipe.data.color,
        recipe.data.area,
        recipe.ema_decay,
    )
    if recipe.distill.teacher:
        config = replace_at(config, "distill.teacher", str(teacher_run))
    run = build(config, ALONE)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    ((loss, images),) = train_step(run, [next(iter(run.train_loader))])
    after = run.model.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    classifiers = [name for name in head_names(run.model) if name.endswith("weight")]
    assert classifiers and not any(torch.equal(before[name], after[name]) for name in classifiers)
    assert images == config.global_batch_size and bool(loss.isfinite().all()) and loss.sum() > 0
