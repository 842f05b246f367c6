"""Classify images: fasttricks predict CHECKPOINT IMAGE... [--top 5 ...]; as the run's validation sees them."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from fasttricks.commands import prog
from fasttricks.commands.saved_run import FORMS, SavedRunCommand
from fasttricks.config import (
    AUGMENTATION,
    DataConfig,
    ModelConfig,
    Precision,
    Range,
    TrainConfig,
    UserError,
    check_fields,
    show_name,
)
from fasttricks.config.options import Hidden
from fasttricks.runs.exported import NOT_SAID, UNREAD

if TYPE_CHECKING:
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World

PROG = prog("predict")
ABOUT = f"""The likeliest classes of each image, with their probabilities.

{FORMS} Without that file a class is its number. An image that cannot be read is named, and the exit status is 1. A field that is
not given is as in the run."""
HIDDEN: Hidden = {DataConfig: (*AUGMENTATION, "max_bad"), ModelConfig: UNREAD}
BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """How to predict; other fields are those of the checkpoint's run."""

    top: Annotated[int, Range(1)] = 5
    """Classes shown an image; all where there are fewer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where a GPU is available, else cpu."""
    precision: Precision = "auto"
    """auto: fp16 on CUDA, fp32 on CPU."""
    average: bool = True
    """Use the averaged weights where the run kept an average (ema_decay)."""
    flip: bool = False
    """Average the logits of the image and its mirror image."""
    trust_code: str = ""
    """PACKAGE.MODULE:FACTORY of a checkpoint whose network is code: it is imported only where this names it too."""
    model: ModelConfig = NOT_SAID
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        check_fields(self)


class Prediction(NamedTuple):
    """The network's prediction for one image."""

    path: str
    classes: list[tuple[str, float]]
    """Name and probability, 0 to 1, the likeliest first; empty where the image cannot be used."""
    error: str = ""
    """Why it cannot."""


def predict(saved: Saved, paths: Sequence[str], config: PredictConfig, world: World) -> Iterator[Prediction]:
    """The likeliest classes of each image, in the order given, a batch at a time.

    Images go through the validation pipeline (data.Loader), one for all of them. One that cannot be read
    or decoded has an error and no classes; the others are as they would be without it. Raises ConfigError for a size that
    the network cannot take.
    """
    import torch

    from fasttricks.learning.placement import place
    from fasttricks.learning.precision import check_precision, make_autocast, resolve_precision
    from fasttricks.system.determinism import ask_for_one_order
    from fasttricks.tasks.classification import evaluation_logits
    from fasttricks.training.checks import check_evaluation_size

    check_precision(config.precision, world.device)
    saved = saved.trusting(config.trust_code)
    check_evaluation_size(saved, config.data.image_size)
    ask_for_one_order(world.device, on=True)
    precision = resolve_precision(config.precision, world.device)
    model = place(saved.network(average=config.average), world, precision)
    autocast, names = make_autocast(precision, world.device), saved.classes
    files = [os.path.abspath(path).lstrip("/") for path in paths]
    found: dict[str, list[tuple[str, float]]] = {}
    errors: dict[str, str] = {}
    said = 0
    for part, images, bad in load(tuple(dict.fromkeys(files)), config, world):
        errors |= bad
        found |= {file: [] for file in part}
        if images:
            with torch.no_grad():
                logits = evaluation_logits(
                    model, torch.stack(list(images.values())), flip=config.flip, autocast=autocast
                )
            shares, order = logits.double().softmax(1).topk(min(config.top, len(names)))
            rows = zip(order.tolist(), shares.tolist(), strict=True)
            found |= {
                f: [(names[i], s) for i, s in zip(*row, strict=True)] for f, row in zip(images, rows, strict=True)
            }
        while said < len(paths) and files[said] in found:
            yield Prediction(paths[said], found[files[said]], errors.get(files[said], ""))
            said += 1


def load(
    files: tuple[str, ...], config: PredictConfig, world: World
) -> Iterator[tuple[tuple[str, ...], dict[str, Any], dict[str, str]]]:
    """For each batch: its files; file -> its pixels, (3, S, S), as validation has them; file -> why it has none.

    files: below /, each once.
    """
    from fasttricks.data.pipeline.loader import Loader
    from fasttricks.data.sources.errors import DataError
    from fasttricks.data.sources.folder import ImageFolder
    from fasttricks.learning.precision import image_dtype

    folder = ImageFolder(root=Path("/"), classes=files, files=files, labels=tuple(range(len(files))))
    data = dataclasses.replace(config.data, max_bad=1.0)  # a bad one is no error
    dtype, size = image_dtype(config.precision, world.device), min(BATCH_SIZE, len(files))
    loader = Loader(folder, data, training=False, batch_size=size, device=world.device, dtype=dtype)
    batches = iter(loader)
    for first in range(0, len(files), size):
        part, images = files[first : first + size], {}
        with redirect_stderr(StringIO()):  # where the loader names bad files by another name; the caller has them
            try:
                batch = next(batches)
                images = {files[label]: image for label, image in zip(batch.labels.tolist(), batch.images, strict=True)}
            except DataError:
                if len(loader.bad) < len(files):
                    raise
        bad = {name.lstrip("/"): why for name, why in loader.bad.items()}
        yield part, images, {file: bad[file] for file in part if file in bad}


def prediction_text(prediction: Prediction) -> str:
    """The image's lines."""
    rows = [f"  {100 * share:6.2f} %  {name}" for name, share in prediction.classes]
    return "\n".join(map(show_name, [prediction.path, *rows]))


RECORDED: Hidden = {PredictConfig: ("model",), DataConfig: ("class_order", "root")}
"""Fields that a run records."""


def as_run(run: TrainConfig) -> PredictConfig:
    """Predict as `run` validates."""
    return PredictConfig(device=run.device, precision=run.precision, model=run.model, flip=run.eval.flip, data=run.data)


def main(args: Sequence[str]) -> None:
    """Print the predictions of the checkpoint that `args` name for the images. Exits 1 where one could not be used."""
    command = SavedRunCommand(PROG, "CHECKPOINT IMAGE...", ABOUT, PredictConfig(), as_run, HIDDEN, RECORDED)
    asked = command.read(args)
    path, images, *_ = asked
    if not images:
        raise UserError(f"images: none given; {PROG} {show_name(path)} IMAGE...")
    from fasttricks.system.distributed import join_world, keep_freed_memory

    keep_freed_memory()
    (saved, config), failed = command.open(asked), False
    with join_world(config.device) as world:
        for prediction in predict(saved, images, config, world):
            failed |= bool(prediction.error)
            if prediction.error:
                print(show_name(f"error: {prediction.path}: {prediction.error}"), file=sys.stderr)
            else:
                print(prediction_text(prediction), flush=True)
    raise SystemExit(int(failed))
