"""Images with boxes on disk: Pascal VOC's layout, and every odd file, list, annotation and box, each named."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from torchvision.datasets import VOCDetection

from fasttricks.config import ConfigError, DataConfig
from fasttricks.data.boxes.annotation import MOST_BYTES, BadAnnotation, parse_annotation
from fasttricks.data.boxes.places import VOC_CLASSES, open_box_split, open_boxes, require_boxes
from fasttricks.data.boxes.source import BoxSource
from fasttricks.data.sources.errors import DataError
from lib.boxes import CLASSES, annotation, obj, write_boxes

LISTS = {"VOC2007/trainval": 4, "VOC2007/test": 2, "VOC2012/trainval": 3}
IMAGE, NOTE = "VOC2007/JPEGImages/0001.jpg", "VOC2007/Annotations/0001.xml"
"""Of image 1 of training."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_boxes(tmp_path_factory.mktemp("boxes") / "VOCdevkit", LISTS)


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(made, tmp_path / "VOCdevkit"))


def opened(root: Path, split: Any = "train", **fields: Any) -> BoxSource:
    return open_box_split(DataConfig(root=str(root), **fields), split)


def main(root: Path, name: str, year: str = "VOC2007") -> Path:
    return root / year / "ImageSets" / "Main" / f"{name}.txt"


def note(root: Path, *objects: str, **arguments: Any) -> None:
    """Give image 1 of training other objects; its size is 30 x 20 pixels."""
    (root / NOTE).write_text(annotation(*objects, **arguments))


def raw(folder: Path, year: str, images: str) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    """(file, objects) of each image by torchvision's reader: its class, and its corners as edges from 0."""
    found, corners = VOCDetection(folder, year, images), ("xmin", "ymin", "xmax", "ymax")
    trees = [found.parse_voc_xml(ElementTree.parse(path).getroot())["annotation"] for path in found.annotations]
    objects = [
        [
            (one["name"], [float(one["bndbox"][c]) - c.endswith("min") for c in corners])
            for one in tree.get("object", [])
        ]
        for tree in trees
    ]
    return [(Path(path).name, one) for path, one in zip(found.images, objects, strict=True)]


def read(source: BoxSource) -> list[tuple[str, list[tuple[str, list[float]]]]]:
    """The same of ours."""
    found = []
    for number in range(len(source)):
        one = source.boxes(number)
        assert one.xyxy.dtype == np.float32 and one.labels.dtype == np.int64 and one.difficult.dtype == np.bool_
        assert len(one) == len(one.xyxy) == len(one.labels) == len(one.difficult)
        names = [source.classes[label] for label in one.labels]
        found.append((Path(source.name(number)).name, list(zip(names, one.xyxy.tolist(), strict=True))))
    return found


def test_both_years(made: Path) -> None:
    train, val = open_boxes(DataConfig(root=str(made)))
    assert train.classes == val.classes == CLASSES
    assert (len(train), len(val)) == (7, 2)
    assert train.images[3:5] == ("VOC2007/JPEGImages/0003.jpg", "VOC2012/JPEGImages/2000.jpg")
    for source in (train, val):
        assert not (source.bad or source.strays or source.left_out or source.clamped)
        assert [*source.labels] == [0] * len(source)
        assert source.read(1) == (made / source.name(1)).read_bytes()
        assert Path(source.locate(1).path) == made / source.name(1)
    assert train.place == f"{made}/VOC2007/ImageSets/Main/trainval.txt and VOC2012/ImageSets/Main/trainval.txt"
    want = raw(made.parent, "2007", "trainval") + raw(made.parent, "2012", "trainval")
    assert read(train) == want and read(val) == raw(made.parent, "2007", "test")
    assert 0 < train.every.difficult.sum() < len(train.every)
    assert {len(objects) for _, objects in want} >= {0, 1, 3}  # an image without an object is one as any other


SPLITS: dict[str, tuple[dict[str, int], str, str]] = {
    "2007": ({"VOC2007/trainval": 2, "VOC2007/test": 1}, "VOC2007/trainval", "VOC2007/test"),
    "without test": ({"VOC2007/train": 2, "VOC2007/val": 1}, "VOC2007/train", "VOC2007/val"),
    "trainval is not asked for without test": (
        {"VOC2012/train": 2, "VOC2012/val": 1, "VOC2012/trainval": 3}, "VOC2012/train", "VOC2012/val",
    ),
    "the test of 2012 has no annotations": (
        {"VOC2012/train": 2, "VOC2012/val": 1, "VOC2012/test": 3}, "VOC2012/train", "VOC2012/val",
    ),
    "the test of 2012 beside that of 2007": (
        {"VOC2007/trainval": 2, "VOC2007/test": 1, "VOC2012/trainval": 2, "VOC2012/test": 3},
        "VOC2007/trainval VOC2012/trainval", "VOC2007/test",
    ),
    "both without test": (
        {"VOC2012/train": 2, "VOC2012/val": 1, "VOC2007/train": 2, "VOC2007/val": 1},
        "VOC2007/train VOC2012/train", "VOC2007/val VOC2012/val",
    ),
    "test of 2007 alone": ({"VOC2007/test": 1, "VOC2012/trainval": 8}, "VOC2012/trainval", "VOC2007/test"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_which_lists(name: str, tmp_path: Path) -> None:
    lists, *want = SPLITS[name]
    write_boxes(tmp_path / "VOCdevkit", lists)
    for source, paths in zip(open_boxes(DataConfig(root=str(tmp_path / "VOCdevkit"))), want, strict=True):
        assert list(source.lists) == [path.replace("/", "/ImageSets/Main/") + ".txt" for path in paths.split()]
        assert len(source) == sum(lists[path] for path in paths.split())


def test_classes_are_those_of_voc_where_they_suffice(root: Path) -> None:
    write_boxes(root, LISTS, classes=("person", "cat"))
    train, val = open_boxes(DataConfig(root=str(root)))
    assert train.classes == val.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert {train.classes[label] for label in train.every.labels} == {"person", "cat"}
    note(root, obj("zebra"), obj("person"))
    assert opened(root).classes == opened(root, "val").classes == ("cat", "person", "zebra")


def test_a_trained_network_brings_its_classes(root: Path) -> None:
    config = DataConfig(root=str(root))
    source = open_box_split(config, "val", classes=("tree", "bird", "ball", "car"))
    want = open_box_split(config, "val")
    assert [source.classes[label] for label in source.every.labels] == [
        want.classes[label] for label in want.every.labels
    ]


def test_the_fingerprint_is_of_names_boxes_and_classes(root: Path) -> None:
    prints = {opened(root).fingerprint(), opened(root, "val").fingerprint()}
    assert opened(root).fingerprint() in prints and len(prints) == 2
    for objects in (
        [obj()],
        [obj("car")],
        [obj(difficult=1)],
        [obj(box=(2, 3, 12, 15))],
        [obj(), obj()],
        [obj("zebra")],
    ):
        note(root, *objects)
        prints.add(opened(root).fingerprint())
    lines = main(root, "trainval").read_text().split()
    main(root, "trainval").write_text("\n".join(reversed(lines)))
    prints.add(opened(root).fingerprint())
    assert len(prints) == 9


# ------------------------------------------------------------------------------------------------- odd files and boxes
@dataclass
class Odd:
    """A change to the data set, and its effect on image 1 of 7."""

    make: Callable[[Path], object]
    bad: str = ""
    """Begin of the reason; empty: it is good."""
    left_out: str = ""
    """Reason for object 1 of 2 that the change gave."""
    clamped: str = ""
    """The same."""
    box: tuple[float, ...] = ()
    """Its edges then."""
    stray: tuple[str, str] = ("", "")


def two(box: tuple[object, ...]) -> Callable[[Path], object]:
    """Image 1 has an object with that box, and a good one."""
    return lambda root: note(root, obj(box=box), obj())


def add_line(root: Path, line: str) -> None:
    with main(root, "trainval").open("a") as file:
        file.write(f"{line}\n")


ENTITIES = '<!DOCTYPE a [<!ENTITY a "ball"><!ENTITY b "&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
ODD: dict[str, Odd] = {
    "no image": Odd(lambda root: (root / IMAGE).unlink(), "no such image"),
    "no annotation": Odd(lambda root: (root / NOTE).unlink(), "no annotation VOC2007/Annotations/0001.xml"),
    "neither": Odd(
        lambda root: ((root / IMAGE).unlink(), (root / NOTE).unlink()), "no such image, and no annotation"
    ),
    "a case differs": Odd(
        lambda root: (root / IMAGE).rename(root / IMAGE).rename(root / "VOC2007/JPEGImages/0001.JPG")
    ),
    "the case of a name": Odd(
        lambda root: (
            main(root, "trainval").write_text("0000\na1\n0002\n0003\n"),
            (root / IMAGE).rename(root / "VOC2007/JPEGImages/A1.jpg"),
        ),
        "no such image, and no annotation; A1.jpg there differs in upper and lower case",
    ),
    "a name with its ending": Odd(
        lambda root: main(root, "trainval").write_text("0000\n0001.jpg\n0002\n0003\n"),
        "no such image, and no annotation; a list must name it without its ending",
    ),
    "two images of a name": Odd(
        lambda root: shutil.copy(root / IMAGE, root / "VOC2007/JPEGImages/0001.png"),
        "0001.jpg and 0001.png would share an annotation; give each a name of its own",
    ),
    "a file of a name that is no image": Odd(
        lambda root: (root / "VOC2007/JPEGImages/0001.txt").write_text("notes"),
    ),
    "an image that is none": Odd(lambda root: (root / IMAGE).write_bytes(b"text"), "no image: first bytes"),
    "an empty image": Odd(lambda root: (root / IMAGE).write_bytes(b""), "0 bytes long"),
    "quarantined": Odd(
        lambda root: (root / "quarantine.jsonl").write_text(json.dumps({"file": IMAGE, "reason": "blurred"})),
        "quarantined: blurred",
    ),
    "a name twice": Odd(
        lambda root: add_line(root, "0001"),
        stray=("VOC2007/ImageSets/Main/trainval.txt line 5", "0001 is in line 2 too; it counts once"),
    ),
    "no object": Odd(lambda root: note(root)),
    "the whole image": Odd(lambda root: note(root, obj(box=(1, 1, 30, 20)), obj()), box=(0, 0, 30, 20)),
    "parts of an object have names and boxes too": Odd(
        lambda root: note(
            root, obj(extra="<part><name>head</name><bndbox><xmin>4</xmin><xmin>9</xmin></bndbox></part>"), obj()
        ),
        box=(1, 2, 12, 14),
    ),
    "fractions of a pixel": Odd(two((2.25, 3.5, 12.75, "14e0")), box=(1.25, 2.5, 12.75, 14)),
    "difficult is left out": Odd(lambda root: note(root, obj(difficult=None), obj()), box=(1, 2, 12, 14)),
    "UTF-16": Odd(lambda root: (root / NOTE).write_bytes(annotation(obj(), obj()).encode("utf-16")), box=(1, 2, 12, 14)),
    "an empty box": Odd(two((5, 5, 5, 5)), left_out="box 5 5 5 5 is empty: xmax must be above xmin"),
    "an empty box in one direction": Odd(two((5, 5, 9, 5)), left_out="box 5 5 9 5 is empty"),
    "an empty box in the other": Odd(two((5, 5, 5, 9)), left_out="box 5 5 5 9 is empty"),
    "a box turned over": Odd(two((9, 5, 4, 8)), left_out="box 9 5 4 8 is turned over: xmax must be above xmin"),
    "a box upside down": Odd(two((4, 8, 9, 5)), left_out="box 4 8 9 5 is turned over"),
    "a turned box far out": Odd(two((400, 8, 9, 5)), left_out="box 400 8 9 5 is turned over"),
    "a pixel out on the left": Odd(
        two((0, 0, 9, 9)), clamped="box 0 0 9 9 reaches 1 pixels out of the image of 30 x 20 pixels", box=(0, 0, 9, 9)
    ),
    "a pixel out on the right": Odd(
        two((5, 5, 31, 20.5)), clamped="box 5 5 31 20.5 reaches 1 pixels out of the image", box=(4, 4, 30, 20)
    ),
    "a box in the pixel beside it": Odd(two((30.5, 5, 31, 9)), clamped="box 30.5", box=(29.5, 4, 30, 9)),
    "a box that clamps to nothing": Odd(two((31, 5, 31.5, 9)), "object 1: box 31 5 31.5 9 reaches 1.5 pixels out of"),
    "two pixels out": Odd(two((5, 5, 32, 9)), "object 1: box 5 5 32 9 reaches 2 pixels out of the image of 30 x 20"),
    "far out": Odd(two((-1e300, 5, 9, 9)), "object 1: box -1e+300 5 9 9 reaches 1e+300 pixels out of the image"),
    "another class in validation": Odd(lambda root: note(root, obj("zebra")), "object 1 is of class zebra, which is none"),
    "no number": Odd(two(("left", 5, 9, 9)), "object 1: xmin = 'left'; must be a number of pixels"),
    "NaN": Odd(two((5, "nan", 9, 9)), "object 1: ymin = 'nan'; must be a number"),
    "infinite": Odd(two((5, 5, 9, "1e999")), "object 1: ymax = '1e999'; must be a number"),
    "an empty number": Odd(two((5, "", 9, 9)), "object 1: ymin = ''; must be"),
    "a corner is left out": Odd(two((5, 5, None, 9)), "object 1 has no xmax"),
    "a corner twice": Odd(
        lambda root: note(root, obj().replace("<xmin>", "<xmin>1</xmin><xmin>")), "object 1 has two elements xmin"
    ),
    "no box": Odd(lambda root: note(root, "<object><name>car</name></object>"), "object 1 has no xmin"),
    "two boxes": Odd(
        lambda root: note(root, obj().replace("</bndbox>", "</bndbox><bndbox></bndbox>")), "object 1 has two elements bndbox"
    ),
    "no name": Odd(lambda root: note(root, obj(), obj("")), "object 2 has no name"),
    "two names": Odd(lambda root: note(root, obj(extra="<name>car</name>")), "object 1 has two elements name"),
    "an element in a name": Odd(lambda root: note(root, obj("<b>car</b>")), "an element b in name, which has text alone"),
    "difficult is a word": Odd(lambda root: note(root, obj(difficult="yes")), "object 1: difficult = 'yes'; must be 0 or 1"),
    "no size": Odd(lambda root: note(root, size=None), "size: none for a side; must be the image's width and height"),
    "a size of 0": Odd(lambda root: note(root, size=(0, 0)), "size: '0' for a side; must be the image's width"),
    "a size in words": Odd(lambda root: note(root, size=("a", 20)), "size: 'a' for a side"),
    "a size beyond all images": Odd(lambda root: note(root, size=(10**30, 20)), "size: '1000000"),
    "two sizes": Odd(lambda root: note(root, "<size></size>"), "it has two elements size"),
    "no XML": Odd(lambda root: (root / NOTE).write_text("xmin 5"), "no XML, or cut off: syntax error: line 1"),
    "an empty annotation": Odd(lambda root: (root / NOTE).write_text(""), "0 bytes long"),
    "blanks alone": Odd(lambda root: (root / NOTE).write_text(" \n"), "empty"),
    "cut off": Odd(lambda root: (root / NOTE).write_text(annotation(obj())[:99]), "no XML, or cut off: unclosed token"),
    "another root": Odd(lambda root: (root / NOTE).write_text("<html/>"), "root element html, not annotation"),
    "no UTF-8": Odd(lambda root: (root / NOTE).write_bytes(b"<annotation>\xff</annotation>"), "no XML, or cut off: not well"),
    "an encoding that nobody knows": Odd(
        lambda root: note(root, before='<?xml version="1.0" encoding="klingon"?>'), "no XML, or cut off: unknown encoding"
    ),
    "entities": Odd(lambda root: note(root, obj("&b;"), before=ENTITIES), "has a DOCTYPE, which may declare entities"),
    "a file by an entity": Odd(lambda root: note(root, obj("&a;"), before=OUTSIDE), "has a DOCTYPE, which may declare"),
    "a DOCTYPE in the network": Odd(
        lambda root: note(root, before='<!DOCTYPE annotation SYSTEM "http://localhost:1/voc.dtd">'), "has a DOCTYPE"
    ),
    "an entity that is not declared": Odd(lambda root: note(root, obj("&a;")), "no XML, or cut off: undefined entity"),
    "nested deep": Odd(lambda root: note(root, "<a>" * 99 + "</a>" * 99), "nested deeper than 16 elements"),
    "a huge file": Odd(lambda root: note(root, " " * MOST_BYTES), "4,194,4"),
    "a folder": Odd(lambda root: ((root / NOTE).unlink(), (root / NOTE).mkdir()), "no annotation VOC2007/Annotations/0001"),
    "a link that points nowhere": Odd(
        lambda root: ((root / NOTE).unlink(), (root / NOTE).symlink_to("nowhere")), "unreadable: No such file"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_named_and_the_rest_is_read(name: str, root: Path) -> None:
    odd = ODD[name]
    before = read(opened(root))
    odd.make(root)
    source = open_box_split(DataConfig(root=str(root)), "train", classes=CLASSES)
    assert len(source) == 7
    after = read(source)
    assert {at: one for at, one in enumerate(after) if at != 1} == {at: one for at, one in enumerate(before) if at != 1}
    assert dict([odd.stray] * bool(odd.stray[0])) == source.strays
    if odd.bad:
        (bad,) = source.bad.items()
        reason = bad[1].removeprefix(f"annotation {NOTE}: ")
        assert bad[0] == 1 and reason.startswith(odd.bad), reason
        assert not (after[1][1] or source.left_out or source.clamped)
        return
    assert not source.bad
    for named, why in ((source.left_out, odd.left_out), (source.clamped, odd.clamped)):
        assert {*named} == {f"{NOTE} object 1"} if why else not named
        assert all(one.startswith(why) for one in named.values()), named
    if odd.left_out:
        assert after[1][1] == [("ball", [1, 2, 12, 14])]
    if odd.box:
        assert after[1][1] == [("ball", list(odd.box)), ("ball", [1, 2, 12, 14])]


def test_harmed_bytes_give_an_annotation_or_a_reason() -> None:
    """Each truncation, and each byte changed: never another error."""
    file = annotation(obj(), obj("car", difficult=1)).encode()
    harmed = {file[:length] for length in range(len(file))}
    harmed |= {file[:at] + bytes([v]) + file[at + 1 :] for at in range(len(file)) for v in (0, 60, 255, file[at] ^ 1)}
    reasons = []
    for one in harmed - {file}:
        try:
            assert len(parse_annotation(one).objects) <= 2
        except BadAnnotation as error:
            reasons.append(str(error))
    assert all(reasons) and len(reasons) > 0.7 * len(harmed)


# ---------------------------------------------------------------------------------------------------- whole data sets
def without(*names: str) -> Callable[[Path], object]:
    return lambda root: [
        main(root, name, year).unlink(missing_ok=True) for name in names for year in ("VOC2007", "VOC2012")
    ]


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda root: shutil.rmtree(root), "no such folder; the layout is ROOT/VOC2007/ImageSets/Main"),
    "empty": (lambda root: (shutil.rmtree(root), root.mkdir()), r"holds no VOC2007 or VOC2012 \(there is nothing\)"),
    "a file": (lambda root: (shutil.rmtree(root), root.write_text("a")), "not a folder; the layout is"),
    "the folder above": (
        lambda root: (root.rename(root.parent / "x"), root.mkdir(), (root.parent / "x").rename(root / "VOCdevkit")),
        r"holds no VOC2007 or VOC2012 \(there is VOCdevkit\); give --data.root \S+/VOCdevkit/VOCdevkit$",
    ),
    "the folder below": (
        lambda root: ((root / "VOC2007").rename(root.parent / "x"), shutil.rmtree(root), (root.parent / "x").rename(root)),
        r"holds no VOC2007.*; give the folder that holds it, --data.root \S+, and call it VOC2007 there$",
    ),
    "no list": (
        without("trainval", "test"),
        r"no list train.txt for the split train \(there is none\); the layout is",
    ),
    "test alone": (
        without("trainval"),
        r"no list trainval.txt for the split train \(there is VOC2007/ImageSets/Main/test.txt\)",
    ),
    "an empty list": (lambda root: main(root, "trainval").write_text(" \n\n"), "trainval.txt: names no image; the layout"),
    "a list with paths": (
        lambda root: add_line(root, "../../secret"),
        r"trainval.txt: must hold the name of an image in each line, without folder and ending \(line 5 is ../../secret\)",
    ),
    "a list that is no text": (lambda root: main(root, "trainval").write_bytes(b"00\xff"), r"\(not UTF-8 at byte 2\); mend it"),
    "a list that is a folder": (
        lambda root: (main(root, "trainval").unlink(), main(root, "trainval").mkdir()), r"\(Is a directory\); mend it",
    ),
    "no images": (lambda root: shutil.rmtree(root / "VOC2012/JPEGImages"), "VOC2012/JPEGImages: no such folder; the layout"),
    "no annotations": (lambda root: shutil.rmtree(root / "VOC2007/Annotations"), "Annotations: no such folder; the layout"),
    "no objects": (
        lambda root: [path.write_text(annotation()) for path in root.glob("*/Annotations/*.xml")],
        "no object on any of the 7 training images, so there is no class",
    ),
    "no good image": (
        lambda root: [path.write_text("") for path in root.glob("*/Annotations/*.xml")],
        r"no class; VOC2012/JPEGImages/2002.jpg: annotation VOC2012/Annotations/2002.xml: 0 bytes long",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_place_that_cannot_be_used(name: str, root: Path) -> None:
    change, words = REFUSED[name]
    change(root)
    with pytest.raises(DataError, match=words) as error:
        open_boxes(DataConfig(root=str(root)))
    assert "\n" not in str(error.value)
    if name in ("nothing", "empty", "a file", "the folder above", "the folder below", "no list", "test alone"):
        with pytest.raises(DataError) as early:
            require_boxes(DataConfig(root=str(root)), "train", "val")
        assert str(early.value) == str(error.value)
    else:
        require_boxes(DataConfig(root=str(root)), "train", "val")


def test_no_good_image_of_validation(root: Path) -> None:
    for name in main(root, "test").read_text().split():
        (root / f"VOC2007/JPEGImages/{name}.jpg").unlink()
    with pytest.raises(
        DataError, match=r"test.txt: none of its 2 images is good; VOC2007/JPEGImages/1000.jpg: no such"
    ):
        opened(root, "val")


@pytest.mark.parametrize("given", ["", "demo"])
def test_a_root_must_be_given(given: str) -> None:
    with pytest.raises(DataError, match=f"data.root = {given!r}: must be a folder of images and boxes"):
        open_boxes(DataConfig(root=given))


@pytest.mark.parametrize(
    "field, value", [("val_share", 0.1), ("labels", "a.csv"), ("balance", 0.5), ("nested", "leaf")]
)
def test_a_field_without_effect(made: Path, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"data.{field} = {value!r}: has no effect on boxes"):
        opened(made, **{field: value})


def test_an_image_in_both_splits_is_told(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_boxes(DataConfig(root=str(root)))
    main(root, "test").write_text("1000\n0001\n")
    with pytest.warns(UserWarning, match=r"training has 1 of the 2 images of validation too \(VOC2007/.*/0001.jpg\)"):
        open_boxes(DataConfig(root=str(root)))


def test_names_from_outside_are_one_line(root: Path) -> None:
    """Of a class, a listed image, and an element."""
    note(root, obj("a\x85b"))
    main(root, "test").write_text("1000\n1001\n\x1b[31m\n")
    assert "a\\x85b" in open_box_split(DataConfig(root=str(root)), "train", classes=CLASSES).bad[1]
    (root / NOTE).write_text("<\xe4\u200b/>")
    assert all(why.isprintable() for why in opened(root).bad.values())
    assert len(opened(root, "val").bad) == 1


# ------------------------------------------------------------------------------------------------------------ real data
@pytest.mark.parametrize("name", ["raccoon", "bccd"])
def test_real_data(name: str, test_data: Callable[[str], Path]) -> None:
    """Images, boxes and classes of each list are those of facts.json, and the boxes are those of torchvision's reader."""
    folder = test_data("voc_small")
    facts = json.loads((folder / "facts.json").read_text())[name]
    train, val = open_boxes(DataConfig(root=str(folder / name / "VOCdevkit")))
    odd = [re.match(r"(\S+): box \[([^]]+)\]", line) for line in facts["odd"]]
    assert len(train.left_out) == len(odd) == {"raccoon": 0, "bccd": 2}[name]
    for one, (place, why) in zip(odd, train.left_out.items(), strict=True):
        assert one and place.startswith(f"VOC2007/Annotations/{one[1]}.xml object ")
        assert why.startswith(f"box {' '.join(f'{float(c):g}' for c in one[2].split(','))} is empty")
    for source, images in ((train, "trainval"), (val, "test")):
        assert not (source.bad or source.strays or source.clamped)
        assert len(source) == facts[images]["images"]
        assert list(source.classes) == sorted(facts[images]["classes"])
        theirs = raw(folder / name, "2007", images)
        counted = Counter(label for _, objects in theirs for label, _ in objects)
        assert counted == facts[images]["classes"]
        left_out = [
            (box[2] - 1 <= box[0] or box[3] - 1 <= box[1], (file, label))
            for file, objects in theirs for label, box in objects
        ]  # fmt: skip
        assert sum(out for out, _ in left_out) == len(source.left_out)
        usable = [
            (file, [(label, box) for label, box in objects if box[2] - 1 > box[0] and box[3] - 1 > box[1]])
            for file, objects in theirs
        ]
        assert read(source) == usable
        assert len(source.every) == facts[images]["boxes"] - len(source.left_out)
