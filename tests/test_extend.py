"""A finished run goes on to more epochs; one that ended before its first checkpoint gives its folder to the mended command."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttricks.commands import train
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.folder import read_config
from fasttricks.runs.stored import checkpoints, newest_checkpoint
from fasttricks.tasks import classification
from lib.states import same
from lib.tiny import arguments, call

STEPS = 3  # an epoch


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rates(run: Path) -> list[float]:
    return [record["lr"] for record in metrics_of(run) if "lr" in record]


def cosine(peak: float, epochs: int) -> list[float]:
    """Of every step of a run, by numpy."""
    return (peak * (1 + np.cos(np.pi * np.arange(epochs * STEPS) / (epochs * STEPS))) / 2).tolist()


def state(run: Path) -> dict[str, Any]:
    found = load_checkpoint(run)
    for rank in found["ranks"]:
        del rank["log"]["seconds"]
    when = {"extended": [{**one, "when": ""} for one in json.loads(found["extended"])]}
    return {n: v for n, v in found.items() if n not in ("path", "config", "train_seconds")} | when


def test_a_finished_run_is_extended_on_the_schedule_of_its_new_length(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    args = arguments(tiny_data, run, "--epochs", "2", "--ema-decay", "0.9")
    assert call(train.main, *args) == 0
    finished = newest_checkpoint(run / "checkpoints")
    assert finished is not None
    whole, peak = finished.read_bytes(), rates(run)[0]
    capsys.readouterr()
    assert call(train.main, *args, "--epochs", "5", "--resume") == 0
    assert rates(run) == pytest.approx(cosine(peak, 2) + cosine(peak, 5)[2 * STEPS :])
    said = capsys.readouterr().out
    next_rate = f"{cosine(peak, 5)[2 * STEPS]:.4g}"
    assert f"extended from 2 to 5 epochs: the schedule is from here on that of 5, lr {next_rate} in the" in said
    assert f"the finished run's checkpoint is kept as {run}/checkpoints/epochs-2.pt" in said
    assert (run / "checkpoints" / "epochs-2.pt").read_bytes() == whole and not finished.exists()
    summary, made = (json.loads((run / name).read_text()) for name in ("summary.json", "config.json"))
    assert (summary["epochs"], summary["steps"], made["config"]["epochs"]) == (5, 15, 5)
    (record,) = summary["extended"]
    assert {n: v for n, v in record.items() if n != "when"} == {"from_epochs": 2, "to_epochs": 5, "step": 6}
    assert record["when"].startswith("20") and [record] == made["extended"]
    saved = load_checkpoint(run)
    assert json.loads(saved["fingerprint"])["epochs"] == 5 and json.loads(saved["extended"]) == [record]


@pytest.mark.slow
def test_an_extension_that_is_killed_goes_on_bit_for_bit_and_can_be_extended_again(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first checkpoint and after it."""
    for name, kills in (("whole", ()), ("killed", (0, 3))):
        args = arguments(tiny_data, tmp_path / name, "--checkpoint-steps", "2", "--resume")
        assert call(train.main, *args, "--epochs", "1") == 0
        for after in kills:
            kill_after(after, monkeypatch, *args, "--epochs", "3")
        assert call(train.main, *args, "--epochs", "3") == 0
        assert call(train.main, *args, "--epochs", "4") == 0
    assert same(state(tmp_path / "whole"), state(tmp_path / "killed"))
    assert [(r["from_epochs"], r["step"]) for r in state(tmp_path / "killed")["extended"]] == [(1, 3), (3, 9)]
    assert rates(tmp_path / "whole") == rates(tmp_path / "killed")


class Killed(BaseException):
    """Stands for kill -9: nothing is saved."""


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    judge, left = classification.training_loss, iter(range(steps))

    def judging(*of: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return judge(*of)

    with monkeypatch.context() as patch:
        patch.setattr(classification, "training_loss", judging)
        with pytest.raises(Killed):
            call(train.main, *args)


@pytest.mark.parametrize(
    ("done", "wanted", "rule"),
    [
        (4, 3, "epochs = 3: must be at least the 4 that the run in .* has started; resume with --epochs 4"),
        (
            1,
            3,
            "epochs = 3: must be the 2 that the run in .* started with until those are done; then it can be extended",
        ),
    ],
    ids=["fewer than done", "not finished"],
)
def test_epochs_that_cannot_be_are_refused_by_name(
    done: int, wanted: int, rule: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run"
    args = arguments(tiny_data, run, "--epochs", str(max(done, 2)))
    if done == 1:
        kill_after(4, monkeypatch, *args)
    else:
        assert call(train.main, *args) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert call(train.main, *args, "--epochs", str(wanted), "--resume") == 2
    assert re.search(rule, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert call(train.main, *args, "--resume") == 0


def test_the_mended_command_takes_the_folder_of_one_that_failed(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --resume and without; the failed one had begun its first step."""
    for more in ([], ["--resume"]):
        run = tmp_path / f"run{len(more)}"
        kill_after(0, monkeypatch, *arguments(tiny_data, run, "--epochs", "1"))
        assert (run / "config.json").is_file() and not checkpoints(run / "checkpoints")
        assert call(train.main, *arguments(tiny_data, run, "--epochs", "1", "--seed", "5", *more)) == 0
        assert "the folder is taken over from a run that ended before its first checkpoint" in capsys.readouterr().out
        assert read_config(run).seed == 5 and [r["step"] for r in metrics_of(run) if "lr" in r] == [1, 2, 3]


@pytest.mark.slow
def test_a_file_system_without_hard_links_gets_a_copy(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    args = arguments(tiny_data, tmp_path / "run", "--epochs", "1")
    assert call(train.main, *args) == 0
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    whole = newest.read_bytes()
    monkeypatch.setattr(os, "link", refuse)
    assert call(train.main, *args, "--resume", "--epochs", "2") == 0
    assert (tmp_path / "run" / "checkpoints" / "epochs-1.pt").read_bytes() == whole
