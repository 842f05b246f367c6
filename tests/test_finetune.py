"""The recipe finetune, fitted to the images and to the weights that it starts from, by command, API and plan alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import fasttricks as ft
from bench.finetune import OUTPUT, SEEDS, WAYS, others, table
from fasttricks.commands import train
from fasttricks.config import TrainConfig, UserError
from fasttricks.config.cli import arguments_of, parse_recipe
from fasttricks.config.recipes import FITTED, FITTED_FIELDS, finetune
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.folder import read_config
from lib.tiny import REPOSITORY, SHRINK, FinishedRun, call

MIXUP = "--loss.mixup-alpha 0.2"


def parse(*args: str) -> TrainConfig:
    return parse_recipe(["finetune", *args], prog="test", fit=fit_recipe)


@pytest.mark.parametrize(
    ("images", "epochs", "batch", "mixup"),
    [
        (50, 50, 16, 0.0),
        (250, 50, 16, 0.0),
        (1000, 28, 64, 0.0),
        (2500, 18, 64, 0.0),
        (25_000, 8, 64, 0.0),
        (100_000, 8, 64, 0.2),
    ],
)
def test_it_is_fitted_to_the_number_of_images(images: int, epochs: int, batch: int, mixup: float) -> None:
    config = finetune(images)
    assert (config.epochs, config.global_batch_size, config.loss.mixup_alpha) == (epochs, batch, mixup)


def test_every_field_that_depends_on_the_images_is_listed() -> None:
    for recipe in FITTED.values():
        made = [dataclasses.asdict(recipe(images)) for images in (50, 500, 5000, 500_000)]
        for section in made[0]:
            inner = [one[section] if isinstance(one[section], dict) else {"": one[section]} for one in made]
            for name in inner[0]:
                if any(one[name] != inner[0][name] for one in inner):
                    assert f"{section}.{name}".strip(".") in FITTED_FIELDS


def test_the_folders_images_count_and_what_is_given_wins(tiny_data: Path) -> None:
    assert parse().epochs == finetune(1000).epochs
    fitted = parse("--data.root", str(tiny_data))
    assert (fitted.epochs, fitted.global_batch_size) == (50, 16)
    assert parse("--data.root", str(tiny_data), "--epochs", "28").epochs == 28, "the default's value was given"
    assert parse(f"--data.root={tiny_data}", "--global-batch-size", "8").global_batch_size == 8
    assert parse("--data.root", "/nowhere").epochs == finetune(1000).epochs  # for the checks of the run to say


@pytest.mark.parametrize(
    "change", [(), ("--epochs", "28"), ("--loss.mixup-alpha", "0.2"), ("--model.name", "resnet18b")]
)
def test_its_arguments_make_it_again(change: tuple[str, ...], tiny_data: Path) -> None:
    config = parse("--data.root", str(tiny_data), *change)
    assert parse_recipe(arguments_of(config), prog="test", fit=fit_recipe) == config
    assert parse_recipe(arguments_of(config), prog="test") == config


@pytest.mark.parametrize(
    ("init", "name", "size"),
    [
        ("timm:resnet50d.ra2_in1k", "resnet50d", 224),
        ("timm:resnet50.a1_in1k", "resnet50b", 224),
        ("torchvision:resnet18", "resnet18b", 224),
        ("torchvision:inception_v3", "inception_v3", 299),
        ("timm:convnext_tiny.fb_in1k", "timm:convnext_tiny", 224),
        ("torchvision:vgg11", "resnet50d", 224),
        ("gone.pth", "resnet50d", 224),
    ],
)
def test_the_network_is_that_of_the_weights(init: str, name: str, size: int) -> None:
    config = parse("--init", init)
    assert (config.model.name, config.data.image_size) == (name, size)
    assert parse("--init", init, "--model.name", "resnet34d").model.name == "resnet34d"


def test_command_and_api_train_from_a_run_with_its_network(
    finished_run: FinishedRun, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but data and run is named: network, image size, epochs and batch follow."""
    base, more = read_config(finished_run.folder), ["--data.threads", "1", "--device", "cpu", "--epochs", "1"]
    words = ["finetune", "--data.root", str(tiny_data), "--init", str(finished_run.folder)]
    assert call(train.main, *words, "--run-dir", str(tmp_path / "a"), "--schedule.warmup-epochs", "0", *more) == 0
    ours = read_config(tmp_path / "a")
    assert ours.model == base.model
    assert (ours.data.image_size, ours.global_batch_size) == (base.data.image_size, 16)
    assert "its classifier by class name: 3 of 3 classes" in capsys.readouterr().out
    fields: dict[str, Any] = {"epochs": 1, "device": "cpu", "schedule": {"warmup_epochs": 0}}
    data = {"root": str(tiny_data), "threads": 1}
    ft.train("finetune", data, init=str(finished_run.folder), run_dir=str(tmp_path / "b"), **fields)
    assert dataclasses.replace(read_config(tmp_path / "b"), run_dir="") == dataclasses.replace(ours, run_dir="")


def test_weights_of_another_network_name_the_option(tiny_data: Path, finished_run: FinishedRun, tmp_path: Path) -> None:
    words = ["--data.root", str(tiny_data), "--init", str(finished_run.folder), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match=r"give --model\.name resnet8d"):
        train.main(["finetune", *words, *SHRINK, "--model.name", "resnet10d"])
    assert not (tmp_path / "run").exists()


def test_the_page_has_the_tables_of_the_committed_runs() -> None:
    """Trained weights win in every pair of the same images, settings and seed, within three CPU minutes a run.

    Minutes of the machine that trained the first network in the file's time for it; others took longer for it and for each run.
    """
    runs = json.loads(OUTPUT.read_text())["runs"]
    page = (REPOSITORY / "docs" / "finetuning.md").read_text()
    for shown in (table(runs), table(runs, MIXUP), others(runs)):
        assert shown in page
    pairs = [
        (run, runs[key.replace(*WAYS)]) for key, run in runs.items() if WAYS[0] in key and key.replace(*WAYS) in runs
    ]
    assert len(pairs) >= 12
    fast = runs["base"]["cpu_seconds"]
    for trained, scratch in pairs:
        assert trained["top1"] > scratch["top1"] and trained["epochs"] == scratch["epochs"]
        for run in (trained, scratch):
            assert run["cpu_seconds"] * fast / run.get("base_cpu_seconds", fast) <= 180
    assert all(runs[f"50 {WAYS[0]} {seed}"]["top1"] > runs[f"50 {WAYS[1]} {seed}"]["top1"] for seed in SEEDS)
