"""Checkpoints that run code when they are loaded carelessly, each in another way. The code makes an empty file."""

from __future__ import annotations

import builtins
import hashlib
import io
import marshal
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttricks.runs.checkpoint import FORMAT
from fasttricks.runs.stored import CHECKSUM_MARK

Build = Callable[[Path], bytes]


def sealed(body: bytes) -> bytes:
    """`body` with the checksum that an attacker can compute as well as we."""
    return body + CHECKSUM_MARK + hashlib.sha256(body).digest()


class Call:
    """Unpickles to the result of function(*args): the call is made while unpickling."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


class BuildsItself:
    """Calls __setstate__ when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["path"]).touch()


def _saved(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "model": value}, buffer, **options)
    return buffer.getvalue()


def _zipped(*pickles: bytes) -> bytes:
    """A file of torch.save with these bytes in place of its pickle; several have the same name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for content in pickles:
            archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _getattr_chain(witness: Path) -> bytes:
    """getattr(__import__("os"), "system")("touch ..."), in opcodes."""
    touch = f"touch {witness}".encode()
    return b"\x80\x02cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(V" + touch + b"\ntR."


def _function(witness: Path) -> bytes:
    """A function by value, its code marshalled, as dill and cloudpickle write it, and a call of it; in opcodes."""
    code = marshal.dumps(compile(f"open({str(witness)!r}, 'w').close()", "<payload>", "exec"))
    loaded = b"cmarshal\nloads\n(B" + len(code).to_bytes(4, "little") + code + b"tR"
    return b"\x80\x03ctypes\nFunctionType\n(" + loaded + b"cbuiltins\n__dict__\ntR(tR."


def _persistent(witness: Path) -> bytes:
    """A storage whose type is an object that calls."""
    call = pickle.dumps(Call(Path.touch, witness), 2)[2:-1]
    return b"\x80\x02(Vstorage\n" + call + b"V0\nVcpu\nK\x01tQ."


def _script(witness: Path) -> bytes:
    """A TorchScript archive, which torch.load hands to another loader; its extra file is a pickle that calls."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), buffer)
    with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(
            f"{archive.namelist()[0].partition('/')[0]}/data.pkl", pickle.dumps(Call(Path.touch, witness), 2)
        )
    return buffer.getvalue()


PAYLOADS: dict[str, Build] = {
    "reduce": lambda w: _saved(Call(Path.touch, w)),
    "getattr chain": lambda w: _zipped(_getattr_chain(w)),
    "build": lambda w: _saved(BuildsItself(w)),
    "eval of text": lambda w: _saved(Call(builtins.eval, f"open({str(w)!r}, 'w').close()")),
    "function by value, as dill": lambda w: _zipped(_function(w)),
    "numpy object array": lambda w: _saved(np.array([Call(Path.touch, w)], dtype=object)),
    "numpy random state": lambda w: _saved([np.random.RandomState(0), Call(Path.touch, w)]),
    "persistent id": lambda w: _zipped(_persistent(w)),
    "two pickles of one name": lambda w: _zipped(
        pickle.dumps({"format": FORMAT}, 2), pickle.dumps(Call(Path.touch, w), 2)
    ),
    "legacy file, no zip": lambda w: _saved(Call(Path.touch, w), _use_new_zipfile_serialization=False),
    "bare pickle": lambda w: pickle.dumps(Call(Path.touch, w)),
    "TorchScript archive": _script,
}
"""Name -> the bytes of a file whose code makes the given path."""


def is_live(body: bytes, witness: Path) -> bool:
    """Whether a careless load of `body` runs it: torch.load without weights_only, or pickle.load of its contents."""
    loads: list[Callable[[], Any]] = [
        lambda: torch.load(io.BytesIO(body), weights_only=False),
        lambda: pickle.loads(body),
        *(lambda content=content: _Unpickler(io.BytesIO(content)).load() for content in _pickles(body)),
    ]
    for load in loads:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load()
        except Exception:
            pass
        if witness.exists():
            witness.unlink()
            return True
    return False


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        return pid


def _pickles(body: bytes) -> list[bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            return [archive.read(info) for info in archive.infolist() if info.filename.endswith("data.pkl")]
    except zipfile.BadZipFile:
        return []
