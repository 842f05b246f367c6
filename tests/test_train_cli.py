"""python -m fasttricks.train as its user meets it: what it shows, what it leaves, and how to go on."""

from __future__ import annotations

import csv
import errno
import json
import math
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fasttricks
from fasttricks.commands import evaluate, export, predict, train
from fasttricks.config import TrainConfig
from fasttricks.runs.folder import read_config
from lib.forked import on_terminal
from lib.tiny import FinishedRun, arguments, call


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def plain(shown: str) -> str:
    """What a terminal showed, without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r", "\n")


def test_the_header_says_what_is_trained(finished_run: FinishedRun) -> None:
    shown = plain(finished_run.shown)
    for wanted in (
        "recipe   cifar10",
        "model    resnet8d, ",
        f"data     45 training and 14 validation images of 3 classes in {finished_run.data}",
        "precision fp32",
        "batch    16 = 1 rank(s) x 1 micro-batch(es) x 16 images; 3 steps an epoch, 3 epochs",
        "lr       peak 0.0125, warm-up 0 epochs, then cosine",
        f"run      {finished_run.folder}/",
    ):
        assert wanted in shown


def test_the_bar_shows_loss_lr_speed_and_time_left(finished_run: FinishedRun) -> None:
    shown = plain(finished_run.shown)
    bars = re.findall(r"epoch +[\d.]+  loss [\d.]+  lr [\d.]+  [\d,]+ imgs/sec .* \d+/9 \d:\d\d:\d\d", shown)
    assert bars, shown
    assert "\x1b[?25h" in finished_run.shown, "the cursor must be shown again"


def test_the_last_lines_are_the_result_and_the_next_commands_which_work(
    finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((finished_run.folder / "summary.json").read_text())
    *_, result, to_evaluate, to_predict, to_export, curves = filter(None, plain(finished_run.shown).splitlines())
    scores = f"top-1 {summary['top1']:.2f} %  top-2 {summary['top2']:.2f} %"
    assert result.startswith(f"{scores}  {summary['images_per_sec']:,.0f} imgs/sec")
    assert result.endswith(f"everything is in {finished_run.folder}/")

    def called(line: str, label: str, main: Callable[[Sequence[str]], object], *instead: str) -> str:
        words = shlex.split(line)
        assert words[:4] == [label, "python", "-m", f"fasttricks.{label}"]
        assert call(main, *[word for word in words[4:] if word != "IMAGE..."], *instead) == 0
        return capsys.readouterr().out

    assert called(to_evaluate, "evaluate", evaluate.main).startswith(f"{scores}  loss {summary['val_loss']:.4f}")
    image = next((finished_run.data / "val").rglob("*.jpg"))
    assert str(image) in called(to_predict, "predict", predict.main, str(image))
    assert "model.safetensors" in called(to_export, "export", export.main, "--no-onnx")
    shutil.rmtree(finished_run.folder / "export")
    assert shlex.split(curves) == ["curves", "tensorboard", "--logdir", str(finished_run.folder)]


def test_the_run_folder_holds_all_of_it(finished_run: FinishedRun) -> None:
    folder = finished_run.folder
    names = {path.name for path in folder.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert names == {"config.json", "metrics.jsonl", "metrics.csv", "curves.png", "checkpoints", "summary.json"}
    rows = list(csv.DictReader((folder / "metrics.csv").read_text("utf-8").splitlines()))
    measured = [record for record in records(folder) if "top1" in record]
    assert [row["top1"] for row in rows] == [str(record["top1"]) for record in measured] and len(rows) > 1
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best.pt",
        "step-0000000006.pt",
        "step-0000000009.pt",
    ]
    with Image.open(folder / "curves.png") as curves:
        assert min(curves.size) >= 400


def test_config_json_says_who_began_it_where_and_when(finished_run: FinishedRun) -> None:
    (start,) = json.loads((finished_run.folder / "config.json").read_text())["starts"]
    assert shlex.split(start["command"])[-len(finished_run.args) :] == finished_run.args
    assert start["host"] == socket.gethostname()
    age = datetime.now(timezone.utc) - datetime.fromisoformat(start["date"])
    assert 0 <= age.total_seconds() < 3600


def test_config_json_is_resolved_and_dated_by_commit(finished_run: FinishedRun) -> None:
    saved = json.loads((finished_run.folder / "config.json").read_text())
    assert saved["config"]["model"]["name"] == "resnet8d"
    assert saved["config"]["loss"]["smoothing"] == 0.1, "the recipe's own value"
    assert saved["config"]["data"]["root"] == str(finished_run.data)
    assert saved["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert saved["versions"]["fasttricks"] == fasttricks.__version__
    assert {"python", "triton", "numpy", "nvidia-dali-cuda120", "commit"} <= saved["versions"].keys()
    config = read_config(finished_run.folder)
    assert isinstance(config, TrainConfig)
    assert config.epochs == 3


def test_metrics_have_every_step_and_every_validation(finished_run: FinishedRun) -> None:
    lines = records(finished_run.folder)
    training = [line for line in lines if "train_loss" in line]
    assert [line["step"] for line in training] == list(range(1, 10))
    assert all(math.isfinite(line["train_loss"]) and line["images_per_sec"] > 0 for line in training)
    assert training[0]["lr"] == pytest.approx(0.0125)
    assert [line["epoch"] for line in lines if "top1" in line] == [1, 2, 3]


def test_tensorboard_reads_the_same_numbers(finished_run: FinishedRun) -> None:
    events = EventAccumulator(str(finished_run.folder), size_guidance={"tensors": 0})
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    assert '| model.name | "resnet8d" |' in text.tensor_proto.string_val[0].decode()
    training = [line for line in records(finished_run.folder) if "train_loss" in line]
    assert {"train_loss", "lr", "images_per_sec", "top1", "top2", "val_loss"} <= set(events.Tags()["scalars"])
    read = events.Scalars("train_loss")
    assert [event.step for event in read] == [line["step"] for line in training]
    assert [event.value for event in read] == pytest.approx([line["train_loss"] for line in training], rel=1e-6)


def test_summary_json_agrees_with_the_last_validation(finished_run: FinishedRun) -> None:
    summary = json.loads((finished_run.folder / "summary.json").read_text())
    last = [line for line in records(finished_run.folder) if "top1" in line][-1]
    assert {name: summary[name] for name in ("top1", "top2", "val_loss")} == {
        n: last[n] for n in ("top1", "top2", "val_loss")
    }
    assert (summary["recipe"], summary["epochs"], summary["val_images"]) == ("cifar10", 3, 14)
    assert summary["images_per_sec"] == pytest.approx(3 * 45 / summary["train_seconds"])
    assert "threads" in summary["device"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_there_is_refused(finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished_run.folder)
    assert call(train.main, *finished_run.args) == 2
    error = capsys.readouterr().err
    assert f"run_dir = {str(finished_run.folder)!r}: already exists and is never overwritten; add --resume" in error
    assert error.count("\n") == 1
    assert contents(finished_run.folder) == before


def test_resuming_with_another_config_names_the_field(
    finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(train.main, *finished_run.args, "--resume", "--loss.smoothing", "0.2") == 2
    assert "loss.smoothing: 0.1 -> 0.2" in capsys.readouterr().err


def test_resuming_a_finished_run_says_the_result_again(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tiny_data, tmp_path / "run", "--epochs", "1")
    assert call(train.main, *args) == 0
    first = capsys.readouterr().out.strip().splitlines()
    before = contents(tmp_path / "run")
    assert call(train.main, *args, "--resume") == 0
    again = capsys.readouterr().out.strip().splitlines()
    assert again[-5:] == first[-5:]
    assert any(re.fullmatch(r"resume   .*step-0000000003.pt, after epoch 1 of 1", line) for line in again)
    after = contents(tmp_path / "run")
    for name in ("metrics.jsonl", "summary.json", "checkpoints/step-0000000003.pt"):
        assert after[name] == before[name]


def test_ctrl_c_saves_and_says_how_to_go_on(tiny_data: Path, tmp_path: Path) -> None:
    """Typed on a real terminal after the first epoch of very many."""
    args = arguments(tiny_data, tmp_path / "run", "--epochs", "5000")
    code, shown = on_terminal("fasttricks.train", *args, until="top1", keys=b"\x03")
    text = plain(shown)
    assert code == 0, text
    assert "Traceback" not in text
    assert "SIGINT: saving after this step; Ctrl-C again ends at once" in text
    *_, last = text.strip().splitlines()
    step, again = re.fullmatch(r"stopped after step (\d+), saved; resume with: (.*)", last).groups()
    assert shlex.split(again) == [sys.executable, "-m", "fasttricks.train", *args, "--resume"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{int(step):010d}.pt").is_file()
    assert (tmp_path / "run" / "curves.png").is_file()
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("place", ["elsewhere/teacher.cache", "run/metrics.jsonl", ""])
def test_a_refused_file_in_training_is_the_one_that_is_named(
    place: str,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run folder is blamed for its own files, and for a failed write, which names none."""

    def refuse(_: object) -> None:
        names = [str(tmp_path / place)] if place else []
        raise OSError(errno.ENOSPC, "No space left on device", *names)

    monkeypatch.setattr("fasttricks.trainer.fit", refuse)
    assert call(train.main, *arguments(tiny_data, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    own = f"error: run_dir = '{tmp_path / 'run'}': must be on a disk with room"
    other = f"error: {tmp_path / place}: No space left on device; free some room"
    assert said.startswith(other if place.startswith("elsewhere") else own), said
    assert said.count("\n") == 1 and "--resume" in said
