"""Mean, deviation, sizes and classes of a data set, against NumPy on Pillow's pixels; train takes the printed line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttricks.commands import data
from fasttricks.config.cli import parse_recipe
from fasttricks.data.packing.stats import draw_images, measure
from fasttricks.data.sources.folder import scan_folder
from lib.tiny import call

RNG = np.random.default_rng(0)
CLASSES = {"ant": 5, "bee": 2, "cow": 9}


def write(path: Path, mode: str, width: int, height: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    values = RNG.integers(0, RNG.integers(2, 256), (height, width, bands), np.uint8)
    Image.fromarray(values.squeeze(2) if bands == 1 else values, mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Images of several sizes and modes; one is cut off, one of another kind."""
    for name, count in CLASSES.items():
        for number in range(count):
            mode, kind = (("RGB", "png"), ("L", "png"), ("RGB", "jpg"), ("RGBA", "png"))[number % 4]
            file = tmp_path / "data" / "train" / name / f"{number}.{kind}"
            write(file, mode, 3 + 17 * number, 11 + 5 * number)
    write(tmp_path / "data" / "val" / "ant" / "1.png", "RGB", 8, 8)
    cut = tmp_path / "data" / "train" / "cow" / "8.png"
    cut.write_bytes(cut.read_bytes()[:-40])
    (tmp_path / "data" / "train" / "cow" / "7.png").write_text("no image")
    return tmp_path / "data"


def moments(root: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) over images of the pixels of Pillow, in float64."""
    means, squares = [], []
    for name in names:
        pixels = np.asarray(Image.open(root / "train" / name).convert("RGB"), np.float64).reshape(-1, 3)
        means.append(pixels.mean(0))
        squares.append((pixels**2).mean(0))
    mean = np.mean(means, 0)
    return mean, np.sqrt(np.mean(squares, 0) - mean**2)


def test_they_are_those_of_the_pixels_and_the_line_is_one_that_train_takes(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(data.main, "stats", str(root), "--workers", "1") == 0
    said = capsys.readouterr().out
    assert said.startswith("16 training images of 3 classes, 2 to 9 images a class (fewest: bee, most: cow)\n")
    assert "width 3 to 105 pixels, median 37\nheight 11 to 41 pixels, median 21\n" in said
    assert "left out: cow/7.png: no image" in said and "left out: cow/8.png: " in said
    good = [f"{n}/{i}.{'jpg' if i % 4 == 2 else 'png'}" for n, count in CLASSES.items() for i in range(min(count, 7))]
    mean, std = moments(root, good)
    options = re.search(r"over 14 images, R G B, 0 to 255: (--data\.mean .* --data\.std .*)\n", said)
    assert options, said
    config = parse_recipe(["cifar10", *options[1].split()], prog="test").data
    np.testing.assert_allclose(config.mean, mean, atol=6e-4)  # three digits are shown
    np.testing.assert_allclose(config.std, std, atol=6e-4)


def test_neither_workers_nor_the_rest_change_a_bit(root: Path) -> None:
    train = scan_folder(root / "train")
    numbers = draw_images(len(train), 9)
    assert numbers == sorted(set(numbers)) and len(numbers) == 9 and draw_images(4, 9) == [0, 1, 2, 3]
    counted: list[int] = []
    one, two = (
        measure(train, numbers, workers=workers, max_pixels=10**8, advance=counted.append) for workers in (1, 2)
    )
    assert (one.mean, one.std, one.bad) == (two.mean, two.std, two.bad)
    assert sum(counted) == 2 * sum(number not in train.bad for number in numbers)
    mean, std = moments(root, [train.name(number) for number in numbers if number not in one.bad])
    np.testing.assert_allclose((one.mean, one.std), (mean, std), rtol=1e-12)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "stats needs DIR"),
        (("{root}", "{root}"), "stats takes DIR alone"),
        (("{root}/nowhere",), "nowhere: no such folder"),
        (("{root}", "--images", "-1"), "images = -1: must be 0 (all) or more"),
        (("{root}", "--max-pixels", "20"), "none of 16 images is good"),
    ],
)
def test_bad_input_is_named(args: tuple[str, ...], words: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(data.main, "stats", *(arg.format(root=root) for arg in args)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_a_channel_without_contrast_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Radar and depth images may leave channels empty; --data.std refuses the number that is printed."""
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(
                np.stack([RNG.integers(0, 255, (8, 8), np.uint8)] + [np.zeros((8, 8), np.uint8)] * 2, 2)
            ).save(tmp_path / split / name / "1.png")
    assert call(data.main, "stats", str(tmp_path), "--workers", "1") == 0
    assert "note: the deviation of G and B is below 1, the least that --data.std takes" in capsys.readouterr().out
