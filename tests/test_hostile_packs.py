"""Packed folders that were changed: refused by name, at once, within memory, and nothing outside them is opened."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttricks.commands import data as prepare
from fasttricks.commands import evaluate, train
from fasttricks.data.packing.pack import PackConfig, pack_split
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.packed import INDEX, MANIFEST
from lib.hostile import NO_FILES, NO_TABLES, Change, Payload, instead, link_to, sparse
from lib.tiny import FinishedRun, arguments, call

MEMORY = 3 << 29
"""Bytes of address space that a command may take besides: a bomb has 8 GiB."""
SHARD = "shard-00000.bin"


@pytest.fixture(scope="module")
def packed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    for split in ("train", "val"):
        pack_split(scan_folder(tiny_data / split), out / split, PackConfig(shard_images=20))
    return out


@pytest.fixture
def bounded() -> Iterator[None]:
    """MemoryError, not the machine's memory, is what a bomb meets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)  # by Python itself


# ------------------------------------------------------------------------------------------------------------ pack.json
def says(**changes: Any) -> Change:
    """pack.json with other values."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | changes))

    return change


def named(old: str, new: str) -> Change:
    """pack.json with a shard of another name."""
    return lambda folder: (folder / MANIFEST).write_text(
        (folder / MANIFEST).read_text().replace(json.dumps(old), json.dumps(new))
    )


def of(name: str, change: Change) -> Change:
    """A change of one file of the folder."""
    return lambda folder: change(folder / name)


def without(key: str) -> Change:
    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        del manifest[key]
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return change


# ------------------------------------------------------------------------------------------------------------ index.npz
def sealed(folder: Path, content: bytes) -> None:
    """index.npz of that content, with the digest that belongs to it."""
    (folder / INDEX).write_bytes(content)
    says(index_digest=hashlib.blake2b(content, digest_size=16).hexdigest())(folder)


def columns(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / INDEX) as arrays:
        return dict(arrays)


def index(save: Callable[..., None] = np.savez, **changes: Any) -> Change:
    """The index with other columns, or written otherwise."""

    def change(folder: Path) -> None:
        buffer = io.BytesIO()
        save(buffer, **columns(folder) | {name: make(columns(folder)[name]) for name, make in changes.items()})
        sealed(folder, buffer.getvalue())

    return change


def first(value: int, kind: Any = None) -> Callable[[np.ndarray], np.ndarray]:
    """The column with another first number."""
    return lambda column: np.concatenate([np.array([value], kind or column.dtype), column[1:]]).astype(
        kind or column.dtype
    )


def zip_of(members: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def bomb(folder: Path) -> None:
    """A column of 8 GiB by its header, and as many zeros of them as the longest index of 45 images has room for, packed."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("names.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (1 << 33,)})
        for _ in range(1 << 4):  # a part is enough to see that it is unpacked
            file.write(bytes(1 << 20))
    sealed(folder, buffer.getvalue())


def header_of(shape: str) -> Change:
    """A column whose header claims more than there is."""

    def change(folder: Path) -> None:
        text = f"{{'descr': '<u4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        member = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text + bytes(180)
        with zipfile.ZipFile(folder / INDEX) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        sealed(folder, zip_of(members | {"label.npy": member}))

    return change


def many_members(folder: Path) -> None:
    sealed(folder, zip_of({f"{number}.npy": b"" for number in range(200)}))


CASES: dict[str, tuple[Change, str]] = {
    **{f"manifest: {name}": (of(MANIFEST, change), wrong) for name, (change, wrong) in NO_TABLES.items()},
    "format 2": (says(format=2), "packed in format 2, this release reads 1"),
    "format: a text": (says(format="1"), "format = '1': must be a whole number"),
    "no shards": (without("shards"), "must be a table with 'shards' in it"),
    "no plan": (without("plan"), "must be a table with 'plan' in it"),
    "shards: null": (says(shards=None), "shards = None: must be a table"),
    "shards: a list": (says(shards=[SHARD]), "must be a table"),
    "shards: sizes of text": (says(shards={SHARD: "12"}), "= '12': must be a whole number"),
    "shards: below 0": (says(shards={SHARD: -1}), "= -1: must be a whole number"),
    "shards: not a number": (says(shards={SHARD: float("nan")}), "= nan: must be a whole number"),
    "shards: another number": (says(shards={"shard-00007.bin": 1 << 20}), "shards that are not numbered from"),
    "shards: 300 characters": (named(SHARD, "s" * 300), "a text of at most 30 characters"),
    "shards: /etc/passwd": (named(SHARD, "/etc/passwd"), "must be named shard-NUMBER.bin"),
    "shards: out of the folder": (named(SHARD, "../../../k.txt"), "must be named shard-NUMBER.bin"),
    "shards: a NUL": (named(SHARD, "shard\0"), "must be named shard-NUMBER.bin"),
    "classes: null": (says(classes=None), "classes = None: must be a list"),
    "classes: numbers": (says(classes=[1, 2, 3]), "classes[0] = 1: must be a text"),
    "classes: twice": (says(classes=["ant", "ant", "bee"]), "a class is listed twice"),
    "bad: a list": (says(bad=[1]), "bad = [1]: must be a table"),
    "bad: a name": (says(bad={"x": "why"}), "must be a number"),
    "bad: out of range": (says(bad={"99": "why"}), "a bad image that is none of its 45"),
    "altered: a number": (says(altered=3), "altered = 3: must be a text"),
    "digest: null": (says(index_digest=None), "index_digest = None: must be a text"),
    "plan: a list": (says(plan=[]), "plan = []: must be a table"),
    "plan: more images": (says(plan={"images": 46, "files": ""}), "must have the 46 images of pack.json, but has 45"),
    "plan: images without end": (says(plan={"images": 10**12, "files": ""}), "more images, 1,000,000,000,000, than its"),
    "shard: a pipe": (of(SHARD, instead(os.mkfifo)), "shard-00000.bin: is no file"),
    "shard: a folder": (of(SHARD, instead(Path.mkdir)), "shard-00000.bin: is no file"),
    "shard: a device": (of(SHARD, link_to("/dev/zero")), "shard-00000.bin: is no file"),
    "shard: a link to nowhere": (of(SHARD, link_to("nowhere")), "shard-00000.bin: is missing"),
    "shard: a circle": (of(SHARD, link_to(SHARD)), "cannot be read (Too many levels"),
    "shard: a terabyte": (of(SHARD, sparse(1 << 40)), "has 1099511627776 bytes of"),
    **{f"index: {name}": (of(INDEX, change), wrong) for name, (change, wrong) in NO_FILES.items()},
    "index: empty": (lambda folder: sealed(folder, b""), "not the columns"),
    "index: a pickle": (lambda folder: sealed(folder, pickle.dumps(Payload())), "not the columns"),
    "index: a zip bomb": (bomb, "not the columns"),
    "index: compressed": (index(np.savez_compressed), "compressed"),
    "index: many members": (many_members, "too many members"),
    "index: objects": (index(label=lambda column: np.array([Payload()] * 45, object)), "column label: must be"),
    "index: floats": (index(label=lambda column: column.astype(float)), "column label: must be of <u4, not '<f8'"),
    "index: two dimensions": (index(label=lambda column: column[None]), "column label: must be a list of numbers"),
    "index: a header of 8 GiB": (header_of("(2147483648,)"), "must have 2147483648 numbers, but has 180 bytes"),
    "index: a deep header": (header_of("(" * 50), "column label: must be a list of numbers"),
    "index: a short column": (index(crc=lambda column: column[:-1]), "column crc: must have the 45 images"),
    "index: a short list of names": (index(names=lambda column: column[:20]), "column names: must have the 45 images"),
    "label 99": (index(label=first(99)), "label = 99: must be of a class"),
    "label 2^32 - 1": (index(label=first(2**32 - 1)), "label = 4294967295: must be of a class"),
    "offset 2^63": (index(offset=first(2**63)), "offset = 9223372036854775808: must be within its shard"),
    "offset 2^64 - 1": (index(offset=first(2**64 - 1)), "must be within its shard"),
    "length of 4 GB": (index(length=first(2**32 - 1)), "length = 4294967295: must be within its shard"),
    "shard 7": (index(shard=first(7)), "shard = 7: must be of a shard"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_pack_that_was_changed(
    name: str, packed: Path, tiny_data: Path, tmp_path: Path, bounded: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By prepare check and by a second pack into it."""
    change, wrong = CASES[name]
    root = Path(shutil.copytree(packed, tmp_path / "packed"))
    monkeypatch.chdir(tmp_path)
    change(root / "train")
    (tmp_path / "k.txt").touch()
    OPENED.clear()
    for command in (("check", str(root)), ("pack", str(tiny_data), str(root), "--shard-images", "20")):
        code, said = call(prepare.main, *command), capsys.readouterr()
        assert code == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1, (command, said)
        assert str(root / "train") in said.err
        assert wrong in said.err or (command[0] == "pack" and "was packed with images = " in said.err), (
            command,
            said.err,
        )
        assert "again" in said.err or "another OUT" in said.err, "the way out"
    assert not (tmp_path / "unpickled").exists()
    outside = {"/etc/passwd", "/dev/zero", "/dev/full", "k.txt"}
    assert not any(path.endswith(tuple(outside)) for path in OPENED), OPENED


@pytest.mark.parametrize("name", ["manifest: a pipe", "shards: /etc/passwd", "label 99"])
def test_training_and_evaluation_refuse_it_alike(
    name: str,
    packed: Path,
    finished_run: FinishedRun,
    tmp_path: Path,
    bounded: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, wrong = CASES[name]
    root = Path(shutil.copytree(packed, tmp_path / "packed"))
    for split in ("train", "val"):
        (root / split).rename(root / "other")
        shutil.copytree(packed / "train", root / split)
        change(root / split)
        shutil.rmtree(root / "other")
    commands = {
        train.main: arguments(root, tmp_path / "run"),
        evaluate.main: [str(finished_run.folder), "--data.root", str(root)],
    }
    for main, args in commands.items():
        assert call(main, *args) == 2
        assert wrong in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
