"""Hugging Face's parquet files: the same images and labels as the folder, copied to the cache once, and errors by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from pyarrow import parquet as written

from fasttricks.config import DataConfig
from fasttricks.data.sources import parquet
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.packed import PackedImages
from fasttricks.data.sources.parquet import is_parquet, open_parquet, parquet_holds
from lib.hostile import NO_FILES, Change
from lib.images import JPEG, PNG
from lib.layouts import write_parquet, write_parquets

NAMES = ["ant", "bee"]
GOOD: list[dict[str, Any]] = [
    {"image": {"bytes": JPEG, "path": "a.jpg"}, "label": 0},
    {"image": {"bytes": PNG, "path": None}, "label": 1},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fasttricks"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def opened(root: Path, split: str = "train", classes: tuple[str, ...] | None = None) -> PackedImages:
    return open_parquet(DataConfig(root=str(root)), split, classes)


@pytest.mark.parametrize("names", [True, False])
def test_parquet_holds_the_images_of_the_folder_in_its_order(names: bool, tiny_data: Path, root: Path) -> None:
    write_parquets(tiny_data, root, names=names)
    train = opened(root)
    for found, split in ((train, "train"), (opened(root, "val", train.classes), "val")):
        folder = scan_folder(tiny_data / split)
        assert (found.classes, found.labels, found.bad) == (folder.classes, folder.labels, {})
        assert [found.read(at) for at in range(len(found))] == [folder.read(at) for at in range(len(folder))]
        assert found.numbered == names
    assert train.files[0] == "ant/data/train-00000-of-00002.parquet/0" and len(set(train.files)) == len(train)


def test_numbers_without_names_dictionaries_and_bare_bytes(root: Path) -> None:
    table = arrow.table({"img": [JPEG, PNG, JPEG], "label": [10, 2, 10], "more": [1, 2, 3]})
    written.write_table(table, root / "train.parquet")
    assert (opened(root).classes, opened(root).labels, opened(root).numbered) == (("2", "10"), (1, 1, 0), True)
    table = arrow.table({"image": [JPEG, PNG], "label": arrow.array(["10", "2"]).dictionary_encode()})
    written.write_table(table, root / "train.parquet")
    assert (opened(root).classes, opened(root).numbered) == (("10", "2"), False)


def test_a_bad_image_is_bad_and_quarantine_lists_count(root: Path) -> None:
    rows = [
        *GOOD,
        {"image": {"bytes": b"", "path": None}, "label": 0},
        {"image": {"bytes": b"GIF89a", "path": None}, "label": 0},
    ]
    write_parquet(root / "train.parquet", [*rows, GOOD[1]], NAMES, group=2)
    (root / "quarantine.jsonl").write_text('{"file": "train/bee/train.parquet/4", "reason": "blurred"}\n')
    found = opened(root)
    assert {found.name(at): why for at, why in found.bad.items()} == {
        "ant/train.parquet/2": "0 bytes long",
        "ant/train.parquet/3": "no image: first bytes b'GIF89a'",
        "bee/train.parquet/4": "quarantined: blurred",
    }


def test_the_copy_is_made_once_and_again_where_a_file_changes_or_it_is_damaged(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Path] = []
    copy = parquet._copy
    monkeypatch.setattr(parquet, "_copy", lambda *args: copies.append(args[-1]) or copy(*args))
    write_parquet(root / "train.parquet", GOOD, NAMES)
    (cache / f".{parquet.name_of('parquet', root, ('train.parquet',), 1)}-killed").mkdir(parents=True)
    assert len(opened(root)) == len(opened(root)) == 2 and len(copies) == 1
    assert [path.name for path in cache.iterdir()] == [copies[0].name], "neither locks nor parts"
    (copies[0] / "shard-00000.bin").write_bytes(b"cut")
    with pytest.warns(UserWarning, match=r"shard-00000.bin: has 3 bytes of .* \(it is made again\)"):
        assert opened(root).read(0) == JPEG
    write_parquet(root / "train.parquet", GOOD[:1], NAMES)
    with pytest.warns(UserWarning, match="1 of 2 classes have no training image"):
        assert len(opened(root)) == 1 and len(copies) == 3


def test_where_the_files_may_lie(root: Path) -> None:
    def splits(*names: str) -> list[str]:
        shutil.rmtree(root)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        config = DataConfig(root=str(root))
        return [split for split in ("train", "val") if is_parquet(config, split) and parquet_holds(config, split)]

    both = ["train", "val"]
    assert splits("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet") == both
    assert (
        splits("train-0.parquet", "val-0.parquet")
        == splits("default/train/0.parquet", "default/validation/0.parquet")
        == both
    )
    with pytest.warns(UserWarning, match="its split test is taken for validation"):
        assert splits("plain_text/train-0.parquet", "plain_text/test-0.parquet") == both
    with pytest.warns(UserWarning, match="its split test is not read"):
        assert splits("data/train-0.parquet", "data/valid-0.parquet", "data/test-0.parquet") == both
    assert splits("data/train-0.parquet") == ["train"]
    pictures = [f"{place}{number}.png" for place in ("", "data/") for number in range(20)]
    assert splits(*pictures, "data/train-0.parquet", *pictures) == ["train"], "pictures beside them hide nothing"
    assert splits("train/ant/1.jpg", "val/ant/1.jpg", "ant/2.jpg", "ant/train.parquet") == []
    with pytest.raises(DataError, match=r"several folders hold files that end in .parquet \(a, b\); give one .*data/a"):
        splits("a/train-0.parquet", "b/train-0.parquet")


# --------------------------------------------------------------------------------------------------------- wrong files
def rows(*more: dict[str, Any], names: list[str] | None = NAMES) -> Change:
    return lambda root: write_parquet(root / "train-0.parquet", [*GOOD, *more], names)


def columns(**content: Any) -> Change:
    return lambda root: written.write_table(arrow.table(content), root / "train-0.parquet")


def described(metadata: object) -> Change:
    """With that in the place of the description by datasets."""

    def change(root: Path) -> None:
        table = arrow.table({"image": [JPEG], "label": [0]})
        content = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        written.write_table(table.replace_schema_metadata({b"huggingface": content}), root / "train-0.parquet")

    return change


def class_labels(*names: str) -> dict[str, Any]:
    return {"info": {"features": {name: {"names": NAMES, "_type": "ClassLabel"} for name in names}}}


def second(names: list[str]) -> Change:
    def change(root: Path) -> None:
        write_parquet(root / "train-0.parquet", GOOD, NAMES)
        write_parquet(root / "train-1.parquet", GOOD, names)

    return change


def harmed(harm: Callable[[bytes], bytes]) -> Change:
    def change(root: Path) -> None:
        path = write_parquet(root / "train-0.parquet", GOOD * 40, NAMES, compression="snappy")
        path.write_bytes(harm(path.read_bytes()))

    return change


NO_BYTES = {"image": {"bytes": None, "path": "/etc/passwd"}, "label": 0}
WRONG: dict[str, tuple[Change, str]] = {
    "no images": (columns(text=["a"], label=[0]), r"no column of images, .*; it has text \(string\), label \(int64\)"),
    "no labels": (columns(image=[JPEG], text=["a"]), r"no column of labels, .*; it has image \(binary\), text \(string\)"),
    "two of images": (columns(left=[JPEG], right=[JPEG], label=[0]), r"several columns of images, .* \(left, right\); keep one"),
    "two of labels": (
        lambda root: (
            columns(image=[JPEG], fine=[0], coarse=[0])(root),
            written.write_table(
                written.read_table(root / "train-0.parquet").replace_schema_metadata(
                    {b"huggingface": json.dumps(class_labels("fine", "coarse")).encode()}
                ),
                root / "train-0.parquet",
            ),
        ),
        r"several columns of labels, .* \(fine, coarse\); keep one, or rename it to label",
    ),
    "half labels": (columns(image=[JPEG], label=[0.5]), "no column of labels, .* label .double"),
    "only a path": (rows(NO_BYTES), "row 2: the image is only the path '/etc/passwd', which is not followed"),
    "no image": (rows({"image": None, "label": 0}), "row 2: the image is null"),
    "no bytes": (rows({"image": {"bytes": None, "path": None}, "label": 0}), "row 2: the image is null"),
    "no label": (rows({**GOOD[0], "label": None}), "row 2: label = None: the image has none"),
    "the label of a hidden test": (rows({**GOOD[0], "label": -1}), "row 2: label = -1: the image has none"),
    "a label beyond the names": (rows({**GOOD[0], "label": 2}), "row 2: label = 2: must be one of the 2 classes, 0 to 1"),
    "a name twice": (rows(names=["ant", "ant"]), "column label: the class name ant stands twice in it"),
    "an empty name": (columns(image=[JPEG], label=[""]), "row 0: label = '': must be a whole number, 0 or more, or a name"),
    "other names in the second": (second(["bee", "ant"]), "train-1.parquet: has another names than train-0.parquet"),
    "no rows": (columns(image=arrow.array([], arrow.binary()), label=arrow.array([], arrow.int64())), "no rows; give files"),
    "a description that is no JSON": (described(b"\xff"), "its metadata huggingface is not as datasets writes it .not UTF-8"),
    "a description without features": (described({"info": 3}), "its metadata huggingface is not as datasets writes it"),
    "names that are none": (
        described({"info": {"features": {"label": {"names": [1], "_type": "ClassLabel"}}}}),
        "column label: names.0. = 1: must be a text of at most 1000",
    ),
    "empty": (lambda root: (root / "train-0.parquet").write_bytes(b""), "no parquet, or damaged"),
    "text": (lambda root: (root / "train-0.parquet").write_bytes(b"hello" * 99), "no parquet, or damaged"),
    "cut": (harmed(lambda whole: whole[:-300]), "no parquet, or damaged"),
    "a harmed page": (harmed(lambda whole: whole[:8] + b"\xff" * 40 + whole[48:]), "no parquet, or damaged"),
    "a harmed end": (harmed(lambda whole: whole[:-60] + bytes(52) + whole[-8:]), "no parquet, or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_by_name(kind: str, root: Path, cache: Path) -> None:
    change, said = WRONG[kind]
    change(root)
    with pytest.raises(DataError, match=said) as refused:
        opened(root)
    assert str(root) in str(refused.value) and len(str(refused.value)) < 1000
    assert not cache.exists() or not list(cache.iterdir()), "no part of a copy is left"


@pytest.mark.parametrize("kind", sorted({*NO_FILES} - {"a folder", "a link to nowhere", "8 GiB"}))
def test_what_is_no_file_is_refused(kind: str, root: Path) -> None:
    change, said = NO_FILES[kind]
    write_parquet(root / "train-0.parquet", GOOD, NAMES)
    change(root / "train-0.parquet")
    with pytest.raises(DataError, match=f"train-0.parquet: no parquet, or damaged .*{said}"):
        opened(root)


def test_without_room_or_without_pyarrow_the_error_names_the_way_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(root / "train.parquet", GOOD, NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(parquet.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(9, 9, 9))
        with pytest.raises(
            DataError, match=r"a copy of its images takes 0.0 GB, and .* has 0.0 GB free; .* XDG_CACHE_HOME"
        ):
            opened(root)
    with monkeypatch.context() as patch:
        patch.setattr("fasttricks.system.extras._present", lambda name: False)
        with pytest.raises(DataError, match=r"needs pyarrow, not installed here; .*(fasttricks\[parquet\]|source)"):
            parquet_holds(DataConfig(root=str(root)), "train")
    write_parquet(root / "val.parquet", GOOD, NAMES)
    with pytest.raises(DataError, match=r"val: ant/val.parquet/0: class ant has no counterpart in train"):
        opened(root, "val", ("bee", "cat"))
