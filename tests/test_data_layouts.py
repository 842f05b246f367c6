"""Every layout of a data set trains as class folders do: order, pixels, resume, bad images, the commands train and pack."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fasttricks.commands import data as prepare
from fasttricks.commands import train
from fasttricks.config import DataConfig
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import Source, find_dataset, open_split
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.listed import is_numbered
from lib.layouts import copied_with, write_parquets, write_table, write_tars
from lib.tables import mostly_slow
from lib.tiny import FinishedRun, arguments, call

LAYOUTS: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    "csv": (lambda data, root: write_table(data, root / "images.csv"), ("labels", "images.csv")),
    "tsv": (lambda data, root: write_table(data, root / "images.tsv"), ("labels", "images.tsv")),
    "tars": (write_tars, ()),
    "tars with classes.txt": (lambda data, root: write_tars(data, root, numbers=True), ()),
    "parquet": (write_parquets, ()),
    "parquet with names": (lambda data, root: write_parquets(data, root, names=False), ()),
}
"""Name -> (writes a folder of class folders so, what --data needs besides root)."""
COMMANDS = ("csv", "tars with classes.txt", "parquet")
"""One of each kind, for what takes a second."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def config(data: Path, root: Path, layout: str) -> DataConfig:
    """The config that reads `data`, which is written to `root` in that layout."""
    write, options = LAYOUTS[layout]
    root.mkdir(exist_ok=True)
    write(data, root)
    return DataConfig(root=str(root), **dict([options] if options else []), image_size=24, val_resize=28, threads=1)


def loader(config: DataConfig, source: Source, *, training: bool = True) -> Loader:
    return Loader(source, config, training=training, batch_size=8, device=torch.device("cpu"))


def epochs(loader: Loader, count: int = 1) -> list[Batch]:
    return [Batch(batch.images.clone(), batch.labels.clone()) for _ in range(count) for batch in loader]


def same(one: list[Batch], two: list[Batch]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, "csv", "tars", "parquet"))
def test_order_and_pixels_are_those_of_the_folder_and_a_resume_is_exact(
    layout: str, tiny_data: Path, tmp_path: Path
) -> None:
    here = config(tiny_data, tmp_path / "data", layout)
    train_images, val = find_dataset(here)
    folder_train, folder_val = find_dataset(DataConfig(root=str(tiny_data)))
    assert same(epochs(loader(here, val, training=False)), epochs(loader(here, folder_val, training=False)))
    made, of_folder = loader(here, train_images), loader(here, folder_train)
    whole = epochs(made, 2)
    assert same(whole, epochs(of_folder, 2))
    stopped = loader(here, train_images)
    for at, _ in enumerate(stopped, 1):
        if at == 3:
            break
    state = json.loads(json.dumps(stopped.state_dict()))
    again = loader(here, find_dataset(here)[0])
    again.load_state_dict(state)
    assert same(epochs(again), whole[3 : len(again)])


@pytest.mark.parametrize("layout", COMMANDS)
def test_a_bad_image_is_replaced_and_named_and_the_others_stay(
    layout: str, tiny_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    harmed = copied_with(
        tiny_data, tmp_path / "folder", {"train/bee/004.jpg": b"no image", "train/cat/008.jpg": b"\xff\xd8\xff"}
    )
    here = config(harmed, tmp_path / "data", layout)
    found = loader(here, find_dataset(here)[0])
    batches = epochs(found)
    assert same(batches, epochs(loader(here, find_dataset(DataConfig(root=str(harmed)))[0])))
    assert [why[:8] for why in found.bad.values()] == ["no image", "JPEG wit"], found.bad
    assert all(name.startswith(f"train/{kind}/") for name, kind in zip(found.bad, ("bee", "cat"), strict=True))
    assert "bad image cat/" in capfd.readouterr().err


@pytest.mark.parametrize("layout", COMMANDS)
def test_the_commands_take_it(
    layout: str, tiny_data: Path, tmp_path: Path, finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    here = config(tiny_data, tmp_path / "data", layout)
    labels = ("--data.labels", here.labels) if here.labels else ()
    assert call(train.main, *arguments(tmp_path / "data", tmp_path / "run", "--epochs", "1", *labels)) == 0
    assert "45 training and 14 validation images of 3 classes" in capsys.readouterr().out
    first = [
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        for run in (tmp_path / "run", finished_run.folder)
    ]
    assert first[0]["train_loss"] == first[1]["train_loss"], "of the same weights on the same pixels"
    assert (
        call(prepare.main, "pack", here.root, str(tmp_path / "out"), *(["--labels", here.labels] if labels else []))
        == 0
    )
    for packed, source in zip(find_dataset(DataConfig(root=str(tmp_path / "out"))), find_dataset(here), strict=True):
        assert packed.fingerprint() == source.fingerprint() and packed.classes == source.classes
        assert [packed.read(at) for at in range(len(packed))] == [source.read(at) for at in range(len(source))]


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_numbers_order_the_classes_unless_another_order_is_asked_for(
    kind: str, tiny_data: Path, tmp_path: Path
) -> None:
    """classes.txt and ClassLabel give outputs their numbers, in a pack of it too; code point order is that of folders."""
    names = {"ant": "zebra", "bee": "12", "cat": "2"}
    data = tmp_path / "folder"
    for path in tiny_data.glob("*/*"):
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / names[path.name]).symlink_to(path)
    order = ["zebra", "12", "2"]
    write = write_tars if kind == "tars" else write_parquets
    (tmp_path / "root").mkdir()
    write(data, tmp_path / "root", **{"numbers" if kind == "tars" else "names": order})
    here = DataConfig(root=str(tmp_path / "root"))
    assert [found.classes for found in find_dataset(here)] == [tuple(order)] * 2
    train_images, val = find_dataset(DataConfig(root=here.root, class_order="natural"))
    assert train_images.classes == val.classes == ("2", "12", "zebra")
    for found in (train_images, val):
        assert {found.name(at).split("/")[0] for at in range(len(found)) if found.labels[at] == 1} == {"12"}
    assert call(prepare.main, "pack", here.root, str(tmp_path / "out")) == 0
    assert find_dataset(DataConfig(root=str(tmp_path / "out")))[0].classes == tuple(order)


@pytest.mark.parametrize("layout", ["csv", "tars", "parquet"])
def test_without_val_a_share_is_held_out_and_packed_with_its_numbers(
    layout: str, tiny_data: Path, tmp_path: Path
) -> None:
    here = config(tiny_data, tmp_path / "data", layout)
    if here.labels:
        table = tmp_path / "data" / here.labels
        table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.endswith(",val\n")))
    for path in [*(tmp_path / "data").glob("val-*"), *(tmp_path / "data").glob("*/validation-*")]:
        path.unlink()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train").symlink_to(tiny_data / "train")
    held = find_dataset(replace(here, val_share=0.3))
    assert len(held[0]) + len(held[1]) == 45 and len(held[1]) > 5
    if layout != "parquet":  # whose images have other names
        of_folder = find_dataset(DataConfig(root=str(tmp_path / "folder"), val_share=0.3))
        assert [part.fingerprint() for part in held] == [part.fingerprint() for part in of_folder]
    labels = ("--labels", here.labels) if here.labels else ()
    assert call(prepare.main, "pack", here.root, str(tmp_path / "out"), "--val-share", "0.3", *labels) == 0
    packed = find_dataset(DataConfig(root=str(tmp_path / "out")))
    assert [part.fingerprint() for part in packed] == [part.fingerprint() for part in held]
    assert is_numbered(packed[0]) == is_numbered(held[0]) == (layout == "parquet")


def test_links_keep_no_label_of_a_table(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "all").symlink_to(tiny_data / "train")
    lines = [f"all/{path.parent.name}/{path.name},{path.stem[-1]}\n" for path in (tiny_data / "train").glob("*/*")]
    (tmp_path / "images.csv").write_text("path,label\n" + "".join(lines))
    assert call(prepare.main, "split", str(tmp_path), str(tmp_path.parent / "out"), "--labels", "images.csv") == 2
    assert (
        "must lie in the folder of its class, 0, as links keep no other label; `fasttricks data pack"
        in capsys.readouterr().err
    )


def test_scan_says_that_it_does_not_look_into_them(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for layout in ("tars", "parquet"):
        config(tiny_data, tmp_path / layout, layout)
        assert call(prepare.main, "scan", str(tmp_path / layout), "--workers", "1") == 2
        said = capsys.readouterr().err
        assert "scan looks at image files, and not into" in said and "prepare pack DIR OUT` names images" in said


def test_a_split_alone_and_one_that_is_not_there(tiny_data: Path, tmp_path: Path) -> None:
    here = config(tiny_data, tmp_path / "tars", "tars")
    assert len(open_split(here, "val")) == 14
    for path in (tmp_path / "tars").glob("val-*"):
        path.unlink()
    with pytest.raises(DataError, match="holds no val/"):
        open_split(here, "val")
