"""A run of an ablation: a process of its own, by the code of `python -m fasttricks.train`.

It is forked from a server that has torch and DALI imported and nothing else done, which saves their seconds.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from fasttricks.ablation.jobs import RESULT, Job
from fasttricks.config import ConfigError, TrainConfig, UserError, from_dict, show_name
from fasttricks.config.cli import arguments_of
from fasttricks.learning.divergence import DivergedError
from fasttricks.learning.placement import place
from fasttricks.learning.precision import image_dtype, make_autocast, resolve_precision
from fasttricks.runs.folder import versions, write_json
from fasttricks.runs.saved import read_saved
from fasttricks.system.distributed import join_world, keep_freed_memory
from fasttricks.system.process import deaf_children
from fasttricks.system.reading import Reader
from fasttricks.system.schema import anything, table
from fasttricks.system.signals import StopRequest
from fasttricks.tasks import find_task
from fasttricks.trainer import Stopped, fit
from fasttricks.training.build import build

PRELOAD = [
    "fasttricks.ablation.worker",
    "fasttricks.data.pipeline.loader",
    "fasttricks.system.bars",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch._dynamo",
    "torch.utils.tensorboard",
]
"""The modules that a run imports, also those that it imports late: torch's optimizers import torch._dynamo at their first use."""
_SUMMARIES = Reader(
    ConfigError, "must be as fasttricks.train wrote it", "remove the run's folder, and it is done again"
)


def run_job(job: Job) -> str:
    """Train `job` in a process of its own, from the end of an earlier one. Returns the error, '' for none.

    The trainer's output is in a log beside the run's folder. Ctrl-C and SIGTERM end the process too.
    """
    config = dataclasses.replace(job.config, resume=job.folder.is_dir())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_train, args=(dataclasses.asdict(config), job.ranks, job.split, str(job.log)))
    resource_tracker.ensure_running()  # it would unblock the signals
    with deaf_children(signal.SIGINT, signal.SIGHUP):  # this one alone ends them, in order
        process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        process.join()
        raise
    if process.exitcode == 0:
        return ""
    lines = job.log.read_text("utf-8", "replace").strip().splitlines() if job.log.is_file() else []
    last = lines[-1].strip() if lines else f"exit status {process.exitcode}"
    return f"{last} ({job.log})"


def _train(values: dict[str, Any], ranks: int, split: str, log: str) -> None:
    """The process of a run, as train.main, with its output in `log`."""
    if ranks == 1:
        _end_with_parent()
    with open(log, "a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = from_dict(TrainConfig, json.loads(json.dumps(values)))
    folder = Path(config.run_dir)
    try:
        try:
            outcome = _fit(config) if ranks == 1 else _torchrun(config, ranks)
            if split != "val":
                outcome = _on_split(config, split, outcome)
        except DivergedError as error:
            outcome = {"diverged": str(error)}
        write_json(folder / RESULT, outcome | {"cpu_seconds": _cpu_seconds(), "ranks": ranks, "versions": versions()})
    except Stopped as stopped:
        print(f"stopped {stopped}", flush=True)
        os._exit(1)
    except UserError as error:
        print(show_name(f"error: {error}"), file=sys.stderr, flush=True)
        os._exit(2)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _fit(config: TrainConfig) -> dict[str, Any]:
    keep_freed_memory()
    with join_world(config.device, config.timeout_s) as world:
        stop = StopRequest(world)
        with stop.listening():
            return fit(build(config, world, stop))


def _torchrun(config: TrainConfig, ranks: int) -> dict[str, Any]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with subprocess.Popen([*launcher, "-m", "fasttricks.train", *arguments_of(config)]) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        _end_with_parent(process.kill)  # its ranks end with it
        status = process.wait()
    if status:
        raise UserError(f"torchrun ended with status {status}")
    result: dict[str, Any] = _SUMMARIES.json(Path(config.run_dir) / "summary.json", table(anything))
    return result


def _on_split(config: TrainConfig, split: str, summary: dict[str, Any]) -> dict[str, Any]:
    """`summary` with the metrics of its last checkpoint over another split in place of those of validation, which it keeps too.

    On one process, each image once: of the averaged weights where the run kept an average, as validation.
    """
    saved = read_saved(Path(config.run_dir))
    with join_world(config.device, config.timeout_s) as world:
        task, precision = find_task(saved.task), resolve_precision(config.precision, world.device)
        stored = "fp32" if config.ema_decay else precision  # an average is FP32
        dtype, model = image_dtype(stored, world.device), place(saved.network(), world, stored)
        source = task.open_split(config.data, split, saved.classes)
        size = config.eval.batch_size or config.micro_batch_size(1)
        batches = task.val_batches(config, source, world, batch_size=size, dtype=dtype)
        found = task.evaluate(model, batches, world, config, make_autocast(precision, world.device))
    names = [metric.name for metric in task.metrics_of(len(saved.classes))]
    kept = {name: summary[name] for name in names if name in summary}
    return {**summary, **{name: found[name] for name in names}, "validation": kept}


def _cpu_seconds() -> float:
    """CPU seconds of this process and its children, all threads; not those of an earlier, interrupted process."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def _end_with_parent(end: Callable[[], object] | None = None) -> None:
    """End this process, after end(), where the ablation was killed: two would train in one folder once it is started again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        if end is not None:
            end()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tidy(job: Job, *, keep_checkpoints: bool) -> None:
    """Remove the files of a finished run that are no longer needed."""
    if not keep_checkpoints:
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
