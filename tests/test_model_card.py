"""The model card's Python does what it says, as it is printed; the card names the tricks that were used and no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import export, predict
from fasttricks.config import DataConfig, ModelConfig, TrainConfig, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.data.pipeline.reference import validation_pixels
from fasttricks.models import build_model
from fasttricks.runs.card_snippets import snippets
from fasttricks.runs.model_card import model_card, tricks_used
from fasttricks.runs.saved import Saved, read_saved
from fasttricks.tasks.classification import CLASSIFICATION
from lib.cards import blocks, run_blocks
from lib.networks import with_random_norms
from lib.tiny import ALONE, FinishedRun, call

CLASSES = ("ant", "bee", "cat", "dog", "elk")
pytest.importorskip("safetensors")


def saved(model: ModelConfig, side: int) -> Saved:
    """As a finished run of `model` leaves it, with weights that tell a wrong order of keys."""
    torch.manual_seed(0)
    network = with_random_norms(build_model(model, len(CLASSES)))
    config = TrainConfig(
        recipe="x", epochs=6, global_batch_size=8, model=model, data=DataConfig(image_size=side, val_resize=side + 8)
    )
    return Saved(
        path=Path("step-0000000003.pt"), task="classification", config=config, classes=CLASSES, step=3, epoch=1,
        ranks=1, weights=network.state_dict(), average=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "side", "libraries"),
    [
        (ModelConfig(name="resnet8d", width=0.125, stem_stride=2), 40, ["fasttricks"]),
        (ModelConfig(name="resnet18b"), 40, ["timm", "torchvision"]),
        (ModelConfig(name="mobilenet_v1"), 40, ["timm"]),
        pytest.param(ModelConfig(name="inception_v3"), 75, ["timm", "torchvision"], marks=pytest.mark.slow),
        pytest.param(ModelConfig(name="inception_v3", aux_head=True), 75, ["torchvision"], marks=pytest.mark.slow),
        (ModelConfig(name="timm:test_resnet"), 40, ["timm"]),
    ],
    ids=lambda value: f"{value.name}{'-aux' * value.aux_head}" if isinstance(value, ModelConfig) else None,
)
def test_its_python_classifies_as_the_network_does(
    config: ModelConfig, side: int, libraries: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in libraries:
        pytest.importorskip(library)
    source, target = saved(config, side), tmp_path / "out"
    export.export(source, export.ExportConfig(output=str(target), onnx=False), None)
    prepare, *asked = blocks(target)
    assert [
        [name for name in ("timm", "torchvision", "fasttricks") if f"import {name}\n" in b or f"from {name}." in b]
        for b in asked
    ] == [[library] for library in libraries]
    for block in asked:
        found = run_blocks([prepare, block], target, monkeypatch)
        with Image.open(target / "image.jpg") as image:
            pixels = validation_pixels(image, image_size=side, val_resize=side + 8)
        assert abs(found["pixels"][0].transpose(1, 2, 0) - pixels).max() <= 1
        given = (torch.from_numpy(found["pixels"]) - found["mean"]) / found["std"]
        with torch.no_grad():
            expected = source.network()(given).softmax(1)[0]
        assert expected.std() > 0.01
        torch.testing.assert_close(found["shares"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_its_onnx_snippet_classifies_as_predict_does(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    target = tmp_path / "out"
    assert call(export.main, str(finished_run.folder), "--output", str(target)) == 0
    prepare, *_, onnx = blocks(target)
    found = run_blocks([prepare, onnx], target, monkeypatch)
    shares = torch.from_numpy(found["logits"])[0].softmax(0)
    source = read_saved(finished_run.folder)
    config = predict.PredictConfig(device="cpu", data=source.config.data)
    (said,) = predict.predict(source, [str(target / "image.jpg")], config, ALONE)
    assert dict(said.classes) == pytest.approx(dict(zip(found["names"], shares.tolist(), strict=True)), abs=0.02)


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos3"])
@pytest.mark.parametrize("antialias", [True, False])
def test_the_image_is_made_ready_as_the_run_did(
    interpolation: str, antialias: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where PIL cannot, the snippet says so. An image that grows is the same with antialiasing and without."""
    data = DataConfig(image_size=80, val_resize=96, interpolation=interpolation, antialias=antialias)  # type: ignore[arg-type]
    prepare = snippets(ModelConfig(name="resnet18d"), data, {"timm": "resnet18d"}, 5)["An image"]
    assert ("the run did not" in prepare) == (not antialias and interpolation != "linear")
    (tmp_path / "config.json").write_text('{"label_names": []}')
    found = run_blocks([prepare], tmp_path, monkeypatch)
    with Image.open(tmp_path / "image.jpg") as image:
        expected = validation_pixels(image, image_size=80, val_resize=96, interpolation=interpolation)
    assert np.abs(found["pixels"][0].transpose(1, 2, 0) - expected).max() <= (1 if interpolation == "linear" else 4)


@pytest.mark.parametrize(
    ("precision", "ran", "named"),
    [
        ("auto", "fp32", False),
        ("auto", "fp16", True),
        ("auto", "auto", False),
        ("bf16", "bf16", True),
        ("fp32", "fp32", False),
    ],
)
def test_half_precision_is_named_only_where_the_run_had_it(precision: str, ran: str, named: bool) -> None:
    config = dataclasses.replace(RECIPES["resnet50d-tricks"](), precision=precision)  # type: ignore[arg-type]
    assert ("low_precision" in tricks_used(config, ran)) == named


def test_a_card_without_a_run_folder_does_not_claim_half_precision() -> None:
    source = dataclasses.replace(saved(ModelConfig(name="resnet18d"), 40), config=RECIPES["mobilenet-tricks"]())
    card = model_card(source, CLASSIFICATION.metrics_of(40), {}, None, with_onnx=False)
    assert "low_precision" not in card
    assert "| precision | not known: auto is fp16 on CUDA and fp32 on the CPU |" in card
    assert "```python" in card and "onnx" not in card


@pytest.mark.parametrize(
    "teacher, named",
    [
        ("/home/me/runs/big", "big"),
        ("runs/big/", "big"),
        ("../big/best.pt", "best.pt"),
        ("timm:hf_hub:timm/resnet50.a1_in1k", "timm:hf_hub:timm/resnet50.a1_in1k"),
    ],
)
def test_a_card_names_the_teacher_without_its_folders(teacher: str, named: str) -> None:
    config = replace_fields(RECIPES["resnet50d-tricks"](), {"distill.teacher": teacher, "distill.digest": "abc"})
    source = dataclasses.replace(saved(ModelConfig(name="resnet18d"), 40), config=config)
    card = model_card(source, CLASSIFICATION.metrics_of(40), {}, None, with_onnx=False)
    assert f"| teacher | {named}, weights abc |" in card


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_trick_is_named_that_switching_it_off_would_not_change(recipe: str) -> None:
    from fasttricks.config.tricks import apply_tricks

    config = RECIPES[recipe]()
    for name in tricks_used(config, "fp16"):
        assert apply_tricks(config, off=[name]) != config, name
