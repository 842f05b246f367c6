"""Every picture that the project draws can be read: a title, which way is better, words within the edges, bars to be seen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from bench import chart
from fasttricks.ablation import plot as ablation
from fasttricks.ablation.cell_runs import CellRuns
from fasttricks.ablation.cells import extend, leave_one_out, training_of
from fasttricks.ablation.jobs import Job
from fasttricks.commands import cost
from fasttricks.config.recipes import RECIPES
from fasttricks.runs.curves import draw_curves, draw_overlay
from fasttricks.tasks.classification import CLASSIFICATION
from lib.tiny import REPOSITORY


def saved(draw: Callable[[Path], object]) -> Figure:
    """The figure that draw(path) saves."""
    with mock.patch.object(Figure, "savefig", autospec=True) as save:
        draw(Path("nowhere.png"))
    figure: Figure = save.call_args.args[0]
    return figure


def curves(*epochs: float, validated: bool = True) -> Figure:
    train = [{"epoch": e, "train_loss": 2 / (1 + e), "lr": 0.1} for e in epochs]
    known = [{"epoch": e, "val_loss": 1 / (1 + e), "top1": 99 - 50 / e, "top5": 99.9} for e in epochs if validated]
    return draw_curves([*train, *known], CLASSIFICATION.metrics_of(1000), title="resnet50d-tricks-20261122-231157")


def ablated(images: Callable[[int, int], int], seeds: int, root: str = "a-folder-with-a-long-name") -> Figure:
    """leave-one-out of cifar10 on 114 validation images; images(row, seed): how many are right."""
    config, cells = extend(RECIPES["cifar10"]()), []
    table = leave_one_out(config)
    for row, cell in enumerate(table.cells):
        results = {seed: {"top1": 100 * images(row, seed) / 114} for seed in range(seeds)}
        cells.append(CellRuns(cell, (Job(training_of(cell, config), 1, ""),), "", results))
    data = {"root": f"/x/{root}", "classes": 3, "train_images": 455, "val_images": 114}
    return saved(lambda path: ablation.plot(table, cells, config, data, path))


def costs() -> Figure:
    rows = {"resnet50a": (1.0, 1.0, 1.0), "resnet50d": (1.01, 1.14, 1.19), "resnet50d+resnet152d": (1.8, 2.0, 2.2)}
    blank = {"image_size": 1, "num_parameters": 1, "parameter_bytes": 1, "activation_bytes": 1, "peak_bytes": 1}
    made = [cost.Cost(name=n, multiply_adds=40 + 5 * i, seconds=s, **blank) for i, (n, s) in enumerate(rows.items())]
    return saved(lambda path: cost.plot(made, path))


def bench() -> Figure:
    result = json.loads((REPOSITORY / "bench" / "results" / "x86_64-cpu.json").read_text())
    return saved(lambda path: chart.draw(result, path))


PICTURES: dict[str, Callable[[], Figure]] = {
    "curves": lambda: curves(1, 2, 3, 4, 5),
    "curves of one step": lambda: curves(0.2, validated=False),
    "ablation of two seeds": lambda: ablated(lambda row, seed: 100 + seed - (row > 0), 2),
    "ablation of three seeds": lambda: ablated(lambda row, seed: 60 + 5 * seed * row % 50, 3),
    "cost": costs,
    "bench": bench,
}


class Picture(NamedTuple):
    figure: Figure
    words: list[tuple[str, Bbox]]
    """What is written, and where, in pixels."""


@pytest.fixture(scope="module", params=PICTURES)
def picture(request: pytest.FixtureRequest) -> Picture:
    figure = PICTURES[request.param]()
    FigureCanvasAgg(figure).draw()
    hidden = {label for axes in figure.axes for label in ticks_outside(axes)}
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]
    return Picture(figure, [(text.get_text(), text.get_window_extent()) for text in texts])


def ticks_outside(axes: Any) -> list[Text]:
    """Labels of ticks beyond an axis's ends, which matplotlib makes and does not draw."""
    x, y = sorted(axes.get_xlim()), sorted(axes.get_ylim())
    beyond = [label for label in axes.get_xticklabels(which="both") if not x[0] <= label.get_position()[0] <= x[1]]
    return beyond + [
        label for label in axes.get_yticklabels(which="both") if not y[0] <= label.get_position()[1] <= y[1]
    ]


def test_it_has_a_title_and_says_which_way_is_better(picture: Picture) -> None:
    figure = picture.figure
    assert figure.get_suptitle() or all(axes.get_title() for axes in figure.axes)
    assert any("better" in text for text, _ in picture.words)


def test_its_words_are_within_its_edges_and_on_no_others(picture: Picture) -> None:
    assert len(picture.words) > 10
    for text, box in picture.words:
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= picture.figure.bbox.x1 + 1 and box.y1 <= picture.figure.bbox.y1 + 1, text
    for (one, a), (other, b) in itertools.combinations(picture.words, 2):
        assert not a.padded(-1).overlaps(b.padded(-1)), (one, other)


def test_its_bars_and_points_can_be_seen(picture: Picture) -> None:
    seen = 0
    for axes in picture.figure.axes:
        inside = axes.get_window_extent().padded(4)
        for bar in (bar for container in axes.containers for bar in container if isinstance(bar, Rectangle)):
            drawn = Bbox.intersection(bar.get_window_extent(), inside)
            assert drawn is not None and drawn.width >= 5 and drawn.height >= 5
            seen += 1
        for line in (line for line in axes.get_lines() if line.get_marker() != "None"):
            points = line.get_transform().transform(line.get_xydata())
            assert all(inside.contains(x, y) for x, y in points), line
            seen += 1
    assert seen


@pytest.mark.parametrize(
    "name", [r"a$\x$b", "_a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a$b$c", r"a\$b$", "a_{b}^c"))]
)
def test_a_name_is_shown_letter_by_letter(name: str) -> None:
    """The name of a folder or a score is no mathematics, which a picture would show in other letters, or end with an error."""
    rows = [
        {"epoch": epoch, "train_loss": 1.0, "lr": 0.1, "val_loss": 1.0, "top1": 50.0, name: 50.0} for epoch in (1, 2)
    ]
    overlay = draw_overlay({name: ("top1", rows), "other": (name, rows)})
    pictures = {
        "curves": draw_curves(rows, CLASSIFICATION.metrics_of(2), title=name),
        "overlay": overlay,
        "ablation": ablated(lambda row, seed: 60 + row + seed, 2, name),
    }
    for kind, figure in pictures.items():
        FigureCanvasAgg(figure).draw()
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert not any(map(is_math_text, texts)), kind
        assert any(name in text.replace(r"\$", "$") for text in texts), kind
    labels = [text.get_text().replace(r"\$", "$") for text in overlay.legends[0].get_texts()]
    assert labels == [f"50.00 top1: {name}", f"50.00 {name}: other"]


def test_a_metric_is_drawn_where_the_validations_have_it() -> None:
    """A run of an earlier release that was resumed: its records name another metric from there on."""
    train = [{"epoch": e, "train_loss": 1.0, "lr": 0.1} for e in (1, 2, 3)]
    known = [{"epoch": e, "val_loss": 1.0, "top1": 50.0, "top5" if e < 2 else "top2": 90.0} for e in (1, 2, 3)]
    loss, _, scores = draw_curves([*train, *known], CLASSIFICATION.metrics_of(3), title="a").axes
    assert {line.get_label(): list(line.get_xdata()) for line in scores.get_lines()} == {
        "top-1, last 50.00 %": [1, 2, 3],
        "top-2, last 90.00 %": [2, 3],
    }
    assert [len(line.get_xdata()) for line in loss.get_lines()] == [3, 3] and not scores.texts
    old = draw_curves([*train, known[0]], CLASSIFICATION.metrics_of(3), title="a").axes[-1]
    assert [line.get_label() for line in old.get_lines()] == ["top-1, last 50.00 %"]


def test_two_seeds_that_lie_an_image_apart_do_not_fill_the_axis() -> None:
    (axes,) = ablated(lambda row, seed: 100 + seed - (row > 0), 2).axes
    drawn = [x for line in axes.get_lines() for x in line.get_xdata()]
    low, high = axes.get_xlim()
    assert max(drawn) - min(drawn) < 0.2 * (high - low)
    assert not axes.containers, "no interval of two seeds"
