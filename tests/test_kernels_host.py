"""The host's time of a call that would launch on a GPU: it is the launching code that is measured, and it is short."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch

from fasttricks_kernels import MasterSGD, _launch
from fasttricks_kernels.proof.aot import record_launches
from fasttricks_kernels.proof.host import host_times, kernels_left_out, works


@pytest.mark.parametrize("name", [name for name in works() if not name.startswith("F.")])
def test_a_measured_call_launches_its_kernels(name: str) -> None:
    """Forward and backward: two launches. One pass: one."""
    with mock.patch.object(_launch, "INTERPRETED", True):
        launches = record_launches(works()[name])
    assert len(launches) == (1 if "grad" in name or "forward" in name else 2)


@pytest.mark.slow
def test_direct_calls_save_a_part_of_the_operators_time_and_take_about_torchs() -> None:
    """Ratios within one thread's turns: 0.4 to 0.8 and at most 1.2 were measured; before, 1.4 over torch's."""
    for row in host_times(turns=100):
        if not row.name.startswith("F."):
            assert row.over_operator < 0.9 and row.over_torch < 1.35, row


@pytest.mark.slow
def test_moved_gradients_cost_a_step_little() -> None:
    """20 million parameters, 20,000 programs, as a ResNet-50's: 1.2 to 1.5 times a step's host time was measured; before, 6."""
    weights = [torch.nn.Parameter(torch.zeros(125_000, dtype=torch.float16)) for _ in range(160)]
    optimizer = MasterSGD(weights, lr=0.1, momentum=0.9)
    bucket = torch.zeros(160 * 125_000 + 8 * 40, dtype=torch.float16)
    scale, ratios = torch.tensor(1.0), []
    with kernels_left_out():
        for turn in range(40):
            for weight, grad in zip(weights, bucket[8 * turn :][: 160 * 125_000].split(125_000), strict=True):
                weight.grad = grad
            moved, again = (_seconds(lambda: optimizer.step(loss_scale=scale)) for _ in range(2))
            ratios.append(moved / again)
    assert statistics.median(ratios) < 2.5, ratios


def _seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start
