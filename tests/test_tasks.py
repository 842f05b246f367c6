"""The seam between trainer and task: a Task of its own batches and metric trains, validates, saves, resumes and is counted."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from PIL import Image

from fasttricks.commands.evaluate import EvaluateConfig, evaluate_checkpoint
from fasttricks.config import ConfigError
from fasttricks.config.schema import TaskName
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Task
from fasttricks.planning.footprint import footprint
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.saved import read_saved
from fasttricks.tasks import TASKS
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.forked import on_ranks
from lib.layouts import write_sets
from lib.runs import final_state, interrupt, records
from lib.states import same
from lib.tiny import ALONE, DETECTING, REPOSITORY, SEGMENT, configure
from lib.toy import Redness, train

pytestmark = pytest.mark.usefixtures("no_curves")

OPTIONS = shlex.split("--ema-decay 0.9 --checkpoint-steps 1 --log-steps 2 --optim.base-lr 0.02 --loss.smoothing 0")


@pytest.fixture(scope="module")
def two_ranks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one epoch on two ranks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    on_ranks(2, train, folder, tiny_data, *OPTIONS, "--epochs", "1")
    return folder


def test_two_ranks_train_validate_and_report_the_tasks_own_metric(two_ranks: Path) -> None:
    summary = json.loads((two_ranks / "summary.json").read_text())
    lines = [json.loads(line) for line in (two_ranks / "metrics.jsonl").read_text().splitlines()]
    (validated,) = [line for line in lines if "val_loss" in line]
    assert summary["explained"] == validated["explained"] != 0
    assert summary["ranks"] == 2 and summary["val_images"] == 14
    assert not {"top1", "top2", "top5"} & (summary.keys() | validated.keys())
    with Image.open(two_ranks / "curves.png") as curves:
        assert curves.size == (1440, 432)


def test_what_two_ranks_saved_is_what_one_measures(two_ranks: Path, tiny_data: Path) -> None:
    """All ranks saw each validation image once: the metric of the saved average is that of the summary."""
    state, task = load_checkpoint(two_ranks), Redness()
    run = build(configure(tiny_data, two_ranks.parent / "other", *OPTIONS, "--epochs", "1"), ALONE, task=task)
    run.average.model.load_state_dict(state["average"])  # type: ignore[union-attr]
    found = task.evaluate(run.average.model, run.val_loader, ALONE, run.config, run.autocast)  # type: ignore[union-attr]
    assert found["explained"] == pytest.approx(
        json.loads((two_ranks / "summary.json").read_text())["explained"], rel=1e-6
    )
    assert state["task"] == "redness" and state["model"]["fc.bias"].shape == (1,)


def test_a_run_of_it_goes_on_bit_for_bit(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(folder: str, **changes: Any) -> Any:
        return build(configure(tiny_data, tmp_path / folder, *OPTIONS, **changes), ALONE, task=Redness())

    whole = begin("whole")
    fit(whole)
    interrupt(begin("parts"), monkeypatch, at_step=4)  # within the second epoch
    resumed = begin("parts", resume=True)
    assert resumed.step == 4
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)
    assert [record["epoch"] for record in records(whole) if "explained" in record] == [1, 2]


@pytest.mark.slow
def test_a_step_of_it_is_counted_on_paper(tiny_data: Path, tmp_path: Path) -> None:
    config = configure(tiny_data, tmp_path / "run", "--precision", "fp32")
    shards = Shards(num_images=64, batch_size=16, world_size=1, source="")
    ours, known = footprint(config, shards, 3, task=Redness()), footprint(config, shards, 3)
    features = 32  # of the classifier's input at this width
    assert known.num_parameters - ours.num_parameters == 2 * (features + 1)
    assert ours.at_peak["input"] == 16 * (3 * 32 * 32 * 4 + 4)  # redness is a float, a label is twice that
    assert known.at_peak["input"] == 16 * (3 * 32 * 32 * 4 + 8)


def test_a_checkpoint_of_it_is_refused_by_name(two_ranks: Path, tiny_data: Path, tmp_path: Path) -> None:
    """By what knows classification alone, and by a run of another task in its folder."""
    with pytest.raises(ConfigError, match="task = 'redness': this release knows classification"):
        evaluate_checkpoint(EvaluateConfig(), read_saved(two_ranks), ALONE)
    folder = tmp_path / "run"
    fit(build(configure(tiny_data, folder, *OPTIONS, "--epochs", "1"), ALONE, task=Redness()))
    with pytest.raises(ConfigError, match="changed: task: 'redness' -> 'classification'"):
        build(configure(tiny_data, folder, *OPTIONS, "--epochs", "1", resume=True), ALONE)


def test_the_tasks_that_a_config_may_name_are_there() -> None:
    assert tuple(TASKS) == get_args(TaskName)


@pytest.mark.parametrize("task", [*TASKS.values(), Redness()], ids=lambda task: task.name)
def test_every_task_has_examples_that_its_loss_takes(
    task: Task, tiny_data: Path, tiny_masks: Path, tiny_boxes: Path, tmp_path: Path
) -> None:
    """The size checks, the plan and the timings rest on them. Its metrics are those that evaluate() gives."""
    table = str(write_sets(tiny_data, tmp_path / "sets.csv", ("ant;bee", "cat")))
    options = {
        "multilabel": ["--task", "multilabel", "--data.labels", table, "--data.label-separator", ";"],
        "segmentation": [*SEGMENT, "--data.root", str(tiny_masks)],
        "detection": [*DETECTING, "--data.root", str(tiny_boxes)],
    }
    run = build(configure(tiny_data, tmp_path / "run", *options.get(task.name, [])), ALONE, task=task)
    batch = task.example(run.config, 5, 3, device=torch.device("cpu"), dtype=torch.float32)
    loss, images = task.loss(run, batch, lam=1.0)
    parts = len(task.facts.loss_parts)
    assert loss.shape == ((parts,) if parts else ()) and loss.requires_grad and images == 5
    found = task.evaluate(run.model, run.val_loader, ALONE, run.config, run.autocast)
    losses = set() if task.name == "detection" else {"val_loss"}
    assert {metric.name for metric in run.metrics} | losses | {"val_images"} == found.keys()


def test_the_config_names_the_task_that_is_built_and_counted(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tiny_data, tmp_path / "run", "--precision", "fp32")
    shards = Shards(num_images=64, batch_size=16, world_size=1, source="")
    known = footprint(config, shards, 3)
    monkeypatch.setitem(TASKS, config.task, ours := Redness())
    assert build(config, ALONE).task is ours
    assert footprint(config, shards, 3) == footprint(config, shards, 3, task=ours) != known
    monkeypatch.delitem(TASKS, config.task)
    with pytest.raises(ConfigError, match="task = 'classification': this release knows"):
        build(config, ALONE)


def test_the_headline_metrics_stand_in_one_place() -> None:
    """No module but classification says top1, and no other spells a top-k: it asks the task, of so many classes.

    The paper's tables and the recipes' expected accuracy are figures of ImageNet and CIFAR-10.
    """
    command = [
        "grep",
        "-rlE",
        "--include=*.py",
        "--include=*.html",
        r"top[0-9]|top-[2-9]",
        str(REPOSITORY / "fasttricks"),
    ]
    found = subprocess.run(command, capture_output=True, text=True).stdout.split()
    known = {"ablation/paper.py", "config/expected.py"}
    assert {str(Path(name).relative_to(REPOSITORY / "fasttricks")) for name in found} == known
