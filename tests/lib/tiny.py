"""Runs small enough for a test: a few dozen drawn JPEGs, a network of a few thousand weights, and ways to start a command."""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from fasttricks.config import TrainConfig, get_at, replace_fields
from fasttricks.config.cli import parse_recipe
from fasttricks.system.command import run_main
from fasttricks.system.distributed import World

torch.set_num_threads(1)  # these networks are too small for more, and the tests share few cores

REPOSITORY = Path(__file__).parents[2]
ALONE = World.alone(torch.device("cpu"))
SHRINK = shlex.split(
    "--epochs 2 --global-batch-size 16 --schedule.warmup-epochs 0 --data.image-size 32 --data.val-resize 36 "
    "--data.threads 1 --device cpu --model.width 0.125 --log-steps 1"
)
DETECT = shlex.split(
    "--epochs 2 --global-batch-size 4 --schedule.step-epochs 1.5 --data.threads 1 --device cpu --log-steps 1 --ema-decay 0.5 "
    "--checkpoint-steps 1 --model.name resnet8d --model.width 0.125 --model.freeze --detect.base-size 40 --detect.max-size 60 "
    "--detect.channels 8 --detect.head-features 16 --detect.train-proposals 40 --detect.test-proposals 40 "
    "--detect.train-samples 8"
)
"""A detection of a few dozen steps a second; from random weights, so nothing is frozen."""
DETECTING = shlex.split(
    "--task detection --data.area 0.08 1 --data.aspect 0.75 1.3333333333333333 --data.image-size 224 --data.val-resize 256 "
    "--loss.smoothing 0 --eval.no-flip --eval.batch-size 0 --global-batch-size 4 --detect.base-size 40 --detect.max-size 60 "
    "--detect.channels 8 --detect.head-features 8 --detect.train-proposals 40 --detect.test-proposals 40 "
    "--detect.train-samples 8"
)
"""The recipe cifar10 as a detection."""
NOWHERE = "nowhere"
SEGMENT = shlex.split(
    "--task segmentation --data.area 0.08 1 --data.aspect 0.75 1.3333333333333333 --segment.base-size 32 --loss.smoothing 0"
)
"""The recipe cifar10 as a segmentation."""
SMALLEST = [*SHRINK, "--model.name", "resnet8d"]


class FinishedRun(NamedTuple):
    """A run that went to its end, and what the terminal showed of it."""

    folder: Path
    data: Path
    args: list[str]
    shown: str


def write_images(
    root: Path,
    *,
    train: int,
    val: int,
    classes: Sequence[str] = ("ant", "bee", "cat"),
    sides: tuple[int, int] = (40, 60),
) -> Path:
    """A data set at `root`: noise with a colour for each class, its height and width drawn from `sides`, in pixels."""
    from PIL import Image  # a machine without the extras imports this file too

    draws = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            label = index % len(classes)
            folder = root / split / classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = draws.integers(0, 256, (*draws.integers(*sides, 2, endpoint=True), 3))
            pixels[..., label % 3] //= 2
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.jpg", quality=90)
    return root


def arguments(
    data: Path, run_dir: Path, *more: str, recipe: str = "cifar10", shrink: Sequence[str] = SMALLEST
) -> list[str]:
    """Arguments of fasttricks.train for a run of seconds; `more` wins over what makes it small."""
    return [recipe, *shrink, "--data.root", str(data), "--run-dir", str(run_dir), *more]


def configure(data: Path, run_dir: Path, *more: str, **changes: Any) -> TrainConfig:
    """The config of such a run, read as the command line reads it, then with the fields `changes`."""
    config = _read(more)
    places = {"data.root": str(data), "run_dir": str(run_dir)}
    # `more` may name them too
    config = replace_fields(config, {path: place for path, place in places.items() if get_at(config, path) == NOWHERE})
    return dataclasses.replace(config, **changes)


@functools.cache
def _read(more: tuple[str, ...]) -> TrainConfig:
    """Reading takes a tenth of a second, which many tests would spend on the same words."""
    return parse_recipe(arguments(Path(NOWHERE), Path(NOWHERE), *more), prog="test")


def call(main: Callable[[Sequence[str]], object], *args: str) -> int:
    """The exit code of the entry point `main` with `args`, run in this process, which saves the seconds that a new one takes.

    It draws no curves, half a second a run, and leaves malloc as it is, which it would change for the tests' process for good.
    """
    with (
        mock.patch.object(sys, "argv", ["prog", *args]),
        mock.patch("fasttricks.runs.log.plot_curves"),
        mock.patch("fasttricks.system.distributed.keep_freed_memory"),
    ):
        try:
            run_main(main)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def environment(**more: str) -> dict[str, str]:
    """That of a new process: both packages, installed or not, this Python's commands as if activated, and one thread."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    commands = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": commands, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def torchrun(ranks: int, module: str, *args: str) -> subprocess.CompletedProcess[str]:
    """`module` on so many ranks of this machine, on a port of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", module, *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)


def on_terminal(*command: str, until: str = "", keys: bytes = b"") -> tuple[int, str]:
    """(exit code, all that was shown) of `command` on a terminal of 120 columns; `keys` are typed once `until` is read."""
    main, terminal = pty.openpty()
    env = environment(COLUMNS="120", LINES="40", TERM="xterm-256color")
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=env, preexec_fn=own_terminal
    )
    os.close(terminal)
    shown = b""
    with open(main, "rb", buffering=0) as screen:
        while True:
            try:
                part = screen.read(65536)
            except OSError:  # how Linux says that the terminal's other end was closed
                break
            if not part:
                break
            shown += part
            if keys and until.encode() in shown:
                os.write(main, keys)
                keys = b""
    return process.wait(timeout=60), shown.decode()


def own_terminal() -> None:
    """Make standard input the terminal that this new process is controlled from, so that Ctrl-C reaches it as a signal."""
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # tests started in the background have it ignored, and their children too
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
