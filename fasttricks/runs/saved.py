"""A checkpoint as evaluation, prediction, export and distillation read it: its network, and the classes of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from fasttricks.config import TrainConfig, from_dict, model_info, require
from fasttricks.models import build_network
from fasttricks.runs.checkpoint import load_checkpoint, load_weights
from fasttricks.runs.stored import CheckpointError
from fasttricks.system.reading import parse_json
from fasttricks.system.schema import anything, fields, listed, optional, table, text, whole

_STATE = fields(
    {
        "config": text(1 << 20),
        "classes": listed(text()),
        "step": whole(),
        "epoch": whole(),
        "ranks": listed(anything),
        "model": table(anything),
        "average": optional(table(anything)),
    },
    {"task": text()},
)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The contents of a checkpoint, without the parts that only a resumed run needs."""

    path: Path
    """The checkpoint's file."""
    task: str
    config: TrainConfig
    """The config of the run that wrote it."""
    classes: tuple[str, ...]
    """Names of the classifier's outputs, in their order."""
    step: int
    epoch: int
    ranks: int
    weights: Mapping[str, Tensor]
    """FP32, on the CPU."""
    average: Mapping[str, Tensor] | None
    """The average of the weights, where the run kept one (ema_decay)."""
    foreign: bool = False
    """Whether another program wrote the weights: config is then that of no run, but for model and data."""
    temperature: float | None = None
    """The temperature that an export's classifier has folded into it; None: none."""
    trust: str = ""
    """The name of a user's own network that may be imported; empty: none."""

    def trusting(self, name: str) -> Saved:
        """The same, with the user's word that the code of the network `name` may run; empty: as before.

        Raises ConfigError where the checkpoint's network is code and not that, or where it is another one. Imports nothing.
        """
        recorded, name = self.config.model.name, name or self.trust
        own = model_info(recorded).family == "own"
        rule = f"the network of {self.path} is {recorded!r}; give its name, or leave the option out"
        require(not name or (own and name == recorded), "trust_code", name, rule)
        rule = f"names code, which no file may run (checkpoint {self.path}); where you trust it, add --trust-code {recorded}"
        require(not own or name == recorded, "model.name", recorded, rule)
        return replace(self, trust=name)

    def network(self, *, average: bool = True) -> nn.Module:
        """Its network: FP32, on the CPU, in evaluation mode.

        average: with the averaged weights where the run kept an average. Raises CheckpointError for weights that are not
        this network's, and ConfigError as trusting().
        """
        self.trusting(self.trust)
        model = build_network(self.config, len(self.classes))
        averaged = self.average if average else None
        load_weights(model, self.weights if averaged is None else averaged, source=str(self.path))
        return model.eval()


def read_saved(path: Path) -> Saved:
    """The checkpoint at `path`: a file, or a run folder, of which the newest is taken. Raises as load_checkpoint."""
    state = load_checkpoint(path)
    try:
        _STATE(state, "")
        config = from_dict(TrainConfig, parse_json(state["config"].encode(), table(anything)))
    except ValueError as error:
        rule = "must hold the state of a run of fasttricks.train"
        raise CheckpointError(f"checkpoint = {state['path']!r}: {rule} ({error}); use another one") from error
    return Saved(
        path=Path(state["path"]),
        task=state.get("task", "classification"),  # as in every checkpoint before there were others
        config=config,
        classes=tuple(state["classes"]),
        step=state["step"],
        epoch=state["epoch"],
        ranks=len(state["ranks"]),
        weights=state["model"],
        average=state["average"],
    )
