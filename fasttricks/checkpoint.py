"""Checkpoints: written whole or not at all, read without running code.

A checkpoint is one file that torch.save wrote, of tensors, numbers, strings and dicts and lists of them. It is written
under a temporary name, flushed to the disk and renamed, so that a kill or a full disk leaves the one before as it was.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttricks.config import UserError

FORMAT = 1
"""Version of the layout below; raised when a reader of the old one could not read the new one."""
KEYS = (
    "config", "classes", "step", "epoch", "train_seconds", "model", "optimizer", "average", "average_updates", "loaders",
)  # fmt: skip
"""What a checkpoint holds besides its format."""
_PATTERN = "step-*.pt"
_TEMPORARY = ".step-*.tmp"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or used."""


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` to `path`, atomically: temporary file, fsync, rename, fsync of the folder.

    Raises CheckpointError where the disk is full or refuses; the temporary file is removed and `path`, if it was there,
    is as before. Copies every tensor to the host: a sync.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = newest_checkpoint(path.parent)
        last = f"the last good checkpoint is {kept}" if kept else "there is no earlier checkpoint"
        rule = "must be on a disk with room that this process may write to; free some and go on with --resume"
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
    Every byte is held to its checksum first (0.02 s per 100 MB): torch alone would load a flipped bit as a weight.
    Raises CheckpointError for a path that is not there, and for a file that is damaged, no checkpoint, or of another
    format.
    """
    file = newest_checkpoint(path / "checkpoints") if path.is_dir() else path
    if file is None or not file.is_file():
        raise CheckpointError(
            f"checkpoint = {str(path)!r}: must be a file, or a run folder with checkpoints/{_PATTERN}; check the path"
        )
    try:
        _check_bytes(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a damaged or foreign file fails in the zip reader, the unpickler or torch, in many ways
        rule = "must be a whole file of fasttricks.train, of tensors and plain values only; nothing in it was run"
        raise CheckpointError(f"checkpoint = {str(file)!r}: {rule}; use another one ({_first_line(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        rule = f"must have format {FORMAT}, not {found!r}; use a file that this version of fasttricks.train wrote"
        raise CheckpointError(f"checkpoint = {str(file)!r}: {rule}")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise CheckpointError(
            f"checkpoint = {str(file)!r}: must have the entries that fasttricks.train writes; it lacks {missing}"
        )
    return {**state, "path": str(file)}


def _check_bytes(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
        # A bit flipped in the attributes makes an entry a folder, and torch then returns whatever its memory held.
        damaged = damaged or next((entry.filename for entry in archive.infolist() if entry.external_attr), None)
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} does not match its checksum: the file is damaged")


def _first_line(error: BaseException) -> str:
    """What went wrong, without the unpickler's advice to load the file anyway."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("WeightsUnpickler error")), lines[0])


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`, or None."""
    return max(folder.glob(_PATTERN), default=None, key=lambda path: path.name)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies; names sort by step."""
    return folder / f"step-{step:010d}.pt"


def keep_newest(folder: Path, count: int) -> None:
    """Delete all but the newest `count`, 1 or more, checkpoints of `folder`, and temporary files that a kill left."""
    for path in [*sorted(folder.glob(_PATTERN))[:-count], *folder.glob(_TEMPORARY)]:
        path.unlink()


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load `weights` into `model`, every key and shape the same. Raises CheckpointError naming what differs."""
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
