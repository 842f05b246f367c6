"""Many files, many classes, many bad ones: what each costs grows with their number, and not with its square."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fasttricks.config import DataConfig
from fasttricks.data.pipeline.stand_ins import StandIns
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.packed import FORMAT, INDEX, MANIFEST, open_packed, write_index
from fasttricks.data.sources.quarantine import write_quarantine
from fasttricks.data.sources.table import read_table
from fasttricks.data.sources.webdataset import open_webdataset
from fasttricks.system.progress import counted
from lib.layouts import tar_of

HEADER = b"\xff\xd8\xff\xe0" + bytes(20)
"""What listing reads of a JPEG."""


def link_names(folder: Path, file: Path, count: int) -> None:
    """`count` names of one file: a tenth of what so many files cost."""
    folder.mkdir(parents=True)
    for number in range(count):
        os.link(file, f"{folder}/{folder.name}_{number}.JPEG")


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("strays", ["one text file", "all quarantined", "half text"])
def test_stray_and_bad_files_cost_no_more_than_others(strays: str, tmp_path: Path) -> None:
    """Of 5,000 in a class: 3.3 s with one stray file among them where a set is made a file, and 0.03 s where it is not."""
    (tmp_path / "one").write_bytes(HEADER)
    link_names(tmp_path / "train" / "a", tmp_path / "one", 5000)
    if strays == "one text file":
        (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    elif strays == "half text":
        (tmp_path / "text").write_text("no image")
        for number in range(2500):
            os.link(tmp_path / "text", tmp_path / "train" / "a" / f"{number}.txt")
    else:
        write_quarantine(tmp_path, {f"train/a/a_{number}.JPEG": "x" for number in range(1, 5000)})
    assert cpu_seconds(lambda: scan_folder(tmp_path / "train")) < 1.5


def test_tables_and_tars_cost_no_more_for_many_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 rows of 1,000 classes; 2,000 samples, of which a list quarantines most."""
    rows = [f"images/{number}.JPEG,c{number % 1000},{('train', 'val')[number % 2]}\n" for number in range(20_000)]
    (tmp_path / "images.csv").write_text("path,label,split\n" + "".join(rows))
    assert cpu_seconds(lambda: read_table(tmp_path / "images.csv")) < 2
    samples = [
        (f"{number}.{kind}", b"7" if kind == "cls" else HEADER) for number in range(2000) for kind in ("cls", "jpg")
    ]
    (tmp_path / "train.tar").write_bytes(tar_of(samples))
    write_quarantine(tmp_path, {f"train/7/{number}.jpg": "x" for number in range(1, 2000)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu_seconds(lambda: open_webdataset(DataConfig(root=str(tmp_path)), "train", None)) < 2


def write_pack(root: Path, classes: int) -> Path:
    """A packed split of an image of one byte a class."""
    root.mkdir()
    names = [f"n{number:08d}" for number in range(classes)]
    (root / "shard-00000.bin").write_bytes(bytes(classes))
    zeros, places = np.zeros(classes), np.arange(classes)
    columns = {"shard": zeros, "offset": places, "length": zeros + 1, "crc": zeros, "label": places}
    digest = write_index(root / INDEX, [f"{name}/1.JPEG" for name in names], columns)
    plan = {"images": classes, "files": "0" * 16, "encoder": "none"}
    manifest = {"format": FORMAT, "classes": names, "shards": {"shard-00000.bin": classes}, "index_digest": digest}
    manifest |= {"altered": "", "bad": {}, "troubles": {}, "plan": plan}
    (root / MANIFEST).write_text(json.dumps(manifest))
    return root


def test_a_pack_of_21841_classes_opens_at_once(tmp_path: Path) -> None:
    """It took 5.7 s, and takes 0.1 s."""
    root = write_pack(tmp_path / "train", 21_841)
    train = open_packed(root)
    assert cpu_seconds(lambda: open_packed(root, classes=train.classes)) < 1.5
    assert open_packed(root, classes=tuple(reversed(train.classes))).labels == tuple(reversed(train.labels))


# ----------------------------------------------------------------------------------------------------------- stand-ins
def stand_in(labels: np.ndarray, bad: set[int], place: int) -> int | None:
    """As docs/data.md says it: the next of its class, round, then the next of all, round."""
    everywhere = [*range(place + 1, len(labels)), *range(place)]
    mates = [image for image in everywhere if labels[image] == labels[place]]
    return next((image for image in [*mates, *everywhere] if image not in bad), None)


@pytest.mark.parametrize("seed", range(20))
def test_who_stands_in(seed: int) -> None:
    """Of labels in any order, as more and more images turn bad, until all are."""
    draws = np.random.default_rng(seed)
    labels, bad = draws.integers(0, draws.integers(1, 6), 30), set()
    found = StandIns(labels)
    for image in draws.permutation(30).tolist():
        found.mark(image)
        bad.add(image)
        for place in bad:
            assert found.after(place) == stand_in(labels, bad, place)


@pytest.mark.parametrize("many_in_one_class", [False, True])
def test_an_epoch_with_one_bad_image_in_a_hundred_costs_seconds(many_in_one_class: bool) -> None:
    """Of 400,000 in 1000 classes, bad ones all over and half of them in one class: found beforehand, and met anew."""
    count = 400_000
    labels = np.arange(count) * 1000 // count
    bad = np.arange(0, count, 100)
    if many_in_one_class:
        labels[:60_000] = 0
        bad = np.concatenate([np.arange(2000), bad[2000:]])
    found = StandIns(labels)
    [found.mark(image) for image in bad.tolist()]
    assert cpu_seconds(lambda: [found.after(image) for image in bad.tolist()]) < 2
    anew = StandIns(labels)
    assert cpu_seconds(lambda: [(anew.mark(image), anew.after(image)) for image in bad[::10].tolist()]) < 4


# ------------------------------------------------------------------------------------------------------------ the whole
def test_a_bar_is_shown_after_two_seconds_and_on_a_terminal_alone() -> None:
    """Under any name: none is read as rich's markup."""

    def shown(*, terminal: bool, after: float, rank: str = "0") -> str:
        text = StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setenv("WORLD_SIZE", "2")
            patch.setenv("MASTER_ADDR", "127.0.0.1")
            patch.setenv("MASTER_PORT", "29500")
            console = Console(file=text, force_terminal=terminal, quiet=rank != "0")
            with counted("list [/train]", 7, console, after=after) as advance:
                advance(3)
                advance(4)
        return text.getvalue()

    assert "list [/train]" in shown(terminal=True, after=0) and "7/7" in shown(terminal=True, after=0)
    assert (
        shown(terminal=True, after=60)
        == shown(terminal=False, after=0)
        == shown(terminal=True, after=0, rank="1")
        == ""
    )


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder of a tmpfs with room for 1.4 million names."""
    place = Path("/dev/shm")
    if not place.is_dir() or os.statvfs(place).f_ffree < 1_400_000:
        pytest.skip("needs a tmpfs at /dev/shm with 1.4 million inodes free")
    folder = Path(tempfile.mkdtemp(prefix="fasttricks-", dir=place))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_1300000_names_in_21841_classes(memory_folder: Path, record_property: Callable[[str, object], None]) -> None:
    """Names of one file on a tmpfs: each is listed, opened and read. In a process of its own, for its memory."""
    count, classes = 1_300_000, 21_841
    (memory_folder / "one").write_bytes(HEADER)
    for label in range(classes):
        share = count * (label + 1) // classes - count * label // classes
        link_names(memory_folder / "train" / f"n{label:08d}", memory_folder / "one", share)
    code = """
import re, sys, time
from fasttricks.data.sources.folder import scan_folder
before, start = time.process_time(), time.monotonic()
images = scan_folder(sys.argv[1])
images.fingerprint()
peak = int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024  # ru_maxrss outlives exec
print(len(images), len(images.classes), time.process_time() - before, time.monotonic() - start, peak)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code, str(memory_folder / "train")], capture_output=True, text=True, check=True
    )
    found, known, cpu, wall, megabytes = map(float, shown.stdout.split())
    figures = f"{cpu:.1f} CPU s, {wall:.1f} s by the clock, {megabytes:.0f} MB"
    record_property("figures", figures)
    assert (found, known) == (count, classes)
    assert cpu < 20, figures  # the clock runs for what else is on the cores
    assert megabytes < 1000, figures
