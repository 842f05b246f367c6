"""Runs in this process: stopped at a step, and what they leave that has to be the same in another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from fasttricks import trainer
from fasttricks.data.batch import Batch
from fasttricks.learning.divergence import Counted
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.log import TIMINGS
from fasttricks.trainer import fit
from fasttricks.training.run import Run


def groups(run: Run) -> Iterator[list[Batch]]:
    """The micro-batches of each step of one epoch."""
    batches = list(run.train_loader)
    for first in range(0, len(batches), run.config.accumulate):
        yield batches[first : first + run.config.accumulate]


def own_convolutions() -> AbstractContextManager[None]:
    """Within, torch computes convolutions by its own loops: oneDNN's FP16 gradients take ten times as long on most CPUs.

    For tests of what a run does, not of how exact FP16 is: the loops' gradient of a weight is 1e-3 from float64's, and that of
    oneDNN, which sums in float32 as a GPU does, 2e-4.
    """
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)  # which warns where it is given


class Stop(Exception):
    """What ends a run in these tests, wherever it stands."""


def interrupt(run: Run, monkeypatch: pytest.MonkeyPatch, *, at_step: int) -> None:
    """Run until `at_step` updates are done, then stop as a kill would: nothing more is saved."""
    step = trainer.train_step

    def stopping(run: Run, group: list[Batch]) -> list[Counted]:
        if run.step == at_step:
            raise Stop
        return step(run, group)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stopping)
        with pytest.raises(Stop):
            fit(run)


def let_go(runs: Iterable[Run]) -> None:
    """Free the folders of runs that stand for those whose processes have ended."""
    for run in runs:
        run.claim.__exit__(None, None, None)


def records(run: Run) -> list[dict[str, Any]]:
    """metrics.jsonl without its timings."""
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def final_state(run: Run) -> dict[str, Any]:
    """The newest checkpoint without names and times."""
    state = load_checkpoint(run.folder)
    for key in ("path", "config", "train_seconds"):
        del state[key]
    for rank in state["ranks"]:
        del rank["log"]["seconds"]
    return state
