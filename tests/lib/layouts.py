"""A folder of class folders, written again as a table, as webdataset's tars and as Hugging Face's parquet files."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SPLITS = ("train", "val")
Rows = list[tuple[str, str, bytes]]
"""(class, name of the file, its bytes), in the order of the folder."""


def rows_of(split: Path) -> Rows:
    files = sorted((path.parent.name, path.name) for path in split.glob("*/*"))
    return [(name, file, (split / name / file).read_bytes()) for name, file in files]


def write_table(data: Path, file: Path, **options: Any) -> Path:
    """`data`, linked beside the table `file`, which lists the last image first. options: csv.writer's."""
    for split in SPLITS:
        (file.parent / split).symlink_to(data / split)
    rows = [(split, name, image) for split in SPLITS for name, image, _ in rows_of(data / split)]
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, delimiter="\t" if file.suffix == ".tsv" else ",", **options)
        writer.writerow(["path", "label", "split"])
        writer.writerows((f"{split}/{name}/{image}", name, split) for split, name, image in reversed(rows))
    return file


def write_sets(
    data: Path, file: Path, sets: Sequence[str] = ("ant;insect", "", "cat", "insect;bee"), split: bool = True
) -> Path:
    """The images of `data` in a table with several labels each, in turn those of `sets`, whatever their folders say."""
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["path", "label", "split"][: 2 + split])
        for one in SPLITS:
            for at, path in enumerate(sorted((data / one).glob("*/*"))):
                row = [str(path.relative_to(data)), sets[at % len(sets)], one]
                writer.writerow(row[: 2 + split])
    return file


def tar_of(members: Iterable[tuple[str, bytes]], **options: Any) -> bytes:
    """options: tarfile's."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tars(data: Path, root: Path, *, shards: int = 2, numbers: bool | list[str] = False) -> Path:
    """Samples in a drawn order; the class as a name in .cls, or as a number there or in .json, which classes.txt names.

    numbers: the names in the order of their numbers; True: sorted.
    """
    for split in SPLITS:
        rows = rows_of(data / split)
        names = numbers if isinstance(numbers, list) else sorted({name for name, _, _ in rows_of(data / "train")})
        members: list[list[tuple[str, bytes]]] = [[] for _ in range(shards)]
        for at, (name, file, content) in enumerate(sorted(rows, key=lambda row: row[2][-40:])):
            stem, label = Path(file).stem, names.index(name)
            if not numbers:
                sample = (f"{stem}.cls", name.encode())
            elif at % 2:
                sample = (f"{stem}.cls", f"{label}\n".encode())
            else:
                sample = (f"{stem}.json", json.dumps({"label": label, "width": 9}).encode())
            members[at % shards] += [sample, (file, content)]
        for number, shard in enumerate(members):
            (root / f"{split}-{number:04d}.tar").write_bytes(tar_of(shard))
        if numbers:
            (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


def features_of(names: Sequence[str] | None) -> dict[bytes, bytes]:
    """The metadata of the schema as datasets writes it."""
    label = (
        {"names": list(names), "_type": "ClassLabel"} if names is not None else {"dtype": "string", "_type": "Value"}
    )
    features = {"image": {"_type": "Image"}, "label": label}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def write_parquet(
    file: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str] | None, *, group: int = 7, **options: Any
) -> Path:
    """Rows {"image": {"bytes", "path"}, "label"} with the schema of datasets; labels are numbers of `names`, or names."""
    import pyarrow as arrow
    from pyarrow import parquet

    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    kinds = [("image", image), ("label", arrow.int64() if names is not None else arrow.string())]
    schema = arrow.schema(kinds, metadata=features_of(names))
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(list(rows), schema), file, row_group_size=group, **options)
    return file


def write_parquets(data: Path, root: Path, *, names: bool | list[str] = True) -> Path:
    """Two files of train and one of validation in data/, as the hub has them; labels as numbers of a ClassLabel, or as names.

    names: those of the ClassLabel in order; True: sorted.
    """
    for split, word, count in (("train", "train", 2), ("val", "validation", 1)):
        rows = rows_of(data / split)
        classes = names if isinstance(names, list) else sorted({name for name, _, _ in rows_of(data / "train")})
        found = [
            {"image": {"bytes": content, "path": file}, "label": classes.index(name) if names else name}
            for name, file, content in rows
        ]
        size = -(-len(rows) // count)
        for number in range(count):
            part = found[number * size : (number + 1) * size]
            file = root / "data" / f"{word}-{number:05d}-of-{count:05d}.parquet"
            write_parquet(file, part, classes if names else None)
    return root


def copied_with(data: Path, root: Path, changed: Mapping[str, bytes]) -> Path:
    """`data` at `root`, with other bytes in some of its files."""
    shutil.copytree(data, root)
    for name, content in changed.items():
        (root / name).write_bytes(content)
    return root


def write_places365(data: Path, root: Path, *, large: bool = False, renamed: bool = False) -> Path:
    """The archives of Places365-Standard as they are unpacked, of the images of `data`: lists, and folders of images.

    A class "b-shop" of `data` is the category /b/b/shop. The lists have the last image first. large: the folders of full size;
    renamed: as torchvision renames the folder of training.
    """
    classes = sorted(path.name for path in (data / "train").iterdir())
    categories = [f"/{name[0]}/{name.replace('-', '/')}" for name in classes]
    size = "large" if large else "256"
    root.mkdir(exist_ok=True)
    lines = {"train": [], "val": []}  # type: dict[str, list[str]]
    for split in SPLITS:
        folder = root / (f"val_{size}" if split == "val" else f"data_{size}{'_standard' * renamed}")
        for at, (name, file, content) in enumerate(rows_of(data / split)):
            number = classes.index(name)
            path = f"Places365_val_{at:08d}.jpg" if split == "val" else f"{categories[number]}/{file}"
            target = folder / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            lines[split].insert(0, f"{path} {number}\n")
    numbered = [f"{category} {number}\n" for number, category in enumerate(categories)]
    (root / "categories_places365.txt").write_text("".join(numbered))
    (root / "places365_train_standard.txt").write_text("".join(lines["train"]))
    (root / "places365_val.txt").write_text("".join(lines["val"]))
    return root
