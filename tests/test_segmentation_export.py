"""The export of a segmentation: read back by evaluate, predict, --init, torchvision and ONNX Runtime; its card's Python runs."""

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
from fasttricks.commands import export, predict
from fasttricks.config import DataConfig, ModelConfig, SegmentConfig
from fasttricks.models.fcn import build_fcn
from fasttricks.runs.exported import describe
from fasttricks.runs.pixel_snippets import torchvision_fcn
from fasttricks.runs.saved import read_saved
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.cards import blocks, run_blocks
from lib.networks import with_random_norms
from lib.segmented import config_for
from lib.tiny import ALONE, call

pytest.importorskip("safetensors")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def exported(segmented_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without model.onnx."""
    target = tmp_path_factory.mktemp("exported") / "out"
    assert call(export.main, str(segmented_run), "--output", str(target), "--no-onnx") == 0
    return target


def test_its_scores_are_those_of_the_run(
    exported: Path, segmented_run: Path, tiny_masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for place in (segmented_run, exported):
        file = tmp_path / f"{len(found)}.json"
        assert call(evaluation.main, str(place), "--data.root", str(tiny_masks), "--output", str(file)) == 0
        found.append(json.loads(file.read_text()))
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["classes"] == found[1]["classes"]
    assert [one["name"] for one in found[1]["classes"]] == ["sky", "road", "car"]
    description = describe(exported)
    assert (
        description is not None and description.task == "segmentation" and description.classes == ("sky", "road", "car")
    )
    capsys.readouterr()


def test_it_draws_as_the_run_does(exported: Path, segmented_run: Path, tiny_masks: Path, tmp_path: Path) -> None:
    image = str(tiny_masks / "val" / "images" / "000.jpg")
    for name, place in (("run", segmented_run), ("export", exported)):
        assert call(predict.main, str(place), image, "--draw", str(tmp_path / name)) == 0
    ours, theirs = ((tmp_path / name / "masks" / "000.png").read_bytes() for name in ("run", "export"))
    assert ours == theirs


def test_a_run_begins_with_its_weights(exported: Path, segmented_run: Path, tiny_masks: Path, tmp_path: Path) -> None:
    """The base network's and, as the classes are the same, the heads'."""
    run = build(config_for(tiny_masks, tmp_path / "run", init=str(exported)), ALONE)
    wanted = read_saved(segmented_run).network().state_dict()
    assert all(
        torch.equal(value, wanted[name]) for name, value in run.model.state_dict().items() if "tracked" not in name
    )


def test_its_files_say_what_it_is(exported: Path, segmented_run: Path) -> None:
    hub, card = json.loads((exported / "config.json").read_text()), (exported / "README.md").read_text()
    assert (hub["architecture"], hub["backbone"], hub["problem_type"]) == ("fcn", "resnet8d", "semantic_segmentation")
    assert hub["label_names"] == ["sky", "road", "car"] and hub["short_side"] == 40
    miou = json.loads((segmented_run / "summary.json").read_text())["miou"]
    assert f"On 5 validation images: mIoU {miou:.2f} %" in card and "pipeline_tag: image-segmentation" in card
    assert "# FCN on resnet8d, 3 classes" in card and "timm" not in card.split("## How")[0].replace(
        "timm and torchvision", ""
    )


def test_its_python_finds_the_mask_that_predict_draws(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow and torch resize images alike, to a level of 255."""
    folder = Path(shutil.copytree(exported, tmp_path / "copy"))
    prepare, asked = blocks(folder)
    found = run_blocks([prepare, asked], folder, monkeypatch)
    assert call(predict.main, str(folder), str(folder / "image.jpg"), "--draw", str(tmp_path / "drawn")) == 0
    drawn = np.array(Image.open(tmp_path / "drawn" / "masks" / "image.png"))
    assert found["mask"].shape == drawn.shape and (found["mask"] == drawn).mean() > 0.98


@pytest.mark.slow
def test_a_network_of_real_photographs_is_the_same_in_its_onnx(
    segmented_run: Path, test_data: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CamVid's classes by a run that starts from the tiny one's base network; two photographs, of two sizes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    camvid = test_data("seg_small") / "camvid" / "ADEChallengeData2016"
    options = (
        "--init",
        str(segmented_run),
        "--data.image-size",
        "96",
        "--data.val-resize",
        "96",
        "--segment.base-size",
        "96",
    )
    fit(build(config_for(camvid, tmp_path / "run", *options, epochs=1), ALONE))
    target = tmp_path / "out"
    assert call(export.main, str(tmp_path / "run"), "--output", str(target)) == 0
    prepare, asked, onnx = blocks(target)
    names = run_blocks([prepare, asked, onnx], target, monkeypatch)
    assert names["mask"].shape == (70, 91)
    photographs = sorted((camvid / "images" / "validation").iterdir())[:2]
    for photograph, side in zip(photographs, (96, 131), strict=True):
        with Image.open(photograph) as image:
            shown = image.convert("RGB").resize((side * image.width // image.height, side))
        pixels = np.asarray(shown, np.float32).transpose(2, 0, 1)[None]
        session = onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"pixels": pixels})
        with torch.no_grad():
            saved = read_saved(tmp_path / "run")
            wanted = export.from_pixels(saved.network(), saved.config.data)(torch.from_numpy(pixels)).numpy()
        assert found.shape == (1, 11, *pixels.shape[2:]) and abs(found - wanted).max() < 1e-4 * abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stride"), [("resnet8d", 8), ("mobilenet_v1", 16)])
def test_onnx_takes_any_size(name: str, stride: int, tmp_path: Path) -> None:
    """write_onnx compares two batches and sizes by itself; here a third, and the names of its axes."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    fcn = build_fcn(
        ModelConfig(name=name, width=0.125 if name == "resnet8d" else 1), SegmentConfig(output_stride=stride), 3
    )
    model = with_random_norms(fcn).eval()
    file = tmp_path / "model.onnx"
    export.write_onnx(model, file, DataConfig(image_size=32, val_resize=32), {}, any_size=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [one.shape for one in (*session.get_inputs(), *session.get_outputs())] == [
        ["N", 3, "H", "W"],
        ["N", 3, "H", "W"],
    ]
    pixels = 255 * torch.rand(3, 3, 45, 70)
    with torch.no_grad():
        wanted = export.from_pixels(model, DataConfig())(pixels).numpy()
    (found,) = session.run(None, {"pixels": pixels.numpy()})
    assert wanted.std() > 0.01 and abs(found - wanted).max() < 1e-4 * abs(wanted).max()


def test_torchvisions_fcn_takes_the_weights_that_the_card_gives_it(tmp_path: Path) -> None:
    """The card names it, and its keys are the same."""
    from torchvision.models import segmentation

    config = config_for(
        tmp_path, tmp_path / "run", "--model.width", "1", "--model.stem-stride", "4", "--model.name", "resnet50b"
    )
    assert torchvision_fcn(config) == "fcn_resnet50"
    with torch.device("meta"):
        ours = build_fcn(config.model, config.segment, 5).state_dict()
        theirs = segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        ).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    other = config_for(tmp_path, tmp_path / "run")
    assert torchvision_fcn(other) == ""
