"""batch_norm_act under the interpreter, against float64: as right as torch's batch norm, at its edges, with torch's errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from lib.batch_norms import FORMS, SHAPES, by_torch, channels_last, check, check_many, draw, open_mask, ours
from lib.interpreter import interpreted
from lib.tables import covering

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
CHANNELS = [1, 3, 7, 32, 64, 100]


@pytest.mark.parametrize(
    ("channels", "rows", "dtype", "form", "fork"),
    [
        *covering(CHANNELS, list(SHAPES), FLOATS, FORMS, [False, True]),
        (2048, 2, torch.float16, FORMS[4], True),
        pytest.param(2048, 98, torch.float32, FORMS[1], False, marks=pytest.mark.slow),
    ],
    ids=str,
)
@interpreted
def test_training(channels: int, rows: int, dtype: torch.dtype, form: tuple[str, bool], fork: bool) -> None:
    data = draw(channels, rows, dtype, fork=fork)
    check(data if form[1] else data | {"residual": None}, form[0], training=True)


@pytest.mark.parametrize(
    ("channels", "dtype", "form", "fork"), covering([3, 64], FLOATS, FORMS, [False, True]), ids=str
)
@interpreted
def test_evaluation(channels: int, dtype: torch.dtype, form: tuple[str, bool], fork: bool) -> None:
    data = draw(channels, 98, dtype, fork=fork)
    check(data if form[1] else data | {"residual": None}, form[0], training=False)


@interpreted
def test_the_errors_of_many_draws_are_torchs() -> None:
    check_many(20)


@interpreted
def test_a_mean_of_a_thousand_standard_deviations() -> None:
    """The statistics lose no digits to it."""
    for rows in (98, 2100):
        check(draw(32, rows, torch.float32, shift=1500.0), "relu", training=True)


@interpreted
def test_without_weight_bias_or_running_statistics() -> None:
    data = draw(7, 98, torch.float32)
    for absent in (
        ("weight",),
        ("bias",),
        ("running_mean", "running_var"),
        ("weight", "bias", "running_mean", "running_var"),
    ):
        check(data | dict.fromkeys(absent), "relu", training=True)


@interpreted
def test_slices_of_the_channels_of_wider_tensors_are_not_copied() -> None:
    """As Inception's branches: x a slice, and the gradient of a cat. The bits are those of dense tensors."""
    from fasttricks_kernels.norm._layout import as_pixels

    data = draw(32, 98, torch.float16)
    dense = ours(data, "relu", True)
    wide = [channels_last(torch.randn(2, 96, 7, 7)).half() for _ in range(2)]
    x, grad = (w[:, 40:72] for w in wide)
    x.copy_(data["x"]), grad.copy_(data["grad"])
    assert all(as_pixels(slice_) is slice_ for slice_ in (x, grad))
    sliced = ours(data, "relu", True, x=x.requires_grad_(), grad=grad)
    assert all(torch.equal(sliced[name], value) for name, value in dense.items())


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 5), (2, 8, 3, 1), (1, 8, 2, 3, 2), (5, 8, 1, 1)], ids=str)
@interpreted
def test_other_shapes(shape: tuple[int, ...]) -> None:
    """Vectors, sequences, volumes, a line; the gradient in another layout."""
    data = draw(8, 2, torch.float32)
    parts = {name: channels_last(torch.randn(shape)) for name in ("x", "residual", "grad")}
    data |= parts | {"grad": parts["grad"].contiguous()}
    check(data, "relu", training=True)


@pytest.mark.parametrize("act", ["none", "relu", "relu6"])
@interpreted
def test_nan_and_infinity_show_as_in_torch(act: str) -> None:
    data = draw(3, 49, torch.float32)
    data["residual"][0, 0, 0, 0], data["residual"][0, 1, 0, 0], data["residual"][0, 2, 0, 0] = (
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    got = ours(data, act, training=False)
    true = by_torch(data, torch.float32, act, False, torch.ones(()))
    torch.testing.assert_close(got["y"].double(), true["y"], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got["grad_residual"][0, 0, 0, 0] == data["grad"][0, 0, 0, 0]  # as torch's threshold and hardtanh have it


@interpreted
def test_the_same_bits_again_and_the_mask_of_what_was_stored() -> None:
    """In bfloat16 many outputs round to 6: their gradient is 0 with and without a residual."""
    data = draw(64, 98, torch.bfloat16)
    first, again = ours(data, "relu6", True), ours(data, "relu6", True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    shut = ~open_mask(first["y"], "relu6")
    assert 0.1 < shut.double().mean() < 0.9 and bool((first["grad_residual"][shut] == 0).all())
    assert torch.equal(first["grad_residual"], data["grad"].masked_fill(shut, 0))
    zero = ours(data | {"residual": torch.zeros_like(data["residual"])}, "relu6", True)
    without = ours(data | {"residual": None}, "relu6", True)
    assert all(torch.equal(zero[name], without[name]) for name in without)


@interpreted
def test_running_statistics_as_torchs_module_has_them() -> None:
    """Three batches, of which one is empty; with momentum=None, the average of all, by a tensor on the device."""
    for momentum in (0.1, None):
        theirs = torch.nn.BatchNorm2d(8, momentum=momentum, dtype=torch.float64)
        mean, var, seen = torch.zeros(8), torch.ones(8), torch.tensor(0.0)
        for size in (3, 0, 2):
            x = channels_last(torch.randn(size, 8, 4, 4) + 2)
            theirs(x.double())
            seen += 1
            share = 1 / seen if momentum is None else momentum
            fk.batch_norm_act(x, None, None, mean, var, training=True, momentum=share, eps=1e-5)
        torch.testing.assert_close(mean.double(), theirs.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), theirs.running_var, rtol=1e-6, atol=1e-6)


@interpreted
def test_an_empty_batch_has_gradients_of_zero() -> None:
    x, weight, bias = (
        torch.zeros(0, 8, 4, 4, requires_grad=True),
        *(torch.ones(8, requires_grad=True) for _ in range(2)),
    )
    mean, var = torch.zeros(8), torch.ones(8)
    y = fk.batch_norm_act(x, weight, bias, mean, var, residual=x, act="relu", training=True, momentum=0.1, eps=1e-5)
    assert y.shape == x.shape
    y.sum().backward()
    assert (
        x.grad.shape == x.shape and torch.equal(weight.grad, torch.zeros(8)) and torch.equal(bias.grad, torch.zeros(8))
    )
    assert torch.equal(mean, torch.zeros(8)) and torch.equal(var, torch.ones(8))


@interpreted
def test_only_the_gradients_that_are_asked_for() -> None:
    data = draw(8, 98, torch.float32)
    for training in (True, False):
        every = ours(data, "relu", training)
        for name in ("x", "weight", "bias", "residual"):
            leaf = data[name].clone().requires_grad_()
            d = {key: None if value is None else value.clone() for key, value in data.items()} | {name: leaf}
            y = fk.batch_norm_act(
                d["x"], d["weight"], d["bias"], d["running_mean"], d["running_var"], residual=d["residual"], act="relu",
                training=training, momentum=0.1, eps=1e-5,
            )  # fmt: skip
            y.backward(data["grad"])
            assert torch.equal(leaf.grad, every[f"grad_{name}"]), name


@pytest.mark.parametrize(("training", "form"), covering([True, False], FORMS), ids=str)
@interpreted
def test_the_second_derivative(training: bool, form: tuple[str, bool]) -> None:
    """Of the kernel's gradient: by reference.py in float32, held to torch's in float64."""
    data = draw(7, 49, torch.float32)
    mixed = []
    for dtype in (torch.float32, torch.float64):
        d = {name: value.to(dtype) for name, value in data.items()}
        leaves = [d[name].clone().requires_grad_() for name in ("x", "weight", "bias", "residual", "grad")]
        x, weight, bias, residual, grad = leaves
        options = {"training": training, "momentum": 0.1, "eps": 1e-5}
        y = fk.batch_norm_act(
            x,
            weight,
            bias,
            d["running_mean"],
            d["running_var"],
            residual=residual if form[1] else None,
            act=form[0],
            **options,
        )
        firsts = torch.autograd.grad(y, [x, weight, bias], grad, create_graph=True)
        mixed.append(torch.autograd.grad(sum((f * f).sum() for f in firsts), [x, weight, grad]))
    for value, exact in zip(*mixed, strict=True):
        assert (value - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-6


@pytest.mark.parametrize(("training", "form"), covering([True, False], FORMS), ids=str)
def test_gradcheck_and_gradgradcheck(training: bool, form: tuple[str, bool]) -> None:
    """float64, channels-last and NCHW."""
    d = draw(3, 2, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for layout in (channels_last, torch.Tensor.contiguous):
        x, residual = (layout(torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator)) for _ in range(2))
        leaves = [v.double().requires_grad_() for v in (x, d["weight"], d["bias"], residual)]

        def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            running = (None, None) if training else (d["running_mean"].double(), d["running_var"].double())
            more = {"residual": residual if form[1] else None, "act": form[0], "training": training}
            return fk.batch_norm_act(x, weight, bias, *running, momentum=0.1, eps=1e-5, **more)

        leaves = leaves if form[1] else [*leaves[:3], leaves[3].detach()]
        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


@interpreted
def test_the_reference_of_the_gradient_is_that_of_autograd() -> None:
    """reference.batch_norm_act_grad in float64, which the second derivative goes through."""
    from fasttricks_kernels import reference

    data = draw(7, 49, torch.float32)
    d = {name: value.double() for name, value in data.items()}
    for act, training in (("none", True), ("relu", True), ("relu6", False)):
        x = d["x"].clone().requires_grad_()
        running = (None, None) if training else (d["running_mean"], d["running_var"])
        y = F.batch_norm(x, *running, d["weight"], d["bias"], training, 0.1, 1e-5)
        y = reference.activation(y, act)
        (true,) = torch.autograd.grad(y, x, d["grad"])
        var, mean = (
            torch.var_mean(d["x"], (0, 2, 3), correction=0) if training else (d["running_var"], d["running_mean"])
        )
        got = reference.batch_norm_act_grad(
            d["grad"],
            None,
            d["x"],
            None,
            d["weight"],
            d["bias"],
            mean,
            (var + 1e-5).rsqrt(),
            act=act,
            training=training,
            eps=1e-5,
        )
        torch.testing.assert_close(got[0], true)


@interpreted
def test_torch_func_and_batched_gradients() -> None:
    data = draw(3, 49, torch.float32)

    def loss(x: Tensor) -> Tensor:
        return (
            fk.batch_norm_act(x, None, None, None, None, act="relu", training=True, momentum=0.1, eps=1e-5) ** 3
        ).sum()

    x = data["x"].clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(data["x"]), plain, rtol=1e-4, atol=1e-4)
    y = fk.batch_norm_act(x, None, None, None, None, act="relu", training=True, momentum=0.1, eps=1e-5)
    many = torch.stack([data["grad"], 2 * data["grad"]])
    (batched,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(y, x, data["grad"])
    torch.testing.assert_close(batched[1], 2 * single, rtol=1e-4, atol=1e-5)


X = torch.zeros(2, 3, 4, 4)
GOOD: dict[str, Any] = {
    "x": X, "weight": torch.ones(3), "bias": torch.ones(3), "running_mean": torch.zeros(3), "running_var": torch.ones(3),
    "training": True, "momentum": 0.1, "eps": 1e-5,
}  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(1, 3, 1, 1)},
        {"x": torch.zeros(1, 3)},
        {"running_mean": torch.zeros(4), "running_var": torch.ones(4)},
        {"running_var": torch.ones(4)},
        {"weight": torch.ones(2)},
        {"bias": torch.ones(2)},
        {"running_var": None},
        {"running_mean": None, "running_var": None, "training": False},
        {"eps": 0.0},
        {"eps": -1e-5, "training": False},
    ],
    ids=str,
)
def test_errors_are_torchs_own(wrong: dict[str, Any]) -> None:
    arguments = GOOD | wrong
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        F.batch_norm(arguments.pop("x"), **arguments)
    with pytest.raises(theirs.type) as own:
        fk.batch_norm_act(**GOOD | wrong)
    assert str(own.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"x": torch.zeros(3)}, r"x must be \(N, C, ...\), but has shape \(3,\)"),
        ({"x": X.int()}, "x must be float16, .*, not torch.int32"),
        (
            {"x": X.half(), "weight": torch.ones(3).half()},
            r"weight must be torch.float32 for x of torch.float16.*weight.to\(",
        ),
        ({"bias": torch.ones(6)[::2]}, r"bias must be \(3,\) and contiguous"),
        ({"residual": torch.zeros(2, 3, 4, 5)}, "residual has shape"),
        ({"residual": X.half()}, "residual must be torch.float32 as x"),
        ({"act": "gelu"}, "act must be one of 'none', 'relu', 'relu6', but is 'gelu'"),
        ({"momentum": None}, "not None; the average of all batches is 1 / num_batches_tracked"),
        ({"momentum": float("nan")}, "momentum must be a finite number, but is nan"),
        ({"momentum": torch.ones(2)}, r"momentum must be a number or a \(\) floating point tensor"),
    ],
    ids=str,
)
def test_errors_beyond_torchs(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        fk.batch_norm_act(**GOOD | wrong)
