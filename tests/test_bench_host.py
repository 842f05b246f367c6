"""python -m bench.host: its clock by hand, its parts on a small network, and the operators that it leaves out as they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from bench import host
from bench.host import Stopwatch, as_on_a_gpu, host_ms
from fasttricks_kernels import MasterSGD
from fasttricks_kernels.proof.host import launched_nowhere


def test_the_clock_gives_each_part_its_own_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now: Iterator[float] = iter([0, 1, 3, 6, 10, 15, 100, 107])
    monkeypatch.setattr(host.time, "thread_time", lambda: next(now))
    watch = Stopwatch()
    inner = watch.timed("inner", lambda x, *, y: x + y)
    with watch.part("outer"):
        assert inner(1, y=2) == 3
        assert inner(3, y=4) == 7
    with watch.part("inner"):
        pass
    assert watch.seconds == {"outer": 1 + 3 + 5, "inner": 2 + 4 + 7}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's network is narrow too."""
    monkeypatch.setattr(host, "make", partial(lambda made, width, norm="fused": made(1 / 16, norm), host.make))


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_each_part_of_a_step_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["host", "--batch-size", "2", "--turns", "2"])
    host.main()
    cells = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {name.removeprefix("| "): float(ms.removesuffix(" |")) for name, ms in cells}
    parts = ("forward", "loss", "guard", "backward", "zero_grad", "average", "logging", "the rest")
    assert list(rows) == [host.LOADER, host.COPY, *parts, host.OPTIMIZER, host.MOVED, "a step"]
    assert all(ms > 0 for name, ms in rows.items() if name != host.COPY)  # two files' is below 0.01
    assert rows["a step"] == pytest.approx(sum(rows.values()) - rows["a step"] - rows[host.MOVED], abs=0.07)
    assert rows["forward"] > rows["logging"], "a network of 167 parameters against a sum"


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_step_launches_what_it_launches_on_a_gpu() -> None:
    """Batch norm's kernels for each of the network's 55 layers; of the others, all. One of SGD's is the average's."""
    with launched_nowhere() as launches, as_on_a_gpu():
        turns = host.step_turns()
        next(turns)
        launches.started.clear()
        next(turns)
    counts = {name: launches.started.count(name) for name in launches.started}
    assert counts["statistics_kernel"] == counts["normalise_kernel"] == counts["gradient_sums_kernel"] == 55
    assert {name: counts[name] for name in ("cross_entropy_kernel", "mixup_kernel", "sgd_kernel", "overflow_kernel")} == {
        "cross_entropy_kernel": 2, "mixup_kernel": 1, "sgd_kernel": 4, "overflow_kernel": 2
    }  # fmt: skip


def test_convolutions_have_torchs_shapes_while_they_are_left_out_and_its_values_afterwards() -> None:
    layer = torch.nn.Conv2d(6, 10, 3, stride=2, padding=2, dilation=2, groups=2, bias=False)
    x = torch.randn(2, 6, 9, 12, requires_grad=True)
    want = layer(x)
    with as_on_a_gpu():
        y = layer(x)
        y.sum().backward()
        assert y.shape == want.shape and y.is_contiguous(memory_format=torch.channels_last)
        assert x.grad is not None and layer.weight.grad is not None
    assert torch.equal(layer(x), want)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_slow_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty milliseconds of work in the optimizer are the optimizer's, and nobody else's."""
    step = MasterSGD.step

    def slow(self: torch.optim.Optimizer, *arguments: object, **options: object) -> object:
        end = host.time.thread_time() + 0.02
        while host.time.thread_time() < end:
            pass
        return step(self, *arguments, **options)

    before = host_ms(batch_size=2, turns=3)
    monkeypatch.setattr(MasterSGD, "step", slow)
    after = host_ms(batch_size=2, turns=3)
    grown = {part for part in before if after[part] - before[part] > 15}
    assert grown == {host.OPTIMIZER, host.MOVED}
