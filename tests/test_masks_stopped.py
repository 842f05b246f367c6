"""A run with worker processes that is stopped or killed: it saves where it can, leaves no process behind, and resumes exactly."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from fasttricks.runs.checkpoint import load_checkpoint
from lib.forked import python_m, running
from lib.states import same
from lib.tiny import SHRINK

OPTIONS = [
    *("segment-ade20k", *SHRINK, "--model.name", "resnet8d", "--segment.base-size", "40", "--data.val-resize", "40"),
    *("--global-batch-size", "8", "--checkpoint-steps", "1", "--no-sync-batch-norm", "--epochs", "10"),
    *("--data.threads", "2", "--data.prefetch", "4"),
]


def train(data: Path, folder: Path, *more: str) -> list[str]:
    return [*OPTIONS, "--data.root", str(data), "--run-dir", str(folder), *more]


@pytest.fixture(scope="module")
def whole(tiny_masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = python_m("fasttricks.train", *train(tiny_masks, folder))
    assert done.returncode == 0, done.stderr
    return folder


def children(pid: int) -> list[int]:
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def is_gone(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_stopped_in_mid_epoch(number: signal.Signals, whole: Path, tiny_masks: Path, tmp_path: Path) -> None:
    """As Ctrl-C and a batch system do it, the signal goes to the workers too; SIGKILL to the run alone."""
    folder = tmp_path / "run"
    with running("fasttricks.train", *train(tiny_masks, folder)) as started:
        until_s = time.monotonic() + 100
        while not (folder / "checkpoints" / "step-0000000002.pt").exists():
            assert started.process.is_alive() and time.monotonic() < until_s, started.wait()
            time.sleep(0.005)
        workers = children(started.pid)
        assert len(workers) >= 2
        for pid in [*workers] * (number != signal.SIGKILL) + [started.pid]:
            os.kill(pid, number)
        done = started.wait()
    time.sleep(0.2)
    assert all(map(is_gone, workers))
    if number != signal.SIGKILL:
        assert f"{number.name}: saving after this step" in done.stdout + done.stderr
        assert "stopped at once" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr and "resume with" in done.stdout + done.stderr
    assert load_checkpoint(folder)["step"] < 30
    resumed = python_m("fasttricks.train", *train(tiny_masks, folder, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    found, want = load_checkpoint(folder), load_checkpoint(whole)
    assert found["step"] == want["step"] == 30
    assert same(found["model"], want["model"]) and same(found["optimizer"], want["optimizer"])
