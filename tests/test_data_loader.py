"""Order, shards, resume and errors of the DALI loader."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from nvidia.dali.tensors import TensorListCPU
from PIL import Image

from fasttricks.config import DataConfig
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline import decoder as decoder_module
from fasttricks.data.pipeline.decoder import Decoder
from fasttricks.data.pipeline.feed import Job
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.pixels import choose_pixels
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import ImageFolder
from lib.tables import covering

CPU = torch.device("cpu")
SMALL = DataConfig(image_size=8, val_resize=8, threads=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 noise images of 12 x 16 pixels."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def numbered(root: Path, count: int) -> ImageFolder:
    """The first `count` images, each a class of its own, so that a label says which image it is."""
    names = tuple(f"{i:03d}.png" for i in range(count))
    return ImageFolder(root=root, classes=names, files=names, labels=tuple(range(count)))


def loader(root: Path, count: int = 64, config: DataConfig = SMALL, **arguments: Any) -> Loader:
    return Loader(numbered(root, count), config, **{"training": True, "batch_size": 8, "device": CPU, **arguments})


def epoch(loader: Loader) -> list[Batch]:
    return [Batch(batch.images.clone(), batch.labels.clone()) for batch in loader]


def order(loader: Loader) -> list[int]:
    return [label for batch in loader for label in batch.labels.tolist()]


@pytest.mark.parametrize(
    ("world_size", "training"),
    [
        (1, False),
        (4, True),
        *(pytest.param(size, training, marks=pytest.mark.slow) for size in (2, 3, 8) for training in (True, False)),
    ],
)
def test_each_image_once_in_each_of_ten_epochs_over_all_ranks(root: Path, world_size: int, training: bool) -> None:
    """Sizes around a multiple of ranks x batch, where bounds and empty batches go wrong; nothing is NaN."""
    batch = 4 if world_size < 8 else 3
    around = (-1, 0, 1, 2) if world_size < 8 else (1,)  # a rank costs time
    for count in {world_size, *(2 * batch * world_size + d for d in around)}:
        ranks = [
            loader(root, count, training=training, batch_size=batch, rank=r, world_size=world_size)
            for r in range(world_size)
        ]
        shards = ranks[0].shards
        for _ in range(10):
            epochs = [epoch(rank) for rank in ranks]
            seen = [[label for b in batches for label in b.labels.tolist()] for batches in epochs]
            assert sorted(chain.from_iterable(seen)) == list(range(count))
            assert [len(batches) for batches in epochs] == [len(rank) for rank in ranks] == [len(shards)] * world_size
            parts = [list(shards.part(r)) for r in range(world_size)]
            assert [len(part) for part in seen] == [len(part) for part in parts]
            assert training or seen == parts  # unshuffled, a label says where its image stands
            for step, batches in enumerate(zip(*epochs, strict=True)):
                assert sum(len(b.labels) for b in batches) == ranks[0].global_count(step)
                assert all(b.images.shape == (len(b.labels), 3, 8, 8) for b in batches)
                assert all(b.images.isfinite().all() for b in batches)


def test_a_rank_may_get_an_empty_batch(root: Path) -> None:
    """17 images, 2 ranks, batch 8: shards of 8 and 9, so one rank's second batch is empty."""
    sizes = sorted(len(epoch(loader(root, 17, rank=r, world_size=2))[1].labels) for r in range(2))
    assert sizes == [0, 1]


def test_training_order_depends_on_seed_and_epoch(root: Path) -> None:
    first, again, other = loader(root, seed=1), loader(root, seed=1), loader(root, seed=2)
    epochs = [order(first) for _ in range(3)]
    orders = [*epochs, order(other), order(other)]
    assert epochs == [order(again) for _ in range(3)]
    for i, one in enumerate(orders):
        assert one != list(range(64))
        for two in orders[:i]:
            assert (
                abs(np.corrcoef(np.argsort(one), np.argsort(two))[0, 1]) < 0.5
            )  # 4 sigma; test_data_draws.py has more


def test_validation_is_in_order_and_without_chance(root: Path) -> None:
    one, two = loader(root, training=False, seed=1), loader(root, training=False, seed=2)
    first, second = epoch(one), epoch(one)
    assert [label for b in first for label in b.labels.tolist()] == list(range(64))
    for batches in (second, epoch(two)):
        assert all(torch.equal(a.images, b.images) for a, b in zip(first, batches, strict=True))


def same(got: list[Batch], want: list[Batch]) -> None:
    """Assert that two epochs are equal, bit for bit."""
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_threads_and_prefetch_change_nothing(root: Path) -> None:
    def run(threads: int, prefetch: int) -> list[Batch]:
        config = DataConfig(image_size=8, val_resize=8, threads=threads, prefetch=prefetch)
        made = loader(root, config=config)
        return epoch(made) + epoch(made)

    want = run(1, 1)
    for threads, prefetch in ((3, 1), (2, 4)):
        same(run(threads, prefetch), want)


def test_augmentation_differs_between_seeds_epochs_and_images(root: Path) -> None:
    """One file, so that only the draws differ."""
    pictures = []
    for seed in (0, 1, 2**32):
        folder = ImageFolder(root=root, classes=("a",), files=("000.png",) * 2, labels=(0, 0))
        made = Loader(folder, SMALL, training=True, batch_size=1, device=CPU, seed=seed)
        pictures += [batch.images for _ in range(2) for batch in epoch(made)]
    assert len(pictures) == 12
    for i, one in enumerate(pictures):
        assert not any(torch.equal(one, other) for other in pictures[:i])


def test_what_an_image_gets_depends_on_seed_and_epoch_alone(root: Path) -> None:
    """Not on rank, ranks, batch size, threads, prefetch, or where the run began: every image, bit for bit."""

    def pictures(ranks: int, **arguments: Any) -> dict[int, torch.Tensor]:
        made = [loader(root, 61, rank=r, world_size=ranks, **arguments) for r in range(ranks)]
        for one in made:
            epoch(one)
        seen = [
            (label, image) for one in made for b in epoch(one) for image, label in zip(b.images, b.labels, strict=True)
        ]
        assert len(seen) == 61
        return {int(label): image for label, image in seen}

    want = pictures(1)
    others = DataConfig(image_size=8, val_resize=8, threads=1, prefetch=4)
    for got in (pictures(2), pictures(3, batch_size=5), pictures(1, batch_size=61, config=others)):
        assert all(torch.equal(image, got[label]) for label, image in want.items())


def test_batches_outlive_the_iteration(root: Path) -> None:
    """Tensors share memory with DALI: it must not be written again while a batch is alive."""
    made = loader(root)
    kept = [(batch.images, batch.images.clone()) for _ in range(2) for batch in made]
    assert all(torch.equal(images, clone) for images, clone in kept)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_are_channels_last_in_the_dtype_asked_for(root: Path, dtype: torch.dtype, training: bool) -> None:
    exact = epoch(loader(root, training=training))[0]
    batch = epoch(loader(root, training=training, dtype=dtype))[0]
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    torch.testing.assert_close(batch.images.float(), exact.images, rtol=torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize(("place", "training"), covering([(0, 0), (0, 3), (1, 0), (1, 5), (2, 8)], [True, False]))
def test_a_restored_loader_goes_on_bit_for_bit(root: Path, place: tuple[int, int], training: bool) -> None:
    """Before anything, within and between epochs, after an epoch's last batch; 61 images end in a short batch."""
    epochs, steps = place
    made = loader(root, 61, training=training)
    for _ in range(epochs):
        epoch(made)
    iterator = iter(made)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(made.state_dict()))
    rest = [[Batch(b.images.clone(), b.labels.clone()) for b in iterator], epoch(made)]
    fresh, used = loader(root, 61, training=training), loader(root, 61, training=training)
    left = iter(used)
    next(left)
    for restored in (fresh, used):
        restored.load_state_dict(state)
        for want in rest:
            same(epoch(restored), want)
        assert restored.state_dict() == made.state_dict()
    used.load_state_dict(state)
    same([Batch(b.images.clone(), b.labels.clone()) for b in left], rest[0])  # an iteration under way is moved too


def test_an_iteration_left_early_goes_on_where_it_was(root: Path) -> None:
    made = loader(root)
    for step, batch in enumerate(made):
        head = batch.labels.tolist()
        if step == 0:
            break
    assert sorted(head + order(made)) == list(range(64))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 4}, "batch_size"),
        ({"world_size": 2}, "world_size"),
        ({"count": 63}, "files"),
    ],
)
def test_a_state_of_other_arguments_is_refused(root: Path, change: dict[str, Any], field: str) -> None:
    state = loader(root).state_dict()
    with pytest.raises(DataError, match=f"{field} = "):
        loader(root, **change).load_state_dict(state)


def test_fewer_images_than_ranks(root: Path) -> None:
    with pytest.raises(DataError, match="2 images for 3 ranks"):
        loader(root, 2, world_size=3)


def test_encoded_images_are_handed_over_where_they_are(root: Path) -> None:
    """DALI reads the files' own memory, which is kept until the batch is taken; one copy of all files changes no image."""
    encoded = [(root / f"{i:03d}.png").read_bytes() for i in range(8)]
    free = [*map(sys.getrefcount, encoded)]
    places = np.arange(8)
    job = Job(0, 0, places, places, places, encoded)

    def taken(copied: bool, between: Callable[[Decoder], None] = lambda decoder: None) -> torch.Tensor:
        def listed(files: list[Any], contiguous: bool) -> TensorListCPU:
            assert contiguous is False
            return TensorListCPU(files, contiguous=copied)

        with mock.patch.object(decoder_module, "TensorListCPU", listed):
            pixels = choose_pixels(SMALL, training=True, device=CPU)
            options: dict[str, Any] = {"half": False, "seed": 0, "batch_size": 8, "ahead": 1, "hw_decoder_load": 0.0}
            decoder = Decoder(SMALL, pixels, device=CPU, **options)
            decoder.hand_over(job)
            between(decoder)
            decoder.run()
            images = decoder.take().clone()
            between(decoder)
            return images

    addresses = [np.frombuffer(file, np.uint8).ctypes.data for file in encoded]
    held = []

    def look(decoder: Decoder) -> None:
        held.append([now - alone for now, alone in zip(map(sys.getrefcount, encoded), free, strict=True)])
        for _, inputs in decoder._under_way:
            at = [inputs["encoded"][i].data_ptr() for i in range(8)]
            assert at == addresses

    assert torch.equal(taken(copied=False, between=look), taken(copied=True))
    assert held == [[1] * 8, [0] * 8]


def test_another_failure_of_dali_is_not_blamed_on_a_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("Critical error in pipeline: out of memory")

    made = loader(root)
    next(iter(made))
    monkeypatch.setattr(made._decoder._pipeline, "share_outputs", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        epoch(made)
