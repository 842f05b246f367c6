"""A network from a checkpoint: what evaluation, distillation, export and prediction begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from fasttricks.config import TrainConfig, from_dict
from fasttricks.models import build_model
from fasttricks.runs.checkpoint import load_weights


def saved_config(state: Mapping[str, Any]) -> TrainConfig:
    """The config of the run that wrote the checkpoint `state`."""
    return from_dict(TrainConfig, json.loads(state["config"]))


def restore_model(state: Mapping[str, Any], *, average: bool = True) -> nn.Module:
    """The network of the checkpoint `state`, as load_checkpoint returned it: FP32, on the CPU, in evaluation mode.

    average: its averaged weights where the run kept an average (ema_decay). Raises CheckpointError for weights that are
    not this network's.
    """
    model = build_model(saved_config(state).model, len(state["classes"]))
    averaged = average and state["average"] is not None
    load_weights(model, state["average" if averaged else "model"], source=state["path"])
    return model.eval()
