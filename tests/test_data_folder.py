"""Scanning a folder of class folders: what is found, and what each kind of broken data is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fasttricks.data import DataError, scan_dataset, scan_folder


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return root


def test_files_follow_class_then_name_and_labels_follow_classes(tmp_path: Path) -> None:
    make(tmp_path, "b/2.png", "b/10.jpg", "a/z.bmp", "ö/猫.webp", "a/y.tiff", "b/c.JPEG", "a/g.ppm")
    folder = scan_folder(tmp_path)
    assert folder.classes == ("a", "b", "ö")
    assert folder.files == ("a/g.ppm", "a/y.tiff", "a/z.bmp", "b/10.jpg", "b/2.png", "b/c.JPEG", "ö/猫.webp")
    assert folder.labels == (0, 0, 0, 1, 1, 1, 2)


def test_val_takes_its_labels_from_train_and_may_lack_classes(tmp_path: Path) -> None:
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/a/1.jpg", "val/c/1.jpg")
    train, val = scan_dataset(tmp_path)
    assert train.classes == val.classes == ("a", "b", "c")
    assert val.labels == (0, 2)


def test_order_does_not_depend_on_how_the_work_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{c}/{i}.png" for c in "abc" for i in range(9)))
    whole = scan_folder(tmp_path)
    monkeypatch.setattr("fasttricks.data.folder._CHUNK", 2)
    assert scan_folder(tmp_path) == whole


def test_hidden_files_are_skipped_and_counted(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg")
    for name in (".DS_Store", "a/.DS_Store", "a/Thumbs.db", "a/._1.jpg"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped 4 hidden"):
        assert scan_folder(tmp_path).files == ("a/1.jpg",)


def message(root: Path, **arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        scan_folder(root, **arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_no_such_folder(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'}: no such folder" in message(tmp_path / "nowhere")


def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not a folder" in message(tmp_path / "file")


def test_empty(tmp_path: Path) -> None:
    assert "empty" in message(tmp_path)


def test_images_directly_in_it(tmp_path: Path) -> None:
    text = message(make(tmp_path, "1.jpg", "2.jpg"))
    assert "2 files" in text and "1.jpg" in text and "no class folders" in text and "<class>/<image>" in text


def test_a_file_beside_the_class_folders(tmp_path: Path) -> None:
    assert "stray.jpg" in message(make(tmp_path, "a/1.jpg", "stray.jpg"))


def test_class_folder_without_images(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg")
    (tmp_path / "b").mkdir()
    text = message(tmp_path)
    assert str(tmp_path / "b") in text and "no image" in text


def test_class_that_train_lacks(tmp_path: Path) -> None:
    text = message(make(tmp_path, "a/1.jpg", "cat/1.jpg"), classes=("a", "dog"))
    assert "cat" in text and "train" in text


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("notes.txt", b"hello", ".txt"),
        ("text.jpg", b"hello, this is text", "hello"),
        ("gif.jpg", b"GIF89a" + bytes(20), "GIF89a"),
        ("empty.jpg", b"", "0 bytes"),
        ("noextension", b"\xff\xd8\xff\xe0", "none"),
    ],
)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    make(tmp_path, "a/1.jpg")
    (tmp_path / "a" / name).write_bytes(content)
    text = message(tmp_path)
    assert f"a/{name}" in text and reason in text and "1 of 2" in text


def test_a_folder_inside_a_class_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/deep.jpg/1.jpg")
    text = message(tmp_path)
    assert "a/deep.jpg" in text and "folder inside" in text


@pytest.mark.parametrize("lacking", ["train", "val"])
def test_dataset_without_a_split(tmp_path: Path, lacking: str) -> None:
    other = {"train": "val", "val": "train"}[lacking]
    make(tmp_path, f"{other}/a/1.jpg")
    with pytest.raises(DataError, match=f"no folder {lacking} in it .*{other}.*ROOT/train/<class>"):
        scan_dataset(tmp_path)


def test_dataset_root_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*--data\.root"):
        scan_dataset(tmp_path / "nowhere")


def test_scanning_needs_neither_torch_nor_dali() -> None:
    code = "import sys, fasttricks.data; assert not {'torch', 'nvidia.dali'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
