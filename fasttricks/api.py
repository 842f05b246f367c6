"""The Python API: `import fasttricks as ft`. Each function does the work of the command of its name, and returns the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttricks.commands import evaluate as evaluation
from fasttricks.commands import predict as prediction
from fasttricks.commands import train as training
from fasttricks.commands.prediction_files import Output, Prediction
from fasttricks.commands.saved_run import at_place
from fasttricks.config import NETWORKS, ConfigError, ModelConfig, UserError, flatten, read_launch, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.config.resolve import NOTHING, check_kinds, resolve
from fasttricks.runs.exported import describe, stand_in
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.stored import checkpoints, find_weights

if TYPE_CHECKING:
    from torch import nn

    from fasttricks.runs.calibration import Calibration
    from fasttricks.runs.saved import Saved

Place = str | Path
Data = str | Path | Mapping[str, Any]
"""data.root, or the section data: {"root": "DIR", "image_size": 160}."""
RECORDED = ("model.", "data.class_order", "data.root", "data.labels")
"""Fields that a run and an export record, and only the user of another program's file may say; a section ends in a dot."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of a training run."""

    run_dir: Path
    """Folder of the run: config.json, metrics.jsonl, metrics.csv, TensorBoard events, curves.png, checkpoints/, summary.json."""
    finished: bool
    """False where a signal (Ctrl-C, SIGTERM) stopped the run after it was saved; train(..., resume=True) continues it."""
    summary: dict[str, Any]
    """The content of summary.json; empty where the run is not finished."""
    metrics: dict[str, float]
    """Metrics of the last validation by name: accuracies in percent, val_loss in nats; empty where the run is not finished."""

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints of the run, the newest first."""
        return checkpoints(self.run_dir / "checkpoints")


def train(recipe: str, data: Data = "", **fields: Any) -> Result:
    """Train `recipe` and return the result. It is also in the run folder.

    Args:
        recipe: a name of list_recipes().
        data: the folder that holds train/ and val/, a pack, tars, parquet, or the word demo; or a dict of the fields of the
            section data, that folder as root. By default, the recipe's.
        fields: fields of the config as `fasttricks train RECIPE --help` lists them. A section is a dict:
            train("demo", epochs=4, loss={"smoothing": 0.1}, tricks={"off": ["mixup"]}, run_dir="runs/a").

    Raises fasttricks.config.UserError, before training, for a wrong field, value, path or a run_dir that is taken.
    Under torchrun every rank must call it. Ctrl-C saves the run and returns. For the rest of the process it sets glibc's
    allocator to keep freed memory for the next step and, on a GPU, torch's algorithms as `deterministic` says; evaluate() and
    predict() set these as for "on".
    """
    given = _dotted(fields, data)
    config = resolve(fit_recipe(recipe, lambda path: str(given.get(path, ""))), given)
    summary, metrics = training.train(config)
    return Result(run_dir=Path(config.run_dir), finished=bool(summary), summary=summary, metrics=metrics)


def load(checkpoint: Place, data: Data = "", *, model: Mapping[str, Any] = NOTHING, trust_code: str = "") -> Saved:
    """A checkpoint for inference: its config, classes and weights; load(...).network() is the torch module.

    checkpoint: a file, a run folder, of which the newest checkpoint is taken, or an export's folder. No code in the file is run.
    model, data: of a .pt, .pth or .safetensors file of torchvision or timm, the network, {"name": "resnet50b"}, and the images,
    or the file {"class_order": FILE}, that name its classes. A run and an export record both, and refuse them.
    trust_code: PACKAGE.MODULE:FACTORY of a checkpoint whose network is a user's own: network() imports it only then.
    Raises CheckpointError for a path without a checkpoint, and for a damaged one. Reads the file into memory, on the CPU.
    """
    saved = _open(checkpoint, _dotted({"model": model} if model else {}, data), RECORDED)
    return saved.trusting(trust_code) if trust_code else saved


class Evaluation(dict[str, float]):
    """Metrics by name: accuracies in percent, val_loss in nats where the task has one, val_images."""

    answers: Any = None
    """As numpy arrays. Confusion matrix, accuracy by class, calibration and mistakes (tasks.answers.Answered); of task multilabel
    average precision, precision, recall and F1 by class (LabelAnswered); of segmentation the IoU of each class and the confusion
    matrix of pixels (PixelScores). None for a task that has none."""
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the answers."""
    mistakes: tuple[str, ...] = ()
    """Names of the images of answers.mistakes, in that order: CLASS/IMAGE."""
    calibration: Calibration | None = None
    """The temperature and its effect, where evaluate(..., calibrate=True) fitted it; it is then in the run too."""


def evaluate(checkpoint: Place, data: Data = "", **fields: Any) -> Evaluation:
    """The metrics of a checkpoint over the images of val/, and its answers.

    checkpoint: as for load(). data: as for train(); by default, the run's. fields: as `fasttricks evaluate --help` lists them; by
    default, the run's. Raises UserError as train(). Under torchrun every rank must call it.
    """
    given = _dotted(fields, data)
    saved = _open(checkpoint, given, ("model.", "data.class_order"))
    config = at_place(evaluation.as_run(saved.config), given.get("data.root", ""))
    config = replace_fields(config, check_kinds(type(config), given))
    found = evaluation.evaluate(saved, config)
    from fasttricks.tasks.answers import Answered

    if read_launch().rank == 0:
        evaluation.write_output(config, saved, found)
    result = Evaluation(found.metrics)
    result.answers, result.classes = found.answers, saved.classes
    if isinstance(found.calibration, UserError):
        raise found.calibration
    result.calibration = found.calibration
    if isinstance(found.answers, Answered):
        result.mistakes = tuple(map(found.images.name, found.answers.mistakes.images.tolist()))
    return result


def predict(checkpoint: Place, images: Place | Iterable[Place], **fields: Any) -> list[Prediction]:
    """The likeliest classes of each image, with their probabilities, in the order given.

    checkpoint: as for load(). images: one path or several; a folder stands for the images in it and below. fields: as
    `fasttricks predict --help` lists them, such as top=3; embed=True adds the features that enter the classifier, and output=FILE
    writes the predictions to it too. An image that cannot be read has no classes, and the reason as its error; the others are not
    affected. Raises UserError for a folder without images, and as the command.
    """
    given = _dotted(fields)
    saved = _open(checkpoint, given, RECORDED)
    config = prediction.as_run(saved.config)
    config = replace_fields(config, check_kinds(type(config), given))
    from fasttricks.data.sources.files import find_images

    paths = find_images(map(str, [images] if isinstance(images, (str, Path)) else images))
    if not paths:
        return []
    from fasttricks.system.distributed import join_world

    with join_world(config.device) as world:
        found = prediction.predict(saved, paths, config, world)
        if not config.output:
            return list(found)
        with Output(config.output, embed=config.embed) as file:
            file.begin(prediction.classes_shown(saved, config))
            return [file.written(one) for one in found]


def create_model(name: str, num_classes: int = 1000, **options: Any) -> nn.Module:
    """The network `name`, with random weights from torch's generator, in FP32 on the CPU, in training mode.

    name: of list_models(), or timm:NAME for a network of timm. options: fields of the section model, such as zero_gamma=True.
    Its keys are those of torchvision and timm. Raises ConfigError for an unknown name or option.
    """
    config = replace_fields(ModelConfig(), check_kinds(ModelConfig, {"name": name, **options}))
    from fasttricks.models import build_model

    return build_model(config, num_classes)


def list_models() -> list[str]:
    """The names of the networks."""
    return list(NETWORKS)


def list_recipes() -> list[str]:
    """The names of the recipes."""
    return list(RECIPES)


def _open(checkpoint: Place, given: Mapping[str, Any], recorded: tuple[str, ...]) -> Saved:
    """The network at `checkpoint`; of the fields `given`, those of model and data say which that of another program's file is.

    recorded: fields that a run or an export refuses. Raises ConfigError for one of them, and as open_saved.
    """
    path = Path(checkpoint)
    find_weights(path)
    from fasttricks.runs.opened import open_saved

    description = describe(path)
    if description is None or description.settled:
        refused = [name for name in given if name.startswith(recorded)]
        if refused:
            raise ConfigError(f"{refused[0]} = {given[refused[0]]!r}: the checkpoint records it; leave it out")
        return open_saved(path)
    values = {name: value for name, value in given.items() if name.startswith(("model.", "data."))}
    named = description.config.model.name
    said = prediction.as_run(description.config if named else stand_in(str(values.get("model.name", ""))))
    said = replace_fields(said, check_kinds(type(said), values))
    return open_saved(path, said.model, said.data)


def _dotted(fields: Mapping[str, Any], data: Data = "") -> dict[str, Any]:
    """`fields` by dotted path; a section may be a dict. `data` is data.root, or the section."""
    if isinstance(data, Mapping):
        return _dotted({**fields, "data": data})
    found = {path: str(value) if isinstance(value, Path) else value for path, value in flatten(fields).items()}
    if data and "data.root" in found:
        raise ConfigError(f"data.root = {found['data.root']!r}: is given as data too; leave one of them out")
    return {**found, **({"data.root": str(data)} if data else {})}
