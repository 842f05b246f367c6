"""The trainings of an ablation: cells of the paper's tables, or of a design over a recipe's tricks, as TrainConfigs.

`training_of` makes the training of a cell on top of a recipe that has every trick on. fasttricks/ablate.py is the entry point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Annotated, Any, Literal

from fasttricks.ablation.paper import Cell, Table
from fasttricks.config import (
    DistillConfig,
    ModelConfig,
    Range,
    TrainConfig,
    TricksConfig,
    get_at,
    replace_at,
    require,
)
from fasttricks.config.tricks import TRICKS, applies, apply_tricks, find_trick, is_on

MAX_FACTORS = 6
"""Factors of a full factorial design: 2^6 = 64 cells."""


@dataclass(frozen=True, kw_only=True)
class AblateConfig(TrainConfig):
    """A recipe whose tricks are switched, and how often each cell is trained. run_dir is the folder of them all."""

    seeds: Annotated[int, Range(1, 1000, note="3 or more to tell a difference from chance")] = 3
    """Runs of each cell, with the seeds seed, seed + 1, ... One seed tells no difference from chance."""
    more_seeds: int = 0
    """Seeds, 0 (no more) or more than `seeds`, of cells that so many would decide if their spread stayed as it is."""
    small_batch: Annotated[int, Range(0, zero="a quarter of the batch")] = 0
    """Global batch of the cells for a small batch (tables 2 to 4); 0: a quarter of global_batch_size, as in the paper."""
    mixup_epochs: Annotated[int, Range(0, zero="as all others")] = 0
    """Epochs of the cells with mixup, which the paper trains for longer (200, not 120)."""
    factors: tuple[str, ...] = ()
    """Tricks that add-one, leave-one-out and factorial go through; empty: those that the recipe has on."""
    bases: tuple[str, ...] = ()
    """transfer-*: the base networks, a row each: random; NAME=RUN, weights as --init takes them, with {seed} for the seed where
    each has a run of its own; or the folder of an ablation, for all of its trainings."""
    split: Literal["val", "test"] = "val"
    """transfer-*: the images that the table compares on: those of validation, or of the test split, after the last epoch."""
    other_networks: bool = False
    """Tables 2, 3 and 6: train Inception-V3 (at 299 pixels) and MobileNet too; off: their cells stay blank."""
    ranks: Annotated[int, Range(1)] = 1
    """Processes of a run, one a GPU; above 1 each run is started by torchrun."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs; off: a finished run keeps its log and result."""
    report: bool = False
    """Train nothing: print the tables of the runs finished so far."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"must be 0, or more than seeds ({self.seeds})"
        require(self.more_seeds == 0 or self.more_seeds > self.seeds, "more_seeds", self.more_seeds, rule)
        rule = "do the runs of an ablation; leave it off: a second call of the same command continues by itself"
        require(not self.resume, "resume", self.resume, rule)
        for name in self.factors:
            find_trick(name)


# Settings of a recipe for the paper's tables, beside its fields; a recipe that is not named here takes the defaults.
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "resnet50d-tricks": {"epochs": 120, "mixup_epochs": 200, "small_batch": 256, "other_networks": True},
    "cifar10-ablate": {"small_batch": 64, "distill": DistillConfig(teacher="runs/cifar10-teacher")},
}
PAPERS_RECIPE = "resnet50d-tricks"
"""The recipe that the paper's tables take where none is given: ImageNet at the paper's scale."""


def extend(recipe: TrainConfig) -> AblateConfig:
    """`recipe` as an ablation trains it, with the fields of an ablation at their defaults."""
    values = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}
    settings = {"run_dir": f"runs/ablate-{recipe.recipe}", **_SETTINGS.get(recipe.recipe, {})}
    return AblateConfig(**values | settings)


def training_of(cell: Cell, config: AblateConfig) -> TrainConfig:
    """The training of `cell`: config with its tricks on and all others off, its batch and its edits; its tricks lists empty.

    A trick that is on keeps the value of the recipe; one that does not apply to the network is left out. Raises
    DoesNotApplyError where an edit of the cell does not apply, and ConfigError where a value breaks a rule of the config.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    run = TrainConfig(**values | {"tricks": TricksConfig()})
    if cell.network:
        run = dataclasses.replace(run, model=ModelConfig(name=cell.network, num_classes=run.model.num_classes))
    if not cell.as_it_is:
        run = _with_tricks(run, cell, config)
    for path, value in cell.edits.items():
        run = replace_at(run, path, value(get_at(run, path)) if callable(value) else value)
    return run


def _with_tricks(run: TrainConfig, cell: Cell, config: AblateConfig) -> TrainConfig:
    on = [name for name in TRICKS if name in cell.tricks and applies(run, name)]
    run = apply_tricks(run, off=[name for name in TRICKS if name not in cell.tricks], on=on)
    small = config.small_batch or max(1, config.global_batch_size // 4)
    run = dataclasses.replace(run, global_batch_size=small if cell.batch == "small" else config.global_batch_size)
    if "mixup" in cell.tricks and config.mixup_epochs:
        run = dataclasses.replace(run, epochs=config.mixup_epochs)
    return run


# -------------------------------------------------------------------------------------- designs over a recipe's tricks
def add_one(config: AblateConfig) -> Table:
    """No trick, then each trick alone. Tricks that are not factors stay as the recipe has them."""
    names, fixed = factors_of(config), _fixed(config)
    rows = [Cell("none of them", config.recipe, fixed)]
    rows += [Cell(f"{name} alone", config.recipe, (*fixed, name)) for name in names]
    return Table("add-one", f"each trick of {config.recipe} alone", tuple(rows))


def leave_one_out(config: AblateConfig) -> Table:
    """The recipe unchanged, then without each of its tricks."""
    on = tuple(name for name in TRICKS if is_on(config, name))
    off = [name for name in config.factors if name not in on]
    require(not off, "factors", off, f"off in recipe {config.recipe}: nothing to leave out; name tricks that it has on")
    rows = [Cell("all of them", config.recipe, on)]
    rows += [Cell(f"without {n}", config.recipe, tuple(m for m in on if m != n)) for n in factors_of(config)]
    return Table("leave-one-out", f"{config.recipe} without one of its tricks", tuple(rows))


def factorial(config: AblateConfig) -> Table:
    """Every subset of the tricks.

    Raises ConfigError for more than MAX_FACTORS of them.
    """
    names = factors_of(config)
    rule = f"are {len(names)} tricks and 2^{len(names)} cells; must be at most {MAX_FACTORS}: name them with --factors"
    require(len(names) <= MAX_FACTORS, "factors", names, rule)
    fixed = _fixed(config)
    subsets = [subset for size in range(len(names) + 1) for subset in combinations(names, size)]
    cells = [Cell(" + ".join(subset) or "none of them", config.recipe, (*fixed, *subset)) for subset in subsets]
    return Table("factorial", f"every subset of {', '.join(names)} in {config.recipe}", tuple(cells), factors=names)


def factors_of(config: AblateConfig) -> tuple[str, ...]:
    """The tricks that a design goes through: those asked for, or those that the recipe has on. ConfigError for none."""
    names = config.factors or tuple(name for name in TRICKS if is_on(config, name))
    require(bool(names), "factors", names, f"recipe {config.recipe} has no trick on; name some with --factors")
    unfit = [name for name in names if not applies(config, name)]
    require(not unfit, "factors", unfit, f"does not apply to {config.model.name}; leave it out")
    return names


def _fixed(config: AblateConfig) -> tuple[str, ...]:
    """The tricks that the recipe has on and that are no factor."""
    return tuple(name for name in TRICKS if is_on(config, name) and name not in factors_of(config))


DESIGNS: dict[str, Callable[[AblateConfig], Table]] = {
    "add-one": add_one,
    "leave-one-out": leave_one_out,
    "factorial": factorial,
}
