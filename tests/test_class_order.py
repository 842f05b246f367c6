"""The order of the classes: torchvision's, timm's, or a file's; a run records it; two sides compare names, not numbers."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from fasttricks.commands import data as data_command
from fasttricks.commands import evaluate, export, predict, train
from fasttricks.config import DataConfig, DistillConfig
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import find_dataset
from fasttricks.data.sources.class_order import order_classes
from fasttricks.data.sources.errors import DataError
from fasttricks.learning.teacher import load_teacher
from fasttricks.runs.saved import read_saved
from lib.tiny import ALONE, arguments, call, write_images

CLASSES = ("10", "2", "Ant", "bee", "cat 10", "cat 9", "Éclair", "n02")
NUMBERS = ("1", "2", "10")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("many"), train=24, val=8, classes=CLASSES)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("numbered"), train=45, val=9, classes=NUMBERS)


@pytest.fixture(scope="module")
def natural_run(numbered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes are 1, 2, 10."""
    run = tmp_path_factory.mktemp("natural") / "run"
    assert call(train.main, *arguments(numbered, run, "--data.class-order", "natural", "--epochs", "1")) == 0
    return run


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("order", ["codepoint", "natural"])
def test_labels_are_those_of_torchvision_or_timm(order: str, split: str, many: Path) -> None:
    from timm.data.readers.reader_image_folder import ReaderImageFolder
    from torchvision.datasets import ImageFolder

    ours = dict(zip(("train", "val"), find_dataset(DataConfig(root=str(many), class_order=order)), strict=True))[split]
    labels = {ours.name(image): ours.labels[image] for image in range(len(ours))}
    if order == "codepoint":
        theirs = ImageFolder(str(many / split))
        number, samples = theirs.class_to_idx, theirs.samples
    else:
        reader = ReaderImageFolder(str(many / split))
        number, samples = reader.class_to_idx, reader.samples
    assert list(ours.classes) == sorted(number, key=number.__getitem__)
    assert labels == {str(Path(file).relative_to(many / split)): label for file, label in samples}


def test_the_order_does_not_depend_on_that_of_the_names() -> None:
    """Names that are equal to timm, which leaves their order to chance, are in the order of their code points."""
    names = ["a", "A", "01", "1", "001", "a1", "A01"]
    for order in ("codepoint", "natural"):
        found = {order_classes(random.Random(seed).sample(names, len(names)), order) for seed in range(20)}
        assert len(found) == 1
    assert order_classes(names, "natural") == ("001", "01", "1", "A", "a", "A01", "a1")


def test_a_file_gives_the_order(numbered: Path, natural_run: Path, tmp_path: Path) -> None:
    """A list of names, and the config.json of an export."""
    assert call(export.main, str(natural_run), "--no-onnx", "--output", str(tmp_path / "export")) == 0
    assert (
        find_dataset(DataConfig(root=str(numbered), class_order=str(tmp_path / "export" / "config.json")))[1].classes
        == NUMBERS
    )
    (tmp_path / "order.txt").write_text("10\r\n1\n\n2")
    training, val = find_dataset(DataConfig(root=str(numbered), class_order=str(tmp_path / "order.txt")))
    assert training.classes == val.classes == ("10", "1", "2")
    assert {training.name(i).split("/")[0]: training.labels[i] for i in range(len(training))} == {
        "10": 0,
        "1": 1,
        "2": 2,
    }


WRONG = {
    "1\n2\n": r"must name the 3 classes of the data, each once \(it lacks 10\); mend the file",
    "1\n2\n10\n11\n": r"must name the 3 classes of the data, each once \(the data has no class 11\)",
    "1\n2\n10\n2\n": r"2 stands 2 times in it",
    "": r"it lacks 1\)",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_file_of_other_names_is_refused(content: str, numbered: Path, tmp_path: Path) -> None:
    (tmp_path / "order.txt").write_text(content)
    with pytest.raises(DataError, match=WRONG[content]):
        find_dataset(DataConfig(root=str(numbered), class_order=str(tmp_path / "order.txt")))


def test_an_order_that_is_none_is_refused(numbered: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data\.class_order = 'naturel': .* no file is there; did you mean 'natural'\?"
    ):
        find_dataset(DataConfig(root=str(numbered), class_order="naturel"))
    (tmp_path / "order.json").write_text('["1", "2", "10"]')
    with pytest.raises(DataError, match=r"order\.json: must hold the name of a class in each line, or be the config"):
        find_dataset(DataConfig(root=str(numbered), class_order=str(tmp_path / "order.json")))


def test_a_loader_of_its_own_takes_the_order(numbered: Path) -> None:
    for order, ten in (("codepoint", 1), ("natural", 2)):
        loader = Loader.open(numbered, "val", batch_size=9, image_size=32, val_resize=36, class_order=order)
        (batch,) = loader
        names = ["1"] * 3 + ["10"] * 3 + ["2"] * 3  # images keep their order
        assert [ten if name == "10" else 3 - ten if name == "2" else 0 for name in names] == batch.labels.tolist()


def test_a_pack_takes_the_order_as_its_folder_does(numbered: Path, tmp_path: Path) -> None:
    assert call(data_command.main, "pack", str(numbered), str(tmp_path / "pack")) == 0
    for order in ("codepoint", "natural"):
        pairs = zip(
            find_dataset(DataConfig(root=str(numbered), class_order=order)),
            find_dataset(DataConfig(root=str(tmp_path / "pack"), class_order=order)),
            strict=True,
        )
        for folder, packed in pairs:
            assert (folder.classes, list(folder.labels)) == (packed.classes, list(packed.labels))
            assert folder.fingerprint() == packed.fingerprint()
            assert [folder.read(i) for i in range(len(folder))] == [packed.read(i) for i in range(len(packed))]


def test_a_run_records_its_order_and_says_it(
    numbered: Path, natural_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads((natural_run / "config.json").read_text())["config"]["data"]["class_order"] == "natural"
    assert read_saved(natural_run).classes == NUMBERS
    assert call(train.main, *arguments(numbered, tmp_path / "run", "--epochs", "1")) == 0
    said = capsys.readouterr().out
    assert (
        "classes  in code point order, 10 before 2, as torchvision; --data.class-order natural is timm's order" in said
    )
    again = arguments(numbered, natural_run, "--epochs", "1", "--resume")
    assert call(train.main, *again) == 2
    assert "data.class_order: 'natural' -> 'codepoint'" in capsys.readouterr().err
    assert call(train.main, *again, "--data.class-order", "natural") == 0
    assert "classes  in natural order, 2 before 10, as timm" in capsys.readouterr().out


def test_evaluation_and_prediction_go_by_names(
    numbered: Path, natural_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the folder and over its pack, which numbers the classes by code point."""
    summary = json.loads((natural_run / "summary.json").read_text())
    call(data_command.main, "pack", str(numbered), str(tmp_path / "pack"))
    capsys.readouterr()
    for root in (numbered, tmp_path / "pack"):
        assert call(evaluate.main, str(natural_run), "--data.root", str(root)) == 0
        assert f"top-1 {summary['top1']:.2f} %" in (said := capsys.readouterr().out)
        assert f"loss {summary['val_loss']:.4f}" in said
    assert call(predict.main, str(natural_run), str(numbered / "val" / "10" / "002.jpg")) == 0
    assert sorted(line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]) == sorted(NUMBERS)


def test_a_teacher_of_another_order_gives_its_logits_in_ours(natural_run: Path) -> None:
    config = DistillConfig(teacher=str(natural_run))
    same, other = (
        load_teacher(config, classes, DataConfig(image_size=32, val_resize=32), ALONE)
        for classes in (NUMBERS, ("1", "10", "2"))
    )
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert same.outputs is None and other.digest == same.digest
    assert torch.equal(other(images), same(images)[:, [0, 2, 1]])


def test_a_student_learns_from_a_teacher_of_another_order(
    numbered: Path, natural_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = arguments(numbered, tmp_path / "run", "--distill.teacher", str(natural_run), "--epochs", "1")
    assert call(train.main, *taught) == 0
    saved = dataclasses.asdict(read_saved(tmp_path / "run").config)
    assert saved["data"]["class_order"] == "codepoint" and saved["distill"]["digest"]
