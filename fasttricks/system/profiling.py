"""--profile: training steps under torch.profiler, as a Chrome trace in the run folder and a table of where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SKIPPED, RECORDED = 5, 10
"""Steps before the recording, which warm up, and steps recorded."""
SPANS = ("data", "forward", "backward", "step")
ROWS = 12
TRACE = "trace.json"


class StepProfiler:
    """Records steps 6 to 15 of the process, once. step() after each; close() at the end of the run.

    A step that is recorded is slower, by a few percent on the CPU. Without `on` nothing is done. Writes `folder`/trace.json
    (chrome://tracing, ui.perfetto.dev) and gives `say` the table. compiled: the number of graphs that torch.compile has
    made; where a step adds to it, the steps are counted from there on, and a recording is begun again.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        say: Callable[[str], None],
        *,
        on: bool,
        compiled: Callable[[], int] = lambda: 0,
    ) -> None:
        self._folder, self._say, self._on_gpu = folder, say, device.type == "cuda"
        self._compiled, self._graphs = compiled, compiled()
        self._steps = 0
        self._profile: Any = None
        self._on = on

    def step(self) -> None:
        """Take note of a step that is done. The last one recorded waits for the device."""
        if not self._on:
            return
        if (graphs := self._compiled()) != self._graphs:
            self._graphs, self._steps = graphs, 0
            if self._profile is not None:
                self._profile.stop()
                self._profile = None
            return
        self._steps += 1
        if self._steps == SKIPPED:
            activities = [torch.profiler.ProfilerActivity.CPU]
            activities += [torch.profiler.ProfilerActivity.CUDA] if self._on_gpu else []
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()
        elif self._steps == SKIPPED + RECORDED:
            self._finish(RECORDED)

    def close(self) -> None:
        """End a recording that the run ended before; say so where none began."""
        if not self._on:
            return
        if self._profile is not None:
            self._finish(self._steps - SKIPPED)
        else:
            since = " since the last that compiled" if self._graphs else ""
            self._say(f"note: no profile: the run ended after {self._steps} steps{since}, before the {SKIPPED + 1}th")

    def _finish(self, steps: int) -> None:
        profile, self._profile, self._on = self._profile, None, False
        if self._on_gpu:
            torch.cuda.synchronize()
        profile.stop()
        if not steps:
            self._say(f"note: no profile: the run ended after step {SKIPPED}, before one was recorded")
            return
        profile.export_chrome_trace(str(self._folder / TRACE))
        for line in table(profile.key_averages(), steps, on_gpu=self._on_gpu):
            self._say(line)
        self._say(f"trace of {steps} steps: {self._folder / TRACE} (open in ui.perfetto.dev)")


def table(averages: Any, steps: int, *, on_gpu: bool) -> list[str]:
    """The lines that say where `steps` steps spent their time: the phases, as the host saw them, and the longest operators.

    averages: torch.profiler's key_averages(). An operator's time is its own, without those it calls: on the device on a GPU.
    """
    phases = {event.key: event.cpu_time_total for event in averages if event.key in SPANS and event.cpu_time_total}
    whole = sum(phases.values())
    lines = [f"profile, ms a step over {steps} steps:"]
    lines += [_line(name, phases[name], steps, whole) for name in SPANS if name in phases]
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operators = [event for event in averages if event.key not in SPANS]
    operators = sorted(operators, key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in operators)
    lines.append("of which operators, each without those it calls" + (", on the GPU:" if on_gpu else ":"))
    for event in operators[:ROWS]:
        lines.append(f"{_line(event.key, getattr(event, own), steps, total)}  {event.count / steps:7.1f} calls")
    rest = sum(getattr(event, own) for event in operators[ROWS:])
    lines.append(_line(f"{max(0, len(operators) - ROWS)} others", rest, steps, total))
    return lines


def _line(name: str, microseconds: float, steps: int, whole: float) -> str:
    return f"  {name:44.44s} {microseconds / 1e3 / steps:10.2f}  {microseconds / whole:6.1%}"
