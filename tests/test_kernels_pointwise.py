"""pointwise.conv1x1: as right as torch's convolution beside float64, its derivatives, and the passes and calls left to torch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn import functional as F

from fasttricks_kernels.convolution import pointwise
from lib.convolved import (
    calls_left_to_torch,
    check_errors,
    check_layouts,
    check_second_derivative,
    check_that_a_change_is_refused,
    check_what_is_left_to_torch,
    draw,
    passes,
    skip_unless_measured,
)
from lib.tables import covering

SMALL_FACTOR = 1.5
"""Beside torch's error, root mean square: a product adds in another order."""
WIDENS, NARROWS, WIDE, NARROW = (128, 256), (256, 64), (512, 640), (96, 128)
"""Channels and outputs of which the forward pass, the gradients, and all passes are products; or none."""


@pytest.fixture(autouse=True)
def _measured() -> None:
    skip_unless_measured()


@pytest.mark.parametrize(
    ("channels", "side", "images", "layout"),
    covering([WIDENS, NARROWS, WIDE, NARROW], [(1, 1), (7, 5), (12, 1)], [1, 3, 41], ["NHWC", "NCHW"]),
    ids=str,
)
def test_errors_are_torchs_times_a_small_factor(
    channels: tuple[int, int], side: tuple[int, int], images: int, layout: str
) -> None:
    data = draw(*channels, side, images, kernel=1)
    if layout == "NHWC":
        data["weight"] = data["weight"].to(memory_format=torch.channels_last)
    check_errors(pointwise.conv1x1, F.conv2d, data, SMALL_FACTOR)


@pytest.mark.parametrize(
    ("channels", "products"),
    [(WIDENS, [True, False, False]), ((256, 128), [False, True, True]), (WIDE, [True] * 3), (NARROW, [False] * 3)],
)
def test_other_passes_are_torchs_operators(channels: tuple[int, int], products: list[bool]) -> None:
    data = draw(*channels, (5, 4), kernel=1)
    pixels = [value.permute(0, 2, 3, 1).flatten(0, 2) for value in (data["x"], data["grad"])]
    matrix = data["weight"].flatten(1)
    by_product = [pixels[0] @ matrix.t(), pixels[1] @ matrix, pixels[1].t() @ pixels[0]]
    found, theirs = passes(pointwise.conv1x1, data), passes(F.conv2d, data)
    for is_product, ours, its, product in zip(products, found, theirs, by_product, strict=True):
        rows = ours.permute(0, 2, 3, 1).reshape(product.shape)
        assert torch.equal(rows, product.double()) if is_product else torch.equal(ours, its)


@pytest.mark.parametrize("channels", [WIDENS, NARROWS, WIDE])
def test_results_are_channels_last_and_the_inputs_are_left(channels: tuple[int, int]) -> None:
    check_layouts(pointwise.conv1x1, draw(*channels, (6, 8), kernel=1))


@pytest.mark.parametrize("strides", [(512, 1, 1, 1), (512, 1, 512, 512)], ids=["NCHW", "NHWC"])
def test_the_gradient_of_the_weight_has_its_strides(strides: tuple[int, ...]) -> None:
    """Another's are copied by DDP, with a warning."""
    data = draw(*WIDE, (2, 2), kernel=1)
    weight = torch.empty_strided((640, 512, 1, 1), strides).copy_(data["weight"]).requires_grad_()
    (grad,) = torch.autograd.grad(pointwise.conv1x1(data["x"], weight), weight, data["grad"])
    assert grad.stride() == weight.stride() == strides
    assert torch.equal(grad.double(), passes(pointwise.conv1x1, data)[2])


def test_a_weight_with_gaps_is_taken() -> None:
    data = draw(*WIDE, (2, 2), kernel=1)
    wide = torch.randn(640, 1024, 1, 1)
    wide[:, ::2] = data["weight"]
    data["weight"] = wide[:, ::2]
    check_errors(pointwise.conv1x1, F.conv2d, data, SMALL_FACTOR)


@pytest.mark.parametrize("channels", [WIDENS, NARROWS, WIDE])
def test_the_second_derivative_is_torchs(channels: tuple[int, int]) -> None:
    check_second_derivative(pointwise.conv1x1, F.conv2d, draw(*channels, (3, 2), kernel=1))


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_that_is_not_asked_for_is_not_computed(frozen: str) -> None:
    data = draw(*WIDE, (4, 4), kernel=1)
    leaves = [data[name].requires_grad_(name != frozen) for name in ("x", "weight")]
    with mock.patch.object(pointwise, "grad_input" if frozen == "x" else "grad_weight", None):
        pointwise.conv1x1(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [frozen == "x", frozen == "weight"]


def test_an_input_that_was_changed_is_refused_in_backward() -> None:
    check_that_a_change_is_refused(pointwise.conv1x1, draw(*WIDE, (4, 4), kernel=1))


LARGE = torch.empty(2, 256, 16, 16).to(memory_format=torch.channels_last)
WEIGHT = torch.empty(128, 256, 1, 1)
CALLS = calls_left_to_torch(LARGE, WEIGHT) | {
    "no pass is faster": (torch.empty(4, 128, 16, 16).to(memory_format=torch.channels_last), WEIGHT[:, :128]),
}
"""Calls that it leaves to torch."""


def test_it_takes_large_channels_last_float32() -> None:
    assert pointwise.takes(LARGE, WEIGHT) and pointwise.takes(LARGE, WEIGHT[:64])
    assert pointwise.takes(
        LARGE.reshape(4, 128, 16, 16).to(memory_format=torch.channels_last), torch.empty(256, 128, 1, 1)
    )


@pytest.mark.parametrize("name", list(CALLS))
def test_it_leaves_other_tensors_to_torch(name: str) -> None:
    assert not pointwise.takes(*CALLS[name])


def test_it_leaves_transforms_autocast_and_modes_to_torch() -> None:
    check_what_is_left_to_torch(pointwise.takes, LARGE, WEIGHT)


def test_a_cpu_without_avx2_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not pointwise.takes(LARGE, WEIGHT)
