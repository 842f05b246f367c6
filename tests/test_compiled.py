"""--compile: the same training to rounding, no compilation after the first epoch, a failure in one line or a way back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from fasttricks.config import Compile, ConfigError, DataConfig
from fasttricks.data.sources import find_dataset
from fasttricks.learning.compiled import CompiledModel, without_cuda_graphs
from fasttricks.learning.optim import master_state_dict
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World
from fasttricks.tasks.classification import CLASSIFICATION
from fasttricks.trainer import fit
from fasttricks.training.build import build
from fasttricks.training.checks import check_fit
from fasttricks.training.run import Run
from lib.tiny import ALONE, configure


def start(data: Path, folder: Path, *more: str) -> Run:
    torch._dynamo.reset()
    return build(configure(data, folder, *more), ALONE)


def records(folder: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "train_loss" in line]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("backend", "accumulate"),
    [("eager", 1), pytest.param("inductor", 1, marks=slow), pytest.param("inductor", 2, marks=slow)],
)
def test_a_compiled_run_is_the_eager_run_and_compiles_in_its_first_epoch_alone(
    backend: str,
    accumulate: int,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """eager traces as inductor does, and leaves out derivatives and code generation, half a minute."""
    compile_ = torch.compile
    if backend != "inductor":
        monkeypatch.setattr(torch, "compile", lambda model, mode: compile_(model, backend=backend))
    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)
    more = ["--epochs", "3", "--accumulate", str(accumulate), "--optim.base-lr", "0.01"]
    summaries = {}
    for mode in ("off", "default"):
        summaries[mode] = fit(start(tiny_data, tmp_path / mode, *more, "--compile", mode))
        said = [" ".join(line.split()[:2]) for line in capsys.readouterr().out.splitlines()]
        steps = [line for line in said if line.startswith(("epoch ", "compiling "))]
        assert (steps[0] == "compiling the") == (mode == "default")
        assert "compiling the" not in steps[steps.index("epoch 1.0") :]
    compiled, eager = records(tmp_path / "default"), records(tmp_path / "off")
    for ours, plain in zip(compiled, eager, strict=True):
        assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    graphs = [r["compiled_graphs"] for r in compiled]
    steps = len(graphs) // 3
    assert graphs[0] >= 1
    assert graphs[steps - 1 :] == [graphs[steps - 1]] * (2 * steps + 1), "none after the first epoch"
    assert "compiled_graphs" not in eager[0]
    assert summaries["default"]["val_loss"] == pytest.approx(summaries["off"]["val_loss"], rel=1e-2)


class Uncompilable(nn.Module):
    """What dynamo cannot trace as one, and a compiler that gives up."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * 2


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(graph: object, inputs: object) -> None:
        raise RuntimeError("no such instruction")

    compile_ = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_(model, backend=give_up))


def test_a_failure_to_compile_is_an_error_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    model = CompiledModel(Uncompilable(), "default", fallback=False, say=print)
    with pytest.raises(ConfigError, match=r"compile = 'default': torch.compile failed: .*; take --compile off, or"):
        model(torch.ones(2))


def test_with_fallback_a_failure_is_said_once_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch)
    said: list[str] = []
    model = CompiledModel(Uncompilable(), "default", fallback=True, say=said.append)
    for _ in range(2):
        assert model(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(said) == 1
    assert said[0].startswith("note: torch.compile failed:")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_cuda_graphs_are_for_one_micro_batch_on_one_rank(
    ranks: int, accumulate: int, device: str, tiny_data: Path
) -> None:
    """Every mode but `off`, on any device: the way out is a mode that is accepted for the same run."""
    world = World(rank=0, size=ranks, local_rank=0, local_size=ranks, device=torch.device(device))
    train, _ = find_dataset(DataConfig(root=str(tiny_data)))
    config = configure(tiny_data, tiny_data, accumulate=accumulate, precision="fp32")

    def refusal(mode: Compile) -> str:
        try:
            check_fit(CLASSIFICATION, dataclasses.replace(config, compile=mode), train, world)
        except ConfigError as error:
            return str(error)
        return ""

    refusals = {mode: refusal(mode) for mode in get_args(Compile) if refusal(mode)}
    assert list(refusals) == ([] if ranks * accumulate == 1 else ["reduce-overhead", "max-autotune"])
    for mode, error in refusals.items():
        assert error.startswith(f"compile = {mode!r}: records CUDA graphs")
        assert error.endswith(f"and here are {ranks} x {accumulate}; take --compile {without_cuda_graphs(mode)}")


def test_the_modes_without_cuda_graphs_are_those_that_inductor_says_have_none() -> None:
    """Its own table of the settings behind each mode."""
    for mode in get_args(Compile)[1:]:
        graphs = torch._inductor.list_mode_options(mode).get("triton.cudagraphs", False)
        assert graphs == (without_cuda_graphs(mode) != mode), mode


@pytest.mark.parametrize("on", [True, False])
def test_inductor_is_told_of_the_one_order_where_a_run_compiles(on: bool) -> None:
    import torch._inductor.config as inductor

    before = inductor.deterministic
    try:
        inductor.deterministic = not on
        ask_for_one_order(torch.device("cuda"), on=on)
        assert inductor.deterministic == (not on), "a run that does not compile need not import it"
        ask_for_one_order(torch.device("cuda"), on=on, compiled=True)
        assert inductor.deterministic == on
        assert torch.get_deterministic_debug_mode() == int(on), "a warning, no error"
    finally:
        inductor.deterministic = before


def test_the_weights_keep_their_names(tiny_data: Path, tmp_path: Path) -> None:
    run = start(tiny_data, tmp_path / "run", "--compile", "default")
    assert isinstance(run.forward, CompiledModel)
    assert "conv1.0.weight" in run.model.state_dict()
    assert len(list(run.forward.parameters())) == len(list(run.model.parameters()))
    assert master_state_dict(run.model, run.optimizer).keys() == run.model.state_dict().keys()
    run.log.close()
