"""python -m fasttricks.cost: counts against the networks' own, times by turns, the table and the plot."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fasttricks.commands import cost
from fasttricks.commands.cost import Cost, CostConfig, count, ratio, table, time_by_turns
from fasttricks.config import ConfigError
from fasttricks.models import MODELS
from lib.networks import multiply_adds, on_meta
from lib.tables import mostly_slow
from lib.tiny import ALONE, call

SMALL = ["--networks", "resnet8a", "resnet8d", "--image-size", "32", "--batch-size", "2", "--device", "cpu"]


@pytest.mark.parametrize("name", mostly_slow(["resnet8d", "resnet18a", "mobilenet_v1"], "resnet8d"))
def test_counts_are_those_of_the_network_at_its_own_size(name: str) -> None:
    found, model = count(name, CostConfig(batch_size=1), "fp32"), on_meta(MODELS[name])
    assert found.image_size == 224
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.multiply_adds == multiply_adds(model.eval(), 224)
    assert found.parameter_bytes == 4 * found.num_parameters
    assert found.peak_bytes > found.activation_bytes + 2 * found.parameter_bytes  # momentum too
    assert cost.training("inception_v3", CostConfig(), "fp32").data.image_size == 299


def test_activations_grow_with_the_batch_and_parameters_do_not() -> None:
    one, two = (count("resnet8d", CostConfig(batch_size=n, image_size=64), "fp32") for n in (2, 4))
    assert two.parameter_bytes == one.parameter_bytes
    assert 1.8 * one.activation_bytes < two.activation_bytes < 2.2 * one.activation_bytes


def test_a_teacher_adds_its_forward_pass_and_its_weights() -> None:
    config = CostConfig(batch_size=2, image_size=64)
    alone, teacher, both = (count(name, config, "fp32") for name in ("resnet8d", "resnet10d", "resnet8d+resnet10d"))
    assert both.multiply_adds == alone.multiply_adds + teacher.multiply_adds
    assert both.num_parameters == alone.num_parameters
    assert both.peak_bytes >= alone.peak_bytes + teacher.parameter_bytes // 2  # in FP16


def test_steps_run_by_turns_and_the_first_two_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def step(name: str, seconds: list[float]) -> Any:
        def run() -> None:
            order.append(name)
            clock[0] += seconds[order.count(name) - 1]

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    a, b = time_by_turns([step("a", [9, 9, 1, 2, 3]), step("b", [9, 9, 2, 5, 3])], rounds=3)
    assert order == ["a", "b"] * 5
    assert (a, b) == ((1, 2, 3), (2, 5, 3))
    first, second = (dataclasses.replace(row, seconds=s) for row, s in zip(rows("a", "b"), (a, b), strict=True))
    assert ratio(second, first) == (2.0, 1.0, 2.5)
    assert "| 2.00 (1.00 to 2.50) |" in table([first, second], CostConfig(batch_size=8))
    assert "| 3000 | 2.7 |" in table([first, second], CostConfig(batch_size=8))


def test_the_step_that_is_timed_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CostConfig(networks=("resnet8d+resnet10d",), image_size=32, batch_size=2)
    seen: list[Any] = []
    train_step = cost_train_step()
    monkeypatch.setattr(
        "fasttricks.trainer.train_step", lambda run, batches: seen.append(run) or train_step(run, batches)
    )
    step = cost.make_step("resnet8d+resnet10d", config, "fp32", ALONE)
    step()
    (run,) = seen
    assert run.step == 1 and run.teacher.name == "resnet10d"
    before = run.model.fc.weight.clone()
    step()
    assert not torch.equal(before, run.model.fc.weight)


def cost_train_step() -> Any:
    from fasttricks.trainer import train_step

    return train_step


def test_table_and_plot_are_written_and_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cost"
    args = [*SMALL, "--rounds", "3", "--output", str(output)]
    assert call(cost.main, *args) == 0
    shown = capsys.readouterr().out
    assert (tmp_path / "cost.md").read_text() == shown
    assert re.search(r"^\| resnet8a \| 32 \|.* 1\.00 \(1\.00 to 1\.00\) \|$", shown, re.MULTILINE)
    assert "batch 2, fp32, 1000 classes" in shown
    with Image.open(tmp_path / "cost.png") as image:
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    assert call(cost.main, *args) == 2
    assert "cost.md already exists and is never overwritten" in capsys.readouterr().err


def rows(*names: str) -> list[Cost]:
    blank = {"image_size": 1, "num_parameters": 1, "multiply_adds": 1, "parameter_bytes": 1, "activation_bytes": 1}
    return [Cost(name=name, peak_bytes=1, **blank) for name in names]


def test_the_papers_point_stands_beside_resnet50d_only() -> None:
    config, paper = (
        CostConfig(rounds=0),
        "The paper, of resnet50d on V100s: 1.13 x the FLOPs of resnet50a in 1.03 x its time.",
    )
    text = cost.report(rows("resnet50a", "resnet50d"), config, ALONE)
    assert paper in text
    assert "nothing was timed" in text
    for others in (("resnet8a", "resnet8d"), ("resnet50b", "resnet50d"), ("resnet50a", "resnet50c")):
        assert "The paper" not in cost.report(rows(*others), config, ALONE)


@pytest.mark.parametrize(
    "wrong", [{"networks": ()}, {"networks": ("a", "a")}, {"batch_size": 0}, {"image_size": -1}, {"rounds": -1}]
)
def test_a_field_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(wrong))} = "):
        CostConfig(**wrong)


def test_an_unknown_network_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cost.main, "--networks", "resnet50", "--rounds", "0") == 2
    assert "needs its variant: resnet50b" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_to_is_refused_before_the_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(cost, "measure", lambda *_: pytest.fail("measured first"))
    assert call(cost.main, *SMALL, "--rounds", "3", "--output", str(tmp_path / "file" / "costs")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'file'}")
