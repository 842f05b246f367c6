"""The loader of images with boxes: views, order, workers, ranks, resume, bad files and odd boxes.

It has its processes, shards and positions from AnnotatedLoader, as MaskLoader has: tests/test_masks_loader.py tries those too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from fasttricks.config import ConfigError, DataConfig, DetectConfig
from fasttricks.data.annotated.pixels import normalise, resize
from fasttricks.data.boxes.batch import BoxBatch
from fasttricks.data.boxes.loader import BoxLoader
from fasttricks.data.boxes.places import open_box_split
from fasttricks.data.boxes.samples import read_boxed
from fasttricks.data.boxes.views import draw_flip, show, shown_size
from fasttricks.data.sources.decode import BadImage
from fasttricks.data.sources.errors import DataError
from lib.boxes import annotation, obj, write_boxes

CPU = torch.device("cpu")
DETECT = DetectConfig(base_size=24, max_size=30)
COUNT = 11
FOLDER = "VOC2007/JPEGImages"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_boxes(tmp_path_factory.mktemp("boxes") / "VOCdevkit", {"VOC2007/trainval": COUNT, "VOC2007/test": 3})


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(root, tmp_path / "VOCdevkit"))


def loader(root: Path, **arguments: Any) -> BoxLoader:
    training = arguments.setdefault("training", True)
    data = DataConfig(**{"root": str(root), "max_bad": 0.5, **arguments.pop("data", {})})
    source = open_box_split(data, "train" if training else "val", classes=("ball", "car", "tree"))
    return BoxLoader(source, data, DETECT, **{"batch_size": 4, "device": CPU, "workers": 0, "seed": 3, **arguments})


def contents(batches: list[BoxBatch]) -> dict[int, tuple[Any, ...]]:
    """Each place's part of a batch."""
    return {
        place: (b.images[at], b.boxes[at], b.labels[at], b.difficult[at], torch.from_numpy(b.sizes[at]), int(b.shown[at]))
        for b in batches
        for at, place in enumerate(b.places.tolist())
    }  # fmt: skip


def equal(got: dict[int, Any], want: dict[int, Any]) -> None:
    """Assert that two epochs have the same parts, bit for bit."""
    assert got.keys() == want.keys()
    for place in want:
        assert all(torch.equal(a, b) for a, b in zip(got[place][:5], want[place][:5], strict=True))
        assert got[place][5] == want[place][5]


def same(got: list[BoxBatch], want: list[BoxBatch]) -> None:
    """Assert that they are in the same batches too."""
    assert [b.places.tolist() for b in got] == [b.places.tolist() for b in want]
    equal(contents(got), contents(want))


# --------------------------------------------------------------------------------------------------------------- views
@pytest.mark.parametrize(
    "size", [(20, 30), (30, 20), (24, 24), (24, 30), (30, 24), (24, 31), (20, 90), (90, 20), (500, 375)]
)
def test_the_size_is_that_of_torchvision(size: tuple[int, int]) -> None:
    for base, most in ((24, 30), (600, 1000), (24, 24)):
        detect = DetectConfig(base_size=base, max_size=most)
        # torchvision refuses a most that is not above base: there each side is at most base, and one has it
        want = v2.Resize(base, max_size=most)(torch.zeros(1, *size)).shape[1:] if most > base else None
        found = shown_size(*size, detect)
        assert found == tuple(want) if want else max(found) == base
        assert min(found) >= 1


def test_a_thread_of_pixels_has_a_size() -> None:
    assert shown_size(1, 60_000, DetectConfig()) == (1, 1000)
    assert shown_size(60_000, 1, DetectConfig()) == (1000, 1)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_move_with_the_pixels(flip: bool) -> None:
    """Worked out by hand: a white rectangle on black, at twice the size, is where its box is."""
    image = np.zeros((12, 15, 3), np.uint8)
    image[2:9, 3:7] = 255
    xyxy = np.array([[3, 2, 7, 9], [0, 0, 15, 12]], np.float32)
    pixels, boxes = show(image, xyxy, flip, DataConfig(), DETECT)
    assert pixels.shape == (24, 30, 3) and boxes.dtype == torch.float32 and type(boxes) is torch.Tensor
    left, right = (30 - 14, 30 - 6) if flip else (6, 14)
    assert boxes.tolist() == [[left, 4, right, 18], [0, 0, 30, 24]]
    inside = pixels[5:17, left + 1 : right - 1]
    assert (inside == 255).all()
    pixels[3:19, left - 1 : right + 1] = 0
    assert (pixels == 0).all()
    assert (image[2:9, 3:7] == 255).all() and xyxy[0].tolist() == [3, 2, 7, 9]  # those given are as they were


def test_boxes_by_arithmetic() -> None:
    """Sizes that do not divide: each side by its own factor."""
    draws = np.random.default_rng(0)
    for _ in range(20):
        height, width = draws.integers(9, 60, 2).tolist()
        low = draws.uniform(0, 4, (5, 2))
        xyxy = np.concatenate([low, low + draws.uniform(1, 4, (5, 2))], 1).astype(np.float32)
        for flip in (False, True):
            pixels, boxes = show(np.zeros((height, width, 3), np.uint8), xyxy, flip, DataConfig(), DETECT)
            h, w = pixels.shape[:2]
            want = xyxy * np.array([w / width, h / height] * 2)
            if flip:
                want[:, [0, 2]] = w - want[:, [2, 0]]
            np.testing.assert_allclose(boxes.numpy(), want, rtol=1e-5, atol=1e-5)


def test_the_flip_is_drawn_for_each_image_and_epoch() -> None:
    def share(p: float) -> float:
        flips = [draw_flip(DataConfig(flip=p), seed=1, epoch=e, place=i) for e in range(20) for i in range(50)]
        return float(np.mean(flips))

    assert (share(0.0), share(1.0)) == (0, 1)
    assert abs(share(0.5) - 0.5) < 4 * 0.5 / 1000**0.5


# ------------------------------------------------------------------------------------------------------------- batches
def test_a_batch_is_the_views_of_its_images(root: Path) -> None:
    made, flipped = loader(root), 0
    for epoch in range(2):
        places = []
        for batch in made:
            assert len(batch) == len(batch.images) == len(batch.boxes) == len(batch.sizes)
            for place, part in contents([batch]).items():
                image, boxes = read_boxed(made._source, place, 10**6)
                flip = draw_flip(made._config, seed=3, epoch=epoch, place=place)
                pixels, xyxy = show(image, boxes.xyxy, flip, made._config, DETECT)
                assert torch.equal(part[0], normalise(pixels[None], made._config, torch.float32)[0])
                assert torch.equal(part[1], xyxy) and part[1].shape == (len(boxes), 4)
                assert (part[2].tolist(), part[3].tolist()) == (boxes.labels.tolist(), boxes.difficult.tolist())
                assert (part[2].dtype, part[3].dtype) == (torch.int64, torch.bool)
                assert (part[4].tolist(), part[5]) == ([*image.shape[:2]], place)
                flipped += flip
            places += batch.places.tolist()
        assert sorted(places) == list(range(COUNT)) != places
    assert 0 < flipped < 2 * COUNT


def test_workers_prefetch_and_ranks_change_no_bit(root: Path) -> None:
    """Every image of the second epoch, also where another rank, process or batch has it."""

    def second(ranks: int = 1, **arguments: Any) -> list[BoxBatch]:
        made = [loader(root, rank=rank, world_size=ranks, **arguments) for rank in range(ranks)]
        for one in made:
            list(one)
        batches = list(chain.from_iterable(made))
        for one in made:
            one.close()
        return batches

    want = second()
    same(second(workers=2, data={"prefetch": 5}), want)
    for got in (second(2), second(3, batch_size=1), second(batch_size=COUNT)):
        equal(contents(got), contents(want))


@pytest.mark.parametrize("training", [True, False])
def test_resumed_from_every_step_of_an_epoch(root: Path, training: bool) -> None:
    made = loader(root, training=training)
    list(made)
    states, epochs = [json.loads(json.dumps(made.state_dict()))], []
    for batch in made:
        epochs.append(batch)
        states.append(json.loads(json.dumps(made.state_dict())))
    following = list(made)
    for step, state in enumerate(states):
        restored = loader(root, training=training)
        restored.load_state_dict(state)
        same(list(restored), epochs[step:])
        same(list(restored), following)


def test_a_state_of_other_boxes_is_refused(copy: Path) -> None:
    state = loader(copy).state_dict()
    (copy / "VOC2007/Annotations/0001.xml").write_text(annotation(obj()))
    with pytest.raises(DataError, match="files = "):
        loader(copy).load_state_dict(state)


def test_validation_is_whole_images_in_order(root: Path) -> None:
    """One a batch whatever the batch size, not mirrored."""
    made = loader(root, training=False, dtype=torch.bfloat16)
    batches = list(made)
    assert [batch.shown.tolist() for batch in batches] == [[0], [1], [2]]
    for number, batch in enumerate(batches):
        image, boxes = read_boxed(made._source, number, 10**6)
        pixels = resize(image, shown_size(*image.shape[:2], DETECT), made._config).permute(1, 2, 0)
        assert torch.equal(batch.images[0], normalise(pixels[None], made._config, torch.bfloat16)[0])
        assert batch.labels[0].tolist() == boxes.labels.tolist()


def test_a_rank_may_get_an_empty_batch(root: Path) -> None:
    last = [list(loader(root, rank=rank, world_size=2, batch_size=5))[1] for rank in range(2)]
    assert sorted(map(len, last)) == [0, 1]
    (empty,) = [batch for batch in last if not len(batch)]
    assert (empty.images, empty.boxes, empty.labels, empty.difficult) == ([], [], [], []) and empty.sizes.shape == (
        0,
        2,
    )


# ------------------------------------------------------------------------------------------------- bad files and boxes
BAD = {
    2: "damaged or cut off",
    4: "annotation of 99 x 98 pixels, image of ",
    5: "annotation of 20 x 30 pixels, image of 30 x 20; its EXIF turns it",
    7: "no annotation VOC2007/Annotations/0007.xml",
}


def harm(root: Path) -> None:
    """Images 2, 4, 5 and 7 of training are bad, each in its way; objects of 8 are odd; 9 is listed twice."""
    notes = root / "VOC2007/Annotations"
    file = root / FOLDER / "0002.jpg"
    file.write_bytes(file.read_bytes()[:300])
    (notes / "0004.xml").write_text(annotation(obj(), size=(99, 98)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(root / FOLDER / "0005.jpg", exif=exif)
    (notes / "0005.xml").write_text(annotation(obj(), size=(20, 30)))
    (notes / "0007.xml").unlink()
    Image.new("RGB", (30, 20)).save(root / FOLDER / "0008.jpg")
    (notes / "0008.xml").write_text(annotation(obj(box=(5, 5, 5, 5)), obj(box=(0, 1, 9, 9)), obj()))
    with (root / "VOC2007/ImageSets/Main/trainval.txt").open("a") as listed:
        listed.write("0009\n")


def test_bad_images_are_replaced_and_odd_boxes_named(copy: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    want = [contents(list(one)) for one in [loader(root)] * 2]
    harm(copy)
    made = loader(copy)
    epochs = [list(made), list(made)]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 7
    for image, why in BAD.items():
        name = f"{FOLDER}/{image:04d}.jpg"
        (line,) = [line for line in said if line.startswith(f"bad image {name}: {why}")]
        assert line.endswith("; replaced by another") and made.bad[name].startswith(why)
    note, size = "VOC2007/Annotations/0008.xml", "the image of 30 x 20 pixels"
    assert (
        f"bad box {note} object 1: box 5 5 5 5 is empty: xmax must be above xmin, and ymax above ymin; left out" in said
    )
    assert f"bad box {note} object 2: box 0 1 9 9 reaches 1 pixels out of {size}; it ends at the edge" in said
    twice = "VOC2007/ImageSets/Main/trainval.txt line 12: 0009 is in line 10 too; it counts once"
    assert f"bad image {twice}; left out" in said
    assert len(made.bad) == 7
    for epoch, batches in enumerate(epochs):
        got, harmed = contents(batches), {*BAD, 8}
        equal(
            {p: one for p, one in got.items() if p not in harmed},
            {p: o for p, o in want[epoch].items() if p not in harmed},
        )
        assert all((part[5] not in BAD) if place in BAD else part[5] == place for place, part in got.items())
        assert len(got[8][1]) == 2 and got[8][1].min() >= 0
    others = [loader(copy, workers=2), *(loader(copy, rank=rank, world_size=2, batch_size=3) for rank in range(2))]
    equal(contents(list(others[0])), contents(epochs[0]))
    equal(contents([*others[1], *others[2]]), contents(epochs[0]))
    others[0].close()


def test_bad_images_are_left_out_of_validation(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / FOLDER / "1001.jpg").write_bytes(b"\xff\xd8\xff cut")
    batches = list(loader(copy, training=False))
    assert [batch.shown.tolist() for batch in batches] == [[0], [], [2]]
    assert capfd.readouterr().err.endswith("; left out\n")


def test_odd_boxes_are_counted_where_they_are_many(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Image.open(copy / FOLDER / "0001.jpg") as image:
        (copy / "VOC2007/Annotations/0001.xml").write_text(annotation(*[obj(box=(3, 3, 3, 9))] * 25, size=image.size))
    made = loader(copy)
    list(made)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 21 and said[-1] == "5 more bad boxes: left out; the run's summary.json names all"
    assert len(made.bad) == 25


def test_too_many_bad_images(copy: Path) -> None:
    harm(copy)
    with pytest.raises(DataError, match=r"of 12 images are bad, over data.max_bad = 0.1 of them"):
        list(loader(copy, data={"max_bad": 0.1}))


def test_an_image_that_is_gone(copy: Path) -> None:
    source = open_box_split(DataConfig(root=str(copy)), "train")
    (copy / source.images[3]).unlink()
    with pytest.raises(BadImage, match=r"^unreadable: No such file"):
        read_boxed(source, 3, 10**6)
    with pytest.raises(BadImage, match=r"over data.max_pixels = 9"):
        read_boxed(source, 4, 9)


@pytest.mark.parametrize("change, words", [
    ({"max_size": 599}, r"detect.max_size = 599: must be at least detect.base_size = 600"),
    ({"base_size": 7}, r"detect.base_size = 7: must be"),
])  # fmt: skip
def test_sizes_that_cannot_be(change: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(DetectConfig(), **change)


def test_real_data(test_data: Callable[[str], Path]) -> None:
    """Raccoon's validation: every box lies within its image, and has the share of it that the annotation says."""
    data = DataConfig(root=str(test_data("voc_small") / "raccoon" / "VOCdevkit"))
    source = open_box_split(data, "val")
    source = replace(source, images=source.images[:6], sizes=source.sizes[:6], ends=source.ends[:6])
    detect = DetectConfig(base_size=60, max_size=90)
    made = BoxLoader(source, data, detect, training=False, batch_size=1, device=CPU, workers=1)
    for number, batch in enumerate(made):
        (image,), (boxes,), (height, width) = batch.images, batch.boxes, batch.sizes[0]
        h, w = image.shape[1:]
        assert min(h, w) <= 60 and max(h, w) <= 90 and (min(h, w) == 60 or max(h, w) == 90)
        share = boxes / torch.tensor([w, h, w, h])
        want = source.boxes(number).xyxy / np.array([width, height, width, height])
        np.testing.assert_allclose(share.numpy(), want, rtol=0, atol=1e-5)
        assert (share >= 0).all() and (share <= 1).all() and len(share)
    made.close()
