"""Networks of timm by name, where timm is installed: `timm:NAME`. The only importer of timm."""

from __future__ import annotations

import difflib
from typing import Any

from torch import nn

from fasttricks.config import TIMM, ConfigError, require


def import_timm(name: str) -> Any:
    """The module timm. Raises ConfigError, saying how to install it, where it is absent."""
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError(f"model.name = {name!r}: needs timm; install it with: pip install timm") from error
    return timm


def timm_model(name: str, *, num_classes: int) -> nn.Module:
    """timm's network of that name, with the initial weights and defaults that timm gives it; its own state-dict keys.

    name: with the prefix. num_classes: outputs of its classifier. Raises ConfigError where timm is absent or has no such
    network, with the nearest name, and for one that has no classifier.
    """
    timm, bare = import_timm(name), name.removeprefix(TIMM)
    known = timm.list_models()
    nearest = difflib.get_close_matches(bare, known, n=1, cutoff=0)[0]
    require(
        timm.is_model(bare),
        "model.name",
        name,
        f"is no model of timm {timm.__version__}; the nearest is {TIMM}{nearest}",
    )
    model: nn.Module = timm.create_model(bare, num_classes=num_classes)
    return model.train()
