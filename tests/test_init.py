"""--init: trained weights from a run, a file, timm and torchvision; the classifier by class name; refusals by name."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttricks.commands import export, train
from fasttricks.config import ConfigError, DataConfig, ModelConfig, UserError
from fasttricks.learning.initial import start_from
from fasttricks.models import build_model
from fasttricks.models.external import pretrained_torchvision_weights
from fasttricks.runs.saved import Saved, read_saved
from fasttricks.runs.weights import Weights, read_weights
from fasttricks.training.build import build
from lib.networks import with_random_norms
from lib.tiny import ALONE, FinishedRun, arguments, call, configure

CONFIG = ModelConfig(name="resnet8d", width=0.125)
CLASSES = ("ant", "bee", "cat")
Tensors = dict[str, Tensor]


def network(config: ModelConfig = CONFIG, num_classes: int = 3, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return with_random_norms(build_model(config, num_classes))


def loaded(name: object, classes: tuple[str, ...] = CLASSES, config: ModelConfig = CONFIG) -> tuple[Tensors, str]:
    """(weights of a network that started from `name`, the account of it)."""
    model = network(config, len(classes), seed=2)
    account = start_from(read_weights(str(name)), model, config, DataConfig(), classes)
    return model.state_dict(), account


def best(saved: Saved) -> Tensors:
    return dict(saved.weights if saved.average is None else saved.average)


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


FORMS: dict[str, Callable[[Tensors, Tensors], Any]] = {
    "a state_dict": lambda ours, other: ours,
    "DataParallel's": lambda ours, other: prefixed(ours, "module."),
    "torch.compile's": lambda ours, other: prefixed(ours, "_orig_mod."),
    "a compiled DDP's": lambda ours, other: prefixed(ours, "module._orig_mod."),
    "torchvision's": lambda ours, other: {"model": ours, "optimizer": {"state": {}}, "epoch": 3},
    "torchvision's average": lambda ours, other: {
        "model": other,
        "model_ema": {"n_averaged": torch.tensor(7), **prefixed(ours, "module.")},
    },
    "timm's": lambda ours, other: {"arch": "resnet", "state_dict": ours, "args": argparse.Namespace(lr=0.1)},
    "timm's average": lambda ours, other: {"state_dict": other, "state_dict_ema": ours},
    "without counters": lambda ours, other: {k: v for k, v in ours.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", FORMS)
def test_files_of_other_trainers(form: str, tmp_path: Path) -> None:
    ours, other = network().state_dict(), network(seed=3).state_dict()
    torch.save(FORMS[form](ours, other), tmp_path / "weights.pth")
    found, account = loaded(tmp_path / "weights.pth")
    if form == "without counters":
        found = {name: ours[name] if name.endswith("num_batches_tracked") else value for name, value in found.items()}
    assert same(found, ours)
    assert account.endswith("tensors; its classifier too")
    if "average" in form:
        assert same(loaded(f"{tmp_path / 'weights.pth'}:raw")[0], other)


@pytest.fixture(scope="module")
def averaged(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that keeps an average."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    assert call(train.main, *arguments(tiny_data, folder, "--epochs", "1", "--ema-decay", "0.9")) == 0
    return folder


def test_a_run_and_its_export(averaged: Path, tmp_path: Path) -> None:
    saved = read_saved(averaged)
    assert saved.average is not None and not same(dict(saved.average), dict(saved.weights))
    assert call(export.main, str(averaged), "--no-onnx", "--output", str(tmp_path / "export")) == 0
    for name in (averaged, saved.path, tmp_path / "export", tmp_path / "export" / "model.safetensors"):
        found, account = loaded(name)
        assert same(found, dict(saved.average))
        assert account.endswith("its classifier by class name: 3 of 3 classes")
    assert same(loaded(f"{averaged}:raw")[0], dict(saved.weights))


@pytest.mark.parametrize(
    ("classes", "rows", "account"),
    [
        (("cat", "ant", "bee"), {0: 2, 1: 0, 2: 1}, "by class name: 3 of 3 classes"),
        (("bee", "dog", "eel", "ant"), {0: 1, 3: 0}, "by class name: 2 of 4 classes, 2 new"),
        (("dog", "eel", "fox"), {}, "a new classifier of 3 classes: none of them is among its 3"),
    ],
)
def test_the_classifier_is_taken_class_by_class(
    classes: tuple[str, ...], rows: dict[int, int], account: str, finished_run: FinishedRun
) -> None:
    trained = best(read_saved(finished_run.folder))
    found, said = loaded(finished_run.folder, classes)
    new = network(num_classes=len(classes), seed=2).state_dict()
    for name in ("fc.weight", "fc.bias"):
        for label in range(len(classes)):
            wanted = trained[name][rows[label]] if label in rows else new[name][label]
            assert torch.equal(found[name][label], wanted)
    assert torch.equal(found["conv1.0.weight"], trained["conv1.0.weight"])
    assert said.endswith(account)


def test_a_classifier_of_unknown_classes_is_taken_where_it_is_as_large(tmp_path: Path) -> None:
    ours = network(num_classes=3).state_dict()
    torch.save(ours, tmp_path / "w.pt")
    found, account = loaded(tmp_path / "w.pt", ("a", "b", "c", "d"))
    assert account.endswith("a new classifier of 4 classes: there it has 3")
    assert torch.equal(found["fc.weight"], network(num_classes=4, seed=2).state_dict()["fc.weight"])
    torch.save({k: v for k, v in ours.items() if not k.startswith("fc.")}, tmp_path / "w.pt")
    assert loaded(tmp_path / "w.pt")[1].endswith("a new classifier of 3 classes: there is none")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("resnet18b", "resnet18"), pytest.param("inception_v3", "inception_v3", marks=pytest.mark.slow)],
)
def test_torchvisions_weights_give_torchvisions_outputs(
    ours: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    more = {"init_weights": False, "transform_input": True} if "inception" in theirs else {}
    torch.manual_seed(0)
    reference = with_random_norms(models.get_model(theirs, weights=None, **more)).eval()
    default = models.get_model_weights(theirs).DEFAULT
    monkeypatch.setattr(type(default), "get_state_dict", lambda self, **_: reference.state_dict())
    model = build_model(ModelConfig(name=ours), 1000)
    weights = read_weights(f"torchvision:{theirs}")
    account = start_from(weights, model, ModelConfig(name=ours), DataConfig(), [f"n{n}" for n in range(1000)])
    assert "its classifier too" in account
    assert weights.statistics is not None
    pixels = torch.rand(2, 3, 96, 96) * 255
    as_theirs = (pixels / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in weights.statistics)
    with torch.no_grad():
        answer, wanted = model.eval()((pixels - mean) / std), reference(as_theirs)
    # 0.485 is 123.675 and not the paper's 123.68
    torch.testing.assert_close(answer, wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))


def test_timms_weights_give_timms_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = with_random_norms(timm.create_model("resnet18d")).eval()
    monkeypatch.setattr(
        "fasttricks.runs.weights.pretrained_timm_model",
        lambda name, field: (reference, (DataConfig.mean, DataConfig.std)),
    )
    model, config = build_model(ModelConfig(name="resnet18d"), 10), ModelConfig(name="resnet18d")
    account = start_from(
        read_weights("timm:resnet18d.ra4_e3600_r224_in1k"), model, config, DataConfig(), [str(n) for n in range(10)]
    )
    assert account.endswith("a new classifier of 10 classes: there it has 1000")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours = model.eval().features(images)[-1]
        torch.testing.assert_close(ours, reference.forward_features(images), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ refusals
def _nan() -> Tensors:
    tensors = network().state_dict()
    tensors["layer1.0.conv1.weight"][0] = torch.nan
    return tensors


def _renamed() -> Tensors:
    return {name.replace("layer2", "layr2"): tensor for name, tensor in network().state_dict().items()}


class Code:
    """An object that runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, ("ran",)


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "another width": (
        lambda: network(dataclasses.replace(CONFIG, width=0.25)).state_dict(),
        "of another shape: conv1.6.weight (16, 8, 3, 3) for (8, 8, 3, 3)",
    ),
    "another network": (lambda: network(ModelConfig(name="resnet10d", width=0.125)).state_dict(), "unknown: layer4.0"),
    "other keys": (_renamed, "(nearest there: layr2.0.conv1.weight)"),
    "not finite": (_nan, "layer1.0.conv1.weight must be finite"),
    "no weights": (lambda: {"epoch": 3, "history": [1.0]}, "must hold a state_dict, alone or as one of"),
    "no dict": (lambda: [1, 2], "must hold a state_dict"),
    "nothing": (dict, "must hold a state_dict"),
    "code": (lambda: {"state_dict": network().state_dict(), "x": Code()}, "nothing in it was run"),
    "a network": (network, "nothing in it was run; save its state_dict() alone"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_weights_that_do_not_fit_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made, words = BROKEN[kind]
    torch.save(made(), "w.pth")
    before = network(seed=2).state_dict()
    model = network(seed=2)
    with pytest.raises(UserError) as caught:
        start_from(read_weights("w.pth"), model, CONFIG, DataConfig(), CLASSES)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert same(model.state_dict(), before), "it was changed before it was refused"
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.pth", None, "must be a file, or a run folder"),
        ("w.pth", b"", "cannot be read by torch"),
        ("w.pth", b"PK\3\4 and no more", "cannot be read by torch"),
        ("w.safetensors", b"\xff" * 100, "must be a whole safetensors file"),
        ("w.safetensors", b"", "must be a whole safetensors file"),
        (".", None, "must be a file, or a run folder"),
    ],
)
def test_files_that_are_none(name: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_weights(str(tmp_path / name))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UserError, match="pipe"):
        read_weights(str(tmp_path / "w.pth"))


def test_a_damaged_checkpoint_is_refused(finished_run: FinishedRun, tmp_path: Path) -> None:
    content = bytearray(read_saved(finished_run.folder).path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(UserError, match="does not match its checksum"):
        read_weights(str(tmp_path / "w.pt"))


@pytest.mark.parametrize(
    ("theirs", "ours", "way_out"),
    [
        ("resnet50b", "resnet50a", "give --model.name resnet50b"),
        ("timm:resnet50.a1_in1k", "resnet50a", "give --model.name resnet50b"),
        ("torchvision:resnet50", "resnet50d", "give --model.name resnet50b"),
        ("timm:vit_tiny_patch16_224", "resnet50d", "give --model.name timm:vit_tiny_patch16_224"),
        ("torchvision:vgg11", "resnet50d", "give other weights"),
    ],
)
def test_a_network_that_computes_otherwise_is_refused_though_its_keys_fit(theirs: str, ours: str, way_out: str) -> None:
    config = ModelConfig(name=ours)
    with torch.device("meta"):
        model = build_model(config, 3)
    weights = Weights(tensors=model.state_dict(), source="w.pth", network=theirs)
    with pytest.raises(UserError, match=f"has the weights of {theirs}, and model.name is {ours}; {way_out}"):
        start_from(weights, model, config, DataConfig(), CLASSES)


def test_classes_that_the_classifier_has_not_are_refused() -> None:
    weights = Weights(tensors=network().state_dict(), source="w.safetensors", classes=("ant",))
    with pytest.raises(UserError, match="names 1 classes, and its classifier has 3"):
        start_from(weights, network(), CONFIG, DataConfig(), CLASSES)


def test_the_account_says_where_images_were_normalised_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in another normalisation would freeze, or unlearn, weights that never saw such images: nothing else would tell."""
    tensors = network().state_dict()
    halves = DataConfig(mean=(127.5,) * 3, std=(127.5,) * 3)
    for statistics, data, said in (
        (None, DataConfig(), False),
        ((DataConfig.mean, DataConfig.std), DataConfig(), False),
        (((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), DataConfig(), False),
        ((halves.mean, halves.std), DataConfig(), True),
        ((halves.mean, halves.std), halves, False),
    ):
        weights = Weights(tensors=tensors, source="w.pth", statistics=statistics)
        account = start_from(weights, network(), CONFIG, data, CLASSES)
        assert ("--data.mean 127.5 127.5 127.5 --data.std 127.5 127.5 127.5 is the same" in account) == said, account


def test_torchvision_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="the nearest is torchvision:resnet50"):
        pretrained_torchvision_weights("torchvision:resnet50d", "init")


# ------------------------------------------------------------------------------------------------------- in a run
def test_a_run_starts_from_them_and_resumes_without_them(
    finished_run: FinishedRun, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are those of the file at the first step; a resumed run needs the file no more."""
    shutil.copytree(finished_run.folder, tmp_path / "base")
    saved: Saved = read_saved(tmp_path / "base")
    run = build(configure(tiny_data, tmp_path / "one", "--init", str(tmp_path / "base")), ALONE)
    assert same(run.model.state_dict(), best(saved))
    run.log.close()
    args = arguments(tiny_data, tmp_path / "run", "--init", str(tmp_path / "base"), "--epochs", "1")
    assert call(train.main, *args) == 0
    assert f"init     {saved.path} (its averaged weights): " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "base")
    assert call(train.main, *args, "--resume", "--epochs", "2") == 0
    assert "init  " not in capsys.readouterr().out


def test_a_wrong_path_is_answered_before_the_run_is_made(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(train.main, *arguments(tiny_data, tmp_path / "run", "--init", str(tmp_path / "gone"))) == 2
    assert capsys.readouterr().err.startswith(f"error: init: checkpoint = '{tmp_path / 'gone'}': must be a file")
    assert not (tmp_path / "run").exists()
