"""The paper's tables 2 to 6 as plain data: which tricks are on in each cell, and the paper's figures for it.

A table is rows and columns of cells. A cell says which tricks are on (all others are off) and which of the two batch
sizes it takes; cells.py makes trainings of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from fasttricks.config import model_info, variant_of

Mark = Literal["V", "X", "M"]
MARKS: Mapping[Mark, str] = {
    "V": "read in the paper, its authors' logs or their model zoo",
    "X": "recalled, and confirmed by another printed number",
    "M": "as recalled, unverified",
}
EFFICIENT = ("linear_scaling", "warmup", "zero_gamma", "no_bias_decay", "low_precision")


@dataclass(frozen=True)
class Figure:
    """The paper's figures of a training, each value with how sure this project is of the number (MARKS)."""

    values: Mapping[str, float]
    """Metric of the task, by name -> value, in the paper's order: top-1 and top-5 accuracy in percent."""
    marks: Mapping[str, Mark]
    """Metric -> how sure the value is."""
    time: str = ""
    """Minutes of an epoch on 8 V100, with its mark, where the paper printed them."""

    def __str__(self) -> str:
        values = " / ".join(f"{value:.2f} [{self.marks[name]}]" for name, value in self.values.items())
        return f"{values}, {self.time}" if self.time else values


def _paper(top1: float, top5: float, mark: Mark, top5_mark: Mark | None = None, time: str = "") -> Figure:
    return Figure({"top1": top1, "top5": top5}, {"top1": mark, "top5": top5_mark or mark}, time)


@dataclass(frozen=True)
class Cell:
    """One training: its place in the table, its tricks, and the paper's figure for it."""

    row: str
    column: str
    tricks: tuple[str, ...]
    batch: Literal["small", "large"] = "large"
    network: str = ""
    """Another network than the recipe's, by name; empty: the recipe's ResNet."""
    edits: Mapping[str, Any] = field(default_factory=dict)
    """Config fields (dotted path) to a value, or to a function of the old value; after the tricks."""
    paper: Figure | None = None
    as_it_is: bool = False
    """Whether the recipe's own tricks stay as they are, and `tricks` and `batch` have no effect."""


@dataclass(frozen=True)
class Table:
    """Cells in the order of their rows. The first row of a column is its baseline."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    factors: tuple[str, ...] = ()
    """In a factorial design: the tricks whose main effects are shown."""


def _variant(letter: str) -> Mapping[str, Any]:
    return {"model.name": partial(variant_of, letter=letter)}


def _own_images(network: str) -> Mapping[str, int]:
    info = model_info(network)
    return {"data.val_resize": info.val_resize, "data.image_size": info.image_size}


_NETWORKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ResNet-50": ("", _variant("a")),
    "Inception-V3": ("inception_v3", _own_images("inception_v3")),
    "MobileNet": ("mobilenet_v1", {}),
}
"""The paper's networks: name here, and their other changes."""


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
        "ResNet-50": (
            _paper(75.87, 92.70, "M", time="13.3 min [V]"),
            _paper(76.21, 92.97, "M", time="4.4 min [V]"),
        ),
        "Inception-V3": (
            _paper(77.32, 93.43, "M", time="19.8 min [M]"),
            _paper(77.50, 93.60, "M", time="8 min [X]"),
        ),
        "MobileNet": (
            _paper(69.03, 88.71, "M", time="6.2 min [M]"),
            _paper(71.90, 90.47, "M", time="3.7 min [X]"),
        ),
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
        "D": _paper(77.16, 93.52, "V", "M"),
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
        (_paper(77.16, 93.52, "V", "M"), _paper(77.50, 93.60, "M"), _paper(71.90, 90.53, "M")),
        (_paper(77.91, 93.81, "M"), _paper(78.19, 94.06, "M"), _paper(72.83, 91.00, "M")),
        (_paper(78.31, 94.09, "M"), _paper(78.40, 94.13, "M", "X"), _paper(72.93, 91.14, "V")),
        (_paper(78.67, 94.36, "M"), _paper(78.26, 94.01, "M"), _paper(71.97, 90.89, "M")),
        (_paper(79.15, 94.58, "V"), _paper(78.77, 94.39, "V"), _paper(73.28, 91.30, "V")),
        (_paper(79.29, 94.63, "V"), _paper(78.34, 94.16, "M"), _paper(72.51, 91.02, "M")),
    )
    cells = [
        Cell(name, columns.get(key, key), (*EFFICIENT, "resnet_d", *tricks), "large", *network, figures[row][column])
        for column, (key, network) in enumerate(networks.items())
        for row, (name, tricks) in enumerate(rows)
    ]
    return Table("table6", "refinements, one on top of another", tuple(cells))


def _bases(metrics: tuple[str, ...], *figures: tuple[float, ...]) -> Mapping[str, Figure]:
    """Row of table 6 -> the paper's figures of a task on that base network, as recalled."""
    rows = [cell.row for cell in table6().cells[: len(figures)]]
    marks: Mapping[str, Mark] = dict.fromkeys(metrics, "M")
    return {row: Figure(dict(zip(metrics, one, strict=True)), marks) for row, one in zip(rows, figures, strict=True)}


PAPERS_BASES: Mapping[str, Mapping[str, Figure]] = {
    "segmentation": _bases(
        ("miou", "pixel_accuracy"),
        (38.88, 78.88), (39.33, 79.25), (38.75, 78.64), (38.90, 78.97), (37.99, 78.47), (38.40, 78.72),
    ),
    "detection": _bases(("map",), (78.30,), (79.23,), (80.71,), (80.96,), (81.10,), (81.33,)),
}  # fmt: skip
"""Task -> row of table 6, for ResNet-50-D -> the paper's figures: its tables 9 (ADE20K) and 8 (VOC 2007, trained on 07+12)."""
PAPERS_DATA: Mapping[str, str] = {"classification": "ImageNet", "segmentation": "ADE20K", "detection": "Pascal VOC"}
"""Task -> the data of the paper's figures."""
PAPER_TABLES: dict[str, Callable[[], Table]] = {f.__name__: f for f in (table2, table3, table4, table5, table6)}
