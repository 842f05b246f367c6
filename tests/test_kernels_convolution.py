"""winograd.conv3x3 and conv3x3_pool: as right as torch's convolution beside float64, derivatives, the calls left to torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fasttricks_kernels.convolution import _taken, winograd
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
from lib.sanitized import check_sanitized
from lib.tables import covering

SMALL_FACTOR = 1.5
"""Beside torch's error, root mean square. From 3 images on 0.2 to 1.3 times torch's were measured, and 0.5 for most shapes."""
SIDES = ((1, 1), (1, 9), (2, 2), (3, 8), (7, 7), (16, 5))


@pytest.fixture(autouse=True)
def _compiled() -> None:
    skip_unless_measured()
    assert winograd.compiled() is not None


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def pooled(x: Tensor, weight: Tensor) -> Tensor:
    return F.max_pool2d(plain(x, weight), 2)


KINDS = {"conv3x3": (winograd.conv3x3, plain), "conv3x3_pool": (winograd.conv3x3_pool, pooled)}
"""Name -> ours and torch's."""


@pytest.mark.parametrize(
    ("channels", "outputs", "side", "images", "layout", "kind"),
    covering([24, 32, 64, 160], [24, 40, 96, 128], list(SIDES), [3, 41], ["NHWC", "NCHW"], list(KINDS), together=2),
    ids=str,
)
def test_errors_are_torchs_times_a_small_factor(
    channels: int, outputs: int, side: tuple[int, int], images: int, layout: str, kind: str
) -> None:
    ours_is, theirs_is = KINDS[kind if min(side) > 1 else "conv3x3"]
    data = draw(channels, outputs, side, images)
    if layout == "NHWC":
        data["weight"] = data["weight"].to(memory_format=torch.channels_last)
    check_errors(ours_is, theirs_is, data, SMALL_FACTOR)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf"), float("-inf"), "random"])
def test_maxima_are_max_pool2ds_of_the_convolution_bit_for_bit(value: float | str) -> None:
    """And so are the places of equal ones and of NaN, in the gradient."""
    data = draw(24, 40, (9, 7), images=2)
    x, weight, grad = data.values()
    if isinstance(value, float):
        x[0, 3, 4:6, 2:4] = value
        x[1] = 0  # all of a window are equal
    whole = winograd.convolve(x, weight).requires_grad_()
    wanted = F.max_pool2d(whole, 2)
    grad = grad[..., :4, :3].contiguous(memory_format=torch.channels_last)
    made, chosen = winograd.convolve_pool(x, weight)
    torch.testing.assert_close(made, wanted.detach(), rtol=0, atol=0, equal_nan=True)
    (of_whole,) = torch.autograd.grad(wanted, whole, grad)
    assert torch.equal(winograd.spread(grad, chosen, 9, 7), of_whole)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_channels_last_and_the_inputs_are_left(kind: str) -> None:
    check_layouts(KINDS[kind][0], draw(32, 64, (6, 8)))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_rounding_in_the_gradient_of_the_weight_alone(kind: str) -> None:
    data, results = draw(64, 64, (40, 42), images=2), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([passes(KINDS[kind][0], data) for _ in range(2)])
    for first, second in results:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(first[0], results[0][0][0]) and torch.equal(first[1], results[0][0][1])
        torch.testing.assert_close(first[2], results[0][0][2], rtol=0, atol=1e-6 * float(first[2].abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_derivative_is_torchs(kind: str) -> None:
    check_second_derivative(*KINDS[kind], draw(32, 32, (6, 5)))


@pytest.mark.parametrize("kind", KINDS)
def test_with_few_pixels_the_gradient_of_the_weight_is_torchs(kind: str) -> None:
    """Bit for bit, and the others are as right as ever."""
    data = draw(96, 128, (7, 5))
    assert winograd.WEIGHTS_A_PIXEL * 3 * 7 * 5 < 96 * 128 < winograd.WEIGHTS_A_PIXEL * 3 * 8 * 9
    ours, theirs = KINDS[kind]
    check_errors(ours, theirs, data, SMALL_FACTOR)
    whole = data["grad"]
    if kind == "conv3x3_pool":
        maxima, chosen = winograd.convolve_pool(data["x"], data["weight"])
        grad = whole[..., : maxima.shape[2], : maxima.shape[3]].contiguous(memory_format=torch.channels_last)
        whole = winograd.spread(grad, chosen, 7, 5)
    weight = data["weight"].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(data["x"], weight), weight, whole)
    assert torch.equal(passes(ours, data)[2], wanted.double())
    more = draw(96, 128, (8, 9))
    assert not torch.equal(passes(ours, more)[2], passes(theirs, more)[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_a_gradient_that_is_not_asked_for_is_not_computed(
    frozen: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw(32, 32, (4, 4))
    leaves = [data[name].requires_grad_(name != frozen) for name in ("x", "weight")]
    monkeypatch.setattr(winograd, "grad_input" if frozen == "x" else "grad_weight", None)
    KINDS[kind][0](*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [frozen == "x", frozen == "weight"]


def test_an_input_that_was_changed_is_refused_in_backward() -> None:
    check_that_a_change_is_refused(winograd.conv3x3, draw(32, 32, (4, 4)))


LARGE = torch.empty(2, 64, 32, 32).to(memory_format=torch.channels_last)
WEIGHT = torch.empty(64, 64, 3, 3)
CALLS = calls_left_to_torch(LARGE, WEIGHT) | {
    "few channels": (torch.empty(2, 12, 80, 80).to(memory_format=torch.channels_last), torch.empty(64, 12, 3, 3)),
    "few outputs": (LARGE, WEIGHT[:16]),
    "a part of a vector": (LARGE, WEIGHT[:28]),
    "tiles that are half empty": (torch.empty(256, 64, 3, 3).to(memory_format=torch.channels_last), WEIGHT),
}
"""Calls that it leaves to torch."""


def test_it_takes_large_channels_last_float32() -> None:
    assert LARGE.numel() == _taken.LEAST_VALUES
    assert winograd.takes(LARGE, WEIGHT)
    assert winograd.takes(torch.empty(64, 64, 7, 7).to(memory_format=torch.channels_last), WEIGHT)
    assert winograd.takes(LARGE, WEIGHT[:24])


@pytest.mark.parametrize(("capability", "taken"), [("AVX2", True), ("AVX512", False)])
def test_few_pixels_are_left_to_torch_where_it_is_faster(
    capability: str, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weight = torch.empty(512, 512, 3, 3)
    for images, found in ((32, taken), (128, True)):
        assert winograd.takes(torch.empty(images, 512, 7, 7).to(memory_format=torch.channels_last), weight) is found


@pytest.mark.parametrize("name", list(CALLS))
def test_it_leaves_other_tensors_to_torch(name: str) -> None:
    assert not winograd.takes(*CALLS[name])


def test_it_leaves_transforms_autocast_and_modes_to_torch() -> None:
    check_what_is_left_to_torch(winograd.takes, LARGE, WEIGHT)


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    winograd.compiled.cache_clear()
    try:
        with pytest.warns(
            RuntimeWarning, match="3x3 convolutions on the CPU are slower than they might be: no C compiler"
        ):
            assert not winograd.takes(LARGE, WEIGHT)
        assert not winograd.takes(LARGE, WEIGHT)  # and says so once
    finally:
        winograd.compiled.cache_clear()


def test_a_cpu_without_avx2_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    winograd.compiled.cache_clear()
    try:
        assert not winograd.takes(LARGE, WEIGHT)
    finally:
        winograd.compiled.cache_clear()


BODY = """
    const int64_t sizes[][4] = {{1, 2, 2, 0}, {3, 2, 5, 1}, {2, 7, 6, 2}, {2, 16, 17, 0}, {1, 1, 9, 1}};
    for (int i = 0; i < 5; i++)
        for (int tiles = 6; tiles <= 96; tiles += 30) {
            const int64_t N = sizes[i][0], H = sizes[i][1], W = sizes[i][2];
            const int64_t C = LANES + 8 * sizes[i][3], K = 56 - 8 * sizes[i][3];
            const int64_t wide = panels(C) * PANEL, high = panels(K) * PANEL;
            Job b = {.N = N, .H = H, .W = W, .C = C, .K = K, .tiles = tiles, .flip = tiles % 2,
                     .TH = (H + 1) / 2, .TW = (W + 1) / 2,
                     .stride_out = 9 * C, .stride_in = 9, .stride_row = 3, .stride_col = 1,
                     .scratch_size = 16 * tiles * (C + PANEL) + PANEL};
            b.x = of(N * H * W * C), b.w = of(9 * K * C), b.y = of(N * H * W * K);
            b.grad = of(N * H * W * K), b.grad_w = of(9 * K * C), b.zeros = of(C > K ? C : K);
            b.u = of(16 * high * C), b.scratch = of(b.scratch_size);
            fasttricks_winograd_convolve(&b, 1, NULL);
            b.scratch_size = 16 * tiles * (wide + K), b.scratch = of(b.scratch_size), b.sums = of(16 * K * wide);
            fasttricks_winograd_differentiate(&b, 1, NULL);
            if (H < 2) continue;
            b.TH = H / 2, b.TW = W / 2;
            fasttricks_winograd_differentiate(&b, 1, NULL);
            const int64_t windows = N * b.TH * b.TW * K;
            b.chosen = (uint8_t *)of((windows + 3) / 4) + (-windows & 3);  /* its end is the end of the memory */
            b.scratch_size = 16 * tiles * (C + PANEL) + PANEL, b.scratch = of(b.scratch_size), b.y = of(windows);
            fasttricks_winograd_convolve(&b, 1, NULL);
            b.grad = of(windows), b.y = of(N * H * W * K);
            fasttricks_winograd_spread(&b, 1, NULL);
        }
"""


@pytest.mark.slow
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    check_sanitized(winograd.SOURCE, BODY, tmp_path, "-march=native")
