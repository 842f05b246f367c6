"""batch_norm_act's fork: its output twice, on one memory, whose two gradients backward adds; and autograd's watch over both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fasttricks_kernels as fk
from lib.batch_norms import FORMS, channels_last, draw, gradient, ours
from lib.interpreter import interpreted
from lib.tables import covering

OPTIONS: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5}


def fork_of(x: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    return fk.batch_norm_act(x, None, None, None, None, fork=True, **OPTIONS | more)


def drawn() -> Tensor:
    return channels_last(torch.randn(2, 8, 3, 3))


def check_layouts(form: tuple[str, bool], dtype: torch.dtype) -> None:
    """Gradients as slices of wider tensors, in NCHW, of which either is absent: the bits of dense ones of known sum."""
    data = draw(32, 98, dtype, fork=True)
    data = data if form[1] else data | {"residual": None}
    dense = ours(data, form[0], True)
    wide = [channels_last(torch.randn(2, channels, 7, 7)).to(dtype)[:, 40:72] for channels in (96, 80)]
    for slice_, name in zip(wide, ("grad", "second"), strict=True):
        slice_.copy_(data[name])
    layouts = {
        "sliced": {"grad": wide[0], "second": wide[1]},
        "nchw": {"grad": data["grad"].contiguous(), "second": wide[1]},
    }
    for layout, grads in layouts.items():
        found = ours(data, form[0], True, **grads)
        assert all(torch.equal(found[name], value) for name, value in dense.items()), layout
    alone = ours({name: value for name, value in data.items() if name != "second"}, form[0], True)
    for first, second in ((data["grad"], None), (None, data["grad"]), (data["grad"], torch.zeros_like(data["grad"]))):
        found = backward(data, form[0], first, second)
        assert all(torch.equal(found[name], value) for name, value in alone.items() if name in found)


def backward(data: dict[str, Any], act: Any, first: Tensor | None, second: Tensor | None) -> dict[str, Tensor]:
    """The gradients where an output that has none is not used."""
    names = [name for name in ("x", "weight", "bias", "residual") if data[name] is not None]
    d = data | {name: data[name].clone().requires_grad_() for name in names}
    outputs = fk.batch_norm_act(
        d["x"], d["weight"], d["bias"], None, None, residual=d["residual"], act=act, fork=True, **OPTIONS
    )
    used = [(y, grad) for y, grad in zip(outputs, (first, second), strict=True) if grad is not None]
    grads = torch.autograd.grad([y for y, _ in used], [d[name] for name in names], [grad for _, grad in used])
    return {f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)}


@pytest.mark.parametrize(("form", "dtype"), covering(FORMS, [torch.float16, torch.bfloat16, torch.float32]), ids=str)
@interpreted
def test_layouts_and_absent_gradients(form: tuple[str, bool], dtype: torch.dtype) -> None:
    check_layouts(form, dtype)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_layouts_and_absent_gradients_on_the_cpu(form: tuple[str, bool]) -> None:
    check_layouts(form, torch.float32)


@interpreted
def test_the_residuals_gradient_is_the_masked_sum_rounded_once() -> None:
    """Autograd's sum of 16 bits rounds twice."""
    data = draw(64, 98, torch.float16, fork=True)
    found = ours(data, "none", True)
    assert torch.equal(found["grad_residual"], gradient(data, torch.float64).half())
    found = ours(data, "relu", True)
    assert torch.equal(found["grad_residual"], (gradient(data, torch.float64) * (found["y"] > 0)).half())


def check_autograd(keeps_y: bool) -> None:
    """keeps_y: backward reads the mask from y, not from bits."""
    x = drawn().requires_grad_()
    for more in ({}, {"act": "relu", "residual": drawn()}):
        y, second = fork_of(x, **more)
        assert y.data_ptr() == second.data_ptr() and torch.equal(y, second)
        assert y.grad_fn is second.grad_fn  # one call of backward
        for output in (y, second):
            with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
                output += 1
        square = second * second
        with torch.no_grad():
            y += 1
        with pytest.raises(RuntimeError, match=r"modified (by an inplace operation|inplace)"):
            square.sum().backward()
    y, second = fork_of(x, act="relu", residual=drawn())
    loss = second.sum()
    (true,) = torch.autograd.grad(loss, x, retain_graph=True)
    y.detach().add_(1)
    if keeps_y:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        assert torch.equal(torch.autograd.grad(loss, x)[0], true)
    with torch.no_grad():
        y, second = fork_of(x)
    assert y.data_ptr() == second.data_ptr() and not y.requires_grad and not second.requires_grad
    running = {"running_mean": torch.zeros(8), "running_var": torch.ones(8)}
    for held in (x, x.detach()):
        outputs = fk.batch_norm_act(held, None, None, **running, fork=True, training=False, momentum=0.1, eps=1e-5)
        assert torch.equal(*outputs) and all(output.requires_grad == held.requires_grad for output in outputs)
    loss = sum((y * factor).sum() for factor, y in enumerate(fork_of(x), 1))
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], grad)


@interpreted
def test_autograd_watches_both() -> None:
    check_autograd(keeps_y=False)


def test_autograd_watches_both_on_the_cpu() -> None:
    check_autograd(keeps_y=True)


@pytest.mark.parametrize(("training", "form"), covering([True, False], FORMS), ids=str)
@interpreted
def test_the_second_derivative(training: bool, form: tuple[str, bool]) -> None:
    """In both gradients too: by reference.py in float32, with the kernel's bits, held to torch's operators in float64."""
    data = draw(32, 49, torch.float32, fork=True)
    mixed = []
    for dtype in (torch.float32, torch.float64):
        d = {name: value.to(dtype, copy=True) for name, value in data.items()}
        names = ("x", "weight", "bias", "residual", "grad", "second")
        x, weight, bias, residual, *grads = (d[name].requires_grad_() for name in names)
        outputs = fk.batch_norm_act(
            x, weight, bias, d["running_mean"], d["running_var"], residual=residual if form[1] else None, act=form[0],
            fork=True, training=training, momentum=0.1, eps=1e-5,
        )  # fmt: skip
        firsts = torch.autograd.grad(outputs, [x, weight, bias], grads, create_graph=True)
        mixed.append(torch.autograd.grad(sum((f * f).sum() for f in firsts), [x, weight, *grads]))
    for value, exact in zip(*mixed, strict=True):
        assert (value - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-6


@pytest.mark.parametrize(("training", "form"), covering([True, False], FORMS), ids=str)
def test_gradcheck_and_gradgradcheck(training: bool, form: tuple[str, bool]) -> None:
    """float64, where autograd adds."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        running = (None, None) if training else (torch.zeros(3).double(), torch.ones(3).double())
        return fk.batch_norm_act(
            x, None, None, *running, residual=residual if form[1] else None, act=form[0], fork=True, training=training,
            momentum=0.1, eps=1e-5,
        )  # fmt: skip

    leaves = leaves if form[1] else [leaves[0], leaves[1].detach()]
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_of_float64_an_output_that_is_changed_in_place_is_seen() -> None:
    """Autograd adds there: the two are plain views of one another."""
    x = drawn().double().requires_grad_()
    y, second = fork_of(x)
    (once,) = torch.autograd.grad(second.square().sum(), x, retain_graph=True)
    y.mul_(2)
    assert torch.equal(y, second)
    (twice,) = torch.autograd.grad(second.square().sum(), x)
    torch.testing.assert_close(twice, 4 * once)


@interpreted
def test_vmapped_gradients_and_torch_func() -> None:
    x = drawn().requires_grad_()
    outputs = fork_of(x, act="relu")
    grads = [torch.stack([g, 2 * g]) for g in (drawn(), drawn())]
    (batched,) = torch.autograd.grad(outputs, x, grads, is_grads_batched=True, retain_graph=True)
    (single,) = torch.autograd.grad(outputs, x, [g[0] for g in grads])
    torch.testing.assert_close(batched[1], 2 * single, rtol=1e-4, atol=1e-5)

    def loss(x: Tensor) -> Tensor:
        y, second = fork_of(x)
        return (y**3 + second**2).sum()

    (plain,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), plain, rtol=1e-4, atol=1e-4)
