"""The zoo (lib/zoo.py) through the commands of a user, each in one process over all of it: none ends by a signal, all say the
same of a file, and pixels are Pillow's."""

from __future__ import annotations

import json
import resource
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.config import DataConfig
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.reference import decode, normalise, validation_pixels
from fasttricks.data.sources.folder import scan_folder
from lib.forked import on_ranks, said_by
from lib.images import encoded, smooth
from lib.tiny import arguments
from lib.zoo import damaged, written_by_hand, written_by_pillow

Verdicts = dict[str, str]
"""Name of each refused file -> why."""


def write(root: Path, files: dict[str, bytes]) -> dict[str, str]:
    """A data set of the files and a few good images, the same for training and validation. Path in the split -> name."""
    paths = {f"zoo/{number:04d}.jpg": name for number, name in enumerate(files)}
    for split in ("train", "val"):
        for label in ("good", "zoo"):
            (root / split / label).mkdir(parents=True)
            (root / split / label / "good.jpg").write_bytes(encoded(smooth("RGB", (50, 40))))
        for path, name in paths.items():
            (root / split / path).write_bytes(files[name])
    return paths


def scanned(root: Path) -> Verdicts:
    said_by("fasttricks.data.prepare", "scan", str(root / "val"), "--workers", "1")
    listed = root / "val" / "quarantine.jsonl"
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    listed.unlink()
    return {line["file"]: line["reason"] for line in lines}


def trained(root: Path, run: Path) -> tuple[Verdicts, Verdicts]:
    """Of training, which is to see all of each image, and of validation."""
    whole = ["--data.area", "1", "1", "--data.aspect", "1", "1"]
    more = ["--epochs", "1", "--global-batch-size", "32", "--data.max-bad", "1"]
    said_by("fasttricks.train", *arguments(root, run, *whole, *more))
    bad = json.loads((run / "summary.json").read_text())["bad_images"]
    return tuple(
        {name.removeprefix(f"{split}/"): why for name, why in bad.items() if name.startswith(split)}
        for split in ("train", "val")
    )  # type: ignore[return-value]


def packed(root: Path, out: Path) -> Verdicts:
    said_by("fasttricks.data.prepare", "pack", str(root), str(out), "--workers", "1")
    return dict(json.loads((out / "val" / "pack.json").read_text())["troubles"])


def predicted(root: Path, run: Path, paths: list[str]) -> Verdicts:
    paths = [str(root / "val" / path) for path in paths]
    said = said_by("fasttricks.predict", str(run), *paths, codes=(1,))
    errors = [line.removeprefix(f"error: {root}/val/") for line in said.splitlines() if line.startswith("error: ")]
    return dict(line.split(": ", 1) for line in errors)  # type: ignore[misc]


def check(root: Path, files: dict[str, bytes]) -> None:
    """The five commands agree on each file; scan alone may find more, in a JPEG whose damage decoders hide."""
    names = write(root / "data", files)
    train, val = trained(root / "data", root / "run")
    said = {
        "train": train,
        "val": val,
        "scan": scanned(root / "data"),
        "pack": packed(root / "data", root / "packed"),
        "predict": predicted(root / "data", root / "run", list(names)),
    }
    for path, name in names.items():
        verdicts = {command: path in bad for command, bad in said.items()}
        silent = name.startswith("JPEG") and not name.startswith("JPEG2000")
        if silent and verdicts["scan"]:
            del verdicts["scan"]
        assert len(set(verdicts.values())) == 1, (name, {command: bad.get(path) for command, bad in said.items()})
    for why in (why for bad in said.values() for why in bad.values()):
        assert "sample" not in why and len(why) > 5, why


def sampled(seed: int, every: int = 1) -> dict[str, bytes]:
    """All whole files, and each `every`-th of them with one damage, by turns."""
    whole = written_by_pillow() | written_by_hand()
    hurt = {}
    for number, (name, file) in list(enumerate(whole.items()))[seed % every :: every]:
        kinds = list(damaged(name, file, seed).items())
        hurt |= dict([kinds[(number + seed) % len(kinds)]])
    return whole | hurt


def test_the_commands_agree_and_none_dies(tmp_path: Path) -> None:
    check(tmp_path, sampled(0, every=48))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 20))
def test_the_commands_agree_on_other_damage_and_none_dies(seed: int, tmp_path: Path) -> None:
    check(tmp_path, sampled(seed))


def test_pixels_are_those_of_pil(tmp_path: Path) -> None:
    """Each file that is not refused, and none is refused that PIL turns to 8 bits."""
    files = written_by_pillow() | written_by_hand()
    names = write(tmp_path, files)
    config = DataConfig(image_size=32, val_resize=36, threads=1, max_bad=1.0)
    folder = scan_folder(tmp_path / "val")
    loader = Loader(folder, config, training=False, batch_size=64, device=torch.device("cpu"))
    shown = {}
    for batch in loader:
        shown |= {folder.files[place]: image for place, image in zip(batch.places, batch.images, strict=True)}
    refused = {names[path.removeprefix("val/")] for path in loader.bad}
    assert refused == {
        *(name for name in files if name.startswith(("TIFF I", "TIFF F")) and "I;16" not in name),
        *("JPEG of 12 bits", "JPEG lossless", "JPEG of two frames", "JPEG of many scans"),
        *("BMP of no such depth", "PNG of too long a side"),
    }
    for path, name in names.items():
        if name in refused:
            continue
        image = decode(tmp_path / "val" / path)
        width, height = (min(side, 100) for side in image.size)  # PIL would make gigabytes of 20,000 x 1
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        want = normalise(validation_pixels(image, image_size=32, val_resize=36))
        levels = np.abs(shown[path].permute(1, 2, 0).numpy() - want).max() * 58
        assert levels < 1.6, (name, levels)


def peaks(root: str) -> None:
    """In a process of its own: the MB that it has had at most, once it has read each folder's images."""
    config = DataConfig(image_size=224, val_resize=256, threads=1)
    for folder in ("1000", "20000"):
        (batch,) = Loader(
            scan_folder(f"{root}/{folder}"), config, training=False, batch_size=4, device=torch.device("cpu")
        )
        assert len(batch) == 4
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        Path(root, f"{folder}.MB").write_text(str(peak))


def test_a_long_image_costs_what_its_crop_does(tmp_path: Path) -> None:
    """1 x 20,000 pixels, resized whole, are 4 GB."""
    for side in (1000, 20_000):
        for number, size in enumerate([(side, 1), (1, side), (side, 3), (3, side)]):
            (tmp_path / str(side) / "a").mkdir(parents=True, exist_ok=True)
            Image.effect_noise(size, 99).save(tmp_path / str(side) / "a" / f"{number}.png")
    on_ranks(1, peaks, str(tmp_path))
    before, after = (int((tmp_path / f"{side}.MB").read_text()) for side in (1000, 20_000))
    assert after < before + 100


def test_what_dali_alone_cannot_decode_is_decoded_by_pillow(tmp_path: Path) -> None:
    """A PNG with more pixels than its header tells, its checksums true: shown by training and validation as Pillow has it."""
    image = smooth("RGB", (50, 40))
    file = encoded(image, "PNG")
    header = file[12:29]
    short = header[:8] + (39).to_bytes(4, "big") + header[12:]
    file = file.replace(header + zlib.crc32(header).to_bytes(4, "big"), short + zlib.crc32(short).to_bytes(4, "big"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "long.png").write_bytes(file)
    for number in range(3):
        (tmp_path / "a" / f"{number}.jpg").write_bytes(encoded(image))
    config = DataConfig(image_size=32, val_resize=36, threads=1, max_bad=0.0, color="none", area=(1.0, 1.0))
    for training in (False, True):
        loader = Loader(scan_folder(tmp_path), config, training=training, batch_size=2, device=torch.device("cpu"))
        shown = [place for _ in range(2) for batch in loader for place in batch.places.tolist()]
        assert sorted(shown) == sorted([0, 1, 2, 3] * 2)
        assert loader.bad == {}
    want = normalise(validation_pixels(image.crop((0, 0, 50, 39)), image_size=32, val_resize=36))
    loader = Loader(scan_folder(tmp_path), config, training=False, batch_size=4, device=torch.device("cpu"))
    (batch,) = loader
    assert np.abs(batch.images[3].permute(1, 2, 0).numpy() - want).max() * 58 < 1.6
