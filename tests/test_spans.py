"""Ranges of the step: in a profiler's trace as it is written, pushed and popped in pairs, absent where nobody looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench.no_sync import no_sync
from fasttricks.system import spans
from fasttricks.system.spans import span, spanned

NAMES = ["data", "forward", "backward", "step"]


def small_steps(model: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer, count: int) -> None:
    """Steps as the trainer's, in the same four ranges."""
    batches = (torch.randn(4, 3, 8, 8).relu() for _ in range(count))
    for images in spanned("data", batches):
        with span("forward"):
            loss = model(images).square().mean()
        with span("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with span("step"):
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5))


@pytest.fixture
def trace(model: nn.Module, tmp_path: Path) -> list[dict[str, Any]]:
    """The complete events of a Chrome trace of two steps, in the order of their start."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small_steps(model, optimizer, 1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        small_steps(model, optimizer, 2)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    return sorted((event for event in events if event.get("ph") == "X"), key=lambda event: float(event["ts"]))


def ranges(trace: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in trace if event.get("cat") == "user_annotation" and event["name"] in NAMES]


def test_a_trace_has_the_ranges_in_order(trace: list[dict[str, Any]]) -> None:
    assert [event["name"] for event in ranges(trace)] == [*NAMES, *NAMES, "data"], "the last finds no more data"
    for first, second in zip(ranges(trace), ranges(trace)[1:], strict=False):
        assert first["ts"] + first["dur"] <= second["ts"], "no two overlap"


@pytest.mark.parametrize(
    "name, operators",
    [
        ("data", {"aten::randn", "aten::relu"}),
        ("forward", {"aten::convolution", "aten::batch_norm", "aten::linear", "aten::mean"}),
        ("backward", {"aten::convolution_backward", "aten::native_batch_norm_backward"}),
        ("step", {"Optimizer.step#SGD.step"}),
    ],
)
def test_a_range_holds_its_own_operators(name: str, operators: set[str], trace: list[dict[str, Any]]) -> None:
    for operator in operators:
        found = [event for event in trace if event["name"] == operator]
        assert len(found) >= 2, operator
        for event in found:
            (around,) = [r for r in ranges(trace) if r["ts"] <= event["ts"] < r["ts"] + r["dur"]]
            assert around["name"] == name, operator
            assert event["ts"] + event["dur"] <= around["ts"] + around["dur"]


def test_ranges_nest(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler, span("outer"):
        with span("inner"):
            torch.ones(2)
        torch.zeros(2)
    found = {event.name: event.time_range for event in profiler.events()}
    assert found["outer"].start <= found["inner"].start
    assert found["inner"].end <= found["aten::zeros"].start <= found["outer"].end


def test_a_range_ends_with_an_exception(model: nn.Module) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        with pytest.raises(RuntimeError), span("fails"):
            model(torch.zeros(1, 2, 8, 8))
        torch.ones(2)
    found = {event.name: event.time_range for event in profiler.events()}
    assert found["fails"].end <= found["aten::ones"].start


def test_the_profilers_range_is_entered_only_while_one_records(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    real = spans.record_function
    monkeypatch.setattr(spans, "record_function", lambda name: entered.append(name) or real(name))
    with span("before"):
        pass
    with profile(activities=[ProfilerActivity.CPU]), span("during"):
        pass
    with span("after"):
        pass
    assert entered == ["during"]


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the NVTX ranges that were pushed, and "pop" for each that was popped, as if CUDA were in use."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    return calls


def test_nvtx_ranges_are_pushed_and_popped_in_pairs(nvtx: list[str], model: nn.Module) -> None:
    small_steps(model, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert nvtx == [*(call for name in NAMES for call in (name, "pop")), "data", "pop"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StopIteration])
def test_nvtx_ranges_are_popped_where_the_block_raises(error: type[BaseException], nvtx: list[str]) -> None:
    with pytest.raises(error), span("outer"), span("inner"):
        raise error
    assert nvtx == ["outer", "inner", "pop", "pop"]


def test_nvtx_range_of_data_is_popped_where_the_loader_raises(nvtx: list[str]) -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise OSError("a damaged image")

    fetched = spanned("data", batches())
    assert next(fetched) == 1
    with pytest.raises(OSError, match="damaged"):
        next(fetched)
    assert nvtx == ["data", "pop"] * 2


def test_no_pop_without_a_push(nvtx: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA comes into use inside the block."""
    in_use = False
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    with span("first"):
        in_use = True
    with span("second"):
        in_use = False
    assert nvtx == ["second", "pop"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows that no driver is needed; here is one")
def test_without_a_driver_nvtx_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: pytest.fail("NVTX was called"))
    with span("anything"):
        pass
    assert not torch.cuda.is_initialized(), "a range must not be what starts CUDA"


def test_spanned_gives_the_items_one_by_one() -> None:
    drawn: list[int] = []

    def count() -> Iterator[int | None]:
        for item in (1, None, 3):
            drawn.append(len(drawn))
            yield item

    iterator = spanned("data", count())
    assert next(iterator) == 1 and drawn == [0], "nothing is fetched ahead"
    assert list(iterator) == [None, 3]
    assert list(spanned("data", [])) == []


def test_ranges_around_a_compiled_network_are_outside_of_its_graph(model: nn.Module) -> None:
    """The trainer's way: one graph, whether somebody profiles or not."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    small_steps(compiled, optimizer, 2)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        small_steps(compiled, optimizer, 1)
    torch._dynamo.reset()
    assert len(graphs) == 1
    assert "record" not in graphs[0].code
    assert {event.name for event in profiler.events()} >= set(NAMES)


@pytest.mark.gpu
def test_nvtx_and_the_trace_on_a_gpu(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real NVTX calls, none of which waits for the device."""
    calls: list[str] = []
    push, pop = torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: calls.append(name) or push(name))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop") or pop())
    model.cuda()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler, no_sync(), span("forward"):
        model(torch.zeros(2, 3, 8, 8, device="cuda"))
    assert calls == ["forward", "pop"]
    assert "forward" in {event.name for event in profiler.events()}
