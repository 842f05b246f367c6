"""Public functions of the kernels keep the promises of their docstrings: arguments drawn from the text, results held to float64.

An argument's dtypes and range are read in its docstring's table, its choices in its annotation: a promise that is written and not
kept fails here, and so does a value beyond it that is taken.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from lib.fuzzing import settings_for

SETTINGS = settings(settings_for(25), derandomize=True)
DTYPES = {str(d)[6:]: d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
DTYPES |= {str(d)[6:]: d for d in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)}
FLOATS = [d for d in DTYPES.values() if d.is_floating_point]
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-53}
RANGES = {"in [0, 1]": (0.0, 1.0), "at least 0": (0.0, 3.0), "T > 0": (0.5, 30.0), "finite": (-1.0, 1.0)}
"""A range in words, and its part that is drawn from; the first that fits a text is its range."""


def table(function: Callable[..., Any]) -> dict[str, str]:
    """Each argument's entry under `Args:`; another function's, where an entry names that."""
    entries: dict[str, str] = {}
    given_names = inspect.signature(function).parameters
    text = (inspect.getdoc(function) or "").split("Args:\n")[-1].split("\n\n")[0]
    for entry in re.split(r"\n(?=    \S)", text):
        names, _, rule = " ".join(entry.split()).partition(": ")
        found = [name for name in re.findall(r"\w+", names) if name in given_names]
        other = re.search(r"as in `(\w+)`", rule)
        for name in found:
            shared = table(getattr(fk, other.group(1))) if other and other.group(1) != function.__name__ else {}
            entries.setdefault(name, shared.get(name, rule))
    return entries


def dtypes(function: Callable[..., Any], name: str) -> list[torch.dtype]:
    """The dtypes that an argument's entry names."""
    found = [DTYPES[word] for word in dict.fromkeys(re.findall(r"\w+", table(function)[name])) if word in DTYPES]
    assert found, f"the entry of {name} names no dtype"
    return found


def span(function: Callable[..., Any], name: str) -> tuple[float, float]:
    rule = table(function)[name]
    return next(drawn for words, drawn in RANGES.items() if words in rule)


def choices(function: Callable[..., Any], name: str) -> tuple[Any, ...]:
    return typing.get_args(typing.get_type_hints(function)[name])


def number(data: st.DataObject, function: Callable[..., Any], name: str) -> float:
    low, high = span(function, name)
    return data.draw(st.floats(low, high, width=16), label=name)


def normal(data: st.DataObject, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32), label="seed"))
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def draw_share(data: st.DataObject, function: Callable[..., Any], count: int) -> Tensor | float:
    """lam as a number, a () tensor or one a sample, of any float dtype."""
    kind = data.draw(st.sampled_from([None, (), (count,)]), label="shape of lam")
    if kind is None:
        return number(data, function, "lam")
    low, high = span(function, "lam")
    values = low + (high - low) * normal(data, *kind).abs() / 30
    return values.clamp(low, high).to(data.draw(st.sampled_from(FLOATS), label="dtype of lam"))


def wide(share: Any) -> Any:
    return share.double() if isinstance(share, Tensor) else share


def draw_labels(data: st.DataObject, count: int, num_classes: int, ignored: int | None) -> Tensor:
    allowed = [*range(num_classes)] + ([] if ignored is None else [ignored])
    values = data.draw(st.lists(st.sampled_from(allowed), min_size=count, max_size=count), label="labels")
    fitting = [d for d in dtypes(fk.cross_entropy, "target") if d != torch.uint8 or all(0 <= v < 256 for v in values)]
    return torch.tensor(values, dtype=data.draw(st.sampled_from(fitting), label="dtype of labels"))


def rows_in_float64(z: Tensor, target: Tensor, uniform: float, ignored: int | None) -> Tensor:
    """(N,) cross-entropies by the docstring's formula, with targets made dense."""
    q = (1 - uniform) * F.one_hot(target.long().clamp(0, z.shape[1] - 1), z.shape[1]).double() + uniform / z.shape[1]
    kept = torch.ones(len(z)) if ignored is None else target.long() != ignored
    return kept.double() * -(q * z.log_softmax(1)).sum(1)


@pytest.mark.parametrize("function", [fk.cross_entropy, fk.distillation_loss], ids=lambda f: f.__name__)
@SETTINGS
@given(data=st.data())
def test_losses(function: Callable[..., Tensor], data: st.DataObject) -> None:
    """Loss and gradient, of autograd and of one pass."""
    first = next(iter(inspect.signature(function).parameters))
    dtype = data.draw(st.sampled_from(dtypes(fk.cross_entropy, "input")), label="dtype")
    count, num_classes = data.draw(st.integers(1, 5), label="N"), data.draw(st.integers(2, 6), label="K")
    ignored = data.draw(st.sampled_from([None, -100, 0]), label="ignore_index")
    smoothing = number(data, fk.cross_entropy, "label_smoothing")
    over, reduction = (
        data.draw(st.sampled_from(choices(fk.cross_entropy, name)), label=name)
        for name in ("smoothing_over", "reduction")
    )
    z, teacher = normal(data, count, num_classes, dtype=dtype), normal(data, count, num_classes, dtype=dtype)
    target = draw_labels(data, count, num_classes, ignored)
    options: dict[str, Any] = {"label_smoothing": smoothing, "smoothing_over": over, "ignore_index": ignored}
    target_b, share = target, 1.0
    # uint8 labels are torch's alone
    if target.dtype != torch.uint8 and data.draw(st.booleans(), label="pair"):
        target_b = draw_labels(data, count, num_classes, ignored).to(target.dtype)
        share = draw_share(data, fk.cross_entropy, count)
        options |= {"target_b": target_b, "lam": share}
    elif target.dtype == torch.uint8:
        target_b = target = target.to(torch.int64)
    uniform = smoothing * (num_classes / (num_classes - 1) if over == "others" else 1)
    exact = z.to(torch.float64, copy=True).requires_grad_()
    weights = [wide(share), 1 - wide(share)]
    both = list(zip(weights, (target, target_b), strict=True))
    kept = (
        sum(w * (1.0 if ignored is None else (t.long() != ignored).double()) for w, t in both)
        * torch.ones(count).double()
    )
    losses = sum(w * rows_in_float64(exact, t, uniform, ignored) for w, t in both)
    slack = 1.0
    if function is fk.distillation_loss:
        temperature, hard, soft = (number(data, function, n) for n in ("temperature", "hard_weight", "soft_weight"))
        options |= {"temperature": temperature, "hard_weight": hard, "soft_weight": soft, "teacher_logits": teacher}
        q = (teacher.double() / temperature).softmax(1)
        soft_losses = -(temperature**2) * (q * (exact / temperature).log_softmax(1)).sum(1)
        losses, slack = hard * losses + soft * kept * soft_losses, 1 + hard + soft * temperature**2
    if reduction == "mean" and float(kept.sum()) < 0.05:
        return  # a mean over next to nothing, or NaN
    true = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / kept.sum()}[reduction]
    (true_grad,) = torch.autograd.grad(true.sum(), exact)
    leaf = z.clone().requires_grad_()
    got = function(**{first: leaf}, target=target, reduction=reduction, **options)
    (grad,) = torch.autograd.grad(got.sum(), leaf)
    one_pass = fk.cross_entropy_loss_and_grad if function is fk.cross_entropy else fk.distillation_loss_and_grad
    results = [(got.detach(), grad), one_pass(logits=z, target=target, reduction=reduction, **options)]
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scale = slack / (float(kept.sum()) if reduction == "mean" else 1)
    for loss, gradient in results:
        bound = 64 * ROUNDING[loss.dtype] * scale * max(1.0, float(z.double().abs().max())) * count
        torch.testing.assert_close(loss.double(), true.detach(), rtol=0, atol=bound)
        assert gradient.dtype == dtype
        rounded = 2 * ROUNDING[dtype] + 64 * ROUNDING[loss.dtype]
        torch.testing.assert_close(
            gradient.double(), true_grad, rtol=rounded, atol=bound + 2**-24 * (dtype == torch.float16)
        )


@SETTINGS
@given(data=st.data())
def test_mixup(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5), label="N")
    images = normal(data, count, 2, 3, 2, dtype=data.draw(st.sampled_from(dtypes(fk.mixup, "images")), label="dtype"))
    pairs = data.draw(st.booleans(), label="pairs")
    order = list(range(count))[::-1] if pairs else data.draw(st.permutations(range(count)), label="permutation")
    permutation = torch.tensor(order, dtype=data.draw(st.sampled_from(dtypes(fk.mixup, "permutation"))))
    share = draw_share(data, fk.mixup, count)
    lam = torch.as_tensor(wide(share), dtype=torch.float64).expand(count)[:, None, None, None]
    true = lam * images.double() + (1 - lam) * images.double()[permutation.long()]
    got = fk.mixup(images, permutation, share, pairs=pairs)
    assert got.dtype == images.dtype
    step = 2 * ROUNDING[images.dtype] + (4 * ROUNDING[torch.float32] if images.dtype != torch.float64 else 0)
    torch.testing.assert_close(got.double(), true, rtol=0, atol=step * float(images.double().abs().max()) + 2**-24)


@SETTINGS
@given(data=st.data())
def test_augment(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4), label="N")
    raw = (normal(data, count, 2, 3, 3).abs() * 25).clamp(max=255).to(dtypes(fk.augment, "images")[0])
    matrix = (normal(data, count, 3, 4) / 255).to(dtypes(fk.augment, "matrix")[0])
    kind = data.draw(st.sampled_from([None, *dtypes(fk.augment, "flip")]), label="flip")
    flip = None if kind is None else (normal(data, count) > 0).to(kind)
    dtype = data.draw(st.sampled_from(dtypes(fk.augment, "dtype")), label="dtype")
    turned = raw.double() if flip is None else torch.where(flip.bool()[:, None, None, None], raw.flip(2), raw).double()
    true = torch.einsum("nij,nhwj->nihw", matrix[:, :, :3].double(), turned) + matrix[:, :, 3, None, None].double()
    mixed: dict[str, Any] = {}
    if data.draw(st.booleans(), label="mixup"):
        order = data.draw(st.permutations(range(count)), label="permutation")
        mixed = {"permutation": torch.tensor(order), "lam": draw_share(data, fk.mixup, count)}
        lam = torch.as_tensor(wide(mixed["lam"]), dtype=torch.float64).expand(count)[:, None, None, None]
        true = lam * true + (1 - lam) * true[order]
    got = fk.augment(raw, matrix, flip=flip, dtype=dtype, **mixed)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    size = 255 * float(matrix.double().abs().sum(2).max())
    torch.testing.assert_close(got.double(), true, rtol=0, atol=(2 * ROUNDING[dtype] + 2**-21) * size + 2**-24)


@SETTINGS
@given(data=st.data())
def test_sgd_step(data: st.DataObject) -> None:
    """A step of one parameter by the docstring's formula."""
    dtype = data.draw(st.sampled_from(dtypes(fk.sgd_step, "weights")), label="dtype")
    lr, momentum, decay, dampening = (
        number(data, fk.sgd_step, name) for name in ("lr", "momentum", "weight_decay", "dampening")
    )
    nesterov = momentum > 0 and dampening == 0 and data.draw(st.booleans(), label="nesterov")
    maximize = data.draw(st.booleans(), label="maximize")
    whole = torch.float64 if dtype == torch.float64 else torch.float32
    master, velocity = normal(data, 7, dtype=whole), normal(data, 7, dtype=whole)
    weight, grad = master.to(dtype), normal(data, 7, dtype=dtype)
    master = master if weight.dtype != whole else weight
    scale = data.draw(st.sampled_from([None, torch.tensor(8.0)]), label="grad_scale")
    g = grad.double() / (1.0 if scale is None else scale.double())
    g = (-g if maximize else g) + decay * master.double()
    v = momentum * velocity.double() + (1 - dampening) * g
    true = master.double() - lr * (g + momentum * v if nesterov else v if momentum else g)
    size = 1 + float(true.abs().max()) + lr * (1 + momentum) * (float(g.abs().max()) + float(v.abs().max()))
    fk.sgd_step(
        [weight],
        [grad],
        [] if weight.dtype == whole else [master],
        [velocity] if momentum else [],
        lr=data.draw(st.sampled_from([lr, torch.tensor(lr)]), label="lr as"),
        momentum=momentum,
        weight_decay=decay,
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
        grad_scale=scale,
    )
    step = 32 * ROUNDING[whole] * size * (1 + momentum)
    torch.testing.assert_close(master.double(), true, rtol=0, atol=step)
    assert torch.equal(weight, master.to(dtype))
    if momentum:
        torch.testing.assert_close(velocity.double(), v, rtol=0, atol=step)


@SETTINGS
@given(data=st.data())
def test_batch_norm_act(data: st.DataObject) -> None:
    """y, the gradients and the running statistics by the docstring's formula, of values of either layout."""
    dtype = data.draw(st.sampled_from(dtypes(fk.batch_norm_act, "x")), label="dtype")
    whole = torch.float64 if dtype == torch.float64 else torch.float32
    assert whole in dtypes(fk.batch_norm_act, "weight")
    layout = data.draw(st.sampled_from([torch.contiguous_format, torch.channels_last]), label="layout")
    x, residual, *grads = (normal(data, 3, 2, 2, 3, dtype=dtype).contiguous(memory_format=layout) for _ in range(4))
    weight, bias, mean = (normal(data, 2, dtype=whole) / 3 for _ in range(3))
    var = normal(data, 2, dtype=whole).abs() + 0.5
    act = data.draw(st.sampled_from(choices(fk.batch_norm_act, "act")), label="act")
    training, fork, added = (data.draw(st.booleans(), label=name) for name in ("training", "fork", "residual"))
    momentum, eps = (number(data, fk.batch_norm_act, name) for name in ("momentum", "eps"))
    eps += 0.25
    d = [value.to(torch.float64, copy=True) for value in (x, weight, bias, mean, var, residual)]
    true = F.batch_norm(d[0].requires_grad_(), *d[3:5], d[1], d[2], training, momentum, eps) + (d[5] if added else 0)
    leaf, running = x.clone().requires_grad_(), (mean.clone(), var.clone())
    more: dict[str, Any] = {"residual": residual if added else None, "act": act, "fork": fork, "training": training}
    got = fk.batch_norm_act(leaf, weight, bias, *running, **more, momentum=momentum, eps=eps)
    y, used = (got[0], grads) if fork else (got, grads[:1])
    (grad,) = torch.autograd.grad(got, leaf, used)
    shut = torch.zeros_like(y, dtype=torch.bool)
    shut = shut if act == "none" else (y <= 0) | (y >= 6) if act == "relu6" else y <= 0
    summed = sum(g.double() for g in used).masked_fill(shut, 0)  # type: ignore[union-attr]
    (true_grad,) = torch.autograd.grad(true, d[0], summed)
    true = {"none": true, "relu": true.relu(), "relu6": F.relu6(true)}[act]
    assert y.dtype == grad.dtype == dtype and y.is_contiguous(memory_format=layout)
    step = 4 * ROUNDING[dtype] + 64 * ROUNDING[whole]
    size = 4 * float(weight.abs().max()) + float(bias.abs().max()) + float(residual.abs().max())
    size += float((x.double().abs().max() + mean.abs().max()) * weight.abs().max())
    torch.testing.assert_close(y.double(), true.detach(), rtol=step, atol=step * size)
    scale = 10 * float(weight.abs().max()) * float(summed.abs().max()) + 1e-6
    torch.testing.assert_close(grad.double(), true_grad, rtol=step, atol=step * scale)
    for moved, exact in zip(running, d[3:5], strict=True):
        torch.testing.assert_close(
            moved.double(), exact, rtol=0, atol=64 * ROUNDING[whole] * (1 + float(x.double().square().max()))
        )


LABELS = torch.tensor([0, 1, 1])
PAIR: dict[str, Any] = {"target_b": LABELS, "lam": 0.5}
WHOLE: dict[Callable[..., Any], Callable[[], dict[str, Any]]] = {
    fk.cross_entropy: lambda: {"input": torch.zeros(3, 2), "target": LABELS, **PAIR},
    fk.distillation_loss: lambda: {
        "logits": torch.zeros(3, 2), "teacher_logits": torch.zeros(3, 2), "target": LABELS, **PAIR,
    },
    fk.mixup: lambda: {"images": torch.zeros(3, 1, 1, 1), "permutation": torch.arange(3), "lam": 0.5},
    fk.augment: lambda: {
        "images": torch.zeros(3, 1, 1, 3, dtype=torch.uint8),
        "matrix": torch.zeros(3, 3, 4),
        "flip": torch.zeros(3, dtype=torch.bool),
        "dtype": torch.float32,
    },
    fk.sgd_step: lambda: {
        "weights": [torch.zeros(3)], "grads": [torch.zeros(3)], "masters": [], "momenta": [torch.zeros(3)],
        "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "dampening": 0.0,
    },
    fk.overflow: lambda: {"grads": [torch.zeros(3)]},
    fk.batch_norm_act: lambda: {
        "x": torch.ones(2, 3, 1, 2), "weight": torch.ones(3), "bias": torch.ones(3), "running_mean": torch.zeros(3),
        "running_var": torch.ones(3), "residual": torch.zeros(2, 3, 1, 2), "act": "relu", "training": True,
        "momentum": 0.1, "eps": 1e-5, "fork": False, "process_group": None,
    },
}  # fmt: skip
"""Arguments that each function takes."""
OPTIONAL = {"flip", "dtype", "lam", "target_b", "weight", "bias", "residual", "process_group"}
"""Those that may be None."""


@pytest.mark.parametrize("function", WHOLE, ids=lambda f: f.__name__)
def test_a_value_beyond_the_table_is_refused_by_name(function: Callable[..., Any]) -> None:
    function(**WHOLE[function]())
    entries, refused = table(function), 0
    for name, value in WHOLE[function]().items():
        wrong: list[Any] = ["text", None] if name not in OPTIONAL else ["text"]
        if isinstance(value, bool):
            wrong += [1, torch.tensor(True)]
        elif any(word in entries[name].split("; for ")[0] for word in DTYPES):
            others = [d for d in DTYPES.values() if d not in dtypes(function, name)]
            if name == "masters":  # [] here
                continue
            if isinstance(value, torch.dtype):
                wrong += others
            elif isinstance(value, list):
                wrong += [[x.to(d) for x in value] for d in others if value]
            else:
                wrong += [value.to(d) for d in others]
        elif isinstance(value, float):
            low, high = span(function, name)
            wrong += [float("nan"), float("inf"), torch.tensor(value).expand(5)]
            wrong += [low - 1e-6] if low >= 0 else []
            wrong += [high + 1e-6] if "in [0, 1]" in entries[name] else []
        for bad in wrong:
            named = {"input": "(input|logits)"}.get(name, name.rstrip("s"))
            with pytest.raises((TypeError, ValueError), match=named):
                pytest.fail(f"{name} = {bad!r} was taken: {function(**WHOLE[function]() | {name: bad})}")
            refused += 1
    assert refused >= 5


def test_the_tables_are_read() -> None:
    assert dtypes(fk.mixup, "permutation") == [torch.int64, torch.int32]
    assert dtypes(fk.distillation_loss, "target") == dtypes(fk.cross_entropy, "target")
    assert span(fk.distillation_loss, "lam") == (0.0, 1.0) and span(fk.sgd_step, "lr") == (0.0, 3.0)
    assert set(choices(fk.distillation_loss, "reduction")) == {"mean", "sum", "none"}
