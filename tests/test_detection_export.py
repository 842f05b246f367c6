"""The export of a detection: read back by evaluate, predict, --init and ONNX Runtime; its card's Python runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import evaluate as evaluation
from fasttricks.commands import export, export_boxes, predict
from fasttricks.config import ConfigError
from fasttricks.runs.exported import describe
from fasttricks.runs.saved import read_saved
from fasttricks.training.build import build
from lib.cards import blocks, run_blocks
from lib.detected import config_for
from lib.tiny import ALONE, call

pytest.importorskip("safetensors")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def exported(detected_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without model.onnx."""
    target = tmp_path_factory.mktemp("exported") / "out"
    assert call(export.main, str(detected_run), "--output", str(target), "--no-onnx") == 0
    return target


def test_it_stands_for_the_run(exported: Path, detected_run: Path, tiny_boxes: Path, tmp_path: Path) -> None:
    """evaluate has its scores, predict draws its boxes, and a run starts from its weights."""
    image, found, tables = str(next((tiny_boxes / "VOC2007" / "JPEGImages").glob("1*.jpg"))), [], []
    for place in (detected_run, exported):
        file = tmp_path / f"{len(found)}.json"
        assert call(evaluation.main, str(place), "--data.root", str(tiny_boxes), "--output", str(file)) == 0
        found.append(json.loads(file.read_text()))
        assert call(predict.main, str(place), image, "--draw", str(tmp_path / f"drawn{len(tables)}")) == 0
        tables.append((tmp_path / f"drawn{len(tables)}" / "boxes.csv").read_text())
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["classes"] == found[1]["classes"]
    assert tables[0] == tables[1] and tables[0].count("\n") > 2
    description = describe(exported)
    assert description is not None and (description.task, description.classes) == ("detection", ("ball", "car", "tree"))
    run = build(config_for(tiny_boxes, tmp_path / "run", init=str(exported)), ALONE)
    wanted = read_saved(detected_run).network().state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in run.model.state_dict().items() if "tracked" not in name)


def test_its_files_say_what_it_is(exported: Path, detected_run: Path) -> None:
    hub, card = json.loads((exported / "config.json").read_text()), (exported / "README.md").read_text()
    assert (hub["architecture"], hub["backbone"], hub["problem_type"]) == (
        "faster_rcnn",
        "resnet8d",
        "object_detection",
    )
    assert hub["label_names"] == ["ball", "car", "tree"] and (hub["short_side"], hub["long_side"]) == (40, 60)
    score = json.loads((detected_run / "summary.json").read_text())["map"]
    assert f"On 5 validation images: mAP {score:.2f} %" in card and "pipeline_tag: object-detection" in card
    assert "# Faster R-CNN on resnet8d, 3 classes" in card and "loss" not in card.split("## Use")[0]
    assert "the short side to 40 pixels, the long one to 60 at most" in card and "onnx" not in card.lower()


def test_its_python_finds_the_boxes_that_predict_draws(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow and torch resize images alike, to a level of 255; so the surest box is drawn too, the same to a pixel."""
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    found = run_blocks(blocks(folder), folder, monkeypatch)
    assert call(predict.main, str(folder), str(folder / "image.jpg"), "--draw", str(tmp_path / "drawn")) == 0
    rows = [row.split(",") for row in (tmp_path / "drawn" / "boxes.csv").read_text().splitlines()[1:]]
    drawn = [[float(value) for value in row[3:]] for row in rows if row[2] == found["names"][found["labels"][0]]]
    surest = np.array([float(found["scores"][0]), *(found["boxes"][0] / found["scale"])])
    assert (np.abs(np.array(drawn) - surest) <= [0.01, 2, 2, 2, 2]).all(1).sum() == 1


def some(*scores: float) -> list[np.ndarray]:
    count = len(scores)
    boxes = np.array([[10.0 * k, 0, 10 * k + 8, 8] for k in range(count)], np.float32).reshape(-1, 4)
    return [boxes, np.zeros(count, np.int64), np.array(scores, np.float32)]


def test_boxes_that_differ_are_counted() -> None:
    """Not by their order, which equal scores may change; a lost box, another class, place or score are each one."""
    ours = some(0.9, 0.8, 0.8)
    swapped = [part[[0, 2, 1]] for part in ours]
    assert export_boxes._lost(ours, swapped, longer=100) == 0
    assert export_boxes._lost(ours, some(0.9, 0.8), longer=100) == 1
    assert export_boxes._lost(ours, some(), longer=100) == 3 and export_boxes._lost(some(), ours, longer=100) == 0
    for place, change in ((0, 0.2), (1, 1), (2, 0.01)):
        theirs = [part.copy() for part in ours]
        theirs[place][1] += np.array(change, theirs[place].dtype)
        assert export_boxes._lost(ours, theirs, longer=100) == 1


@pytest.mark.slow
def test_its_onnx_finds_the_same_boxes_on_real_photographs(
    detected_run: Path, test_data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tiny run, on photographs of several sizes; and by the card's Python. A file of other weights is refused."""
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path / "out"
    assert call(export.main, str(detected_run), "--output", str(target)) == 0
    names = run_blocks(blocks(target), target, monkeypatch)
    assert len(names["boxes"]) == len(names["scores"]) > 0
    saved = read_saved(detected_run)
    network = export_boxes.from_pixels(saved.network(), saved.config)
    session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
    folder = test_data("voc_small") / "raccoon" / "VOCdevkit" / "VOC2007" / "JPEGImages"
    for photograph, side in zip(sorted(folder.iterdir()), (40, 57, 96), strict=False):
        with Image.open(photograph) as image:
            shown = image.convert("RGB").resize((side * image.width // image.height, side))
        pixels = np.asarray(shown, np.float32).transpose(2, 0, 1)[None]
        with torch.no_grad():
            wanted = [part.numpy() for part in network(torch.from_numpy(pixels))]
        found = session.run(None, {"pixels": pixels})
        assert len(wanted[0]) > 3 and export_boxes._lost(wanted, found, longer=max(pixels.shape[2:])) == 0

    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            boxes, labels, scores = self.network(pixels)
            return boxes + 5, labels, scores

    session_of = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **more: session_of(target / "model.onnx", **more))
    monkeypatch.setattr(export_boxes, "from_pixels", lambda *_: Other().eval())
    with pytest.raises(ConfigError, match=r"of the 20 surest boxes \d+ differ between ONNX Runtime and the network"):
        export_boxes.write_boxes_onnx(saved.network(), tmp_path / "x.onnx", saved.config, {}, export.OPSET)
