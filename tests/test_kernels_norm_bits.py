"""batch_norm_act's mask in bits, under the interpreter: held to torch's activations on y as stored, and to gradients by y."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from lib.batch_norms import channels_last
from lib.interpreter import interpreted
from lib.tables import covering

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
CHANNELS = {8: (2, 5, 7), 24: (1, 3, 3), 64: (3, 20, 35), 96: (2, 7, 7), 256: (1, 2, 3), 2048: (1, 1, 3)}
"""Channels -> images, height, width; 24 and 96 end in a part of a block, and 3 x 20 x 35 pixels take two programs."""
OPTIONS: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5}
VALUES = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 6.0, -6.0, 5.9999, 6.001, 1e-7, 2.0**-26, -(2.0**-26))


def drawn(channels: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, residual and two gradients; numbers with which y is the residual plus 2^-12 x: values that round to 0 and to 6 too."""
    images, height, width = CHANNELS[channels]
    generator = torch.Generator().manual_seed(channels)
    shape = images, channels, height, width
    tensors = [channels_last(3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(4)]
    for at, value in enumerate(VALUES):
        tensors[0][0, at % channels, 0, at % width], tensors[1][0, at % channels, 0, at % width] = 0.0, value
    tensors[0][0, 1, -1, -1], tensors[1][0, 1, -1, -1] = 2.0**-14, 0.0  # y of 2^-26: 0 in float16
    tensors[0][0, 2, -1, -1], tensors[1][0, 2, -1, -1] = -1.0, 6.0  # y just below 6: 6 in float16
    return tensors, torch.stack([torch.zeros(channels), torch.ones(channels), *torch.full((2, channels), 2.0**-12)])


def gradients_of(y: Tensor, act: str) -> Tensor:
    """Where torch's activation passes a gradient at y, as 0 and 1; and at a NaN, where torch's relu6 differs by the processor's
    vectors."""
    leaf = y.detach().clone().requires_grad_()
    out = F.relu(leaf) if act == "relu" else F.relu6(leaf)
    return torch.autograd.grad(out, leaf, torch.ones_like(leaf))[0].masked_fill(y.isnan(), 1)


def bits_of(mask: Tensor, y: Tensor) -> np.ndarray:
    """(R, C) of 0 and 1: NumPy's reading of the bytes, one for 16 bytes of y, the lowest bit first."""
    group = 16 // y.element_size()
    bits = np.unpackbits(mask.numpy()[..., None], axis=-1, count=group, bitorder="little")
    return bits.transpose(1, 0, 2, 3).reshape(mask.shape[1], -1)[:, : y.shape[1]]


@pytest.mark.parametrize(
    ("channels", "dtype", "act"),
    [
        *covering([8, 24, 64, 96, 256], FLOATS, ["relu", "relu6"]),
        pytest.param(2048, torch.float16, "relu", marks=pytest.mark.slow),
    ],
    ids=str,
)
@interpreted
def test_the_bits_are_the_mask_of_the_output_as_stored(channels: int, dtype: torch.dtype, act: str) -> None:
    """Also as plain PyTorch packs and unpacks them; and the gradients by them are those by y, bit for bit."""
    from fasttricks_kernels.norm import _bits, _launches

    (x, residual, grad, second), numbers = drawn(channels, dtype)
    y, mask = _launches.launch_normalise(x, residual, numbers, act, True)
    assert mask is not None and mask.dtype == torch.uint8
    truth = gradients_of(y, act)
    assert 0.1 < truth.float().mean() < 0.9
    pixels = truth.float().movedim(1, -1).reshape(-1, channels).numpy()
    assert (bits_of(mask, y) == pixels).all()
    assert (bits_of(_bits.packed(y, act), y) == pixels).all()
    assert torch.equal(_bits.as_y(mask, y), truth)
    assert _bits.as_y(y, y) is y and _bits.as_y(None, y) is None
    options = _launches.Options(act, True, 0.1, 1e-5)
    for more in (None, second):
        by_bits, by_y = (_launches.launch_backward(grad, more, x, kept, numbers, options) for kept in (mask, y))
        for one, other in zip(by_bits, by_y, strict=True):
            assert one is not None and torch.equal(one, other)


@interpreted
def test_channels_that_fill_no_bytes_keep_y() -> None:
    from fasttricks_kernels.norm import _launches

    for channels, dtype in ((100, torch.float16), (7, torch.float32), (1, torch.float32), (4, torch.bfloat16)):
        x = channels_last(torch.randn(1, channels, 2, 2)).to(dtype)
        y, mask = _launches.launch_normalise(x, x, torch.ones(4, channels), "relu", True)
        assert mask is y


def call(x: Tensor, act: Any, residual: Tensor | None) -> Tensor:
    return fk.batch_norm_act(x, None, None, None, None, residual=residual, act=act, **OPTIONS)


@interpreted
def test_backward_keeps_a_sixteenth_of_y_and_only_where_it_has_a_mask() -> None:
    """With 1/16 of y kept, y may be changed: the gradient remains that of y as it was."""
    x, residual, grad = (channels_last(torch.randn(2, 64, 5, 5)).half() for _ in range(3))
    leaf = x.clone().requires_grad_()
    y = call(leaf, "relu", residual)
    kept = y.grad_fn.saved_tensors
    assert [tensor.nbytes for tensor in kept if tensor is not None and tensor.dtype == torch.uint8] == [y.nbytes // 16]
    assert all(tensor is None or tensor.data_ptr() != y.data_ptr() for tensor in kept)
    loss = (y * grad).sum()
    (true,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    y.detach().zero_()
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], true)
    for act, other in (("none", residual), ("relu", None)):
        kept = call(leaf, act, other).grad_fn.saved_tensors
        assert not any(tensor is not None and tensor.dtype == torch.uint8 for tensor in kept)
    from fasttricks_kernels.norm import _bits
    from fasttricks_kernels.proof.ledger import ledger

    with ledger() as recorded:
        call(leaf, "relu", residual)
    with ledger() as unrecorded, torch.no_grad():
        call(leaf, "relu", residual)
    assert recorded.stored - unrecorded.stored == _bits.empty_bits(x).numel() == x.nbytes // 16


@interpreted
def test_slices_of_wider_tensors_have_the_bits_of_dense_ones() -> None:
    """x, residual and gradient as slices of channels: other pixel strides, of which one makes narrow accesses."""
    from fasttricks_kernels.norm import _launches

    (x, residual, grad, _), numbers = drawn(24, torch.float16)
    options = _launches.Options("relu6", True, 0.1, 1e-5)
    dense_y, dense_mask = _launches.launch_normalise(x, residual, numbers, "relu6", True)
    dense = _launches.launch_backward(grad, None, x, dense_mask, numbers, options)
    for width in (64, 44):
        wide = [channels_last(torch.zeros(x.shape[0], width, *x.shape[2:])).half()[:, 8:32] for _ in range(3)]
        for slice_, values in zip(wide, (x, residual, grad), strict=True):
            slice_.copy_(values)
        y, mask = _launches.launch_normalise(wide[0], wide[1], numbers, "relu6", True)
        torch.testing.assert_close(y, dense_y, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(mask, dense_mask)
        found = _launches.launch_backward(wide[2], None, wide[0], mask, numbers, options)
        assert all(torch.equal(one, other) for one, other in zip(found, dense, strict=True))
