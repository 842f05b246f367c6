"""The threads that read a rank's files: enough for a disk that answers late, and no more decoding, or bytes, at once for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fasttricks.config import DataConfig
from fasttricks.data.pipeline import feed as module
from fasttricks.data.pipeline.feed import Feed, Job
from fasttricks.data.pipeline.shards import Shards
from lib.images import encoded, smooth

JPEG = encoded(smooth("RGB", (16, 16)), "JPEG")


@dataclass
class Slow:
    """A source of equal images, each of which a disk gives after a while; it counts who is at it."""

    seconds: float = 0.0
    count: int = 100_000
    waits_for: int = 1
    """So many readers are at it at once before any gets its file."""
    now: int = 0
    most: int = 0
    read_so_far: int = 0
    root: Path = Path("/disk")
    classes: tuple[str, ...] = ("a", "b")
    bad: dict[int, str] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def labels(self) -> list[int]:
        return [i % 2 for i in range(self.count)]

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        with self.changed:
            self.now += 1
            self.read_so_far += 1
            self.most = max(self.most, self.now)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most >= self.waits_for, timeout=20)
        time.sleep(self.seconds)
        with self.changed:
            self.now -= 1
        return JPEG

    def name(self, index: int) -> str:
        return str(index)


@contextmanager
def jobs(source: Slow, batch_size: int = 128, **config: int) -> Iterator[Iterator[Job]]:
    shards = Shards(num_images=len(source), batch_size=batch_size, world_size=1, source="")
    feed = Feed(source, shards, DataConfig(**config), training=True, seed=0, rank=0)  # type: ignore[arg-type]
    made = feed.jobs(0, 0)
    try:
        yield made
    finally:
        made.close()  # type: ignore[attr-defined]
        feed._pool.shutdown(cancel_futures=True)


def images_per_second(**config: int) -> float:
    with jobs(Slow(seconds=0.005), **config) as made:
        next(made)
        start = time.perf_counter()
        return sum(len(next(made).encoded) for _ in range(8)) / (time.perf_counter() - start)


def test_by_default_a_disk_that_answers_in_5_ms_gives_3500_images_a_second() -> None:
    """The best of a few tries: what a busy machine takes away is not the readers'. Four of them give at most 800."""
    assert any(images_per_second() >= 3500 for _ in range(10))
    assert images_per_second(readers=4) <= 4 / 0.005 * 1.1


@pytest.mark.parametrize("batch_size", [128, 8])
def test_as_many_files_are_asked_for_at_once_as_there_are_readers(batch_size: int) -> None:
    """Of small batches too, several of which are read ahead."""
    source = Slow(waits_for=24)
    with jobs(source, batch_size, threads=1) as made:
        for _ in range(6):
            next(made)
    assert source.most == 24


def test_threads_bound_the_decoding_not_the_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of two cores has 24 readers that wait for a disk, and two of them at work."""
    now, most, lock = 0, 0, threading.Lock()
    decodable = module.decodable

    def counting(file: bytes, max_pixels: int) -> bytes:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return decodable(file, max_pixels)

    monkeypatch.setattr(module, "decodable", counting)
    source = Slow(waits_for=24)
    with jobs(source, threads=2) as made:
        assert [len(next(made).encoded) for _ in range(3)] == [128] * 3
    assert (source.most, most) == (24, 2)


@pytest.mark.parametrize("readers", [1, 24, 200])
def test_readers_read_no_further_ahead(readers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five batches at most, where those are large one: the files that a rank holds do not depend on its readers."""
    for ahead_bytes, ahead in ((1 << 30, module.READ_AHEAD), (1, 1)):
        monkeypatch.setattr(module, "AHEAD_BYTES", ahead_bytes)
        source = Slow()
        with jobs(source, 32, readers=readers) as made:
            for taken in range(1, 12):
                next(made)
                time.sleep(0.002)
                assert source.read_so_far <= 32 * max(taken + ahead, 1 + module.READ_AHEAD)
        assert source.most <= readers
