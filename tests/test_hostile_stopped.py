"""A pack that was stopped, and changed before it goes on: refused by name, with a way out that works."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from fasttricks.data.packing.pack import PackConfig, pack_split
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.packed import PLAN, open_packed
from lib.hostile import NO_FILES, NO_TABLES, Change, Payload, content

SHARD, RECORD = "shard-00000.bin", ".shard-00000.npz"


@pytest.fixture
def stopped(tiny_data: Path, tmp_path: Path) -> Path:
    """A folder that packing has left after its first shard."""

    def stop(_: int) -> None:
        if (tmp_path / "out" / SHARD).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_split(scan_folder(tiny_data / "train"), tmp_path / "out", PackConfig(shard_images=20), stop)
    return tmp_path / "out"


PLANS: dict[str, tuple[Change, str]] = NO_TABLES | {
    "other images": (content(b'{"images": 3, "files": "x"}'), "was packed with images = 3, now 45"),
    "without images": (content(b'{"files": "x"}'), "must be a table with 'images' in it"),
}
RECORDS: dict[str, tuple[Change, str]] = NO_FILES | {
    "gone": (Path.unlink, "No such file"),
    "a pickle": (content(pickle.dumps(Payload())), "not the columns offset, length, crc, notes"),
    "cut": (lambda path: os.truncate(path, 500), "not the columns offset, length, crc, notes"),
}
ROWS = [(PLAN, *row) for row in PLANS.items()] + [(RECORD, *row) for row in RECORDS.items()]


@pytest.mark.parametrize(("file", "name", "case"), ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_a_stopped_pack_that_was_changed(
    file: str, name: str, case: tuple[Change, str], stopped: Path, tiny_data: Path
) -> None:
    change, wrong = case
    change(stopped / file)
    with pytest.raises(DataError, match=r"give the same|again") as caught:
        pack_split(scan_folder(tiny_data / "train"), stopped, PackConfig(shard_images=20))
    assert wrong in str(caught.value)
    if file == RECORD:  # the way out
        if os.path.lexists(stopped / RECORD):
            (stopped / RECORD).rmdir() if (stopped / RECORD).is_dir() else (stopped / RECORD).unlink()
        (stopped / SHARD).unlink()
        pack_split(scan_folder(tiny_data / "train"), stopped, PackConfig(shard_images=20))
        assert len(open_packed(stopped)) == 45
