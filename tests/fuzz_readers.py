"""Fuzz the readers of tables, tars and parquet: python tests/fuzz_readers.py SECONDS. Not collected by pytest; make fuzz runs it.

Noise, and good files with bytes changed, cut or put in, give a source whose images can be read and whose labels are of its
classes, or a DataError of bounded length; never another exception, nor memory that only a header claims. pyarrow is native code:
parquet is read in a process of its own, and a signal that ends it is a finding.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fasttricks.config import DataConfig
from fasttricks.data.sources import Source, open_split
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.table import read_table
from lib.forked import forked
from lib.fuzzing import settings_for, take_turns
from lib.images import JPEG, PNG
from lib.layouts import tar_of, write_parquet

SETTINGS = settings_for(50)
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
MEMORY = 1 << 30
"""Bytes of address space besides: a claim of more than this was believed."""
SAMPLES = [
    ("a.jpg", JPEG),
    ("a.cls", b"0"),
    ("b/" * 60 + "b.png", PNG),
    ("b/" * 60 + "b.json", b'{"label": 1}'),
    ("a.txt", b"x"),
]
TARS = [tar_of(SAMPLES, format=form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
ROWS = [{"image": {"bytes": JPEG if at % 2 else PNG, "path": None}, "label": at % 2} for at in range(9)]
PARQUET = write_parquet(FOLDER / "whole.parquet", ROWS, ["ant", "bee"], group=4).read_bytes()
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 600), st.binary(max_size=12)), max_size=4)
CELLS = st.sampled_from(
    ["", "a", "b/c", "../x", "/x", "train", "val", "test", '"', "é", "\0", "a\nb", "\udcff", ",", " x"]
) | st.text(max_size=4)


def change(content: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    """With bytes in the place of others; the places of headers, every 512 bytes, half of the time."""
    harmed = bytearray(content)
    for where, length, new in changes:
        at = int(where * len(harmed))
        at -= at % 512 if length % 2 else 0
        harmed[at : at + (length if length < 20 else len(new))] = new
    return bytes(harmed)


def require_short(error: DataError) -> None:
    """A name may be 1,000 characters, a whole line of the table not."""
    assert len(str(error)) < 3000, error


def opened(name: str, content: bytes) -> Source | None:
    """The training split of a folder with that file; None where it is refused."""
    root = Path(tempfile.mkdtemp(dir=FOLDER))
    (root / name).write_bytes(content)
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of members that are not read
            source = open_split(DataConfig(root=str(root)), "train")
    except DataError as error:
        require_short(error)
        return None
    else:
        assert all(0 <= label < len(source.classes) for label in source.labels)
        for at in range(len(source)):
            source.read(at)
        return source
    finally:
        shutil.rmtree(root)


@SETTINGS
@given(st.booleans(), CHANGES)
def any_tar(pax: bool, changes: list[tuple[float, int, bytes]]) -> None:
    """A tar with long names that was changed."""
    harmed = change(TARS[pax], changes)
    assert opened("train.tar", harmed) or harmed != TARS[pax]


@SETTINGS
@given(st.binary(max_size=1500), st.integers(0, 3))
def any_headers(noise: bytes, kind: int) -> None:
    """Noise as a tar, and in a header whose checksum is right."""
    assert opened("train.tar", noise) is None
    header = bytearray(noise[:512].ljust(512, b"\0"))
    header[156:157] = b"0xgL"[kind : kind + 1]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    opened("train.tar", bytes(header) + noise + TARS[0])


@SETTINGS
@given(st.lists(st.lists(CELLS, max_size=4), max_size=5), st.binary(max_size=200), st.booleans())
def any_table(rows: list[list[str]], noise: bytes, raw: bool) -> None:
    """Cells of any kind, and noise behind a header."""
    text = "\n".join(",".join(row) for row in [["path", "label", "split"], *rows])
    (FOLDER / "table.csv").write_bytes(b"path,label\n" + noise if raw else text.encode("utf-8", "surrogateescape"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the split test
            found = read_table(FOLDER / "table.csv")
    except DataError as error:
        require_short(error)
        return
    files = [path for part in found.values() for path in part.paths]
    assert len(files) == len(set(files)) and not any(path.startswith("/") or ".." in path.split("/") for path in files)
    assert all(label for part in found.values() for label in part.labels)


def parquet_turn(seed: int) -> None:
    """Many changed parquet files, in a process of their own."""
    draws = random.Random(seed)
    for _ in range(40):
        changes = [
            (
                draws.random() if draws.random() < 0.5 else 1 - 0.2 * draws.random(),
                draws.randrange(600),
                draws.randbytes(draws.randrange(6)),
            )
            for _ in range(draws.randrange(1, 4))
        ]
        opened("train.parquet", change(PARQUET, changes))


@settings_for(1)
@given(st.integers(0, 2**32))
def any_parquet(seed: int) -> None:
    """Parquet files that were changed, in their pages and in the description at their end."""
    process = forked(parquet_turn, seed)
    process.join(120)
    process.kill()  # where it hangs
    process.join()
    assert process.exitcode == 0, (process.exitcode, seed)


def main(seconds: float) -> int:
    """As fuzzing.take_turns."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, hard))
    return take_turns((any_tar, any_headers, any_table, any_parquet), seconds)


if __name__ == "__main__":
    print(
        f"readers: {main(float(sys.argv[1]))} turns of 3 x {SETTINGS.max_examples} inputs and 40 files, nothing found"
    )
