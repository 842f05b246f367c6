"""python -m fasttricks.predict: the classes that validation would see, and what becomes of a bad image."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import predict
from fasttricks.commands.predict import PredictConfig, Prediction
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.reference import decode, normalise, validation_pixels
from fasttricks.data.sources.folder import scan_folder
from fasttricks.runs.saved import read_saved
from fasttricks.tasks.classification import evaluation_logits
from lib.tiny import ALONE, FinishedRun, call, environment


def validation_images(run: FinishedRun) -> list[str]:
    return [str(path) for path in sorted((run.data / "val").rglob("*.jpg"))]


def predictions(run: FinishedRun, paths: list[str], **options: object) -> list[Prediction]:
    saved = read_saved(run.folder)
    config = PredictConfig(data=saved.config.data, device="cpu", **options)  # type: ignore[arg-type]
    return list(predict.predict(saved, paths, config, ALONE))


@pytest.mark.parametrize("flip", [False, True])
def test_probabilities_are_those_of_the_validation_images(finished_run: FinishedRun, flip: bool) -> None:
    """The run's own Loader over its val/, all images in one batch, and softmax by numpy in float64."""
    saved = read_saved(finished_run.folder)
    folder = scan_folder(finished_run.data / "val", classes=saved.classes)
    loader = Loader(folder, saved.config.data, training=False, batch_size=14, device=torch.device("cpu"))
    (batch,) = loader
    model = saved.network()
    with torch.no_grad():
        logits = evaluation_logits(model, batch.images, flip=flip).double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    paths = [str(finished_run.data / "val" / file) for file in folder.files]
    found = predictions(finished_run, paths, flip=flip)
    assert [p.path for p in found] == paths
    for row, prediction in zip(shares, found, strict=True):
        expected = sorted(zip(saved.classes, row, strict=True), key=lambda pair: -pair[1])
        assert [name for name, _ in prediction.classes] == [name for name, _ in expected]
        np.testing.assert_allclose([share for _, share in prediction.classes], [s for _, s in expected], rtol=1e-5)
    assert not np.allclose(shares, 1 / 3, atol=0.05), "the network knows nothing: any order would pass"


def test_an_image_is_seen_as_pil_and_numpy_would_prepare_it(finished_run: FinishedRun) -> None:
    saved = read_saved(finished_run.folder)
    model, data = saved.network(), saved.config.data
    path = validation_images(finished_run)[3]
    pixels = validation_pixels(decode(path), image_size=data.image_size, val_resize=data.val_resize)
    image = torch.from_numpy(normalise(pixels)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        shares = model(image).double().softmax(1)[0]
    (found,) = predictions(finished_run, [path])
    for name, share in found.classes:
        assert share == pytest.approx(float(shares[saved.classes.index(name)]), abs=0.01)  # two JPEG decoders


def test_top_limits_the_classes_and_a_path_may_come_twice(finished_run: FinishedRun) -> None:
    path = validation_images(finished_run)[0]
    first, second = predictions(finished_run, [path, path], top=2)
    # the last bit of a convolution depends on where in a batch an image lies, on some CPUs
    assert [name for name, _ in first.classes] == [name for name, _ in second.classes] and first.path == second.path
    assert len(first.classes) == 2
    assert len(predictions(finished_run, [path], top=7)[0].classes) == 3


def test_more_images_than_a_batch(finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = validation_images(finished_run)
    whole = predictions(finished_run, paths)
    monkeypatch.setattr(predict, "BATCH_SIZE", 5)
    for a, b in zip(whole, predictions(finished_run, paths), strict=True):
        assert [name for name, _ in a.classes] == [name for name, _ in b.classes]


def test_bad_images_are_named_and_the_others_predicted(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = validation_images(finished_run)[:2]
    damaged, text, gone = tmp_path / "damaged.jpg", tmp_path / "text.jpg", tmp_path / "gone.jpg"
    damaged.write_bytes(Path(good[0]).read_bytes()[:60])
    text.write_text("no image at all")
    code = call(
        predict.main, str(finished_run.folder), good[0], str(damaged), str(text), str(gone), "/dev/null", good[1]
    )
    out, err = capsys.readouterr()
    assert code == 1
    assert [line for line in out.splitlines() if not line.startswith(" ")] == good
    assert len(re.findall(r"^ +\d+\.\d\d %  (ant|bee|cat)$", out, re.MULTILINE)) == 6
    said = err.splitlines()
    assert [line.split(": ")[1] for line in said] == [str(damaged), str(text), str(gone), "/dev/null"]
    assert "cut off" in said[0] or "header" in said[0]
    assert "no image: first bytes b'no image at '" in said[1]
    assert "No such file or directory" in said[2]
    assert "unreadable" in said[3]
    alone = predictions(finished_run, [good[1]], flip=True)[0]
    assert f"{100 * alone.classes[0][1]:.2f} %  {alone.classes[0][0]}" in out


def test_only_bad_images_are_an_end_too(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found bad before and while they are decoded, in more than one batch."""
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    flipped = bytearray(Path(validation_images(finished_run)[0]).read_bytes())
    flipped[20:200] = bytes(180)
    (tmp_path / "a.jpg").write_bytes(flipped)
    paths = [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "b.jpg", "a.jpg", "b.jpg")]
    assert call(predict.main, str(finished_run.folder), *paths) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[1] for line in err.splitlines()] == paths


def test_other_formats_and_relative_paths(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Image.open(validation_images(finished_run)[0]) as image:
        image.save("a.png")
        image.save("b.bmp")
    a, b = predictions(finished_run, ["a.png", "./b.bmp"])
    assert [name for name, _ in a.classes] == [name for name, _ in b.classes] != []
    # pixels are the same; the last bit of a convolution depends on where in a batch an image lies, on some CPUs
    assert [share for _, share in a.classes] == pytest.approx([share for _, share in b.classes], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "usage: python -m fasttricks.predict"),
        (["-h"], 0, "usage: python -m fasttricks.predict"),
        (["{run}"], 2, "images: none given"),
        (["{run}", "x.jpg", "--top", "0"], 2, "top = 0: must be 1 or more"),
        (["/nowhere", "x.jpg"], 2, "checkpoint = '/nowhere': must be a file, or a run folder"),
    ],
)
def test_what_is_wrong_is_said(
    arguments: list[str], code: int, message: str, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(predict.main, *(a.format(run=finished_run.folder) for a in arguments)) == code
    out, err = capsys.readouterr()
    assert message in " ".join((out + err).replace("│", " ").split())


@pytest.mark.slow
def test_the_command(finished_run: FinishedRun) -> None:
    command = [sys.executable, "-m", "fasttricks.predict", str(finished_run.folder), validation_images(finished_run)[0]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 4
