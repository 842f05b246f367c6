"""python -m fasttricks.evaluate: the metrics of a checkpoint, whatever the batch size and the number of ranks."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import evaluate
from fasttricks.config import EvalConfig
from fasttricks.models import build_model
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.saved import read_saved
from lib.forked import python_m
from lib.tiny import ALONE, FinishedRun, call, configure, torchrun

LINE = re.compile(r"top-1 ([\d.]+) %  top-2 ([\d.]+) %  loss ([\d.]+)  (\d+) images  (.*)")


def result(output: str) -> tuple[str, str, str, str, str]:
    """(top-1, top-2, loss, images, checkpoint) as the first line of output has them."""
    match = LINE.fullmatch(output.partition("\n")[0])
    assert match, output
    return match.groups()  # type: ignore[return-value]


def expected(run: FinishedRun) -> tuple[str, str, str, str, str]:
    summary = json.loads((run.folder / "summary.json").read_text())
    file = str(run.folder / "checkpoints" / "step-0000000009.pt")
    return (
        f"{summary['top1']:.2f}",
        f"{summary['top2']:.2f}",
        f"{summary['val_loss']:.4f}",
        str(summary["val_images"]),
        file,
    )


def test_the_command_gives_what_the_run_ended_with(finished_run: FinishedRun) -> None:
    done = python_m("fasttricks.evaluate", str(finished_run.folder), "--data.root", str(finished_run.data))
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == expected(finished_run)
    assert done.stderr == ""


@pytest.mark.parametrize("batch_size", [1, 3, 14, 100])
def test_the_batch_size_changes_nothing(
    batch_size: int, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished_run.folder / "checkpoints" / "step-0000000009.pt"
    assert call(evaluate.main, str(file), "--eval.batch-size", str(batch_size)) == 0
    assert result(capsys.readouterr().out) == expected(finished_run)


def test_fp16_measures_nearly_the_same(finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(evaluate.main, str(finished_run.folder), "--precision", "fp16") == 0
    half, exact = result(capsys.readouterr().out), expected(finished_run)
    assert abs(float(half[0]) - float(exact[0])) <= 100 / 14, "one image of 14 at most"
    assert float(half[2]) == pytest.approx(float(exact[2]), rel=5e-3)


@pytest.mark.slow  # make test sees two ranks measure as one does, in test_ranks.py
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_changes_nothing(ranks: int, finished_run: FinishedRun) -> None:
    """14 images do not divide by 3; in batches of 2 one rank has an empty one."""
    done = torchrun(ranks, "fasttricks.evaluate", str(finished_run.folder), "--eval.batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert result(done.stdout) == expected(finished_run)


def test_against_a_plain_loop_over_pil_images(finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    """One image at a time, as the paper says: short side to 36, the centre 32 x 32, less the mean, by the deviation."""
    state = load_checkpoint(finished_run.folder)
    config = configure(finished_run.data, finished_run.folder)
    model = build_model(config.model, 3)
    model.load_state_dict(state["average"])
    model.eval()
    top1, top2, losses = 0, 0, []
    for path in sorted((finished_run.data / "val").rglob("*.jpg")):
        label = ["ant", "bee", "cat"].index(path.parent.name)
        with torch.no_grad():
            logits = model(torch.from_numpy(validation_pixels(path)).permute(2, 0, 1)[None].float())[0].double()
        top1 += int(logits.argmax()) == label
        top2 += label in logits.topk(2).indices
        losses.append(float(torch.logsumexp(logits, 0) - logits[label]))
    assert call(evaluate.main, str(finished_run.folder), "--eval.no-flip") == 0
    shown_top1, shown_top2, shown_loss, images, _ = result(capsys.readouterr().out)
    assert len(losses) == int(images) == 14
    assert float(shown_top2) == pytest.approx(100 * top2 / 14, abs=0.01)
    assert float(shown_loss) == pytest.approx(np.mean(losses), abs=2e-3)
    assert float(shown_top1) == pytest.approx(100 * top1 / 14, abs=0.01)


def test_answers_name_the_images_in_the_pass_of_the_metrics(finished_run: FinishedRun) -> None:
    """Each mistake is an image of its true class; one image at a time, the network takes it for the class that is named."""
    saved = read_saved(finished_run.folder)
    config = replace(evaluate.as_run(saved.config), eval=EvalConfig(flip=False))
    found = evaluate.answer_checkpoint(config, saved, ALONE)
    metrics, answers, images = found.metrics, found.answers, found.images
    assert metrics == evaluate.evaluate_checkpoint(config, saved, ALONE)
    assert answers.seen.tolist() == [len(list((finished_run.data / "val" / name).iterdir())) for name in saved.classes]
    assert len(answers.mistakes.images) == 14 - answers.right.sum() == round(14 * (1 - metrics["top1"] / 100)) > 0
    model = saved.network()
    for image, true, predicted, confidence in zip(*answers.mistakes, strict=True):
        path = finished_run.data / "val" / images.name(image)
        assert path.parent.name == saved.classes[true]
        with torch.no_grad():
            logits = model(torch.from_numpy(validation_pixels(path)).permute(2, 0, 1)[None].float())[0]
        assert int(logits.argmax()) == predicted != true
        assert float(logits.softmax(0).max()) == pytest.approx(confidence, abs=2e-3)


def test_the_answers_are_shown_and_the_file_has_all_of_them(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.json"
    assert call(evaluate.main, str(finished_run.folder), "--output", str(file)) == 0
    shown = capsys.readouterr().out.splitlines()
    found = json.loads(file.read_text())
    names = [row["name"] for row in found["classes"]]
    assert names == ["ant", "bee", "cat"] and [row["images"] for row in found["classes"]] == [5, 5, 4]
    assert (
        [sum(row) for row in found["confusion"]] == [5, 5, 4] and found["step"] == 9 and found["weights"] == "averaged"
    )
    right = [row["right"] for row in found["classes"]]
    assert right == [row[k] for k, row in enumerate(found["confusion"])]
    assert found["metrics"]["top1"] == pytest.approx(100 * sum(right) / 14)
    assert len(found["mistakes"]) == 14 - sum(right) and len(found["reliability"]) == 15
    assert all((finished_run.data / "val" / row["image"]).is_file() for row in found["mistakes"])
    assert all(row["image"].startswith(row["true"]) for row in found["mistakes"])
    assert sum(row["images"] for row in found["reliability"]) == 14
    gaps = [abs(row["right"] - row["confidence_sum"]) for row in found["reliability"]]
    assert found["ece"] == pytest.approx(sum(gaps) / 14)
    assert shown[1].split() == ["class", "accuracy", "images"]
    worst = sorted(found["classes"], key=lambda row: row["accuracy"])
    assert [line.split()[0] for line in shown[2:5]] == [row["name"] for row in worst]
    assert shown[2].split()[1:] == [f"{100 * worst[0]['accuracy']:.2f}", "%", str(worst[0]["images"])]
    assert f"ECE {100 * found['ece']:.2f} %: " in shown[-1]


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        ("a.txt", "must end in .json"),
        ("there.json", "already exists and is never overwritten"),
        ("link.json", "already exists and is never overwritten"),
        ("nowhere/a.json", "must be in a folder that is there"),
        ("there.json/a.json", "must be in a folder that is there"),
    ],
)
def test_an_output_that_cannot_be_made_is_refused_before_the_work(
    output: str, wrong: str, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "link.json").symlink_to("nowhere")
    monkeypatch.setattr(evaluate.SavedRunCommand, "open", None)
    assert call(evaluate.main, str(finished_run.folder), "--output", str(tmp_path / output)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: output = '{tmp_path / output}': {wrong}") and error.count("\n") == 1
    assert (tmp_path / "there.json").read_text() == "mine"


def validation_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        scale = 36 / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
    top, left = ((side - 32) // 2 for side in pixels.shape[:2])
    crop = pixels[top : top + 32, left : left + 32]
    return (crop - [123.68, 116.779, 103.939]) / [58.393, 57.12, 57.375]


def test_another_image_size_and_the_plain_weights(
    finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are other questions: the answers must differ from the run's own, over all 14 images."""
    losses = {expected(finished_run)[2]}
    for options in (["--data.image-size", "48", "--data.val-resize", "54"], ["--no-average"]):
        assert call(evaluate.main, str(finished_run.folder), *options) == 0
        found = result(capsys.readouterr().out)
        assert found[3] == "14"
        losses.add(found[2])
    assert len(losses) == 3


def test_help_without_and_with_a_checkpoint(finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(evaluate.main, "--help") == 0
    assert "CHECKPOINT" in capsys.readouterr().out
    assert call(evaluate.main) == 2
    capsys.readouterr()
    assert call(evaluate.main, str(finished_run.folder), "--help") == 0
    assert "--eval.batch-size" in capsys.readouterr().out


def test_val_images_of_a_class_unknown_to_the_checkpoint(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val" / "dog").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "val" / "dog" / "1.jpg")
    assert call(evaluate.main, str(finished_run.folder), "--data.root", str(tmp_path)) == 2
    assert "class folder dog has no counterpart" in capsys.readouterr().err
