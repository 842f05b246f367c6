"""Packed images: a few large files, the shards, in place of many small ones, and an index that finds image i in them.

A packed split is a folder with `pack.json` (written last, so that a folder that has one is whole), `index.npz` and
`shard-00000.bin` and so on: encoded images, one after another, in an order drawn at packing. Where an image lies has nothing to
do with when it is read: the index is in the order of the folder that was packed, so a seed gives the order that it gives there.
Written by pack.py. No torch, no DALI.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.listed import ListedImages, Where, read_range
from fasttricks.system.files import write_whole

MANIFEST, INDEX, PLAN = "pack.json", "index.npz", "packing.json"
FORMAT = 1
_COLUMNS = {"shard": np.uint32, "offset": np.uint64, "length": np.uint32, "crc": np.uint32, "label": np.uint32}
REPACK = "copy it again from where it is whole, or pack the images anew into another folder"


@dataclass(frozen=True)
class PackedImages(ListedImages):
    """The images of one packed split, in the order of the folder that was packed.

    `bad`: could not be read or were in the quarantine list when they were packed; 0 bytes here.
    """

    shards: tuple[str, ...]
    index: dict[str, NDArray[Any]]
    """Columns shard, offset, length and crc (zlib's crc32), an entry an image."""
    altered: str = ""
    """How the images differ from those of the folder, such as a short side of 256 pixels; empty: byte for byte the same."""
    _open: dict[int, int] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def locate(self, index: int) -> Where:
        """The shard, first byte and length of image `index`."""
        shard, start, length = (int(self.index[column][index]) for column in ("shard", "offset", "length"))
        return Where(f"{self.root}{os.sep}{self.shards[shard]}", start, length)

    def read(self, index: int) -> bytes:
        """The encoded image `index`. From any thread. Raises OSError, also where its checksum says that it is damaged.

        Shards stay open. The checksum costs 0.27 ms a megabyte.
        """
        shard, start, length, crc = (int(self.index[name][index]) for name in ("shard", "offset", "length", "crc"))
        content = read_range(self._descriptor(shard), start, length)
        if len(content) < length or zlib.crc32(content) != crc:
            place = f"bytes {start} to {start + length} of {self.shards[shard]}"
            raise OSError(errno.EIO, f"{place} fail their checksum: the shard is damaged; {REPACK}")
        return content

    def fingerprint(self) -> str:
        """That of the folder that was packed, where the images are its own byte for byte, so that a run may change over."""
        same = super().fingerprint()
        return same + (hashlib.blake2b(self.altered.encode(), digest_size=4).hexdigest() if self.altered else "")

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._open:
                self._open[shard] = os.open(self.root / self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            return self._open[shard]

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def is_packed(folder: Path) -> bool:
    """Whether a packed split lies there, or a part of one."""
    return any(os.path.exists(folder / name) for name in (MANIFEST, PLAN))


def open_packed(root: Path, *, classes: tuple[str, ...] | None = None) -> PackedImages:
    """The packed split at `root`, its labels in the order of `classes` where given.

    Raises DataError for one that is not finished, of another format, that lacks a file or has one of another size, whose
    index is damaged, or that has a class which `classes` lacks. Cost: reads the index, 60 bytes an image, not the images.
    """
    if not (root / MANIFEST).exists():
        raise DataError(f"{root}: packing is not finished; give the same `prepare pack` command again, it goes on")
    try:
        manifest = json.loads((root / MANIFEST).read_text())
        version, known, shards, digest = (manifest[key] for key in ("format", "classes", "shards", "index_digest"))
        bad = {int(number): why for number, why in manifest["bad"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{root / MANIFEST}: damaged ({error!r}); {REPACK}") from error
    if version != FORMAT:
        raise DataError(f"{root}: packed in format {version}, this release reads {FORMAT}; pack the images anew")
    for name, size in shards.items():
        found = (root / name).stat().st_size if (root / name).exists() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes of {size}"
            raise DataError(f"{root / name}: {state}; {REPACK}")
    files, columns = _read_index(root / INDEX, digest)
    labels = columns.pop("label")
    if classes is not None:
        strangers = sorted(set(known) - set(classes))
        if strangers:
            raise DataError(
                f"{root}: class {', '.join(strangers[:5])} has no counterpart in train; pack both from one folder"
            )
        number = {name: label for label, name in enumerate(classes)}
        labels = np.array([number[name] for name in known], np.uint32)[labels]
        known = classes
    named = root, tuple(known), files, tuple(labels.tolist())
    return PackedImages(*named, tuple(shards), columns, str(manifest["altered"]), bad=bad)


def write_index(path: Path, files: list[str], columns: dict[str, NDArray[Any]]) -> str:
    """Write the index of a split, whole or not at all. Returns its digest."""
    names = np.frombuffer(os.fsencode("\0".join(files)), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, names=names, **{name: columns[name].astype(kind) for name, kind in _COLUMNS.items()})  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())
    return hashlib.blake2b(buffer.getvalue(), digest_size=16).hexdigest()


def _read_index(path: Path, digest: str) -> tuple[tuple[str, ...], dict[str, NDArray[Any]]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {REPACK}") from error
    if hashlib.blake2b(content, digest_size=16).hexdigest() != digest:
        raise DataError(f"{path}: {len(content)} bytes that fail their checksum: the index is cut or damaged; {REPACK}")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        columns = {name: arrays[name] for name in _COLUMNS}
        names = arrays["names"].tobytes()
    return tuple(os.fsdecode(names).split("\0")), columns
