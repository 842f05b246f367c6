"""Checks of a config, a network and a data set before the training."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fasttricks.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    UserError,
    model_info,
    require,
    show_name,
)
from fasttricks.data.sources import Source
from fasttricks.learning.compiled import check_compile, without_cuda_graphs
from fasttricks.learning.learner import Task
from fasttricks.learning.precision import check_precision
from fasttricks.learning.schedule import image_size
from fasttricks.learning.step_graph import check_graph
from fasttricks.learning.teacher import check_teacher
from fasttricks.runs.saved import Saved
from fasttricks.system.distributed import World
from fasttricks.tasks import find_task

_SIZE_ERRORS = (RuntimeError, AssertionError)  # timm asserts a size


def check_fit(task: Task, config: TrainConfig, train: Source, world: World) -> None:
    """Raise ConfigError for the fields that do not suit the data and the machine: all of them at once, with options to copy."""
    batch = f"--global-batch-size {_fitting_batch(config, len(train), world.size)}"
    checks: list[tuple[Callable[[], object], str]] = [
        (lambda: check_precision(config.precision, world.device), "--precision auto"),
        (
            lambda: check_compile(config.compile, ranks=world.size, accumulate=config.accumulate),
            f"--compile {without_cuda_graphs(config.compile)}",
        ),
        (
            lambda: check_graph(config, world.device.type, ranks=world.size, steps_alike=task.facts.steps_alike),
            "--no-cuda-graph" + " --no-cuda-graph-ranks" * config.cuda_graph_ranks,
        ),
        (lambda: config.micro_batch_size(world.size), batch),
        (lambda: check_batch(config, len(train)), batch),
        (lambda: num_classes(config, train), "--model.num-classes 0"),
        (lambda: check_frozen(config), "--init RUN"),
        (lambda: check_teacher(config.distill), "--tricks.off distillation"),
    ]
    found: list[tuple[UserError, str]] = []
    for check, option in checks:
        try:
            check()
        except UserError as error:
            found.append((error, option))
    if len(found) == 1:
        raise found[0][0]
    if found:
        rows = [str(error) for error, _ in found] + [f"add: {' '.join(dict.fromkeys(option for _, option in found))}"]
        head = f"{config.recipe}: {len(found)} settings do not suit this data or machine:"
        raise ConfigError("\n  ".join([head, *rows]))


def _fitting_batch(config: TrainConfig, num_images: int, ranks: int) -> int:
    """A global batch of a tenth of the images, 8 at least, the recipe's at most; a multiple of ranks x micro-batches."""
    parts = ranks * config.accumulate
    wanted = min(config.global_batch_size, num_images, max(8, num_images // 10))
    return max(1, wanted // parts) * parts


def check_batch(config: TrainConfig, num_images: int) -> None:
    """Raise ConfigError where one step would take more images than there are."""
    rule = f"must be at most the {num_images} training images; lower --global-batch-size"
    require(config.global_batch_size <= num_images, "global_batch_size", config.global_batch_size, rule)


def check_frozen(config: TrainConfig) -> None:
    """Raise ConfigError where random weights are to be frozen."""
    rule = "would keep random weights; give trained ones by --init, or leave it out"
    require(bool(config.init) or not config.model.freeze, "model.freeze", " ".join(config.model.freeze), rule)


def num_classes(config: TrainConfig, train: Source) -> int:
    """Classes of the data. Raises ConfigError where the config asks for another number."""
    found = len(train.classes)
    only = ", ".join(map(show_name, train.classes))
    least = find_task(config.task).facts.least_classes
    rule = f"must have 2 or more classes, but has only {only}; add others"
    require(found >= least, "data.root", config.data.root, rule)
    rule = f"must be the {found} classes of {train.root}, or 0 to take them from there"
    asked = config.model.num_classes
    require(asked in (0, found), "model.num_classes", asked, rule)
    return found


def check_sizes(task: Task, config: TrainConfig, num_classes: int, smallest_batch: int) -> None:
    """Raise ConfigError where the network cannot take the images, or batch norm would see a single value of a channel.

    smallest_batch: images of the smallest batch of a rank. Asks the network itself, on tensors without data: under a second.
    """
    side = image_size(0, config.schedule, full=config.data.image_size, epochs=config.epochs)  # no later one is smaller
    config = _of_size(config, side)
    if model_info(config.model.name).family == "own":
        _try_own(task, config, num_classes, min(smallest_batch, 2))
        return
    meta = torch.device("meta")
    with meta, _ShapesAlone():
        model = task.make_model(config, num_classes)
        batch = task.example(config, smallest_batch, num_classes, device=meta, dtype=torch.float32)
        try:
            model(batch.images)
        except ValueError as error:
            require("more than 1 value per channel" in str(error), "model.name", config.model.name, str(error))
            rule = f"leaves a batch of one image, whose {side} pixels the network shrinks to 1: batch norm has nothing to average"
            way_out = "give another --global-batch-size, or a lower --model.stem-stride where the network has one"
            raise ConfigError(f"global_batch_size = {config.global_batch_size}: {rule}; {way_out}") from error
        except _SIZE_ERRORS as error:
            raise _wrong_size(side, config.model, error) from error


class _ShapesAlone(TorchFunctionMode):
    """Batch norm in it checks its input, as torch does, and returns it. On tensors without data torch computes it in Python,
    which takes longer than all the rest of a ResNet."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.batch_norm:
            return func(*args, **(kwargs or {}))
        return _checked(*args, **(kwargs or {}))


def _checked(
    input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *_: Any, **__: Any
) -> Tensor:
    """`input` of functional.batch_norm. Raises ValueError where a channel has one value, whose variance training would take."""
    if training and input.numel() == input.size(1):
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    return input


def _of_size(config: TrainConfig, side: int) -> TrainConfig:
    """`config` with images of `side` pixels from the first epoch on."""
    data = dataclasses.replace(config.data, image_size=side, val_resize=max(side, config.data.val_resize))
    return dataclasses.replace(config, data=data, schedule=dataclasses.replace(config.schedule, first_size=1.0))


def _try_own(task: Task, config: TrainConfig, num_classes: int, count: int) -> None:
    """Raise ConfigError where a user's own network does not turn `count` images into logits (count, num_classes).

    On real tensors on the CPU: a user's code need not know those without data. Costs a forward pass; keeps torch's generator.
    """
    with torch.random.fork_rng(devices=()):
        model = task.make_model(config, num_classes)
        images = task.example(config, count, num_classes, device=torch.device("cpu"), dtype=torch.float32).images
        try:
            logits = model(images)
        except Exception as error:  # whatever the user's code raises
            last, line = traceback.extract_tb(error.__traceback__)[-1], (str(error).splitlines() or [""])[0]
            found = f"{type(error).__name__}: {line} at {last.filename}:{last.lineno}"
            rule = f"fails on {count} training images of {config.data.image_size} pixels ({found}); mend it, or give other sizes"
            raise ConfigError(f"model.name = {config.model.name!r}: {rule}") from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    rule = f"must turn {count} images into logits of shape {(count, num_classes)}, but returned {shape}"
    require(shape == (count, num_classes) or not task.facts.one_output_a_class, "model.name", config.model.name, rule)


def check_labels(task: Task, data: DataConfig) -> None:
    """Raise ConfigError where `data` gives an image several labels, and the checkpoint's task one, or the other way round."""
    several, separator = task.facts.several_labels, data.label_separator
    rule = f"is for several labels an image, and the checkpoint's task is {task.name}; leave it out"
    require(several or not separator, "data.label_separator", separator, rule)
    rule = (
        f"must separate the labels of an image, as the checkpoint's task is {task.name}; give the table's, such as ';'"
    )
    require(bool(separator) or not several, "data.label_separator", separator, rule)


def check_evaluation_size(saved: Saved, image_size: int) -> None:
    """Raise ConfigError where the network of `saved` cannot take images of another size than its run's: under a second."""
    if image_size == saved.config.data.image_size and not saved.foreign:
        return  # check_sizes tried it
    side = find_task(saved.task).facts.whole_images
    rule = f"has no effect: whole images are shown, their short side at {side}; leave it out"
    task, classes = find_task(saved.task), len(saved.classes)
    require(not task.facts.whole_images, "data.image_size", image_size, rule)
    # a user's code need not know tensors without data
    device = torch.device("cpu" if model_info(saved.config.model.name).family == "own" else "meta")
    config = _of_size(saved.config, image_size)
    with device, torch.no_grad():
        model = task.make_model(config, classes).eval()
        try:
            model(task.example(config, 1, classes, device=device, dtype=torch.float32).images)
        except _SIZE_ERRORS as error:
            raise _wrong_size(image_size, saved.config.model, error) from error


def _wrong_size(side: int, network: ModelConfig, error: Exception) -> ConfigError:
    rule = f"is not accepted by {network.name} ({str(error).splitlines()[0]})"
    return ConfigError(f"data.image_size = {side}: {rule}; give a larger one, or the network's own")
