"""make bench on a GPU, without one: one contestant holds the card's memory at a time, and the GPU's own loader is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import loader, pairs, report, step
from bench.budget import Budget
from fasttricks.data.sources.folder import scan_folder
from fasttricks.system.distributed import World

GPU = torch.device("cuda", 0)


def test_one_contestant_of_the_step_bench_holds_a_cards_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five allocators, each of which caches the memory of a step from its first step to empty_cache()."""
    cached: set[str] = set()
    most, running = 0, ""
    monkeypatch.setattr(pairs, "_cpu_seconds", lambda: (0.0, 0.0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cached.discard(running))

    def contestant(name: str) -> Any:
        def one() -> None:
            nonlocal most, running
            running = name
            cached.add(name)
            most = max(most, len(cached))

        return lambda: 1 / step.turn(one, World.alone(GPU), 3)

    names = step.names_of(step.StepCase(device="cuda", compiled=True))
    rows = pairs.by_turns({name: contestant(name) for name in names}, rounds=3)
    assert len(rows) == 5 and most == 1 and not cached


def test_a_step_that_fetches_memory_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: cuda.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cuda.append("empty_cache"))
    step.turn(lambda: cuda.append("step"), World.alone(GPU), 2)
    assert cuda == ["step", "synchronize", "step", "step", "synchronize", "empty_cache"]
    cuda.clear()
    step.turn(lambda: cuda.append("step"), World.alone(torch.device("cpu")), 2)
    assert cuda == ["step", "step"]


def test_the_gpus_loader_is_made_for_each_pass_by_threads_and_the_engines_share(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built as the trainer's, on the card, in FP16; none outlives its pass, with the memory that its decoders hold."""
    made: list[Any] = []
    alive: list[str] = []

    class Fake:
        def __init__(self, folder: Any, config: Any, **options: Any) -> None:
            made.append((config.threads, options["hw_decoder_load"], options["device"], options["dtype"]))
            alive.append("loader")
            assert len(alive) == 1 and len(folder) >= 4096 and options["training"]

        def __del__(self) -> None:
            alive.clear()

        def __iter__(self) -> Any:
            return iter([(None, range(128))] * 6)

    monkeypatch.setattr(loader, "Loader", Fake)
    monkeypatch.setattr(loader.time, "sleep", lambda _: None)
    turns = loader.on_device(scan_folder(tiny_data / "train"), GPU)
    assert len(turns) == 12 and all(turn() > 0 for turn in turns.values()) and not alive
    assert made == [(n, load, GPU, torch.float16) for n in (4, 8, 16) for load in (0.0, 0.65, 0.9, 1.0)]


def test_on_a_gpu_the_report_has_a_table_of_its_loader(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "contestants", lambda *_: {"ours": lambda: 1.0})
    monkeypatch.setattr(
        report, "by_turns", lambda turns, rounds, until_s: [pairs.Row(n, 1, 1, 1, 1, (1,), 0) for n in turns]
    )
    config = report.BenchConfig(data=report.BenchData(root=str(tiny_data)))
    for name, titles in (("cpu", ["Loader, "]), ("cuda", ["Loader, ", "Loader on the GPU, "])):
        bench = report.Bench(config, torch.device(name), tmp_path, Console(quiet=True), Budget(1.0, ("loader",)))
        tables = list(report.measure_loader(bench))
        assert [table.title.startswith(title) for table, title in zip(tables, titles, strict=True)] == [True] * len(
            titles
        )
    assert tables[1].rows[0].name == "4 threads, hw_decoder_load 0"
