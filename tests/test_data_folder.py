"""Scanning a folder of class folders: what is found, and what each kind of broken data is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fasttricks.config import DataConfig
from fasttricks.data.sources import find_dataset
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.quarantine import QuarantineError, write_quarantine


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
    train, val = find_dataset(DataConfig(root=str(tmp_path)))
    assert train.classes == val.classes == ("a", "b", "c")
    assert val.labels == (0, 2)


def test_order_does_not_depend_on_how_the_work_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"{c}/{i}.png" for c in "abc" for i in range(9)))
    whole = scan_folder(tmp_path)
    monkeypatch.setattr("fasttricks.data.sources.checked._CHUNK", 2)
    assert scan_folder(tmp_path) == whole


def test_hidden_files_are_skipped_and_counted(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg")
    for name in (".DS_Store", "a/.DS_Store", "a/Thumbs.db", "a/._1.jpg"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"skipped 4 hidden .*\.DS_Store"):
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


def test_a_file_beside_the_class_folders_that_was_never_an_image(tmp_path: Path) -> None:
    """A licence, as many data sets have it; without a name an image is still one."""
    make(tmp_path, "a/1.jpg")
    (tmp_path / "LICENSE.txt").write_text("of the photographs")
    with pytest.warns(UserWarning, match=r"skipped 1 .*LICENSE\.txt"):
        assert scan_folder(tmp_path).files == ("a/1.jpg",)
    (tmp_path / "stray").write_bytes((tmp_path / "a/1.jpg").read_bytes())
    assert "stray lies beside the class folders" in message(tmp_path)


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
        ("text.jpg", b"hello, this is text", "hello"),
        ("gif.jpg", b"GIF89a" + bytes(20), "GIF89a"),
        ("animated.gif", b"GIF89a" + bytes(20), "GIF89a"),
        ("empty.jpg", b"", "0 bytes"),
    ],
)
def test_a_bad_file_keeps_its_place_and_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a" / name).write_bytes(content)
    folder = scan_folder(tmp_path)
    assert sorted(folder.files) == sorted(["a/1.jpg", f"a/{name}", "b/1.jpg"])
    assert folder.labels == (0, 0, 1)
    assert [folder.files[index] for index in folder.bad] == [f"a/{name}"]
    assert reason in next(iter(folder.bad.values()))


def test_a_file_that_was_never_an_image_is_skipped_aloud(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    with pytest.warns(UserWarning, match=r"skipped 1 hidden .* \(a/notes\.txt\)"):
        folder = scan_folder(tmp_path)
    assert (folder.files, folder.bad) == (("a/1.jpg",), {})


def test_an_image_without_an_extension_is_an_image(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "1.jpg").rename(tmp_path / "a" / "image")
    assert scan_folder(tmp_path).files == ("a/image",)


def test_a_folder_inside_a_class_is_named(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "a/deep/1.jpg")
    text = message(tmp_path)
    assert "a/deep" in text and "folder inside" in text


def test_a_class_of_bad_files_alone(tmp_path: Path) -> None:
    make(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "b" / "1.jpg").write_bytes(b"")
    text = message(tmp_path)
    assert str(tmp_path / "b") in text and "no image" in text and "b/1.jpg: 0 bytes long" in text


ODD = ["a/2.jpg", "a/new\nline.jpg", 'a/"quoted" \\.jpg', "a/犬 é.jpg", "a/\udcff\udcfe.jpg"]


@pytest.mark.parametrize("above", [True, False])
def test_the_quarantine_list_is_honoured_whatever_the_names(tmp_path: Path, above: bool) -> None:
    """It lies in the folder of the splits, or in that of the split; the last name is no UTF-8."""
    root = tmp_path / "train"
    make(root, "a/1.jpg", "b/1.jpg")
    for name in ODD:
        (root / name).write_bytes((root / "a/1.jpg").read_bytes())
    whole = scan_folder(root)
    listed = {f"train/{name}" if above else name: "a reason" for name in [*ODD, "a/gone.jpg"]}
    write_quarantine(tmp_path if above else root, listed)
    folder = scan_folder(root)
    assert (folder.files, folder.labels) == (whole.files, whole.labels)
    assert sorted(folder.files[index] for index in folder.bad) == sorted(ODD)
    assert set(folder.bad.values()) == {"quarantined: a reason"}


@pytest.mark.parametrize("line", [b"a/2.jpg", b'{"file": "a/2.jpg"}', b'{"file": 3, "reason": "x"}', b"\xff", b"[]"])
def test_a_damaged_quarantine_list_is_an_error(tmp_path: Path, line: bytes) -> None:
    make(tmp_path / "train", "a/1.jpg")
    write_quarantine(tmp_path, {"train/a/2.jpg": "x"})
    with (tmp_path / "quarantine.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(QuarantineError, match=r"quarantine\.jsonl: must be .* \(line 2: .*prepare scan"):
        scan_folder(tmp_path / "train")


@pytest.mark.parametrize("lacking", ["train", "val"])
def test_dataset_without_a_split(tmp_path: Path, lacking: str) -> None:
    other, way_out = {"train": ("val", "ROOT/train/<class>"), "val": ("train", "--data.val-share")}[lacking]
    make(tmp_path, f"{other}/a/1.jpg")
    with pytest.raises(DataError, match=rf"holds no {lacking}/ \(there is {other}\).*{way_out}"):
        find_dataset(DataConfig(root=str(tmp_path)))


def test_dataset_root_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*--data\.root"):
        find_dataset(DataConfig(root=str(tmp_path / "nowhere")))


def test_scanning_needs_neither_torch_nor_dali() -> None:
    code = "import sys, fasttricks.data.sources; assert not {'torch', 'nvidia.dali'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
