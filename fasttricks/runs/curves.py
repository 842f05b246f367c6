"""The picture of a run: loss, learning rate and the task's metrics by epoch, from the records of metrics.jsonl. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasttricks.runs.epochs import PART
from fasttricks.runs.metric import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 40
"""Points below which each is marked: one alone draws no line."""


def literal(text: str) -> str:
    """`text` for matplotlib to show letter by letter: between dollars it reads mathematics, and raises where that is wrong."""
    return text.replace("$", r"\$")


def draw_overlay(runs: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> Figure:
    """The headline metric and the training loss of several runs by epoch, in two panels.

    runs: name -> (name of its headline metric, a row an epoch as metrics.csv has them).
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.5 + 0.22 * -(-len(runs) // 2)), layout="constrained")
    score_axes, loss_axes = figure.subplots(1, 2)
    for number, (name, (headline, rows)) in enumerate(runs.items()):
        # ten colours, then the same ones dashed and dotted
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3], "linewidth": 1.4}
        marks = {"marker": "o", "markersize": 3} if len(rows) < FEW else {}
        for axes, key in ((score_axes, headline), (loss_axes, "train_loss")):
            points = [(row["epoch"], row[key]) for row in rows if row.get(key) is not None]
            # the number first: a label that begins with an underscore is left out of the legend
            label = literal(f"{points[-1][1]:.2f} {headline}: {name}") if points and key == headline else None
            axes.plot(*zip(*points, strict=True), label=label, **style, **marks) if points else None
    headlines = literal(" or ".join(dict.fromkeys(headline for headline, _ in runs.values())))
    score_axes.set(title=f"{headlines} on validation images (better \N{UPWARDS ARROW})", ylabel=headlines)
    loss_axes.set(title="Training loss (better \N{DOWNWARDS ARROW})", ylabel="mean of an epoch (nats)")
    for axes in (score_axes, loss_axes):
        axes.grid(alpha=0.3)
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower left", fontsize=9, ncols=2)
    return figure


def draw_curves(records: Sequence[Mapping[str, Any]], metrics: Sequence[Metric], *, title: str) -> Figure:
    """A panel for the loss, one for the learning rate, and one for each panel of `metrics`.

    records: those of metrics.jsonl, with a training step at least. A metric has a point for each validation that has it: those
    of an earlier release may have others.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [record for record in records if {"train_loss", "lr"} <= record.keys()]
    scores = {"val_loss", *(metric.name for metric in metrics)}
    validation = [record for record in records if scores & record.keys()]
    panels = list(dict.fromkeys(metric.panel for metric in metrics))
    epochs, val_epochs = [r["epoch"] for r in train], [r["epoch"] for r in validation]
    figure = Figure(figsize=(4 * (2 + len(panels)), 3.6), layout="constrained")
    loss_axes, lr_axes, *metric_axes = figure.subplots(1, 2 + len(panels))
    line = {"linewidth": 1.0, **({"marker": "o", "markersize": 3} if len(train) < FEW else {})}
    dots = {"marker": "o", "markersize": 3}
    loss_axes.plot(epochs, [r["train_loss"] for r in train], label="training, augmented images", **line)
    lr_axes.plot(epochs, [r["lr"] for r in train], color="tab:green", **line)
    parts = dict.fromkeys(name for record in train for name in record if name.startswith(PART))
    for name in parts:
        points = [(r["epoch"], r[name]) for r in train if name in r]
        loss_axes.plot(*zip(*points, strict=True), label=name.removeprefix(PART), linewidth=0.7)
    if losses := [(r["epoch"], r["val_loss"]) for r in validation if "val_loss" in r]:
        loss_axes.plot(*zip(*losses, strict=True), label="validation", **dots)
    for metric in metrics:
        axes = metric_axes[panels.index(metric.panel)]
        if points := [(r["epoch"], r[metric.name]) for r in validation if metric.name in r]:
            last = f"{metric.label}, last {points[-1][1]:.2f} {metric.unit}"
            axes.plot(*zip(*points, strict=True), label=last, **dots)
            axes.legend(fontsize=9)
    for axes in metric_axes:
        if not axes.lines:
            axes.text(0.5, 0.5, "no validation yet", ha="center", va="center", transform=axes.transAxes)
    loss_axes.legend(fontsize=9)
    loss_axes.set(
        title="Loss (better \N{DOWNWARDS ARROW})", ylabel="sum and parts" if parts else "mean cross-entropy (nats)"
    )
    lr_axes.set(title="Learning rate", ylabel="learning rate of a step", ylim=(0, None))
    for axes, (head, ylabel) in zip(metric_axes, panels, strict=True):
        axes.set(title=f"{head} (better \N{UPWARDS ARROW})", ylabel=ylabel)
    end = max([*epochs, *val_epochs])
    for axes in (loss_axes, lr_axes, *metric_axes):
        axes.grid(alpha=0.3)
        axes.set(xlabel="epoch", xlim=(0, end * 1.02))
        if end >= 3:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(literal(title))
    return figure
