"""MasterSGD on the CPU: against torch.optim.SGD, with torch's GradScaler, through a checkpoint, and bad input."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fasttricks_kernels as fk
from fasttricks_kernels import _launch
from fasttricks_kernels.optim import _kernels, sgd
from fasttricks_kernels.proof.aot import record_launches


def parameters(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    conv = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return [t.to(dtype).requires_grad_() for t in (torch.randn(5, generator=generator), conv)]


def step_with(optimizer: torch.optim.Optimizer, params: list[Tensor], seed: int, scale: float, **options: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(
            param.shape, generator=generator
        ).half()  # NCHW: another stride than the channels-last weight
        param.grad = (grad.double() * scale).to(param.dtype)
    optimizer.step(**options)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_follows_torch(dtype: torch.dtype, nesterov: bool) -> None:
    ours, theirs = parameters(dtype), [p.detach().double().clone().requires_grad_() for p in parameters(dtype)]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov}
    master, sgd = fk.MasterSGD(ours, **options), torch.optim.SGD(theirs, **options)
    scale = torch.tensor(4.0)
    for seed in range(5):
        step_with(master, ours, seed, 4.0, loss_scale=scale)
        step_with(sgd, theirs, seed, 1.0)
        if dtype == torch.bfloat16:  # its gradients are rounded more coarsely than the halves that were drawn
            for a, b in zip(ours, theirs, strict=True):
                b.data.copy_(master.state[a]["master"])
                sgd.state[b]["momentum_buffer"].copy_(master.state[a]["momentum_buffer"])
    for a, b in zip(ours, theirs, strict=True):
        exact = master.state[a].get("master", a).detach()
        torch.testing.assert_close(exact.double(), b.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(a.detach(), exact.to(dtype)) and a.stride() == exact.stride()


def test_an_overflow_skips_the_whole_step() -> None:
    half, single = parameters(torch.float16), parameters(torch.float32)
    optimizer = fk.MasterSGD(
        [{"params": half}, {"params": single, "weight_decay": 0.1}], lr=0.1, momentum=0.9, nesterov=True
    )
    scale = torch.tensor(2.0)
    step_with(optimizer, half + single, 0, 2.0, loss_scale=scale)
    before = copy.deepcopy([(p.detach(), optimizer.state[p]["momentum_buffer"]) for p in half + single])
    for bad in (float("inf"), float("nan"), -float("inf")):
        for param in half + single:
            param.grad = torch.zeros_like(param)
        single[1].grad[0, 0, 0, 0] = bad
        optimizer.step(loss_scale=scale)
        assert optimizer.overflow == 1
        after = [(p.detach(), optimizer.state[p]["momentum_buffer"]) for p in half + single]
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    single[1].grad.zero_()
    optimizer.step(loss_scale=scale)
    assert optimizer.overflow == 0


def test_small_updates_are_not_lost() -> None:
    """1 - 1e-4 is no FP16 number: without a master the weight would stay 1 for ever."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = fk.MasterSGD([weight], lr=1e-4)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach().float(), torch.full((3,), 0.995), rtol=0, atol=2**-12)


def test_a_checkpoint_keeps_float32() -> None:
    ours = parameters(torch.float16)
    optimizer = fk.MasterSGD(ours, lr=0.1, momentum=0.9, nesterov=True)
    step_with(optimizer, ours, 0, 1.0)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [p.detach().clone().requires_grad_() for p in ours]
    resumed = fk.MasterSGD(others, lr=0.5)
    resumed.load_state_dict(saved)
    for seed in (1, 2):
        step_with(optimizer, ours, seed, 1.0)
        step_with(resumed, others, seed, 1.0)
    for a, b in zip(ours, others, strict=True):
        assert resumed.state[b]["master"].dtype == torch.float32
        assert torch.equal(optimizer.state[a]["master"], resumed.state[b]["master"]) and torch.equal(a, b)


def test_works_with_torchs_grad_scaler() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = fk.MasterSGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for grad, expected, scale in ((1.0, 0.9, 8.0), (float("inf"), 0.9, 4.0), (1.0, 0.8, 4.0)):
        optimizer.zero_grad()
        scaler.scale((weight.float() * grad).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(weight.detach().float(), torch.full((4,), expected), rtol=0, atol=1e-3)
        assert scaler.get_scale() == scale


def test_opcheck() -> None:
    weights, grads = torch.ones(2, 4, dtype=torch.float16).unbind()
    ops = torch.ops.fasttricks_kernels
    for scale, found in ((None, None), (torch.tensor(2.0), torch.tensor(0.0))):
        for momenta, *options in (([torch.zeros(4)], 0.9, 0.0, 0.0, True, False), ([], 0.0, 0.0, 0.1, False, True)):
            arguments = ([weights.clone()], [grads.clone()], [torch.ones(4)], momenta)
            for lr in (None, torch.tensor(0.1)):
                torch.library.opcheck(ops.sgd_step.default, (*arguments, 0.1, *options, scale, found, lr))
    torch.library.opcheck(ops.overflow.default, ([grads.clone()],))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_rate_on_the_device_gives_the_bits_of_the_number(dtype: torch.dtype) -> None:
    results = []
    for lr in (0.125, torch.tensor(0.125), torch.tensor([0.125], dtype=torch.float64)):
        weight = nn.Parameter(torch.linspace(-1, 1, 50, dtype=dtype))
        optimizer = fk.MasterSGD([weight], lr=lr, momentum=0.9, nesterov=True)
        for step in range(3):
            weight.grad = weight.detach() * (step + 1)
            optimizer.step()
        results.append(weight.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for bad in (torch.tensor(-0.1), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="lr must be"):
            fk.MasterSGD([weight], lr=bad)


@pytest.mark.parametrize(
    "words, error, change",
    [
        ("need float32 masters", ValueError, {"masters": []}),
        ("masters must be 1 tensors", ValueError, {"masters": [torch.ones(4)] * 2}),
        ("must be torch.float32", TypeError, {"momenta": [torch.zeros(4, dtype=torch.float16)]}),
        ("must be torch.float16", TypeError, {"grads": [torch.zeros(4)]}),
        ("shape", ValueError, {"grads": [torch.zeros(3, dtype=torch.float16)]}),
        ("strides", ValueError, {"momenta": [torch.zeros(8)[::2]]}),
        ("dense in memory", ValueError, {"weights": [torch.ones(8, dtype=torch.float16)[::2]]}),
        ("must be a list of tensors, not Tensor", TypeError, {"grads": torch.zeros(4)}),
        (r"grads\[0\] must be a torch.Tensor, not numpy.ndarray; torch.as_tensor", TypeError, {"grads": [np.zeros(4)]}),
        ("where momentum is 0", ValueError, {"momentum": 0.0}),
        ("momenta must be 1 tensors", ValueError, {"momenta": []}),
        ("needs momentum above 0", ValueError, {"momentum": 0.0, "nesterov": True}),
        (r"grad_scale must be \(\) float32", TypeError, {"grad_scale": torch.ones(2)}),
        (r"found_inf must be \(\) float32", TypeError, {"found_inf": torch.zeros((), dtype=torch.float64)}),
        ("found_inf is on meta", ValueError, {"found_inf": torch.zeros((), device="meta")}),
        ("grad_scale must be a torch.Tensor, not float", TypeError, {"grad_scale": 2.0}),
        ("move one", ValueError, {"momenta": [torch.zeros(4, device="meta")]}),
        ("lr must be", ValueError, {"lr": -0.1}),
        ("momentum must be", ValueError, {"momentum": float("nan")}),
    ],
)
def test_bad_input_is_named(words: str, error: type[Exception], change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "weights": [torch.ones(4, dtype=torch.float16)],
        "grads": [torch.zeros(4, dtype=torch.float16)],
        "masters": [torch.ones(4)],
        "momenta": [torch.zeros(4)],
        "lr": 0.1,
        "momentum": 0.9,
        **change,
    }
    with pytest.raises(error, match=words):
        fk.sgd_step(**arguments)


def test_overflow_names_bad_gradients() -> None:
    with pytest.raises(ValueError, match="at least one"):
        fk.overflow([])
    with pytest.raises(TypeError, match=r"grads\[1\] is torch.float16 and grads\[0\] torch.float32"):
        fk.overflow([torch.ones(1), torch.ones(1, dtype=torch.float16)])
    with pytest.raises(TypeError, match="must be a list"):
        fk.overflow(torch.ones(1))  # type: ignore[arg-type]


def test_a_loss_scale_that_is_no_tensor_is_refused_before_the_closure() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    closure = mock.Mock()
    with pytest.raises(
        TypeError, match=r"loss_scale must be a torch.Tensor, not float; torch.tensor\(loss_scale\) makes one"
    ):
        fk.MasterSGD([weight]).step(closure, loss_scale=8.0)  # type: ignore[arg-type]
    closure.assert_not_called()


def test_a_launch_has_the_present_addresses_and_keeps_its_blocks() -> None:
    """Gradients that moved: another row of addresses for each, and the same list of blocks, which has a row a program."""
    counts = (3000, 0, 5, 1024)
    weights = [nn.Parameter(torch.zeros(n, dtype=torch.float16)) for n in counts]
    optimizer = fk.MasterSGD(weights, lr=0.1, momentum=0.9)
    seen = []
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        seen.append([weight.grad for weight in weights])  # so that no two are at one address
        with mock.patch.object(_launch, "INTERPRETED", True):
            check, update = record_launches(lambda: optimizer.step(loss_scale=torch.tensor(1.0)))
        columns = [seen[-1], weights]
        for name in ("master", "momentum_buffer"):
            columns.append([optimizer.state[weight][name] for weight in weights])
        rows = [[t.numel(), *(column[at].data_ptr() for column in columns)] for at, t in enumerate(weights)]
        assert update.arguments["table_ptr"].tolist() == rows
        assert check.arguments["table_ptr"].tolist() == [row[:2] for row in rows]
        blocks = update.arguments["blocks_ptr"]
        assert blocks.tolist() == [[0, 0], [0, 1], [0, 2], [2, 0], [3, 0]] and blocks.dtype == torch.int32
        assert check.arguments["blocks_ptr"].tolist() == [[0, 0], [2, 0], [3, 0]]
        seen[-1].append(blocks)
    assert len({id(grads_and_blocks[-1]) for grads_and_blocks in seen}) == 1
    with mock.patch.object(_launch, "INTERPRETED", True):
        assert record_launches(lambda: fk.overflow([torch.zeros(0)])) == []


def test_a_launch_that_is_recorded_keeps_its_tables_for_the_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though launches before it made the same, and launches of other tensors follow, for more tables than are kept of those."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(_launch, "INTERPRETED", True)

    def tables(grads: list[torch.Tensor]) -> list[weakref.ref[torch.Tensor]]:
        (check,) = record_launches(lambda: fk.overflow(grads))
        return [weakref.ref(check.arguments[name]) for name in ("table_ptr", "blocks_ptr")]

    grads = [torch.zeros(5000), torch.zeros(7)]
    launched = tables(grads)
    with monkeypatch.context() as recording:
        recording.setattr(_kernels, "_is_recorded", lambda device: True)
        recorded = tables(grads)
    for count in range(1, 80):
        tables([torch.zeros(count)])
    gc.collect()
    assert [made() for made in launched] == [None, None], "of launches only the last are kept"
    assert [made().tolist()[0][0] for made in recorded] == [5000, 0]


class Seen(TorchDispatchMode):
    """The names of this package's operators that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fasttricks_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_an_eager_step_goes_past_the_dispatcher_and_changes_the_same_bits(dtype: torch.dtype) -> None:
    """Its weights, masters and momenta count as changed: a backward pass that saved a weight is refused."""
    after = []
    for watched in (False, True):
        params = parameters(dtype)
        optimizer = fk.MasterSGD(params, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True)
        step_with(optimizer, params, 0, 4.0, loss_scale=torch.tensor(4.0))
        states = [t for p in params for t in (p, optimizer.master_of(p), optimizer.state[p]["momentum_buffer"])]
        versions = [t._version for t in states]
        up = torch.ones(5, dtype=dtype, requires_grad=True)
        saved = (params[0] * up).sum()
        with (
            Seen() if watched else nullcontext() as seen,
            mock.patch.object(sgd, "_sgd_step", wraps=sgd._sgd_step) as op,
        ):
            step_with(optimizer, params, 1, 4.0, loss_scale=torch.tensor(4.0))
        assert op.called is watched
        assert seen is None or seen.names == ["overflow", "sgd_step"]
        assert all(t._version > before for t, before in zip(states, versions, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.backward()
        after.append([t.detach().clone() for t in states])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_gradients_that_are_not_what_their_memory_holds_are_read_by_their_values() -> None:
    """A negative view, and a zero without memory: torch's dispatcher makes plain tensors of them."""
    grads = {
        "plain": torch.full((3,), -2.0),
        "negative view": torch.full((3,), 2.0)._neg_view(),
        "part of a conjugate": torch.complex(torch.zeros(3), torch.full((3,), 2.0)).conj().imag,
        "zero": torch._efficientzerotensor(3),  # type: ignore[attr-defined]
    }
    for name, grad in grads.items():
        weight = nn.Parameter(torch.ones(3))
        with mock.patch.object(sgd, "_sgd_step", wraps=sgd._sgd_step) as op:
            fk.sgd_step([weight], [grad], [], [], lr=0.5)
        assert op.called is (name in ("negative view", "zero")), (
            f"{name}: the part of a conjugate is copied, to be dense"
        )
        assert torch.equal(weight.detach(), torch.full((3,), 1.0 if name == "zero" else 2.0)), name
        assert fk.overflow([grad]) == 0
    with torch.inference_mode():
        weight_in_inference = torch.ones(3)
        fk.sgd_step([weight_in_inference], [torch.ones(3)], [], [], lr=0.5)
        assert torch.equal(weight_in_inference, torch.full((3,), 0.5))
