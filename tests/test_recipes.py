"""The paper's recipes, field by field, against a table typed from the paper; the others build and hold together."""

from __future__ import annotations

import dataclasses
import inspect
import json
import runpy
from collections.abc import Iterator
from typing import Any

import pytest

from fasttricks.ablation.paper import PAPER_TABLES
from fasttricks.config import ConfigError, TrainConfig
from fasttricks.config.expected import EXPECTED
from fasttricks.config.recipes import RECIPES, find_recipe, summary
from fasttricks.models import MODELS, build_model
from lib.tiny import REPOSITORY

# From the paper, sections 2 to 5, in its words on the left. Everything that it does not set is in UNSET.
BASELINE: dict[str, Any] = {
    # section 2, preprocessing
    "data.image_size": 224,
    "data.val_resize": 256,
    "data.area": (0.08, 1.0),
    "data.aspect": (3 / 4, 4 / 3),
    "data.flip": 0.5,
    "data.color": "paper",
    "data.color_jitter": 0.4,  # U[0.6, 1.4]
    "data.pca_noise": 0.1,
    "data.alternate_flip": False,
    "data.fixed_augmentation": False,
    "data.balance": 0.0,
    "loss.class_weights": "",
    "data.interpolation": "linear",
    "data.antialias": True,
    "data.mean": (123.68, 116.779, 103.939),
    "data.std": (58.393, 57.12, 57.375),
    # section 2, network and update
    "model.name": "resnet50a",
    "model.stem_stride": 4,
    "model.width": 1.0,
    "model.freeze": (),
    "model.norm": "auto",
    "model.zero_gamma": False,
    "model.whitening": False,
    "model.identity_init": False,
    "model.aux_head": False,
    "epochs": 120,
    "global_batch_size": 256,
    "optim.base_lr": 0.1,
    "optim.linear_scaling": False,
    "optim.momentum": 0.9,
    "optim.weight_decay": 1e-4,
    "optim.bias_decay": True,
    "schedule.decay": "step",
    "schedule.step_epochs": (30, 60, 90),
    "schedule.step_factor": 0.1,
    "schedule.warmup_epochs": 0,
    "precision": "fp32",
    "loss.smoothing": 0.0,
    "loss.smoothing_over": "others",
    "loss.mixup_alpha": 0.0,
    "distill.teacher": "",
    "distill.trust_code": "",
    "distill.temperature": 20.0,
    "distill.hard_weight": 1.0,
    "distill.soft_weight": 1.0,
    "ema_decay": 0.0,
    "eval.flip": False,
    "eval.patience": 0,
    "sync_batch_norm": False,
}
EFFICIENT = BASELINE | {  # section 3
    "global_batch_size": 1024,
    "optim.linear_scaling": True,
    "schedule.warmup_epochs": 5,
    "model.zero_gamma": True,
    "optim.bias_decay": False,
    "precision": "auto",
}
TRICKS = EFFICIENT | {  # sections 4 and 5
    "model.name": "resnet50d",
    "schedule.decay": "cosine",
    "loss.smoothing": 0.1,
    "loss.smoothing_over": "others",
    "loss.mixup_alpha": 0.2,
    "epochs": 200,
}
# The paper trains the other two networks as it trains the ResNet; they have no residual blocks, so no zero gamma.
INCEPTION = {"model.name": "inception_v3", "data.image_size": 299, "data.val_resize": 342, "model.zero_gamma": False}
MOBILENET = {"model.name": "mobilenet_v1", "model.zero_gamma": False}
UNSET: dict[str, Any] = {  # how to run it, which is no part of the paper
    "init": "",
    "accumulate": 1,
    "device": "auto",
    "compile": "off",
    "compile_fallback": False,
    "cuda_graph": False,
    "cuda_graph_ranks": False,
    "optim.backbone_lr": 1.0,
    "optim.bias_lr": 1.0,
    "optim.backend": "auto",
    "optim.loss_scale": 0.0,
    "optim.loss_scale_steps": 2000,
    "seed": 0,
    "checkpoint_epochs": 1,
    "log_steps": 20,
    "loggers": (),
    "checkpoint_steps": 0,
    "allow_other_ranks": False,
    "allow_other_versions": False,
    "on_bad_loss": "stop",
    "max_loss": 100.0,
    "timeout_s": 600,
    "data.operators": "auto",
    "data.max_bad": 0.05,
    "data.max_pixels": 100000000,
    "profile": False,
    "deterministic": "on",
    "schedule.first_size": 1.0,
    "schedule.size_steps": 3,
    "schedule.full_size_at": 0.75,
    "schedule.poly_power": 0.9,
    "segment.base_size": 520,
    "segment.base_side": "short",
    "segment.scale": (0.5, 2.0),
    "segment.blur": 0.5,
    "segment.output_stride": 8,
    "segment.aux_weight": 0.4,
    "segment.test_scales": (),
    "detect.base_size": 600,
    "detect.max_size": 1000,
    "detect.channels": 256,
    "detect.head_features": 1024,
    "detect.anchor_scales": (8.0,),
    "detect.anchor_ratios": (0.5, 1.0, 2.0),
    "detect.train_proposals": 2000,
    "detect.test_proposals": 1000,
    "detect.train_samples": 512,
    "detect.score_threshold": 1e-4,
    "detect.nms_threshold": 0.3,
    "detect.most_detections": 100,
    "detect.average": "voc07",
    "run_dir": "",
    "resume": False,
    "data.root": "",
    "task": "classification",
    "data.labels": "",
    "data.label_separator": "",
    "data.class_order": "codepoint",
    "data.nested": "error",
    "data.val_share": 0.0,
    "data.limit_per_class": 0,
    "data.threads": 0,
    "data.readers": 24,
    "data.prefetch": 2,
    "model.num_classes": 0,
    "loss.aux_weight": 0.4,
    "distill.cache": "",
    "distill.digest": "",
    "eval.every_epochs": 1,
    "eval.batch_size": 0,
    "tricks.on": (),
    "tricks.off": (),
}
PAPER = {
    "resnet50-baseline": (BASELINE, 0.1),
    "resnet50-efficient": (EFFICIENT, 0.4),
    "resnet50d-tricks": (TRICKS, 0.4),
    "resnet152d-teacher": (TRICKS | {"model.name": "resnet152d"}, 0.4),
    "resnet50d-tricks-distill": (TRICKS | {"distill.teacher": "runs/resnet152d-teacher"}, 0.4),
    "inceptionv3-baseline": (BASELINE | INCEPTION, 0.1),
    "inceptionv3-efficient": (EFFICIENT | INCEPTION, 0.4),
    "inceptionv3-tricks": (TRICKS | INCEPTION, 0.4),
    "mobilenet-baseline": (BASELINE | MOBILENET, 0.1),
    "mobilenet-efficient": (EFFICIENT | MOBILENET, 0.4),
    "mobilenet-tricks": (TRICKS | MOBILENET, 0.4),
    "places365": (TRICKS, 0.4),
}


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("name", PAPER)
def test_recipe_is_the_papers_field_by_field(name: str) -> None:
    table, peak_lr = PAPER[name]
    config = RECIPES[name]()
    assert dict(flatten(dataclasses.asdict(config))) == {"recipe": name} | table | UNSET
    assert config.peak_lr == pytest.approx(peak_lr, rel=1e-15)


def test_the_recipes_are_these() -> None:
    of_data = ["demo", "cifar10", "cifar10-fast", "cifar10-ablate", "cifar10-teacher", "cifar10-distill"]
    assert list(RECIPES) == [*of_data, *PAPER, "finetune", "segment-ade20k", "detect-voc"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds(name: str) -> None:
    config = RECIPES[name]()
    assert isinstance(config, TrainConfig)
    assert config.recipe == name
    assert config == RECIPES[name]()
    assert config.model.name in MODELS
    model = build_model(dataclasses.replace(config.model, width=config.model.width / 16), 7)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert config.peak_lr < 1
    assert config.micro_batch_size(8) * 8 == config.global_batch_size


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_says_source_and_command(name: str) -> None:
    text = inspect.getdoc(RECIPES[name]) or ""
    assert summary(name) == text.splitlines()[0]
    assert len(summary(name)) <= 120
    command = text.split("Command: ")[1]
    if name == "cifar10-ablate":
        assert f"fasttricks.ablate table4 table5 table6 {name} " in command
    else:
        assert f"fasttricks.train {name} " in command or (name, command) == ("demo", "make train.")
    assert "Source: " in text


MIXUP, BOTH = "+ mixup, no distillation", "+ distillation and mixup"
PRINTED = {  # recipe -> table, row and column of the paper
    "resnet50-baseline": ("table3", "baseline: small batch, fp32", "ResNet-50"),
    "resnet50-efficient": ("table3", "efficient: large batch, its tricks", "ResNet-50"),
    "resnet50d-tricks": ("table6", MIXUP, "ResNet-D (the paper: ResNet-50-D)"),
    "resnet50d-tricks-distill": ("table6", BOTH, "ResNet-D (the paper: ResNet-50-D)"),
    "inceptionv3-baseline": ("table3", "baseline: small batch, fp32", "Inception-V3"),
    "inceptionv3-efficient": ("table3", "efficient: large batch, its tricks", "Inception-V3"),
    "inceptionv3-tricks": ("table6", MIXUP, "Inception-V3"),
    "mobilenet-baseline": ("table3", "baseline: small batch, fp32", "MobileNet"),
    "mobilenet-efficient": ("table3", "efficient: large batch, its tricks", "MobileNet"),
    "mobilenet-tricks": ("table6", MIXUP, "MobileNet"),
}


@pytest.mark.parametrize("name", PRINTED)
def test_the_expected_accuracy_is_that_of_the_papers_table(name: str) -> None:
    """The ablations have the paper's figures too, and a recipe cannot import them."""
    table, *place = PRINTED[name]
    (figure,) = [cell.paper for cell in PAPER_TABLES[table]().cells if [cell.row, cell.column] == place]
    expected = EXPECTED[name]
    assert figure is not None
    assert figure.values == {"top1": expected.top1, "top5": expected.top5}
    assert (expected.source == "recalled") == (figure.marks["top1"] == "M")
    assert figure.time.partition(" min")[0] in (expected.time.partition(" min")[0], "")


def test_every_recipe_has_an_expected_accuracy_or_the_reason_why_not() -> None:
    assert list(EXPECTED) == list(RECIPES)
    assert {*PRINTED, "resnet152d-teacher", "places365"} == set(PAPER), "of the paper's recipes, all that it printed"
    assert all(expected.top1 or expected.note for expected in EXPECTED.values())


def test_cifar10_fasts_figure_is_the_mean_of_its_runs() -> None:
    """Their summaries are committed. A recipe of other epochs would need runs of its own."""
    recipe, folder = RECIPES["cifar10-fast"](), REPOSITORY / "bench" / "results" / "cifar10-fast"
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("seed-*/summary.json"))]
    assert runs
    scores = [run["top1"] for run in runs]
    assert EXPECTED["cifar10-fast"].top1 == pytest.approx(sum(scores) / len(scores), abs=0.005)
    for run in runs:
        assert (run["recipe"], run["epochs"], run["val_images"]) == ("cifar10-fast", recipe.epochs, 10_000)
        assert run["train_seconds"] <= 1_200, "the recipe is for 20 minutes"


def test_the_page_of_recipes_is_made_from_them() -> None:
    made = runpy.run_path(str(REPOSITORY / "docs" / "recipes_page.py"))
    assert made["PAGE"].read_text() == made["page"](), "run: make recipes"


def test_a_misspelt_recipe_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"recipe = 'resnet50d-trick': unknown; did you mean 'resnet50d-tricks'\?"):
        find_recipe("resnet50d-trick")
