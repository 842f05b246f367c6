"""A run with worker processes that is stopped or killed: it saves where it can, leaves no process behind, and resumes exactly."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fasttricks.data.masks.loader import MaskLoader
from fasttricks.data.masks.places import open_masks
from fasttricks.runs.checkpoint import load_checkpoint
from lib.forked import python_m, running
from lib.segmented import config_for
from lib.states import same
from lib.tiny import ALONE, DETECT, SHRINK

FOR_LONG = shlex.split("--epochs 10 --checkpoint-steps 1 --data.threads 2 --data.prefetch 4")
OPTIONS = {
    "segmentation": [
        *(
            "segment-ade20k",
            *SHRINK,
            "--model.name",
            "resnet8d",
            "--segment.base-size",
            "40",
            "--data.val-resize",
            "40",
        ),
        *("--global-batch-size", "8", "--no-sync-batch-norm", *FOR_LONG),
    ],
    "detection": ["detect-voc", *DETECT, *FOR_LONG],
}
"""A run of 30 steps, of each task whose images come from processes."""


def train(task: str, data: Path, folder: Path, *more: str) -> list[str]:
    return [*OPTIONS[task], "--data.root", str(data), "--run-dir", str(folder), *more]


@pytest.fixture(scope="module")
def data_of(tiny_masks: Path, tiny_boxes: Path) -> dict[str, Path]:
    return {"segmentation": tiny_masks, "detection": tiny_boxes}


@pytest.fixture(scope="module")
def whole(data_of: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run folder of a run of a task that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")

    @cache
    def make(task: str) -> Path:
        done = python_m("fasttricks.train", *train(task, data_of[task], folder / task))
        assert done.returncode == 0, done.stderr
        return folder / task

    return make


def children(pid: int) -> list[int]:
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def is_gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def all_gone(pids: list[int], *, within_s: float) -> bool:
    until_s = time.monotonic() + within_s
    while not all(map(is_gone, pids)) and time.monotonic() < until_s:
        time.sleep(0.01)
    return all(map(is_gone, pids))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("task", OPTIONS)
def test_stopped_in_mid_epoch(
    task: str, number: signal.Signals, whole: Callable[[str], Path], data_of: dict[str, Path], tmp_path: Path
) -> None:
    """As Ctrl-C and a batch system do it, the signal goes to the workers too; SIGKILL to the run alone."""
    folder, data = tmp_path / "run", data_of[task]
    with running("fasttricks.train", *train(task, data, folder)) as started:
        until_s = time.monotonic() + 100
        while not (folder / "checkpoints" / "step-0000000002.pt").exists():
            assert started.process.is_alive() and time.monotonic() < until_s, started.wait()
            time.sleep(0.005)
        workers = children(started.pid)
        assert len(workers) >= 2
        for pid in [*workers] * (number != signal.SIGKILL) + [started.pid]:
            os.kill(pid, number)
        done = started.wait()
    assert all_gone(workers, within_s=4), "torch's own watch takes five seconds"
    if number != signal.SIGKILL:
        assert f"{number.name}: saving after this step" in done.stdout + done.stderr
        assert "stopped at once" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "resume with" in done.stdout + done.stderr
    assert load_checkpoint(folder)["step"] < 30
    resumed = python_m("fasttricks.train", *train(task, data, folder, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    found, want = load_checkpoint(folder), load_checkpoint(whole(task))
    assert found["step"] == want["step"] == 30
    assert same(found["model"], want["model"]) and same(found["optimizer"], want["optimizer"])


def test_workers_end_with_a_loader_that_the_collector_takes(tiny_masks: Path, tmp_path: Path) -> None:
    """As after an error, whose traceback refers to itself. They are deaf to SIGTERM, by which torch would end them at last."""
    config = config_for(tiny_masks, tmp_path)
    loader = MaskLoader(
        open_masks(config.data)[0],
        config.data,
        config.segment,
        training=True,
        batch_size=4,
        device=ALONE.device,
        workers=1,
    )
    before = children(os.getpid())
    batches = iter(loader)
    assert len(next(batches)) == 4
    workers = [pid for pid in children(os.getpid()) if pid not in before]
    assert len(workers) == 1
    cycle: list[object] = [loader, batches]
    cycle.append(cycle)
    del loader, batches, cycle
    began_s = time.monotonic()
    gc.collect()
    try:
        assert all_gone(workers, within_s=4) and time.monotonic() - began_s < 5, (
            "torch would wait five seconds for each"
        )
    finally:
        for pid in workers:
            if not is_gone(pid):
                os.kill(pid, signal.SIGKILL)
