"""build(): a Run from a config, every part checked before training begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fasttricks.config import TrainConfig, flatten, replace_at
from fasttricks.config.resolve import require_resolved
from fasttricks.data.sources import Source, common_root
from fasttricks.learning.batches import Batches
from fasttricks.learning.class_weights import class_weights
from fasttricks.learning.compiled import compiled_graphs
from fasttricks.learning.freezing import freeze, frozen_weights
from fasttricks.learning.initial import start_from
from fasttricks.learning.learner import Task, count_steps, make_learner
from fasttricks.learning.placement import place, synchronize_batch_norm, wrap
from fasttricks.learning.precision import image_dtype, resolve_precision
from fasttricks.learning.step_graph import StepGraph, Streams, cuda_graph, on_all_ranks
from fasttricks.learning.teacher import Teacher, load_teacher
from fasttricks.learning.teacher_cache import CachedTeacher, check_cache, open_cache
from fasttricks.models import norm_of, use_norm, whiten
from fasttricks.runs.begin import check_run_dir, check_unused
from fasttricks.runs.folder import config_table
from fasttricks.runs.log import RunLog
from fasttricks.runs.loggers import Loggers
from fasttricks.runs.stored import named
from fasttricks.runs.weights import Weights, read_weights
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World
from fasttricks.system.monitor import start_monitor
from fasttricks.system.profiling import StepProfiler
from fasttricks.system.signals import StopRequest
from fasttricks.system.triton_build import check_triton
from fasttricks.tasks import find_task
from fasttricks.training.checks import check_fit, check_sizes
from fasttricks.training.header import header
from fasttricks.training.owning import own
from fasttricks.training.resume import conditions, find_state
from fasttricks.training.run import Run


def build(config: TrainConfig, world: World, stop: StopRequest | None = None, *, task: Task | None = None) -> Run:
    """Everything a run needs; resumed where the config says so and a checkpoint is there.

    stop: may ask the run to end; None: nothing does. task: the task to train; None: that of config.task.
    Nothing is written before every check has passed. Raises ConfigError, DataError or CheckpointError.
    A collective: every rank must call it. Sets the process's algorithms on a GPU, as ask_for_one_order.
    """
    require_resolved(config)
    task = task or find_task(config.task)
    check_unused(config)
    check_run_dir(config)
    check_cache(config)
    train, val = task.open_data(config.data)
    check_fit(task, config, train, world)
    check_triton(world.device)
    ask_for_one_order(world.device, on=config.deterministic == "on", compiled=config.compile != "off")
    config, teacher = with_teacher(config, train, world)
    weights = class_weights(config.loss.class_weights, train, max_pixels=config.data.max_pixels)
    needed = conditions(task, config, world, train, val, weights)
    resumed = find_state(config, world, needed)
    torch.manual_seed(config.seed)
    with named("init"):
        initial = read_weights(config.init) if config.init and not resumed else None
    whitens = config.model.whitening and not (resumed or initial)
    patches = training_patches(task, config, train) if whitens else None
    model, exact, account = make_network(task, config, train.classes, world, initial, patches)
    train_loader, val_loader = make_loaders(task, config, train, val, world)
    shards, folder = train_loader.shards, Path(config.run_dir)
    check_sizes(task, config, len(train.classes), shards.smallest_batch)
    steps = count_steps(shards, config)
    log = RunLog(
        folder,
        world,
        task.metrics_of(len(train.classes)),
        num_steps=config.epochs * steps,
        steps_per_epoch=steps,
        loss_parts=task.facts.loss_parts,
        config_text=config_table(config),
        loggers=Loggers(config.loggers, folder, flatten(dataclasses.asdict(config)), resumed=bool(resumed)),
    )
    judge = with_cache(teacher, config, train, train_loader)
    streams = Streams.on(world.device) if config.cuda_graph else Streams()
    with streams.on_step():
        forward = wrap(model, config, world, log.print)
    run = Run(
        **vars(
            make_learner(
                task,
                config,
                world,
                shards,
                model,
                forward=forward,
                teacher=judge,
                class_weights=weights,
                exact=exact,
            )
        ),
        classes=train.classes,
        train_loader=train_loader,
        val_loader=val_loader,
        folder=folder,
        log=log,
        monitor=start_monitor(world.device),
        profiler=make_profiler(config, world, log),
        stop=stop or StopRequest(world),
        conditions=needed,
    )
    if config.cuda_graph:
        run.graph = StepGraph(on_all_ranks(cuda_graph, world), streams)
    if resumed:
        run.load_state_dict(resumed.state)
        run.extended = resumed.extended
    world.barrier()  # every rank has looked at run_dir before one makes it
    run.claim = own(config, world, resumed)
    for line in header(run, common_root(train, val), train, resumed, initial=account):
        log.print(line)
    return run


def make_profiler(config: TrainConfig, world: World, log: RunLog) -> StepProfiler:
    """The main rank's, where config.profile asks for one; it waits for torch.compile where that is on."""
    compiled = compiled_graphs if config.compile != "off" else lambda: 0
    on = config.profile and world.is_main
    return StepProfiler(log.folder, world.device, log.print, on=on, compiled=compiled)


def with_teacher(config: TrainConfig, train: Source, world: World) -> tuple[TrainConfig, Teacher | None]:
    """The teacher of a distillation, and `config` with the digest of its weights, to be held against a resumed run's.

    Raises ConfigError or CheckpointError as load_teacher, and ConfigError as check_run_dir for another teacher.
    """
    if not config.distill.teacher:
        return config, None
    teacher = load_teacher(config.distill, train.classes, config.data, world)
    use_norm(teacher, norm_of(config))
    config = replace_at(config, "distill.digest", teacher.digest)
    check_run_dir(config)
    return config, teacher


def with_cache(
    teacher: Teacher | None, config: TrainConfig, train: Source, batches: Batches
) -> Teacher | CachedTeacher | None:
    """`teacher` behind the cache that the config names. Raises ConfigError as open_cache."""
    if teacher is None or not config.distill.cache:
        return teacher
    return open_cache(teacher, config, train, operators=batches.operators)


class Network(NamedTuple):
    """A network that is ready for training."""

    model: nn.Module
    """On the rank's device, its parts frozen."""
    exact: dict[str, Tensor]
    """As Learner.exact."""
    account: str
    """The account of its initial weights."""


def make_network(
    task: Task,
    config: TrainConfig,
    classes: Sequence[str],
    world: World,
    initial: Weights | None = None,
    patches: Iterable[Tensor] | None = None,
) -> Network:
    """The task's network, with the weights of `initial`, and where there are none, those of torch's generator as it stands.

    patches: the images by which model.whitening sets its filters, as whiten() takes them; None: they stay.

    Raises CheckpointError as start_from, ConfigError as freeze.
    """
    precision, frozen = resolve_precision(config.precision, world.device), config.model.freeze
    model = task.make_model(config, len(classes))
    use_norm(model, norm_of(config))
    account = start_from(initial, model, config.model, config.data, classes) if initial else ""
    if patches is not None:
        whiten(model, patches)
    exact = frozen_weights(model, frozen) if precision == "fp16" else {}
    model = place(model, world, precision)
    model = synchronize_batch_norm(model, world, config.compile) if config.sync_batch_norm else model
    return Network(freeze(model, frozen), exact, account)


def training_patches(task: Task, config: TrainConfig, train: Source) -> Iterator[Tensor]:
    """The images of the first epoch in their full size, the same on all ranks, which decode them each for itself on the CPU."""
    alone = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
    schedule = dataclasses.replace(config.schedule, first_size=1.0)
    config = dataclasses.replace(config, schedule=schedule, accumulate=1, precision="fp32")
    for batch in task.train_batches(config, train, alone):
        yield batch.images


def make_loaders(task: Task, config: TrainConfig, train: Source, val: Source, world: World) -> tuple[Batches, Batches]:
    """Training and validation batches of this rank, from the first."""
    batches = task.train_batches(config, train, world)
    # the average is FP32, the network may be FP16
    dtype = torch.float32 if config.ema_decay else image_dtype(config.precision, world.device)
    batch_size = config.eval.batch_size or config.micro_batch_size(world.size)
    return batches, task.val_batches(config, val, world, batch_size=batch_size, dtype=dtype)
