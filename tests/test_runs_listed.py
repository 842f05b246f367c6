"""fasttricks runs: every state of a run folder is a row, and named runs are compared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from fasttricks.commands import runs
from fasttricks.config import show_name
from fasttricks.runs.begin import LOCK
from fasttricks.runs.folder import read_config
from fasttricks.runs.overview import differing_fields, find_runs, look_at
from fasttricks.system.ownership import Claim
from lib.tiny import REPOSITORY, FinishedRun, call, environment


@pytest.fixture
def folder(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """runs/: one of each state."""
    root = tmp_path / "runs"
    for name in ("whole", "cut", "begun", "torn", "[red]\x1b[31m"):
        shutil.copytree(finished_run.folder, root / name)
    (root / "cut" / "summary.json").unlink()
    lines = (root / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "cut" / "metrics.jsonl").write_text("".join(lines[:-3]))
    (root / "begun" / "summary.json").unlink()
    (root / "begun" / "metrics.jsonl").unlink()
    (root / "torn" / "config.json").write_text('{"config": ')
    (root / "notes").mkdir()
    return root


def rows(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, str]:
    """Name of the run -> its line."""
    assert call(runs.main, str(folder), *more) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "recipe", "state", "epoch"]
    return {line.split("  ")[0].removeprefix(f"{folder}/"): line for line in lines}


def test_each_state_is_a_row(folder: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    found, summary = rows(folder, capsys), json.loads((finished_run.folder / "summary.json").read_text())
    assert set(found) == {"whole", "cut", "begun", "torn", r"[red]\x1b[31m"}
    for name in ("whole", r"[red]\x1b[31m"):
        assert "  finished  " in found[name] and f"top1 {summary['top1']:.2f}  " in found[name]
        assert f"  {summary['epochs']} of {summary['epochs']}  " in found[name]
    assert "  stopped " in found["cut"] and "  2 of 3 " in found["cut"]
    assert "  stopped " in found["begun"] and "  0 of 3" in found["begun"] and "top1" not in found["begun"]
    assert "config.json: " in found["torn"]


def test_a_damaged_record_is_named_and_a_torn_last_line_is_not(folder: Path) -> None:
    file = folder / "cut" / "metrics.jsonl"
    text, seen = file.read_text(), look_at(folder / "cut").rows
    file.write_text(text + text.splitlines()[-1][:9])
    assert look_at(folder / "cut").rows == seen
    file.write_text(text.replace('"step": ', '"step": x', 1))
    run = look_at(folder / "cut")
    assert "metrics.jsonl: must have a record" in run.problem and "(line 1: " in run.problem and not run.rows


def test_a_run_in_training_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Claim(folder / "cut" / LOCK):
        # a claim of this very process is seen by another alone
        command = [sys.executable, "-m", "fasttricks", "runs", str(folder / "cut")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert "  training  " in done.stdout


def test_the_scores_are_those_of_the_records(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    tops = [record["top1"] for record in records if "top1" in record]
    run = look_at(folder / "whole")
    assert [row["top1"] for row in run.validations] == tops
    assert run.best["top1"] == max(tops) and run.best["epoch"] == tops.index(max(tops)) + 1
    plain = run.plain()
    assert plain["last"]["top1"] == tops[-1] and plain["last"]["val_loss"] == records[-1]["val_loss"]
    assert plain["state"] == "finished" and plain["started"].startswith("20")


def test_json_is_a_line_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(runs.main, str(folder), "--json") == 0
    found = {Path(one["run"]).name: one for one in map(json.loads, capsys.readouterr().out.splitlines())}
    assert len(found) == 5 and "problem" in found["torn"] and found["begun"]["last"] is None


def test_named_runs_are_compared(
    folder: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = json.loads((folder / "whole" / "config.json").read_text())
    made["config"]["seed"], made["config"]["optim"]["base_lr"] = 7, 0.25
    made["config"]["data"]["root"] = "x" * 90
    (folder / "cut" / "config.json").write_text(json.dumps(made))
    plot = tmp_path / "curves.png"
    assert call(runs.main, str(folder / "whole"), str(folder / "cut"), "--plot", str(plot)) == 0
    said = capsys.readouterr().out
    config = read_config(finished_run.folder)
    fields = dict(line.split(maxsplit=1) for line in said.split("\n\n")[1].splitlines()[1:-1])
    assert fields.keys() == {"seed", "optim.base_lr", "data.root"}
    assert sorted(fields["optim.base_lr"].split()) == sorted(["0.25", str(config.optim.base_lr)])
    assert f"{'x' * 37}..." in fields["data.root"]
    with Image.open(plot) as picture:
        assert picture.size[0] > 1000
    assert call(runs.main, str(folder / "whole"), str(folder / "[red]\x1b[31m")) == 0
    assert capsys.readouterr().out.endswith("\n\nthe configs are the same\n")
    assert differing_fields([look_at(folder / "whole")]) == {}


def test_a_run_of_an_old_release_is_read(tmp_path: Path) -> None:
    with tarfile.open(REPOSITORY / "tests" / "fixtures" / "run-772f314.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    found = [look_at(run) for place in tmp_path.rglob("config.json") for run in find_runs(place.parent)]
    assert found
    for run in found:
        assert not run.problem and run.epoch > 0 and run.metrics[:2] == ("top1", "top5") and run.best["top1"] > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nowhere",), "runs = 'nowhere': is no folder; give a run folder"),
        (("notes",), "runs = 'notes': holds no run; give a run folder"),
        (("whole", "--plot", "a.jpg"), "plot = 'a.jpg': must end in .png"),
        (("whole", "--plot", "nowhere/a.png"), "plot = 'nowhere/a.png': nowhere is no folder"),
        (("whole", "--plot", "taken.png"), "already exists and is never overwritten"),
        (("begun", "--plot", "a.png"), "no run has a validation yet"),
        (("--polt", "a.png"), "--polt"),
    ],
)
def test_a_wrong_argument_is_named(
    args: tuple[str, ...],
    words: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / "taken.png").touch()
    assert call(runs.main, *args) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


VALID = '{"step": 3, "epoch": 1.0, "top1": 70.0, "top5": 90.0, "val_loss": 1.0}'
STEP = '{"step": 3, "epoch": 1.0, "train_loss": 2.0, "lr": 0.1, "images_per_sec": 5.0}'


@pytest.mark.parametrize(
    ("records", "best", "last"),
    [
        ([VALID.replace("1.0,", "Infinity,", 1)], None, None),
        ([VALID.replace("1.0,", "NaN,", 1)], None, None),
        ([VALID.replace("70.0", "NaN")], None, {"top1": None, "top5": 90.0, "val_loss": 1.0}),
        (
            [VALID.replace("70.0", "NaN"), VALID.replace("3", "6", 1).replace("1.0", "2.0", 1)],
            {"epoch": 2, "top1": 70.0},
            {"top1": 70.0, "top5": 90.0, "val_loss": 1.0},
        ),
        ([STEP.replace("5.0", "Infinity"), VALID], {"epoch": 1, "top1": 70.0}, None),
        (
            [VALID.replace("90.0", "-Infinity")],
            {"epoch": 1, "top1": 70.0},
            {"top1": 70.0, "top5": None, "val_loss": 1.0},
        ),
        (
            [VALID, VALID.replace("3", "6", 1).replace("1.0", "2.0", 1).replace("top5", "top2")],
            {"epoch": 1, "top1": 70.0},
            {"top1": 70.0, "top2": 90.0, "val_loss": 1.0},
        ),
        (
            [VALID.replace("top5", "\\u001b[31m")],
            {"epoch": 1, "top1": 70.0},
            {"top1": 70.0, "\x1b[31m": 90.0, "val_loss": 1.0},
        ),
    ],
    ids=[
        "epoch inf",
        "epoch nan",
        "nan",
        "nan, then a number",
        "speed inf",
        "second inf",
        "another release",
        "hostile name",
    ],
)
def test_a_number_that_is_none_ends_no_list(
    records: list[str],
    best: dict[str, float] | None,
    last: dict[str, float] | None,
    finished_run: FinishedRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither the table nor the JSON, which standard JSON can hold."""
    (tmp_path / "a").mkdir()
    shutil.copy(finished_run.folder / "config.json", tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(f"{record}\n" for record in records))
    assert call(runs.main, str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and all(
        show_name(name) in shown for name, value in (last or {}).items() if value == 90.0
    )
    assert call(runs.main, str(tmp_path), "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["best"] == best
    assert last is None or found["last"] == last


def test_a_summary_of_many_bad_images_is_read(finished_run: FinishedRun, tmp_path: Path) -> None:
    shutil.copytree(finished_run.folder, tmp_path / "a")
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    summary["bad_images"] = {f"{index:07d}": "x" * 100 for index in range(20_000)}
    (tmp_path / "a" / "summary.json").write_text(json.dumps(summary))
    assert (look_at(tmp_path / "a").problem, look_at(tmp_path / "a").state) == ("", "finished")
