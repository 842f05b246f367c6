"""Classify images: fasttricks predict CHECKPOINT PATH... [--output FILE ...]; as the run's validation sees them."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from fasttricks.commands import prog
from fasttricks.commands.by_task import commands_of, require_drawn, tasks_with
from fasttricks.commands.calibrated import calibration_to_apply
from fasttricks.commands.network_config import DrawingConfig
from fasttricks.commands.prediction_files import Output, Prediction, check_output
from fasttricks.commands.saved_run import FORMS, SavedRunCommand
from fasttricks.config import (
    AUGMENTATION,
    ConfigError,
    DataConfig,
    ModelConfig,
    Range,
    TrainConfig,
    UserError,
    read_launch,
    require,
    show_name,
)
from fasttricks.config.options import Hidden, value_of
from fasttricks.runs.calibration import shown_as
from fasttricks.runs.exported import UNREAD
from fasttricks.system.command import ended_as_by_ctrl_c
from fasttricks.system.progress import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World

PROG = prog("predict")
ABOUT = f"""The likeliest classes of each image, with their probabilities. Those of a checkpoint of task multilabel do not add up
to 1: a class above 50 % is predicted.

{FORMS} Without that file a class is its number.

PATH is an image, a folder of images, searched with the folders in it, or -, which reads a PATH a line from standard input. An
image that cannot be read is named, and the exit status is 1. A field that is not given is as in the run. Segmentation and
detection: --draw DIR makes pictures, and masks or a table of boxes."""
HIDDEN: Hidden = {
    DataConfig: (*AUGMENTATION, "max_bad", "val_share", "limit_per_class", "label_separator"),
    ModelConfig: UNREAD,
}
BATCH_SIZE = 64
_PATIENCE_S = 2.0  # before a progress bar is shown


@dataclass(frozen=True, kw_only=True)
class PredictConfig(DrawingConfig):
    """How to predict; other fields are those of the checkpoint's run."""

    top: Annotated[int, Range(1)] = 5
    """Classes shown an image; all where there are fewer."""
    output: str = ""
    """File to make: .csv, .jsonl or .parquet, a row an image; empty: print. It must not exist."""
    draw: str = ""
    """Segmentation: folder to make, with each image under the colours of its classes, and its mask. Detection: with its boxes."""
    embed: bool = False
    """Write the features that enter the classifier too, to a .jsonl or .parquet."""
    calibrated: bool = False
    """Probabilities of logits / T, the temperature that `fasttricks evaluate RUN --calibrate` fitted; the classes stay."""
    flip: bool = False
    """Average the logits, and the features, of the image and its mirror image."""


class Part(NamedTuple):
    """A batch of images, some of which may be bad."""

    numbers: range
    """Those of the images whose turn it is."""
    shown: list[int]
    """N of them that can be used, in order."""
    images: Tensor | None
    """(N, 3, S, S), as validation has them; None where N is 0."""
    errors: dict[int, str]
    """Why the others cannot."""


def predict(saved: Saved, paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[Prediction]:
    """The likeliest classes of each image, in the order given, a batch at a time.

    Images go through the validation pipeline (data.Loader), one for all of them. One that cannot be read
    or decoded has an error and no classes; the others are as they would be without it. Their probabilities are the softmax of the
    logits, and of task multilabel the sigmoid of each. Raises ConfigError for a size that
    the network cannot take, as models.Embedder, and as calibration_to_apply. Memory: that of a batch, and of `paths`.
    """
    import torch

    from fasttricks.learning.placement import place
    from fasttricks.learning.precision import check_precision, make_autocast, resolve_precision
    from fasttricks.models import Embedder
    from fasttricks.system.determinism import ask_for_one_order
    from fasttricks.tasks import find_task
    from fasttricks.tasks.classification import evaluation_logits
    from fasttricks.training.checks import check_evaluation_size

    answers = commands_of(saved.task)
    require(not answers.no_classes, "task", saved.task, answers.no_classes)
    require_drawn(config.draw_score, saved.task, draws=False)
    check_precision(config.precision, world.device)
    saved = saved.trusting(config.trust_code)
    check_evaluation_size(saved, config.data.image_size)
    ask_for_one_order(world.device, on=True)
    precision = resolve_precision(config.precision, world.device)
    network = saved.network(average=config.average)
    probabilities = (
        torch.sigmoid if find_task(saved.task).facts.several_labels else functools.partial(torch.softmax, dim=1)
    )
    rule = f"is for one label an image, and the checkpoint's task is {saved.task}; leave it out"
    require(not config.calibrated or answers.calibrated, "calibrated", True, rule)
    calibration = None
    if config.calibrated:
        shown = shown_as(config.data, flip=config.flip)
        calibration = calibration_to_apply(saved, network, average=config.average, shown=shown)
    temperature = calibration.temperature if calibration else 1.0
    model = place(network, world, precision)
    autocast, names = make_autocast(precision, world.device), saved.classes
    embedder = Embedder(model) if config.embed else None
    for part in load(paths, config, world):
        rows: dict[int, list[tuple[str, float]]] = {}
        features: dict[int, NDArray[np.float32]] = {}
        if part.images is not None:
            with torch.no_grad():
                logits = evaluation_logits(model, part.images, flip=config.flip, autocast=autocast)
            shares, order = probabilities(logits.double() / temperature).topk(classes_shown(saved, config))
            for number, *row in zip(part.shown, order.tolist(), shares.tolist(), strict=True):
                rows[number] = [(names[i], share) for i, share in zip(*row, strict=True)]
            if embedder:
                features = dict(zip(part.shown, embedder.take().cpu().numpy(), strict=True))
        for number in part.numbers:
            yield Prediction(paths[number], rows.get(number, []), part.errors.get(number, ""), features.get(number))


def classes_shown(saved: Saved, config: PredictConfig) -> int:
    """The number of classes of each prediction."""
    return min(config.top, len(saved.classes))


def load(paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[Part]:
    """The images by the Loader of validation, a batch at a time."""
    from fasttricks.data.pipeline.loader import Loader
    from fasttricks.data.sources.errors import DataError
    from fasttricks.data.sources.files import ImageFiles
    from fasttricks.learning.precision import image_dtype

    data = dataclasses.replace(config.data, max_bad=1.0)  # a bad one is no error
    dtype, size = image_dtype(config.precision, world.device), min(BATCH_SIZE, len(paths))
    source = ImageFiles(paths)
    loader = Loader(source, data, training=False, batch_size=size, device=world.device, dtype=dtype, names_bad=False)
    batches = iter(loader)
    for first in range(0, len(paths), size):
        numbers, shown, images = range(first, min(first + size, len(paths))), list[int](), None
        try:
            batch = next(batches, None)  # None once it was known that none of them can be used
        except DataError:
            if not all(map(loader.why_bad, range(len(paths)))):
                raise
            batch = None
        if batch is not None and len(batch):
            assert batch.shown is not None, "a Loader says which images it shows"
            shown, images = batch.shown.tolist(), batch.images
        used = set(shown)
        yield Part(numbers, shown, images, {number: loader.why_bad(number) for number in numbers if number not in used})


def prediction_text(prediction: Prediction) -> str:
    """The image's lines."""
    rows = [f"  {100 * share:6.2f} %  {name}" for name, share in prediction.classes]
    return "\n".join(map(show_name, [prediction.path, *rows]))


RECORDED: Hidden = {PredictConfig: ("model",), DataConfig: ("class_order", "root", "labels")}
"""Fields that a run records."""


def as_run(run: TrainConfig) -> PredictConfig:
    """Predict as `run` validates."""
    return PredictConfig(device=run.device, precision=run.precision, model=run.model, flip=run.eval.flip, data=run.data)


def main(args: Sequence[str]) -> None:
    """Print or write the predictions of the checkpoint that `args` name for the images. Exits 1 where one could not be used."""
    command = SavedRunCommand(PROG, "CHECKPOINT PATH...", ABOUT, PredictConfig(), as_run, HIDDEN, RECORDED)
    asked = command.read(args)
    if not asked.more:
        raise UserError(f"images: none given; {PROG} {show_name(asked.path)} IMAGE...")
    output = asked.config.output if asked.config else value_of("output", asked.options)
    embed = asked.config.embed if asked.config else "--embed" in asked.options
    draw = asked.config.draw if asked.config else value_of("draw", asked.options)
    require(not (draw and output), "output", output, "is for classes of images, and --draw for pixels; leave it out")
    rule = "needs a file to write to; add --output FILE, a .parquet or a .jsonl"
    require(bool(output) or not embed, "embed", embed, rule)
    ranks, rule = (
        read_launch().size,
        "predict is one process; start it without torchrun, each with a share of the images",
    )
    require(ranks == 1, "ranks", ranks, rule)
    from fasttricks.data.sources.files import find_images

    if output:
        check_output(output, embed=embed)
    images = find_images(_named(asked.more))
    if not images:
        raise UserError("images = '-': standard input names none; give a path a line")
    from fasttricks.system.distributed import keep_freed_memory

    keep_freed_memory()
    if draw:
        raise SystemExit(_draw(*command.open(asked), images))
    if output:
        with ended_as_by_ctrl_c(), Output(output, embed=embed) as file:
            _write(file, *command.open(asked), images)
        print(f"wrote {file.count:,} predictions to {show_name(output)}")
        if file.errors:
            words = f"{file.errors:,} of {file.count:,} images could not be used; the column error says why"
            print(f"error: {words}", file=sys.stderr)
        raise SystemExit(int(file.errors > 0))
    raise SystemExit(_print(*command.open(asked), images))


def _draw(saved: Saved, config: PredictConfig, images: Sequence[str]) -> int:
    """Draw each image, with a line for it. Returns the exit status."""
    from fasttricks.system.distributed import join_world

    draw, failed = commands_of(saved.task).draw, False
    rule = f"is for {tasks_with(lambda row: row.draw)}, and the checkpoint's task is {saved.task}; leave it out"
    if draw is None:
        raise ConfigError(f"draw = {config.draw!r}: {rule}")
    require_drawn(config.draw_score, saved.task)
    with join_world(config.device) as world:
        for drawn in draw(saved, images, config, world):
            failed |= bool(drawn.error)
            if drawn.error:
                print(show_name(f"error: {drawn.path}: {drawn.error}"), file=sys.stderr)
            else:
                print(drawn, flush=True)
    return int(failed)


def _named(paths: Sequence[str]) -> Iterator[str]:
    """`paths`, where - stands for the lines of standard input."""
    for path in paths:
        if path == "-" and sys.stdin is not None:
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
            yield from (os.fsdecode(line) for line in lines if line)
        else:
            yield path


def _write(file: Output, saved: Saved, config: PredictConfig, images: Sequence[str]) -> None:
    """Write each prediction to `file`, under a progress bar."""
    from fasttricks.system.distributed import join_world

    with join_world(config.device) as world, counted("predict", len(images), after=_PATIENCE_S) as advance:
        file.begin(classes_shown(saved, config))
        for prediction in predict(saved, images, config, world):
            file.written(prediction)
            advance(1)


def _print(saved: Saved, config: PredictConfig, images: Sequence[str]) -> int:
    """Print each prediction. Returns the exit status."""
    from fasttricks.system.distributed import join_world

    failed = False
    with join_world(config.device) as world:
        for prediction in predict(saved, images, config, world):
            failed |= bool(prediction.error)
            if prediction.error:
                print(show_name(f"error: {prediction.path}: {prediction.error}"), file=sys.stderr)
            else:
                print(prediction_text(prediction), flush=True)
    return int(failed)
