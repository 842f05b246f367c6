"""A cache of the teacher's logits: the same weights as without it, asked once an image, and never a wrong row."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttricks.config import ConfigError, DistillConfig
from fasttricks.data.batch import Batch
from fasttricks.learning.teacher_cache import CachedTeacher
from fasttricks.trainer import fit
from fasttricks.training.build import build
from fasttricks.training.run import Run
from lib.runs import final_state
from lib.states import same
from lib.tiny import ALONE, configure


def distilled(teacher_run: Path, cache: Path | None, *more: str) -> list[str]:
    args = ["--distill.teacher", str(teacher_run), "--data.fixed-augmentation", *more]
    return [*args, "--distill.cache", str(cache)] if cache else args


def test_weights_are_those_without_it_and_the_teacher_sees_each_image_once(
    start: Callable[..., Run], teacher_run: Path, tmp_path: Path
) -> None:
    """45 images in three batches an epoch; a second run of that seed finds all of them, one of another seed none."""
    cache, states = tmp_path / "cache", []
    for folder, seed, asked in ((None, "0", None), (cache, "0", 3), (cache, "0", 0), (cache, "1", 3)):
        run = start(*distilled(teacher_run, folder, "--seed", seed), epochs=3)
        fit(run)
        states.append(final_state(run)["model"])
        assert getattr(run.teacher, "asked", None) == asked
    assert same(states[0], states[1]) and same(states[0], states[2])
    assert len(list(cache.iterdir())) == 2


def test_images_of_a_fixed_augmentation_are_those_of_the_first_epoch(start: Callable[..., Run]) -> None:
    def epochs(*more: str) -> list[dict[int, Tensor]]:
        loader = start(*more).train_loader
        return [
            {
                int(place): image.clone()
                for batch in loader
                for place, image in zip(batch.places, batch.images, strict=True)
            }
            for _ in range(2)
        ]

    first, second = epochs("--data.fixed-augmentation")
    assert list(first) != list(second), "the order is drawn anew"
    assert all(torch.equal(first[place], second[place]) for place in range(45))
    fresh, other = epochs()
    assert all(torch.equal(first[place], fresh[place]) for place in range(45))
    assert not any(torch.equal(fresh[place], other[place]) for place in range(45))


class Counting:
    """A teacher whose logits say which batch it was."""

    dtype, digest = torch.float32, "x"

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.batches += 1
        return images.flatten(1)[:, :3] + self.batches


def batch_of(*images: int, shown: list[int] | None = None) -> Batch:
    numbers = np.array(images, np.int64)
    pixels = torch.tensor(images, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Batch(pixels, labels, places=numbers, shown=np.array(shown or images, np.int64))


def opened(file: Path, teacher: Any) -> CachedTeacher:
    return CachedTeacher(teacher, file, num_images=5, num_classes=3)


def judged(cache: CachedTeacher, batch: Batch) -> Tensor:
    return cache.judge(batch, batch.images)


def test_a_row_is_of_one_image_and_whole_or_none(tmp_path: Path) -> None:
    teacher, file = Counting(), tmp_path / "rows"
    cache = opened(file, teacher)
    first = judged(cache, batch_of(0, 3))
    assert torch.equal(judged(cache, batch_of(3, 0)), first.flip(0)) and teacher.batches == 1
    assert torch.equal(judged(opened(file, teacher), batch_of(0, 3)), first) and teacher.batches == 1, "another process"
    judged(cache, batch_of(0, 4)), judged(cache, batch_of(0, 3, shown=[0, 2]))
    assert teacher.batches == 3, "4 was never seen; in the place of 3 now stands 2"
    assert not torch.equal(judged(cache, batch_of(3)), first[1:]) and teacher.batches == 4
    size, rows = file.stat().st_size, file.read_bytes()
    whole = judged(cache, batch_of(0, 3))
    for offset in range(size // 5):  # every byte of the row of image 0
        file.write_bytes(rows[:offset] + bytes([rows[offset] ^ 1]) + rows[offset + 1 :])
        before = teacher.batches
        judged(opened(file, teacher), batch_of(0))
        assert teacher.batches == before + 1, offset
    assert whole.shape == (2, 3)


def test_an_empty_batch_and_one_that_names_no_images(tmp_path: Path) -> None:
    cache = opened(tmp_path / "rows", Counting())
    assert judged(cache, batch_of()).shape == (0, 3)
    with pytest.raises(TypeError, match="name their images"):
        judged(cache, Batch(torch.zeros(1, 3, 2, 2), torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], r"distill\.cache = .*same in every epoch; add --data\.fixed-augmentation"),
        (
            ["--data.fixed-augmentation", "--loss.mixup-alpha", "0.2"],
            r"mixup changes the blend in each epoch: add --tricks\.off mixup",
        ),
        (
            ["--data.fixed-augmentation", "--data.balance", "1"],
            r"data\.balance shows an image in several crops an epoch",
        ),
        (["--data.fixed-augmentation", "--schedule.first-size", "0.5"], r"add --tricks\.off progressive_resizing"),
    ],
)
def test_images_that_change_are_refused(more: list[str], message: str, tiny_data: Path, tmp_path: Path) -> None:
    args = ["--distill.teacher", "runs/x", "--distill.cache", str(tmp_path / "cache"), *more]
    with pytest.raises(ConfigError, match=message):
        build(configure(tiny_data, tmp_path / "run", *args), ALONE)
    assert not any(tmp_path.iterdir())


def test_a_cache_without_a_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"distill\.cache = 'x': needs a teacher"):
        DistillConfig(cache="x")


def test_a_folder_without_room_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"distill\.cache = .*must be a folder with room for 0 MB"):
        opened(tmp_path / "file" / "rows", Counting())

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*give another, or leave the cache out"):
        opened(tmp_path / "rows", Counting())
