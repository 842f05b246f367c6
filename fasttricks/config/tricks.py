"""The paper's tricks, one row each: the edits that switch it on and off in a config. Help, docs and ablations derive from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fasttricks.config.errors import ConfigError, DoesNotApplyError, unknown
from fasttricks.config.fields import get_at, replace_fields
from fasttricks.config.networks import variant_of
from fasttricks.config.schema import TrainConfig

C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True)
class Trick:
    """One trick: its edits map a config field (dotted path) to a value, or to a function of the old value."""

    name: str
    section: str
    summary: str
    on: Mapping[str, Any]
    off: Mapping[str, Any]


_ROWS = (
    Trick(
        "linear_scaling", "3.1", "peak lr grows with the global batch: base_lr x batch / 256",
        on={"optim.linear_scaling": True}, off={"optim.linear_scaling": False},
    ),
    Trick(
        "warmup", "3.1", "lr rises from 0 to its peak over the first 5 epochs, batch by batch",
        on={"schedule.warmup_epochs": 5.0}, off={"schedule.warmup_epochs": 0.0},
    ),
    Trick(
        "zero_gamma", "3.1", "the last batch norm of every residual block starts at 0",
        on={"model.zero_gamma": True}, off={"model.zero_gamma": False},
    ),
    Trick(
        "no_bias_decay", "3.1", "weight decay on convolution and FC weights only",
        on={"optim.bias_decay": False}, off={"optim.bias_decay": True},
    ),
    Trick(
        "low_precision", "3.2", "half precision where the device has it",
        on={"precision": "auto"}, off={"precision": "fp32"},
    ),
    Trick(
        "resnet_d", "4", "deep stem, stride in the 3x3, average pool on the shortcut (variant D; off: A)",
        on={"model.name": partial(variant_of, letter="d")}, off={"model.name": partial(variant_of, letter="a")},
    ),
    Trick(
        "cosine", "5.1", "lr falls along half a cosine instead of in steps",
        on={"schedule.decay": lambda decay: "cosine"}, off={"schedule.decay": "step"},
    ),
    Trick(
        "label_smoothing", "5.2", "0.1 of the target goes to the other classes",
        on={"loss.smoothing": 0.1}, off={"loss.smoothing": 0.0},
    ),
    Trick(
        "distillation", "5.3", "learn from a trained ResNet-152-D too, or from another --distill.teacher",
        on={"distill.teacher": "runs/resnet152d-teacher"}, off={"distill.teacher": ""},
    ),
    Trick(
        "mixup", "5.4", "blend each image and its label with another, lambda ~ Beta(0.2, 0.2)",
        on={"loss.mixup_alpha": 0.2}, off={"loss.mixup_alpha": 0.0},
    ),
    Trick(
        "whitening", "none", "cifarnet's first layer whitens the patches of the images; not the paper's",
        on={"model.whitening": True}, off={"model.whitening": False},
    ),
    Trick(
        "identity_init", "none", "cifarnet's convolutions start by passing their channels on; not the paper's",
        on={"model.identity_init": True}, off={"model.identity_init": False},
    ),
    Trick(
        "bias_lr", "none", "biases learn 64 times as fast as weights; not the paper's",
        on={"optim.bias_lr": 64.0}, off={"optim.bias_lr": 1.0},
    ),
    Trick(
        "alternate_flip", "none", "an image is mirrored in every second epoch, not at random; not the paper's",
        on={"data.alternate_flip": True}, off={"data.alternate_flip": False},
    ),
    Trick(
        "progressive_resizing", "none", "training images grow from half their side to all of it over the epochs; not the paper's",
        on={"schedule.first_size": 0.5}, off={"schedule.first_size": 1.0},
    ),
)  # fmt: skip

TRICKS: dict[str, Trick] = {trick.name: trick for trick in _ROWS}


def find_trick(name: str) -> Trick:
    """The trick called `name`. Raises ConfigError with the nearest right name."""
    if name in TRICKS:
        return TRICKS[name]
    parts = name.replace(",", " ").split()
    if len(parts) > 1 and all(part in TRICKS for part in parts):
        raise ConfigError(f"trick = {name!r}: must be names apart, without commas: {' '.join(parts)}")
    raise ConfigError(f"trick = {name!r}: {unknown(name, TRICKS)}; the tricks are {', '.join(TRICKS)}")


def _edit(config: C, edits: Mapping[str, Any]) -> C:
    return replace_fields(config, {p: v(get_at(config, p)) if callable(v) else v for p, v in edits.items()})


def apply_tricks(config: C, *, on: Iterable[str] = (), off: Iterable[str] = ()) -> C:
    """`config` with the named tricks switched. One that is on keeps the value that it has: a warm-up of 1 epoch stays 1.

    One that does not apply to the network is off already. Raises ConfigError for an unknown trick and for a value that breaks a
    rule of the config, and DoesNotApplyError where one is to be on that does not apply.
    """
    for name in off:
        config = _edit(config, find_trick(name).off) if applies(config, name) else config
    for name in on:
        config = config if is_on(config, name) else _edit(config, TRICKS[name].on)
    return config


def applies(config: TrainConfig, name: str) -> bool:
    """Whether the network has a use for the trick: resnet_d needs variants, zero_gamma residual blocks of ours."""
    try:
        _edit(config, find_trick(name).on)
    except DoesNotApplyError:
        return False
    except ConfigError:  # another rule: a warm-up longer than the run
        pass
    return True


def is_on(config: TrainConfig, name: str) -> bool:
    """Whether `config` uses the trick: a plain field differs from its off value, a mapped one is as `on` makes it.

    One that does not apply is not on.
    """
    trick = find_trick(name)
    for path, value in trick.on.items():
        used = _is_as(config, {path: value}) if callable(value) else get_at(config, path) != trick.off[path]
        if not used:
            return False
    return True


def is_off(config: TrainConfig, name: str) -> bool:
    """Whether `config` is as switching the trick off would make it: a ResNet-B has resnet_d neither on nor off.

    One that does not apply is neither on nor off.
    """
    return _is_as(config, find_trick(name).off)


def _is_as(config: TrainConfig, edits: Mapping[str, Any]) -> bool:
    try:
        return _edit(config, edits) == config
    except ConfigError:
        return False
