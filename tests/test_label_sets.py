"""Several labels an image, from a table: the sets that a source numbers, held out, relabelled, loaded; or an error by line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttricks.commands import data as prepare
from fasttricks.commands import train
from fasttricks.config import ConfigError, DataConfig, LossConfig, TrainConfig
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import Source, find_dataset, open_split
from fasttricks.data.sources.class_counts import class_counts, describe_counts
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.held_out import name_hashes
from fasttricks.data.sources.label_sets import sets_of
from lib.layouts import write_sets
from lib.tiny import arguments, call

SETS = ("ant;insect", "", "cat", "insect;bee")
HEADER = "path,label,split\n"


def place(data: Path, file: Path, **fields: object) -> DataConfig:
    values: dict[str, object] = {"root": str(data), "labels": str(file), "label_separator": ";", **fields}
    return DataConfig(**values)  # type: ignore[arg-type]


def names(source: Source, image: int) -> set[str]:
    """The classes of an image."""
    return {source.classes[label] for label in sets_of(source)[source.labels[image]]}


def told(file: Path) -> dict[str, set[str]]:
    """Path -> its labels, as a line of the table says."""
    rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
    return {row[0]: set(row[1].split(";")) - {""} for row in rows}


def test_each_image_has_the_labels_of_its_row_in_any_order(tiny_data: Path, tmp_path: Path) -> None:
    file = write_sets(tiny_data, tmp_path / "a.csv", SETS)
    train, val = find_dataset(place(tiny_data, file))
    assert train.classes == val.classes == ("ant", "bee", "cat", "insect")
    rows = told(file)
    for split, source in (("train", train), ("val", val)):
        assert {f"{split}/{source.name(at)}": names(source, at) for at in range(len(source))} == {
            path: labels for path, labels in rows.items() if path.startswith(split)
        }
        assert sets_of(source)[0] == (), "an image without a label is one too"
    other = write_sets(tiny_data, tmp_path / "b.csv", tuple(";".join(cell.split(";")[::-1]) for cell in SETS))
    assert find_dataset(place(tiny_data, other))[0].fingerprint() == train.fingerprint()
    changed = write_sets(tiny_data, tmp_path / "c.csv", ("ant", "", "cat", "insect;bee"))
    assert find_dataset(place(tiny_data, changed))[0].fingerprint() != train.fingerprint()


@pytest.mark.parametrize("separator", ["|", ", ", "::", " "])
def test_any_text_may_separate_labels(separator: str, tiny_data: Path, tmp_path: Path) -> None:
    """Also one of which a part is in the names."""
    cells = [cell.replace("ant", "a:t").replace(";", separator) for cell in SETS]
    train = open_split(
        place(tiny_data, write_sets(tiny_data, tmp_path / "a.csv", cells), label_separator=separator), "train"
    )
    assert train.classes == ("a:t", "bee", "cat", "insect")
    assert sorted(sets_of(train)) == [(), (0, 3), (1, 3), (2,)]


WRONG = {
    "a label twice": ("cat;dog;cat", r"line 2: label = 'cat;dog;cat': has the class 'cat' twice"),
    "no label between": ("cat;;dog", r"line 2: label = '': must be the name of a class"),
    "a separator at the end": ("cat;", r"line 2: label = '': must be the name of a class"),
    "space around a label": ("cat; dog", r"line 2: label = ' dog': must be .* without space around it"),
    "a separator alone": (";", r"line 2: label = '': must be the name of a class"),
    "no label at all": ("", r"a.csv: no image of train has a label; mend the table"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_cell_is_refused_by_its_line(kind: str, tiny_data: Path, tmp_path: Path) -> None:
    cell, said = WRONG[kind]
    file = tmp_path / "a.csv"
    file.write_text(f"{HEADER}train/ant/000.jpg,{cell},train\nval/ant/000.jpg,cat,val\n")
    with pytest.raises(DataError, match=said):
        find_dataset(place(tiny_data, file))


def test_val_may_have_sets_that_train_lacks_and_no_label(tiny_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    rows = "train/ant/000.jpg,cat,train\ntrain/bee/001.jpg,dog,train\nval/ant/000.jpg,dog;cat,val\n"
    file.write_text(HEADER + rows)
    _, val = find_dataset(place(tiny_data, file))
    assert names(val, 0) == {"cat", "dog"}
    file.write_text(HEADER + rows + "val/bee/001.jpg,cat;emu,val\n")
    with pytest.raises(
        DataError, match=r"a.csv: line 5: label = 'emu' has no counterpart in train, which has 2 classes"
    ):
        find_dataset(place(tiny_data, file))
    file.write_text(HEADER + rows + "train/lost.jpg,cat;gnu,train\n")
    with pytest.raises(DataError, match=r"line 5: no image of class 'gnu' can be used \(train/lost.jpg: unreadable"):
        find_dataset(place(tiny_data, file))


def test_the_classes_follow_their_order(tiny_data: Path, tmp_path: Path) -> None:
    order = tmp_path / "order.txt"
    order.write_text("insect\ncat\nbee\nant\n")
    file = write_sets(tiny_data, tmp_path / "a.csv", SETS)
    plain, _ = find_dataset(place(tiny_data, file))
    for share in (0.0, 0.4):
        path = write_sets(tiny_data, tmp_path / f"{share}.csv", SETS, split=share == 0)
        given = place(tiny_data, path, val_share=share, class_order=str(order))
        for source in find_dataset(given):
            assert source.classes == ("insect", "cat", "bee", "ant")
            rows, below = told(path), "" if share else f"{source.root.name}/"
            assert all(names(source, at) == rows[below + source.name(at)] for at in range(len(source)))
    assert find_dataset(place(tiny_data, file, class_order=str(order)))[0].fingerprint() != plain.fingerprint()


def test_the_share_alone_holds_out(tiny_data: Path, tmp_path: Path) -> None:
    file = write_sets(tiny_data, tmp_path / "a.csv", SETS, split=False)
    whole = open_split(place(tiny_data, file), "train")
    train, val = find_dataset(place(tiny_data, file, val_share=0.3))
    below = name_hashes(whole) < np.uint64(int(0.3 * 2**64))
    held = {whole.name(at) for at in np.flatnonzero(below)}
    assert {val.name(at) for at in range(len(val))} == held and len(train) + len(val) == len(whole)
    assert 0 < len(held) < len(whole)
    rows = told(file)
    assert all(names(source, at) == rows[source.name(at)] for source in (train, val) for at in range(len(source)))
    rare = file.read_text().splitlines()
    at = next(number for number, row in enumerate(rare) if row.split(",")[0] in held)
    path, _ = rare[at].split(",")
    file.write_text("\n".join([*rare[:at], f"{path},cat;yak", *rare[at + 1 :]]) + "\n")
    lost = "data.val_share = 0.3: all 1 good images of class yak of .* would be held out, and none is left for training"
    with pytest.raises(DataError, match=lost):
        find_dataset(place(tiny_data, file, val_share=0.3))
    file.write_text(
        "\n".join(
            f"{row.split(',')[0]},{'' if row.split(',')[0] in held else 'cat;dog'}" if number else row
            for number, row in enumerate(rare)
        )
        + "\n"
    )
    with pytest.raises(
        DataError, match=r"data\.val_share = 0\.3: no image with a label of .* is held out; give another"
    ):
        find_dataset(place(tiny_data, file, val_share=0.3))


def test_the_images_a_class_and_the_labels_an_image_are_counted(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sets(tiny_data, tmp_path / "a.csv", SETS)
    source, _ = find_dataset(place(tiny_data, file))
    lists = [labels for path, labels in told(file).items() if path.startswith("train")]
    counts = {name: sum(name in labels for labels in lists) for name in source.classes}
    assert dict(zip(source.classes, class_counts(source).tolist(), strict=True)) == counts
    mean = sum(map(len, lists)) / len(lists)
    words = f"{min(counts.values())} to {max(counts.values())} images a class (fewest: "
    assert describe_counts(source).startswith(words)
    assert describe_counts(source).endswith(f", most: insect); 0 to 2 labels an image, {mean:.2f} on average")
    assert (
        call(prepare.main, "stats", str(tiny_data), "--labels", str(file), "--label-separator", ";", "--workers", "1")
        == 0
    )
    assert f"{len(source)} training images of 4 classes, {describe_counts(source)}" in capsys.readouterr().out


def test_a_batch_has_a_row_of_labels_an_image_and_a_bad_one_is_replaced_by_its_like(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sets(tiny_data, tmp_path / "a.csv", SETS)
    config = replace(place(tiny_data, file, image_size=16, val_resize=16, threads=1), max_bad=0.5)
    source, _ = find_dataset(config)
    one = next(at for at in range(len(source)) if names(source, at) == {"cat"})
    lonely = next(at for at in range(len(source)) if names(source, at) == {"ant", "insect"})
    lines = file.read_text().replace(f"train/{source.name(one)},", "train/cat/gone.jpg,")
    lines = lines.replace(f"train/{source.name(lonely)},ant;insect", "train/ant/gone.jpg,cat;insect")
    file.write_text(lines)
    source, _ = find_dataset(config)
    gone = {source.name(at): at for at in source.bad}
    loader = Loader(source, config, training=True, batch_size=7, device=torch.device("cpu"))
    seen = 0
    for batch in loader:
        assert batch.labels.dtype == torch.float32 and batch.labels.shape == (len(batch), 4)
        assert batch.places is not None and batch.shown is not None
        for row, turn, shown in zip(batch.labels, batch.places.tolist(), batch.shown.tolist(), strict=True):
            assert {source.classes[k] for k in row.nonzero().flatten().tolist()} == names(source, shown)
            assert set(row.tolist()) <= {0.0, 1.0}
            if turn == gone["cat/gone.jpg"]:
                assert shown != turn and names(source, shown) == {"cat"}
            elif turn == gone["ant/gone.jpg"]:
                assert shown not in gone.values(), "no other has its labels: any good image"
            else:
                assert shown == turn
            seen += 1
    assert seen == len(source)
    assert (
        "cat/gone.jpg: unreadable: No such file or directory; replaced by another with the same labels, or any"
        in capsys.readouterr().err
    )


MULTI = TrainConfig(recipe="a", epochs=6, global_batch_size=8, task="multilabel", data=DataConfig(label_separator=";"))
TOGETHER = [
    ("task", lambda: replace(MULTI, data=DataConfig()), "needs a table with several labels an image; add --data.labels"),
    ("data.label_separator", lambda: replace(MULTI, task="classification"), "add --task multilabel, or leave it out"),
    ("data.limit_per_class", lambda: replace(MULTI.data, limit_per_class=3), "leave limit_per_class at 0"),
    ("data.balance", lambda: replace(MULTI.data, balance=0.5), "leave balance at 0"),
    ("loss.class_weights", lambda: replace(MULTI, loss=LossConfig(class_weights="balanced")), "leave it out"),
    ("distill.teacher", lambda: replace(MULTI, distill=replace(MULTI.distill, teacher="x")), "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "made", "way_out"), TOGETHER, ids=[row[0] for row in TOGETHER])
def test_fields_that_go_by_one_label_are_refused_with_the_way_out(field: str, made: object, way_out: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(field)} = .*{re.escape(way_out)}") as refused:
        made()  # type: ignore[operator]
    assert "\n" not in str(refused.value)


def test_a_place_without_a_table_is_refused_before_training(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = arguments(tiny_data, tmp_path / "run", "--task", "multilabel", "--data.label-separator", ";")
    assert call(train.main, *args) == 2
    said = "data.label_separator = ';': several labels an image are read from a table; add --data.labels FILE.csv"
    assert capsys.readouterr().err.strip() == f"error: {said}"
    assert not (tmp_path / "run").exists()
