"""A user's own network, PACKAGE.MODULE:FACTORY: in every command, its errors in a line, and no code that a file asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttricks as ft
from fasttricks.commands import cost, evaluate, export, plan, predict, train
from fasttricks.config import ConfigError, ModelConfig, model_info
from fasttricks.models import build_model
from fasttricks.runs.checkpoint import load_checkpoint, save_checkpoint
from fasttricks.training.run import Run
from lib.tiny import SHRINK, call

NAME = "nets.small:make"
SOURCE = """
import torch
from torch import nn

def make(num_classes):
    layers = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return Net(*layers, nn.Linear(8, num_classes))

class Net(nn.Sequential):
    def get_classifier(self):
        return self[-1]

def no_argument():
    return make(3)

def no_module(num_classes):
    return [num_classes]

def halves(num_classes):
    return make(num_classes).half()

def weightless(num_classes):
    return nn.Flatten()

def features(num_classes):
    return make(num_classes)[:-1]

def tuples(num_classes):
    class Two(Net):
        def forward(self, images):
            return super().forward(images), 0
    return Two(*make(num_classes))

def fails(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(7, num_classes))

def needs_data(num_classes):
    net = make(num_classes)
    net.scale = torch.ones(3).sum().item()
    return net

number = 5
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the package nets in it, which is on no path yet."""
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "small.py").write_text(SOURCE)
    (tmp_path / "nets" / "broken.py").write_text("import torch\n\nimport no_such_package\n")
    (tmp_path / "nets" / "raises.py").write_text("\n\n1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one])
    yield tmp_path
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets"]:
        del sys.modules[name]


ERRORS = {
    "netz.small:make": "there is no module netz on sys.path or in ",
    "nets.smal:make": "there is no module nets.smal on sys.path or in ",
    "nets.small:mak": "nets.small has no mak; did you mean make?; it is ",
    "nets.small:number": "must be a function or class that takes num_classes, but is of the kind int",
    "nets.small:no_argument": "must take num_classes alone, as no_argument(num_classes=3); got an unexpected keyword",
    "nets.small:no_module": "must return a torch.nn.Module, but returned an object of the kind list",
    "nets.small:halves": "must return FP32 weights, but 0.weight is torch.float16; --precision chooses",
    "nets.small:weightless": "must return a network with weights, but this one has none",
    "nets.broken:make": "the import of nets.broken failed (ModuleNotFoundError: No module named 'no_such_package' at ",
    "nets.raises:make": "the import of nets.raises failed (ZeroDivisionError: division by zero at ",
}


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize("name", ERRORS)
def test_a_network_that_cannot_be_made_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_model(ModelConfig(name=name), 3)
    assert str(refused.value).startswith(f"model.name = {name!r}: {ERRORS[name]}")
    assert "\n" not in str(refused.value)


TRIALS = {
    "features": "must turn 2 images into logits of shape (2, 3), but returned (2, 8)",
    "tuples": "must turn 2 images into logits of shape (2, 3), but returned tuple",
    "fails": "fails on 2 training images of 32 pixels (RuntimeError: mat1 and mat2 shapes cannot be multiplied",
}


@pytest.mark.usefixtures("nets")
@pytest.mark.parametrize("factory", TRIALS)
def test_a_network_without_logits_is_refused_before_training(factory: str, start: Callable[..., Run]) -> None:
    with pytest.raises(ConfigError) as refused:
        start(
            "--model.name",
            f"nets.small:{factory}",
            "--model.width",
            "1",
            "--model.stem-stride",
            "4",
            "--model.no-zero-gamma",
        )
    assert str(refused.value).startswith(f"model.name = 'nets.small:{factory}': {TRIALS[factory]}")


def test_only_such_a_name_is_a_users_own() -> None:
    own = ["a:b", "a.b.c:D", "_a:_b2", "ä:b"]
    others = [
        "timm:x",
        "torchvision:x",
        "a",
        "a:",
        ":b",
        "a:b.c",
        "a b:c",
        "a:b()",
        "1a:b",
        "a/b:c",
        "a:b:c",
        "resnet50d",
    ]
    assert [name for name in own + others if model_info(name).family == "own"] == own


ARGS = ["cifar10", *SHRINK[:-2], "--model.width", "1", "--model.stem-stride", "4", "--model.no-zero-gamma"]


def run_of(nets: Path, data: Path, *more: str, name: str = NAME) -> Path:
    folder = nets / "run"
    assert call(train.main, *ARGS, "--model.name", name, "--data.root", str(data), "--run-dir", str(folder), *more) == 0
    return folder


def test_every_command_takes_it_where_its_name_is_given(nets: Path, tiny_data: Path, capsys: Any) -> None:
    image = str(next((tiny_data / "val").glob("*/*.jpg")))
    folder = str(run_of(nets, tiny_data, "--optim.backbone-lr", "0.1", name="nets.small:needs_data"))
    trust = ("--trust-code", "nets.small:needs_data")
    assert call(evaluate.main, folder, *trust) == 0
    assert call(evaluate.main, folder, *trust, "--data.image-size", "24") == 0
    assert call(predict.main, folder, image, *trust) == 0
    assert call(export.main, folder, "--no-onnx", *trust) == 0
    assert "build_model(ModelConfig(name='nets.small:needs_data'), 3)" in (nets / "run/export/README.md").read_text()
    small = ["--model.name", NAME, "--data.root", str(tiny_data), "--gpus", "1"]
    assert call(plan.main, *ARGS, *small) == 0
    assert call(cost.main, "--networks", NAME, f"{NAME}+{NAME}", "--image-size", "32", "--rounds", "1") == 0
    student = [*ARGS, "--model.name", NAME, "--data.root", str(tiny_data), "--run-dir", str(nets / "student")]
    student += ["--distill.teacher", folder, "--epochs", "1"]
    assert call(train.main, *student) == 2
    assert "--trust-code nets.small:needs_data" in capsys.readouterr().err
    assert call(train.main, *student, "--distill.trust-code", "nets.small:needs_data") == 0
    assert call(train.main, *student, "--distill.trust-code", "nets.small:needs_data", "--resume") == 0
    assert ft.load(folder, trust_code="nets.small:needs_data").network()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


# ------------------------------------------------------------------------------------------------- hostile checkpoints
EVIL = "nets.evil:make"


@pytest.fixture
def hostile(nets: Path, tiny_data: Path) -> Path:
    """A run whose checkpoint and config.json name code that lies in the working directory and makes a file."""
    folder = run_of(nets, tiny_data)
    forget()
    (nets / "nets" / "evil.py").write_text(f"open({str(nets / 'ran')!r}, 'w').close()\nfrom nets.small import make\n")
    for path in (folder / "checkpoints").glob("*.pt"):
        state = load_checkpoint(path)
        del state["path"], state["format"]
        config = json.loads(state["config"])
        config["model"]["name"] = EVIL
        config["distill"]["trust_code"] = EVIL
        save_checkpoint(path, state | {"config": json.dumps(config), "trust": EVIL, "trust_code": EVIL})
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["model"]["name"] = EVIL
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def test_no_code_runs_because_a_file_names_it(hostile: Path, nets: Path, tiny_data: Path, capsys: Any) -> None:
    """In no command, with no option or another name; with the very name it does."""
    image, folder = str(next((tiny_data / "val").glob("*/*.jpg"))), str(hostile)
    wanted = [*ARGS, "--model.name", NAME, "--data.root", str(tiny_data), "--run-dir"]
    student = [*wanted, str(nets / "student"), "--distill.teacher", folder]
    commands: dict[Callable[..., Any], list[list[str]]] = {
        evaluate.main: [[folder], [folder, "--trust-code", NAME], [folder, "--data.image-size", "24"]],
        predict.main: [[folder, image], [folder, image, "--trust-code", NAME]],
        export.main: [[folder, "--no-onnx"], [folder, "--no-onnx", "--trust-code", NAME]],
        train.main: [student, [*student, "--distill.trust-code", NAME], [*wanted, folder, "--resume"]],
    }
    for main, calls in commands.items():
        for args in calls:
            assert call(main, *args) == 2, args
            assert EVIL in capsys.readouterr().err, args
    for attempt in (lambda: ft.load(folder).network(), lambda: ft.evaluate(folder), lambda: ft.predict(folder, image)):
        with pytest.raises(ConfigError, match="names code, which no file may run"):
            attempt()
    assert not (nets / "ran").exists() and "nets.evil" not in sys.modules
    assert call(evaluate.main, folder, "--trust-code", EVIL) == 0
    assert (nets / "ran").exists(), "the code was no trap"


def test_a_name_that_is_not_needed_is_refused(finished_run: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"trust_code = 'nets.small:make': the network of .* is 'resnet8d'; give its name"
    ):
        ft.load(finished_run.folder, trust_code=NAME)
