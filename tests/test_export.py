"""python -m fasttricks.export: loaded back by timm, torchvision and ONNX Runtime; the model card says what was run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from fasttricks.commands import export
from fasttricks.config import ConfigError, DataConfig, ModelConfig
from fasttricks.config.recipes import RECIPES, resnet50d_tricks
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.reference import decode, validation_pixels
from fasttricks.data.sources.folder import ImageFolder
from fasttricks.models import MODELS, build_model
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.model_card import counterparts, hub_config, model_card
from fasttricks.runs.saved import Saved, read_saved
from fasttricks.system import extras
from fasttricks.tasks.classification import CLASSIFICATION
from lib.networks import with_random_norms
from lib.tiny import FinishedRun, call

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
safetensors_torch = pytest.importorskip("safetensors.torch")


# ------------------------------------------------------------------------------------------------- weights elsewhere


def theirs(package: str, name: str, num_classes: int, config: ModelConfig) -> nn.Module:
    if package == "timm":
        model: nn.Module = timm.create_model(name, num_classes=num_classes)
        return model
    more = (
        {"aux_logits": config.aux_head, "transform_input": False, "init_weights": False} if "inception" in name else {}
    )
    found: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **more)
    return found


@pytest.mark.parametrize(
    ("name", "packages"),
    [
        ("resnet18a", {"timm", "torchvision"}),
        pytest.param("resnet50b", {"timm", "torchvision"}, marks=pytest.mark.slow),
        ("resnet50d", {"timm"}),
        pytest.param("inception_v3", {"timm", "torchvision"}, marks=pytest.mark.slow),
        ("mobilenet_v1", {"timm"}),
        ("timm:test_resnet", {"timm"}),
    ],
)
def test_weights_load_strictly_into_their_networks_with_the_same_outputs(
    name: str, packages: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = ModelConfig(name=name)
    ours = with_random_norms(build_model(config, 7)).eval()
    export.write_safetensors(ours, tmp_path / "model.safetensors", {"format": "pt"})
    weights = safetensors_torch.load_file(tmp_path / "model.safetensors")
    images = torch.randn(1, 3, 80, 80)
    expected = ours(images)
    assert expected.std() > 0.01
    found = counterparts(config)
    assert set(found) == packages
    for package, other in found.items():
        model = theirs(package, other, 7, config)
        model.load_state_dict(weights, strict=True)
        torch.testing.assert_close(model.eval()(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_counterparts_exist_and_have_the_same_keys_for_every_model() -> None:
    """And none is claimed where the network is another: variant A strides elsewhere, other widths and stems are ours."""
    without = set()
    for name in MODELS:
        config = ModelConfig(name=name)
        without |= set() if counterparts(config) else {name}
        assert all(timm.is_model(other) for package, other in counterparts(config).items() if package == "timm")
        deep = "101" in name or "152" in name  # as 50 layers, only longer to build
        for package, other in () if deep else counterparts(config).items():
            with torch.device("meta"):
                ours, model = build_model(config, 7), theirs(package, other, 7, config)
            assert {k: v.shape for k, v in ours.state_dict().items()} == {
                k: v.shape for k, v in model.state_dict().items()
            }
    small = {f"resnet{depth}{letter}" for depth in (8, 10, 11) for letter in "abcd"}
    assert without == small | {"resnet50a", "resnet101a", "resnet152a", "resnet18c", "resnet34c", "cifarnet"}
    assert counterparts(ModelConfig(name="resnet50d", width=0.5)) == {}
    assert counterparts(ModelConfig(name="resnet50d", stem_stride=2)) == {}


def test_the_claim_that_a_is_not_torchvisions_is_true(tmp_path: Path) -> None:
    """Its weights would load: only the outputs tell."""
    torch.manual_seed(0)
    ours, other = MODELS["resnet50a"](num_classes=7).eval(), torchvision.models.resnet50(num_classes=7).eval()
    other.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(ours(images), other(images), rtol=0.01)


def test_timm_reads_the_exported_folder_by_itself(tmp_path: Path) -> None:
    config = dataclasses.replace(resnet50d_tricks(), model=ModelConfig(name="resnet18d"))
    torch.manual_seed(0)
    ours = with_random_norms(build_model(config.model, 3)).eval()
    export.write_safetensors(ours, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hub_config(config, ["ant", "bee", "cat"])))
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), ours(images), rtol=1e-5, atol=1e-5)
    data = timm.data.resolve_model_data_config(model)
    assert (tuple(data["input_size"]), data["crop_pct"], data["interpolation"]) == ((3, 224, 224), 0.875, "bilinear")
    np.testing.assert_allclose(np.multiply(data["mean"], 255), [123.68, 116.779, 103.939])
    np.testing.assert_allclose(np.multiply(data["std"], 255), [58.393, 57.12, 57.375])
    assert model.pretrained_cfg["label_names"] == ["ant", "bee", "cat"]


# ---------------------------------------------------------------------------------------------------------- the folder


def test_the_command_writes_weights_config_and_card(finished_run: FinishedRun, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert call(export.main, str(finished_run.folder), "--output", str(target), "--no-onnx") == 0
    assert sorted(file.name for file in target.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [target], "nothing else is left behind"
    state = load_checkpoint(finished_run.folder)
    weights = safetensors_torch.load_file(target / "model.safetensors")
    assert state["average"] is not None
    assert weights.keys() == state["average"].keys()
    assert all(torch.equal(weights[key], state["average"][key]) for key in weights)
    with safetensors_torch.safe_open(target / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["classes"]) == ["ant", "bee", "cat"]
    assert metadata["model"] == "resnet8d"
    raw = tmp_path / "raw"
    assert call(export.main, str(finished_run.folder), "--output", str(raw), "--no-onnx", "--no-average") == 0
    weights = safetensors_torch.load_file(raw / "model.safetensors")
    assert all(torch.equal(weights[key], state["model"][key]) for key in weights)


def test_the_card_says_what_was_run_and_measured(finished_run: FinishedRun, tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert call(export.main, str(finished_run.folder), "--output", str(target), "--no-onnx") == 0
    card = (target / "README.md").read_text()
    summary = json.loads((finished_run.folder / "summary.json").read_text())
    assert f"On 14 validation images: top-1 {summary['top1']:.2f} %, top-2 {summary['top2']:.2f} %, loss" in card
    versions = json.loads((finished_run.folder / "config.json").read_text())["versions"]
    for fact in (
        "recipe `cifar10`", "ant, bee, cat", "| epochs | 3 |", "| global batch | 16 images |", f"torch {versions['torch']}",
        f"commit {versions['commit']}", "resize the short side to 36 pixels", "crop the centre 32 x 32",
        "subtract 123.68 116.779 103.939 and divide by 58.393 57.12 57.375", "label_smoothing", "decay 0.999",
    ):  # fmt: skip
        assert fact in card, fact
    assert "mixup" not in card
    assert "model.onnx" not in card
    assert "timm and torchvision have no such network" in card
    front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert front is not None and "pipeline_tag: image-classification" in front[1]


@pytest.mark.parametrize("recipe", ["mobilenet-tricks", "inceptionv3-tricks"])
def test_the_card_of_a_network_without_residual_blocks_names_the_tricks_that_fit_it(recipe: str) -> None:
    saved = Saved(
        path=Path("step-0000000003.pt"), task="classification", config=RECIPES[recipe](), classes=("ant",), step=3, epoch=1,
        ranks=1, weights={}, average=None,
    )  # fmt: skip
    card = model_card(saved, CLASSIFICATION.metrics_of(1), {}, None, with_onnx=False)
    used = "linear_scaling, warmup, no_bias_decay, cosine, label_smoothing, mixup"
    assert f"\n| tricks | {used} |\n" in card


def test_a_lone_checkpoint_of_an_unfinished_run_has_no_result(finished_run: FinishedRun, tmp_path: Path) -> None:
    earlier = min((finished_run.folder / "checkpoints").glob("step-*.pt"))
    file = tmp_path / "lone" / earlier.name
    file.parent.mkdir()
    file.write_bytes(earlier.read_bytes())
    assert call(export.main, str(file), "--no-onnx") == 0
    card = (file.parent / "export" / "README.md").read_text()
    assert "Not known: the checkpoint is of step 6, epoch 2 of 3." in card
    assert "hardware" not in card


# ----------------------------------------------------------------------------------------------------------- bad input


def test_an_export_is_never_overwritten(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("keep")
    assert call(export.main, str(finished_run.folder), "--output", str(target), "--no-onnx") == 2
    assert "already exists and is never overwritten; give another --output" in capsys.readouterr().err
    assert [file.name for file in target.iterdir()] == ["mine"]


def test_a_place_that_cannot_be_written_to_is_named(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "out"
    assert call(export.main, str(finished_run.folder), "--output", str(target), "--no-onnx") == 2
    assert f"output = '{target}': must be a place to write to" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime", "safetensors"])
def test_absent_packages_are_named_with_the_command_that_installs_them(
    missing: str, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    present = extras._present
    with mock.patch.object(extras, "_present", lambda name: name != missing and present(name)):
        assert call(export.main, str(finished_run.folder), "--output", str(tmp_path / "out")) == 2
        said = capsys.readouterr().err
        assert missing in said and "pip install 'fasttricks[export]'" in said
        if missing != "safetensors":
            assert "--no-onnx" in said
            assert call(export.main, str(finished_run.folder), "--output", str(tmp_path / "out"), "--no-onnx") == 0
    assert (tmp_path / "out").exists() == (missing != "safetensors")


# ---------------------------------------------------------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def session(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Any:
    onnxruntime = pytest.importorskip("onnxruntime")
    target = tmp_path_factory.mktemp("onnx") / "out"
    assert call(export.main, str(finished_run.folder), "--output", str(target)) == 0
    return onnxruntime.InferenceSession(target / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 25])
def test_onnx_runtime_classifies_real_jpegs_as_the_validation_pipeline_does(
    count: int, session: Any, finished_run: FinishedRun, test_data: Callable[[str], Path]
) -> None:
    """PIL prepares the pixels as the card says, ONNX Runtime does the rest; against DALI and the network."""
    files = sorted((test_data("imagenet_samples") / "train").rglob("*.*"))[:count]
    saved = read_saved(finished_run.folder)
    data = saved.config.data
    prepared = [validation_pixels(decode(f), image_size=data.image_size, val_resize=data.val_resize) for f in files]
    pixels = np.stack(prepared).transpose(0, 3, 1, 2).astype(np.float32)
    (found,) = session.run(None, {"pixels": pixels})
    names = tuple(str(file).lstrip("/") for file in files)
    folder = ImageFolder(root=Path("/"), classes=("",), files=names, labels=(0,) * count)
    (batch,) = Loader(folder, data, training=False, batch_size=count, device=torch.device("cpu"))
    with torch.no_grad():
        expected = saved.network()(batch.images).numpy()
    assert abs(found - expected).max() < 0.02 * abs(expected).max()  # two JPEG decoders and resizes
    certain = np.sort(expected, 1)[:, -1] - np.sort(expected, 1)[:, -2] > 0.02 * abs(expected).max()
    assert certain.mean() > 0.7
    assert (found.argmax(1) == expected.argmax(1))[certain].all()


@pytest.mark.slow
def test_onnx_says_what_it_takes(session: Any) -> None:
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape[1:], given.type) == ("pixels", [3, 32, 32], "tensor(float)")
    assert (made.name, made.shape[1:]) == ("logits", [3])
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == ["ant", "bee", "cat"]
    assert "resize the short side to 36 pixels" in told["transform"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"), [("resnet50d", 65), ("inception_v3", 75), ("mobilenet_v1", 49), ("cifarnet", 33)]
)
def test_every_kind_of_network_is_the_same_in_onnx(name: str, side: int, tmp_path: Path) -> None:
    """write_onnx compares by itself, for one image and for two, and raises where they differ."""
    torch.manual_seed(0)
    model = with_random_norms(build_model(ModelConfig(name=name, width=0.25), 5)).eval()
    export.write_onnx(model, tmp_path / "model.onnx", DataConfig(image_size=side, val_resize=side), {})


@pytest.mark.slow
def test_an_onnx_file_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    model, other = (build_model(ModelConfig(name="resnet8d", width=0.125), 5).eval() for _ in range(2))
    swapped = partial(exporting_another, torch.onnx.export, export.from_pixels(other, DataConfig()))
    with (
        mock.patch.object(torch.onnx, "export", swapped),
        pytest.raises(ConfigError, match=r"ONNX Runtime's logits are off by .*take --no-onnx"),
    ):
        export.write_onnx(model, tmp_path / "model.onnx", DataConfig(image_size=32, val_resize=32), {})


def exporting_another(
    original: Callable[..., Any], other: nn.Module, model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    return original(other, *args, **kwargs)
