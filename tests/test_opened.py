"""Exports and files of other programs as checkpoints: the answers of the run, torchvision and timm; refusals by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fasttricks as ft
from fasttricks.commands import evaluate, export, predict
from fasttricks.config import ConfigError, DataConfig, DistillConfig, ModelConfig, UserError
from fasttricks.learning.teacher import check_teacher, load_teacher
from fasttricks.models import build_model
from fasttricks.runs.exported import DESCRIPTION, describe, described, stand_in
from fasttricks.runs.opened import open_saved
from fasttricks.runs.saved import Saved, read_saved
from lib.hostile import DEEP, NO_FILES, Change, Payload
from lib.networks import with_random_norms
from lib.tiny import ALONE, FinishedRun, call

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
safetensors = pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

CLASSES = ("ant", "bee", "cat")
SMALL: dict[str, Any] = {"name": "resnet8d", "width": 0.125}


@pytest.fixture(scope="module")
def exported(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of the finished run. Not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    assert call(export.main, str(finished_run.folder), "--no-onnx", "--output", str(folder)) == 0
    return folder


def images(run: FinishedRun) -> list[str]:
    return [str(path) for path in sorted((run.data / "val").rglob("*.jpg"))]


def metadata_of(file: Path) -> dict[str, str]:
    with safetensors.safe_open(file, "pt") as content:
        return dict(content.metadata())


# ------------------------------------------------------------------------------------------------------------- exports


def test_an_export_answers_as_its_run(
    exported: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last digit that is shown, and from Python to the last bit."""
    shown = []
    for place in (finished_run.folder, exported, exported / "model.safetensors"):
        assert call(evaluate.main, str(place), "--data.root", str(finished_run.data)) == 0
        scores, _, answers = capsys.readouterr().out.partition("\n")
        assert call(predict.main, str(place), *images(finished_run)[:3]) == 0
        shown.append((scores.rpartition("  ")[0], answers, capsys.readouterr().out))
    assert "14 images" in shown[0][0] and "ant" in shown[0][1] and "ant" in shown[0][2]
    assert shown[1:] == shown[:1] * 2
    ours, theirs = (ft.evaluate(place, finished_run.data) for place in (exported, finished_run.folder))
    assert ours == theirs
    assert ft.predict(exported, images(finished_run)) == ft.predict(finished_run.folder, images(finished_run))
    assert ft.load(exported).classes == CLASSES


def test_an_export_names_no_place_of_the_machine_that_trained(exported: Path, finished_run: FinishedRun) -> None:
    told = metadata_of(exported / "model.safetensors")[DESCRIPTION]
    saved = open_saved(exported)
    assert str(finished_run.data) not in told and str(finished_run.folder) not in told
    assert (saved.config.data.root, saved.config.run_dir) == ("", "")
    trained = read_saved(finished_run.folder)
    assert (saved.step, saved.epoch, saved.ranks, saved.task) == (trained.step, trained.epoch, 1, "classification")
    assert saved.config.model == trained.config.model and not saved.foreign


def test_an_export_is_exported_again(exported: Path, tmp_path: Path) -> None:
    assert call(export.main, str(exported), "--no-onnx", "--output", str(tmp_path / "again")) == 0
    ours, theirs = (folder / "model.safetensors" for folder in (tmp_path / "again", exported))
    assert metadata_of(ours) == metadata_of(theirs)
    weights = load_file(theirs)
    assert all(torch.equal(weights.pop(name), tensor) for name, tensor in load_file(ours).items()) and not weights


def old(exported: Path, folder: Path) -> Path:
    """The export as it was before it described its run."""
    folder.mkdir()
    told = metadata_of(exported / "model.safetensors")
    del told[DESCRIPTION]
    save_file(load_file(exported / "model.safetensors"), folder / "model.safetensors", told)
    (folder / "config.json").write_bytes((exported / "config.json").read_bytes())
    return folder


def test_an_export_of_an_earlier_version_needs_the_options_of_its_network(
    exported: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its metadata have the network and the classes, its config.json the sizes of its images."""
    folder = old(exported, tmp_path / "old")
    assert call(predict.main, str(folder), images(finished_run)[0]) == 2
    assert "must hold this very model's weights: same model.name, width" in capsys.readouterr().err
    model = read_saved(finished_run.folder).config.model
    options = ["--model.width", str(model.width), "--model.stem-stride", str(model.stem_stride), "--flip"]
    assert call(predict.main, str(folder), images(finished_run)[0], *options) == 0
    shown = capsys.readouterr().out
    assert call(predict.main, str(finished_run.folder), images(finished_run)[0]) == 0
    assert shown == capsys.readouterr().out
    assert call(predict.main, str(folder), images(finished_run)[0], "--model.name", "resnet8b") == 2
    assert "is not the network of" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- torchvision's and timm's


def of_torchvision(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = torchvision.models.resnet18(weights=None, num_classes=3)
    nn.init.normal_(model.get_submodule("fc").weight, std=0.5)  # torch's own would say the same of every image
    return with_random_norms(model).eval()


def small(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of SMALL with 3 outputs, for the tests that ask for no answer."""
    torch.manual_seed(seed)
    return build_model(ModelConfig(**SMALL), 3).state_dict()


def shares(model: nn.Module, transform: Callable[[Any], Any], path: str) -> np.ndarray:
    with Image.open(path) as image, torch.no_grad():
        found: np.ndarray = model(transform(image.convert("RGB"))[None])[0].double().softmax(0).numpy()
    return found


def transform_of_torchvision() -> Callable[[Any], Any]:
    transforms = torchvision.transforms
    norms = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    steps = [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), norms]
    composed: Callable[[Any], Any] = transforms.Compose(steps)
    return composed


@pytest.mark.slow
def test_torchvisions_weights_answer_as_torchvision(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Behind its own transforms. The classes are those of data.root, of a file, or numbers."""
    model, transform, file = of_torchvision(), transform_of_torchvision(), tmp_path / "w.pth"
    torch.save({"model": model.state_dict()}, file)
    (tmp_path / "classes").write_text("cow\ndog\neel\n")
    said = {"name": "resnet18b"}
    wanted = np.array([shares(model, transform, path) for path in images(finished_run)])
    assert wanted.std(0).max() > 0.02, "the network says the same of every image: any input would pass"
    for data, names in (({"class_order": str(tmp_path / "classes")}, ("cow", "dog", "eel")), ({}, ("0", "1", "2"))):
        found = ft.predict(file, images(finished_run), model=said, data=data)
        assert {name for name, _ in found[0].classes} == set(names)
        rows = [[dict(one.classes)[name] for name in names] for one in found]
        np.testing.assert_allclose(rows, wanted, atol=0.01)  # two JPEG decoders
    options = ("--model.name", "resnet18b", "--data.root", str(finished_run.data), "--device", "cpu")
    assert call(evaluate.main, str(file), *options) == 0
    labels = [CLASSES.index(Path(path).parent.name) for path in images(finished_run)]
    loss = -np.log(wanted[range(len(labels)), labels]).mean()
    assert float(capsys.readouterr().out.split("loss ")[1].split()[0]) == pytest.approx(loss, abs=0.01)


@pytest.mark.parametrize(
    "statistics", [([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.1] * 3), ([0.2, 0.4, 0.9], [0.2] * 3)]
)
def test_timms_folder_answers_as_timm(
    statistics: tuple[list[float], list[float]], finished_run: FinishedRun, tmp_path: Path
) -> None:
    """It says all: network, classes, sizes of the images, their filter and their normalisation."""
    torch.manual_seed(0)
    model = with_random_norms(timm.create_model("test_resnet", num_classes=3)).eval()
    trained = {
        "input_size": [3, 64, 64], "crop_pct": 0.95, "interpolation": "bicubic", "crop_mode": "center",
        "mean": statistics[0], "std": statistics[1],
    }  # fmt: skip
    told = {"architecture": "test_resnet", "label_names": list(CLASSES), "pretrained_cfg": trained}
    (tmp_path / "config.json").write_text(json.dumps(told))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    size = {name: trained[name] for name in ("input_size", "crop_pct", "interpolation", "mean", "std")}
    transform = timm.data.create_transform(**size | {"input_size": tuple(trained["input_size"])})
    found = ft.predict(tmp_path, images(finished_run))
    wanted = np.array([shares(model, transform, path) for path in images(finished_run)])
    assert wanted.std(0).max() > 0.002
    np.testing.assert_allclose([[dict(one.classes)[name] for name in CLASSES] for one in found], wanted, atol=0.01)


def test_an_average_in_a_file_is_taken_and_no_average_takes_the_other(tmp_path: Path) -> None:
    ours, other = small(), small(1)
    torch.save({"state_dict": other, "state_dict_ema": ours}, tmp_path / "w.pth")
    saved = ft.load(tmp_path / "w.pth", model=SMALL)
    for average, wanted in ((True, ours), (False, other)):
        assert torch.equal(saved.network(average=average).state_dict()["fc.weight"], wanted["fc.weight"])


@pytest.mark.slow
def test_old_files_lack_counters_and_inceptions_have_an_auxiliary_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inception = torchvision.models.inception_v3(weights=None, num_classes=3, init_weights=False).state_dict()
    kept = {name: value for name, value in inception.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "w.pt")
    saved = ft.load(tmp_path / "w.pt", model={"name": "inception_v3"})
    assert saved.config.data.image_size == 299
    state = saved.network().state_dict()
    assert all(torch.equal(state[name], kept[name]) for name in state if name in kept)
    assert "fc.weight" in state and "AuxLogits.fc.weight" not in state


# ------------------------------------------------------------------------------------------------------------ refusals
THIS = ["--model.name", "resnet8d", "--model.width", "0.125"]
REFUSED = {
    "no network": ([], "where another program wrote it, give its network: --model.name NAME"),
    "an unknown one": (["--model.name", "resnet18x"], "is no model; the nearest is resnet18"),
    "another one": (["--model.name", "resnet10d", "--model.width", "0.125"], "must hold this very model's weights"),
    "one with another classifier": (["--model.name", "mobilenet_v1"], "has no classifier of mobilenet_v1"),
    "a class too few": ([*THIS, "--data.class-order", "two"], "names 2 classes, and the network has 3"),
    "no such file of classes": ([*THIS, "--data.class-order", "gone"], "no file is there"),
    "a folder of other classes": ([*THIS, "--data.root", "data"], "val/ has 1 classes, and the network has 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_as_the_user_says(
    case: str, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options, words = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    torch.save(small(), "w.pt")
    Path("two").write_text("a\nb\n")
    Path("data/val/dog").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save("data/val/dog/1.jpg")
    assert call(predict.main, "w.pt", images(finished_run)[0], *options) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "option", [("--model.name", "resnet8d"), ("--data.class-order", "natural"), ("--model.width=1",)]
)
def test_a_run_and_an_export_record_their_network(
    option: tuple[str, ...], exported: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = next((finished_run.folder / "checkpoints").iterdir())
    for place in (finished_run.folder, exported, lone):
        for main in (evaluate.main, predict.main):
            assert call(main, str(place), *option, *([images(finished_run)[0]] if main is predict.main else [])) == 2
            name = option[0].partition("=")[0]
            assert f"option = '{name}': the checkpoint records it; leave it out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"model\.name = 'resnet8d': the checkpoint records it"):
        ft.load(exported, model={"name": "resnet8d"})


def test_export_and_teacher_refuse_a_file_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(small(), tmp_path / "w.pt")
    save_file(small(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        assert call(export.main, str(tmp_path / name), "--no-onnx") == 2
        assert "take a run, a checkpoint or an export of fasttricks" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"distill\.teacher: .* take a run, a checkpoint or an export"):
            load_teacher(
                DistillConfig(teacher=str(tmp_path / name)), CLASSES, DataConfig(image_size=32, val_resize=32), ALONE
            )


def told(**changes: Any) -> Callable[[dict[str, str]], dict[str, str]]:
    """Metadata whose description has other values."""
    return lambda before: {**before, DESCRIPTION: json.dumps({**json.loads(before[DESCRIPTION]), **changes})}


def configured(**changes: Any) -> Callable[[dict[str, str]], dict[str, str]]:
    """Metadata whose config has other values."""
    return lambda before: told(config={**json.loads(before[DESCRIPTION])["config"], **changes})(before)


METADATA: dict[str, tuple[Callable[[dict[str, str]], dict[str, str]], str]] = {
    "no JSON": (lambda before: {**before, DESCRIPTION: "hello"}, "Expecting value"),
    "deep": (lambda before: {**before, DESCRIPTION: DEEP.decode()}, "nested deeper than 32"),
    "long": (lambda before: {**before, DESCRIPTION: " " * (1 << 25)}, "more than 16,777,216"),
    "a list": (lambda before: {**before, DESCRIPTION: "[]"}, "must be a table"),
    "no config": (lambda before: {**before, DESCRIPTION: "{}"}, "must be a table with 'config' in it"),
    "config: null": (told(config=None), "config = None: must be a table"),
    "a step below 0": (told(step=-1), "step = -1: must be a whole number"),
    "no ranks": (told(ranks=0), "ranks = 0: must be a whole number"),
    "task: a list": (told(task=[]), "task = []: must be a text"),
    "a field of a later version": (configured(colour="red"), "is not a field"),
    "a value out of its range": (configured(epochs=-1), "epochs = -1"),
    "a module to import": (configured(model={"name": "os.path:join"}), "names code, which no file may run"),
    "a network of a later version": (configured(model={"name": "resnet9z"}), "is of the network resnet9z"),
    "no classes": (lambda before: {k: v for k, v in before.items() if k != "classes"}, "must name each class once"),
    "a class twice": (lambda before: {**before, "classes": '["ant", "ant", "cat"]'}, "must name each class once"),
    "classes: a text": (lambda before: {**before, "classes": '"ant"'}, "must be a list"),
    "a class: a number": (lambda before: {**before, "classes": "[1, 2, 3]"}, "must be a text"),
    "too many": (lambda before: {**before, "classes": '["a", "b", "c", "d"]'}, "names 4 classes, and its classifier has 3"),
    "half a character": (lambda before: {**before, "classes": '["\\ud800", "b"]'}, "names 2 classes, and its classifier has 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_were_changed(
    case: str, exported: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line by each command that reads them; nothing is imported, run or written."""
    change, words = METADATA[case]
    file = tmp_path / "w.safetensors"
    save_file(load_file(exported / "model.safetensors"), file, change(metadata_of(exported / "model.safetensors")))
    commands: list[tuple[Callable[..., object], list[str]]] = [
        (evaluate.main, ["--data.root", str(finished_run.data)]),
        (predict.main, [images(finished_run)[0]]),
        (export.main, ["--no-onnx"]),
    ]
    for main, args in commands:
        assert call(main, str(file), *args) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == [file]


def hub(**changes: Any) -> bytes:
    trained = {"input_size": [3, 32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    return json.dumps({"architecture": "resnet18", "pretrained_cfg": {**trained, **changes}}).encode()


HUBS = {
    "empty": (b"", "Expecting value"),
    "deep": (DEEP, "nested deeper than 32"),
    "a list": (b"[]", "must be a table"),
    "of a language model": (b'{"architectures": ["BertModel"]}', "must be a table with 'architecture' in it"),
    "no size": (hub(input_size=[]), "data.image_size = 0"),
    "a size too large": (hub(input_size=[3, 9000, 9000]), "must be a whole number"),
    "crop_pct: 0": (hub(crop_pct=0), "crop_pct must be 0.1 to 1"),
    "crop_pct: NaN": (hub(crop_pct=float("nan")), "crop_pct must be 0.1 to 1"),
    "crop_pct: tiny": (hub(crop_pct=1e-320), "crop_pct must be 0.1 to 1"),
    "two means": (hub(mean=[0.5, 0.5]), "mean and std must have three numbers"),
    "squashed": (hub(crop_mode="squash"), "with crop_mode 'squash'"),
    "another filter": (hub(interpolation="nearest"), "interpolation 'nearest'"),
    "NaN as a mean": (hub(mean=[float("nan")] * 3), "data.mean = (nan, nan, nan): must be three numbers"),
}


@pytest.mark.parametrize("case", [*HUBS, *NO_FILES])
def test_a_config_json_that_was_changed(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    if case in HUBS:
        content, words = HUBS[case]
        file.write_bytes(content)
    else:
        change, words = NO_FILES[case]
        file.touch()
        change(file)
    save_file({"fc.weight": torch.zeros(3, 512)}, tmp_path / "model.safetensors")
    assert call(predict.main, str(tmp_path), "a.jpg") == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1, error


def expanded() -> dict[str, Any]:
    """A small file whose classifier says that it has 2^40 outputs."""
    return {"fc.weight": torch.zeros(1, 1).expand(1 << 40, 512)}


def packed_tight(path: Path) -> None:
    """A zip file that unpacks to a hundred times its bytes."""
    import zipfile

    torch.save({"fc.weight": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in parts.items():
            target.writestr(name, content)


FILES: dict[str, tuple[Change, str]] = {
    "code": (lambda path: torch.save({"model": Payload()}, path), "nothing in it was run"),
    "outputs without number": (lambda path: torch.save(expanded(), path), "must hold a state_dict"),
    "a sparse tensor": (lambda path: torch.save({"fc.weight": torch.eye(3).to_sparse()}, path), "must hold a state_dict"),
    "no data": (lambda path: torch.save({"fc.weight": torch.empty(3, 512, device="meta")}, path), "must hold a state_dict"),
    "a bomb": (packed_tight, "bytes that unpack to"),
    "a scalar classifier": (lambda path: torch.save({"fc.weight": torch.tensor(3.0)}, path), "has no classifier of resnet18b"),
    "text": (lambda path: path.write_text("hello"), "cannot be read by torch"),
    "empty": (Path.touch, "cannot be read by torch"),
    "a pipe": (os.mkfifo, "a pipe, not a file"),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("case", FILES)
def test_a_file_that_holds_something_else(
    case: str, suffix: str, finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change, words = FILES[case]
    monkeypatch.chdir(tmp_path)
    change(Path(f"w{suffix}"))
    if suffix == ".safetensors":
        words = "must be a whole safetensors file"
    assert call(predict.main, f"w{suffix}", images(finished_run)[0], "--model.name", "resnet18b") == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1, error
    assert [path.name for path in Path().iterdir()] == [f"w{suffix}"], "nothing was run"


OWN = "own_of_opened:make"
CODE = """
import pathlib, torch
pathlib.Path("imported").touch()
def make(num_classes):
    return Net(num_classes)
class Net(torch.nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.fc = torch.nn.Linear(3, outputs)
    def forward(self, images):
        return self.fc(images.mean((2, 3)))
"""


def test_code_that_an_export_names_is_imported_on_the_users_word_alone(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of the user's own: an export needs --trust-code; for a file, --model.name is the word. Metadata are none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_of_opened.py").write_text(CODE)
    weights = {"fc.weight": torch.eye(3), "fc.bias": torch.zeros(3)}
    saved = Saved(
        path=tmp_path, task="classification", config=stand_in(OWN, image_size=32, val_resize=36), classes=CLASSES,
        step=3, epoch=1, ranks=1, weights=weights, average=None,
    )  # fmt: skip
    described_by = {"classes": json.dumps(CLASSES)}
    save_file(weights, "export.safetensors", {**described_by, DESCRIPTION: described(saved)})
    save_file(weights, "old.safetensors", {**described_by, "model": OWN})
    torch.save(weights, "w.pt")
    image = images(finished_run)[0]
    for args, words in (
        (["export.safetensors"], f"add --trust-code {OWN}"),
        (["old.safetensors"], f"is of the network {OWN}, which is none of `fasttricks list models`"),
        (["w.pt"], "give its network: --model.name NAME"),
    ):
        assert call(predict.main, *args, image) == 2
        assert words in capsys.readouterr().err
        assert not Path("imported").exists(), args
    for args in (["export.safetensors", "--trust-code", OWN], ["w.pt", "--model.name", OWN, "--data.image-size", "32"]):
        assert call(predict.main, *args, image) == 0
        assert len(capsys.readouterr().out.splitlines()) == 4
    assert Path("imported").exists()


# ------------------------------------------------------------------------------------------------------------- teacher


def test_an_export_teaches_as_its_run(exported: Path, finished_run: FinishedRun) -> None:
    """The same logits and the same digest, so that a run that was taught by one resumes with the other."""
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    taught = []
    for place in (finished_run.folder, exported, exported / "model.safetensors"):
        config = DistillConfig(teacher=str(place))
        check_teacher(config)
        teacher = load_teacher(config, CLASSES[::-1], DataConfig(image_size=32, val_resize=32), ALONE)
        taught.append((teacher(pixels), teacher.digest, teacher.name))
    for logits, digest, name in taught[1:]:
        assert torch.equal(logits, taught[0][0]) and (digest, name) == taught[0][1:]
    assert taught[0][0].std() > 0.01


def test_an_export_of_every_network_opens(tmp_path: Path) -> None:
    """timm's too; only the description counts, so the weights stay unread."""
    for name in ("resnet18b", "inception_v3", "timm:test_vit"):
        config = stand_in(name)
        saved = Saved(
            path=tmp_path, task="classification", config=config, classes=CLASSES, step=3, epoch=1, ranks=2,
            weights=build_model(config.model, 3).state_dict() if "timm" in name else {}, average=None,
        )  # fmt: skip
        file = tmp_path / "w.safetensors"
        told = {DESCRIPTION: described(saved), "classes": json.dumps(CLASSES)}
        save_file({"fc.weight": torch.zeros(1)}, file, told)
        found = describe(file)
        assert found is not None and found.settled
        assert (found.config, found.classes, found.step, found.ranks) == (config, CLASSES, 3, 2)
