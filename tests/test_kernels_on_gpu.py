"""The kernels on a GPU: values against float64, and no wait for the device. Skipped, aloud, where there is none.

Time is bench.kernels' business; what can be known without a card is in the other test_kernels files. The bounds are derived in
lib/kernel_checks.py and shown to hold without a GPU by test_kernels_bounds.py.
"""

from __future__ import annotations

import pytest
import torch

import fasttricks_kernels as fk
from lib.kernel_checks import DTYPES, check_images, check_losses, check_sgd

pytestmark = pytest.mark.gpu
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@EACH_DTYPE
@pytest.mark.parametrize("num_classes", [10, 1000, 1001, 21843])
def test_losses(num_classes: int, dtype: torch.dtype) -> None:
    """Loss and gradient of both losses under mixup, smoothing and a loss scale on the device."""
    shares = check_losses(num_classes, dtype, "cuda")
    assert all(share <= 1 for share in shares.values()), shares


@EACH_DTYPE
def test_images(dtype: torch.dtype) -> None:
    """augment, alone and with the partner in the same pass, and mixup by pairs, at ImageNet's size."""
    shares = check_images(dtype, "cuda")
    assert all(share <= 1 for share in shares.values()), shares


@EACH_DTYPE
def test_sgd(dtype: torch.dtype) -> None:
    """Steps and a skipped one, tails included, against torch.optim.SGD in float64."""
    shares = check_sgd(dtype, "cuda")
    assert all(share <= 1 for share in shares.values()), shares


def test_a_bad_label_is_a_row_of_nan_and_no_error() -> None:
    logits = torch.randn(3, 10, device="cuda", dtype=torch.float16)
    loss = fk.cross_entropy(logits, torch.tensor([0, 10, -1], device="cuda"), ignore_index=None, reduction="none")
    assert loss.isnan().tolist() == [False, True, True]
