"""The bounds of the tests on a GPU hold without one: the same checks, the kernels interpreted in NumPy, which fuses nothing.

What NumPy cannot show is the GPU's own exp and log, which the bounds allow 2 units of the last place.
"""

from __future__ import annotations

import pytest
import torch

from lib.interpreter import interpreted
from lib.kernel_checks import DTYPES, check_images, check_losses, check_sgd

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CPU = "cpu"


@EACH_DTYPE
@pytest.mark.parametrize(
    "side", [16, pytest.param(32, marks=pytest.mark.slow), pytest.param(224, marks=pytest.mark.slow)]
)
@interpreted
def test_images(side: int, dtype: torch.dtype) -> None:
    """A bound of a few roundings is nearly reached: a third of it is, so no rounding too many was counted threefold."""
    shares = check_images(dtype, CPU, side)
    assert set(shares) == {"alone", "both", "mixup"}
    assert all(1 / 3 < share <= 1 for share in shares.values()), shares


@EACH_DTYPE
@pytest.mark.parametrize("num_classes", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (1000, 1001, 21843))])
@interpreted
def test_losses(num_classes: int, dtype: torch.dtype) -> None:
    shares = check_losses(num_classes, dtype, CPU, rows=8)
    assert len(shares) == 4
    assert all(share <= 1 for share in shares.values()), shares
    if dtype != torch.float32:  # the one rounding to the logits' dtype is nearly all of the gradient's error
        assert all(share > 1 / 3 for name, share in shares.items() if "gradient" in name), shares


@EACH_DTYPE
@interpreted
def test_sgd(dtype: torch.dtype) -> None:
    shares = check_sgd(dtype, CPU, (1, 17, 1024, 2049))
    assert len(shares) == 4
    assert all(share <= 1 for share in shares.values()), shares
    assert max(shares.values()) > 0.05, "a bound that is 20 times the error would let a wrong constant through"
