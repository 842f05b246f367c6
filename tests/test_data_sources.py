"""Every kind of source keeps the one contract, and a new kind is one row of OPENERS."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import train
from fasttricks.config import DataConfig
from fasttricks.data import sources
from fasttricks.data.packing.imagenet import ArchiveImages
from fasttricks.data.packing.pack import PackConfig, pack_split
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import Classes, Opener, Source, Split, find_dataset, open_split
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.held_out import Part
from fasttricks.data.sources.listed import Where, read_at
from lib.layouts import write_parquets, write_table, write_tars
from lib.tiny import arguments, call


def of_folder(split: Path, place: Path) -> Source:
    return scan_folder(split)


def of_pack(split: Path, place: Path) -> Source:
    return pack_split(scan_folder(split), place / "packed", PackConfig(shard_images=20)).images


def of_archive(split: Path, place: Path) -> Source:
    folder = scan_folder(split)
    with tarfile.open(place / "images.tar", "w") as tar:
        for file in folder.files:
            tar.add(split / file, file)
    with tarfile.open(place / "images.tar") as tar:
        places = tuple((tar.getmember(file).offset_data, tar.getmember(file).size) for file in folder.files)
    return ArchiveImages(place / "images.tar", folder.classes, folder.files, folder.labels, places)


@dataclass(frozen=True)
class Bitmaps:
    """A kind that the project has not: one file of bitmaps of one size, image after image; class n is that of every third."""

    root: Path
    classes: tuple[str, ...] = ("x", "y", "z")
    count: int = 45

    @classmethod
    def write(cls, split: Path, place: Path) -> Bitmaps:
        with (place / f"{split.name}.bitmaps").open("wb") as file:
            for shade in range(cls.count):
                Image.new("RGB", (36, 36), (shade * 5, 255 - shade * 5, 40)).save(buffer := io.BytesIO(), "BMP")
                file.write(buffer.getvalue())
        return cls(place / f"{split.name}.bitmaps")

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(index % 3 for index in range(self.count))

    @property
    def bad(self) -> Mapping[int, str]:
        return {}

    def __len__(self) -> int:
        return self.count

    def locate(self, index: int) -> Where:
        size = self.root.stat().st_size // self.count
        return Where(str(self.root), index * size, size)

    def read(self, index: int) -> bytes:
        return read_at(self.locate(index))

    def name(self, index: int) -> str:
        return f"{self.classes[index % 3]}/{index}"

    def fingerprint(self) -> str:
        return f"bitmaps {self.count}"


def of_layout(write: Callable[[Path, Path], object], **fields: str) -> Callable[[Path, Path], Source]:
    """As that kind of layout, in a folder of its own each time."""

    def make(split: Path, place: Path) -> Source:
        root = Path(tempfile.mkdtemp(dir=place))
        write(split.parent, root)
        with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(place / "cache")):
            return open_split(DataConfig(root=str(root), **fields), split.name)

    return make


KINDS: dict[str, Callable[[Path, Path], Source]] = {
    "folder": of_folder,
    "packed": of_pack,
    "archive": of_archive,
    "table": of_layout(lambda data, root: write_table(data, root / "images.csv"), labels="images.csv"),
    "tars": of_layout(write_tars),
    "parquet": of_layout(write_parquets),
    "new kind": Bitmaps.write,
    "part": lambda split, place: Part.of(scan_folder(split), range(45)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_contract(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    source = KINDS[kind](tiny_data / "train", tmp_path)
    assert len(source) == len(source.labels) == 45 and source.root.parent.exists()
    assert set(source.labels) == set(range(len(source.classes)))
    assert set(source.bad) <= set(range(45))
    assert len({source.name(index) for index in range(45)}) == 45
    for index in range(45):
        assert source.name(index).partition("/")[0] == source.classes[source.labels[index]]
        with Image.open(io.BytesIO(source.read(index))) as image:
            image.verify()
        assert read_at(source.locate(index)) == source.read(index)
    assert source.fingerprint() == KINDS[kind](tiny_data / "train", tmp_path).fingerprint()


@pytest.mark.parametrize("kind", ["packed", "archive", "table", "tars"])
def test_the_same_images_are_the_same_data_set_whatever_holds_them(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    folder, other = of_folder(tiny_data / "train", tmp_path), KINDS[kind](tiny_data / "train", tmp_path)
    assert other.fingerprint() == folder.fingerprint() != of_folder(tiny_data / "val", tmp_path).fingerprint()
    assert [other.read(index) for index in range(45)] == [folder.read(index) for index in range(45)]


@pytest.fixture
def bitmaps(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set of the new kind, which is a row of OPENERS for now."""

    def holds(config: DataConfig, split: Split) -> bool:
        return Path(config.root, f"{split}.bitmaps").exists()

    def open_bitmaps(config: DataConfig, split: Split, classes: Classes) -> Source:
        return Bitmaps(Path(config.root, f"{split}.bitmaps"))

    for split in ("train", "val"):
        Bitmaps.write(tiny_data / split, tmp_path)
    monkeypatch.setattr(sources, "OPENERS", [Opener(holds, holds, open_bitmaps), *sources.OPENERS])
    return tmp_path


def test_a_new_kind_trains_through_a_loader(bitmaps: Path) -> None:
    images, _ = find_dataset(DataConfig(root=str(bitmaps)))
    config = DataConfig(image_size=16, val_resize=16, color="none", pca_noise=0)
    loader = Loader(images, config, training=True, batch_size=8, device=torch.device("cpu"))
    for _ in range(2):
        labels = torch.cat([batch.labels for batch in loader]).tolist()
        assert sorted(labels) == sorted(images.labels) and labels != list(images.labels)
    packed = pack_split(images, bitmaps / "pack", PackConfig()).images
    assert [packed.read(index) for index in range(45)] == [images.read(index) for index in range(45)]


def test_a_new_kind_is_what_data_root_may_name(bitmaps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(train.main, *arguments(bitmaps, bitmaps / "run", "--epochs", "1")) == 0
    assert "45 training and 45 validation images of 3 classes" in capsys.readouterr().out


def test_each_split_is_opened_as_what_it_is(tiny_data: Path, tmp_path: Path) -> None:
    """A packed train beside a folder of validation images, and the other way round: the labels are those of train."""
    for packed, plain in (("train", "val"), ("val", "train")):
        root = tmp_path / packed
        root.mkdir()
        (root / plain).symlink_to(tiny_data / plain)
        pack_split(scan_folder(tiny_data / packed), root / packed, PackConfig())
        for found, split in zip(find_dataset(DataConfig(root=str(root))), ("train", "val"), strict=True):
            folder = scan_folder(tiny_data / split)
            assert (found.fingerprint(), found.classes) == (folder.fingerprint(), ("ant", "bee", "cat"))


def test_a_split_alone_and_an_empty_name(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(tiny_data / "val")
    val = open_split(DataConfig(root=str(tmp_path)), "val", classes=("aardvark", "ant", "bee", "cat"))
    assert np.array_equal(np.array(val.labels), np.array(scan_folder(tiny_data / "val").labels) + 1)
    with pytest.raises(DataError, match=r"holds no train/ \(there is val\)"):
        find_dataset(DataConfig(root=str(tmp_path)))
    with pytest.raises(DataError, match=r"data.root = '': must be the folder .*, or the word demo; give --data.root"):
        find_dataset(DataConfig())
