"""The weights of pixels by their class: counted, balanced by median frequency or of a file, and what a run makes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fasttricks.commands import train
from fasttricks.config import ConfigError, DataConfig, TrainConfig
from fasttricks.config.cli import parse_recipe
from fasttricks.data.masks import frequencies
from fasttricks.data.masks.frequencies import class_pixels
from fasttricks.data.masks.places import open_mask_split
from fasttricks.data.masks.source import MaskSource
from fasttricks.data.sources.errors import DataError
from fasttricks.learning.class_weights import class_weights, median_frequency
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.forked import on_ranks
from lib.masks import write_masks
from lib.runs import final_state, interrupt, records
from lib.states import same
from lib.tiny import ALONE, SHRINK, arguments, call

pytestmark = pytest.mark.usefixtures("no_curves")

MAX_PIXELS = 1_000_000
OPTIONS = [
    *("--model.name", "resnet8d", "--segment.base-size", "40", "--data.val-resize", "40", "--global-batch-size", "8"),
    *("--checkpoint-steps", "1", "--no-sync-batch-norm", "--accumulate", "2", "--epochs", "1"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arguments_for(data: Path, run_dir: Path, weights: str | Path, *more: str) -> list[str]:
    chosen = ("--loss.class-weights", str(weights))
    return arguments(data, run_dir, *OPTIONS, *chosen, *more, recipe="segment-ade20k", shrink=SHRINK)


def config_for(data: Path, run_dir: Path, weights: str | Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(parse_recipe(arguments_for(data, run_dir, weights), prog="test"), **changes)


def train_on_ranks(run_dir: Path, data: Path) -> None:
    train.main(arguments_for(data, run_dir, "balanced"))


def source_of(root: Path) -> MaskSource:
    return open_mask_split(DataConfig(root=str(root)), "train")


def plain_counts(source: MaskSource) -> tuple[list[int], list[int]]:
    """The same counts as class_pixels, mask by mask in numpy."""
    pixels, beside = [0] * len(source.classes), [0] * len(source.classes)
    for name in (name for number, name in enumerate(source.masks) if number not in source.bad):
        values = np.array(Image.open(source.root / name)).astype(int) - source.first
        valid = values[(values >= 0) & (values < len(source.classes))]
        for one in np.unique(valid):
            pixels[one] += int((valid == one).sum())
            beside[one] += valid.size
    return pixels, beside


# ----------------------------------------------------------------------------------------------------------- the counts
@pytest.mark.parametrize("ade", [False, True])
def test_the_counts_are_those_of_a_plain_loop(ade: bool, tmp_path: Path) -> None:
    """Of a set in which a class is in one mask alone and one in none; bad masks count nothing."""
    root = write_masks(tmp_path / "root", train=7, val=1, ade=ade, classes=("a", "b", "c", "d", "none"))
    source = source_of(root)
    for number, name in enumerate(source.masks):
        values = np.array(Image.open(root / name))
        gone = {4 + source.first} | ({3 + source.first} if number else set())
        values[np.isin(values, sorted(gone))] = source.first
        Image.fromarray(values).save(root / name)
    (root / source.masks[5]).write_bytes((root / source.masks[5]).read_bytes()[:60])
    Image.fromarray(np.full((9, 9), 77, np.uint8)).save(root / source.masks[6])
    good = dataclasses.replace(source, bad={5: "", 6: ""})
    found = class_pixels(source, MAX_PIXELS)
    assert (found.pixels.tolist(), found.beside.tolist()) == plain_counts(good)
    assert found.pixels[4] == 0 < found.pixels[3] and found.beside[3] < found.beside[0]
    assert class_pixels(good, MAX_PIXELS).pixels.tolist() == found.pixels.tolist()


def test_they_are_counted_once_and_again_for_other_files(tiny_masks: Path, tmp_path: Path, monkeypatch: Any) -> None:
    root = Path(shutil.copytree(tiny_masks, tmp_path / "root"))
    first, looked = class_pixels(source_of(root), MAX_PIXELS), []
    inner = frequencies.decode_mask
    monkeypatch.setattr(frequencies, "decode_mask", lambda *given: looked.append(given) or inner(*given))
    assert class_pixels(source_of(root), MAX_PIXELS).pixels.tolist() == first.pixels.tolist() and not looked
    mask = root / source_of(root).masks[0]
    Image.fromarray(np.zeros_like(np.array(Image.open(mask)))).save(mask)
    os.utime(mask, ns=(1, 1))
    again = class_pixels(source_of(root), MAX_PIXELS)
    assert len(looked) == 19 and again.pixels[0] > first.pixels[0]


def test_median_frequency() -> None:
    """Frequencies 0.5, 0.1 and 0.2, the median of which is 0.2; a class without a pixel has no part in it."""
    weights = median_frequency(np.array([50, 10, 10, 0]), np.array([100, 100, 50, 0]))
    np.testing.assert_allclose(weights, [0.4, 2.0, 1.0, 0.0])


@pytest.mark.slow
def test_camvids_weights(test_data: Callable[[str], Path]) -> None:
    """As the formula in numpy has them; the rarest classes weigh most."""
    source = source_of(test_data("seg_small") / "camvid" / "ADEChallengeData2016")
    weights = class_weights("balanced", source, max_pixels=MAX_PIXELS)
    pixels, beside = (np.array(counts) for counts in plain_counts(source))
    assert weights is not None
    np.testing.assert_allclose(weights.numpy(), np.median(pixels / beside) * beside / pixels, rtol=1e-6)
    names = [source.classes[number] for number in weights.argsort().tolist()]
    assert names[:3] == ["road", "building", "sky"] and names[-2:] == ["pedestrian", "bicyclist"]


# ----------------------------------------------------------------------------------------------------------- the weights
def weights_of(chosen: str | Path, source: MaskSource) -> Tensor:
    found = class_weights(str(chosen), source, max_pixels=MAX_PIXELS)
    assert found is not None
    return found


def test_a_file_is_taken_as_it_stands(tiny_masks: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.csv"
    file.write_text("class,weight\nroad,2.5\nsky,0\ncar,1e-3\n")
    assert torch.equal(weights_of(file, source_of(tiny_masks)), torch.tensor([0, 2.5, 1e-3]))
    assert class_weights("", source_of(tiny_masks), max_pixels=MAX_PIXELS) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sky,0\nroad,0\ncar,0\n", "every pixel weighs 0"),
        ("sky,1\nroad,1\nkar,1\n", "line 3: the data has no class kar, the nearest is car"),
        ("sky,1\nroad,-1\ncar,1\n", "line 2: -1 is no number of 0 or more"),
    ],
)
def test_a_wrong_file_is_refused_before_training(text: str, says: str, tiny_masks: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.csv").write_text(text)
    with pytest.raises(ConfigError) as caught:
        train.main(arguments_for(tiny_masks, tmp_path / "run", tmp_path / "weights.csv"))
    assert says in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_masks_without_a_class_cannot_be_balanced(tmp_path: Path) -> None:
    root = write_masks(tmp_path / "root", train=2, val=1)
    for name in source_of(root).masks:
        Image.fromarray(np.full((9, 9), 255, np.uint8)).save(root / name)
    with pytest.raises(DataError, match=r"no pixel of a training mask has a class; leave loss\.class_weights out"):
        weights_of("balanced", source_of(root))


# ----------------------------------------------------------------------------------------------------------- whole runs
def test_a_run_says_it_and_resumes_bit_for_bit(
    tiny_masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def begin(folder: str, weights: str | Path = "balanced", **changes: Any) -> Any:
        return build(config_for(tiny_masks, tmp_path / folder, weights, **changes), ALONE)

    whole = begin("whole")
    weights = weights_of("balanced", source_of(tiny_masks))
    assert torch.equal(whole.class_weights, weights) and 0 < weights.min() < weights.max()
    shown = capsys.readouterr().out
    assert f"ignored; their loss is weighted {weights.min():.3g} (" in shown and "), balanced by median freq" in shown
    fit(whole)
    interrupt(begin("parts"), monkeypatch, at_step=1)
    resumed = begin("parts", resume=True)
    assert resumed.step == 1 and resumed.step_in_epoch
    fit(resumed)
    assert same(final_state(whole), final_state(resumed)) and records(whole) == records(resumed)
    plain = begin("plain", "")
    fit(plain)
    assert not same(final_state(whole), final_state(plain))


def test_a_changed_file_of_weights_is_refused_on_resume(tiny_masks: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "weights.csv"
    file.write_text("sky,1\nroad,2\ncar,3\n")
    assert call(train.main, *arguments_for(tiny_masks, tmp_path / "run", file)) == 0
    assert f"their loss is weighted 1 (sky) to 3 (car), {file}" in capsys.readouterr().out
    file.write_text("sky,1\nroad,2\ncar,4\n")
    assert call(train.main, *arguments_for(tiny_masks, tmp_path / "run", file, "--resume")) == 2
    assert "class weights: [1.0, 2.0, 3.0] -> [1.0, 2.0, 4.0]" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_count_the_masks_once_and_have_the_same_weights(tiny_masks: Path, tmp_path: Path) -> None:
    on_ranks(2, train_on_ranks, tmp_path / "run", tiny_masks)
    saved = json.loads(load_checkpoint(tmp_path / "run")["fingerprint"])
    assert saved["ranks"] == 2 and len(list((tmp_path / "cache" / "fasttricks").glob("pixels-*.npz"))) == 1
    assert saved["class weights"] == weights_of("balanced", source_of(tiny_masks)).tolist()
