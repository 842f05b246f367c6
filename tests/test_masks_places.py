"""Images with masks on disk: both layouts, and every odd file and value, each named."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fasttricks.config import ConfigError, DataConfig
from fasttricks.data.masks.pixels import decode_mask, read_pair
from fasttricks.data.masks.places import open_mask_split, open_masks
from fasttricks.data.masks.source import IGNORED, MaskSource
from fasttricks.data.sources.decode import BadImage
from fasttricks.data.sources.errors import DataError
from lib.images import encoded, png
from lib.masks import CLASSES, folders, write_classes, write_masks

MAX_PIXELS = 1_000_000


@pytest.fixture(scope="module", params=["plain", "ade"])
def layout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """(root, whether it is ADE20K's), not to be changed."""
    ade = request.param == "ade"
    return write_masks(tmp_path_factory.mktemp(request.param) / "root", train=4, val=2, ade=ade), ade


@pytest.fixture
def root(layout: tuple[Path, bool], tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(layout[0], tmp_path / "root"))


def opened(root: Path, split: Any = "train", **fields: Any) -> MaskSource:
    return open_mask_split(DataConfig(root=str(root), **fields), split)


def grey(*rows: list[int]) -> bytes:
    return encoded(Image.fromarray(np.array(rows, np.uint8)), "PNG")


def test_both_layouts(layout: tuple[Path, bool]) -> None:
    root, ade = layout
    train, val = open_masks(DataConfig(root=str(root)))
    images, masks = folders(ade, "train")
    assert train.classes == val.classes == CLASSES
    assert train.images == tuple(f"{images}/{number:03d}.jpg" for number in range(4))
    assert train.masks == tuple(f"{masks}/{number:03d}.png" for number in range(4))
    assert (len(train), len(val), dict(train.bad), dict(train.strays)) == (4, 2, {}, {})
    assert [*train.labels] == [0] * 4
    for number in range(4):
        assert train.name(number) == train.images[number]
        assert train.read(number) == (root / train.images[number]).read_bytes()
        assert train.read_mask(number) == (root / train.masks[number]).read_bytes()
        assert Path(train.locate(number).path) == root / train.images[number]
        pair = read_pair(train, number, MAX_PIXELS)
        stored = np.asarray(Image.open(root / train.masks[number])).astype(int)
        want = np.where(stored == 0, IGNORED, stored - 1) if ade else stored
        np.testing.assert_array_equal(pair.mask, want)
        np.testing.assert_array_equal(pair.image, np.asarray(Image.open(root / train.images[number]).convert("RGB")))
        assert pair.counts.tolist() == [(want == k).sum() for k in range(3)]
        assert IGNORED in want


def test_the_fingerprint_is_of_names_and_classes(root: Path, layout: tuple[Path, bool]) -> None:
    ade = layout[1]
    first = opened(root).fingerprint()
    assert opened(root).fingerprint() == first != opened(root, "val").fingerprint()
    write_classes(root, ade=ade, classes=("sky", "car", "road"))
    others = {first, opened(root).fingerprint()}
    write_classes(root, ade=ade)
    images, masks = (root / folder for folder in folders(ade, "train"))
    (images / "003.jpg").rename(images / "004.jpg")
    (masks / "003.png").rename(masks / "004.png")
    others.add(opened(root).fingerprint())
    (masks / "004.png").rename(masks / "004.PNG")
    assert not opened(root).bad
    assert len(others | {opened(root).fingerprint()}) == 4


def test_a_test_split_is_read_where_it_is_there(root: Path, layout: tuple[Path, bool]) -> None:
    images, masks = folders(layout[1], "test")
    with pytest.raises(
        DataError, match=f"{re.escape(images)}: no such folder, so there is no split test; the layout is"
    ):
        opened(root, "test")
    for source, target in zip(folders(layout[1], "val"), (images, masks), strict=True):
        shutil.copytree(root / source, root / target)
    assert len(opened(root, "test")) == 2


# ------------------------------------------------------------------------------------------------------ single files
@dataclass
class Odd:
    """A change to the folders of images and masks, and its effect on image 1 of 4."""

    make: Callable[[Path, Path], object]
    bad: str = ""
    """Begin of the reason; empty: it is good."""
    strays: tuple[str, ...] = ()
    """Names of the masks without an image."""
    count: int = 4
    """Images."""
    at: int = 1


JPEG = encoded(Image.fromarray(np.full((20, 30, 3), 99, np.uint8)))


def case_differs(images: Path, masks: Path) -> None:
    (images / "001.jpg").rename(images / "a1.jpg")
    (masks / "001.png").rename(masks / "A1.png")


def link_out(images: Path, masks: Path) -> None:
    """Image and mask lie outside of root."""
    for folder, name in ((images, "001.jpg"), (masks, "001.png")):
        outside = folder.parents[2] / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)


def colours(images: Path, masks: Path, mode: str) -> None:
    Image.open(masks / "001.png").convert(mode).save(masks / "001.png")


def dangling(images: Path, masks: Path) -> None:
    (masks / "001.png").unlink()
    (masks / "001.png").symlink_to("nowhere")


ODD: dict[str, Odd] = {
    "no mask": Odd(lambda images, masks: (masks / "001.png").unlink(), "no mask MASKS/001.png"),
    "no image": Odd(lambda images, masks: (images / "001.jpg").unlink(), strays=("001.png",), count=3),
    "a case differs": Odd(
        case_differs, "no mask MASKS/a1.png; A1.png there differs in upper and lower case", ("A1.png",), at=3
    ),
    "two images of a name": Odd(
        lambda images, masks: (images / "001.jpeg").write_bytes(JPEG),
        "001.jpeg and 001.jpg would share a mask; give each a name of its own",
        count=5,
    ),
    "two masks of a name": Odd(
        lambda images, masks: shutil.copy(masks / "001.png", masks / "001.PNG"),
        "has 2 masks, 001.PNG and 001.png; leave one",
    ),
    "a mask that is a JPEG": Odd(
        lambda images, masks: ((masks / "001.png").unlink(), (masks / "001.jpg").write_bytes(JPEG)),
        "mask 001.jpg: no PNG: first bytes b'\\xff\\xd8",
    ),
    "a mask of RGB": Odd(lambda i, m: colours(i, m, "RGB"), "mask 001.png: RGB: must have one value a pixel"),
    "a mask of RGBA": Odd(lambda i, m: colours(i, m, "RGBA"), "mask 001.png: RGB with alpha: must have one value"),
    "a mask of grey with alpha": Odd(lambda i, m: colours(i, m, "LA"), "mask 001.png: grey with alpha: must have"),
    "an empty mask file": Odd(lambda images, masks: (masks / "001.png").write_bytes(b""), "mask 001.png: 0 bytes long"),
    "a mask cut in its header": Odd(
        lambda images, masks: (masks / "001.png").write_bytes((masks / "001.png").read_bytes()[:20]),
        "mask 001.png: cut off",
    ),
    "an image that is none": Odd(lambda images, masks: (images / "001.jpg").write_bytes(b"text"), "no image: first"),
    "an empty image": Odd(lambda images, masks: (images / "001.jpg").write_bytes(b""), "0 bytes long"),
    "a mask that is a dangling link": Odd(dangling, "mask 001.png: unreadable: No such file"),
    "links out of root": Odd(link_out),
    "quarantined": Odd(
        lambda images, masks: (images / "quarantine.jsonl").write_text(json.dumps({"file": "001.jpg", "reason": "blurred"})),
        "quarantined: blurred",
    ),
    "names that are no UTF-8": Odd(
        lambda images, masks: [
            (folder / f"001.{end}").rename(folder / os.fsdecode(b"0\xff\xfe." + end.encode()))
            for folder, end in ((images, "jpg"), (masks, "png"))
        ],
    ),
    "a new line in a name": Odd(
        lambda images, masks: (images / "001.jpg").rename(images / "new\nline.jpg"),
        r"no mask MASKS/new\nline.png",
        ("001.png",),
        at=3,
    ),
    "another format by content": Odd(
        lambda images, masks: Image.open(images / "001.jpg").save(images / "001.jpg", "PNG"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_named_and_the_rest_is_read(name: str, root: Path, layout: tuple[Path, bool]) -> None:
    odd, (images, masks) = ODD[name], folders(layout[1], "train")
    odd.make(root / images, root / masks)
    source = opened(root)
    assert len(source) == odd.count
    assert len(source.fingerprint()) == 16
    assert {*source.strays} == {f"{masks}/{name}" for name in odd.strays}
    assert {*source.strays.values()} <= {"mask without an image"}
    if not odd.bad:
        assert not source.bad
        assert all(read_pair(source, number, MAX_PIXELS) for number in range(len(source)))
        return
    assert {*source.bad} == ({1, 2} if odd.count == 5 else {odd.at})
    assert source.bad[odd.at].startswith(odd.bad.replace("MASKS", masks)), source.bad
    good = [number for number in range(len(source)) if number not in source.bad]
    assert len(good) == 3 and all(read_pair(source, number, MAX_PIXELS) for number in good)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_quarantine_list_may_lie_in_the_folder_above_it_or_in_root(
    depth: int, root: Path, layout: tuple[Path, bool]
) -> None:
    """By the path from there; in ROOT that is the name that a run prints."""
    parts = opened(root).name(1).split("/")
    listed = [{"file": "/".join(parts[depth:]), "reason": "blurred"}, {"file": "elsewhere/002.jpg", "reason": "dark"}]
    root.joinpath(*parts[:depth], "quarantine.jsonl").write_text("".join(json.dumps(one) + "\n" for one in listed))
    assert opened(root).bad == {1: "quarantined: blurred"}
    assert not opened(root, "val").bad


UNREADABLE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a mask of another size": (
        lambda image, mask: mask.write_bytes(grey([0, 1], [1, 0])),
        r"mask of 2 x 2 pixels, image of \d+ x \d+$",
    ),
    "a mask turned by 90 degrees": (
        lambda image, mask: (image.write_bytes(JPEG), mask.write_bytes(grey(*[[1] * 20] * 30))),
        "mask of 20 x 30 pixels, image of 30 x 20; one of them is turned by its EXIF",
    ),
    "a cut image": (lambda image, mask: image.write_bytes(image.read_bytes()[:-200]), "(damaged or )?cut off"),
    "a cut mask": (lambda image, mask: mask.write_bytes(mask.read_bytes()[:-30]), "mask: damaged or cut off"),
    "a damaged mask": (
        lambda image, mask: mask.write_bytes(mask.read_bytes()[:45] + b"\0\1\2" + mask.read_bytes()[48:]),
        "mask: damaged or cut off",
    ),
    "a mask that is gone": (lambda image, mask: mask.unlink(), "mask unreadable: No such file"),
    "an image that is gone": (lambda image, mask: image.unlink(), "unreadable: No such file"),
    "too many pixels": (
        lambda image, mask: (image.write_bytes(JPEG), mask.write_bytes(png(2000, 1000, 8, 0, b"\0" * 2_001_000))),
        "mask: 2000 x 1000 = 2,000,000 pixels, over data.max_pixels = 1,000,000",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_pair_that_cannot_be_read(name: str, root: Path) -> None:
    """Found as it is read: opening the folder reads headers alone."""
    source = opened(root)
    change, reason = UNREADABLE[name]
    change(root / source.images[1], root / source.masks[1])
    with pytest.raises(BadImage, match=f"^{reason}"):
        read_pair(source, 1, MAX_PIXELS)
    assert read_pair(source, 2, MAX_PIXELS)


# -------------------------------------------------------------------------------------------------------------- values
INDICES = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)


def with_palette(bits: int) -> bytes:
    """A palette PNG whose colours are not the indices."""
    image = Image.fromarray(INDICES, "L").convert("L")
    coloured = Image.new("P", image.size)
    coloured.putdata(INDICES.ravel().tolist())
    coloured.putpalette([200, 3, 7, 1, 250, 90, 0, 0, 255, 9, 9, 9])
    return encoded(coloured, "PNG", bits=bits)


def packed(bits: int) -> bytes:
    """A grey PNG of so many bits a pixel."""
    rows = [
        sum(int(v) << (8 - bits * (at + 1)) % 8 << 8 * (1 - bits * at // 8) for at, v in enumerate(row))
        for row in INDICES
    ]
    length = -(-3 * bits // 8)
    return png(3, 2, bits, 0, b"".join(b"\0" + row.to_bytes(2, "big")[:length] for row in rows))


def deep(values: np.ndarray) -> bytes:
    rows = values.astype(">u2")
    return png(values.shape[1], values.shape[0], 16, 0, b"".join(b"\0" + row.tobytes() for row in rows))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "file",
    [grey(*INDICES.tolist()), with_palette(8), with_palette(2), packed(2), packed(4), deep(INDICES),
     encoded(Image.fromarray(INDICES), "PNG", optimize=True)],
    ids=["grey", "palette", "palette of 2 bits", "grey of 2 bits", "grey of 4 bits", "grey of 16 bits", "optimized"],
)  # fmt: skip
def test_the_stored_value_is_the_class(file: bytes, first: int) -> None:
    mask, counts = decode_mask(file, 3 - first, first, MAX_PIXELS)
    want = np.where(INDICES == 0, IGNORED, INDICES - 1) if first else INDICES
    np.testing.assert_array_equal(mask, want)
    assert counts.tolist() == [2, 2, 2][first:]


def test_a_mask_of_one_bit() -> None:
    image = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    mask, counts = decode_mask(encoded(image, "PNG"), 2, 0, MAX_PIXELS)
    assert (mask.tolist(), counts.tolist()) == ([[0, 1, 1]], [1, 2])


@pytest.mark.parametrize(
    "values, num_classes, first, reason",
    [
        ([0, 3], 3, 0, "value 3: must be 0 to 2, a class, or 255, which is ignored"),
        ([254, 255], 3, 0, "value 254: must be 0 to 2"),
        ([1, 4], 3, 1, "value 4: must be 1 to 3, a class, or 0, which is ignored"),
        ([0, 255], 3, 1, "value 255: must be 1 to 3"),
        ([0, 300], 3, 1, "value 300: no class has a value above 255"),
        ([0, 65535], 3, 0, "value 65535: no class has a value above 255"),
        ([0, 254, 255], 255, 0, ""),
        ([0, 1, 255], 255, 1, ""),
        ([0, 255], 254, 1, "value 255: must be 1 to 254"),
        ([255, 255], 3, 0, ""),
        ([0, 0], 3, 1, ""),
    ],
)
def test_values_at_the_bounds(values: list[int], num_classes: int, first: int, reason: str) -> None:
    file = deep(np.array([values]))
    if reason:
        with pytest.raises(BadImage, match=f"^{reason}"):
            decode_mask(file, num_classes, first, MAX_PIXELS)
        return
    mask, counts = decode_mask(file, num_classes, first, MAX_PIXELS)
    ignored = 0 if first else 255
    assert mask.tolist() == [[IGNORED if value == ignored else value - first for value in values]]
    assert counts.sum() == sum(value != ignored for value in values)


def test_harmed_bytes_give_the_mask_or_a_reason() -> None:
    """Each truncation, and each byte changed: never another error, never other classes."""
    file = grey(*INDICES.tolist())
    harmed = {file[:length] for length in range(len(file))}
    harmed |= {file[:at] + bytes([v]) + file[at + 1 :] for at in range(len(file)) for v in (0, 255, file[at] ^ 1)}
    harmed -= {file}
    reasons = []
    for one in harmed:
        try:
            assert decode_mask(one, 3, 0, MAX_PIXELS)[0].tolist() == INDICES.tolist()
        except BadImage as error:
            reasons.append(str(error))
    assert all(reasons) and len(reasons) > 0.9 * len(harmed)


def test_an_image_that_exif_turns_is_upright(root: Path) -> None:
    """As labelling programs show it: its mask is upright too."""
    source, exif = opened(root), Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).convert("RGB")
    (root / source.images[1]).write_bytes(encoded(stored, exif=exif))
    (root / source.masks[1]).write_bytes(grey(*[[1] * 20] * 30))
    pair = read_pair(source, 1, MAX_PIXELS)
    assert pair.image.shape == (30, 20, 3) and pair.mask.shape == (30, 20)


def test_a_mask_that_exif_turns() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(BadImage, match="its EXIF turns it; save it upright"):
        decode_mask(encoded(Image.fromarray(INDICES), "PNG", exif=exif), 3, 0, MAX_PIXELS)


# -------------------------------------------------------------------------------------------------------------- places
def everything(root: Path, pattern: str) -> None:
    for file in root.rglob(pattern):
        file.unlink()


def without(root: Path, *names: str) -> None:
    for name in names:
        place = root / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()


PLAIN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (lambda root: shutil.rmtree(root), "no such folder; the layout is"),
    "another layout": (lambda root: without(root, "train", "val"), r"holds no images and masks \(there is classes.txt\);"),
    "no masks": (lambda root: without(root, "train/masks"), r"train/masks: no such folder, so there is no split train; the"),
    "an empty split": (lambda root: everything(root / "train", "*.*"), "train/images: no image in it; the layout is"),
    "a folder among the images": (lambda root: (root / "train/images/city").mkdir(), "images: city: holds a folder"),
    "no mask at all": (
        lambda root: everything(root / "train", "*.png"),
        "none of its 4 images is good; train/images/000.jpg: no mask train/masks/000.png",
    ),
    "masks of other names": (
        lambda root: [file.rename(file.with_name(f"{file.stem}_mask.png")) for file in root.rglob("*.png")],
        r"no image has a mask, as train/images/000.jpg beside 000_mask.png; an image and its mask must have the same name",
    ),
    "no classes.txt": (lambda root: without(root, "classes.txt"), "classes.txt: no such file; it must hold the name of"),
    "an empty classes.txt": (lambda root: (root / "classes.txt").write_text("\n"), r"\(it names none\)"),
    "a class twice": (lambda root: (root / "classes.txt").write_text("a\nb\na\n"), r"\(a is class 0 and class 2\); mend it"),
    "a class without a name": (lambda root: (root / "classes.txt").write_text("a\n\nb\n"), r"\(class 1 has no name\)"),
    "classes that are no text": (lambda root: (root / "classes.txt").write_bytes(b"a\n\xff\n"), r"\(not UTF-8 at byte 2\)"),
    "256 classes": (
        lambda root: (root / "classes.txt").write_text("".join(f"c{at}\n" for at in range(256))),
        "names 256 classes; at most 255 are taken",
    ),
    "other classes in val": (
        lambda root: (root / "val/classes.txt").write_text("sky\nriver\ncar\n"),
        r"val/classes.txt: must name the classes of .*classes.txt in the same order \(class 1 is river there and road here\)",
    ),
    "fewer classes in val": (
        lambda root: (root / "val/classes.txt").write_text("sky\nroad\n"), r"\(2 classes there and 3 here\)",
    ),
}  # fmt: skip
TABLES: dict[str, tuple[str, str]] = {
    "no column": ("Idx,Name\n1,sky\n", r"\(no column Idx and Name\)"),
    "a number left out": ("Idx\tName\n1\ta\n3\tb\n", r"\(line 3 has Idx '3', not 2\)"),
    "a short line": ("Idx\tName\n1\n", r"\(line 2 has 1 columns, the header 2\)"),
    "no class": ("Idx\tName\n", r"\(it names none\)"),
    "an empty table": ("", r"\(no column Idx and Name\)"),
}
ADE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda root: without(root, "objectInfo150.txt"), "objectInfo150.txt: no such file; it must hold a"),
    "no annotations": (lambda root: without(root, "annotations/training"), "annotations/training: no such folder, so"),
    **{
        name: (lambda root, text=text: (root / "objectInfo150.txt").write_text(text), message)
        for name, (text, message) in TABLES.items()
    },
}


@pytest.mark.parametrize("kind, name", [*(("plain", name) for name in PLAIN), *(("ade", name) for name in ADE)])
def test_a_place_that_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    ade = kind == "ade"
    change, message = (ADE if ade else PLAIN)[name]
    root = write_masks(tmp_path / "root", train=4, val=1, ade=ade)
    change(root)
    with pytest.raises(DataError, match=message) as refused:
        opened(root)
    assert "\n" not in str(refused.value)


def test_a_folder_above_is_pointed_out(tmp_path: Path) -> None:
    write_masks(tmp_path / "ADEChallengeData2016", train=1, val=1, ade=True)
    with pytest.raises(DataError, match=r"give --data.root .*/ADEChallengeData2016$"):
        opened(tmp_path)


def test_the_classes_of_a_network(layout: tuple[Path, bool]) -> None:
    config = DataConfig(root=str(layout[0]))
    assert open_mask_split(config, "val", classes=CLASSES).classes == CLASSES
    with pytest.raises(
        DataError, match=r"the 3 classes of the network, in order \(class 0 is sky there and road here\)"
    ):
        open_mask_split(config, "val", classes=("road", "sky", "car"))


def test_names_around_a_class_and_other_columns_do_not_matter(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "a", train=1, val=1, ade=True)
    (root / "objectInfo150.txt").write_bytes(
        b"\xef\xbb\xbfIdx\tStuff\tName\r\n1\t0\tsky  \r\n2\t1\troad \r\n3\t1\tcar\r\n"
    )
    assert opened(root).classes == CLASSES


@pytest.mark.parametrize("field", ["labels", "class_order", "nested", "val_share", "limit_per_class", "balance"])
def test_a_field_without_effect_is_refused(field: str, layout: tuple[Path, bool]) -> None:
    value = {"labels": "a.csv", "class_order": "natural", "nested": "top", "val_share": 0.1}.get(field, 1)
    with pytest.raises(ConfigError, match=f"data.{field} = .*: has no effect on masks; leave it at"):
        opened(layout[0], **{field: value})


def test_other_files_are_counted(root: Path, layout: tuple[Path, bool]) -> None:
    images, masks = folders(layout[1], "train")
    (root / images / "notes.md").write_text("text")
    (root / masks / ".DS_Store").write_text("text")
    with pytest.warns(UserWarning, match=r"skipped 2 hidden or system files.*\(.*notes.md, .*\.DS_Store\)"):
        assert len(opened(root)) == 4


# ----------------------------------------------------------------------------------------------------------- real data
CAMVID = [("train", "training", 367), ("val", "validation", 101), ("test", "testing", 233)]


@pytest.mark.parametrize("split, name, count", CAMVID)
@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_camvid(split: Any, name: str, count: int, every: int, test_data: Callable[[str], Path]) -> None:
    """The number of images is that of the published split; over all masks the share of each class's pixels is facts.json's."""
    folder = test_data("seg_small")
    facts = json.loads((folder / "facts.json").read_text())["camvid"][name]
    source = open_mask_split(DataConfig(root=str(folder / "camvid" / "ADEChallengeData2016")), split)
    assert (len(source), len(source.classes), dict(source.bad), dict(source.strays)) == (count, 11, {}, {})
    (width, height), pixels = facts["size"], np.zeros(11, np.int64)
    for number in range(0, count, every):
        pair = read_pair(source, number, MAX_PIXELS)
        assert pair.image.shape == (height, width, 3)
        pixels += pair.counts
    share, want = pixels / (count * height * width), facts["share of pixels"]
    assert list(source.classes) == [one for one in want if one != "ignored"]
    if every == 1:
        np.testing.assert_allclose([1 - share.sum(), *share], list(want.values()), rtol=0, atol=5.1e-5)


def test_ade20k(test_data: Callable[[str], Path]) -> None:
    """Three files of ADE20K as they are published, and its 150 classes."""
    folder = test_data("seg_small")
    facts = json.loads((folder / "facts.json").read_text())["ade20k_sample"]["labels"]
    config = DataConfig(root=str(folder / "ade20k_sample" / "ADEChallengeData2016"))
    source = open_mask_split(config, "val")
    assert (len(source), len(source.classes), dict(source.bad)) == (3, 150, {})
    assert (source.classes[0], source.classes[12], source.classes[149]) == (
        "wall", "person, individual, someone, somebody, mortal, soul", "flag",
    )  # fmt: skip
    for number, name in enumerate(source.masks):
        pair = read_pair(source, number, MAX_PIXELS)
        assert pair.image.shape[:2] == pair.mask.shape
        assert [value - 1 for value in facts[Path(name).name] if value] == np.flatnonzero(pair.counts).tolist()
        assert (IGNORED in pair.mask) == (0 in facts[Path(name).name])
    with pytest.raises(DataError, match="images/training: no such folder, so there is no split train"):
        open_mask_split(config, "train")
