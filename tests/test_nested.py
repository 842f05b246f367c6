"""Nested class folders: labels against torchvision and timm over random trees, and links that loop, lead out or stand twice."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from fasttricks.commands import data as prepare
from fasttricks.commands import train
from fasttricks.config import ConfigError, DataConfig
from fasttricks.data.packing.scan import list_files
from fasttricks.data.sources import Source, find_dataset, open_split
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.quarantine import write_quarantine
from lib.tiny import arguments, call, write_images


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return next(write_images(tmp_path_factory.mktemp("image"), train=1, val=0).rglob("*.jpg"))


def tree(root: Path, image: Path, seed: int) -> Path:
    """Folders at random, up to four deep; some hold images, each of the last does."""
    draw = random.Random(seed)

    def grow(folder: Path, depth: int) -> None:
        folder.mkdir(parents=True)
        inner = (
            draw.sample(["b", "a", "10", "2", "Z", "a-"], draw.choice([1, 2, 3]))
            if draw.random() < 0.7 and depth < 4
            else []
        )
        for name in draw.sample(["z.jpg", "k.jpg", "10.jpg", "2.jpg"], 2) if not inner or draw.random() < 0.5 else []:
            shutil.copy(image, folder / name)
        for name in inner:
            grow(folder / name, depth + 1)

    for name in ("cat", "Dog", "1", "a"):
        grow(root / name, 1)
    return root


def by_class(source: Source) -> dict[str, str]:
    """Image -> the name of its class."""
    return {source.name(index): source.classes[label] for index, label in enumerate(source.labels)}


@pytest.mark.parametrize("seed", range(8))
def test_labels_are_those_of_torchvision_and_timm(seed: int, image: Path, tmp_path: Path) -> None:
    import torchvision
    from timm.data.readers.reader_image_folder import find_images_and_targets

    root = tree(tmp_path / "tree", image, seed)
    top = open_split(DataConfig(root=str(root), nested="top"), "train")
    theirs = torchvision.datasets.ImageFolder(str(root))
    samples = [(str(Path(path).relative_to(root)), label) for path, label in theirs.samples]
    assert [(top.name(index), label) for index, label in enumerate(top.labels)] == samples
    assert list(top.classes) == theirs.classes
    leaf = open_split(DataConfig(root=str(root), nested="leaf"), "train")
    found, numbers = find_images_and_targets(str(root), leaf_name_only=False)
    names = {number: name for name, number in numbers.items()}
    timms = {str(Path(path).relative_to(root)): names[number] for path, number in found}
    assert {name: one.replace("/", "_") for name, one in by_class(leaf).items()} == timms
    assert list(leaf.classes) == sorted({name.rpartition("/")[0] for name in timms})
    for source in (top, leaf):
        assert all(
            source.name(index).startswith(f"{source.classes[label]}/") for index, label in enumerate(source.labels)
        )
        assert {source.name(index) for index in range(len(source))} == set(list_files(root)), "scan examines others"


def nest(root: Path, image: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / name)
    return root


LINKS = {
    "a loop": ("a/in/loop", ".."),
    "a loop to itself": ("a/in/loop", "."),
    "a link to the root": ("a/in/root", "../.."),
    "a link out, above the root": ("a/in/out", "../../.."),
    "a second name in the class": ("a/other", "in"),
}


@pytest.mark.parametrize("nested", ["top", "leaf"])
@pytest.mark.parametrize("case", LINKS)
def test_links_end_and_are_said(case: str, nested: str, image: Path, tmp_path: Path) -> None:
    root = nest(tmp_path / "data" / "tree", image, "a/in/1.jpg", "b/in/1.jpg", "../beside/1.jpg")
    link, target = LINKS[case]
    (root / link).symlink_to(target)
    with pytest.warns(UserWarning, match=f"skipped 1 .*links to a folder that is entered already .*{link}"):
        source = open_split(DataConfig(root=str(root), nested=nested), "train")  # type: ignore[arg-type]
    assert sorted(by_class(source)) == ["a/in/1.jpg", "b/in/1.jpg"]


@pytest.mark.slow
def test_links_of_all_to_all_take_no_time(image: Path, tmp_path: Path) -> None:
    """30 folders that each link to all others have more paths than there are atoms."""
    root = nest(tmp_path / "tree", image, "b/1.jpg", *(f"a/{number}/1.jpg" for number in range(30)))
    for number in range(30):
        for other in range(30):
            (root / f"a/{number}/to{other}").symlink_to(f"../{other}")
    with pytest.warns(UserWarning, match="skipped 900"):
        assert len(open_split(DataConfig(root=str(root), nested="top"), "train")) == 31
    assert len(list_files(root)) >= 31


def test_a_folder_of_two_classes_is_of_both(image: Path, tmp_path: Path) -> None:
    root = nest(tmp_path / "tree", image, "a/in/1.jpg", "b/2.jpg")
    (root / "b" / "in").symlink_to("../a/in")
    source = open_split(DataConfig(root=str(root), nested="top"), "train")
    assert by_class(source) == {"a/in/1.jpg": "a", "b/2.jpg": "b", "b/in/1.jpg": "b"}
    assert set(by_class(source)) == set(list_files(root))


def test_lists_at_every_depth_are_honoured(image: Path, tmp_path: Path) -> None:
    root = nest(tmp_path / "tree", image, *(f"{name}/in/deep/{number}.jpg" for name in "ab" for number in range(3)))
    write_quarantine(root, {"a/in/deep/0.jpg": "torn"})
    write_quarantine(root / "b" / "in", {"deep/1.jpg": "torn"})
    write_quarantine(root / "b" / "in" / "deep", {"2.jpg": "torn"})
    for nested in ("top", "leaf"):
        source = open_split(DataConfig(root=str(root), nested=nested), "train")  # type: ignore[arg-type]
        assert [source.name(index) for index in source.bad] == ["a/in/deep/0.jpg", "b/in/deep/1.jpg", "b/in/deep/2.jpg"]


def test_faults_of_nested_folders_are_named(image: Path, tmp_path: Path) -> None:
    root = nest(tmp_path, image, "train/a/in/1.jpg", "train/b/1.jpg", "val/a/other/1.jpg")
    config = {nested: DataConfig(root=str(root), nested=nested) for nested in ("error", "top", "leaf")}  # type: ignore[arg-type]
    ways = "--data.nested top takes its images for class a, leaf makes it a class of its own"
    with pytest.raises(DataError, match=f"a/in is a folder inside a class folder; {ways}; the layout is"):
        find_dataset(config["error"])
    assert find_dataset(config["top"])[1].classes == ("a", "b")
    with pytest.raises(DataError, match="class folder a/other has no counterpart in train, which has 2 classes"):
        find_dataset(config["leaf"])
    (root / "train" / "a" / "in" / "README").write_text("text")
    (root / "train" / "a" / "about").write_text("a folder of folders needs no image")
    with pytest.warns(UserWarning, match="skipped 2"):
        assert open_split(config["leaf"], "train").classes == ("a/in", "b")
    (root / "train" / "a" / "in" / "1.jpg").write_text("no image")
    with pytest.raises(DataError, match="a/in: class folder with no image in it"):
        open_split(config["leaf"], "train")
    with pytest.raises(ConfigError, match=r"data\.nested = 'deep': must be one of error, top, leaf"):
        DataConfig(nested="deep")  # type: ignore[arg-type]


@pytest.mark.parametrize("nested", ["top", "leaf"])
def test_a_split_and_a_pack_of_nested_folders_are_the_same_data(
    nested: str, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = (f"{name}/{inner}/{number}.jpg" for name in "ab" for inner in ("x", "y/z") for number in range(12))
    root = nest(tmp_path / "tree", image, *names)
    given = {"nested": nested, "val_share": 0.25}
    ours = find_dataset(DataConfig(root=str(root), **given))  # type: ignore[arg-type]
    options = ["--nested", nested, "--val-share", "0.25"]
    assert call(prepare.main, "split", str(root), str(tmp_path / "links"), *options) == 0
    assert call(prepare.main, "pack", str(root), str(tmp_path / "pack"), *options) == 0
    for place, fields in (("links", {"nested": nested}), ("pack", {})):
        theirs = find_dataset(DataConfig(root=str(tmp_path / place), **fields))  # type: ignore[arg-type]
        for one, other in zip(ours, theirs, strict=True):
            assert (by_class(one), one.fingerprint()) == (by_class(other), other.fingerprint())
    more = ["--data.nested", nested, "--data.val-share", "0.25", "--epochs", "1", "--global-batch-size", "8"]
    assert call(train.main, *arguments(root, tmp_path / "run", *more)) == 0
    assert f"of {len(ours[0].classes)} classes in {root}" in capsys.readouterr().out
