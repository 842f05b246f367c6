"""Checkpoints: written whole or not at all, every byte under a checksum, read without running code.

A checkpoint is one file: the bytes of torch.save (tensors, numbers, strings and dicts and lists of them), then the SHA-256
of all of that. It is written under a temporary name, flushed to the disk and renamed, so that a kill or a full disk leaves
the one before as it was. torch.load and zip tools read it too; they overlook the checksum.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import nn

from fasttricks.runs.stored import (
    CHECKSUM_MARK,
    TRAILER_BYTES,
    CheckpointError,
    DamagedError,
    find_checkpoint,
    newest_checkpoint,
)
from fasttricks.system.files import temporary_of, why_refused
from fasttricks.system.reading import read_range, regular_file
from fasttricks.system.refusals import way_out
from fasttricks.system.transfer import to_host

FORMAT = 2
"""Version of the layout below; raised when a reader of the old one could not read the new one."""
KEYS = (
    "config", "classes", "fingerprint", "hardware", "step", "epoch", "step_in_epoch", "unmeasured", "train_seconds",
    "skipped_losses", "model", "optimizer", "loss_scale", "average", "average_updates", "ranks",
)  # fmt: skip
"""The keys of a checkpoint besides its format."""
_DAMAGE = (errno.EIO, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
"""Errors by which the checkpoint is none, or is lost. After any other it may be whole, and can be read another time."""
_ZIP, _ZIP_END = b"PK\3\4", b"PK\5\6"


class _Hashing(io.RawIOBase):
    """A file to write to that hashes the bytes on their way, so the checksum costs no second read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`, atomically: temporary file, fsync, rename, fsync of the folder.

    Raises CheckpointError where the disk is full or refuses, or the folder is gone; the temporary file is removed and `path`,
    if it was there, is as before. Copies every tensor of a device to the host, a sync, before the file is opened: an error of
    the card is raised as it is, and every error after that is of the disk. Hashing costs 0.1 s per 100 MB or less; nothing is
    read back.
    """
    content, temporary = to_host({"format": FORMAT, **state}), temporary_of(path)
    try:
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            torch.save(content, cast(BinaryIO, hashing))
            file.write(CHECKSUM_MARK + hashing.sha256.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = newest_checkpoint(path.parent)
        last = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
        rule = f"{why_refused(path.parent)} and resume with --resume"
        reason = error if isinstance(error, OSError) else error.__context__ or error  # torch says "unexpected pos"
        raise CheckpointError(f"checkpoint = {str(path)!r}: {rule}; {last} ({_first_line(reason)})") from error


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. `path` is a file, or a run folder, of which the newest checkpoint is taken.

    Only tensors and plain values are read, whatever the environment says: a file that holds code is refused, not run.
    Every byte is checked against the checksum first, and the same bytes are then decoded: the file is read once, into
    memory. Raises DamagedError for a file that is not as it was written, and CheckpointError for a path that is not
    there, a file of another format, or one with code in it.
    """
    return read_checkpoint(find_checkpoint(path))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """As load_checkpoint, of the file alone."""
    try:
        with regular_file(file) as (descriptor, size):
            _require_trailer(file, descriptor, size)
            data = read_range(descriptor, 0, size)
    except OSError as error:
        if error.errno in _DAMAGE:
            rule = f"cannot be read ({error.strerror or error}); use another one"
            raise DamagedError(f"checkpoint = {str(file)!r}: {rule}") from error
        # it may be whole: a resumed run must not pass it over
        raise CheckpointError(f"checkpoint = {str(file)!r}: {error.strerror or error}; {way_out(error)}") from error
    except MemoryError as error:
        rule = f"{file.stat().st_size:,} bytes, more than there is memory for"
        raise CheckpointError(f"checkpoint = {str(file)!r}: {rule}; close other programs") from error
    state = _decode(file, _checked(file, data))
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _other_format(file, state)
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise CheckpointError(
            f"checkpoint = {str(file)!r}: must have the entries that fasttricks.train writes; it lacks {missing}"
        )
    return {**state, "path": str(file)}


def _require_trailer(file: Path, descriptor: int, size: int) -> None:
    """Raise DamagedError for a file that neither begins nor ends as a checkpoint does, before all of it is read."""
    if read_range(descriptor, 0, len(_ZIP)) != _ZIP:
        raise _no_checkpoint(file)
    end = read_range(descriptor, max(0, size - 2 * TRAILER_BYTES), 2 * TRAILER_BYTES)
    if CHECKSUM_MARK not in end and _ZIP_END not in end:
        raise _no_checkpoint(file)


def _no_checkpoint(file: Path) -> DamagedError:
    rule = "must be a whole file of fasttricks.train; nothing in it was run; use another one"
    return DamagedError(f"checkpoint = {str(file)!r}: {rule} (does not match its checksum: damaged, or no checkpoint)")


def _checked(file: Path, data: bytes) -> memoryview:
    """The bytes of `data` that torch wrote, after the check of every byte."""
    body, trailer = memoryview(data)[:-TRAILER_BYTES], data[-TRAILER_BYTES:]
    if trailer == CHECKSUM_MARK + hashlib.sha256(body).digest() and data.startswith(_ZIP):
        return body
    if CHECKSUM_MARK not in data[-2 * TRAILER_BYTES :] and data.startswith(_ZIP):
        try:  # whole, but of a version that wrote no checksum?
            state = _decode(file, memoryview(data))
        except CheckpointError:
            state = None
        if state is not None and not (isinstance(state, dict) and state.get("format") == FORMAT):
            raise _other_format(file, state)
    raise _no_checkpoint(file)


def _decode(file: Path, data: memoryview) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # foreign files make torch warn
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign data fails in the zip reader, the unpickler or torch, in many ways
        rule = "must be a file of fasttricks.train, of tensors and plain values only; nothing in it was run"
        raise CheckpointError(f"checkpoint = {str(file)!r}: {rule}; use another one ({_first_line(error)})") from error


def _other_format(file: Path, state: object) -> CheckpointError:
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    rule = f"must have format {FORMAT}, not {found!r}; use a file that this version of fasttricks.train wrote"
    return CheckpointError(f"checkpoint = {str(file)!r}: {rule}")


def _first_line(error: BaseException) -> str:
    """The error, without torch's advice to load the file anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    named = next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0])
    return named.partition(". Please use")[0].partition(". In PyTorch 2.6")[0]


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load `weights` into `model`, every key and shape the same. Raises CheckpointError naming the differences."""
    wanted = model.state_dict()
    missing, extra = [k for k in wanted if k not in weights], [k for k in weights if k not in wanted]
    shapes = [
        f"{k} {tuple(weights[k].shape)} for {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in weights and weights[k].shape != v.shape
    ]
    found = [
        f"{len(n)} {what} (first: {n[0]})"
        for what, n in (("missing", missing), ("unknown", extra), ("of another shape", shapes))
        if n
    ]
    if found:
        rule = "must hold this very model's weights: same model.name, width, stem_stride and number of classes"
        raise CheckpointError(f"checkpoint = {source!r}: {rule}; found {', '.join(found)}")
    model.load_state_dict(dict(weights))
