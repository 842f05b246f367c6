"""--profile: held to torch.profiler's own trace, and to a table worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fasttricks.commands import train
from fasttricks.system import profiling
from fasttricks.system.profiling import StepProfiler, table
from lib.tiny import arguments, call, write_images


def event(key: str, total: float, own: float, count: int = 2, device: float = 0.0) -> SimpleNamespace:
    """One row of key_averages(), microseconds."""
    return SimpleNamespace(
        key=key, cpu_time_total=total, self_cpu_time_total=own, count=count, self_device_time_total=device
    )


EVENTS = [
    event("data", 1000, 0),
    event("forward", 3000, 100),
    event("backward", 5000, 100),
    event("step", 1000, 100),
    event("aten::convolution", 6000, 6000, count=4, device=10),
    event("aten::add_", 2000, 2000, device=30),
]


def test_the_table_gives_each_phase_and_operator_its_share_of_a_step() -> None:
    lines = table(EVENTS, 2, on_gpu=False)
    phases = {words[0]: words[1:] for words in map(str.split, lines[1:5])}
    assert phases == {
        "data": ["0.50", "10.0%"],
        "forward": ["1.50", "30.0%"],
        "backward": ["2.50", "50.0%"],
        "step": ["0.50", "10.0%"],
    }
    assert lines[6].split() == ["aten::convolution", "3.00", "75.0%", "2.0", "calls"]
    on_gpu = table(EVENTS, 2, on_gpu=True)
    assert on_gpu[6].split()[:3] == ["aten::add_", "0.01", "75.0%"]


def test_a_run_leaves_a_trace_of_its_steps_and_says_where_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(profiling, "SKIPPED", 1)
    monkeypatch.setattr(profiling, "RECORDED", 2)
    write_images(tmp_path / "data", train=20, val=3)
    assert call(train.main, *arguments(tmp_path / "data", tmp_path / "run", "--profile")) == 0
    out = capsys.readouterr().out
    assert "profile, ms a step over 2 steps:" in out and "aten::" in out and "trace of 2 steps" in out
    names = [event.get("name") for event in json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]]
    assert {name: names.count(name) for name in ("forward", "backward", "step")} == {
        "forward": 2,
        "backward": 2,
        "step": 2,
    }


@pytest.mark.parametrize(("steps", "said"), [(2, "after 2 steps"), (5, "after step 5"), (7, "over 2 steps")])
def test_a_run_that_ends_early_says_what_was_recorded(steps: int, said: str, tmp_path: Path) -> None:
    lines: list[str] = []
    profiler = StepProfiler(tmp_path, torch.device("cpu"), lines.append, on=True)
    for _ in range(steps):
        with torch.profiler.record_function("step"):
            torch.ones(4) + 1
        profiler.step()
    profiler.close()
    profiler.close()
    assert said in "\n".join(lines)
    assert (tmp_path / "trace.json").exists() == (steps == 7)


def test_steps_that_compile_are_neither_recorded_nor_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 1, 3 and 6 compile: two steps on, 5, the recording begins, and anew at step 8."""
    monkeypatch.setattr(profiling, "SKIPPED", 2)
    monkeypatch.setattr(profiling, "RECORDED", 3)
    graphs, lines = [0], list[str]()
    profiler = StepProfiler(tmp_path, torch.device("cpu"), lines.append, on=True, compiled=lambda: graphs[0])
    for step in range(1, 13):
        graphs[0] += step in (1, 3, 6)
        with torch.profiler.record_function("step"), torch.profiler.record_function(f"step {step}"):
            torch.ones(4) + 1
        profiler.step()
    profiler.close()
    assert lines[0] == "profile, ms a step over 3 steps:"
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {name for name in names if name.startswith("step ")} == {"step 9", "step 10", "step 11"}


def test_without_profile_nothing_is_recorded_or_said(tmp_path: Path) -> None:
    lines: list[str] = []
    profiler = StepProfiler(tmp_path, torch.device("cpu"), lines.append, on=False)
    for _ in range(20):
        profiler.step()
    profiler.close()
    assert not lines and not list(tmp_path.iterdir())
