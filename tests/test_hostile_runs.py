"""Run folders that a stranger or a failing disk changed: refused by name, or gone back from, by every command that reads them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import RESULT, Job
from fasttricks.ablation.preflight import check_data
from fasttricks.commands import evaluate, export, predict, train
from fasttricks.config import ConfigError, DataConfig
from fasttricks.runs.folder import read_config
from fasttricks.runs.log import RunLog, plot_curves
from fasttricks.runs.records import read_metrics
from fasttricks.system.ownership import InUseError, require_free
from fasttricks.tasks.classification import CLASSIFICATION
from lib.hostile import DEEP, NO_FILES, NO_TABLES, Change, content
from lib.tables import mostly_slow
from lib.tiny import ALONE, FinishedRun, call


def saying(**changes: Any) -> Change:
    """A table of JSON with other values."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def line(number: int, new: bytes) -> Change:
    """The file with another line."""

    def change(path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        lines[number] = new
        path.write_bytes(b"\n".join(lines))

    return change


CONFIGS: dict[str, tuple[Change, str]] = {
    "no config": (content(b"{}"), "must be a table with 'config' in it"),
    "config: null": (saying(config=None), "config = None: must be a table"),
    "config: another's": (saying(config={"name": "x"}), "is not a field"),
}
SUMMARIES = NO_TABLES | {
    "of something else": (content(b'{"accuracy": 0.9}'), "must be a table with 'steps' in it"),
    "steps: a text": (saying(steps="9"), "steps = '9': must be a whole number"),
    "top1: null": (saying(top1=None), "top1 = None: must be a number"),
    "device: a list": (saying(device=[]), "device = []: must be a text"),
}
RECORDS = {name: case for name, case in NO_FILES.items() if name != "8 GiB"} | {
    "not UTF-8": (line(0, b"\xff"), "line 1 is no record"),
    "without epoch": (line(1, b'{"step": 1, "train_loss": 3}'), "line 2 is no record, of "),
    "a text for a number": (line(1, b'{"step": 1, "epoch": "x"}'), "line 2 is no record, of "),
    "deep": (line(2, DEEP), "a line of more than 65,536 bytes"),
    "zeros": (content(bytes(4096)), "line 1 is no record"),
    "empty": (content(b""), "line 1 is no record"),
}
WHOLE = ("a pipe", "deep", "without epoch")
"""Of the records, those that a whole command is given; the others are read as it reads them."""
ROWS = [
    *[("config.json", name, *case, ("resume", "export")) for name, case in NO_TABLES.items()],
    *[("config.json", name, *case, ("resume",)) for name, case in CONFIGS.items()],
    *[("summary.json", name, *case, ("export",)) for name, case in SUMMARIES.items()],
    *[("metrics.jsonl", name, *RECORDS[name], ("resume",)) for name in WHOLE],
]


@pytest.fixture
def run(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A finished run, to be spoilt."""
    return Path(shutil.copytree(finished_run.folder, tmp_path / "run"))


def commands(run: Path, given: FinishedRun) -> dict[str, tuple[Callable[[Sequence[str]], object], list[str]]]:
    image = str(next((given.data / "val").rglob("*.jpg")))
    args = [str(run) if arg == str(given.folder) else arg for arg in given.args]
    return {
        "resume": (train.main, [*args, "--resume"]),
        "evaluate": (evaluate.main, [str(run)]),
        "predict": (predict.main, [str(run), image]),
        "export": (export.main, [str(run), "--no-onnx"]),
    }


@pytest.mark.parametrize(
    ("file", "name", "change", "wrong", "readers"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS]
)
def test_a_run_folder_that_was_changed(
    file: str, name: str, change: Change, wrong: str, readers: tuple[str, ...], run: Path, finished_run: FinishedRun,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One line with file, what is wrong and the way out, by each command that reads the file; no checkpoint is touched."""
    change(run / file)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    for command in readers:
        main, args = commands(run, finished_run)[command]
        code, said = call(main, *args), capsys.readouterr().err
        error = said[said.index("error: ") :]
        assert code == 2 and error.count("\n") == 1 and "Traceback" not in said, (command, said)
        assert str(run / file) in error and wrong in error, (command, error)
        assert "move it away" in error or "give another --run-dir" in error, "the way out"
    assert {path.name for path in (run / "checkpoints").iterdir()} == kept


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_were_changed(name: str, run: Path) -> None:
    """As a resumed run begins with them; what is drawn at the end of a run never raises."""
    change, wrong = RECORDS[name]
    count = len(read_metrics(run))
    change(run / "metrics.jsonl")
    log = RunLog(run, ALONE, CLASSIFICATION.metrics_of(3), num_steps=9, steps_per_epoch=3)

    def begin() -> None:
        log.load_state_dict({"sums": [0.0, 0.0], "seconds": 0.0, "records": count})
        log.start(9)

    with pytest.raises(
        ConfigError, match=r"metrics\.jsonl: must have a record .*; repair it, or move it away"
    ) as caught:
        begin()
    assert wrong in str(caught.value)
    log.close()


def test_the_way_out_of_records_that_are_damaged(run: Path, finished_run: FinishedRun) -> None:
    """Moved away, the run goes on; a torn last line, as a kill leaves it, needs none."""
    main, args = commands(run, finished_run)["resume"]
    whole = read_metrics(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "epo')
    assert read_metrics(run) == whole
    assert call(main, *args) == 0
    (run / "metrics.jsonl").unlink()
    assert call(main, *args) == 0


NOT_CHECKPOINTS = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", mostly_slow(NOT_CHECKPOINTS, "a pipe"))
def test_what_is_no_file_under_a_checkpoints_name(
    kind: str, run: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resume falls back to the one before, says so, and moves it out of the way of the step that comes there again."""
    newest, before = sorted((run / "checkpoints").iterdir(), reverse=True)[:2]
    newest.unlink()
    NOT_CHECKPOINTS[kind](newest)
    for command in ("evaluate", "predict"):
        main, args = commands(run, finished_run)[command]
        assert call(main, *args) == 0, command
    capsys.readouterr()
    main, args = commands(run, finished_run)["resume"]
    assert call(main, *args) == 0
    shown = capsys.readouterr().out
    assert f"{newest.name}': cannot be read" in shown and "resuming from the previous one" in shown
    assert newest.is_file() and not newest.is_symlink(), "trained again"
    assert os.path.lexists(newest.with_name(newest.name + ".damaged"))
    assert before.name in shown


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.name)])
def test_something_else_under_the_locks_name(
    make: Change, run: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    make(run / ".lock")
    main, args = commands(run, finished_run)["resume"]
    assert call(main, *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: run_dir = ") and "give another --run-dir" in error and error.count("\n") == 1


def test_a_lock_that_names_no_owner_is_a_strangers(run: Path) -> None:
    """Where there are no locks a file says who has the run: whatever lies there, it is read under bounds."""
    stand_in = run / ".lock.owner"
    stand_in.touch()
    for change, _ in NO_TABLES.values():
        change(stand_in)
        if stand_in.exists():  # a link to nowhere is no owner
            with pytest.raises(InUseError, match="is in use by another process"):
                require_free(run / ".lock", patience_s=0)
        stand_in.rmdir() if stand_in.is_dir() else stand_in.unlink()
        stand_in.touch()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/full")])
def test_curves_are_drawn_over_what_has_their_name(make: Change, run: Path) -> None:
    (run / "curves.png").unlink()
    make(run / "curves.png")
    plot_curves(run, CLASSIFICATION.metrics_of(3))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG") and not (run / "curves.png").is_symlink()


# ------------------------------------------------------------------------------------------------------------- ablations
@pytest.mark.parametrize("name", NO_TABLES)
def test_a_result_that_was_changed(name: str, run: Path) -> None:
    """result.json of a run of an ablation, and data.json of the ablation."""
    change, wrong = NO_TABLES[name]
    result = {"top1": 50.0, "cpu_seconds": 3.0, "ranks": 1, "versions": {"commit": "unknown"}}
    (run / RESULT).write_text(json.dumps(result))
    job = Job(dataclasses.replace(read_config(run), run_dir=str(run)), 1, "label")
    assert job.result() == result
    change(run / RESULT)
    with pytest.raises(ConfigError, match=r"result\.json: must be as .*; remove its folder") as caught:
        job.result()
    assert wrong in str(caught.value)


def test_the_data_of_an_ablation_that_was_changed(tiny_data: Path, tmp_path: Path) -> None:
    config = AblateConfig(
        recipe="cifar10", epochs=6, global_batch_size=16, run_dir=str(tmp_path), data=DataConfig(root=str(tiny_data))
    )
    for name, (change, wrong) in NO_TABLES.items():
        (tmp_path / "data.json").touch()
        change(tmp_path / "data.json")
        with pytest.raises(ConfigError, match=r"data\.json: must be as .*; give another --run-dir") as caught:
            check_data(config)
        assert wrong in str(caught.value), name
        (tmp_path / "data.json").rmdir() if (tmp_path / "data.json").is_dir() else (tmp_path / "data.json").unlink()
