"""Several ranks, a GPU each: a stop within an epoch and the resumed bits, a rank that is killed, a step's scaling and replay."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from bench import step
from bench.gpu.child import attempt
from bench.gpu.parts import Job, Row
from bench.gpu.runs import RunError, finish, start, stopped_and_left_alone
from bench.gpu.steps import OURS, SMALL_BATCHES, cases
from bench.soak import tiny
from bench.soak.processes import alive, children, last_step, until
from bench.step import FUSED, GRAPHED

KILL_AFTER = 7
"""The step after which a rank is killed: the run has saved within an epoch by then."""
TIMEOUT_S = 30
ROUNDS = 3


def measure(job: Job) -> Iterator[Row]:
    """Rows of the four, which can do without each other."""
    # the micro-batches of the tiny run would have to divide its 24 images too
    more: dict[str, Any] = {"device": job.device, "accumulate": 1, "timeout_s": TIMEOUT_S}
    works: dict[str, Callable[[Path], Iterator[Row]]] = {
        "SIGTERM and resume": lambda folder: stopped_and_left_alone(folder, "fp16", more, job.ranks),
        "a killed rank": partial(killed, more=more, ranks=job.ranks),
        "scaling": lambda _: scaling(job),
        "step as a CUDA graph": lambda _: replayed(job),
    }
    for name, work in works.items():
        with tempfile.TemporaryDirectory() as folder:
            yield from attempt({"work": name}, partial(work, Path(folder)))


def killed(folder: Path, *, more: dict[str, Any], ranks: int) -> Iterator[Row]:
    """kill -9 of the last rank: the seconds until all have ended, and the run resumed from its last save."""
    args = tiny.arguments(tiny.write_images(folder / "data"), folder / "run", "fp16", **more)
    log = folder / "log"
    process = start(args, log, ranks)
    if not until(lambda: last_step(folder / "run") >= KILL_AFTER, lambda: process.poll() is None):
        raise RunError(f"it ended before a rank could be killed:\n{log.read_text(errors='replace')[-8000:]}")
    pids = children(process.pid)
    os.kill(pids[ranks - 1], signal.SIGKILL)
    seconds, code = seconds_until_ended(process, list(pids.values()))
    yield {"run": f"rank {ranks - 1} of {ranks} killed", "s until all ended": seconds, "exit code": code}
    if code == 0:
        raise RunError("torchrun ended with exit code 0 though a rank was killed")
    finish(start([*args, "--resume"], log, ranks), log)
    yield {"run": "resumed", "digest": tiny.digest(folder / "run")}


def seconds_until_ended(process: subprocess.Popen[bytes], ranks: list[int]) -> tuple[float, int]:
    """Seconds until the launcher and every rank are gone, and the launcher's exit code. Raises TimeoutError."""
    started = time.monotonic()
    until(lambda: process.poll() is not None and not any(map(alive, ranks)), lambda: True, 2 * TIMEOUT_S)
    return time.monotonic() - started, process.wait()


def scaling(job: Job) -> Iterator[Row]:
    """imgs/sec on one rank and on all, the same images a rank, in alternation."""
    case = cases(job)[0]
    rates: dict[int, list[float]] = {1: [], job.ranks: []}
    with mock.patch.object(step, "CONTESTANTS", {OURS: step.CONTESTANTS[OURS]}):
        for index in range(1 if job.tiny else ROUNDS):
            for ranks in list(rates) if index % 2 == 0 else list(rates)[::-1]:
                one = replace(case, ranks=ranks, batch_size=case.batch_size * ranks)
                with step.contestants(one) as turns:
                    turns[OURS]()  # does not count: it builds and warms
                    rates[ranks].append(turns[OURS]())
    for ranks, taken in rates.items():
        ratio = statistics.median(a / b for a, b in zip(taken, rates[1], strict=True))
        yield {
            "run": f"{case.model}, {case.batch_size} images a rank, {ranks} rank(s)",
            "imgs/sec": statistics.median(taken),
            "of ranks x one": ratio / ranks,
        }


def replayed(job: Job) -> Iterator[Row]:
    """imgs/sec of all ranks at a small batch, in alternation: launched, and replayed with the sums of the gradients inside."""
    size = 2 if job.tiny else SMALL_BATCHES[0]
    case = replace(cases(job)[0], ranks=job.ranks, batch_size=size * job.ranks, deterministic="off")
    rates: dict[str, list[float]] = {FUSED: [], GRAPHED: []}
    with ExitStack() as stack:
        turns = {name: stack.enter_context(step.processes_of("bench.step", name, case)) for name in rates}
        for turn in turns.values():
            turn()  # does not count: it warms
        for index in range(1 if job.tiny else ROUNDS):
            for name in list(turns) if index % 2 == 0 else list(turns)[::-1]:
                rates[name].append(turns[name]())
    for name, taken in rates.items():
        yield {
            "run": f"{case.model}, {size} images a rank, {job.ranks} ranks, {name}",
            "imgs/sec": statistics.median(taken),
            "of launched": statistics.median(a / b for a, b in zip(taken, rates[FUSED], strict=True)),
        }
