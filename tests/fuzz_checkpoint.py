"""Fuzz the checkpoint loader: python tests/fuzz_checkpoint.py SECONDS. Not collected by pytest; make fuzz runs it.

Whatever bytes come in, load_checkpoint returns a state that has its entries or raises CheckpointError; a file with one byte
changed is always refused, and what is loaded is what was saved.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from fasttricks.runs.checkpoint import FORMAT, KEYS, load_checkpoint, save_checkpoint
from fasttricks.runs.stored import CHECKSUM_MARK, CheckpointError
from lib.fuzzing import settings_for, take_turns

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
SETTINGS = settings_for(50)
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
SAVED = dict.fromkeys(KEYS) | {"model": {"weight": torch.arange(20.0)}, "step": 3, "ranks": [{"loader": "{}"}]}


def sealed(body: bytes) -> bytes:
    """With the checksum that belongs to it."""
    return body + CHECKSUM_MARK + hashlib.sha256(body).digest()


def whole() -> bytes:
    """A good checkpoint."""
    save_checkpoint(FOLDER / "whole.pt", SAVED)
    return (FOLDER / "whole.pt").read_bytes()


def load(content: bytes) -> dict[str, Any] | None:
    """The state in `content`, None where it is refused; any other end is a finding."""
    path = FOLDER / "step-0000000001.pt"
    path.write_bytes(content)
    try:
        state = load_checkpoint(path)
    except CheckpointError:
        return None
    assert state["format"] == FORMAT and set(KEYS) <= set(state)
    return state


@SETTINGS
@given(st.binary(max_size=400), st.booleans())
def any_bytes(content: bytes, seal: bool) -> None:
    """Noise, also under a right checksum and behind a zip's first bytes."""
    assert load(content) is None
    assert load(sealed(content) if seal else b"PK\3\4" + content) is None
    assert load(sealed(b"PK\3\4" + content)) is None


@SETTINGS
@given(st.binary(max_size=300))
def any_pickle(content: bytes) -> None:
    """Noise in the place of the pickle, in a zip and under a checksum that are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + content)
        archive.writestr("archive/version", "3\n")
    assert load(sealed(buffer.getvalue())) is None


@SETTINGS
@given(PLAIN)
def any_values(value: Any) -> None:
    """Values of any shape where a checkpoint should be, and in its entries."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    assert load(sealed(buffer.getvalue())) is None
    save_checkpoint(FOLDER / "plain.pt", SAVED | {"config": value})
    state = load((FOLDER / "plain.pt").read_bytes())
    assert state is not None and pickle.dumps(state["config"]) == pickle.dumps(pickle.loads(pickle.dumps(value)))


@SETTINGS
@given(st.data())
def any_damage(data: st.DataObject) -> None:
    """Bytes changed, cut, doubled or moved: refused, unless nothing came of it."""
    good = whole()
    harmed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at, length = data.draw(st.integers(0, len(harmed) - 1)), data.draw(st.integers(0, 40))
        harmed[at : at + length] = data.draw(st.binary(max_size=40))
        if not harmed:
            break
    state = load(bytes(harmed))
    assert (state is not None) == (bytes(harmed) == good)


def main(seconds: float) -> int:
    """As fuzzing.take_turns."""
    return take_turns((any_bytes, any_pickle, any_values, any_damage), seconds)


if __name__ == "__main__":
    print(f"checkpoint loader: {main(float(sys.argv[1]))} turns of 4 x {SETTINGS.max_examples} inputs, nothing found")
