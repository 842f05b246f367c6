"""Every kind of bad or odd file: decoded as PIL decodes it, or replaced and named; all else stays as it was."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttricks.config import DataConfig
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline import draws, reference
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from lib.images import JPEG, KINDS, encoded, put, smooth
from lib.tables import covering

CPU = torch.device("cpu")
CONFIG = DataConfig(image_size=32, val_resize=32, threads=2, max_bad=0.2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 images of three classes."""
    root = tmp_path_factory.mktemp("good") / "train"
    for number in range(15):
        folder = root / "abc"[number // 5]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number % 5}.jpg").write_bytes(encoded(smooth("RGB", shift=9 * number)))
    return root


PLACE = 7  # of b/2.jpg


def epoch(loader: Loader) -> list[Batch]:
    return [Batch(batch.images.clone(), batch.labels.clone()) for batch in loader]


def two_epochs(root: Path, *, training: bool, config: DataConfig = CONFIG) -> tuple[Loader, list[torch.Tensor]]:
    """Their images, each epoch's in the order of the data set in training."""
    loader = Loader(scan_folder(root), config, training=training, batch_size=4, device=CPU)
    epochs = []
    for number in range(2):
        images = torch.cat([batch.images for batch in epoch(loader)])
        if training:
            images = images[np.argsort(draws.epoch_order(0, number, len(images)))]
        epochs.append(images)
    return loader, epochs


@pytest.fixture(scope="module")
def clean(good: Path) -> dict[bool, list[torch.Tensor]]:
    return {training: two_epochs(good, training=training)[1] for training in (True, False)}


@pytest.mark.parametrize("name", KINDS)
def test_kind(
    name: str, good: Path, clean: dict[bool, list[torch.Tensor]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kind, root = KINDS[name], tmp_path / "train"
    shutil.copytree(good, root)
    path = put(root, kind)
    others = [place for place in range(15) if place != PLACE]
    start = time.process_time()  # of all threads; another process's load does not count
    loader, epochs = two_epochs(root, training=True)
    seconds = time.process_time() - start
    said = capfd.readouterr().err
    shown_as = root / "b" / "3.jpg" if kind.reason else path
    for number, (images, before) in enumerate(zip(epochs, clean[True], strict=True)):
        assert torch.equal(images[others], before[others])
        drawn = draws.image_draws(0, number, np.array([PLACE]))
        want = reference.training_image(reference.decode(shown_as), CONFIG, drawn)
        assert np.abs(images[PLACE].permute(1, 2, 0).numpy() - want).max() * 58 < 1.6 * kind.tolerance
    if not kind.reason:
        assert loader.bad == {}
        assert "bad image" not in said
        assert seconds < 5
        return
    assert list(loader.bad) == [f"train/b/{kind.name}"]
    assert kind.reason in loader.bad[f"train/b/{kind.name}"]
    assert said.count("bad image b/2") == 1 and kind.reason in said and "replaced by another of its class" in said
    assert seconds < 1, "a bad file may cost a second"

    loader, epochs = two_epochs(root, training=False)
    for images, before in zip(epochs, clean[False], strict=True):
        assert torch.equal(images, before[others])
    assert list(loader.bad) == [f"train/b/{kind.name}"]
    assert "left out" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------ during a run, over ranks
def union(
    root: Path, world_size: int, epochs: int, **arguments: Any
) -> tuple[dict[tuple[int, int], torch.Tensor], set[str]]:
    """((epoch, place of the image) -> what was shown, bad files) of all ranks together."""
    shown, bad = {}, set()
    for rank in range(world_size):
        loader = Loader(
            scan_folder(root), CONFIG, training=True, device=CPU, rank=rank, world_size=world_size, **arguments
        )
        for number in range(epochs):
            images = torch.cat([batch.images for batch in epoch(loader)])
            order = draws.epoch_order(0, number, 15)[loader.shards.part(rank).start : loader.shards.part(rank).stop]
            assert len(images) == len(order)
            shown |= {(number, int(place)): image for place, image in zip(order, images, strict=True)}
        bad |= set(loader.bad)
    return shown, bad


def test_ranks_and_batches_do_not_change_what_stands_for_a_bad_file(good: Path, tmp_path: Path) -> None:
    """Neighbours that are bad, one by its header and one in its pixels, and the last of its class: round to the first."""
    shutil.copytree(good, tmp_path / "train")
    for name, content in (("b/2", b""), ("b/3", KINDS["damaged PNG"].make), ("c/4", KINDS["cut tail"].make)):
        (tmp_path / "train" / f"{name}.jpg").write_bytes(content)  # type: ignore[arg-type]
    want, bad = union(tmp_path / "train", 1, 3, batch_size=4)
    assert bad == {"train/b/2.jpg", "train/b/3.jpg", "train/c/4.jpg"}
    for place, stand_in in ((7, "b/4"), (8, "b/4"), (14, "c/0")):
        image = reference.decode(good / f"{stand_in}.jpg")
        for number in range(3):
            expected = reference.training_image(image, CONFIG, draws.image_draws(0, number, np.array([place])))
            assert np.abs(want[number, place].permute(1, 2, 0).numpy() - expected).max() * 58 < 6.4
    for world_size, batch_size in ((1, 15), (2, 3), (4, 2)):
        got, found = union(tmp_path / "train", world_size, 3, batch_size=batch_size)
        assert found == bad
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], image) for key, image in want.items())


@pytest.mark.parametrize(("damage", "training"), covering(["vanished", "text", "cut", "damaged PNG"], [True, False]))
def test_what_happens_to_a_file_during_the_run(good: Path, tmp_path: Path, damage: str, training: bool) -> None:
    """It is met in a later epoch, named and replaced; the order of the others goes on; a resume knows it even if mended."""
    root = tmp_path / "train"
    shutil.copytree(good, root)
    options: dict[str, Any] = {"training": training, "batch_size": 4, "device": CPU}
    loader, before = (Loader(scan_folder(root), CONFIG, **options) for _ in range(2))
    epoch(loader)
    file = root / "b" / "2.jpg"
    if damage == "vanished":
        file.unlink()
    else:
        content = {"text": b"text", "cut": JPEG[:9000], "damaged PNG": KINDS["damaged PNG"].make}[damage]
        file.write_bytes(content)  # type: ignore[arg-type]
    after = [epoch(loader) for _ in range(3)]  # what was read ahead was good
    shutil.copy(good / "b" / "2.jpg", file)
    epoch(before)
    assert list(loader.bad) == ["train/b/2.jpg"]
    for number, batches in enumerate(after, 1):
        expected = epoch(before)
        if not training:
            if number < 3:
                continue
            assert sum(len(batch.labels) for batch in batches) == 14
            images, others = (torch.cat([b.images for b in part]) for part in (batches, expected))
            assert torch.equal(images, others[[place for place in range(15) if place != PLACE]])
            continue
        at = int(np.flatnonzero(draws.epoch_order(0, number, 15) == PLACE)[0])
        images, others = (torch.cat([b.images for b in part]) for part in (batches, expected))
        rest = [place for place in range(15) if place != at]
        assert torch.equal(images[rest], others[rest])
        assert torch.equal(torch.cat([b.labels for b in batches]), torch.cat([b.labels for b in expected]))
        assert number < 3 or not torch.equal(images[at], others[at])
    restored = Loader(scan_folder(root), CONFIG, **options)
    restored.load_state_dict(loader.state_dict())
    for one, two in zip(epoch(loader), epoch(restored), strict=True):
        assert torch.equal(one.images, two.images)
    assert restored.bad == loader.bad


def test_a_bad_file_is_named_once_a_run_resumed_or_not(
    good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By rank 0 alone where the scan found it already; and to know too many from a state is an error."""
    shutil.copytree(good, tmp_path / "train")
    (tmp_path / "train" / "b" / "2.jpg").write_bytes(b"text")
    options: dict[str, Any] = {"training": True, "batch_size": 4, "device": CPU, "world_size": 2}
    folder = scan_folder(tmp_path / "train")
    loaders = [Loader(folder, CONFIG, rank=rank, **options) for rank in (0, 1)]
    [epoch(loader) for loader in loaders]
    assert capfd.readouterr().err.count("bad image b/2.jpg") == 1
    restored = Loader(folder, CONFIG, rank=0, **options)
    restored.load_state_dict(loaders[0].state_dict())
    epoch(restored)
    assert "bad image" not in capfd.readouterr().err
    strict = Loader(scan_folder(good), replace(CONFIG, max_bad=0), rank=0, **options)
    with pytest.raises(DataError, match=r"1 of 15 images are bad, over data\.max_bad = 0 "):
        strict.load_state_dict(loaders[0].state_dict())


def test_one_percent_of_a_thousand(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ten bad files of different kinds among 1000: all named, each in its place, the labels as if nothing were wrong."""
    content = encoded(smooth("RGB", (16, 16)), "PNG")
    kinds = [
        "zero bytes",
        "text",
        "GIF",
        "cut header",
        "cut tail",
        "cut PNG",
        "cut WebP",
        "damaged PNG",
        "JPEG bomb",
        "no size",
    ]
    for number in range(1000):
        path = tmp_path / "train" / str(number % 4) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(KINDS[kinds[number // 100]].make if number % 100 == 50 else content)  # type: ignore[arg-type]
    folder = scan_folder(tmp_path / "train")
    loader = Loader(folder, DataConfig(image_size=16, val_resize=16), training=True, batch_size=128, device=CPU, seed=3)
    for number in range(2):
        labels = torch.cat([batch.labels for batch in epoch(loader)])
        assert torch.equal(labels, torch.tensor(folder.labels)[draws.epoch_order(3, number, 1000)])
    assert sorted(loader.bad) == sorted(f"train/{n % 4}/{n:03d}.png" for n in range(50, 1000, 100))
    assert capfd.readouterr().err.count("bad image ") == 10


def test_too_many_bad_files(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "train")
    (tmp_path / "train" / "b" / "2.jpg").write_bytes(b"text")  # known before training
    folder = scan_folder(tmp_path / "train")
    options: dict[str, Any] = {"training": True, "batch_size": 4, "device": CPU}
    with pytest.raises(
        DataError, match=r"1 of 15 images are bad, over data\.max_bad = 0\.05 .*b/2\.jpg: no image.*--data\.max-bad"
    ):
        Loader(folder, DataConfig(image_size=32, val_resize=32), **options)
    loader = Loader(folder, CONFIG, **options)
    epoch(loader)
    shutil.rmtree(tmp_path / "train" / "c")  # a disk that is gone
    with pytest.raises(
        DataError, match=r"[4-6] of 15 images are bad, over data\.max_bad = 0\.2 .*unreadable: No such file"
    ):
        [epoch(loader) for _ in range(3)]


def test_a_rank_whose_validation_images_are_all_bad(good: Path, tmp_path: Path) -> None:
    """An error, not a search without end; the other rank has its own."""
    shutil.copytree(good, tmp_path / "val")
    for name in ("b/4", "c/0", "c/1", "c/2", "c/3"):
        (tmp_path / "val" / f"{name}.jpg").write_bytes(KINDS["cut tail"].make)  # type: ignore[arg-type]
    (tmp_path / "val" / "c" / "4.jpg").write_bytes(KINDS["damaged PNG"].make)  # type: ignore[arg-type]
    config = replace(CONFIG, max_bad=0.5)
    options: dict[str, Any] = {"training": False, "batch_size": 2, "device": CPU, "world_size": 3}
    first, last = (Loader(scan_folder(tmp_path / "val"), config, rank=rank, **options) for rank in (0, 2))
    assert sum(len(batch.labels) for batch in epoch(first)) == 5
    with pytest.raises(DataError, match="rank 2 of 3 has no good image; repair the images, or use fewer ranks"):
        epoch(last)


def test_a_class_without_a_good_image_is_an_error(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "train")
    for file in (tmp_path / "train" / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"train/b: class folder with no image in it \(b/0.jpg: 0 bytes long\)"):
        scan_folder(tmp_path / "train")
