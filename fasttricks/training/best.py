"""The best validation of a run so far: kept with its checkpoint, and counted from for early stopping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Best(NamedTuple):
    """A validation."""

    value: float
    """The headline metric, of which higher is better."""
    epoch: int
    """Epochs done by then."""
    step: int
    """Updates done by then."""


@dataclass
class BestSoFar:
    """The best validation, and how many came after it. Equal on all ranks, as the metrics are."""

    best: Best | None = None
    since: int = 0
    """Validations after the best."""

    def judge(self, value: float, *, epoch: int, step: int) -> bool:
        """Count a validation. Returns whether it is better than all before; an equal one is not, and NaN never is."""
        if value > (self.best.value if self.best is not None else float("-inf")):
            self.best, self.since = Best(value, epoch, step), 0
            return True
        self.since += 1
        return False

    def gives_up(self, patience: int) -> bool:
        """Whether early stopping ends the run: `patience` validations in a row without a new best; 0: never."""
        return 0 < patience <= self.since

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON: a checkpoint without it is of a release that had no such thing."""
        return {"best": json.dumps([*(self.best or ()), self.since])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint; of one without, nothing is known."""
        *best, self.since = json.loads(state.get("best", "[0]"))
        self.best = Best(*best) if best else None
