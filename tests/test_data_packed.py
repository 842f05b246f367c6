"""Packed shards: the order and bytes of the folder, kills in the middle, and everything that can be wrong with them."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import data as prepare
from fasttricks.config import ConfigError, DataConfig
from fasttricks.data.packing import pack
from fasttricks.data.packing.pack import PackConfig, pack_split
from fasttricks.data.packing.reencode import encode
from fasttricks.data.pipeline.feed import Feed
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources import find_dataset
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import ImageFolder, scan_folder
from fasttricks.data.sources.packed import PackedImages, open_packed
from fasttricks.data.sources.quarantine import write_quarantine
from fasttricks.system.ownership import Claim
from lib.tiny import arguments, call

LIMIT = DataConfig().max_pixels


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """1500 images of a few bytes, each a class of its own, so that a label says which image it is."""
    root = tmp_path_factory.mktemp("many")
    image = encoded(Image.new("RGB", (1, 1)), "JPEG")
    for number in range(1500):
        (root / f"{number:04d}.jpg").write_bytes(image + b"%d" % number)
    names = tuple(f"{number:04d}.jpg" for number in range(1500))
    return ImageFolder(root, names, names, tuple(range(1500)))


@pytest.fixture(scope="module")
def few(tiny_data: Path) -> ImageFolder:
    return scan_folder(tiny_data / "train")


@pytest.mark.parametrize("world_size", [1, 2])
def test_order_and_bytes_are_those_of_the_folder(many: ImageFolder, tmp_path: Path, world_size: int) -> None:
    """Over 3 epochs, every rank; and the order of reading has nothing to do with that in the shards."""
    packed = pack_split(many, tmp_path / "out", PackConfig(shard_images=400)).images
    place = np.lexsort((packed.index["offset"], packed.index["shard"])).argsort()
    assert abs(np.corrcoef(place, np.arange(1500))[0, 1]) < 0.1
    shards = Shards(num_images=1500, batch_size=64, world_size=world_size, source="")
    for rank in range(world_size):
        feeds = [Feed(source, shards, DataConfig(), training=True, seed=7, rank=rank) for source in (many, packed)]
        jobs = [feed.jobs(0, 0) for feed in feeds]
        orders: list[list[int]] = [[], [], []]
        for _ in range(3 * len(shards)):
            of_folder, of_pack = (next(job) for job in jobs)
            assert of_folder.labels.tolist() == of_pack.labels.tolist()
            assert of_folder.encoded == of_pack.encoded
            orders[of_pack.epoch] += of_pack.labels.tolist()
        for order in orders:
            ranks = place[order].argsort().argsort()
            assert abs(np.corrcoef(ranks, np.arange(len(order)))[0, 1]) < 0.1
        assert orders[0] != orders[1]


def test_a_run_may_change_over_from_folder_to_pack(few: ImageFolder, tmp_path: Path) -> None:
    """The same bytes have the same fingerprint, so that a state of the one is taken up by the other, bit for bit."""
    packed = pack_split(few, tmp_path / "out", PackConfig()).images
    arguments: Any = {"training": True, "batch_size": 8, "device": torch.device("cpu"), "seed": 3}
    config = DataConfig(image_size=16, val_resize=16)
    whole = [batch.images.clone() for batch in Loader(few, config, **arguments)]
    first = Loader(few, config, **arguments)
    batches = iter(first)
    for _ in range(2):
        next(batches)
    second = Loader(packed, config, **arguments)
    second.load_state_dict(first.state_dict())
    rest = [batch.images.clone() for batch in second]
    assert len(rest) == len(whole) - 2
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    smaller = pack_split(few, tmp_path / "smaller", PackConfig(short_side=32)).images
    assert smaller.fingerprint() != few.fingerprint()
    with pytest.raises(DataError, match="the saved position has files"):
        Loader(smaller, config, **arguments).load_state_dict(first.state_dict())


def test_a_killed_pack_goes_on(tmp_path: Path, tiny_data: Path) -> None:
    """kill -9 once some shards are there: those are not written again, and all files are as those of an undisturbed pack."""
    out, options = tmp_path / "out", ("--shard-images", "1", "--workers", "1")
    command = [sys.executable, "-m", "fasttricks.data.prepare", "pack", str(tiny_data), str(out), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (out / "train" / "shard-00003.bin").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "train" / "pack.json").exists()
    with pytest.raises(DataError, match="packing is not finished; give the same `prepare pack` command again"):
        find_dataset(DataConfig(root=str(out)))
    (out / "train" / "shard-00002.bin").chmod(0o444)
    before = (out / "train" / "shard-00002.bin").stat()
    assert call(prepare.main, "pack", str(tiny_data), str(out), *options) == 0
    after = (out / "train" / "shard-00002.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    undisturbed = tmp_path / "undisturbed"
    assert call(prepare.main, "pack", str(tiny_data), str(undisturbed), *options[:2]) == 0
    for split in ("train", "val"):
        files = [{f.name: f.read_bytes() for f in (root / split).iterdir()} for root in (out, undisturbed)]
        assert files[0] == files[1]
        assert set(files[0]) == {
            "pack.json",
            "index.npz",
            *(f"shard-{n:05d}.bin" for n in range(len(files[0]) - 2)),
        }


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    few: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, whole = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the plan, a shard and its record are on the disk
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"No space left on device; .* repeat the command: it continues at shard 1"):
        pack_split(few, tmp_path / "out", PackConfig(shard_images=20))
    done = pack_split(few, tmp_path / "out", PackConfig(shard_images=20)).images
    assert [done.read(i) for i in range(len(few))] == [few.read(i) for i in range(len(few))]


def test_out_that_holds_something_else(few: ImageFolder, tmp_path: Path, tiny_data: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(DataError, match="holds something other than a pack"):
        pack_split(few, out, PackConfig())
    (out / "thesis.tex").unlink()
    pack_split(few, out, PackConfig())
    with pytest.raises(DataError, match="was packed with seed = 0, now 1; give the same, or another OUT"):
        pack_split(few, out, PackConfig(seed=1))
    with pytest.raises(DataError, match="was packed with images = 45, now 14"):
        pack_split(scan_folder(tiny_data / "val"), out, PackConfig())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be made \(File exists\)"):
        pack_split(few, tmp_path / "file", PackConfig())
    assert call(prepare.main, "pack", str(tiny_data), str(tiny_data / "out")) == 2


def test_two_commands_on_one_folder(few: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttricks.data.packing.pack.Claim", partial(Claim, patience_s=0))

    def second(_: int) -> None:
        with pytest.raises(DataError, match=rf"is in use by pid {os.getpid()} on .*; .* or give another OUT$"):
            pack_split(few, tmp_path / "out", PackConfig())

    pack_split(few, tmp_path / "out", PackConfig(), second)


def damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_damaged_shard_is_named(few: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit, in training and by `prepare check`; a shard of the wrong length or gone at once."""
    for split in ("train", "val"):
        pack_split(few, tmp_path / split, PackConfig(shard_images=20))
    shard = tmp_path / "train" / "shard-00001.bin"
    packed = open_packed(tmp_path / "train")
    (number,) = np.flatnonzero((packed.index["shard"] == 1) & (packed.index["offset"] == 0))
    damage(shard, 100)
    with pytest.raises(OSError, match=r"bytes 0 to \d+ of shard-00001.bin fail their checksum: the shard is damaged"):
        packed.read(int(number))
    good = [index for index in range(len(packed)) if index != number]
    assert [packed.read(index) for index in good] == [few.read(index) for index in good]
    assert call(prepare.main, "check", str(tmp_path)) == 2
    assert f"train/{packed.name(int(number))}: bytes 0 to" in capsys.readouterr().err
    damage(shard, 100)
    assert call(prepare.main, "check", str(tmp_path)) == 0
    os.truncate(shard, 50)
    with pytest.raises(DataError, match=r"shard-00001.bin: has 50 bytes of \d+; copy it again"):
        open_packed(tmp_path / "train")
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001.bin: is missing"):
        find_dataset(DataConfig(root=str(tmp_path)))


def test_a_damaged_index_or_manifest_is_named(few: ImageFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_split(few, out, PackConfig())
    size = (out / "index.npz").stat().st_size
    damage(out / "index.npz", size // 2)
    with pytest.raises(DataError, match=r"index.npz: \d+ bytes that fail their checksum: the index is cut or damaged"):
        open_packed(out)
    os.truncate(out / "index.npz", size // 2)
    with pytest.raises(DataError, match=rf"index.npz: {size // 2} bytes that fail their checksum"):
        open_packed(out)
    manifest = (out / "pack.json").read_text()
    (out / "pack.json").write_text(manifest[:100])
    with pytest.raises(DataError, match=r"pack.json: damaged"):
        open_packed(out)
    (out / "pack.json").write_text(manifest.replace('"format": 1', '"format": 2'))
    with pytest.raises(DataError, match="packed in format 2, this release reads 1"):
        open_packed(out)


def test_val_is_labelled_by_the_classes_of_train(few: ImageFolder, tmp_path: Path) -> None:
    part = ImageFolder(few.root, ("bee", "cat"), few.files[15:], tuple(label - 1 for label in few.labels[15:]))
    pack_split(few, tmp_path / "train", PackConfig())
    pack_split(part, tmp_path / "val", PackConfig())
    train, val = find_dataset(DataConfig(root=str(tmp_path)))
    assert val.classes == train.classes == ("ant", "bee", "cat")
    assert val.labels == few.labels[15:]
    with pytest.raises(DataError, match="class ant has no counterpart in train"):
        open_packed(tmp_path / "train", classes=("bee", "cat"))


def test_bad_images_move_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut, of another kind, quarantined, unreadable: each reported; training sees what it sees of the folder."""
    root, out = tmp_path / "data", tmp_path / "out"
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (80, 60), (number * 30, 9, 9)).save(root / split / "a" / f"{number}.jpg", quality=95)
    cut, text, gone = (root / "train" / "a" / f"{number}.jpg" for number in (2, 3, 4))
    cut.write_bytes(cut.read_bytes()[:200])
    text.write_text("no image at all")
    gone.unlink()
    gone.symlink_to("gone")
    write_quarantine(root, {"train/a/5.jpg": "a thumb on the lens"})
    assert call(prepare.main, "pack", str(root), str(out), "--short-side", "32") == 0
    shown = capsys.readouterr().out
    assert "train/a/2.jpg: damaged or cut off: " in shown
    assert "train/a/3.jpg: no image: first bytes b'no image at " in shown
    assert "train/a/4.jpg: unreadable: No such file or directory" in shown
    assert "train/a/5.jpg: quarantined: a thumb on the lens" in shown
    folder, packed = find_dataset(DataConfig(root=str(root)))[0], find_dataset(DataConfig(root=str(out)))[0]
    assert packed.files == folder.files == tuple(f"a/{number}.jpg" for number in range(8))
    assert packed.bad == folder.bad and sorted(packed.bad) == [3, 4, 5]
    assert packed.read(2) == cut.read_bytes()
    assert Image.open(io.BytesIO(packed.read(6))).size == (43, 32)
    shards = Shards(num_images=8, batch_size=8, world_size=1, source="")
    config = DataConfig(max_bad=0.9)
    jobs = [next(Feed(source, shards, config, training=True, seed=1, rank=0).jobs(0, 0)) for source in (folder, packed)]
    assert jobs[0].images.tolist() == jobs[1].images.tolist()
    assert not set(jobs[0].images.tolist()) & {2, 3, 4, 5}
    assert call(prepare.main, "check", str(out)) == 0
    assert "train/a/5.jpg: bad when it was packed, left out: quarantined" in capsys.readouterr().out


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (90, 60)) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    return Image.fromarray(np.stack([x * 2, y * 3, 255 - x - y], -1).clip(0, 255).astype(np.uint8)).convert(mode)


def test_what_an_image_is_stored_as() -> None:
    def stored(content: bytes, short_side: int = 30, quality: int = 95) -> Image.Image:
        return Image.open(io.BytesIO(encode(content, short_side, quality, LIMIT).content))

    for mode in ("RGB", "L", "P", "RGBA", "LA"):
        image = stored(encoded(picture(mode)))
        assert (image.format, image.size, image.mode) == ("JPEG", (45, 30), "L" if mode in ("L", "LA") else "RGB")
        want = np.asarray(picture(mode).convert(image.mode).resize((45, 30), Image.Resampling.BILINEAR), float)
        assert np.abs(np.asarray(image, float) - want).mean() < 2
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    image = stored(encoded(picture(), "JPEG", exif=turned, quality=95))
    assert image.size == (30, 45) and not image.getexif()
    small = encoded(picture(size=(400, 30)), "JPEG", quality=20)
    assert encode(small, 30, 95, LIMIT).content == small  # neither enlarged nor stored in more bytes
    large = encoded(picture(size=(20, 25)), "JPEG", quality=100)
    assert len(encode(large, 30, 50, LIMIT).content) < len(large)
    assert encode(large, 0, 0, LIMIT).content == large
    deep = encoded(Image.fromarray(np.arange(5400, dtype=np.uint16).reshape(60, 90) * 12))
    image, want = stored(deep), np.arange(5400).reshape(60, 90) * 12 / 257
    assert image.mode == "L" and np.abs(np.asarray(image.resize((90, 60)), float) - want).max() < 8
    assert encode(deep, 30, 95, 5399).content == deep
    assert "90 x 60 = 5,400 pixels, over data.max_pixels = 5,399" in encode(deep, 30, 95, 5399).trouble


@pytest.mark.parametrize(
    ("field", "value"),
    [("short_side", 31), ("quality", 101), ("shard_images", 0), ("seed", -1), ("workers", -1), ("max_pixels", 0)],
)
def test_settings_have_ranges(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{field} = {value}"):
        PackConfig(**{field: value})


def test_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for args, said in (
        (["pack", "DIR"], "pack needs DIR and OUT"),
        (["pakc"], "'pakc' is no command of python -m fasttricks.data.prepare: scan, stats, split, pack, "),
        (["imagenet", "OUT"], "train_tar = '': give the archive as --train-tar"),
        (["check", "OUT", "more"], "'more': check takes OUT alone"),
        (["pack", "no-such-folder", "OUT"], "no-such-folder: no such folder"),
    ):
        assert call(prepare.main, *args) == 2
        assert said in capsys.readouterr().err
    assert call(prepare.main, "pack", "--help") == 0
    assert "--short-side" in capsys.readouterr().out


@pytest.mark.slow
def test_training_from_a_pack_gives_the_weights_that_the_folder_gives(tiny_data: Path, tmp_path: Path) -> None:
    from fasttricks.commands import train

    assert call(prepare.main, "pack", str(tiny_data), str(tmp_path / "packed")) == 0
    weights = []
    for name, root in (("folder", tiny_data), ("pack", tmp_path / "packed")):
        assert call(train.main, *arguments(root, tmp_path / name)) == 0
        newest = max((tmp_path / name / "checkpoints").iterdir())
        weights.append(torch.load(newest, weights_only=True)["model"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def open_files(folder: Path) -> list[str]:
    """The open files of this process in the folder; its others may be closed at any time, with the garbage of other tests."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return sorted(str(link.readlink()) for link in links if link.is_symlink() and str(folder) in str(link.readlink()))


def test_open_files_are_closed_with_the_pack(few: ImageFolder, tmp_path: Path) -> None:
    packed: PackedImages | None = pack_split(few, tmp_path / "out", PackConfig(shard_images=5)).images
    assert packed is not None
    assert all(packed.read(index) for index in range(len(few)))
    shards = sorted(str(path) for path in (tmp_path / "out").rglob("shard*"))
    assert len(shards) == 9 and open_files(tmp_path) == shards
    packed = None
    assert not open_files(tmp_path)


def die(*_: object) -> None:
    os._exit(9)


@pytest.mark.slow
def test_a_worker_that_dies_is_named(few: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "_work", die)
    with pytest.raises(DataError, match=r"a worker process died, .* give fewer --workers; the same command continues"):
        pack_split(few, tmp_path / "out", PackConfig(quality=50, workers=1))
    monkeypatch.undo()
    assert len(pack_split(few, tmp_path / "out", PackConfig(quality=50, workers=1)).images) == len(few)
