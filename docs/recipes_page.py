"""Makes docs/recipes.md from the recipes and their expected accuracy: `python docs/recipes_page.py`, or make recipes."""

from __future__ import annotations

from pathlib import Path

from fasttricks.config import TrainConfig
from fasttricks.config.expected import EXPECTED, SOURCES
from fasttricks.config.recipes import RECIPES, summary
from fasttricks.config.tricks import TRICKS, is_on

PAGE = Path(__file__).with_name("recipes.md")
HEAD = """# Recipes

    python -m fasttricks.train RECIPE --data.root DIR

## A recipe as a file

    fasttricks show cifar10 --epochs 40 > mine.yaml      # every field, with its default where it differs
    fasttricks train --config mine.yaml --data.root DIR

`--config FILE` takes fields from a .yaml, .yml or .json, by nested or dotted names: `epochs: 40`, `loss: {smoothing: 0.1}`,
`loss.smoothing: 0.1`. The recipe comes first, then FILE, then the command line, which wins. FILE may have `recipe: demo`; one on
the command line wins. `train`, `plan`, `ablate` and `show` take it.

`--config runs/RUN`, or that run's `config.json`, repeats the run: all of its fields but `run_dir` and `resume`.

Scalars are those of YAML 1.2: `on`, `off`, `yes` and `no` are words, `1e-4` is a number. A name that comes twice, an alias, a
tag and an unknown field are errors, which name the file, the field and the nearest right name.

## This page

`make recipes` writes this page from the recipes. Their ImageNet part is checked field by field against the paper. It was not run
here, because no GPU was available.
"""
SETTINGS = ["recipe", "network", "pixels", "epochs", "global batch", "peak lr"]
ACCURACY = ["recipe", "top-1, %", "top-5, %", "source", "hardware", "time", "note"]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _settings(name: str) -> list[str]:
    config = RECIPES[name]()
    numbers = (config.epochs, config.global_batch_size)
    return [
        f"`{name}`",
        config.model.name,
        _pixels(config),
        *(f"{number:,}" for number in numbers),
        f"{config.peak_lr:g}",
    ]


def _pixels(config: TrainConfig) -> str:
    """The side of a training image; a detection has whole images."""
    sizes = config.detect
    if config.task == "detection":
        return f"short side {sizes.base_size:,}, long side {sizes.max_size:,} at most"
    return f"{config.data.image_size:,}"


def _accuracy(name: str) -> list[str]:
    expected = EXPECTED[name]
    figures = ["" if value is None else f"{value:.2f}" for value in (expected.top1, expected.top5)]
    source = SOURCES[expected.source] if any(figures) else ""
    return [f"`{name}`", *figures, source, expected.hardware, expected.time, expected.note]


def _tricks(name: str) -> list[str]:
    return [f"`{name}`", *("x" if is_on(RECIPES[name](), trick) else "" for trick in TRICKS)]


def page() -> str:
    """The whole of docs/recipes.md."""
    blocks = [
        ["## Settings", "", *_table(SETTINGS, [_settings(name) for name in RECIPES])],
        ["## Expected accuracy", "", *_table(ACCURACY, [_accuracy(name) for name in RECIPES])],
        ["## Tricks", "", *_table(["recipe", *TRICKS], [_tricks(name) for name in RECIPES])],
        ["## Summaries", "", *(f"- `{name}`: {summary(name)}" for name in RECIPES)],
    ]
    return "\n".join([HEAD, *("\n".join([*block, ""]) for block in blocks)])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
