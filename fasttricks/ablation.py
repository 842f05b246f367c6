"""What an ablation trains: the paper's tables 2 to 6, and designs over a recipe's tricks, as plain data.

A table is rows and columns of cells. A cell says which tricks are on (all others are off), which of the two batch sizes
it takes and, where it is one of the paper's, what the paper printed. `resolve` makes a TrainConfig of it, on top of a
recipe that has every trick on. fasttricks/ablate.py is the entry point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, Literal

from fasttricks.config import ConfigError, DistillConfig, ModelConfig, TrainConfig, get_at, replace_at, require
from fasttricks.model_names import variant_of
from fasttricks.tricks import TRICKS, apply_tricks, find_trick, is_on, nearest

Mark = Literal["V", "X", "M"]
MARKS: Mapping[Mark, str] = {
    "V": "read in the paper or its log",
    "X": "recalled, and confirmed by another printed number",
    "M": "as recalled, unverified",
}
EFFICIENT = ("linear_scaling", "warmup", "zero_gamma", "no_bias_decay", "low_precision")
MAX_FACTORS = 6
"""Factors of a full factorial design: 2^6 = 64 cells."""


@dataclass(frozen=True)
class Figure:
    """Accuracy that the paper printed, percent, each with how sure this project is of the number (MARKS)."""

    top1: float
    top5: float | None
    mark: Mark
    top5_mark: Mark

    def __str__(self) -> str:
        top5 = "-" if self.top5 is None else f"{self.top5:.2f} [{self.top5_mark}]"
        return f"{self.top1:.2f} [{self.mark}] / {top5}"


def _paper(top1: float, top5: float | None, mark: Mark, top5_mark: Mark | None = None) -> Figure:
    return Figure(top1, top5, mark, top5_mark or mark)


@dataclass(frozen=True)
class Cell:
    """One training: its place in the table, what is on in it, and the paper's figure for it."""

    row: str
    column: str
    tricks: tuple[str, ...]
    batch: Literal["small", "large"] = "large"
    network: str = ""
    """Another network than the recipe's, by name; empty: the recipe's ResNet."""
    edits: Mapping[str, Any] = field(default_factory=dict)
    """Config fields (dotted path) to a value, or to a function of the old value; after the tricks."""
    paper: Figure | None = None


@dataclass(frozen=True)
class Table:
    """Cells in the order of their rows. The first row of a column is its baseline."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    factors: tuple[str, ...] = ()
    """Of a factorial design: the tricks whose main effects are to be told."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(cell.column for cell in self.cells))

    def column(self, name: str) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.column == name)


@dataclass(frozen=True, kw_only=True)
class AblateConfig(TrainConfig):
    """A recipe whose tricks are switched, and how often each cell is trained. run_dir is the folder of them all."""

    seeds: int = 3
    """Runs of each cell, with the seeds seed, seed + 1, ...; 1 or more. One seed tells no difference from chance."""
    more_seeds: int = 0
    """Seeds, 0 (no more) or more than `seeds`, of cells that so many would decide if their spread stayed as it is."""
    small_batch: int = 0
    """Global batch of the cells for a small batch (tables 2 to 4); 0: a quarter of global_batch_size, as in the paper."""
    mixup_epochs: int = 0
    """Epochs of the cells with mixup, which the paper trains for longer (200, not 120); 0: as all others."""
    factors: tuple[str, ...] = ()
    """Tricks that add-one, leave-one-out and factorial go through; empty: those that the recipe has on."""
    other_networks: bool = False
    """Tables 2, 3 and 6: train Inception-V3 (at 299 pixels) and MobileNet too; off: their cells stay blank."""
    ranks: int = 1
    """Processes of a run, one a GPU; above 1 each run is started by torchrun. 1 or more."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of finished runs; off: a finished run keeps its log and result."""
    report: bool = False
    """Train nothing: print the tables of what is finished so far."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seeds >= 1, "seeds", self.seeds, "must be 1 or more; 3 or more to tell a difference from chance")
        rule = f"must be 0, or more than seeds ({self.seeds})"
        require(self.more_seeds == 0 or self.more_seeds > self.seeds, "more_seeds", self.more_seeds, rule)
        require(self.small_batch >= 0, "small_batch", self.small_batch, "must be 0 (a quarter of the batch) or more")
        require(self.mixup_epochs >= 0, "mixup_epochs", self.mixup_epochs, "must be 0 (as all others) or more")
        require(self.ranks >= 1, "ranks", self.ranks, "must be 1 or more")
        rule = "do the runs of an ablation; leave it off: a second call of the same command goes on by itself"
        require(not self.resume, "resume", self.resume, rule)
        for name in self.factors:
            find_trick(name)


# What the paper's tables need of a recipe beside its fields; a recipe that is not named here takes the defaults.
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


def resolve(cell: Cell, config: AblateConfig) -> TrainConfig:
    """The training of `cell`: config with its tricks on and all others off, its batch and its edits.

    A trick that is on keeps the value of the recipe. Raises ConfigError where a trick does not fit the model.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    run = TrainConfig(**values)
    if cell.network:
        run = dataclasses.replace(run, model=ModelConfig(name=cell.network, num_classes=run.model.num_classes))
    names = [name for name in TRICKS if fits(run, name)]
    run, _ = apply_tricks(
        run, off=[n for n in names if n not in cell.tricks], on=[n for n in names if n in cell.tricks]
    )
    small = config.small_batch or max(1, config.global_batch_size // 4)
    run = dataclasses.replace(run, global_batch_size=small if cell.batch == "small" else config.global_batch_size)
    if "mixup" in cell.tricks and config.mixup_epochs:
        run = dataclasses.replace(run, epochs=config.mixup_epochs)
    for path, value in cell.edits.items():
        run = replace_at(run, path, value(get_at(run, path)) if callable(value) else value)
    return run


def fits(config: TrainConfig, trick: str) -> bool:
    """Whether the trick fits the model: resnet_d needs a network with variants, zero_gamma one with residual blocks."""
    try:
        apply_tricks(config, on=[trick])
    except ConfigError:
        return False
    return True


# --------------------------------------------------------------------------------------------- the paper's tables
def _variant(letter: str) -> Mapping[str, Any]:
    return {"model.name": partial(variant_of, letter=letter)}


_NETWORKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ResNet-50": ("", _variant("a")),
    "Inception-V3": ("inception_v3", {"data.val_resize": 342, "data.image_size": 299}),
    "MobileNet": ("mobilenet_v1", {}),
}
"""The paper's networks: name here, and what else they change."""


def table2() -> Table:
    """Table 2: the baseline (section 2) of three networks."""
    figures = {
        "ResNet-50": _paper(75.87, 92.70, "M"),
        "Inception-V3": _paper(77.32, 93.43, "M"),
        "MobileNet": _paper(69.03, 88.71, "M"),
    }
    cells = [Cell(n, "baseline", (), "small", *network, figures[n]) for n, network in _NETWORKS.items()]
    return Table("table2", "the baseline of three networks", tuple(cells))


def table3() -> Table:
    """Table 3: efficient training (section 3) beside the baseline."""
    figures = {
        "ResNet-50": (_paper(75.87, 92.70, "M"), _paper(76.21, 92.97, "M")),
        "Inception-V3": (_paper(77.32, 93.43, "M"), _paper(77.50, 93.60, "M")),
        "MobileNet": (_paper(69.03, 88.71, "M"), _paper(71.90, 90.47, "M")),
    }
    cells = []
    for name, network in _NETWORKS.items():
        baseline, efficient = figures[name]
        cells.append(Cell("baseline: small batch, fp32", name, (), "small", *network, baseline))
        cells.append(Cell("efficient: large batch, its tricks", name, EFFICIENT, "large", *network, efficient))
    return Table("table3", "efficient training beside the baseline", tuple(cells))


def table4() -> Table:
    """Table 4: the tricks of efficient training, one on top of another, for a small and a large batch."""
    names = ("linear scaling", "+ warm-up", "+ zero gamma", "+ no bias decay", "+ FP16")
    figures: dict[Literal["small", "large"], tuple[tuple[float, float], ...]] = {
        "small": ((75.87, 92.70), (76.03, 92.81), (76.19, 93.03), (76.16, 92.97), (76.15, 93.09)),
        "large": ((75.17, 92.54), (75.93, 92.84), (76.37, 92.96), (76.03, 92.86), (76.21, 92.97)),
    }
    columns = {"small": "small batch (the paper: 256)", "large": "large batch (the paper: 1024)"}
    cells = [
        Cell(names[i], columns[batch], EFFICIENT[: i + 1], batch, "", _variant("a"), _paper(*figures[batch][i], "M"))
        for batch in figures
        for i in range(len(names))
    ]
    return Table("table4", "efficient training, one trick on top of another", tuple(cells))


def table5() -> Table:
    """Table 5: the model tweaks A to D under efficient training."""
    figures = {
        "A": _paper(76.21, 92.97, "M"),
        "B": _paper(76.66, 93.28, "M"),
        "C": _paper(76.87, 93.48, "M"),
        "D": _paper(77.16, 93.52, "X", "M"),
    }
    cells = [
        Cell(f"ResNet-{letter}", "efficient training", EFFICIENT, edits=_variant(letter.lower()), paper=figure)
        for letter, figure in figures.items()
    ]
    return Table("table5", "model tweaks", tuple(cells))


def table6() -> Table:
    """Table 6: the refinements, one on top of another, on three networks. Distillation and mixup each on the third row."""
    rows: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("efficient", ()),
        ("+ cosine", ("cosine",)),
        ("+ label smoothing", ("cosine", "label_smoothing")),
        ("+ distillation, no mixup", ("cosine", "label_smoothing", "distillation")),
        ("+ mixup, no distillation", ("cosine", "label_smoothing", "mixup")),
        ("+ distillation and mixup", ("cosine", "label_smoothing", "distillation", "mixup")),
    )
    networks = {**_NETWORKS, "ResNet-50": ("", _variant("d"))}
    columns = {"ResNet-50": "ResNet-D (the paper: ResNet-50-D)"}
    figures = (
        (_paper(77.16, 93.52, "X", "M"), _paper(77.50, 93.60, "M"), _paper(71.90, 90.53, "M")),
        (_paper(77.91, 93.81, "M"), _paper(78.19, 94.06, "M"), _paper(72.83, 91.00, "M")),
        (_paper(78.31, 94.09, "M"), _paper(78.40, 94.13, "X"), _paper(72.93, 91.14, "X")),
        (_paper(78.67, 94.36, "M"), _paper(78.26, 94.01, "M"), _paper(71.97, 90.89, "M")),
        (_paper(79.15, 94.58, "X"), _paper(78.77, 94.39, "X"), _paper(73.28, 91.30, "X")),
        (_paper(79.29, 94.63, "V"), _paper(78.34, 94.16, "M"), _paper(72.51, 91.02, "M")),
    )
    cells = [
        Cell(name, columns.get(key, key), (*EFFICIENT, "resnet_d", *tricks), "large", *network, figures[row][column])
        for column, (key, network) in enumerate(networks.items())
        for row, (name, tricks) in enumerate(rows)
    ]
    return Table("table6", "refinements, one on top of another", tuple(cells))


PAPER_TABLES: dict[str, Callable[[], Table]] = {f.__name__: f for f in (table2, table3, table4, table5, table6)}


# -------------------------------------------------------------------------------------- designs over a recipe's tricks
def add_one(config: AblateConfig) -> Table:
    """No trick, then each alone."""
    rows = [Cell("no trick", "top-1", ())]
    rows += [Cell(f"{name} alone", "top-1", (name,)) for name in factors_of(config)]
    return Table("add-one", f"each trick of {config.recipe} alone", tuple(_with_others_off(config, rows)))


def leave_one_out(config: AblateConfig) -> Table:
    """The recipe as it is, then without each of its tricks."""
    on = tuple(name for name in TRICKS if is_on(config, name))
    rows = [Cell("all of them", "top-1", on)]
    rows += [
        Cell(f"without {name}", "top-1", tuple(n for n in on if n != name)) for name in factors_of(config) if name in on
    ]
    return Table("leave-one-out", f"{config.recipe} without one of its tricks", tuple(rows))


def factorial(config: AblateConfig) -> Table:
    """Every subset of the tricks. Raises ConfigError for more than MAX_FACTORS of them."""
    names = factors_of(config)
    rule = f"are {len(names)} tricks and 2^{len(names)} cells; must be at most {MAX_FACTORS}: name them with --factors"
    require(len(names) <= MAX_FACTORS, "factors", names, rule)
    fixed = tuple(name for name in TRICKS if is_on(config, name) and name not in names)
    subsets = [subset for size in range(len(names) + 1) for subset in combinations(names, size)]
    cells = [Cell(" + ".join(subset) or "none of them", "top-1", (*fixed, *subset)) for subset in subsets]
    return Table("factorial", f"every subset of {', '.join(names)} in {config.recipe}", tuple(cells), factors=names)


def factors_of(config: AblateConfig) -> tuple[str, ...]:
    """The tricks that a design goes through: those asked for, or those that the recipe has on. ConfigError for none."""
    names = config.factors or tuple(name for name in TRICKS if is_on(config, name))
    require(bool(names), "factors", names, f"recipe {config.recipe} has no trick on; name some with --factors")
    unfit = [name for name in names if not fits(config, name)]
    require(not unfit, "factors", unfit, f"cannot be switched on {config.model.name}")
    return names


def _with_others_off(config: AblateConfig, cells: list[Cell]) -> list[Cell]:
    """add-one keeps the tricks that are no factor as the recipe has them."""
    fixed = tuple(name for name in TRICKS if is_on(config, name) and name not in factors_of(config))
    return [dataclasses.replace(cell, tricks=(*fixed, *cell.tricks)) for cell in cells]


DESIGNS: dict[str, Callable[[AblateConfig], Table]] = {
    "add-one": add_one,
    "leave-one-out": leave_one_out,
    "factorial": factorial,
}


def find_tables(names: Iterable[str], config: AblateConfig) -> list[Table]:
    """The tables called `names`, for `config`. Raises ConfigError with the nearest right name for an unknown one."""
    return [PAPER_TABLES[name]() if name in PAPER_TABLES else DESIGNS[name](config) for name in map(check_name, names)]


def check_name(name: str) -> str:
    """`name` where it is a table. Raises ConfigError with the nearest right name."""
    known = (*PAPER_TABLES, *DESIGNS)
    if name not in known:
        raise ConfigError(f"table = {name!r}: {nearest(name, known)}; the tables are {', '.join(known)}")
    return name
