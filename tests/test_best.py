"""best.pt, RUN@best and early stopping, on validations whose top-1 is given."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import fasttricks as ft
from fasttricks.commands import ablate, evaluate, export, predict, train
from fasttricks.config import UserError
from fasttricks.config.cli import parse_recipe
from fasttricks.runs import stored
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.stored import CheckpointError, checkpoints, find_checkpoint, run_of_best
from fasttricks.tasks import classification
from fasttricks.training import run as run_module
from fasttricks.training.best import Best, BestSoFar
from lib.states import same
from lib.tiny import arguments, call, torchrun

STEPS = 3  # an epoch


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[float]], None]:
    """Gives the validations these values of top-1, one each; one more validation than values fails."""
    measure = classification.evaluate

    def give(values: Sequence[float]) -> None:
        left: Iterator[float] = iter(values)

        def scored(*args: Any, **more: Any) -> dict[str, float]:
            return {**measure(*args, **more), "top1": next(left)}

        monkeypatch.setattr(classification, "evaluate", scored)

    return give


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def step_of_best(run: Path) -> int:
    return int(load_checkpoint(run / "checkpoints" / "best.pt")["step"])


# ------------------------------------------------------------------------------------------------------- the counting
@pytest.mark.parametrize(
    ("values", "bests", "gives_up_after"),
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([3, 2, 1], [1], 3),
        ([1, 1, 1], [1], 3),
        ([2, 1, 3, 3, 2], [1, 3], 5),
        ([float("nan"), 1, float("nan"), 0], [2], 4),
        ([0.0], [1], None),
    ],
)
def test_the_best_is_the_first_of_the_highest(
    values: list[float], bests: list[int], gives_up_after: int | None
) -> None:
    """And survives a checkpoint at each point. Patience 2."""
    found, best, ended = [], BestSoFar(), None
    for number, value in enumerate(values, 1):
        if best.judge(value, epoch=number, step=10 * number):
            found.append(number)
        again = BestSoFar()
        again.load_state_dict(json.loads(json.dumps(best.state_dict())))
        assert again == best
        ended = ended or (number if best.gives_up(2) else None)
        assert not best.gives_up(0)
    assert (found, ended) == (bests, gives_up_after)
    assert best.best == Best(values[bests[-1] - 1], bests[-1], 10 * bests[-1])


def test_an_old_checkpoint_knows_no_best() -> None:
    best = BestSoFar(Best(1.0, 1, 1), 2)
    best.load_state_dict({})
    assert best == BestSoFar() and not best.gives_up(1)


# --------------------------------------------------------------------------------------------------------- in a run
def test_the_checkpoint_of_the_best_validation_stays(
    tiny_data: Path, tmp_path: Path, scores: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Though checkpoints are rarer than validations, and newer ones push the older out."""
    scores([10, 30, 20, 20, 25])
    run = tmp_path / "run"
    assert call(train.main, *arguments(tiny_data, run, "--epochs", "5", "--checkpoint-epochs", "5")) == 0
    assert step_of_best(run) == 2 * STEPS
    assert [path.name for path in checkpoints(run / "checkpoints")] == ["step-0000000015.pt", "step-0000000006.pt"]
    told = summary(run)
    assert (told["best_top1"], told["best_epoch"], told["epochs"], told["top1"]) == (30, 2, 5, 25)
    assert "stopped_early" not in told
    assert f"best top-1 30.00 % after epoch 2: {run}@best\n" in capsys.readouterr().out
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_last_epoch_that_is_the_best_is_best_too(
    tiny_data: Path, tmp_path: Path, scores: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    scores([10, 30])
    run = tmp_path / "run"
    assert call(train.main, *arguments(tiny_data, run, "--epochs", "2")) == 0
    newest = checkpoints(run / "checkpoints")[0]
    assert os.path.samefile(newest, run / "checkpoints" / "best.pt"), "it takes room twice"
    assert "@best" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 6), (3, 7), (0, 8)])
def test_patience_ends_the_run(
    patience: int,
    epochs: int,
    tiny_data: Path,
    tmp_path: Path,
    scores: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores([10, 30, 20, 40, 40, 30, 20, 20])
    run, more = tmp_path / "run", ["--epochs", "8", "--eval.patience", str(patience)]
    assert call(train.main, *arguments(tiny_data, run, *more)) == 0
    told, said = summary(run), capsys.readouterr().out
    assert (told["epochs"], told["steps"]) == (epochs, epochs * STEPS)
    assert told.get("stopped_early", False) == (epochs < 8)
    ended = f"in {patience} validations (eval.patience): stopped after epoch {epochs} of 8\n"
    assert (ended in said) == (epochs < 8)
    rates = [r["lr"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in r]
    scores([10] * 8)
    whole = tmp_path / "whole"
    assert call(train.main, *arguments(tiny_data, whole, "--epochs", "8")) == 0
    wanted = [r["lr"] for r in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines()) if "lr" in r]
    assert rates == wanted[: len(rates)], "the schedule is that of all epochs"


def test_a_run_that_stopped_early_is_finished_and_more_patience_lets_it_train_on(
    tiny_data: Path, tmp_path: Path, scores: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = arguments(tiny_data, run, "--epochs", "5")
    scores([30, 20, 10])
    assert call(train.main, *words, "--eval.patience", "2") == 0
    scores([10])  # the validation of the finished run that gives its summary
    assert call(train.main, *words, "--eval.patience", "2", "--resume") == 0
    assert (summary(run)["epochs"], summary(run)["best_epoch"]) == (3, 1)
    scores([40, 20])
    assert call(train.main, *words, "--eval.patience", "4", "--resume") == 0
    assert (summary(run)["epochs"], summary(run)["best_epoch"], step_of_best(run)) == (5, 4, 4 * STEPS)


def test_a_kill_between_save_and_name_is_mended(
    tiny_data: Path, tmp_path: Path, scores: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint itself says that it is the best. All else is as in a run that nobody killed."""

    class Killed(BaseException):
        pass

    def kill(*args: Any, **more: Any) -> None:
        raise Killed

    words = ["--epochs", "3", "--eval.patience", "2"]
    scores([10, 30, 20])
    assert call(train.main, *arguments(tiny_data, tmp_path / "whole", *words)) == 0
    scores([10, 30])
    keep = stored.keep_copy
    kills: Iterator[Callable[..., Any]] = iter([keep, kill])
    monkeypatch.setattr(run_module, "keep_copy", lambda *args, **more: next(kills)(*args, **more))
    with pytest.raises(Killed):
        call(train.main, *arguments(tiny_data, tmp_path / "killed", *words))
    assert step_of_best(tmp_path / "killed") == STEPS, "the one before"
    monkeypatch.setattr(run_module, "keep_copy", keep)
    scores([20])
    assert call(train.main, *arguments(tiny_data, tmp_path / "killed", *words, "--resume")) == 0
    one, other = (load_checkpoint(tmp_path / name / "checkpoints" / "best.pt") for name in ("whole", "killed"))
    assert same(one["model"], other["model"]) and one["step"] == other["step"] == 2 * STEPS
    one, other = (load_checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert (one["best"], one["step"]) == (other["best"], other["step"])
    assert same(one["model"], other["model"])


def test_a_best_that_is_gone_is_said(
    tiny_data: Path, tmp_path: Path, scores: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    scores([30, 20])
    assert call(train.main, *arguments(tiny_data, run, "--epochs", "2")) == 0
    (run / "checkpoints" / "best.pt").unlink()
    scores([10])
    assert call(train.main, *arguments(tiny_data, run, "--epochs", "3", "--resume")) == 0
    assert "best.pt, of the best validation, after epoch 1, is gone" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"@best': .* has no best checkpoint"):
        find_checkpoint(Path(f"{run}@best"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_stop_at_the_same_epoch(ranks: int, tiny_data: Path, tmp_path: Path) -> None:
    """A rate so small that the weights stay: no validation is better than the first."""
    run = tmp_path / "run"
    words = ["--epochs", "9", "--eval.patience", "2", "--optim.base-lr", "1e-30", "--device", "cpu"]
    batch = ["--global-batch-size", str(4 * ranks)]
    done = torchrun(ranks, "fasttricks.train", *arguments(tiny_data, run, *words, *batch))
    assert done.returncode == 0, done.stderr
    assert (summary(run)["epochs"], summary(run)["stopped_early"], summary(run)["ranks"]) == (3, True, ranks)


# ------------------------------------------------------------------------------------------------------- its name
@pytest.fixture(scope="module")
def two(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first epoch is its best."""
    run = tmp_path_factory.mktemp("two") / "run"
    with pytest.MonkeyPatch.context() as patch:
        left, measure = iter([30, 20]), classification.evaluate
        patch.setattr(classification, "evaluate", lambda *a, **m: {**measure(*a, **m), "top1": next(left)})
        assert call(train.main, *arguments(tiny_data, run, "--epochs", "2", "--ema-decay", "0.5")) == 0
    return run


def test_every_command_takes_it(two: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named, file = f"{two}@best", str(two / "checkpoints" / "best.pt")
    image = str(next((tiny_data / "val").rglob("*.jpg")))
    said = []
    for place in (named, file, str(two)):
        assert call(evaluate.main, place, "--data.threads", "1") == 0
        assert call(predict.main, place, image) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and f"{two}/checkpoints/best.pt" in said[0]
    assert said[0] != said[2]
    assert call(export.main, named, "--no-onnx") == 0
    shutil.move(two / "export", tmp_path / "export")
    assert same(ft.load(named).network().state_dict(), ft.load(tmp_path / "export").network().state_dict())
    assert not same(ft.load(named).network().state_dict(), ft.load(two).network().state_dict())
    for number, name in enumerate((named, f"{named}:raw")):
        words = ["--epochs", "1", "--init", name, "--distill.teacher", named]
        assert call(train.main, *arguments(tiny_data, tmp_path / f"run{number}", *words)) == 0
        account = "checkpoints/best.pt (its averaged weights): " if number == 0 else "checkpoints/best.pt: "
        assert account in capsys.readouterr().out


def test_the_recipe_finetune_is_fitted_to_it(two: Path) -> None:
    config = parse_recipe(["finetune", "--init", f"{two}@best"], prog="test", fit=fit_recipe)
    assert config.model.name == ft.load(two).config.model.name != "resnet50d"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{two}x@best", "x is no run folder; check the path"),
        ("{two}/checkpoints@best", "has no best checkpoint"),
        ("@best", "has no best checkpoint"),
    ],
)
def test_a_name_without_a_best_is_refused(
    name: str,
    words: str,
    two: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(evaluate.main, name.format(two=two)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_folder_that_has_such_a_name_is_that_folder(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "run@best")
    assert run_of_best(tmp_path / "run@best") is None
    assert find_checkpoint(tmp_path / "run@best").name == f"step-{2 * STEPS:010d}.pt"
    assert find_checkpoint(Path(f"{tmp_path}/run@best@best")).name == "best.pt"


def test_ablate_refuses_patience(tiny_data: Path, tmp_path: Path) -> None:
    words = ["table5", "--data.root", str(tiny_data), "--run-dir", str(tmp_path / "a"), "--eval.patience", "2"]
    words += ["--global-batch-size", "16"]
    with pytest.raises(UserError, match=r"eval\.patience"):
        ablate.main(words)
