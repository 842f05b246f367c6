"""The scan for damaged files: every one found, none falsely, within its time; and what no scan can find, counted."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttricks.commands import data as prepare
from fasttricks.config import DataConfig
from fasttricks.data.packing.scan import list_files, scan_files
from fasttricks.data.packing.verdict import why_damaged
from fasttricks.data.sources.folder import ImageFolder, scan_folder
from lib.images import FULL, KINDS, encoded, put, smooth
from lib.tiny import call

LIMIT = DataConfig().max_pixels


def scan_data(jpeg: bytes) -> int:
    """Where the scan of a JPEG begins that has one."""
    start = jpeg.rindex(b"\xff\xda")
    return start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")


def cut(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing, from somewhere in the scan on."""
    return jpeg[: rng.integers(scan_data(jpeg), len(jpeg) - 2)]


def ended(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """The same, and the end marker after it, as a program that repairs headers leaves it: silent in PIL and DALI."""
    return jpeg[: rng.integers(scan_data(jpeg), len(jpeg) - 40)] + b"\xff\xd9"


def lost_half(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """Half of the scan is missing in the middle, as where blocks of a disk are lost: silent too."""
    start = scan_data(jpeg)
    quarter = (len(jpeg) - start) // 4
    at = int(rng.integers(start, start + quarter))
    return jpeg[:at] + jpeg[at + 2 * quarter :]


def no_header(jpeg: bytes, rng: np.random.Generator) -> bytes:
    return jpeg[: rng.integers(0, jpeg.index(b"\xff\xda"))]


def no_start(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """The first block of 512 bytes is zeros."""
    return bytes(512) + jpeg[512:]


def marker(jpeg: bytes, rng: np.random.Generator) -> bytes:
    """A marker in the scan that does not belong there: another frame's header."""
    at = int(rng.integers(scan_data(jpeg), len(jpeg) - 100))
    return jpeg[:at] + b"\xff\xc0" + jpeg[at + 2 :]


FOUND = (cut, ended, lost_half, no_header, no_start, marker)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet_samples", "cifar10"])
def test_every_damaged_file_is_found_and_none_falsely(name: str, real_jpegs: Callable[[str, int], list[bytes]]) -> None:
    """500 real JPEGs as they are, and each damaged in one of six ways in turn."""
    rng, files = np.random.default_rng(0), real_jpegs(name, 500)
    assert len(files) == 500
    for number, file in enumerate(files):
        reason = why_damaged(file, LIMIT)
        assert not reason, (number, reason)
        damage = FOUND[number % len(FOUND)]
        assert why_damaged(damage(file, rng), LIMIT), (number, damage.__name__)
    # by turns, as what else runs on the core counts too
    turns = [(seconds_an_image(files, LIMIT), seconds_an_image(files)) for _ in range(3)]
    print(
        f"{name}: {1000 * min(ours for ours, _ in turns):.2f} ms an image, by PIL {1000 * min(pil for _, pil in turns):.2f}"
    )
    assert any(ours < pil for ours, pil in turns), "it decodes luma alone, PIL all"


def seconds_an_image(files: list[bytes], limit: int = 0) -> float:
    """Of this process's time: to scan them, or, without a limit, to decode them by PIL."""
    start = time.process_time()
    for file in files[:200]:
        if limit:
            assert not why_damaged(file, limit)
        else:
            Image.open(io.BytesIO(file)).load()
    return (time.process_time() - start) / 200


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet_samples", "cifar10"])
def test_how_much_of_what_leaves_a_valid_scan_is_found(
    name: str, real_jpegs: Callable[[str, int], list[bytes]]
) -> None:
    """Bytes overwritten in the scan are found only where what they make is no scan of the right length. Printed."""
    rng = np.random.default_rng(0)
    files = real_jpegs(name, 500)
    for size in (1, 16, 128, 512):
        found = 0
        for file in files:
            at = int(rng.integers(scan_data(file), max(scan_data(file) + 1, len(file) - 2 - size)))
            end = min(at + size, len(file) - 2)
            found += (
                why_damaged(file[:at] + rng.integers(0, 256, end - at, np.uint8).tobytes() + file[end:], LIMIT) != ""
            )
        print(f"{name}: of 500 with {size} random bytes in the scan, {found} are found")
        assert found > (100 if size > 1 else 20)


def test_every_flipped_byte_of_a_png_is_found_but_in_its_end() -> None:
    """Those of the pixels' own checksum too; not all of the last chunk, IEND, which has nothing to say."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)).save(buffer, "PNG")
    png = buffer.getvalue()
    assert why_damaged(png, LIMIT) == ""
    for at in range(8, len(png) - 12):
        assert why_damaged(png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :], LIMIT), at


def test_kinds(tmp_path: Path) -> None:
    """Those that training replaces, and the silent damage that it cannot see; not one of the odd files that decode."""
    for number, kind in enumerate(KINDS.values()):
        folder = tmp_path / f"{number:02d}"
        (folder / FULL[0]).mkdir(parents=True)
        (folder / FULL[0] / FULL[1]).touch()
        put(folder, kind)
    crc = bytearray(encoded(smooth("RGB"), "PNG"))
    crc[-20] ^= 1  # in the checksum of the pixels: decoders do not look
    (tmp_path / "checksum.png").write_bytes(crc)
    files = list_files(tmp_path)
    count, bad = scan_files(tmp_path, files, workers=2, max_pixels=LIMIT, advance=lambda n: None)
    expected = [f"{n:02d}/b/{kind.name}" for n, kind in enumerate(KINDS.values()) if kind.reason]
    expected = [
        name for name in expected if not (tmp_path / name).is_dir()
    ]  # training names it; here it is walked into
    silent = f"{list(KINDS).index('damaged scan'):02d}/b/2.jpg"
    assert sorted(bad) == sorted([*expected, silent, "checksum.png"])
    assert count == len(files)
    assert "damaged or cut off: " in bad[silent]


def test_the_command_writes_the_list_that_training_honours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    for number in range(8):
        path = root / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(smooth("RGB", shift=number)))
    assert call(prepare.main, "scan", str(root), "--workers", "1") == 0
    assert capsys.readouterr().out == "all 8 images are good\n"
    assert not (root / "quarantine.jsonl").exists()
    odd = os.fsdecode(b"line\n\xff.jpg")
    (root / "train" / "b" / odd).write_bytes(KINDS["damaged scan"].make())  # type: ignore[operator, call-arg]
    (root / "train" / "a" / "notes.txt").write_text("no image, and not named as one")
    assert call(prepare.main, "scan", str(root), "--workers", "1") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(r"train/b/line\n\udcff.jpg: damaged or cut off: ")
    assert shown[1] == f"1 of 9 images are bad; listed in {root}/quarantine.jsonl"
    lines = (root / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == [f"train/b/{odd}"]
    (root / "train" / "a" / "notes.txt").unlink()
    folder: ImageFolder = scan_folder(root / "train")
    assert [folder.files[index] for index in folder.bad] == [f"b/{odd}"]
    assert "quarantined: damaged or cut off: " in next(iter(folder.bad.values()))
    (root / "train" / "b" / odd).unlink()
    assert call(prepare.main, "scan", str(root), "--workers", "1") == 0
    assert not (root / "quarantine.jsonl").exists(), "the old list is replaced"


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_file_that_ends_the_process_is_bad_and_the_others_are_scanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a decoder would that writes where it must not. Forked here, so that the workers have the stand-in too."""
    for number in range(12):
        (tmp_path / f"{number:02d}.jpg").write_bytes(b"end" if number == 7 else KINDS["grey"].make)  # type: ignore[arg-type]
    (tmp_path / "11.jpg").write_bytes(b"text")

    def decode(file: bytes, max_pixels: int) -> str:
        return os._exit(1) if file == b"end" else why_damaged(file, max_pixels)

    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr("fasttricks.data.packing.pool.CONTEXT", forked)
    monkeypatch.setattr("fasttricks.data.packing.scan.why_damaged", decode)
    monkeypatch.setattr("fasttricks.data.packing.scan._CHUNK", 4)
    done: list[int] = []
    count, bad = scan_files(tmp_path, list_files(tmp_path), workers=2, max_pixels=LIMIT, advance=done.append)
    assert (count, sum(done)) == (12, 12)
    assert list(bad) == ["07.jpg", "11.jpg"]
    assert bad["07.jpg"] == "ends the process that decodes it"


def test_what_is_asked_wrongly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(prepare.main, "scan") == 2
    assert "scan needs DIR: python -m fasttricks.data.prepare scan DIR" in capsys.readouterr().err
    assert call(prepare.main, "scan", str(tmp_path / "nowhere")) == 2
    assert "nowhere: no such folder; give the folder that holds train/ and val/" in capsys.readouterr().err
    assert call(prepare.main, "scan", str(tmp_path)) == 2
    assert "no image below it" in capsys.readouterr().err
    assert call(prepare.main, "scan", str(tmp_path), "--workers", "-1") == 2
    assert "workers = -1: must be 0 (as many as cores) to 1024" in capsys.readouterr().err


def test_links_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "self.jpg").symlink_to("self.jpg")
    assert list_files(tmp_path) == ["a/1.jpg", "a/self.jpg"]
