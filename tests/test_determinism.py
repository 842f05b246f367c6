"""--deterministic: the algorithms that a process on a GPU asks for, read back here, where torch has the flags and no GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttricks.commands import cost, evaluate, predict
from fasttricks.config import ModelConfig, TrainConfig
from fasttricks.models import build_model
from fasttricks.runs.saved import Saved
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
    evaluate.evaluate_checkpoint(evaluate.as_run(run), saved_by(run), World.alone(CUDA))


def start_prediction(data: Path, folder: Path, deterministic: str) -> None:
    run = configure(data, folder, precision="fp32", deterministic=deterministic)
    next(predict.predict(saved_by(run), ["a.jpg"], predict.as_run(run), World.alone(CUDA)))


def saved_by(run: TrainConfig) -> Saved:
    """A checkpoint of that run, without its weights."""
    about: dict[str, Any] = {"task": run.task, "classes": ("ant", "bee", "cat"), "step": 1, "epoch": 1, "ranks": 1}
    return Saved(path=Path(run.run_dir), config=run, weights={}, average=None, **about)


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
    monkeypatch.setattr(Saved, "network", needs_device)
    with pytest.raises(DeviceNeeded):
        start(tiny_data, tmp_path / "run", deterministic)
    assert flags() == wanted


def test_a_process_on_the_cpu_keeps_torchs_settings() -> None:
    before = flags()
    for on in (True, False):
        ask_for_one_order(torch.device("cpu"), on=on, compiled=True)
        assert flags() == before


def test_a_users_own_setting_of_cublas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    ask_for_one_order(CUDA, on=True)
    assert flags() == ON._replace(workspace=":16:8")


UNORDERED = re.compile(
    r"(_?adaptive_avg_pool[23]d|adaptive_max_pool2d|avg_pool3d|fractional_max_pool[23]d|upsample_\w+|reflection_pad[123]d"
    r"|grid_sampler_[23]d|_ctc_loss)_backward|max_unpool[23]d|nll_loss2d_forward|put_|histc|bincount|median|scatter_reduce"
    r"|_embedding_bag"
)
"""aten's names of the operators that torch.use_deterministic_algorithms() lists as without a deterministic algorithm on CUDA."""


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def unordered(model: nn.Module, side: int) -> set[str]:
    """The operators of a training step of `model` that are on the list, counted on tensors without data."""
    with torch.device("meta"), Operators() as run:
        out = model(torch.empty(2, 3, side, side))
        sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    assert run.names >= {"convolution", "convolution_backward"}
    return {name for name in run.names if UNORDERED.fullmatch(name)}


@pytest.mark.parametrize(
    ("config", "side"),
    [
        (ModelConfig(name="resnet18a"), 64),
        (ModelConfig(name="resnet50d"), 64),
        pytest.param(ModelConfig(name="inception_v3", aux_head=True), 299, marks=pytest.mark.slow),
        (ModelConfig(name="mobilenet_v1"), 64),
        (ModelConfig(name="cifarnet", whitening=True, identity_init=True), 32),
    ],
)
def test_the_projects_networks_have_no_operator_without_a_deterministic_algorithm(
    config: ModelConfig, side: int
) -> None:
    with torch.device("meta"):
        model = build_model(config, 10)
    assert unordered(model, side) == set()


def test_such_an_operator_would_be_found() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2))
    assert unordered(model, 8) == {"_adaptive_avg_pool2d_backward"}


def test_an_operator_without_a_deterministic_algorithm_is_named_and_ends_no_run() -> None:
    """torch's own guard, by one of the few operators that have none on a CPU either."""
    ask_for_one_order(CUDA, on=True)
    pooled, where = torch.nn.functional.max_pool2d(torch.ones(1, 1, 2, 2), 2, return_indices=True)
    with pytest.warns(UserWarning, match="max_unpooling2d_forward_out does not have a deterministic implementation"):
        assert torch.nn.functional.max_unpool2d(pooled, where, 2).sum() == 1
