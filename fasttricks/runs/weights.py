"""Trained weights by name: of a run, a checkpoint, an export, a file, timm or torchvision; read without running code."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttricks.config import TIMM, TORCHVISION, ConfigError
from fasttricks.models.external import pretrained_timm_model, pretrained_torchvision_weights
from fasttricks.runs.checkpoint import is_own
from fasttricks.runs.saved import read_saved
from fasttricks.runs.stored import EXPORTED, RAW, CheckpointError
from fasttricks.system.extras import missing_extra
from fasttricks.system.reading import parse_json, regular_file
from fasttricks.system.schema import listed, text

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
        model, _ = pretrained_timm_model(name, "init")
        return Weights(tensors=model.state_dict(), source=name, network=name)
    if name.startswith(TORCHVISION):
        return Weights(tensors=pretrained_torchvision_weights(name, "init"), source=name, network=name)
    path = Path(name)
    if (path / EXPORTED).is_file():
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
        )
    return _foreign(path, averaged=averaged)


def _safetensors(path: Path) -> Weights:
    """A file of `fasttricks export` or of another program."""
    if missing := missing_extra("export", ["safetensors"], f"init = {str(path)!r}"):
        raise ConfigError(missing)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no dict
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        rule = f"must be a whole safetensors file ({_first_line(error)}); use another one"
        raise CheckpointError(f"weights = {str(path)!r}: {rule}") from error
    classes = None
    if "classes" in metadata:
        try:
            classes = tuple(parse_json(metadata["classes"].encode(), listed(text())))
        except ValueError as error:
            rule = f"has names of classes that are no list ({_first_line(error)}); export it again"
            raise CheckpointError(f"weights = {str(path)!r}: {rule}") from error
    return Weights(tensors=tensors, source=str(path), network=metadata.get("model", ""), classes=classes)


def _foreign(path: Path, *, averaged: bool) -> Weights:
    """A file that torch.save wrote for another trainer: a state_dict, or a dict that holds one or two."""
    try:
        # timm keeps its options in a Namespace
        with regular_file(path), warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        rule = "holds more than tensors and plain values; nothing in it was run; save its state_dict() alone"
        raise CheckpointError(f"weights = {str(path)!r}: {rule} ({_first_line(error)})") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        rule = f"cannot be read by torch ({_first_line(error)}); use another one"
        raise CheckpointError(f"weights = {str(path)!r}: {rule}") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key in (*AVERAGED, *PLAIN):
        if isinstance(state, dict) and (tensors := _tensors(state.get(key))):
            found[key] = tensors
    taken = next((key for key in ((*AVERAGED, *PLAIN) if averaged else (*PLAIN, *AVERAGED)) if key in found), "")
    tensors = found.get(taken) or _tensors(state)
    if not tensors:
        keys = f", but {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, dict) else ""
        rule = f"must hold a state_dict, alone or as one of {', '.join((*AVERAGED, *PLAIN))}{keys}"
        raise CheckpointError(f"weights = {str(path)!r}: {rule}; save it again as torch.save(model.state_dict(), FILE)")
    return Weights(tensors=tensors, source=f"{path}{f' ({taken})' if taken else ''}")


def _tensors(state: Any) -> dict[str, Tensor]:
    """`state` as a state_dict without the prefixes of wrappers; empty where it is none."""
    if not isinstance(state, dict) or not state:
        return {}
    tensors = {key: value for key, value in state.items() if key not in WRAPPERS_OWN}
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()):
        return {}
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
