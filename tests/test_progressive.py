"""Progressive resizing: sizes worked out by hand, and what the real loader and a real run do with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fasttricks.commands import train
from fasttricks.config import ConfigError, DataConfig, ScheduleConfig, TrainConfig
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources.folder import scan_folder
from fasttricks.learning.schedule import image_size, image_sizes
from lib.tiny import arguments, call, write_images


@pytest.mark.parametrize(
    ("config", "full", "epochs", "sizes"),
    [
        # 112, 112 + 37.3 and 112 + 74.7, as multiples of 4, 3 of 12 epochs each; full from epoch 9 on
        (ScheduleConfig(first_size=0.5), 224, 12, [112] * 3 + [148] * 3 + [188] * 3 + [224] * 3),
        (ScheduleConfig(first_size=0.5, size_steps=1, full_size_at=0.5), 32, 4, [16, 16, 32, 32]),
        (ScheduleConfig(first_size=0.75, size_steps=2, full_size_at=0.5), 299, 4, [224, 260, 299, 299]),
        (ScheduleConfig(), 224, 3, [224] * 3),
        (ScheduleConfig(first_size=0.5), 32, 3, [16, 20, 32]),  # the last epoch is full, however few there are
        (ScheduleConfig(first_size=0.5), 32, 2, [16, 32]),
    ],
)
def test_the_side_grows_in_equal_steps(config: ScheduleConfig, full: int, epochs: int, sizes: list[int]) -> None:
    assert [image_size(epoch, config, full=full, epochs=epochs) for epoch in range(epochs)] == sizes
    assert image_sizes(config, full=full, epochs=epochs) == sorted(set(sizes))


def test_the_loader_gives_each_epoch_its_size_and_each_image_once(tmp_path: Path) -> None:
    """An epoch of the full size has the very images of a loader that always had it: the size moves no random number."""
    write_images(tmp_path / "data", train=10, val=3)
    source = scan_folder(tmp_path / "data" / "train")
    config, cpu = DataConfig(image_size=16, val_resize=16, threads=1), torch.device("cpu")
    plain = Loader(source, config, training=True, batch_size=4, device=cpu)
    grown = Loader(
        source, config, training=True, batch_size=4, device=cpu, image_size_at=lambda epoch: (8, 8, 16)[epoch]
    )
    for side in (8, 8, 16):
        theirs, ours = list(plain), list(grown)
        assert {batch.images.shape[2:] for batch in ours} == {(side, side)}
        for a, b in zip(theirs, ours, strict=True):
            assert torch.equal(a.labels, b.labels)
            assert side == 8 or torch.equal(a.images, b.images)


def test_a_loader_that_is_restored_has_the_size_of_its_epoch(tmp_path: Path) -> None:
    write_images(tmp_path / "data", train=10, val=3)
    source = scan_folder(tmp_path / "data" / "train")
    config, cpu = DataConfig(image_size=16, val_resize=16, threads=1), torch.device("cpu")

    def make() -> Loader:
        size_at = lambda epoch: 8 if epoch < 1 else 16  # noqa: E731
        return Loader(source, config, training=True, batch_size=4, device=cpu, image_size_at=size_at)

    whole = make()
    list(whole)
    second = list(whole)
    first = make()
    list(first)
    restored = make()
    restored.load_state_dict(first.state_dict())
    assert all(torch.equal(a.images, b.images) for a, b in zip(second, restored, strict=True))


def test_a_run_grows_its_images_and_its_header_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "data", train=20, val=3)
    args = arguments(tmp_path / "data", tmp_path / "run", "--tricks.on", "progressive_resizing", "--epochs", "4")
    assert call(train.main, *args) == 0
    assert "they grow over the epochs (progressive resizing)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [{"first_size": 0.0}, {"first_size": 1.5}, {"size_steps": 0}, {"full_size_at": 0.0}, {"full_size_at": 1.0}],
)
def test_a_schedule_of_sizes_that_is_none_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{next(iter(changes))}"):
        ScheduleConfig(**changes)  # type: ignore[arg-type]


def test_images_too_small_to_train_on_are_refused() -> None:
    data = DataConfig(image_size=32, val_resize=32)
    with pytest.raises(ConfigError, match=r"schedule.first_size = 0.2: makes images of fewer than 8 pixels"):
        TrainConfig(recipe="x", epochs=9, global_batch_size=4, data=data, schedule=ScheduleConfig(first_size=0.2))


def test_a_run_too_short_to_grow_in_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "data", train=20, val=3)
    args = arguments(tmp_path / "data", tmp_path / "run", "--tricks.on", "progressive_resizing", "--epochs", "1")
    assert call(train.main, *args) == 0
    assert "images   32 pixels: too few epochs to grow in (progressive resizing)" in capsys.readouterr().out
