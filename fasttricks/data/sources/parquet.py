"""Images in Hugging Face's parquet files: train-*.parquet, validation-*.parquet in ROOT or one folder of it (splits.py).

A column holds images as `datasets` writes them, {bytes, path}, or as bytes; another their labels, the numbers of a ClassLabel or
names. Parquet keeps images in compressed pages, of which no image is a range. So their bytes are copied to the cache once,
unchanged, as a pack (packed.py), which every process then reads. No torch, no DALI; pyarrow.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttricks.config import DataConfig
from fasttricks.data.sources.cache import OTHER_CACHE, cached, kept_place, name_of
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import show_names
from fasttricks.data.sources.headers import HEADER_BYTES, why_no_image
from fasttricks.data.sources.labels import LONGEST_NAME, Label, class_name, finished, number_labels, require_unique
from fasttricks.data.sources.listed import LARGEST_IMAGE
from fasttricks.data.sources.packed import FORMAT, INDEX, MANIFEST, PackedImages, open_packed, shard_name, write_index
from fasttricks.data.sources.splits import choose_val, find_shards
from fasttricks.system.extras import missing_extra
from fasttricks.system.files import write_whole
from fasttricks.system.progress import counted
from fasttricks.system.reading import is_there, parse_json, regular_file
from fasttricks.system.schema import anything, fields, listed, table, text

ENDING = ".parquet"
_ROWS = 64
"""Rows that are in memory at a time, beside the pages of a row group."""
_COPY = 1
"""The format of a copy."""
_TOO_LONG = "0.5 GB or more"
_IMAGES, _LABELS = ("image", "img"), ("label", "labels")
_FEATURES = fields({"info": fields({"features": table(anything)})})


class _Columns(NamedTuple):
    """The columns that are read, and the names of the numbers."""

    image: str
    label: str
    names: tuple[str, ...] | None


def is_parquet(config: DataConfig, split: str) -> bool:
    """Whether data.root has parquet files of that split, or of another and no folder ROOT/SPLIT.

    Raises DataError as find_shards.
    """
    found = find_shards(Path(config.root), ENDING, nested=True)
    return bool(found[split]) if split in found else any(found.values())


def parquet_holds(config: DataConfig, split: str) -> bool:
    """Whether data.root has parquet files of that split. Raises DataError as find_shards, and without pyarrow."""
    if missing := missing_extra("parquet", ["pyarrow"], f"data.root = {config.root!r}, which holds parquet files,"):
        raise DataError(missing)
    return bool(_shards(config).get(split))


def open_parquet(config: DataConfig, split: str, classes: tuple[str, ...] | None) -> PackedImages:
    """The images of that split, named CLASS/FILE/ROW, sorted by class, file and row; copied first where the cache lacks them.

    Raises DataError for a file that cannot be read or is damaged, without a column of images or labels, another file's columns or
    names, a null image or label, one whose bytes are elsewhere, a label that is not of the names, a class that `classes` lacks,
    and where the cache has no room.
    Cost: the copy: the disk; memory for a row group. Then as open_packed.
    """
    root, shards = Path(config.root), _shards(config)[split]
    try:
        name = name_of("parquet", root, shards, _COPY)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; bring it back") from error
    if (images := _kept(cached(name, root))) is None:
        with kept_place(name, root) as place:
            images = _kept(place)  # another process may have made it while this one waited
            if images is None:
                _copy(root, split, shards, place)
                images = open_packed(place)
    shards = tuple(os.path.join(images.root, shard) for shard in images.shards)
    return finished(replace(images, root=root / split, shards=shards), root, split, classes)


def _kept(place: Path) -> PackedImages | None:
    """The copy that is there; None where there is none, or one that was damaged since."""
    try:
        return open_packed(place) if is_there(place / MANIFEST) else None
    except DataError as error:
        warnings.warn(f"{error} (it is made again)", stacklevel=2)
        return None


def _shards(config: DataConfig) -> dict[str, tuple[str, ...]]:
    root = Path(config.root)
    found = find_shards(root, ENDING, nested=True)
    return choose_val(root, {split: shards for split, shards in found.items() if shards})


# ------------------------------------------------------------------------------------------------------------- the copy
def _copy(root: Path, split: str, shards: tuple[str, ...], place: Path) -> None:
    """Make `place`, the images of the shards. No other process does so at the same time."""
    for partial in place.parent.glob(f".{place.name}-*"):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    columns, rows, size = _look(root, shards)
    try:
        free = shutil.disk_usage(place.parent).free
        if size > free:
            need = f"a copy of its images takes {size / 1e9:,.1f} GB, and {place.parent} has {free / 1e9:,.1f} GB free"
            raise DataError(
                f"{root}: {need}; free some room, or {OTHER_CACHE}, from which `fasttricks data pack` packs"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            with counted(f"copy {split}", rows, after=2.0) as advance:
                _write(root, split, shards, columns, partial, advance)
            partial.chmod(0o755)  # mkdtemp makes it private
            shutil.rmtree(place, ignore_errors=True)  # damaged
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        wrong = f"a copy of its images cannot be written to {place.parent} ({error.strerror or error})"
        raise DataError(f"{root}: {wrong}; free {size / 1e9:,.1f} GB, or {OTHER_CACHE}") from error


def _look(root: Path, shards: tuple[str, ...]) -> tuple[_Columns, int, int]:
    """(the columns, the same in each file, all rows, about the bytes of all images). Reads no row."""
    found, rows, size = [], 0, 0
    for shard in shards:
        with _opened(root / shard) as file:
            found.append(_find_columns(root / shard, file.schema_arrow))
            if found[-1] != found[0]:
                differing = next(
                    name for name in _Columns._fields if getattr(found[-1], name) != getattr(found[0], name)
                )
                rule = f"has another {differing} than {shards[0]}; all files of a split must have the same columns and names"
                raise DataError(f"{root / shard}: {rule}: write them from one data set")
            rows += file.metadata.num_rows
            for group in range(file.metadata.num_row_groups):
                chunks = file.metadata.row_group(group)
                sizes = [chunks.column(at) for at in range(chunks.num_columns)]
                size += sum(
                    one.total_uncompressed_size for one in sizes if one.path_in_schema.split(".")[0] == found[0].image
                )
    if not rows:
        raise DataError(f"{root / shards[0]}: no rows; give files with images, or remove them")
    return found[0], rows, size


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """pyarrow's ParquetFile of a regular file. Raises DataError where it cannot be read, within the block too."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with regular_file(path), ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        NotImplementedError,
        MemoryError,
        pyarrow.ArrowException,
    ) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"{path}: no parquet, or damaged ({first:.300}); copy it again from an intact place") from error


def _find_columns(path: Path, schema: Any) -> _Columns:
    """The columns of images and labels of a file with this schema. Raises DataError where there is none, or several."""
    features = _features(path, schema)
    images = [column.name for column in schema if _holds_images(column.type)]
    numbers = [
        name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name in schema.names
    ]
    labels = numbers or [column.name for column in schema if column.name in _LABELS and _holds_labels(column.type)]
    image = _the_one(path, schema, "images, {bytes, path} or bytes", images, _IMAGES)
    label = _the_one(path, schema, "labels, a ClassLabel, or numbers or names in a column label", labels, _LABELS)
    if not _holds_labels(schema.field(label).type):
        raise DataError(f"{path}: column {label}: must hold whole numbers or names, and not {schema.field(label).type}")
    names = features.get(label, {}).get("names")
    if names is None:
        return _Columns(image, label, None)
    try:
        listed(text(LONGEST_NAME))(names, "names")
    except ValueError as error:
        raise DataError(f"{path}: column {label}: {error}; write the file again with datasets") from error
    require_unique(names, f"{path}: column {label}")
    return _Columns(image, label, tuple(names))


def _features(path: Path, schema: Any) -> dict[str, dict[str, Any]]:
    """Column -> its description by `datasets`, where there is one."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    try:
        found = parse_json(schema.metadata[b"huggingface"], _FEATURES)["info"]["features"]
    except ValueError as error:
        wrong = f"its metadata huggingface is not as datasets writes it ({error})"
        raise DataError(f"{path}: {wrong}; write the file again") from error
    return {name: feature for name, feature in found.items() if isinstance(feature, dict)}


def _the_one(path: Path, schema: Any, kind: str, found: list[str], preferred: tuple[str, ...]) -> str:
    """The one column of that kind; of several the one that has a preferred name."""
    named = [name for name in found if name in preferred]
    if len(found) != 1 and len(named) != 1:
        several = f"several columns of {kind} ({show_names(found)}); keep one, or rename it to {preferred[0]}"
        none = f"no column of {kind}; it has {show_names([f'{column.name} ({column.type})' for column in schema])}"
        raise DataError(f"{path}: {several if found else none}")
    return found[0] if len(found) == 1 else named[0]


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return bool({"bytes", "path"} == {field.name for field in kind} and _holds_images(kind.field("bytes").type))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_labels(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind))


def _write(
    root: Path, split: str, shards: tuple[str, ...], columns: _Columns, out: Path, advance: Callable[[int], object]
) -> None:
    """Write the images of the shards to `out` as a pack whose order is by class, file and row."""
    places: list[tuple[int, int, int, int]] = []  # shard, offset, length, crc
    labels: list[Label] = []
    first_of = [0]
    why_bad: dict[int, str] = {}
    for number, shard in enumerate(shards):
        offset = 0
        with open(out / shard_name(number), "wb", buffering=1 << 20) as file:
            for content, label in _rows(root / shard, columns):
                if why := why_no_image(content[:HEADER_BYTES]) or (
                    _TOO_LONG if len(content) >= LARGEST_IMAGE else None
                ):
                    why_bad[len(labels)] = why
                    content = b"" if len(content) >= LARGEST_IMAGE else content
                file.write(content)
                places.append((number, offset, len(content), zlib.crc32(content)))
                labels.append(label)
                offset += len(content)
                advance(1)
            file.flush()
            os.fsync(file.fileno())
        first_of.append(len(labels))

    def place_of(at: int) -> str:
        shard = bisect_right(first_of, at) - 1
        return f"{root / shards[shard]}: row {at - first_of[shard]}"

    classes, numbers, numbered = number_labels(labels, columns.names, place_of)
    order = sorted(range(len(labels)), key=lambda at: (classes[numbers[at]], at))
    names = [f"{classes[numbers[at]]}/{shards[places[at][0]]}/{at - first_of[places[at][0]]}" for at in order]
    table = np.array([places[at] for at in order], np.uint64)
    index = {name: table[:, at] for at, name in enumerate(("shard", "offset", "length", "crc"))}
    index["label"] = np.array([numbers[at] for at in order])
    manifest = {
        "format": FORMAT,
        "classes": classes,
        "numbered": numbered,
        "shards": {shard_name(n): (out / shard_name(n)).stat().st_size for n in range(len(shards))},
        "index_digest": write_index(out / INDEX, names, index),
        "altered": "",
        "bad": {str(number): why_bad[at] for number, at in enumerate(order) if at in why_bad},
        "troubles": {},
        "plan": {"images": len(labels), "files": out.name},
    }
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1).encode())


def _rows(path: Path, columns: _Columns) -> Iterator[tuple[bytes, Label]]:
    """(encoded image, label) of each row of the file."""
    row = 0
    with _opened(path) as file:
        kind = file.schema_arrow.field(columns.image).type
        inner = [f"{columns.image}.bytes", f"{columns.image}.path"] if kind.num_fields else [columns.image]
        for group in range(file.metadata.num_row_groups):
            for batch in file.iter_batches(
                _ROWS, row_groups=[group], columns=[*inner, columns.label], use_threads=False
            ):
                images, labels = (batch.column(name).to_pylist() for name in (columns.image, columns.label))
                for image, label in zip(images, labels, strict=True):
                    try:
                        yield _bytes(image), _label(label)
                    except ValueError as error:
                        raise DataError(f"{path}: row {row}: {error}") from error
                    row += 1
        if row != file.metadata.num_rows:
            raise DataError(f"{path}: {row:,} rows, where its end says {file.metadata.num_rows:,}; copy it again")


def _bytes(image: Any) -> bytes:
    content = image["bytes"] if isinstance(image, dict) else image
    if content is None:
        path = image["path"] if image else None
        here = f"only the path {path!r:.200}, which is not followed" if path else "null"
        way_out = "push_to_hub and datasets.table.embed_table_storage write the bytes into the file"
        raise ValueError(f"the image is {here}; {way_out}")
    return bytes(content)


def _label(label: Any) -> Label:
    if label is None or (isinstance(label, int) and label < 0):
        raise ValueError(f"label = {label}: the image has none; leave out the row, or the split")
    return label if isinstance(label, int) else class_name(label)
