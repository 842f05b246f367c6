"""A test's draws from the global generators are its own: the same alone, after any other, and with Triton's interpreter."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lib.interpreter import interpreted
from lib.seeds import SEED


def drawn() -> tuple[float, float, float]:
    return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002


def wanted() -> tuple[float, float, float]:
    """What generators of their own draw first."""
    numpys = np.random.RandomState(SEED)
    return (
        random.Random(SEED).random(),
        numpys.rand(),
        float(torch.rand((), generator=torch.Generator().manual_seed(SEED))),
    )


@pytest.fixture(scope="module")
def shared() -> tuple[float, float, float]:
    return drawn()


@pytest.mark.parametrize("turn", [1, 2])
def test_each_test_draws_from_the_start(turn: int) -> None:
    assert drawn() == wanted() != drawn()


def test_so_does_a_fixture_of_several_tests(shared: tuple[float, float, float]) -> None:
    assert shared == drawn() == wanted()


@pytest.mark.parametrize("turn", [1, 2])
@interpreted
def test_so_does_a_test_under_the_interpreter(turn: int) -> None:
    assert drawn() == wanted() != drawn()
