"""Evaluate a checkpoint: fasttricks evaluate CHECKPOINT [--data.root DIR ...]; each validation image counts once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fasttricks.commands import prog
from fasttricks.commands.answers_shown import check_json, write_answers
from fasttricks.commands.by_task import commands_of, tasks_with
from fasttricks.commands.calibrated import calibrate_checkpoint, calibration_text, check_place, weights_name
from fasttricks.commands.network_config import ValidationConfig
from fasttricks.commands.saved_run import FORMS, SavedRunCommand
from fasttricks.config import (
    AUGMENTATION,
    DataConfig,
    DetectConfig,
    EvalConfig,
    ModelConfig,
    ScheduleConfig,
    SegmentConfig,
    TrainConfig,
    UserError,
    read_launch,
    require,
    show_name,
)
from fasttricks.config.options import Hidden, value_of
from fasttricks.runs.calibration import Calibration, run_of, shown_as, write_calibration
from fasttricks.runs.exported import UNREAD

if TYPE_CHECKING:
    from torch import nn

    from fasttricks.data.sources import Source
    from fasttricks.learning.batches import Batches
    from fasttricks.learning.learner import Task
    from fasttricks.learning.precision import Autocast
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World

PROG = prog("evaluate")
ABOUT = f"""Accuracy and loss of a checkpoint over the validation images of its run, or of --data.root; the classes that fail
most, the most frequent confusions and the calibration. Segmentation: mIoU, pixel accuracy, and the IoU of each class. Detection:
mAP in both of VOC's forms, and the average precision of each class.

{FORMS} A field that is not given is as in the run."""
TEST_SCALES = tuple(one.name for one in dataclasses.fields(SegmentConfig) if one.name != "test_scales")
"""The fields of SegmentConfig that trained weights, or the masks' full size, leave without effect."""
FOUND = ("base_size", "max_size", "test_proposals", "score_threshold", "nms_threshold", "most_detections", "average")
"""The fields of DetectConfig that change the detections of trained weights, or their score."""
HIDDEN: Hidden = {
    DataConfig: (*AUGMENTATION, "limit_per_class"),
    ModelConfig: UNREAD,
    EvalConfig: ("every_epochs",),
    SegmentConfig: TEST_SCALES,
    DetectConfig: tuple(one.name for one in dataclasses.fields(DetectConfig) if one.name not in FOUND),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ValidationConfig):
    """How to evaluate; other fields are those of the checkpoint's run."""

    output: str = ""
    """File to make, FILE.json: all answers, with the whole confusion matrix. It must not exist."""
    calibrate: bool = False
    """Fit a temperature on half of the images, judge it on the others and store it in the run, for predict and export."""
    split: Literal["val", "test"] = "val"
    """Images to evaluate on: of validation, or those for the test that segmentation and detection have."""


class Evaluated(NamedTuple):
    """A checkpoint over validation images."""

    metrics: dict[str, float]
    """By name; val_loss and val_images too."""
    answers: Any
    """Those of the task, as Task.answer gives them."""
    images: Source
    """Names the images by the numbers that the answers have."""
    calibration: Calibration | UserError | None = None
    """Where config.calibrate asks for it; an error where there is none."""


def answer_checkpoint(config: EvaluateConfig, saved: Saved, world: World) -> Evaluated:
    """As evaluate_checkpoint, in the same pass, with the answers and, where config.calibrate asks for it, the calibration."""
    opened = _open(config, saved, world)
    with_them = opened.model, opened.batches, world, opened.run, opened.autocast
    if not config.calibrate:
        return Evaluated(*opened.task.answer(*with_them, len(saved.classes)), opened.images)
    from fasttricks.tasks.answers import Answers
    from fasttricks.tasks.classification import CLASSIFICATION

    answers = Answers(len(saved.classes), world.device, keep_logits=True)
    metrics = CLASSIFICATION.evaluate(*with_them, answers)
    shown, trusted = shown_as(config.data, flip=config.eval.flip), saved.trusting(config.trust_code)
    calibration = calibrate_checkpoint(trusted, answers, opened.images, world, average=config.average, shown=shown)
    return Evaluated(metrics, answers.result(world), opened.images, calibration)


def evaluate_checkpoint(config: EvaluateConfig, saved: Saved, world: World) -> dict[str, float]:
    """Metrics of the network of `saved` over the validation images of config.data.root, by name; val_images too, and val_loss
    where its task has one.

    Raises DataError where val/ has a class that the checkpoint lacks, and ConfigError for a size that its network cannot take.
    A collective: every rank must call it.
    """
    opened = _open(config, saved, world)
    return opened.task.evaluate(opened.model, opened.batches, world, opened.run, opened.autocast)


class _Opened(NamedTuple):
    """A network on the rank's device, and its images."""

    task: Task
    run: TrainConfig
    """The run's config with the fields that were given."""
    model: nn.Module
    batches: Batches
    images: Source
    autocast: Autocast


def _open(config: EvaluateConfig, saved: Saved, world: World) -> _Opened:
    from fasttricks.learning.placement import place
    from fasttricks.learning.precision import check_precision, image_dtype, make_autocast, resolve_precision
    from fasttricks.system.determinism import ask_for_one_order
    from fasttricks.tasks import find_task
    from fasttricks.training.checks import check_evaluation_size, check_labels

    check_precision(config.precision, world.device)
    task = find_task(saved.task)
    check_labels(task, config.data)
    saved = saved.trusting(config.trust_code)
    check_evaluation_size(saved, config.data.image_size)
    ask_for_one_order(world.device, on=True)
    tasks = tasks_with(lambda row: config.split in row.splits)
    rule = f"is for {tasks}, and the checkpoint's task is {saved.task}; leave it at val"
    require(config.split in commands_of(saved.task).splits, "split", config.split, rule)
    schedule = ScheduleConfig(warmup_epochs=0)  # whose rules relate to the sizes of training
    run = dataclasses.replace(
        saved.config,
        data=config.data,
        eval=config.eval,
        segment=config.segment,
        detect=config.detect,
        schedule=schedule,
    )
    saved = dataclasses.replace(saved, config=dataclasses.replace(saved.config, detect=config.detect))
    images = task.open_split(config.data, config.split, saved.classes)
    precision = resolve_precision(config.precision, world.device)
    model = place(saved.network(average=config.average), world, precision)
    batch_size = config.eval.batch_size or saved.config.micro_batch_size(saved.ranks)
    dtype = image_dtype(precision, world.device)
    batches = task.val_batches(run, images, world, batch_size=batch_size, dtype=dtype)
    return _Opened(task, run, model, batches, images, make_autocast(precision, world.device))


RECORDED: Hidden = {EvaluateConfig: ("model",), DataConfig: ("class_order",)}
"""Fields that a run records."""


as_run = EvaluateConfig.as_run


def evaluate(saved: Saved, config: EvaluateConfig) -> Evaluated:
    """On the ranks that torchrun started, or on one: answer_checkpoint.

    A collective: every rank must call it. Raises ConfigError for an output that cannot be made, which it does not write.
    """
    from fasttricks.system.distributed import join_world, keep_freed_memory

    check_json(config.output)
    row = commands_of(saved.task)
    rule = f"is for {tasks_with(lambda row: row.shown)} alone; leave it out"
    require(row.shown is not None or not config.output, "output", config.output, rule)
    rule = f"is for {tasks_with(lambda row: row.calibrated)} alone; leave it out"
    require(row.calibrated or not config.calibrate, "calibrate", True, rule)
    if config.calibrate:
        check_place(saved)
    keep_freed_memory()
    with join_world(config.device) as world:
        return answer_checkpoint(config, saved, world)


def write_output(config: EvaluateConfig, saved: Saved, found: Evaluated) -> None:
    """Write config.output and the calibration where they were asked for. For the main rank.

    Raises ConfigError, and after that the error of a calibration that there is not.
    """
    run, calibration, row = run_of(saved.path), found.calibration, commands_of(saved.task)
    if config.output and row.shown is not None:
        weights = weights_name(saved, average=config.average)
        facts: dict[str, Any] = {"checkpoint": str(saved.path), "step": saved.step, "weights": weights}
        facts |= {"metrics": found.metrics}
        if isinstance(calibration, Calibration):
            facts |= {"calibration": dataclasses.asdict(calibration)}
        facts |= {"split": config.split} if len(row.splits) > 1 else {}
        write_answers(config.output, {**facts, **row.shown.table(found.answers, saved.classes, found.images)})
    if isinstance(calibration, UserError):
        raise calibration
    if calibration and run:
        write_calibration(run, calibration)


def main(args: Sequence[str]) -> None:
    """Evaluate the checkpoint that `args` name: print one line of metrics, and the answers."""
    command = SavedRunCommand(PROG, "CHECKPOINT", ABOUT, EvaluateConfig(), as_run, HIDDEN, RECORDED)
    asked = command.read(args)
    check_json(asked.config.output if asked.config else value_of("output", asked.options))
    if asked.config is not None and asked.config.model.name:  # else the file is refused first
        row = commands_of(asked.task)
        row.require_place(asked.config.data, asked.config.split if asked.config.split in row.splits else "val")

    from fasttricks.runs.metric import show_all
    from fasttricks.tasks import find_task

    saved, config = command.open(asked)
    found = evaluate(saved, config)
    if read_launch().rank == 0:
        row, metrics = commands_of(saved.task), found.metrics
        scores = show_all(find_task(saved.task).metrics_of(len(saved.classes)), metrics)
        loss = f"  loss {metrics['val_loss']:.4f}" if "val_loss" in metrics else ""
        print(f"{scores}{loss}  {metrics['val_images']} images  {show_name(saved.path)}")
        if row.shown is not None:
            print(row.shown.text(found.answers, saved.classes), flush=True)
        if isinstance(found.calibration, Calibration):
            print(calibration_text(found.calibration), flush=True)
        write_output(config, saved, found)
