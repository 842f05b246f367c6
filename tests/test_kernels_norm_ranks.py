"""batch_norm_act over a process group: 2 and 3 ranks with gloo, uneven and without images, against torch on all of them."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fasttricks_kernels as fk
from fasttricks_kernels.norm import _synchronized
from lib.batch_norms import FORMS, STEP, channels_last, check, draw, ours
from lib.forked import on_ranks
from lib.interpreter import interpreted

SPLITS = {2: (2, 1), 3: (1, 0, 2)}
"""The images of each rank, of 3 in all."""
CASES: dict[str, tuple[int, torch.dtype, str, bool, bool, float]] = {
    "relu": (64, torch.float32, "relu", False, False, 0.0),
    "residual": (7, torch.float32, "relu6", True, False, 0.0),
    "fork": (32, torch.float32, "relu", True, True, 0.0),
    "fork without act": (3, torch.float32, "none", True, True, 0.0),
    "fork without residual": (3, torch.float32, "relu", False, True, 0.0),
    "far mean": (32, torch.float32, "none", False, False, 1500.0),
    "fp16": (7, torch.float16, "relu", True, True, 0.0),
    "bf16": (7, torch.bfloat16, "none", False, False, 0.0),
}
"""Channels, dtype, act, with a residual, fork, shift of x."""


def drawn(case: str) -> tuple[dict[str, Any], str]:
    channels, dtype, act, with_residual, fork, shift = CASES[case]
    data = draw(channels, 2100, dtype, shift=shift, fork=fork)
    return data if with_residual else data | {"residual": None}, act


def run(folder: Path) -> None:
    """A rank: its own images of every case; and its refusals."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = SPLITS[ranks]
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found: dict[str, Any] = {}
    for case in CASES:
        data, act = drawn(case)
        images = ("x", "residual", "grad", "second")
        data = {name: v[own] if name in images and v is not None else v for name, v in data.items()}
        found[case] = ours(data, act, True, process_group=dist.group.WORLD)
    data, act = drawn("fork")
    data = {name: v[own].contiguous() if name in ("x", "grad") else v for name, v in data.items() if name != "second"}
    found["NCHW"] = ours(data | {"residual": None}, act, True, process_group=dist.group.WORLD)
    found["one value"] = one_value_a_rank(rank)
    found["empty"] = all_empty()
    refusals()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def one_value_a_rank(rank: int) -> dict[str, Any]:
    """Of a channel: torch's local batch norm refuses it. Momentum comes as a tensor."""
    x = torch.tensor([[1.0, -2.0], [4.0, 3.0], [2.0, 0.0]])[rank : rank + 1].requires_grad_()
    mean, var = torch.zeros(2), torch.ones(2)
    y = fk.batch_norm_act(
        x, None, None, mean, var, training=True, momentum=torch.tensor(0.5), eps=1e-5, process_group=dist.group.WORLD
    )
    (grad,) = torch.autograd.grad(y.square().sum() + y[:, 0].sum(), x)
    return {"y": y.detach(), "running_mean": mean, "running_var": var, "grad": grad}


def all_empty() -> dict[str, Any]:
    x, mean, var = torch.zeros(0, 2, 3, 3, requires_grad=True), torch.zeros(2), torch.ones(2)
    y = fk.batch_norm_act(
        x, None, None, mean, var, training=True, momentum=0.5, eps=1e-5, process_group=dist.group.WORLD
    )
    y.sum().backward()
    assert x.grad is not None
    return {"shapes": (y.shape, x.grad.shape), "running": torch.cat([mean, var])}


def refusals() -> None:
    x = channels_last(torch.randn(2, 3, 2, 2)).requires_grad_()
    options: dict[str, Any] = {"momentum": 0.1, "eps": 1e-5, "process_group": dist.group.WORLD}

    def call(x: Tensor) -> Any:
        return fk.batch_norm_act(x, None, None, None, None, training=True, **options)

    (grad,) = torch.autograd.grad(call(x).square().sum(), x)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="runs eagerly"):
        torch.func.grad(lambda x: call(x).sum())(x.detach())
    with pytest.raises(ValueError, match="process_group must be None where not training"):
        fk.batch_norm_act(x, None, None, torch.zeros(3), torch.ones(3), training=False, **options)
    one = x.detach()[:1, :, :1, :1] if dist.get_rank() == 0 else x.detach()[:0, :, :1, :1]
    if os.environ.get("TRITON_INTERPRET") != "1":  # as on a GPU, where the host does not know the count
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            call(one)
    kept = x * 1
    y = call(kept)
    with torch.no_grad():
        kept += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert grad.shape == x.shape


def check_ranks(folder: Path, ranks: int, step: dict[torch.dtype, float]) -> None:
    found = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    for case in [*CASES, "NCHW"]:
        data, act = drawn("fork" if case == "NCHW" else case)
        if case == "NCHW":
            data = {name: value for name, value in data.items() if name != "second"} | {"residual": None}
        parts = [one[case] for one in found]
        for name in ("running_mean", "running_var"):
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), (case, name)
        whole = {name: torch.cat([part[name] for part in parts]) for name in ("y", "grad_x")}
        if data["residual"] is not None:
            whole["grad_residual"] = torch.cat([part["grad_residual"] for part in parts])
        whole |= {name: parts[0][name] for name in ("running_mean", "running_var")}
        whole |= {name: sum(part[name] for part in parts) for name in ("grad_weight", "grad_bias")}
        check(data, act, True, step=step, got=whole)
    values = torch.tensor([[1.0, -2.0], [4.0, 3.0], [2.0, 0.0]])[:ranks].double().requires_grad_()
    theirs = torch.nn.BatchNorm1d(2, momentum=0.5, affine=False, dtype=torch.float64)
    y = theirs(values)
    (grad,) = torch.autograd.grad(y.square().sum() + y[:, 0].sum(), values)
    for rank, one in enumerate(found):
        got = one["one value"]
        for name, true in {"y": y[rank], "grad": grad[rank]}.items():
            torch.testing.assert_close(got[name][0].double(), true.detach(), rtol=1e-5, atol=1e-6)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(got[name].double(), getattr(theirs, name), rtol=1e-6, atol=1e-6)
        assert one["empty"]["shapes"] == ((0, 2, 3, 3),) * 2
        assert torch.equal(one["empty"]["running"], torch.tensor([0.0, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_have_the_batch_norm_of_all_images(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, run, tmp_path)
    check_ranks(tmp_path, ranks, STEP | {torch.float32: 1e-7})


def interpret(rank: int, folder: Path, ranks: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "TRITON_INTERPRET": "1"}
    torch.set_num_threads(1)
    run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_have_the_batch_norm_of_all_images_by_triton(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels, interpreted: TRITON_INTERPRET must be set before a rank imports them."""
    from bench.soak.processes import free_port

    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=interpret, args=(rank, tmp_path, ranks)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * ranks
    check_ranks(tmp_path, ranks, STEP)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradcheck_in_float64(form: tuple[Any, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of plain PyTorch, of a rank that is alone."""
    monkeypatch.setattr(_synchronized, "gathered", lambda total, group: total[None])
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    weight, bias = (torch.rand(3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
        tensors = x, weight, bias, None, None, residual if form[1] else None
        return _synchronized.synchronized(*tensors, 0.1, None, act=form[0], eps=1e-5, fork=True)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(run, (x, weight, bias, residual if form[1] else residual.detach()))


def test_a_group_that_is_none_is_refused_by_name() -> None:
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"process_group must be a torch.distributed.ProcessGroup, .*, not str"):
        fk.batch_norm_act(
            x,
            None,
            None,
            None,
            None,
            training=True,
            momentum=0.1,
            eps=1e-5,
            process_group="gloo",  # type: ignore[call-overload]
        )


@pytest.mark.parametrize("empty", [(), range(66), (0, 69)], ids=["none", "the first 66", "first and last"])
@interpreted
def test_seventy_ranks_of_which_some_have_no_value(empty: Any) -> None:
    """More than a tile of the merging kernel; at a mean of a thousand standard deviations, held to torch in float64."""
    from fasttricks_kernels.norm import _launches

    generator = torch.Generator().manual_seed(0)
    options = _launches.Options("none", True, 0.1, 1e-5)
    shares = [channels_last(torch.randn(1 + rank % 3, 7, 5, 5, generator=generator) + 1000) for rank in range(70)]
    shares = [x[:0] if rank in empty else x for rank, x in enumerate(shares)]
    totals = torch.zeros(70, 3 * 7 + 1)
    for x, total in zip(shares, totals, strict=True):
        if len(x):
            parts = _launches.launch_statistics(x)
            _launches.launch_merge_statistics(x, parts, None, None, None, None, None, None, total, None, options)
    numbers, count, mean, var = torch.empty(4, 7), torch.empty(()), torch.zeros(7), torch.ones(7)
    weight, bias = torch.rand(2, 7, generator=generator)
    channel_tensors = mean, var, None, weight, bias
    _launches.launch_merge_statistics(shares[0], totals, *channel_tensors, numbers, None, count, options)
    whole = torch.cat(shares).double()
    theirs = torch.nn.BatchNorm2d(7, dtype=torch.float64)
    theirs(whole)
    torch.testing.assert_close(mean.double(), theirs.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), theirs.running_var, rtol=1e-5, atol=0)
    assert count == whole.numel() / 7
    y = (whole - numbers[0].double().view(-1, 1, 1)) * numbers[2].view(-1, 1, 1) + numbers[3].view(-1, 1, 1)
    true, in_float32 = (
        torch.nn.functional.batch_norm(whole.to(dtype), None, None, weight.to(dtype), bias.to(dtype), True, 0.1, 1e-5)
        for dtype in (torch.float64, torch.float32)
    )
    allowed = (in_float32 - true).abs().max() + 2**-23 * true.abs().max()
    assert (y - true).abs().max() <= allowed, (float((y - true).abs().max()), float(allowed))
