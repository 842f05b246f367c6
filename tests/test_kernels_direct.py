"""Eager calls launch directly, past torch's dispatcher: with the operator's bits, by autograd's rules, where nobody watches."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fasttricks_kernels as fk
from fasttricks_kernels._direct import runs_directly
from fasttricks_kernels.losses import cross_entropy
from lib.interpreter import interpreted

N, K = 7, 5
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, TEACHER, UP = (3 * torch.randn(N, K, dtype=torch.float64, generator=GENERATOR) for _ in range(3))
TARGET, TARGET_B = torch.randint(K, (2, N), generator=GENERATOR)
LAM = torch.rand(N, generator=GENERATOR)
HALF_IGNORED = torch.tensor([-100, 1, 2, -100, 0, 4, 3])


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One label too takes the way of the many logits."""
    monkeypatch.setattr(cross_entropy, "OWN_FROM", 0)


class Watch(TorchDispatchMode):
    """The operators of ours that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fasttricks_kernels":
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


Loss = Callable[[Tensor], Tensor]


def of_labels(**options: Any) -> Loss:
    return lambda z: fk.cross_entropy(z, label_smoothing=0.1, **{"target": TARGET, **options})


def of_pair(**options: Any) -> Loss:
    return of_labels(**{"target_b": TARGET_B, "lam": 0.3, **options})


def of_teacher(**options: Any) -> Loss:
    return lambda z: fk.distillation_loss(
        z, TEACHER.to(z.dtype), temperature=2.0, soft_weight=0.5, **{"target": TARGET, **options}
    )


FORMS: dict[str, Loss] = {
    "label": of_labels(),
    "label, none ignored": of_labels(ignore_index=None),
    "label, some ignored": of_labels(target=HALF_IGNORED),
    "label, all ignored, sum": of_labels(target=torch.full((N,), -100), reduction="sum"),
    "label, others, one a row": of_labels(smoothing_over="others", reduction="none"),
    "int32 labels": of_labels(target=HALF_IGNORED.int()),
    "every other label": of_labels(target=HALF_IGNORED.repeat_interleave(2)[::2]),
    "pair": of_pair(),
    "pair, some ignored": of_pair(target=HALF_IGNORED),
    "pair, lam ()": of_pair(target_b=HALF_IGNORED, lam=torch.tensor(0.3)),
    "pair, lam (N,)": of_pair(target=HALF_IGNORED, lam=LAM),
    "pair, lam (N,) float64": of_pair(lam=LAM.double(), reduction="sum"),
    "pair, one a row": of_pair(target=HALF_IGNORED, target_b=HALF_IGNORED.int(), reduction="none"),
    "teacher": of_teacher(),
    "teacher, pair": of_teacher(target=HALF_IGNORED, target_b=TARGET_B, lam=LAM),
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def derivatives(loss: Loss, z: Tensor) -> list[Tensor]:
    """Value, gradient twice (the second is computed anew), and the second derivatives, of logits and of `up`."""
    leaf = z.clone().requires_grad_()
    value = loss(leaf)
    up = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view_as(value).requires_grad_()
    (first,) = torch.autograd.grad(value, leaf, up, retain_graph=True)
    (again,) = torch.autograd.grad(value, leaf, up, retain_graph=True)
    (graph,) = torch.autograd.grad(value, leaf, up, create_graph=True)
    for other in (again, graph.detach()):
        torch.testing.assert_close(other, first, equal_nan=True)
    return [value.detach(), first, again, graph, *torch.autograd.grad((graph * UP.to(z.dtype)).sum(), (leaf, up))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_the_operators_bits(name: str, dtype: torch.dtype) -> None:
    assert_the_operators_bits(name, dtype)


@pytest.mark.parametrize("name", FORMS)
@interpreted
def test_the_operators_bits_of_the_kernels(name: str) -> None:
    assert_the_operators_bits(name, torch.float16)


def assert_the_operators_bits(name: str, dtype: torch.dtype) -> None:
    z = LOGITS.to(dtype)
    direct = derivatives(FORMS[name], z)
    with Watch() as watch:
        by_operator = derivatives(FORMS[name], z)
    op = "distillation" if name.startswith("teacher") else "cross_entropy"
    assert watch.seen.count(op) == 1, "the comparison is of two ways"
    for ours, its in zip(direct, by_operator, strict=True):
        assert ours.dtype == its.dtype and ours.stride() == its.stride()
        torch.testing.assert_close(ours, its, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(ours), torch.signbit(its)), "-0 is not 0"
    if dtype == torch.float64 and name.startswith(("label", "int32", "every")):
        return  # without a backward pass by torch's own operator
    with torch.no_grad():
        torch.testing.assert_close(FORMS[name](z), direct[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_operators_bits_in_one_pass(reduction: Any, dtype: torch.dtype) -> None:
    leaf = LOGITS.to(dtype, copy=True).requires_grad_()
    scales = 1.0, 1024.0, torch.tensor(1024.0), torch.tensor(3.0, dtype=torch.float64)
    pairs: tuple[dict[str, Any], ...] = ({}, {"target_b": TARGET_B, "lam": 0.3}, {"target_b": TARGET_B, "lam": LAM})
    for scale, ignore_index, pair in itertools.product(scales, (None, -100), pairs):
        target = TARGET if ignore_index is None else HALF_IGNORED
        options = {"reduction": reduction, "loss_scale": scale, "ignore_index": ignore_index, **pair}
        for call in (
            lambda t=target, o=options: fk.cross_entropy_loss_and_grad(leaf, t, label_smoothing=0.1, **o),
            lambda t=target, o=options: fk.distillation_loss_and_grad(leaf, TEACHER.to(dtype), t, **o),
        ):
            direct = call()
            with Watch() as watch:
                by_operator = call()
            assert len(watch.seen) == 1
            for ours, its in zip(direct, by_operator, strict=True):
                assert torch.equal(ours, its) and ours.dtype == its.dtype and not ours.requires_grad


IMAGES = torch.rand(4, 3, 5, 2, generator=GENERATOR)
BYTES = torch.randint(256, (4, 5, 2, 3), generator=GENERATOR, dtype=torch.uint8)
MATRIX = torch.randn(4, 3, 4, generator=GENERATOR)
REVERSE = torch.arange(3, -1, -1)
IMAGE_FORMS: dict[str, Callable[[Tensor | float], Tensor]] = {
    "mixup": lambda lam: fk.mixup(IMAGES, REVERSE, lam, pairs=True),
    "mixup, channels-last": lambda lam: fk.mixup(IMAGES.contiguous(memory_format=torch.channels_last), REVERSE, lam),
    "augment": lambda lam: fk.augment(BYTES, MATRIX, permutation=REVERSE, lam=lam),
    "augment, no partner": lambda lam: fk.augment(BYTES, MATRIX, flip=torch.tensor([True, False, True, False])),
}


@pytest.mark.parametrize("name", IMAGE_FORMS)
def test_the_operators_bits_of_images(name: str) -> None:
    assert_the_operators_bits_of_images(name)


@pytest.mark.parametrize("name", IMAGE_FORMS)
@interpreted
def test_the_operators_bits_of_the_kernels_of_images(name: str) -> None:
    assert_the_operators_bits_of_images(name)


def assert_the_operators_bits_of_images(name: str) -> None:
    for lam in (0.3, torch.tensor(0.3), torch.rand(4, generator=GENERATOR), torch.rand(4).requires_grad_()):
        direct = IMAGE_FORMS[name](lam)
        with Watch() as watch:
            by_operator = IMAGE_FORMS[name](lam)
        assert watch.seen == [name.partition(",")[0]]
        assert torch.equal(direct, by_operator) and direct.stride() == by_operator.stride()
    leaf = IMAGES.clone().requires_grad_()
    assert fk.mixup(leaf, REVERSE, 0.3).requires_grad and not fk.mixup(IMAGES, REVERSE, 0.3).requires_grad


def test_a_gradient_of_any_layout_and_none_at_all() -> None:
    """From above: expanded, every other element, none where another output of the graph is asked for."""
    leaf = LOGITS.float().requires_grad_()
    losses = of_pair(reduction="none")(leaf)
    whole = torch.linspace(1, 2, N)
    (plain,) = torch.autograd.grad(losses, leaf, whole, retain_graph=True)
    (strided,) = torch.autograd.grad(losses, leaf, whole.repeat_interleave(2)[::2], retain_graph=True)
    assert torch.equal(plain, strided)
    (expanded,) = torch.autograd.grad(losses, leaf, torch.tensor(2.0).expand(N), retain_graph=True)
    (summed,) = torch.autograd.grad(2 * losses.sum(), leaf)
    assert torch.equal(expanded, summed)

    class Drops(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    assert torch.autograd.grad(Drops.apply(of_pair()(leaf)), leaf, allow_unused=True) == (None,)


def test_autograds_rules() -> None:
    """Accumulation, hooks, a graph freed after one backward, no_grad, inference_mode; lam has no gradient."""
    leaf = LOGITS.float().requires_grad_()
    loss, seen = of_pair()(leaf), []
    leaf.register_hook(lambda g: seen.append(g.clone()))
    assert loss.requires_grad and not loss.is_leaf
    loss.backward()
    once = leaf.grad.clone()
    of_pair()(leaf).backward()
    assert torch.equal(leaf.grad, 2 * once) and torch.equal(seen[0], once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            value = of_pair()(leaf)
        assert not value.requires_grad and torch.equal(value, loss.detach())
    with torch.inference_mode():
        inside = LOGITS.float()
        assert torch.equal(of_pair()(inside), loss.detach())
    lam = torch.full((N,), 0.3, requires_grad=True)
    for labels in (TARGET, HALF_IGNORED):
        of_pair(lam=lam, target=labels)(leaf).backward()
        assert lam.grad is None
        assert not of_pair(lam=lam, target=labels)(LOGITS.double()).requires_grad


CHANGED: dict[str, Callable[[], tuple[Tensor, Tensor, Loss]]] = {
    "logits": lambda: ((z := LOGITS.float().requires_grad_() * 1), z, of_pair()),
    "target": lambda: (LOGITS.float().requires_grad_(), (t := TARGET.clone()), of_labels(target=t)),
    "target_b": lambda: (LOGITS.float().requires_grad_(), (t := TARGET_B.clone()), of_pair(target_b=t)),
    "lam": lambda: (LOGITS.float().requires_grad_(), (share := LAM.clone()), of_pair(lam=share)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_changed_in_place_before_backward_is_an_error(name: str) -> None:
    logits, changed, loss = CHANGED[name]()
    value = loss(logits)
    with torch.no_grad():
        changed.mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


class Passes(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Sub(Tensor):
    pass


def asked() -> tuple[list[bool], Loss]:
    """A loss, and a list of whether its calls ran directly."""
    answers: list[bool] = []

    def loss(z: Tensor) -> Tensor:
        answers.append(runs_directly(z, TARGET))
        return of_pair()(z)

    return answers, loss


def within(mode: Any) -> Callable[[Loss, Tensor], Tensor]:
    def call(loss: Loss, z: Tensor) -> Tensor:
        with mode():
            return loss(z)

    return call


def under_dual(loss: Loss, z: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(z, z))).primal


def functional(loss: Loss, z: Tensor) -> Tensor:
    return torch._from_functional_tensor(loss(torch._to_functional_tensor(z)))


WATCHED: dict[str, Callable[[Loss, Tensor], Any]] = {
    "a dispatch mode": within(Watch),
    "a function mode": within(Passes),
    "a default device": within(lambda: torch.device("cpu")),
    "a subclass": lambda loss, z: loss(z.as_subclass(Sub)).as_subclass(Tensor),
    "make_fx": lambda loss, z: make_fx(loss)(z)(z),
    "jit.trace": lambda loss, z: torch.jit.trace(loss, (z,), check_trace=False)(z),
    "grad": lambda loss, z: torch.func.grad_and_value(loss)(z)[1],
    "vmap": lambda loss, z: torch.func.vmap(loss)(z[None])[0],
    "jvp": lambda loss, z: torch.func.jvp(loss, (z,), (z,))[0],
    "functionalize": lambda loss, z: torch.func.functionalize(loss)(z),
    "forward-mode dual": under_dual,
    "a negative view": lambda loss, z: loss(torch.complex(torch.zeros_like(z), -z).conj().imag),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning", "ignore:Casting complex")
@pytest.mark.parametrize("name", WATCHED)
def test_who_watches_the_call_gets_the_operator_or_plain_torch(name: str) -> None:
    z = LOGITS.float()
    answers, loss = asked()
    got = WATCHED[name](loss, z)
    assert answers and not any(answers)
    torch.testing.assert_close(got, of_pair()(z), rtol=1e-6, atol=1e-6)
    assert asked()[1](z) is not None and runs_directly(z, torch.nn.Parameter(z), TARGET, None)


def test_tensors_without_plain_memory_do_not_run_directly() -> None:
    z = LOGITS.float()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(z)
    others = fake, z.to("meta"), z.to_sparse(), torch._efficientzerotensor(3), torch._to_functional_tensor(z)
    assert [runs_directly(other) for other in others] == [False] * len(others)
    graph = make_fx(lambda z: of_pair()(z))(z)
    assert any("fasttricks_kernels.cross_entropy" in str(node.target) for node in graph.graph.nodes)


def test_a_profile_names_the_loss() -> None:
    leaf = LOGITS.float().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        of_pair()(leaf).backward()
        of_teacher()(leaf).backward()
    names = {event.key for event in profile.key_averages()}
    assert {"cross_entropy", "cross_entropyBackward", "distillation", "distillationBackward"} <= names
    assert not any("fasttricks_kernels" in name for name in names)


def test_nothing_outlives_the_loss() -> None:
    """Without the collector of cycles, after backward and without one."""
    gc.collect()
    gc.disable()
    try:
        for backward in (True, False):
            logits = LOGITS.float().requires_grad_() * 1
            target, lam = TARGET.clone(), LAM.clone()
            loss = of_pair(target=target, lam=lam)(logits)
            alive = [weakref.ref(x) for x in (logits, target, lam)]
            if backward:
                loss.backward()
                del logits, target, lam
                assert [ref() for ref in alive] == [None] * 3, "as a graph that is freed by backward"
            else:
                del loss, logits, target, lam
                assert [ref() for ref in alive] == [None] * 3
    finally:
        gc.enable()
