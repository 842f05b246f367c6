"""The official ImageNet archives, in miniature: as the folder that they would be unpacked to, and everything wrong with them."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy.io import savemat

from fasttricks.commands import data as prepare
from fasttricks.config import DataConfig
from fasttricks.data.packing.imagenet import open_imagenet
from fasttricks.data.sources import find_dataset
from fasttricks.data.sources.errors import DataError
from lib.tiny import call

CLASSES = ("n01440764", "n01443537", "n02085620")
NUMBERS = {"n02085620": 1, "n01440764": 2, "n01443537": 3}
"""As in the kit, where the numbers are not in the order of the WordNet ids."""
TRUTH = [3, 1, 1, 2, 3]


class Archives(NamedTuple):
    train: Path
    val: Path
    devkit: Path


def image(name: str) -> bytes:
    return b"\xff\xd8\xff" + name.encode() * (1 + len(name) % 7)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return buffer.getvalue()


def meta() -> bytes:
    """meta.mat: structs of a number, a WordNet id and words; the last is a group, which has children and no images."""
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    rows = [(float(number), name, "some fish, a fish", 0.0) for name, number in NUMBERS.items()]
    buffer = io.BytesIO()
    savemat(
        buffer,
        {"synsets": np.array([[row] for row in [*rows, (4.0, "n00001740", "entity", 3.0)]], kinds)},
        do_compression=True,
    )
    return buffer.getvalue()


@pytest.fixture
def archives(tmp_path: Path) -> Archives:
    made = Archives(tmp_path / "train.tar", tmp_path / "val.tar", tmp_path / "devkit.tar.gz")
    names = {name: [f"{name}_{number}.JPEG" for number in (10, 2, 10026)] for name in CLASSES}
    made.train.write_bytes(
        tar_of({f"{name}.tar": tar_of({i: image(i) for i in images}) for name, images in reversed(names.items())})
    )
    val = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)]
    made.val.write_bytes(tar_of({name: image(name) for name in reversed(val)}))
    kit = "ILSVRC2012_devkit_t12/"
    write_kit(made.devkit, {f"{kit}readme.txt": b"", f"{kit}data/meta.mat": meta(), f"{kit}{TRUTH_NAME}": truth(TRUTH)})
    return made


TRUTH_NAME = "data/ILSVRC2012_validation_ground_truth.txt"


def truth(numbers: list[int]) -> bytes:
    return "".join(f"{number}\n" for number in numbers).encode()


def write_kit(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            add(tar, name, content)


def unpack(archives: Archives, root: Path) -> Path:
    """As people do it by hand: a folder a class, the validation images moved into theirs."""
    with tarfile.open(archives.train) as outer:
        for member in outer:
            inner = outer.extractfile(member)
            with tarfile.open(fileobj=inner) as tar:
                tar.extractall(root / "train" / member.name[:9], filter="data")
    by_number = {number: name for name, number in NUMBERS.items()}
    with tarfile.open(archives.val) as tar:
        for name in tar.getnames():
            folder = root / "val" / by_number[TRUTH[int(name[15:23]) - 1]]
            folder.mkdir(parents=True, exist_ok=True)
            tar.extract(name, folder, filter="data")
    return root


def test_archives_hold_what_the_unpacked_folder_holds(archives: Archives, tmp_path: Path) -> None:
    folders = find_dataset(DataConfig(root=str(unpack(archives, tmp_path / "folder"))))
    for folder, found in zip(folders, open_imagenet(*archives), strict=True):
        assert found.classes == CLASSES
        assert (found.files, found.labels) == (folder.files, folder.labels)
        assert found.fingerprint() == folder.fingerprint()
        assert [found.read(i) for i in range(len(found))] == [folder.read(i) for i in range(len(folder))]


def test_the_command_packs_them(archives: Archives, tmp_path: Path) -> None:
    options = [f"--{name}-tar={path}" for name, path in zip(("train", "val", "devkit"), archives, strict=True)]
    assert call(prepare.main, "imagenet", str(tmp_path / "out"), *options) == 0
    folders = find_dataset(DataConfig(root=str(unpack(archives, tmp_path / "folder"))))
    for folder, packed in zip(folders, find_dataset(DataConfig(root=str(tmp_path / "out"))), strict=True):
        assert (packed.files, packed.labels, packed.classes) == (folder.files, folder.labels, folder.classes)
        assert [packed.read(i) for i in range(len(packed))] == [folder.read(i) for i in range(len(folder))]


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def test_archives_of_another_structure_are_named(archives: Archives, tmp_path: Path) -> None:
    def refused(match: str, **other: Path) -> None:
        with pytest.raises(DataError, match=match):
            open_imagenet(*archives._replace(**other))

    refused(
        "val.tar: unknown structure: it holds ILSVRC2012_val_00000005.JPEG, where a name like n",
        train=archives.val,
    )
    refused(r"unknown structure: it holds n02085620.tar, where a name like ILSVRC2012_val_", val=archives.train)
    refused("no uncompressed tar, or cut off", train=archives.devkit)
    refused("cannot be read \\(No such file or directory\\); give the archive", train=tmp_path / "none.tar")
    refused("cannot be read as an archive .*; give ILSVRC2012_devkit_t12.tar.gz", devkit=tmp_path / "none.tar")
    os.mkfifo(tmp_path / "pipe.tar")  # not waited for
    refused("cannot be read \\(a pipe, not a file\\); give the archive", train=tmp_path / "pipe.tar")
    refused("cannot be read as an archive .*a pipe, not a file", devkit=tmp_path / "pipe.tar")
    refused("no data/meta.mat in it; give ILSVRC2012_devkit", devkit=archives.val)
    other = tmp_path / "other.tar"
    other.write_bytes(tar_of({"n09999999.tar": tar_of({})}))
    refused("class n09999999 is not among the 3 classes of the development kit", train=other)
    other.write_bytes(tar_of({"n01440764.tar": tar_of({})}))
    refused("n01440764 holds no image", train=other)
    other.write_bytes(tar_of({"n01440764.tar": tar_of({"n01443537_1.JPEG": b""})}))
    refused("it holds n01443537_1.JPEG, where a name like n01440764_10026.JPEG belongs", train=other)
    other.write_bytes(tar_of({f"{name}.tar": tar_of({f"{name}_1.JPEG": b"1"}) for name in CLASSES[1:]}))
    refused("1 of 3 classes are missing, such as n01440764; take the whole archive", train=other)
    for size in (100, 1500, 4000, 12000):
        other.write_bytes(archives.train.read_bytes())
        cut(other, size)
        refused("other.tar.*(cut off|classes are missing)", train=other)
    kit = {"x/data/meta.mat": meta(), f"x/{TRUTH_NAME}": truth(TRUTH[1:])}
    write_kit(other, kit)
    refused("val.tar: 5 images, but .*other.tar has labels for 4", devkit=other)
    write_kit(other, kit | {f"x/{TRUTH_NAME}": truth([3, 1, 1, 2, 4])})
    refused("has class number 4, which data/meta.mat does not know", devkit=other)
    write_kit(other, kit | {f"x/{TRUTH_NAME}": b"three\n"})
    refused("must have a number a line", devkit=other)
    write_kit(other, kit | {f"x/{TRUTH_NAME}": bytes((1 << 26) + 1)})  # 65 KB, packed
    refused("validation_ground_truth.txt of 67,108,865 bytes; give ILSVRC2012_devkit", devkit=other)
    write_kit(other, kit | {"x/data/meta.mat": meta()[:300]})
    refused("data/meta.mat is damaged or of another kind", devkit=other)
