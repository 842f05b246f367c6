"""Pack a folder of images into shards (packed.py): re-encoded smaller where asked, several processes, resumable.

Workers read and encode; this process writes their results in the order drawn from the seed, so the shards do not depend on the
number of workers. A shard gets its name when it is whole and on the disk; images packed before a kill are not packed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from fasttricks.config import Range, check_fields
from fasttricks.data.packing.pool import stopping, worker_pool
from fasttricks.data.packing.reencode import QUALITY, Packed, encode
from fasttricks.data.sources import Source
from fasttricks.data.sources.columns import read_columns
from fasttricks.data.sources.decode import quiet_pillow
from fasttricks.data.sources.errors import DataError, why_unreadable
from fasttricks.data.sources.listed import Where, is_numbered, read_at
from fasttricks.data.sources.packed import (
    BAD,
    FORMAT,
    INDEX,
    MANIFEST,
    PLAN,
    PLANS,
    PackedImages,
    open_packed,
    read_manifest,
    shard_name,
    write_index,
)
from fasttricks.system.files import write_whole
from fasttricks.system.ownership import Claim, InUseError
from fasttricks.system.reading import Reader, is_there, parse_json
from fasttricks.system.schema import fields, table, text

_LOCK = ".lock"
_PLANS = Reader(DataError, "damaged, or no plan of a pack", "remove the folder and pack again")
_AGAIN = "remove it and its shard, and give the same command again: it packs that shard again"
_RECORDS = Reader(DataError, "damaged, or no record of a shard", _AGAIN, max_bytes=1 << 28)
_RECORD = {"offset": np.int64, "length": np.int64, "crc": np.int64, "notes": np.uint8}
_NOTES = fields({"bad": BAD, "troubles": table(text(10_000))})
_BEFORE = {"max_pixels": 100_000_000}
"""The meaning of a plan that was written before it had the field."""
_CHUNK = 16
"""Images a task of a worker: handing one over costs 0.1 ms."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How to pack. The stored bytes depend on these alone, not on the number of workers."""

    short_side: Annotated[int, Range(32, zero="keep their size", unit="pixels", note="256 to 512 are usual")] = 0
    """Shrink images whose short side is longer to this (256 to 512 are usual)."""
    quality: Annotated[int, Range(1, 100, zero="90 where images shrink")] = 0
    """JPEG quality; 0: 90 where images shrink, else their bytes unchanged."""
    shard_images: Annotated[int, Range(1)] = 4096
    """Images a shard. A kill loses one shard at most."""
    seed: Annotated[int, Range(0, 2**63, below=True)] = 0
    """Seed of the order in which images are stored. The order of training does not depend on it."""
    workers: Annotated[int, Range(0, 1024, zero="one a CPU core")] = 0
    """Processes that read and encode."""
    max_pixels: Annotated[int, Range(1, unit="pixels")] = 100_000_000
    """Larger images, by the size in their header, are stored unchanged and named; training refuses them by data.max_pixels."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, config: PackConfig) -> PackConfig:
        """How to pack, without the place that a command's `config` has besides."""
        return PackConfig(**{name: getattr(config, name) for name in PackConfig.__dataclass_fields__})

    @property
    def altered(self) -> str:
        """The change of the images, in words; empty: none."""
        if not self.short_side and not self.quality:
            return ""
        side = f"short side at most {self.short_side} pixels, " if self.short_side else ""
        return f"{side}JPEG quality {self.quality or QUALITY}"


class Report(NamedTuple):
    """The result of packing a split."""

    images: PackedImages
    bytes: int
    troubles: dict[str, str]
    """Images that training will not use, name -> why: left out as they cannot be read, or stored as they are."""


def pack_split(source: Source, out: Path, config: PackConfig, advance: Any = lambda count: None) -> Report:
    """Pack `source` into the folder `out`, or finish an earlier call's work. `advance(n)` is called as n images are done.

    The order stays that of the folder whatever an image is: one that is bad in `source` or cannot be read is stored as 0 bytes
    and bad in the pack too; one that training cannot use is stored as it is. Both are reported. Raises DataError for a folder
    that holds something else, a pack of other images or settings, one that is being packed, a full disk.
    """
    plan = _plan(source, config)
    with _claimed(out, plan):
        if is_there(out / MANIFEST):
            advance(len(source))
            return _report(out)
        order = np.random.default_rng(config.seed).permutation(len(source))
        parts = [order[start : start + config.shard_images] for start in range(0, len(order), config.shard_images)]
        columns = {name: np.zeros(len(source), np.uint64) for name in ("shard", "offset", "length", "crc")}
        bad: dict[str, str] = {}
        troubles: dict[str, str] = {}
        with _Workers(config) as workers:
            for number, part in enumerate(parts):
                if not is_there(out / shard_name(number)):
                    _write_shard(source, out, number, part, workers, advance)
                else:
                    advance(len(part))
                record, notes = _read_record(out / _record(number), len(part))
                for name, column in record.items():
                    columns[name][part] = column
                columns["shard"][part] = number
                bad |= notes["bad"]
                troubles |= notes["troubles"]
        columns["label"] = np.asarray(source.labels)
        shards = {shard_name(n): (out / shard_name(n)).stat().st_size for n in range(len(parts))}
        manifest = {
            "format": FORMAT,
            "classes": source.classes,
            "numbered": is_numbered(source),
            "shards": shards,
            "index_digest": write_index(out / INDEX, [source.name(index) for index in range(len(source))], columns),
            "altered": config.altered,
            "bad": bad,
            "troubles": troubles,
            "plan": plan,
        }
        write_whole(out / MANIFEST, json.dumps(manifest, indent=1).encode())
        for leftover in (PLAN, *map(_record, range(len(parts)))):
            (out / leftover).unlink()
        return _report(out)


class _Workers:
    """Processes that read and encode, or threads where bytes are only copied; a bound on how far they run ahead."""

    def __init__(self, config: PackConfig) -> None:
        self._settings = config.short_side, config.quality, config.max_pixels
        self._count = config.workers or len(os.sched_getaffinity(0))
        self._processes = bool(config.altered)
        self._kept = contextlib.ExitStack()

    def __enter__(self) -> _Workers:
        pool = worker_pool(self._count) if self._processes else ThreadPoolExecutor(self._count)
        self._pool: Executor = self._kept.enter_context(pool)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._kept.__exit__(kind, error, at)

    def encoded(self, places: list[Where | str]) -> Iterator[Packed]:
        """The images at `places`, in that order; a str there says why there is none."""
        ahead: deque[Future[list[Packed]]] = deque()
        for start in range(0, len(places), _CHUNK):
            ahead.append(self._pool.submit(_work, places[start : start + _CHUNK], *self._settings))
            if len(ahead) > 4 * self._count:
                yield from ahead.popleft().result()
        for future in ahead:
            yield from future.result()


def _work(places: list[Where | str], *settings: int) -> list[Packed]:
    quiet_pillow()
    return [_pack_one(place, *settings) for place in places if not stopping()]


def _pack_one(place: Where | str, short_side: int, quality: int, max_pixels: int) -> Packed:
    """The image there; a str says why there is none."""
    if isinstance(place, str):
        return Packed(b"", 0, bad=place)
    try:
        content = read_at(place)
    except OSError as error:
        return Packed(b"", 0, bad=why_unreadable(error))
    return encode(content, short_side, quality, max_pixels)


def _write_shard(
    source: Source, out: Path, number: int, part: NDArray[np.int64], workers: _Workers, advance: Any
) -> None:
    """Write shard `number`, the images `part`, and the record of its contents."""
    notes: dict[str, dict[str, str]] = {"bad": {}, "troubles": {}}
    lengths, crcs = [], []
    temporary = out / f".{shard_name(number)}.part"
    try:
        with open(temporary, "wb", buffering=1 << 20) as file:
            images = workers.encoded([source.bad.get(index) or source.locate(index) for index in part.tolist()])
            for index, image in zip(part.tolist(), images, strict=True):
                file.write(image.content)
                lengths.append(len(image.content))
                crcs.append(image.crc)
                if image.bad:
                    notes["bad"][str(index)] = image.bad
                if image.bad or image.trouble:
                    notes["troubles"][source.name(index)] = image.bad or image.trouble
                advance(1)
            file.flush()
            os.fsync(file.fileno())
        record = io.BytesIO()
        offsets = np.cumsum([0, *lengths[:-1]])
        text = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        np.savez(record, offset=offsets, length=np.array(lengths), crc=np.array(crcs), notes=text)
        write_whole(out / _record(number), record.getvalue())
        os.replace(temporary, out / shard_name(number))
    except BrokenProcessPool as error:
        rule = "a worker process died, perhaps out of memory; give fewer --workers"
        raise DataError(f"{out}: {rule}; the same command continues where it stopped") from error
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        trouble = f"{error.filename or out}: {error.strerror or error}"
        raise DataError(f"{trouble}; correct that and repeat the command: it continues at shard {number}") from error


def _plan(source: Source, config: PackConfig) -> dict[str, Any]:
    """The inputs of a pack; a resumed one must have the same."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "workers"}
    encoder = f"Pillow {PIL.__version__}" if config.altered else "none"
    return {"images": len(source), "files": source.fingerprint(), **settings, "encoder": encoder}


@contextlib.contextmanager
def _claimed(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """`out` made for this plan, or found to be of it; no other process packs into it during the block."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror}); give another OUT") from error
    try:
        claim = Claim(out / _LOCK)
    except InUseError as error:
        raise DataError(f"{out}: {error}, or give another OUT") from error
    except OSError as error:
        raise DataError(f"{out}: cannot be written to ({error.strerror}); give another OUT") from error
    with claim:
        known = next((out / name for name in (MANIFEST, PLAN) if is_there(out / name)), None)
        if known is not None:
            _same_plan(known, plan)
        elif any(not entry.name.startswith((_LOCK, f".{PLAN}")) for entry in out.iterdir()):  # else of a killed start
            raise DataError(f"{out}: holds something other than a pack; give an empty folder or a new one")
        else:
            write_whole(out / PLAN, json.dumps(plan).encode())
        yield


def _same_plan(known: Path, plan: dict[str, Any]) -> None:
    saved = read_manifest(known.parent)["plan"] if known.name == MANIFEST else _PLANS.json(known, PLANS)
    differing = [name for name in plan if saved.get(name, _BEFORE.get(name)) != plan[name]]
    if differing:
        name = differing[0]
        was = f"was packed with {name} = {saved.get(name)!r:.100}, now {plan[name]!r}"
        raise DataError(f"{known.parent}: {was}; give the same, or another OUT")


def _read_record(path: Path, images: int) -> tuple[dict[str, NDArray[np.int64]], dict[str, dict[str, str]]]:
    """(columns, bad files and troubles) of a shard of so many images. Raises DataError for another."""
    content = _RECORDS.read(path)
    try:
        columns = read_columns(content, _RECORD)
        notes: dict[str, dict[str, str]] = parse_json(columns.pop("notes").tobytes(), _NOTES)
        short = next((name for name, column in columns.items() if len(column) != images), None)
        if short is not None:
            raise ValueError(f"column {short}: must have {images} numbers, but has {len(columns[short])}")
    except ValueError as error:
        raise _RECORDS.refusal(path, error) from error
    return columns, notes


def _report(out: Path) -> Report:
    manifest = read_manifest(out)
    return Report(open_packed(out), sum(manifest["shards"].values()), manifest["troubles"])


def _record(number: int) -> str:
    return f".shard-{number:05d}.npz"
