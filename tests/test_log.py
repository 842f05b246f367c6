"""What a run leaves: JSON lines, TensorBoard events that TensorBoard reads, a picture; and what a kill or NaN does to it."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from fasttricks.learning.divergence import LossGuard
from fasttricks.runs import log
from fasttricks.runs import log as log_module
from fasttricks.runs.log import TIMINGS, RunLog, plot_curves
from fasttricks.runs.records import METRICS_FILES, read_metrics
from fasttricks.system.distributed import World
from fasttricks.tasks.classification import CLASSIFICATION

CPU = torch.device("cpu")
MAIN = World.alone(CPU)


def open_log(
    folder: Path, world: World = MAIN, *, first_step: int = 0, state: dict[str, Any] | None = None, **more: Any
) -> RunLog:
    log = RunLog(folder, world, CLASSIFICATION.metrics_of(10), num_steps=20, steps_per_epoch=5, **more)
    if state is not None:
        log.load_state_dict(state)
    log.start(first_step)
    return log


def log_step(log: RunLog, step: int, loss: float = 2.0, images: int = 4) -> None:
    log.add(torch.tensor(loss * images), images)
    log.flush(step, 0.1 * step)


def train(
    folder: Path, first: int, last: int, *, close: bool = True, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Steps first + 1 to last, with a validation after each epoch of five; returns the log's state after step 5."""
    log, state_after_5 = open_log(folder, first_step=first, state=state), {}
    for step in range(first + 1, last + 1):
        log_step(log, step, loss=3 - step / 10)
        if step % 5 == 0:
            log.validated(step, {"top1": 10.0 * step / 5, "top5": 50.0 + step, "val_loss": 2 - step / 10})
        if step == 5:
            state_after_5 = log.state_dict()
    if close:
        log.close()
    return state_after_5


@pytest.fixture(autouse=True)
def _no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a second: only where the picture is what is tested."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(log_module, "plot_curves", lambda *_: None)


# --------------------------------------------------------------------------------------------------- metrics.jsonl


def test_a_record_a_line(tmp_path: Path) -> None:
    train(tmp_path, 0, 5)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert read_metrics(tmp_path) == records
    assert [(r["step"], r["epoch"]) for r in records] == [(s, s / 5) for s in (1, 2, 3, 4, 5, 5)]
    assert [sorted(r) for r in records[:1] + records[-1:]] == [
        ["epoch", "images_per_sec", "lr", "step", "train_loss", "unix_time"],
        ["epoch", "step", "top1", "top5", "unix_time", "val_loss"],
    ]
    times = [r["unix_time"] for r in records]
    assert times == sorted(times) and time.time() - 60 < times[0] <= times[-1] <= time.time()
    assert [r["train_loss"] for r in records[:-1]] == pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5])
    assert [r["lr"] for r in records[:-1]] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(r["images_per_sec"] > 0 for r in records[:-1])


def test_the_mean_weighs_micro_batches_by_their_images(tmp_path: Path) -> None:
    """Losses come as sums over images of micro-batches of 4, 1 and 0 images."""
    log = open_log(tmp_path)
    losses = [1.0, 2.0, 3.0, 4.0, 90.0]
    for part in (losses[:4], losses[4:], []):
        log.add(torch.tensor(sum(part)), len(part))
    log.flush(1, 0.1)
    log_step(log, 2, loss=7.0)  # the sums start anew
    log.close()
    assert [r["train_loss"] for r in read_metrics(tmp_path)] == [np.mean(losses), 7.0]


@dataclass(frozen=True)
class TwoRanks(World):
    """A world in which the other rank had two images of loss 10 each."""

    def sum_(self, values: Tensor) -> Tensor:
        return values.add_(torch.tensor([20.0, 2.0], dtype=values.dtype))


def test_the_mean_is_over_the_images_of_all_ranks_and_one_of_them_writes(tmp_path: Path) -> None:
    for rank in (1, 0):
        folder = tmp_path / str(rank)
        folder.mkdir()
        log = open_log(folder, TwoRanks(rank=rank, size=2, local_rank=rank, local_size=2, device=CPU))
        log_step(log, 1, loss=1.0, images=6)
        log.validated(1, {"top1": 1.0, "top5": 2.0, "val_loss": 3.0})
        log.close()
    assert list((tmp_path / "1").iterdir()) == []
    assert read_metrics(tmp_path / "0")[0]["train_loss"] == (6 * 1 + 2 * 10) / 8


@pytest.mark.parametrize("skip", [False, True])
def test_parts_of_a_loss_are_means_over_the_images_of_all_ranks(
    skip: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of micro-batches of 6 and 2 images; a bad one that is skipped counts in none. A resumed log has those before the save."""
    log = open_log(tmp_path, loss_parts=("near", "far"))
    guard = LossGuard(MAIN, limit=0.0, skip=skip)
    for images, parts in [(6, [1.0, 2.0]), *([(3, [float("nan"), 1.0])] if skip else []), (2, [9.0, 10.0])]:
        loss, counted = guard.judge(torch.tensor(parts, requires_grad=True) * images, images, step=0)
        assert loss.shape == () and bool(loss.isfinite()) == (sum(parts) == sum(parts))
        log.add(*counted)
        state = log.state_dict()
    log.flush(1, 0.1)
    log.close()
    (record,) = read_metrics(tmp_path)
    near, far = (6 * 1 + 2 * 9) / 8, (6 * 2 + 2 * 10) / 8
    assert [record[name] for name in ("train_loss", "train_loss_near", "train_loss_far")] == [near + far, near, far]
    assert "  near 3.000  far 4.000  step 1 of 20" in capsys.readouterr().out
    (tmp_path / "again").mkdir()
    resumed = open_log(tmp_path / "again", state=state, loss_parts=("near", "far"))
    resumed.flush(1, 0.1)
    resumed.close()
    assert read_metrics(tmp_path / "again")[0]["train_loss_far"] == far


def test_float64_sums_lose_nothing_over_a_long_interval(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add(torch.tensor(2.0**24), 1)
    for _ in range(1000):
        log.add(torch.tensor(1.0), 1)  # float32 would drop each
    log.flush(1, 0.1)
    log.close()
    assert read_metrics(tmp_path)[0]["train_loss"] == (2**24 + 1000) / 1001


def test_a_flush_without_images_says_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.flush(1, 0.1) >= 0
    log.close()
    assert read_metrics(tmp_path) == []


def test_flush_gives_the_seconds_since_the_clock_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now)
    log = open_log(tmp_path)
    now = 110.0  # building the rest does not count
    log.resume_clock()
    now = 112.0
    log.add(torch.tensor(1.0), 8)
    assert log.flush(1, 0.1) == 2.0
    now = 115.0
    log.add(torch.tensor(1.0), 8)
    assert log.flush(2, 0.1) == 3.0
    log.close()
    assert [r["images_per_sec"] for r in read_metrics(tmp_path)] == [8 / 2, 8 / 3]


# ------------------------------------------------------------------------------------------------------- metrics.csv


def epochs(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text("utf-8").splitlines()))


def test_a_row_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals of 2, 2 and 1 steps and 8, 4 and 1 s; the second epoch is not validated; of the third, nothing is ended."""
    now = [0.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now[0])
    log = open_log(tmp_path)
    assert epochs(tmp_path) == []
    for last, steps, seconds, loss in [
        (2, 2, 8, 3.0), (4, 2, 4, 2.0), (5, 1, 1, 1.0), (7, 2, 2, 4.0), (10, 3, 2, 1.0), (11, 1, 1, 9.0),
    ]:  # fmt: skip
        log.add(torch.tensor(loss * 4 * steps), 4 * steps)
        now[0] += seconds
        log.flush(last, 0.1 * last)
        if last == 5:
            log.validated(5, {"top1": 40.0, "top5": 90.0, "val_loss": 1.5})
    log.close()
    first = {"epoch": "1", "step": "5", "lr": "0.5", "train_loss": str((2 * 3 + 2 * 2 + 1) / 5)}
    second = {"epoch": "2", "step": "10", "lr": "1.0", "train_loss": str((2 * 4 + 3) / 5)}
    assert epochs(tmp_path) == [
        first | {"images_per_sec": str(20 / 13), "top1": "40.0", "top5": "90.0", "val_loss": "1.5"},
        second | {"images_per_sec": str(20 / 4), "top1": "", "top5": "", "val_loss": ""},
    ]


# ---------------------------------------------------------------------------------------------------------- resume


def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """Killed at step 8 in the middle of a line, resumed from the checkpoint of step 5."""

    def without_speed(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k not in TIMINGS} for r in read_metrics(folder)]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    train(whole, 0, 10)
    state = train(parts, 0, 8)
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epo')
    assert read_metrics(parts)[-1]["step"] == 8
    for name in ("jsonl", "csv"):
        (parts / f".metrics.{name}.4711.tmp").touch()  # what a kill may leave
    train(parts, 5, 10, state=state)
    assert without_speed(parts) == without_speed(whole)
    assert (parts / "metrics.jsonl").read_text().endswith("}\n")
    rows, expected = epochs(parts), epochs(whole)
    assert [row | {"images_per_sec": ""} for row in rows] == [row | {"images_per_sec": ""} for row in expected]
    assert len(rows) == 2 and not list(parts.glob(".*"))


def test_a_log_goes_on_within_an_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches and 3 s before the kill, one and 4 s after it: one record of all three, and of 7 s."""
    now = [10.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: now[0])
    log = open_log(tmp_path)
    log.resume_clock()
    log.add(torch.tensor(8.0), 4)
    log.add(torch.tensor(4.0), 4)
    log.stepped()
    now[0] += 3
    state = log.state_dict()
    log.close()
    now[0] += 1000
    log = open_log(tmp_path, first_step=1, state=state)
    log.resume_clock()
    log.add(torch.tensor(3.0), 2)
    now[0] += 4
    assert log.flush(2, 0.1) == 7.0
    log.close()
    (record,) = read_metrics(tmp_path)
    assert (record["train_loss"], record["images_per_sec"]) == (1.5, 10 / 7)


def test_a_run_that_starts_over_starts_an_empty_log(tmp_path: Path) -> None:
    train(tmp_path, 0, 3)
    train(tmp_path, 0, 1)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]


def test_no_log_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


# ----------------------------------------------------------------------------------------------- TensorBoard, screen


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_what_metrics_jsonl_says(tmp_path: Path) -> None:
    train(tmp_path, 0, 10)
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = [r for r in read_metrics(tmp_path) if "train_loss" in r]
    assert [e.wall_time for e in events.Scalars("train_loss")] == [r["unix_time"] for r in losses]
    found = scalars(tmp_path)
    assert sorted(found) == ["images_per_sec", "lr", "top1", "top5", "train_loss", "val_loss"]
    for tag, points in found.items():
        want = [(r["step"], r[tag]) for r in read_metrics(tmp_path) if tag in r]
        assert [step for step, _ in points] == [step for step, _ in want]
        assert [value for _, value in points] == pytest.approx([value for _, value in want], rel=1e-6)


def test_tensorboard_drops_the_steps_that_a_resumed_run_does_again(tmp_path: Path) -> None:
    train(tmp_path, 0, 8)
    train(tmp_path, 5, 10)
    assert [step for step, _ in scalars(tmp_path)["train_loss"]] == list(range(1, 11))


def test_in_a_pipe_each_report_is_a_line_that_ends_with_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four images in 2 s a step, of 20: 16 steps and 32 s are left after the fourth. Then torch.compile takes 100 s, which count
    for no step."""
    now = [10.0]
    for clock in ("perf_counter", "monotonic"):
        monkeypatch.setattr(log_module.time, clock, lambda: now[0])
    log = open_log(tmp_path)
    for step in (1, 2, 3, 4):
        now[0] += 2
        log_step(log, step)
    log.compiling(True)
    now[0] += 100
    log.compiling(False)
    log.resume_clock()
    now[0] += 2
    log_step(log, 5)
    log.validated(5, {"top1": 12.345, "top5": 67.0, "val_loss": 1.5})
    log.print("[bold] runs/x [/bold]")
    log.close()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].endswith("step 1 of 20  ETA 0:00:38")
    assert shown[3:] == [
        "epoch   0.8  loss 2.000  lr 0.4  2 imgs/sec  step 4 of 20  ETA 0:00:32",
        "compiling the network by torch.compile ... (half a minute to minutes)",
        "epoch   1.0  loss 2.000  lr 0.5  2 imgs/sec  step 5 of 20  ETA 0:00:30",
        "epoch   1.0  top1 12.35  top5 67.00  val_loss 1.50",
        "[bold] runs/x [/bold]",  # a path with brackets is no markup
    ]


def test_on_a_terminal_the_bar_has_the_report_and_no_line_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("COLUMNS", "60")
    log = open_log(tmp_path)
    log.compiling(True)
    log._progress.refresh()
    compiling = capsys.readouterr().out
    log.compiling(False)
    log_step(log, 10)
    log.close()
    shown = capsys.readouterr().out
    assert "compiling the network ..." in compiling and "half a minute" not in compiling
    assert "compiling" not in shown
    assert "epoch   2.0  loss 2.000  lr 1  " in shown and "10/20" in shown and "ETA" not in shown


def test_a_disk_that_is_full_at_the_end_hides_no_earlier_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log_module, "plot_curves", refuse)
    log = open_log(tmp_path)
    log_step(log, 1)
    log.close()
    assert "No space left on device" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ curves.png


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_the_picture_is_drawn_and_shows_the_curves(tmp_path: Path) -> None:
    train(tmp_path, 0, 20)
    drawn = pixels(tmp_path / "curves.png")
    assert drawn.shape == (432, 1440, 3)
    for third, colors in enumerate([("1f77b4", "ff7f0e"), ("2ca02c",), ("1f77b4", "ff7f0e")]):
        part = drawn[:, 480 * third : 480 * (third + 1)].reshape(-1, 3)
        for color in colors:
            assert (part == list(bytes.fromhex(color))).all(1).sum() > 100


def test_the_picture_of_a_run_without_validation_or_without_a_step(tmp_path: Path) -> None:
    plot_curves(tmp_path, CLASSIFICATION.metrics_of(10))
    assert not (tmp_path / "curves.png").exists()
    train(tmp_path, 0, 1)
    assert pixels(tmp_path / "curves.png").shape == (432, 1440, 3)


def test_more_records_than_memory_should_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer file than any that is read at once: a resumed run keeps its records, a picture is drawn from an even choice."""
    lines = [json.dumps({"step": step, "epoch": step / 10, "train_loss": 1.0, "lr": 0.1}) for step in range(3000)]
    lines.insert(70, json.dumps({"step": 69, "epoch": 6.9, "val_loss": 2.0}))
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines, '{"step": 3000, "epo']))
    assert path.stat().st_size > METRICS_FILES.max_bytes
    log._keep_first(path, 2999, lambda _: None)
    assert path.read_text().splitlines() == lines[:2999]
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(log, "_DRAWN", 100)
    drawn = log._drawn(tmp_path)
    steps = [record["step"] for record in drawn if "train_loss" in record]
    assert steps == list(range(0, 2998, 32)) and 50 <= len(steps) < 100
    assert [record["step"] for record in drawn if "val_loss" in record] == [69]
