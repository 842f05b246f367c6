"""The same command twice at once: one owner a folder. The second is refused, waits or shares; a kill lets go."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttricks.commands import train
from fasttricks.learning.teacher_cache import _checksum
from fasttricks.training import build
from lib.forked import python_m, running, wait_for_file
from lib.tiny import arguments, call

WHO = f"on {socket.gethostname()} since 20"


def steps_of(run: Path) -> list[int]:
    """The steps of the records of training, all of them whole."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "train_loss" in record]


@pytest.mark.slow
def test_train_is_refused_where_another_trains_and_goes_on_once_that_is_killed(tiny_data: Path, tmp_path: Path) -> None:
    args = arguments(tiny_data, tmp_path / "run", "--epochs", "2", "--checkpoint-steps", "1", "--resume")
    with running("fasttricks.train", *args) as first:
        first.stop_at(tmp_path / "run" / "metrics.jsonl")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        second = python_m("fasttricks.train", *args)
        assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: run_dir = '{tmp_path}/run': is in use by pid {first.pid} {WHO}")
        assert second.stderr.endswith("; wait for it or end it, or give another --run-dir\n")
        first.signal(signal.SIGKILL)
    third = python_m("fasttricks.train", *args)
    assert third.returncode == 0, third.stderr
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["new", "resume"])
def test_of_two_that_begin_at_once_one_trains(tiny_data: Path, tmp_path: Path, more: list[str]) -> None:
    run = tmp_path / "run"
    args = arguments(tiny_data, run, "--epochs", "8", *more)
    with running("fasttricks.train", *args) as one, running("fasttricks.train", *args) as other:
        wait_for_file(run / "metrics.jsonl", one, other)
        owner = json.loads((run / ".lock").read_text())["pid"]
        trains, refused = (one, other) if owner == one.pid else (other, one)
        trains.signal(signal.SIGSTOP)  # else it may have finished before the other looks
        ended = refused.wait()
        assert ended.returncode == 2
        assert f"run_dir = '{run}': is in use by pid {owner} {WHO}" in ended.stderr
        trains.signal(signal.SIGCONT)
        ended = trains.wait()
        assert ended.returncode == 0, ended.stderr
    assert steps_of(run) == list(range(1, 25))


@pytest.mark.parametrize(
    "more, rule",
    [([], "already exists and is never overwritten"), (["--resume"], "another process has resumed it since")],
    ids=["new", "resume"],
)
def test_a_run_that_was_not_there_when_it_looked_is_refused(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    rule: str,
) -> None:
    """Another trains from beginning to end between this one's look at the folder and its claim on it."""
    run, own = tmp_path / "run", build.own
    args = arguments(tiny_data, run, *more)

    def own_late(*looked: Any) -> object:
        monkeypatch.setattr(build, "own", own)
        assert call(train.main, *args) == 0
        before.extend(contents(run))
        return own(*looked)

    before: list[tuple[Path, bytes]] = []
    monkeypatch.setattr(build, "own", own_late)
    assert call(train.main, *args) == 2
    assert f"error: run_dir = '{run}': {rule}" in capsys.readouterr().err
    assert before and before == contents(run)


def contents(folder: Path) -> list[tuple[Path, bytes]]:
    return [(path, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.slow
def test_pack_is_refused_where_another_packs_and_goes_on_once_that_is_killed(tiny_data: Path, tmp_path: Path) -> None:
    args = ["pack", str(tiny_data), str(tmp_path / "out"), "--shard-images", "1"]
    with running("fasttricks.data.prepare", *args) as first:
        first.stop_at(tmp_path / "out" / "train" / "shard-00001.bin")
        second = python_m("fasttricks.data.prepare", *args)
        assert second.returncode == 2
        assert f"error: {tmp_path}/out/train: is in use by pid {first.pid} {WHO}" in second.stderr
        first.signal(signal.SIGKILL)
    assert python_m("fasttricks.data.prepare", *args).returncode == 0
    assert python_m("fasttricks.data.prepare", "check", str(tmp_path / "out")).returncode == 0


@pytest.mark.slow
def test_two_runs_fill_one_cache_of_the_teachers_logits(tiny_data: Path, teacher_run: Path, tmp_path: Path) -> None:
    more = [
        "--data.fixed-augmentation",
        "--distill.teacher",
        str(teacher_run),
        "--distill.cache",
        str(tmp_path / "cache"),
    ]
    with (
        running("fasttricks.train", *arguments(tiny_data, tmp_path / "a", *more)) as first,
        running("fasttricks.train", *arguments(tiny_data, tmp_path / "b", *more)) as second,
    ):
        for one in (first, second):
            ended = one.wait()
            assert ended.returncode == 0, ended.stderr
    (file,) = (tmp_path / "cache").iterdir()
    rows = np.memmap(file, np.dtype([("image", "<i8"), ("crc", "<u4"), ("logits", np.float32, 3)]), "r")
    assert sorted(rows["image"]) == list(range(1, 46))
    assert all(row["crc"] == _checksum(row) for row in rows)


@pytest.mark.slow
def test_two_ablations_share_the_runs(tiny_data: Path, tmp_path: Path) -> None:
    small = ["--factors", "label_smoothing", "--seeds", "2"]
    args = ["leave-one-out", *arguments(tiny_data, tmp_path / "a", *small, "--epochs", "1")]
    with running("fasttricks.ablate", *args) as first, running("fasttricks.ablate", *args) as second:
        assert [first.wait().returncode, second.wait().returncode] == [0, 0]
    logs = list((tmp_path / "a" / "runs").glob("*/*.log"))
    assert len(logs) == 4 and all(log.read_text().count("everything is in") == 1 for log in logs)
    assert not list((tmp_path / "a").rglob("*.lock"))
