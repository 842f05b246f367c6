"""python -m bench.parts: a step with timers is the plain step, its FLOPs are the footprint's, and a slow part is found."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import parts
from bench.stopwatch import Stopwatch
from fasttricks.config import TrainConfig, replace_at
from fasttricks.config.recipes import RECIPES
from fasttricks.data.pipeline.shards import Shards
from fasttricks.planning.footprint import footprint
from fasttricks.trainer import train_step

SIZE = 16


def tiny(norm: str = "auto") -> TrainConfig:
    config = replace_at(RECIPES["cifar10"](), "global_batch_size", 4)
    config = replace(config, data=replace(config.data, image_size=SIZE, val_resize=SIZE))
    return replace_at(replace_at(config, "model.width", 1 / 8), "model.norm", norm)


@pytest.mark.parametrize("norm", ["auto", "torch"])
def test_a_step_with_timers_is_the_plain_step(norm: str) -> None:
    weights = []
    for timed in (False, True):
        torch.manual_seed(3)
        model, learner, batch = parts.training(tiny(norm), 10, SIZE)
        if timed:
            watch, flops = Stopwatch(), dict.fromkeys(parts.PARTS, 0)
            with parts.watched(model, learner, watch, flops), watch.part(parts.REST):
                train_step(learner, [batch])
            assert set(watch.seconds) <= set(parts.PARTS)
            assert watch.seconds[f"{parts.NORM}, backward"] > 0
        else:
            train_step(learner, [batch])
        train_step(learner, [batch])  # nothing of the timers is left
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_the_convolutions_flops_are_the_footprints(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    monkeypatch.setattr(parts, "matrix_rate", lambda clock: 1e11)
    _, flops, _, _ = parts.measure(config, 10, SIZE, 1, time.process_time)
    shards = Shards(num_images=400, batch_size=4, world_size=1, source="random")
    classifier = parts.training(config, 10, SIZE)[0].get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    of_classifier = 3 * 2 * 4 * classifier.weight.numel()
    assert sum(flops.values()) == footprint(config, shards, 10).flops - of_classifier


def test_the_rate_is_of_four_products() -> None:
    ticks = iter([1.0, 3.0])
    assert parts.matrix_rate(lambda: next(ticks), side=8) == 4 * 2 * 8**3 / 2


def test_a_slow_part_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Twenty milliseconds in each of the pools' forward passes are theirs, and nobody else's; by medians."""
    pool = nn.AvgPool2d.forward

    def slow(self: nn.AvgPool2d, x: torch.Tensor) -> torch.Tensor:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        return pool(self, x)

    def ms() -> dict[str, float]:
        parts.main()
        lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
        return {
            line[0].removeprefix("| "): float(line[1]) for line in lines if line[0].removeprefix("| ") in parts.PARTS
        }

    arguments = ["parts", "cifar10", "--batch-size", "2", "--image-size", "16", "--turns", "3", "--clock", "cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(parts, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(parts, "matrix_rate", lambda clock: 1e11)  # which takes longer than the steps
    before = ms()
    assert list(before) == list(parts.PARTS)
    monkeypatch.setattr(nn.AvgPool2d, "forward", slow)
    after = ms()
    assert {part for part in before if after[part] - before[part] > 15} == {f"{parts.POOL}, forward"}


def test_a_padding_it_does_not_know_is_refused() -> None:
    model, learner, batch = parts.training(tiny(), 10, SIZE)
    next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).padding_mode = "reflect"
    with parts.watched(model, learner, Stopwatch(), {}), pytest.raises(NotImplementedError, match="padding of zeros"):
        train_step(learner, [batch])
