"""cross_entropy and CrossEntropyLoss in torch's place: torch's arguments, results and errors; and which inputs run fused."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fasttricks_kernels as fk
from fasttricks_kernels.losses import cross_entropy
from lib.forked import on_ranks

REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few logits take the way of many."""
    monkeypatch.setattr(cross_entropy, "OWN_FROM", 0)


class Spy(ExitStack):
    """Whether the call ended in our code for the CPU, which the operator and the direct call share, or in torch's operator."""

    def __enter__(self) -> Spy:
        super().__enter__()
        own, torchs = cross_entropy._cpu._loss_and_grad, F.cross_entropy
        self.own = self.enter_context(mock.patch.object(cross_entropy._cpu, "_loss_and_grad", side_effect=own))
        self.torchs = self.enter_context(mock.patch.object(F, "cross_entropy", side_effect=torchs))
        return self

    @property
    def fused(self) -> bool:
        assert self.own.call_count + self.torchs.call_count == 1, "one of the two, once"
        return bool(self.own.called)


def leaf(x: Any) -> Any:
    """A copy with a graph of its own, its strides kept."""
    if not isinstance(x, Tensor):
        return x
    made = x.detach().clone(memory_format=torch.preserve_format)
    return made.requires_grad_(x.requires_grad)


def assert_as_torch(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Any) -> bool:
    """Loss and gradients of the tensors that have them, against torch's in float64. Returns whether it ran fused."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) if is_float(x) else x for x in tensors]
    mine = [leaf(x) for x in tensors]
    spy = Spy()
    with spy:
        loss = ours(*mine)
    true = theirs(*wide)
    dtype = tensors[0].dtype
    assert loss.shape == true.shape and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 4e-6}
    torch.testing.assert_close(loss.double(), true, equal_nan=True, **close)
    if loss.requires_grad:
        up = torch.linspace(1, 2, loss.numel()).view_as(loss)
        loss.backward(up.to(loss.dtype))
        true.backward(up.double())
        for x, y in zip(mine, wide, strict=True):
            if is_float(x) and x.requires_grad:
                step = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(x.dtype, close["rtol"])
                torch.testing.assert_close(x.grad.double(), y.grad, equal_nan=True, rtol=step, atol=close["atol"])
    return spy.fused


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def labels_of(logits: Tensor, seed: int = 0) -> Tensor:
    shape = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
    num_classes = logits.shape[min(1, logits.dim() - 1)]
    return torch.randint(num_classes, shape, generator=torch.Generator().manual_seed(seed))


WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.25, 3.0])
PROBABILITIES = draw(4, 5).softmax(1)


def good_inputs() -> dict[str, tuple[Tensor, Tensor, dict[str, Any]]]:
    """Name -> logits, target, options."""
    rows, planes = draw(4, 5), draw(2, 5, 3, 2)
    last = planes.contiguous(memory_format=torch.channels_last)
    ignored = torch.tensor([1, 4, -1, 0])
    forms: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
        "(N, K)": (rows, labels_of(rows), {}),
        "(K,)": (rows[0], torch.tensor(3), {}),
        "(N, K, d)": (draw(2, 5, 7), labels_of(draw(2, 5, 7)), {}),
        "(N, K, H, W)": (planes, labels_of(planes), {}),
        "channels-last": (last, labels_of(planes), {}),
        "(N, K, a, b, c)": (draw(2, 5, 2, 1, 3), labels_of(draw(2, 5, 2, 1, 3)), {}),
        "of no one's strides": (draw(2, 3, 5, 4).transpose(1, 2), labels_of(draw(2, 5, 3, 4)), {}),
        "no rows": (rows[:0], labels_of(rows)[:0], {}),
        "no pixels": (draw(2, 5, 0), torch.zeros(2, 0, dtype=torch.int64), {}),
        "uint8 labels": (rows, labels_of(rows).byte(), {}),
        "ignored": (rows, ignored, {"ignore_index": -1}),
        "all ignored": (rows, torch.full((4,), -100), {}),
        "one class": (draw(4, 1), torch.zeros(4, dtype=torch.int64), {}),
    }
    forms |= {
        f"weights {name}": (z, t, {"weight": WEIGHT, **more})
        for name, (z, t, more) in forms.items()
        if name != "one class"
    }
    forms |= {f"smoothed {name}": (z, t, {"label_smoothing": 0.15, **more}) for name, (z, t, more) in forms.items()}
    dense: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
        "probabilities": (rows, PROBABILITIES, {}),
        "any numbers as target": (rows, draw(4, 5).abs(), {}),
        "probabilities (K,)": (rows[0], PROBABILITIES[0], {}),
        "probabilities (N, K, H, W)": (planes, draw(2, 5, 3, 2).softmax(1), {}),
        "probabilities channels-last": (last, draw(2, 5, 3, 2).softmax(1), {}),
        "no probabilities": (rows[:0], PROBABILITIES[:0], {}),
        "probabilities, some nothing": (rows, PROBABILITIES * torch.tensor([1.0, 0, 1, 1])[:, None], {}),
    }
    dense |= {f"weights {name}": (z, t, {"weight": WEIGHT}) for name, (z, t, _) in dense.items()}
    dense |= {f"smoothed {name}": (z, t, {"label_smoothing": 0.15, **more}) for name, (z, t, more) in dense.items()}
    return forms | dense


GOOD = good_inputs()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", list(GOOD))
def test_each_form_is_torchs(name: str, reduction: Any) -> None:
    """Loss and gradient, by function and by module, in float32 and in float64."""
    logits, target, options = GOOD[name]
    weight = options.get("weight")
    rest = {k: v for k, v in options.items() if k != "weight"} | {"reduction": reduction}

    def theirs(z: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        t = t.long() if t.dtype == torch.uint8 else t  # which torch refuses with weights and smoothing together
        return F.cross_entropy(z, t, w, **rest)

    def ours(z: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        return fk.cross_entropy(z, t, w, **rest)

    def module(z: Tensor, t: Tensor, w: Tensor | None) -> Tensor:
        return fk.CrossEntropyLoss(w, **rest)(input=z, target=t)

    for dtype in (torch.float32, torch.float64):
        z = logits.to(dtype).requires_grad_()
        t = target.to(dtype) if is_float(target) else target
        w = None if weight is None else weight.to(dtype)
        assert_as_torch(ours if dtype == torch.float32 else module, theirs, z, t, w)


def bad_inputs() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    rows, labels = draw(4, 3), torch.tensor([0, 1, 2, 0])
    return {
        "labels as probabilities": ((draw(2, 3), torch.zeros(2, 3, dtype=torch.int64)), {}),
        "probabilities as labels": ((draw(2, 3), draw(2)), {}),
        "another batch": ((draw(2, 3), labels[:3]), {}),
        "weights of other classes": ((rows, labels, torch.ones(2)), {}),
        "weights of another dtype": ((rows, labels, torch.ones(3, dtype=torch.float64)), {}),
        "probabilities and ignore_index": ((rows, rows.softmax(1)), {"ignore_index": 1}),
        "smoothing over 1": ((rows, labels), {"label_smoothing": 1.5}),
        "smoothing over 1 of probabilities": ((rows, rows.softmax(1)), {"label_smoothing": 1.5}),
        "another size": ((draw(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64)), {}),
        "integers as logits": ((rows.long(), labels), {}),
        "complex logits": ((rows.to(torch.complex64), labels), {}),
        "no classes": ((draw(4, 0), labels), {}),
        "no dimension": ((torch.zeros(()), torch.tensor(0)), {}),
        "int16 labels": ((rows, labels.short()), {}),
        "uint8 labels of pixels": ((draw(2, 3, 4), torch.zeros(2, 4, dtype=torch.uint8)), {}),
        "a device apart": ((rows, labels.to("meta")), {}),
        "a reduction that is none": ((rows, labels), {"reduction": "avg"}),
        "arrays": ((rows.numpy(), labels), {}),
        "a list": ((rows, [0, 1, 2, 0]), {}),
    }


BAD = bad_inputs()


@pytest.mark.parametrize("name", list(BAD))
def test_each_error_is_torchs(name: str) -> None:
    arguments, options = BAD[name]
    with pytest.raises(Exception) as theirs:
        F.cross_entropy(*arguments, **options)
    with pytest.raises(theirs.type) as ours:
        fk.cross_entropy(*arguments, **options)
    assert str(ours.value) == str(theirs.value)
    weight, options = (arguments[2] if len(arguments) > 2 else None), {**options}
    with pytest.raises(theirs.type):
        fk.CrossEntropyLoss(weight, **options)(*arguments[:2])


@pytest.mark.parametrize("logits", [draw(2, 3), draw(2, 3, 4), draw(3)], ids=["rows", "planes", "one"])
def test_a_label_out_of_range_is_an_index_error(logits: Tensor) -> None:
    for bad in (3, -1, 2**40):
        for loss in (F.cross_entropy, fk.cross_entropy):
            with pytest.raises(IndexError):
                loss(logits.clone().requires_grad_(), torch.full_like(labels_of(logits), bad))


def test_arguments_have_torchs_names_in_torchs_order() -> None:
    for ours, theirs in (
        (fk.cross_entropy, F.cross_entropy),
        (fk.CrossEntropyLoss.__init__, torch.nn.CrossEntropyLoss.__init__),
        (fk.CrossEntropyLoss.forward, torch.nn.CrossEntropyLoss.forward),
    ):
        wanted = inspect.signature(theirs).parameters.values()
        found = list(inspect.signature(ours).parameters.values())[: len(wanted)]
        assert [(p.name, p.default, p.kind) for p in found] == [(p.name, p.default, p.kind) for p in wanted]
    logits, labels = draw(4, 5), torch.tensor([1, 4, 2, 0])
    order = (WEIGHT, None, 4, None, "sum", 0.1)
    assert_as_torch(fk.CrossEntropyLoss(*order), torch.nn.CrossEntropyLoss(*order).double(), logits, labels)
    with pytest.warns(UserWarning, match="reduction='sum' instead"):
        summed = fk.cross_entropy(logits, labels, None, False)
    with pytest.warns(UserWarning, match="reduction='none' instead"):
        each = fk.CrossEntropyLoss(reduce=False)(logits, labels)
    torch.testing.assert_close(each.sum(), summed)


def test_the_module_has_torchs_attributes() -> None:
    made = fk.CrossEntropyLoss(WEIGHT, ignore_index=2, reduction="sum", label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(WEIGHT, ignore_index=2, reduction="sum", label_smoothing=0.1)
    assert isinstance(made, torch.nn.CrossEntropyLoss)
    for name in ("ignore_index", "reduction", "label_smoothing", "training", "__constants__"):
        assert getattr(made, name) == getattr(theirs, name)
    assert torch.equal(made.weight, WEIGHT)
    assert list(made.state_dict()) == list(theirs.state_dict()) == ["weight"]
    theirs.load_state_dict(made.state_dict())
    assert made.double().weight.dtype == torch.float64
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(copied) == repr(made) and torch.equal(copied.weight, made.weight)
    assert fk.CrossEntropyLoss().weight is None and fk.CrossEntropyLoss(ignore_index=None).ignore_index is None


def test_smoothing_has_one_name_and_its_old_one() -> None:
    logits, teacher, labels = draw(4, 5), draw(4, 5).flip(0), torch.tensor([1, 4, 2, 0])
    calls: tuple[Callable[..., Any], ...] = (
        lambda **s: fk.cross_entropy(logits, labels, **s),
        lambda **s: fk.cross_entropy_loss_and_grad(logits, labels, **s)[1],
        lambda **s: fk.distillation_loss(logits, teacher, labels, **s),
        lambda **s: fk.distillation_loss_and_grad(logits, teacher, labels, **s)[1],
        lambda **s: fk.CrossEntropyLoss(**s)(logits, labels),
        lambda **s: fk.DistillationLoss(**s)(logits, teacher, labels),
    )
    for call in calls:
        smoothed = call(label_smoothing=0.3)
        assert torch.equal(smoothed, call(smoothing=0.3)) and not torch.equal(smoothed, call())
        with pytest.raises(ValueError, match=r"label_smoothing = 0.1 and smoothing = 0.2 are one thing"):
            call(label_smoothing=0.1, smoothing=0.2)
        for silent in (-0.1, float("nan")):
            with pytest.raises(ValueError, match="label_smoothing must lie in"):
                call(label_smoothing=silent)


def torchs_cases(dtype: torch.dtype) -> Iterator[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Any]]]:
    """Ours, torch's and the tensors of each sample of torch's own tests of the function and of the module."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    (function,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    for sample in function.sample_inputs("cpu", dtype, requires_grad=True):
        weight, options = sample.kwargs.get("weight"), {k: v for k, v in sample.kwargs.items() if k != "weight"}
        yield (
            lambda z, t, w, o=options: fk.cross_entropy(z, t, weight=w, **o),
            lambda z, t, w, o=options: F.cross_entropy(z, t, weight=w, **o),
            [sample.input, *sample.args, weight],
        )
    (module,) = (m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)
    for sample in module.module_inputs_func(module, "cpu", dtype, requires_grad=True, training=True):
        made, given = sample.constructor_input, sample.forward_input
        yield (
            fk.CrossEntropyLoss(*made.args, **made.kwargs),
            torch.nn.CrossEntropyLoss(*made.args, **made.kwargs).double(),
            list(given.args),
        )


def torchs_errors(dtype: torch.dtype) -> Iterator[Any]:
    from torch.testing._internal.common_modules import module_db

    (module,) = (m for m in module_db if m.module_cls is torch.nn.CrossEntropyLoss)
    if module.module_error_inputs_func is not None:  # a release of torch that has none
        yield from module.module_error_inputs_func(module, "cpu", dtype, requires_grad=True, training=True)


@pytest.mark.slow
def test_every_input_of_torchs_own_tests() -> None:
    """In a process of its own: torch's test modules set global flags."""
    on_ranks(1, walk)


def walk() -> None:
    """All right in four dtypes, against torch in float64; how many of them ran fused is counted, as for many logits."""
    cross_entropy.OWN_FROM = 0
    fused, seen, refused = 0, 0, 0
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        for ours, theirs, tensors in torchs_cases(dtype):
            seen += 1
            fused += assert_as_torch(ours, theirs, *tensors)
        for error in torchs_errors(dtype):
            made, given = error.module_error_input.constructor_input, error.module_error_input.forward_input
            with pytest.raises(error.error_type, match=error.error_regex):
                fk.CrossEntropyLoss(*made.args, **made.kwargs)(*given.args, **given.kwargs)
            refused += 1
    if torch.__version__.startswith("2.14."):  # other releases have other samples
        assert (seen, refused) == (504, 28), "the numbers in kernels/README.md"
    assert fused == seen >= 400, (fused, seen)
