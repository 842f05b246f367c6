"""What every recipe must do, whatever it is. A new recipe is tested here by being registered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import ALONE, SHRINK, arguments

from fasttricks.build import build
from fasttricks.cli import parse_recipe
from fasttricks.recipes import RECIPES
from fasttricks.trainer import train_step


@pytest.mark.parametrize("name", RECIPES)
def test_takes_a_step(name: str, tiny_data: Path, tmp_path: Path) -> None:
    """Shrunk by what the command line offers, with its own network, loss, schedule, precision and augmentation."""
    recipe = RECIPES[name]()
    config = parse_recipe(arguments(tiny_data, tmp_path / "run", recipe=name, shrink=SHRINK), prog="test")
    assert (config.model.name, config.loss, config.optim) == (recipe.model.name, recipe.loss, recipe.optim)
    assert (config.data.color, config.data.area, config.ema_decay) == (
        recipe.data.color,
        recipe.data.area,
        recipe.ema_decay,
    )
    run = build(config, ALONE)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    train_step(run, [next(iter(run.train_loader))])
    run.log.flush(run.step, run.lr_at(0))
    run.log.close()
    after = run.model.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    assert (run.folder / "metrics.jsonl").read_text().count("train_loss") == 1
