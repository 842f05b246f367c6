"""norm.c, batch_norm_act of float32 on the CPU: as right as torch's, the same bits for any number of threads, within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fasttricks_kernels as fk
from fasttricks_kernels.norm import _cpu
from lib.batch_norms import FORMS, SHAPES, channels_last, check, check_many, draw, ours
from lib.sanitized import check_sanitized
from lib.tables import covering

CHANNELS = [1, 3, 7, 32, 64, 100, 513, 2048]
ALMOST_NONE = {torch.float32: 1e-7}
"""Beside torch's error, of the largest value: less than a rounding of it."""


@pytest.fixture(autouse=True)
def _compiled() -> None:
    assert _cpu.compiled() is not None


@pytest.mark.parametrize(
    ("channels", "rows", "form", "fork"), covering(CHANNELS, list(SHAPES), FORMS, [False, True]), ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_errors_are_at_most_torchs(
    channels: int, rows: int, form: tuple[str, bool], fork: bool, training: bool
) -> None:
    data = draw(channels, rows, torch.float32, fork=fork)
    check(data if form[1] else data | {"residual": None}, form[0], training, step=ALMOST_NONE)


def test_the_errors_of_many_draws_are_torchs() -> None:
    check_many(100)


def test_a_mean_of_a_thousand_standard_deviations() -> None:
    for channels in (3, 64):
        check(draw(channels, 2100, torch.float32, shift=1500.0), "relu", training=True, step=ALMOST_NONE)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine parts or more, among one to five threads; all of the rows in one part have other last bits, so parts do count."""
    monkeypatch.setattr(_cpu, "VALUES_A_PART", 16_384)
    data = draw(70, 2100, torch.float32, fork=True)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(ours(data, "relu", True))
    assert all(torch.equal(result[name], value) for result in results[1:] for name, value in results[0].items())
    monkeypatch.setattr(_cpu, "VALUES_A_PART", 10**9)
    assert not torch.equal(ours(data, "relu", True)["grad_x"], results[0]["grad_x"])


@pytest.mark.parametrize("channels", [7, 64, 520])
def test_results_past_the_caches_have_the_same_bits(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(channels, 98, torch.float32, fork=True)
    cached = ours(data, "relu", True)
    monkeypatch.setattr(_cpu, "STREAMED_FROM", 0)
    assert all(torch.equal(value, cached[name]) for name, value in ours(data, "relu", True).items())


def test_slices_of_the_channels_of_wider_tensors_are_not_copied() -> None:
    data = draw(32, 98, torch.float32)
    dense = ours(data, "relu", True)
    wide = [channels_last(torch.randn(2, 96, 7, 7)) for _ in range(2)]
    x, grad = (w[:, 40:72] for w in wide)
    x.copy_(data["x"])
    grad.copy_(data["grad"])
    sliced = ours(data, "relu", True, x=x.requires_grad_(), grad=grad)
    assert all(torch.equal(sliced[name], value) for name, value in dense.items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_opcheck() -> None:
    ops = torch.ops.fasttricks_kernels
    data = draw(8, 49, torch.float32)
    x, weight, bias, residual = (data[name].requires_grad_() for name in ("x", "weight", "bias", "residual"))
    options = "relu6", True, 0.1, 1e-5
    arguments = x, weight, bias, data["running_mean"], data["running_var"], residual, None, True, *options
    torch.library.opcheck(ops.batch_norm_act.default, arguments)
    y, _, numbers, bits, *_ = (result.detach() for result in ops.batch_norm_act(*arguments))
    found = []
    for mask in (y, bits):
        given = data["grad"], data["grad"], x.detach(), mask, numbers, True, *options
        torch.library.opcheck(ops.batch_norm_act_backward.default, given)
        found.append(ops.batch_norm_act_backward(*given))
    assert all(map(torch.equal, *found))


def test_a_changed_input_is_refused_in_backward() -> None:
    x = channels_last(torch.randn(2, 8, 3, 3)).requires_grad_()
    kept = x * 1
    y = fk.batch_norm_act(kept, None, None, None, None, act="relu", training=True, momentum=0.1, eps=1e-5)
    with torch.no_grad():
        kept += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(8, 98, torch.float32)
    with_c = ours(data, "relu", True)
    monkeypatch.setenv("CC", "no-such-compiler")
    _cpu.compiled.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="batch norm on the CPU is slower than it might be: no C compiler"):
            without = ours(data, "relu", True)
    finally:
        _cpu.compiled.cache_clear()
    for name, value in with_c.items():
        torch.testing.assert_close(without[name], value, rtol=1e-4, atol=1e-5)


BODY = """
    const int64_t sizes[][2] = {{1, 1}, {2, 3}, {5, 513}, {1030, 7}, {263, 1100}};
    for (int i = 0; i < 5; i++)
        for (int act = 0; act < 3; act++)
            for (int form = 0; form < 4; form++) {
                const int residual = form % 2, fork = form / 2;
                const int64_t R = sizes[i][0], C = sizes[i][1], rows = 100, P = (R + rows - 1) / rows;
                Batch b = {.R = R, .C = C, .x_stride = C + 2, .residual_stride = C, .grad_stride = C + 1, .second_stride = C + 3,
                           .momentum = 0.1, .eps = 1e-5, .act = act, .training = R > 1, .rows = rows, .stream = i % 2};
                b.x = of((R - 1) * (C + 2) + C), b.grad = of((R - 1) * (C + 1) + C), b.out = of(R * C);
                b.residual = residual ? of(R * C) : NULL;
                b.weight = of(C), b.bias = of(C), b.grad_weight = of(C), b.grad_bias = of(C);
                b.running_mean = of(C), b.running_var = of(C), b.numbers = of(4 * C), b.means = of(2 * C);
                b.parts = malloc(2 * P * C * sizeof(double)), b.totals = malloc(2 * C * sizeof(double));
                for (int64_t c = 0; c < C; c++) b.running_var[c] = 1;
                fasttricks_norm_forward(&b, 1, NULL);
                if (fork) b.second = of((R - 1) * (C + 3) + C);
                if (residual && act) b.y = b.out, b.out = of(R * C);
                if (residual && (act || fork)) b.grad_residual = of(R * C);
                fasttricks_norm_backward(&b, 1, NULL);
            }
"""


@pytest.mark.slow
def test_the_sanitizers_find_nothing(tmp_path: Path) -> None:
    check_sanitized(_cpu.SOURCE, BODY, tmp_path, "-ffp-contract=off")
