"""A lost standard output or terminal: training goes on or saves, and says so in its folder; what prints its result ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pytest

from fasttricks.runs.stored import newest_checkpoint
from lib.forked import CLOSED, Running, python_m, running
from lib.tables import covering, mostly_slow
from lib.tiny import FinishedRun, arguments, environment

REASONS = {"pipe": "Broken pipe", "full": "No space left on device", "closed": "Bad file descriptor"}


@contextmanager
def without_output(kind: str, folder: Path, module: str, *args: str) -> Iterator[Running]:
    """The command, whose standard output is lost: at once, or after the first line to a pipe, as with `| head -1`."""
    if kind != "pipe":
        with running(module, *args, stdout={"full": "/dev/full", "closed": CLOSED}[kind]) as started:
            yield started
        return
    os.mkfifo(folder / "pipe")
    with running(module, *args, stdout=str(folder / "pipe")) as started:
        with open(folder / "pipe", "rb", buffering=0) as reader:
            assert read_line(reader)
        yield started


def read_line(reader: BinaryIO) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        part = reader.read(1)
        assert part, line
        line += part
    return line


@contextmanager
def on_lost_terminal(run: Path, module: str, *args: str, nohup: bool) -> Iterator[Running]:
    """The command on a terminal, which is closed as soon as a run at or below `run` has begun."""
    main, terminal = pty.openpty()
    with running(module, *args, terminal=os.ttyname(terminal), nohup=nohup, TERM="xterm-256color") as started:
        wait_until_begun(run, started)
        os.close(terminal)
        os.close(main)
        yield started


def wait_until_begun(run: Path, started: Running) -> None:
    until_s = time.monotonic() + 60
    while not any(run.rglob("metrics.jsonl")):
        assert started.process.is_alive() and time.monotonic() < until_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    "kind", ["full", pytest.param("pipe", marks=pytest.mark.slow), pytest.param("closed", marks=pytest.mark.slow)]
)
def test_training_goes_on_and_says_in_its_folder_what_it_would_have_said(
    kind: str, tiny_data: Path, tmp_path: Path
) -> None:
    args = arguments(tiny_data, tmp_path / "run", "--epochs", "1")
    with without_output(kind, tmp_path, "fasttricks.train", *args) as started:
        ended = started.wait()
    assert (ended.returncode, ended.stderr) == (
        0,
        f"note: standard output is lost ({REASONS[kind]}); the command continues\n",
    )
    told = (tmp_path / "run" / "console.log").read_text().splitlines()
    assert told[0] == f"standard output is lost ({REASONS[kind]}); the output of the run continues here"
    shown, result, *following = told[-6:]
    assert shown.startswith("epoch   1.0  top1 ") and result.endswith(f"everything is in {tmp_path}/run/")
    assert [line.split()[0] for line in following] == ["evaluate", "predict", "export", "curves"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_a_closed_terminal_has_training_save_and_end(tiny_data: Path, tmp_path: Path) -> None:
    args, run = arguments(tiny_data, tmp_path / "run", "--epochs", "1000"), tmp_path / "run"
    with on_lost_terminal(run, "fasttricks.train", *args, nohup=False) as started:
        assert started.wait().returncode == 0
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    step = int(newest.stem[5:])
    told = (run / "console.log").read_text().splitlines()
    assert told[-1].startswith(f"stopped after step {step}, saved; resume with: ")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train_loss" in r] == list(range(1, step + 1))


@pytest.mark.slow
def test_under_nohup_training_outlives_its_terminal(tiny_data: Path, tmp_path: Path) -> None:
    args, run = arguments(tiny_data, tmp_path / "run", "--epochs", "4"), tmp_path / "run"
    with on_lost_terminal(run, "fasttricks.train", *args, nohup=True) as started:
        assert started.wait().returncode == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    told = (run / "console.log").read_text()
    assert "standard output is lost (Input/output error); the output of the run continues here\n" in told
    assert f"everything is in {run}/\n" in told and "\x1b" not in told
    assert told.count("step 12 of 12  ETA 0:00:00\n") == 1, "a line each step where no bar is seen"


@pytest.mark.parametrize(("command", "kind"), covering(["evaluate", "predict"], list(REASONS)))
def test_a_result_that_cannot_be_said_is_an_error(
    command: str, kind: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    images = [str(path) for path in (finished_run.data / "val").rglob("*.jpg")]
    args = {
        "evaluate": [str(finished_run.folder)],
        "predict": [str(finished_run.folder), *images * 60],
    }  # more than a pipe holds
    with without_output(kind, tmp_path, f"fasttricks.{command}", *args[command]) as started:
        ended = started.wait()
    if kind == "pipe":  # whoever has read a line wants no more
        assert ended.stderr == "" and ended.returncode in (0, 128 + signal.SIGPIPE)
        assert ended.returncode or command != "predict"
        return
    rule = "must be a place to write to, which holds the result; give another"
    assert (ended.returncode, ended.stderr) == (2, f"error: standard output: {rule} ({REASONS[kind]})\n")


@pytest.mark.parametrize("kind", mostly_slow(["full", "closed"], "full"))
def test_scan_leaves_its_list_though_nobody_hears_of_it(kind: str, finished_run: FinishedRun, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_text("no image")
    (tmp_path / "data" / "b.jpg").write_bytes(next((finished_run.data / "val").rglob("*.jpg")).read_bytes())
    with without_output(kind, tmp_path, "fasttricks.data.prepare", "scan", str(tmp_path / "data")) as started:
        assert started.wait().returncode == 0
    (line,) = (tmp_path / "data" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "a.jpg"


@pytest.mark.slow
def test_an_ablation_on_a_closed_terminal_ends_its_run_in_order_and_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    args = ["leave-one-out", *arguments(tiny_data, tmp_path / "a", "--factors", "label_smoothing", "--seeds", "1")]
    (tmp_path / "a").mkdir()
    with on_lost_terminal(tmp_path / "a", "fasttricks.ablate", *args, "--epochs", "50", nohup=False) as it:
        assert it.wait().returncode == 130
    assert "the same command continues" in (tmp_path / "a" / "console.log").read_text()
    done = python_m("fasttricks.ablate", *args, "--epochs", "50")
    assert done.returncode == 0, done.stderr
    for log in (tmp_path / "a" / "runs").glob("*/*.log"):
        assert log.read_text().count("everything is in") == 1


@pytest.mark.slow
@pytest.mark.parametrize("line", ["{} | head -1", "{} >&-", "{} > /dev/full", "{} 2>&-", "{} 2> /dev/full"])
def test_as_a_shell_runs_it(line: str, tiny_data: Path, tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m fasttricks.train {' '.join(arguments(tiny_data, tmp_path / 'run', '--epochs', '1'))}"
    )
    script = f"set -o pipefail; {line.format(command)}"
    done = subprocess.run(["bash", "-c", script], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").is_file() and "Traceback" not in done.stderr
