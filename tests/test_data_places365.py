"""Places365-Standard in both forms of its archives: class folders (easyformat), and lists beside folders of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torchvision.datasets import Places365

from fasttricks.commands import train
from fasttricks.config import DataConfig
from fasttricks.data.sources import Source, find_dataset, open_split, require_place
from fasttricks.data.sources.errors import DataError
from lib.layouts import tar_of, write_places365
from lib.tiny import SMALLEST, call, write_images

CLASSES = ("airfield", "arena-hockey", "arena-rodeo", "bar")
"""As the class folders of the easyformat."""


@pytest.fixture(scope="module")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The easyformat, with the lists and the licence that lie in it. Not to be changed."""
    root = write_images(tmp_path_factory.mktemp("easy") / "places365_standard", train=18, val=5, classes=CLASSES)
    for name in ("train.txt", "val.txt", "categories_places365.txt"):
        (root / name).write_text("train/airfield/000.jpg\n")
    return root


@pytest.fixture
def lists(easy: Path, tmp_path: Path) -> Path:
    return write_places365(easy, tmp_path / "lists")


def sources_of(root: Path) -> tuple[Source, Source]:
    return find_dataset(DataConfig(root=str(root)))


def contents(source: Source) -> set[tuple[str, bytes]]:
    return {(source.classes[label], source.read(at)) for at, label in enumerate(source.labels)}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("renamed", [False, True])
def test_both_forms_are_the_same_images_of_the_same_classes(
    large: bool, renamed: bool, easy: Path, tmp_path: Path
) -> None:
    lists = write_places365(easy, tmp_path / "lists", large=large, renamed=renamed)
    for one, other in zip(sources_of(lists), sources_of(easy), strict=True):
        assert one.classes == other.classes == CLASSES and len(one) == len(other) > 0
        assert contents(one) == contents(other) and not one.bad
        assert [*one.labels] == sorted(one.labels)
    train_images, val = sources_of(lists)
    assert train_images.root == lists / f"data_{'large' if large else '256'}{'_standard' * renamed}"
    assert (train_images.name(0), val.name(0)) == ("a/airfield/000.jpg", "Places365_val_00000000.jpg")
    alone = open_split(DataConfig(root=str(lists)), "val", classes=("aaa", *CLASSES))
    assert [*alone.labels] == [label + 1 for label in val.labels]


def test_the_labels_are_torchvisions(easy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which sees the same files only where their checksums are those of the real ones."""
    lists = write_places365(easy, tmp_path / "lists", renamed=True)
    monkeypatch.setattr(Places365, "_check_integrity", lambda *given: True)
    for split, name in (("train", "train-standard"), ("val", "val")):
        ours = open_split(DataConfig(root=str(lists)), split)  # type: ignore[arg-type]
        theirs = Places365(lists, split=name, small=True)
        expected = {Path(path).read_bytes(): number for path, number in theirs.imgs}
        assert {ours.read(at): label for at, label in enumerate(ours.labels)} == expected


def test_archives_beside_the_folders_are_passed_over(lists: Path) -> None:
    """Which would be tars of a webdataset elsewhere."""
    (lists / "train_256_places365standard.tar").write_bytes(tar_of([("data_256/a.txt", b"a")]))
    (lists / "val_256.tar").write_bytes(tar_of([("val_256/a.txt", b"a")]))
    assert len(sources_of(lists)[0]) == 18


@pytest.mark.parametrize("form", ["easy", "lists"])
def test_the_recipe_trains_on_it(
    form: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = request.getfixturevalue(form)
    words = ["places365", *SMALLEST, "--epochs", "1", "--data.root", str(root), "--run-dir", str(tmp_path / "run")]
    assert call(train.main, *words) == 0
    assert "18 training and 5 validation images of 4 classes" in capsys.readouterr().out


TRAIN, VAL, CATEGORIES = "places365_train_standard.txt", "places365_val.txt", "categories_places365.txt"
WRONG: dict[str, tuple[str, str, str]] = {
    "no number": (TRAIN, "/a/airfield/000.jpg\n", r"line 1: must have a name, a space and a number"),
    "three words": (TRAIN, "/a/airfield/000.jpg 0 0\n", r"line 1: must have a name, a space and a number"),
    "a word for a number": (TRAIN, "/a/airfield/000.jpg x\n", r"line 1: x: must be the number of a category"),
    "another digit": (TRAIN, "/a/airfield/000.jpg \N{SUPERSCRIPT TWO}\n", r"must be the number of a category"),
    "no category": (VAL, "Places365_val_00000000.jpg 4\n", r"line 1: category 4: categories_places365.txt has 0 to 3"),
    "a path twice": (VAL, "a.jpg 0\n/a.jpg 1\n", r"line 2: a.jpg is in line 1 too"),
    "a path that leads out": (TRAIN, "/../x.jpg 0\n", r"line 1: path = '../x.jpg': must stay below"),
    "no image of a class": (TRAIN, "/a/airfield/000.jpg 0\n", r"has no image of arena-hockey"),
    "no line": (VAL, "", r"places365_val.txt: has no line"),
    "images that are not there": (
        VAL,
        "x.jpg 2\n",
        r"no image of class 'arena-rodeo' can be used \(val_256/x.jpg: unr",
    ),
    "a bare category": (CATEGORIES, "airfield 0\n", r"line 1: airfield: must be as /a/airfield"),
    "a category left out": (CATEGORIES, "/a/airfield 0\n/b/bar 2\n", r"line 2: number 2: must be 1"),
    "a category twice": (CATEGORIES, "/a/a/b 0\n/a/a-b 1\n", r"line 2: a-b is category 0 too"),
    "no category at all": (CATEGORIES, "", r"categories_places365.txt: has no line"),
    "no text": (CATEGORIES, "\udcff\udcfe 0\n", r"line 1: must have a name"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_list_is_named_with_its_line(kind: str, lists: Path) -> None:
    name, text, says = WRONG[kind]
    (lists / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=says) as caught:
        sources_of(lists)
    assert "\n" not in str(caught.value) and str(lists) in str(caught.value)


def test_folders_that_are_not_there_or_twice(lists: Path) -> None:
    shutil.copytree(lists / "val_256", lists / "val_large")
    with pytest.raises(DataError, match=r"holds val_256 and val_large, and the images of val must be in one folder"):
        require_place(DataConfig(root=str(lists)), "train", "val")
    shutil.rmtree(lists / "val_large")
    shutil.rmtree(lists / "data_256")
    with pytest.raises(
        DataError, match=r"none of data_256, .* with its images; unpack train_256_places365standard.tar"
    ):
        require_place(DataConfig(root=str(lists)), "train", "val")
    (lists / "data_256").mkdir()
    (lists / VAL).unlink()
    with pytest.raises(DataError, match=r"holds no val/"):
        require_place(DataConfig(root=str(lists)), "train", "val")


def test_an_image_that_is_not_there_is_bad_and_named(lists: Path) -> None:
    (lists / "data_256" / "b" / "bar" / "003.jpg").unlink()
    (train_images, _) = sources_of(lists)
    assert [train_images.name(at) for at in train_images.bad] == ["b/bar/003.jpg"]
