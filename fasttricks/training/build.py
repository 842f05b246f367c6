"""build(): a Run from a config, every part checked before training begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fasttricks.config import ConfigError, ModelConfig, Precision, TrainConfig, replace_at, require
from fasttricks.config.resolve import require_resolved
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import Source, find_dataset
from fasttricks.learning.compiled import CompiledModel
from fasttricks.learning.divergence import LossGuard
from fasttricks.learning.optim import build_optimizer
from fasttricks.learning.precision import (
    check_precision,
    halve,
    image_dtype,
    make_autocast,
    make_loss_scale,
    resolve_precision,
)
from fasttricks.learning.schedule import image_size, image_sizes, learning_rate
from fasttricks.learning.teacher import Teacher, load_teacher
from fasttricks.learning.teacher_cache import check_cache, open_cache
from fasttricks.models import build_model
from fasttricks.runs.folder import check_run_dir, open_run
from fasttricks.runs.log import RunLog
from fasttricks.system.distributed import World
from fasttricks.system.monitor import start_monitor
from fasttricks.system.profiling import StepProfiler
from fasttricks.system.signals import StopRequest
from fasttricks.training.resume import Resumed, find_state, fingerprint
from fasttricks.training.run import Run, count_steps


def build(config: TrainConfig, world: World, stop: StopRequest | None = None) -> Run:
    """Everything a run needs; resumed where the config says so and a checkpoint is there.

    stop: what may ask the run to end; without, nothing does.
    Nothing is written before every check has passed. Raises ConfigError, DataError or CheckpointError.
    A collective: every rank must call it.
    """
    require_resolved(config)
    check_run_dir(config)
    check_precision(config.precision, world.device)
    config.micro_batch_size(world.size)
    train_folder, val_folder = find_dataset(config.data.root)
    check_batch(config, len(train_folder))
    check_cache(config)
    config, teacher = with_teacher(config, train_folder, world)
    own = fingerprint(config, world, (train_folder, val_folder))
    resumed = find_state(config, world, own)
    torch.manual_seed(config.seed)
    precision = resolve_precision(config.precision, world.device)
    model = place(build_model(config.model, num_classes(config.model, train_folder)), world, precision)
    if config.sync_batch_norm:
        model = synchronize_batch_norm(model, world)
    optimizer = build_optimizer(model, config.optim, precision)
    loss_scale = make_loss_scale(config.optim, precision, world.device)
    average = resumed.restore(model, optimizer, loss_scale, config)
    train_loader, val_loader = make_loaders(config, world, train_folder, val_folder, resumed)
    check_sizes(config, len(train_folder.classes), train_loader.smallest_batch)
    cache = None
    if teacher is not None and config.distill.cache:
        cache = open_cache(teacher, config, train_folder, operators=train_loader.operators)
    world.barrier()  # every rank has looked at run_dir before one makes it
    if world.is_main:
        open_run(config)
    world.barrier()
    steps = count_steps(train_loader, config)
    schedule = partial(learning_rate, config=config.schedule, peak_lr=config.peak_lr)
    state, folder = resumed.state, Path(config.run_dir)
    log = RunLog(
        folder,
        world,
        num_steps=config.epochs * steps,
        steps_per_epoch=steps,
        first_step=state.get("step", 0),
        state=resumed.log_state(world),
    )
    forward = wrap(model, config, world, log.print)
    resumed.restore_statistics(model, average, world)
    guard = LossGuard(world, limit=config.max_loss, skip=config.on_bad_loss == "skip")
    guard.skipped = state.get("skipped_losses", 0)
    run = Run(
        config=config,
        world=world,
        classes=train_folder.classes,
        num_train_images=len(train_folder),
        model=model,
        forward=forward,
        optimizer=optimizer,
        loss_scale=loss_scale,
        average=average,
        train_loader=train_loader,
        val_loader=val_loader,
        autocast=make_autocast(precision, world.device),
        lr_at=partial(schedule, steps_per_epoch=steps, epochs=config.epochs),
        folder=folder,
        log=log,
        monitor=start_monitor(world.device),
        profiler=StepProfiler(folder, world.device, log.print, on=config.profile and world.is_main),
        teacher=teacher,
        teacher_cache=cache,
        guard=guard,
        stop=stop or StopRequest(world),
        fingerprint=json.dumps(own),
        step=state.get("step", 0),
        epoch=state.get("epoch", 0),
        unmeasured=state.get("unmeasured", False),
        first_epoch=state.get("epoch", 0),
        train_seconds=state.get("train_seconds", 0.0),
    )
    log.print(describe(run, val_folder, resumed))
    return run


def with_teacher(config: TrainConfig, train_folder: Source, world: World) -> tuple[TrainConfig, Teacher | None]:
    """The teacher of a distillation, and `config` with the digest of its weights, to be held against a resumed run's.

    Raises ConfigError or CheckpointError as load_teacher, and ConfigError as check_run_dir for another teacher.
    """
    if not config.distill.teacher:
        return config, None
    teacher = load_teacher(config.distill, train_folder.classes, config.data.image_size, world)
    config = replace_at(config, "distill.digest", teacher.digest)
    check_run_dir(config)
    return config, teacher


def check_batch(config: TrainConfig, num_images: int) -> None:
    """Raise ConfigError where one step would take more images than there are."""
    rule = f"must be at most the {num_images} training images; lower --global-batch-size"
    require(config.global_batch_size <= num_images, "global_batch_size", config.global_batch_size, rule)


def check_sizes(config: TrainConfig, num_classes: int, smallest_batch: int) -> None:
    """Raise ConfigError where the network cannot take the images, or batch norm would see a single value of a channel.

    smallest_batch: images of the smallest batch of a rank. Asks the network itself, on tensors without data: under a second.
    """
    side = image_size(0, config.schedule, full=config.data.image_size, epochs=config.epochs)  # no later one is smaller
    with torch.device("meta"):
        model = build_model(config.model, num_classes)
        try:
            model(torch.empty(smallest_batch, 3, side, side))
        except ValueError as error:
            require("more than 1 value per channel" in str(error), "model.name", config.model.name, str(error))
            rule = f"leaves a batch of one image, whose {side} pixels the network shrinks to 1: batch norm has nothing to average"
            way_out = "give another --global-batch-size, or a lower --model.stem-stride where the network has one"
            raise ConfigError(f"global_batch_size = {config.global_batch_size}: {rule}; {way_out}") from error
        except (RuntimeError, AssertionError) as error:  # timm asserts a size
            rule = f"is no size that {config.model.name} takes ({str(error).splitlines()[0]})"
            raise ConfigError(
                f"data.image_size = {side}: {rule}; give a larger one, or the one it was made for"
            ) from error


def num_classes(config: ModelConfig, train_folder: Source) -> int:
    """Classes of the data. Raises ConfigError where the config asks for another number."""
    found = len(train_folder.classes)
    rule = f"must be the {found} classes of {train_folder.root}, or 0 to take them from there"
    require(config.num_classes in (0, found), "model.num_classes", config.num_classes, rule)
    return found


def place(model: nn.Module, world: World, precision: Precision) -> nn.Module:
    """`model` on the rank's device, its weights channels-last in memory and, for fp16, FP16 as precision.halve has them."""
    model.to(device=world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return halve(model) if precision == "fp16" else model


def synchronize_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """`model` with batch norm over the images of all ranks. Raises ConfigError on the CPU, which torch has none for."""
    rule = "needs CUDA: torch's SyncBatchNorm takes no CPU tensors; leave it off, as in the paper"
    require(world.device.type == "cuda", "sync_batch_norm", True, rule)
    synchronized: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return synchronized


def wrap(model: nn.Module, config: TrainConfig, world: World, say: Callable[[str], None]) -> nn.Module:
    """`model`, compiled where config says so, in what sums its gradients over the ranks.

    Batch norm is local, as in the paper: no buffer is broadcast. Gradients are divided by the ranks before they are summed,
    so that FP16 does not overflow there; each dtype has buckets of its own.
    """
    if config.compile != "off":
        model = CompiledModel(model, config.compile, fallback=config.compile_fallback, say=say)
    if world.size == 1:
        return model
    # a newer torch warns of the old name
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    local: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    # with micro-batches a step is not the same graph each time: torch refuses no_sync() under static_graph
    return DistributedDataParallel(model, gradient_as_bucket_view=True, static_graph=config.accumulate == 1, **local)


def make_loaders(
    config: TrainConfig, world: World, train_folder: Source, val_folder: Source, resumed: Resumed
) -> tuple[Loader, Loader]:
    """Training and validation batches of this rank, the first where `resumed` left off."""
    batch_size = config.micro_batch_size(world.size)
    make = partial(Loader, config=config.data, device=world.device, rank=world.rank, world_size=world.size)
    dtype = image_dtype(config.precision, world.device)
    size_at = partial(image_size, config=config.schedule, full=config.data.image_size, epochs=config.epochs)
    train_loader = make(
        train_folder,
        training=True,
        batch_size=batch_size,
        dtype=dtype,
        seed=config.seed,
        image_size_at=size_at,
    )
    if (position := resumed.position(world, batch_size)) is not None:
        train_loader.load_state_dict(position)
    val_dtype = torch.float32 if config.ema_decay else dtype  # the average is FP32, the network may be FP16
    val_batch_size = config.eval.batch_size or batch_size
    return train_loader, make(val_folder, training=False, batch_size=val_batch_size, dtype=val_dtype)


def describe(run: Run, val_folder: Source, resumed: Resumed) -> str:
    """The header of a run: what is trained, on what, how."""
    config, world = run.config, run.world
    parameters = sum(p.numel() for p in run.model.parameters())
    images = (
        f"{run.num_train_images:,} training and {len(val_folder):,} validation images of {len(run.classes)} classes"
    )
    batch = f"{world.size} rank(s) x {config.accumulate} micro-batch(es) x {config.micro_batch_size(world.size)} images"
    rows = {
        "recipe": config.recipe,
        "model": f"{config.model.name}, {parameters / 1e6:.2f} M parameters",
        "data": f"{images} in {val_folder.root.parent}",
        "device": f"{world.device_name}, precision {resolve_precision(config.precision, world.device)}",
        "batch": f"{config.global_batch_size} = {batch}; {run.steps_per_epoch} steps an epoch, {config.epochs} epochs",
        "lr": f"peak {config.peak_lr:g}, warm-up {config.schedule.warmup_epochs:g} epochs, then {config.schedule.decay}",
        "run": f"{run.folder}/",
    }
    sizes = image_sizes(config.schedule, full=config.data.image_size, epochs=config.epochs)
    if config.schedule.first_size < 1:
        what = "they grow over the epochs" if len(sizes) > 1 else "too few epochs to grow in"
        rows["images"] = f"{', '.join(map(str, sizes))} pixels: {what} (progressive resizing)"
    if run.train_loader.note:
        rows["input"] = run.train_loader.note
    if run.teacher is not None:
        distill = config.distill
        weights = (
            f"{distill.hard_weight:g} x labels + {distill.soft_weight:g} x T^2 x teacher, T = {distill.temperature:g}"
        )
        rows["teacher"] = f"{run.teacher.name} {run.teacher.digest} from {distill.teacher}; {weights}"
        if run.teacher_cache is not None:
            rows["cache"] = f"the teacher's logits in {run.teacher_cache.file}"
    if run.monitor.note:
        rows["monitor"] = run.monitor.note
    if config.resume:
        done = f"{resumed.path}, after epoch {run.epoch} of {config.epochs}"
        done += f" and {run.step_in_epoch} of {run.steps_per_epoch} steps" if run.step_in_epoch else ""
        rows["resume"] = done if resumed else "no checkpoint was saved yet: from the beginning"
    rows |= {f"note {number}" if number else "note": note for number, note in enumerate(resumed.notes)}
    return "\n".join(f"{name:8s} {value}" for name, value in rows.items())
