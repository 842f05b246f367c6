"""Trained weights by name: of a run, a checkpoint, an export, a file, timm or torchvision; read without running code."""

from __future__ import annotations

import pickle
import warnings
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from fasttricks.config import TIMM, TORCHVISION, Statistics
from fasttricks.models.external import pretrained_timm_model, pretrained_torchvision_weights
from fasttricks.runs.exported import classes_of, opened
from fasttricks.runs.saved import read_saved
from fasttricks.runs.stored import EXPORTED, RAW, CheckpointError, is_export, is_own
from fasttricks.system.reading import regular_file

AVERAGED = ("state_dict_ema", "model_ema")
PLAIN = ("state_dict", "model")
"""The keys under which timm's and torchvision's trainers keep averaged weights, and the others."""
PREFIXES = ("module.", "_orig_mod.")
"""The prefixes of DataParallel, torchvision's moving average and torch.compile."""
WRAPPERS_OWN = ("n_averaged",)
"""Values of a moving average's wrapper that are no weights."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a network, with its name and classes where they are known."""

    tensors: Mapping[str, Tensor]
    """state_dict, on the CPU."""
    source: str
    """The name that the user gave, and which weights of it these are, in words."""
    network: str = ""
    """The network's name, as of ModelConfig.name; of timm or torchvision with its prefix. Empty: not known."""
    classes: tuple[str, ...] | None = None
    """The classes of its outputs, in order; None: not known."""
    statistics: Statistics | None = None
    """Mean and std that its images were normalised by; None: not known."""


def read_weights(name: str) -> Weights:
    """The weights that `name` means: a run folder, a checkpoint, an export's folder, a .pt, .pth or .safetensors file,
    timm:NAME or torchvision:NAME.

    Averaged weights are taken where there are such; NAME:raw takes the others. timm and torchvision take theirs from their
    cache, or download them.
    Raises CheckpointError for a file that is damaged, holds code or no weights, and ConfigError for a library that is absent or
    has no such weights. Cost: the file is in memory once or twice.
    """
    averaged, name = not name.endswith(RAW), name.removesuffix(RAW)
    if name.startswith(TIMM):
        model, statistics = pretrained_timm_model(name, "init")
        return Weights(tensors=model.state_dict(), source=name, network=name, statistics=statistics)
    if name.startswith(TORCHVISION):
        tensors, statistics = pretrained_torchvision_weights(name, "init")
        return Weights(tensors=tensors, source=name, network=name, statistics=statistics)
    path = Path(name)
    if is_export(path):
        path = path / EXPORTED
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.is_dir() or not path.is_file() or is_own(path):
        saved = read_saved(path)
        take = averaged and saved.average is not None
        return Weights(
            tensors=saved.average if take and saved.average is not None else saved.weights,
            source=f"{saved.path}{' (its averaged weights)' if take else ''}",
            network=saved.config.model.name,
            classes=saved.classes,
            statistics=(saved.config.data.mean, saved.config.data.std),
        )
    return _foreign(path, averaged=averaged)


def _safetensors(path: Path) -> Weights:
    """A file of `fasttricks export` or of another program."""
    with opened(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
        metadata = file.metadata() or {}
    return Weights(
        tensors=tensors, source=str(path), network=metadata.get("model", ""), classes=classes_of(path, metadata)
    )


def _foreign(path: Path, *, averaged: bool) -> Weights:
    """A file of another trainer; its averaged weights where there are such, or the others first."""
    found = read_foreign(path)
    order = (*AVERAGED, *PLAIN) if averaged else (*PLAIN, *AVERAGED)
    taken = next((key for key in order if key in found), "")
    return Weights(tensors=found[taken], source=f"{path}{f' ({taken})' if taken else ''}")


def read_foreign(path: Path) -> dict[str, dict[str, Tensor]]:
    """The weights in a file that torch.save wrote for another trainer, by their key there; "" for a state_dict alone.

    Raises CheckpointError for a file that is damaged, holds code or no weights.
    """
    try:
        # timm keeps its options in a Namespace
        with regular_file(path) as (_, size), warnings.catch_warnings(), torch.serialization.safe_globals([Namespace]):
            warnings.simplefilter("ignore")
            _require_unpacked(path, size)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        rule = "holds more than tensors and plain values; nothing in it was run; save its state_dict() alone"
        raise CheckpointError(f"weights = {str(path)!r}: {rule} ({_first_line(error)})") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, BadZipFile) as error:
        rule = f"cannot be read by torch ({_first_line(error)}); use another one"
        raise CheckpointError(f"weights = {str(path)!r}: {rule}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key in (*AVERAGED, *PLAIN):
        if isinstance(state, dict) and (tensors := _tensors(state.get(key))):
            found[key] = tensors
    if not found and (tensors := _tensors(state)):
        found[""] = tensors
    if not found:
        keys = f", but {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, dict) else ""
        rule = f"must hold a state_dict, alone or as one of {', '.join((*AVERAGED, *PLAIN))}{keys}"
        raise CheckpointError(f"weights = {str(path)!r}: {rule}; save it again as torch.save(model.state_dict(), FILE)")
    return found


def _require_unpacked(path: Path, size: int) -> None:
    """Raise ValueError for a zip file that would fill more memory than it has bytes. torch.save compresses nothing."""
    if is_zipfile(path):
        with ZipFile(path) as file:
            unpacked = sum(part.file_size for part in file.infolist())
        if unpacked > size:
            raise ValueError(f"{size:,} bytes that unpack to {unpacked:,}")


def _tensors(state: Any) -> dict[str, Tensor]:
    """`state` as a state_dict without the prefixes of wrappers; empty where it is none."""
    if not isinstance(state, dict) or not state:
        return {}
    tensors = {key: value for key, value in state.items() if key not in WRAPPERS_OWN}
    if not all(
        isinstance(key, str) and isinstance(value, Tensor) and _is_plain(value) for key, value in tensors.items()
    ):
        return {}
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Whether the file holds each value of `tensor`: it is neither sparse, quantized, expanded nor without data."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
