"""The picture of a run: loss, learning rate and the task's metrics by epoch, from the records of metrics.jsonl. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasttricks.runs.metric import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 40
"""Points below which each is marked: one alone draws no line."""


def draw_curves(records: Sequence[Mapping[str, Any]], metrics: Sequence[Metric], *, title: str) -> Figure:
    """A panel for the loss, one for the learning rate, and one for each panel of `metrics`.

    records: those of metrics.jsonl, with a training step at least. Only validations that have every metric count.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    train = [record for record in records if {"train_loss", "lr"} <= record.keys()]
    validation = [record for record in records if {"val_loss", *(m.name for m in metrics)} <= record.keys()]
    panels = list(dict.fromkeys(metric.panel for metric in metrics))
    epochs, val_epochs = [r["epoch"] for r in train], [r["epoch"] for r in validation]
    figure = Figure(figsize=(4 * (2 + len(panels)), 3.6), layout="constrained")
    loss_axes, lr_axes, *metric_axes = figure.subplots(1, 2 + len(panels))
    line = {"linewidth": 1.0, **({"marker": "o", "markersize": 3} if len(train) < FEW else {})}
    dots = {"marker": "o", "markersize": 3}
    loss_axes.plot(epochs, [r["train_loss"] for r in train], label="training, augmented images", **line)
    lr_axes.plot(epochs, [r["lr"] for r in train], color="tab:green", **line)
    if validation:
        loss_axes.plot(val_epochs, [r["val_loss"] for r in validation], label="validation", **dots)
        for metric in metrics:
            axes = metric_axes[panels.index(metric.panel)]
            last = f"{metric.label}, last {validation[-1][metric.name]:.2f} {metric.unit}"
            axes.plot(val_epochs, [r[metric.name] for r in validation], label=last, **dots)
        for axes in metric_axes:
            axes.legend(fontsize=9)
    else:
        for axes in metric_axes:
            axes.text(0.5, 0.5, "no validation yet", ha="center", va="center", transform=axes.transAxes)
    loss_axes.legend(fontsize=9)
    loss_axes.set(title="Loss (better \N{DOWNWARDS ARROW})", ylabel="mean cross-entropy (nats)")
    lr_axes.set(title="Learning rate", ylabel="learning rate of a step", ylim=(0, None))
    for axes, (head, ylabel) in zip(metric_axes, panels, strict=True):
        axes.set(title=f"{head} (better \N{UPWARDS ARROW})", ylabel=ylabel)
    end = max([*epochs, *val_epochs])
    for axes in (loss_axes, lr_axes, *metric_axes):
        axes.grid(alpha=0.3)
        axes.set(xlabel="epoch", xlim=(0, end * 1.02))
        if end >= 3:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    return figure
