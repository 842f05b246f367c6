"""The log of a run: sums on the device, one host copy an interval, then progress bar or lines, files and curves.png.

metrics.jsonl has a record a line, the TensorBoard events the same numbers and times, and the config as text; metrics.csv has a
row an epoch.
Only the main rank shows and writes; the others' calls do the sums and return. All ranks must make the same calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from fasttricks.config import ConfigError, UserError, show_name
from fasttricks.runs.curves import draw_curves
from fasttricks.runs.epochs import EpochTable
from fasttricks.runs.loggers import Loggers
from fasttricks.runs.metric import Metric
from fasttricks.runs.records import METRICS, METRICS_FILES, each_record
from fasttricks.system.distributed import World
from fasttricks.system.files import remove_leftovers, temporary_of
from fasttricks.system.output import keep_lost_output, lost_output
from fasttricks.system.progress import progress_bar, time_left
from fasttricks.system.reading import is_there

if TYPE_CHECKING:
    from rich.progress import Task
    from torch.utils.tensorboard import SummaryWriter

TIMINGS = frozenset({"images_per_sec", "unix_time"})
"""The keys of a record that hold times; all others are the same in a resumed run."""
_DRAWN = 20_000
"""Records of steps that a picture is drawn from, at most: more than it has columns of pixels."""

CONSOLE = "console.log"
"""The output after the loss of the terminal, pipe or file behind standard output or error."""


class RunLog:
    """The output of a run, and its records in `folder`.

    add() is part of the training step and never waits for the device. flush(), at every interval, is the only sync.
    A terminal gets a progress bar. A pipe, a file and a terminal that cannot move its cursor get a line at every flush.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        metrics: Sequence[Metric],
        *,
        num_steps: int,
        steps_per_epoch: int,
        loss_parts: Sequence[str] = (),
        config_text: str = "",
        loggers: Loggers | None = None,
    ) -> None:
        """Writes nothing before start().

        metrics: validated() is given them, and curves.png shows them. loss_parts: as TaskFacts has them. config_text: Markdown,
        for TensorBoard. loggers: get each record too; whoever made them ends them.
        """
        from rich.console import Console

        self.folder, self.world = folder, world
        self.steps_per_epoch = steps_per_epoch
        self._metrics, self._loss_parts, self._config_text = metrics, loss_parts, config_text
        # loss over images, images, the parts of the loss
        self._sums = torch.zeros(2 + len(loss_parts), dtype=torch.float64, device=world.device)
        self._started = time.perf_counter()
        self._seconds, self._records, self._pending = 0.0, 0, False  # of the interval, seconds of an earlier process
        self.console = Console(quiet=not world.is_main, soft_wrap=True)
        self._compiling_since, self._compiled_s, self._said = 0.0, 0.0, ""
        self._progress = progress_bar(
            self.console,
            refresh_per_second=4,
            speed_estimate_period=3600,
            get_time=lambda: time.monotonic() - self._compiled_s,
            disable=not self.console.is_interactive,
        )
        self._task = self._progress.add_task("starting", total=num_steps)
        self._told = False
        """console.log says why it is there."""
        self._file: TextIO | None = None
        self._board: SummaryWriter | None = None
        self._epochs = EpochTable()
        self.loggers = loggers or Loggers((), folder, {}, resumed=False)
        self._excepthook = threading.excepthook

    def print(self, line: str) -> None:
        """Print a line above the progress bar; into console.log where standard output is lost."""
        text = show_name(line)
        self.console.print(text, highlight=False, markup=False)
        self.console.file.flush()  # into a pipe or a file too, as it happens
        if self.world.is_main and (reason := lost_output()):
            self.console.quiet = True  # the bar too
            with contextlib.suppress(OSError), open(self.folder / CONSOLE, "a", encoding="utf-8") as file:
                why = (
                    "" if self._told else f"standard output is lost ({reason}); the output of the run continues here\n"
                )
                file.write(f"{why}{text}\n")
                self._told = True

    def start(self, step: int = 0) -> None:
        """Open the files, without the records after `step` updates, show the progress bar, and count time from here."""
        if self.world.is_main:
            keep_lost_output(self.folder / CONSOLE, stdout=False)
            _keep_first(self.folder / METRICS, self._records, self._epochs.add)
            self._epochs.start(self.folder, step)
            self.loggers.start()
            self._file = open(self.folder / METRICS, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (close() closes it)
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._leave_out_tensorboards
            self._board = SummaryWriter(str(self.folder), purge_step=step + 1)
            if self._config_text:
                self._board.add_text("config", self._config_text, step)
            self._progress.update(self._task, completed=step)
            self._progress.advance(self._task, 0)  # the time from which the speed is counted
            self._progress.start()
        self.resume_clock()

    def compiling(self, begins: bool) -> None:
        """Show that torch.compile begins, or has ended. Its time counts for no estimate of the time left. From any thread."""
        if begins:
            self._compiling_since, self._said = time.monotonic(), self._bar.description
            self._progress.update(self._task, description="compiling the network ...")
            if self._shows_lines:
                self.print("compiling the network by torch.compile ... (half a minute to minutes)")
        else:
            self._compiled_s += time.monotonic() - self._compiling_since
            self._progress.update(self._task, description=self._said)

    @property
    def _bar(self) -> Task:
        return self._progress.tasks[self._task]

    @property
    def _shows_lines(self) -> bool:
        return self._progress.disable or bool(lost_output())

    def _leave_out_tensorboards(self, args: threading.ExceptHookArgs) -> None:
        """No traceback of TensorBoard's thread where the disk refuses: it raises the same error again in ours, which names it."""
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            self._excepthook(args)

    def add(self, loss_sum: Tensor, num_images: int | Tensor) -> None:
        """Take in a micro-batch: the loss summed over its images, a scalar or its parts, on the device. No sync.

        In place, and nothing on the host: a step that is replayed holds it.
        """
        self._sums[0] += loss_sum.sum()
        self._sums[1] += num_images
        if self._loss_parts:
            self._sums[2:] += loss_sum

    def stepped(self) -> None:
        """Take in that a step is done, whose time state_dict() then counts."""
        self._pending = True

    def resume_clock(self) -> None:
        """Count training time from here on; flush() stops the count."""
        self._started = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's log stands, for a checkpoint; the records so far are on the disk then. A sync."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        seconds = self._seconds + time.perf_counter() - self._started if self._pending else 0.0
        return {"sums": self._sums.tolist(), "seconds": seconds, "records": self._records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that state_dict() gave on this rank. Before start(). Raises ConfigError for unreadable records."""
        self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
        self._seconds, self._records = state["seconds"], state["records"]
        self._pending = self._seconds > 0
        path = self.folder / METRICS
        if self.world.is_main and self._records and is_there(path) and next(each_record(path), None) is None:
            raise _no_records(path, 0, self._records)  # start() looks at all of them, but by then the folder is taken

    def flush(self, step: int, lr: float, more: Callable[[], Mapping[str, float]] = dict) -> float:
        """Report the steps since the last flush, as means over their images of all ranks; the one sync of training.

        `step` counts the updates done; more() gives further values to record, and may wait for the device. Returns the
        seconds that these steps took.
        """
        loss_sum, images, *parts = self.world.sum_(self._sums.clone()).tolist()
        seconds = self._seconds + time.perf_counter() - self._started
        self._sums.zero_()
        self._seconds, self._pending = 0.0, False
        if not images:
            return seconds
        loss = loss_sum / images
        rate = images / seconds
        named = {name: part / images for name, part in zip(self._loss_parts, parts, strict=True)}
        losses = {"train_loss": loss, **{f"train_loss_{name}": part for name, part in named.items()}}
        self._write(step, {**losses, "lr": lr, "images_per_sec": rate, **more()})
        epoch = step / self.steps_per_epoch
        text = f"epoch {epoch:5.1f}  loss {loss:.3f}  lr {lr:.4g}  {rate:,.0f} imgs/sec"
        self._progress.update(self._task, completed=step, description=text)
        if self._shows_lines:
            shown = "".join(f"  {name} {part:.3f}" for name, part in named.items())
            self.print(f"{text}{shown}  step {step:,} of {self._bar.total:,.0f}  ETA {time_left(self._bar)}")
        self.resume_clock()
        return seconds

    def validated(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a validation after `step` updates."""
        self._write(step, metrics)
        shown = "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())
        self.print(f"epoch {step / self.steps_per_epoch:5.1f}  {shown}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self._file is None or self._board is None:
            return
        now = round(time.time(), 3)
        record = {"step": step, "epoch": step / self.steps_per_epoch, "unix_time": now, **values}
        self._file.write(json.dumps(record) + "\n")
        self._records += 1
        if self._epochs.add(record):
            self._epochs.write(self.folder)
        self.loggers.log(record)
        for name, value in values.items():
            self._board.add_scalar(name, value, step, walltime=now)

    def close(self, *, draw: bool = True) -> None:
        """Take the progress bar away, close the files and draw curves.png, unless told not to; says so where the disk refuses.

        It does not raise then: close() also runs after an error, and must not hide that a full disk lost a checkpoint.
        """
        self._progress.stop()
        if self._file is None or self._board is None:
            return
        try:
            self._file.close()
            self._board.close()
            if draw:
                plot_curves(self.folder, self._metrics)
        except (OSError, ConfigError) as error:
            self.print(f"note: the last records or curves.png could not be written to {self.folder}: {error}")
        finally:
            threading.excepthook = self._excepthook


def _no_records(path: Path, kept: int, count: int) -> UserError:
    return METRICS_FILES.refusal(path, f"line {kept + 1} is no record, of {count} that the checkpoint counts")


def _drawn(folder: Path) -> list[dict[str, Any]]:
    """The records for a picture: those of validations, and of the others as many as it can show, evenly spread."""
    kept: list[dict[str, Any]] = []
    every, seen = 1, 0
    for record, _ in each_record(folder / METRICS):
        if "train_loss" not in record:
            kept.append(record)
            continue
        if seen % every == 0:
            kept.append(record)
        seen += 1
        if seen == every * _DRAWN:
            every *= 2
            steps = [r for r in kept if "train_loss" in r]
            dropped = set(map(id, steps[1::2]))
            kept = [r for r in kept if id(r) not in dropped]
    return kept


def _keep_first(path: Path, count: int, each: Callable[[dict[str, Any]], object]) -> None:
    """Drop all but the first `count` records, which `each` is called with: a resumed run writes the others again.

    Raises ConfigError where there are fewer, unless the file is away: they were on the disk with the checkpoint that counts them.
    """
    remove_leftovers(path.parent, re.escape(path.name))
    temporary, kept = temporary_of(path), 0
    with open(temporary, "wb") as file:
        for record, line in islice(each_record(path), count):
            each(record)
            file.write(line.removesuffix(b"\n") + b"\n")
            kept += 1
    if is_there(path) and kept < count:
        temporary.unlink()
        raise _no_records(path, kept, count)
    os.replace(temporary, path)  # a kill in between loses nothing


def plot_curves(folder: Path, metrics: Sequence[Metric]) -> None:
    """Draw loss, learning rate and `metrics` by epoch from metrics.jsonl as curves.png; nothing where no step was logged."""
    records = _drawn(folder)
    if not any("train_loss" in record for record in records):
        return
    remove_leftovers(folder, r"curves\.png")
    temporary = temporary_of(folder / "curves.png")
    draw_curves(records, metrics, title=show_name(folder.name)).savefig(temporary, dpi=120, format="png")
    os.replace(temporary, folder / "curves.png")  # a pipe of that name would be waited for
