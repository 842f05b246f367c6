"""Fuzz the folder of images: python tests/fuzz_data.py SECONDS. Not collected by pytest; make fuzz runs it.

Images with bytes flipped, cut out, moved and put in, under names of any bytes, are decoded or named as bad, in training and in
validation, and the other images come as ever; never another exception, a crash or a hang. The loader runs in a process of
its own, so that a signal which ends it is a finding like any other.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from contextlib import redirect_stderr
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttricks.config import DataConfig
from fasttricks.data.packing.verdict import why_damaged
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources.folder import scan_folder
from lib.forked import forked
from lib.fuzzing import settings_for, take_turns
from lib.images import JPEG, PNG, WEBP
from lib.zoo import written_by_hand, written_by_pillow

SETTINGS = settings_for(10)
LONGEST_S = 60
"""For one example of two epochs; what takes longer hangs."""
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
CONFIG = DataConfig(image_size=32, val_resize=32, threads=2, max_bad=1.0, max_pixels=1_000_000)


def real_jpegs() -> list[bytes]:
    """A few of ImageNet, where $FASTTRICKS_TEST_DATA has them."""
    place = Path(os.environ.get("FASTTRICKS_TEST_DATA", "nowhere")) / "imagenet_samples"
    return [path.read_bytes() for path in sorted(place.rglob("*.JPEG"))[:5]]


BASES = [*real_jpegs(), *[JPEG, PNG, WEBP], *written_by_pillow().values(), *written_by_hand().values()]
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["set", "flip", "cut", "drop", "repeat", "insert", "swap"]),
        st.floats(0, 1) | st.floats(0, 0.05),  # where; half of them in the header
        st.integers(1, 64),
        st.binary(min_size=1, max_size=4)
        | st.sampled_from([b"\xff\xc0", b"\xff\xd9", b"\xff\xff\xff\xff", b"\0\0\0\0"]),
    ),
    max_size=4,
)
NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: not {0, 47} & {*name} and name[:1] != b".")


def change(file: bytes, changes: list[tuple[str, float, int, bytes]]) -> bytes:
    for what, where, size, content in changes:
        at = int(where * len(file))
        head, part, tail = file[:at], file[at : at + size], file[at + size :]
        file = {
            "set": head + content + file[at + len(content) :],
            "flip": head + bytes(byte ^ 1 << size % 8 for byte in part) + tail,
            "cut": head,
            "drop": head + tail,
            "repeat": head + part + part + tail,
            "insert": head + content + part + tail,
            "swap": head + tail[:size] + part + tail[size:],
        }[what]
    return file


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(range(len(BASES))), CHANGES, NAMES), min_size=1, max_size=6))
def any_files(files: list[tuple[int, list[tuple[str, float, int, bytes]], bytes]]) -> None:
    """A class with one good image and files that were changed."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    (FOLDER / "a").mkdir(parents=True)
    (FOLDER / "a" / "good.png").write_bytes(PNG)
    for base, changes, name in files:
        content = change(BASES[base], changes)
        (FOLDER / "a" / os.fsdecode(name + b".jpg")).write_bytes(content)
        why_damaged(content, CONFIG.max_pixels)
    process = forked(load, str(FOLDER))
    process.join(LONGEST_S)
    process.kill()  # where it hangs
    process.join()
    assert process.exitcode == 0, (process.exitcode, sorted(FOLDER.rglob("*.jpg")))


def load(root: str) -> None:
    """An epoch of training and one of validation, in this process; what it says of bad files is left out."""
    folder = scan_folder(root)
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
        for training in (True, False):
            loader = Loader(folder, CONFIG, training=training, batch_size=4, device=torch.device("cpu"))
            batches = list(loader)
            shown = sum(len(batch.labels) for batch in batches)
            assert shown == (len(folder) if training else len(folder) - len(loader.bad))
            assert all(batch.images.isfinite().all() for batch in batches)
            assert "good.png" not in " ".join(loader.bad)


def main(seconds: float) -> int:
    """As fuzzing.take_turns."""
    with open(os.devnull, "w") as nothing, redirect_stderr(nothing):  # the names of the bad files
        return take_turns((any_files,), seconds)


if __name__ == "__main__":
    print(f"data folder: {main(float(sys.argv[1]))} turns of {SETTINGS.max_examples} folders, nothing found")
