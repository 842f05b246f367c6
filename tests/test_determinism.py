"""--deterministic: the algorithms that a process on a GPU asks for, read back here, where torch has the flags and no GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from fasttricks.commands import cost, evaluate, predict
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World
from fasttricks.training import build as building
from lib.tiny import configure

CUDA = torch.device("cuda")
VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


class Flags(NamedTuple):
    """What was asked for."""

    deterministic: bool
    benchmark: bool
    mode: int
    """Of torch.get_deterministic_debug_mode(): 1 warns of an operator without a deterministic algorithm."""
    fills: bool
    workspace: str | None


ON = Flags(True, False, 1, False, ":4096:8")
OFF = Flags(False, True, 0, False, None)


def flags() -> Flags:
    cudnn = torch.backends.cudnn
    fills = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    return Flags(cudnn.deterministic, cudnn.benchmark, mode, fills, os.environ.get(VARIABLE))


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of cuBLAS before the test."""
    monkeypatch.delenv(VARIABLE, raising=False)


class DeviceNeeded(Exception):
    """The command has come to its first use of the device."""


def needs_device(*_: object, **__: object) -> Any:
    raise DeviceNeeded


def start_run(data: Path, folder: Path, deterministic: str) -> None:
    building.build(configure(data, folder, precision="fp32", deterministic=deterministic), World.alone(CUDA))


def start_evaluation(data: Path, folder: Path, deterministic: str) -> None:
    run = configure(data, folder, precision="fp32", deterministic=deterministic)
    saved = SimpleNamespace(config=run, task="classification", classes=("ant", "bee", "cat"), network=needs_device)
    evaluate.evaluate_checkpoint(evaluate.as_run(run), saved, World.alone(CUDA))  # type: ignore[arg-type]


def start_prediction(data: Path, folder: Path, deterministic: str) -> None:
    run = configure(data, folder, precision="fp32", deterministic=deterministic)
    saved = SimpleNamespace(config=run, classes=("ant", "bee", "cat"), network=needs_device)
    next(predict.predict(saved, ["a.jpg"], predict.as_run(run), World.alone(CUDA)))  # type: ignore[arg-type]


def start_cost(data: Path, folder: Path, deterministic: str) -> None:
    cost.measure(cost.CostConfig(networks=("resnet8d",), image_size=32, precision="fp32"), World.alone(CUDA))


@pytest.mark.parametrize(
    ("start", "deterministic", "wanted"),
    [
        (start_run, "on", ON),
        (start_run, "off", OFF),
        # a number that is compared with others has one order, whatever the run had
        (start_evaluation, "off", ON),
        (start_prediction, "off", ON),
        (start_cost, "on", ON),
    ],
)
def test_every_command_that_computes_on_a_gpu_asks_before_its_first_use(
    start: Callable[[Path, Path, str], None],
    deterministic: str,
    wanted: Flags,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(building, "find_state", needs_device)
    monkeypatch.setattr(building, "check_triton", lambda _: None)  # tests/test_triton_build.py
    monkeypatch.setattr(cost, "count", needs_device)
    with pytest.raises(DeviceNeeded):
        start(tiny_data, tmp_path / "run", deterministic)
    assert flags() == wanted


@pytest.mark.parametrize("on", [True, False])
def test_inductor_is_told_where_a_run_compiles(on: bool) -> None:
    import torch._inductor.config as inductor

    before = inductor.deterministic
    try:
        inductor.deterministic = not on
        ask_for_one_order(CUDA, on=on)
        assert inductor.deterministic == (not on), "not touched by a run that does not compile"
        ask_for_one_order(CUDA, on=on, compiled=True)
        assert inductor.deterministic == on
        assert flags() == (ON if on else OFF)
    finally:
        inductor.deterministic = before


def test_a_process_on_the_cpu_keeps_torchs_settings() -> None:
    before = flags()
    for on in (True, False):
        ask_for_one_order(torch.device("cpu"), on=on, compiled=True)
        assert flags() == before


def test_a_users_own_setting_of_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    ask_for_one_order(CUDA, on=True)
    assert flags() == ON._replace(workspace=":16:8")


def test_an_operator_without_a_deterministic_algorithm_is_named_and_ends_no_run() -> None:
    """torch's own guard, by one of the few operators that have none on a CPU either."""
    ask_for_one_order(CUDA, on=True)
    pooled, where = torch.nn.functional.max_pool2d(torch.ones(1, 1, 2, 2), 2, return_indices=True)
    with pytest.warns(UserWarning, match="max_unpooling2d_forward_out does not have a deterministic implementation"):
        assert torch.nn.functional.max_unpool2d(pooled, where, 2).sum() == 1
