"""The task segmentation: trained, resumed and evaluated by the trainer's own parts; what it has no use for is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from fasttricks.ablation.cells import extend
from fasttricks.ablation.tables import find_tables
from fasttricks.commands import evaluate as evaluation
from fasttricks.commands import export, predict
from fasttricks.commands.evaluate import EvaluateConfig, answer_checkpoint
from fasttricks.commands.train import next_commands
from fasttricks.config import ConfigError, DoesNotApplyError, TrainConfig, get_at, replace_at
from fasttricks.config.cli import arguments_of, parse_recipe
from fasttricks.config.recipes import RECIPES
from fasttricks.config.transfer import HAS
from fasttricks.config.tricks import TRICKS, applies, is_on
from fasttricks.data.masks.places import open_mask_split
from fasttricks.learning.learner import count_steps
from fasttricks.planning.planner import PlanConfig, find_data_size, make_plan
from fasttricks.reporting.examples import colors
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.saved import read_saved
from fasttricks.tasks.pixel_counts import PixelScores
from fasttricks.tasks.segmentation import SEGMENTATION
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.forked import on_ranks
from lib.runs import final_state, interrupt, records
from lib.segmented import arguments_for, config_for
from lib.states import same
from lib.tiny import ALONE, call

pytestmark = pytest.mark.usefixtures("no_curves")


def train_on_ranks(run_dir: Path, data: Path, *options: str) -> None:
    from fasttricks.commands import train

    train.main(arguments_for(data, run_dir, *options))


@pytest.fixture(scope="module")
def run_folder(segmented_run: Path) -> Path:
    return segmented_run


# ----------------------------------------------------------------------------------------------------------------- the run
def test_a_run_learns_and_says_its_metrics(run_folder: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    validated = [row for row in rows if "miou" in row]
    assert [row["epoch"] for row in validated] == [1, 2]
    assert {"miou", "pixel_accuracy", "val_loss"} < summary.keys() and summary["val_images"] == 5
    assert summary["best_miou"] == max(row["miou"] for row in validated)
    assert (run_folder / "curves.png").stat().st_size > 1000 and (run_folder / "checkpoints" / "best.pt").is_file()
    assert load_checkpoint(run_folder)["task"] == "segmentation"
    named = [line.split()[0] for line in next_commands("runs/x", "segmentation")]
    assert named[-4:] == ["evaluate", "predict", "export", "curves"]


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_within_an_epoch(
    tiny_masks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With EMA, micro-batches, dropout in the heads and random views."""

    def begin(folder: str, **changes: Any) -> Any:
        return build(config_for(tiny_masks, tmp_path / folder, "--accumulate", "2", **changes), ALONE)

    whole = begin("whole")
    fit(whole)
    interrupt(begin("parts"), monkeypatch, at_step=4)
    resumed = begin("parts", resume=True)
    assert resumed.step == 4 and resumed.step_in_epoch
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_and_micro_batches_train_alike(ranks: int, run_folder: Path, tiny_masks: Path, tmp_path: Path) -> None:
    """Their batch norms see other images, so alike is not the same; each validation image counts once."""
    batch = {2: "8", 3: "9"}[ranks]
    on_ranks(ranks, train_on_ranks, tmp_path / "run", tiny_masks, "--global-batch-size", batch, "--epochs", "1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["ranks"], summary["val_images"]) == (ranks, 5)
    state = load_checkpoint(tmp_path / "run")
    found = answer_checkpoint(
        evaluation.as_run(read_saved(tmp_path / "run").config), read_saved(tmp_path / "run"), ALONE
    )
    assert found.metrics["miou"] == summary["miou"] and state["step"] == summary["steps"] == 3
    assert found.metrics["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_lower_precisions_follow_float32(precision: str, tiny_masks: Path, tmp_path: Path) -> None:
    losses = {}
    for one in ("fp32", precision):
        run = build(config_for(tiny_masks, tmp_path / one, "--precision", one), ALONE)
        batch = next(iter(run.train_loader))
        loss, images = SEGMENTATION.loss(run, batch, lam=1.0)
        loss.backward()
        losses[one] = float(loss.detach() / images)
        gradient = run.model.classifier[4].weight.grad
        assert gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["fp32"] < 3


def test_batches_of_no_image_are_a_step_too(tiny_masks: Path, tmp_path: Path) -> None:
    """As a rank has them at the end of an epoch."""
    run = build(config_for(tiny_masks, tmp_path / "run"), ALONE)
    batch = SEGMENTATION.example(run.config, 0, 3, device=torch.device("cpu"), dtype=torch.float32)
    loss, images = SEGMENTATION.loss(run, batch, lam=1.0)
    loss.backward()
    assert (float(loss.detach()), images) == (0.0, 0)


# ------------------------------------------------------------------------------------------------------------- evaluation
def test_the_scores_are_those_of_a_plain_loop(run_folder: Path, tiny_masks: Path) -> None:
    """Counted image by image in numpy, of logits that torch resizes."""
    saved = read_saved(run_folder)
    found = answer_checkpoint(evaluation.as_run(saved.config), saved, ALONE)
    model, confusion, losses = saved.network(), np.zeros((3, 3), int), []
    source = open_mask_split(saved.config.data, "val")
    for batch in SEGMENTATION.val_batches(saved.config, source, ALONE, batch_size=7, dtype=torch.float32):
        with torch.no_grad():
            logits = functional.interpolate(model(batch.images), size=batch.masks.shape[1:], mode="bilinear")
        truth, guess = batch.masks.numpy(), logits.argmax(1).numpy()
        np.add.at(confusion, (truth[truth < 255], guess[truth < 255]), 1)
        losses.append(functional.cross_entropy(logits.double(), batch.masks, ignore_index=255).item())
    right = np.diag(confusion)
    assert np.array_equal(found.answers.confusion, confusion)
    assert found.metrics["miou"] == pytest.approx(100 * np.mean(right / (confusion.sum(0) + confusion.sum(1) - right)))
    assert found.metrics["pixel_accuracy"] == pytest.approx(100 * right.sum() / confusion.sum())
    assert found.metrics["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert json.loads((run_folder / "summary.json").read_text())["miou"] == found.metrics["miou"]


def test_the_command_prints_and_writes_the_iou_of_each_class(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    assert call(evaluation.main, str(run_folder), "--output", str(file), "--eval.flip") == 0
    lines, table = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    assert lines[0].startswith("mIoU ") and " %  pixel accuracy " in lines[0] and "  5 images  " in lines[0]
    assert lines[1].split() == ["class", "IoU", "pixels"] and len(lines) == 5
    assert (
        {line.split()[0] for line in lines[2:]} == {one["name"] for one in table["classes"]} == {"sky", "road", "car"}
    )
    confusion = np.array(table["confusion"])
    assert [one["pixels"] for one in table["classes"]] == confusion.sum(1).tolist()
    assert table["metrics"]["miou"] == pytest.approx(np.mean([one["iou"] for one in table["classes"]]))
    assert table["split"] == "val"


def test_several_views_change_the_scores(run_folder: Path) -> None:
    saved = read_saved(run_folder)
    plain = evaluation.as_run(saved.config)
    several = replace_at(replace_at(plain, "eval.flip", True), "segment.test_scales", (0.75, 1.25))
    ious = [answer_checkpoint(config, saved, ALONE).metrics["val_loss"] for config in (plain, several)]
    assert ious[0] != ious[1] and abs(ious[0] - ious[1]) < 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--split", "test"], "so there is no split test"),
        (["--calibrate"], "calibrate = True: is for classification alone"),
        (["--data.image-size", "24"], "data.image_size = 24: has no effect: whole images are shown"),
        (["--segment.aux-weight", "1"], "option = '--segment.aux-weight': has no effect here, only in training"),
    ],
)
def test_what_evaluate_cannot_do_is_refused_by_name(
    options: list[str], says: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(evaluation.main, str(run_folder), *options) == 2
    assert says in capsys.readouterr().err


def test_a_classifier_has_no_test_split(finished_run: Any) -> None:
    saved = read_saved(finished_run.folder)
    config = replace_at(evaluation.as_run(saved.config), "split", "test")
    rule = "is for segmentation and detection, and the checkpoint's task is classification"
    with pytest.raises(ConfigError, match=f"^split = 'test': {rule}"):
        evaluation.evaluate_checkpoint(config, saved, ALONE)


# ------------------------------------------------------------------------------------------------------------- pictures
def test_predict_draws_the_classes_over_the_image(
    run_folder: Path, tiny_masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The mask is the likeliest class of each pixel; an image that cannot be read is named, and the others are drawn."""
    images, folder = tiny_masks / "val" / "images", tmp_path / "pictures"
    again, bad = tmp_path / "000.jpg", tmp_path / "bad.jpg"
    again.write_bytes((images / "001.jpg").read_bytes())
    bad.write_bytes(b"no image")
    assert call(predict.main, str(run_folder), str(images), str(again), str(bad), "--draw", str(folder)) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 6 and err.startswith(f"error: {bad}: no image")
    names = ["000", "000-2", *(f"00{number}" for number in range(1, 5))]
    assert sorted(path.stem for path in folder.glob("*.png")) == names
    assert sorted(path.stem for path in (folder / "masks").iterdir()) == names
    rows = [line.split(",") for line in (folder / "colors.csv").read_text().splitlines()[1:]]
    assert [row[:2] for row in rows] == [["0", "sky"], ["1", "road"], ["2", "car"]]
    saved = read_saved(run_folder)
    model, source = saved.network(), open_mask_split(saved.config.data, "val")
    batches = SEGMENTATION.val_batches(saved.config, source, ALONE, batch_size=1, dtype=torch.float32)
    for number, batch in enumerate(batches):
        with torch.no_grad():
            logits = functional.interpolate(model(batch.images), size=batch.masks.shape[1:], mode="bilinear")
        with Image.open(folder / "masks" / f"00{number}.png") as mask:
            assert mask.mode == "P" and (np.array(mask) == logits.argmax(1)[0].numpy()).mean() > 0.999
            painted = np.array(mask.convert("RGB"), int)
        wanted = (np.array(Image.open(images / f"00{number}.jpg"), int) + painted) / 2
        assert np.abs(np.array(Image.open(folder / f"00{number}.png")) - wanted).max() <= 1
        assert {tuple(color) for color in painted.reshape(-1, 3).tolist()} <= {tuple(map(int, row[2:])) for row in rows}


def test_each_class_has_a_colour_of_its_own() -> None:
    assert len(set(colors(254))) == 254


@pytest.mark.parametrize(
    ("main", "options", "says"),
    [
        (predict.main, ["IMAGE"], "task = 'segmentation': gives each pixel a class, and an image none; add --draw DIR"),
        (predict.main, ["IMAGE", "--draw", "OLD"], "already exists and is never overwritten; give another --draw"),
        (predict.main, ["IMAGE", "--draw", "NEW", "--output", "x.csv"], "output = 'x.csv': is for classes of images"),
        (export.main, ["--output", "NEW", "--calibrated"], "calibrated = True: is for one label an image"),
    ],
)
def test_what_a_command_cannot_do_is_refused_by_name(
    main: Any,
    options: list[str],
    says: str,
    run_folder: Path,
    tiny_masks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        "IMAGE": str(tiny_masks / "val" / "images" / "000.jpg"),
        "OLD": str(tmp_path),
        "NEW": str(tmp_path / "new"),
    }
    assert call(main, str(run_folder), *(places.get(option, option) for option in options)) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_classifier_draws_nothing(
    finished_run: Any, tiny_masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(tiny_masks / "val" / "images" / "000.jpg")
    assert call(predict.main, str(finished_run.folder), image, "--draw", str(tmp_path / "x")) == 2
    assert "draw = " in (said := capsys.readouterr().err) and "the checkpoint's task is classification" in said
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------------------------------- the base network's weights
def test_it_starts_from_a_classification_run(finished_run: Any, tiny_masks: Path, tmp_path: Path) -> None:
    """The recipe takes its network and normalisation from the run, and its averaged weights into the base network."""
    run = finished_run.folder
    given = {"init": str(run)}
    fitted = fit_recipe("segment-ade20k", lambda path: given.get(path, ""))
    before = read_saved(run).config
    assert (fitted.model.name, fitted.model.width) == (before.model.name, before.model.width)
    assert (fitted.data.image_size, fitted.epochs) == (480, 120)
    assert parse_recipe(arguments_of(fitted), prog="test", fit=fit_recipe).model == fitted.model
    saved = read_saved(run)
    assert call(export.main, str(run), "--output", str(tmp_path / "export"), "--no-onnx") == 0
    for weights_of in (saved.path, tmp_path / "export", tmp_path / "export" / "model.safetensors"):
        given["init"] = str(weights_of)
        assert fit_recipe("segment-ade20k", lambda path: given.get(path, "")).model == fitted.model, weights_of
    config = config_for(tiny_masks, tmp_path / "run", "--init", str(run), model=before.model)
    built = build(config, ALONE)
    weights = saved.weights if saved.average is None else saved.average
    state = built.model.state_dict()
    for name, tensor in weights.items():
        if not name.startswith("fc."):
            assert torch.equal(state[f"backbone.{name}"], tensor.to(state[f"backbone.{name}"])), name
    rates = {group.get("lr_factor", 1.0) for group in built.optimizer.param_groups}
    assert rates == {0.1, 1.0}


# ----------------------------------------------------------------------------------------------------------- the config
OTHERS: dict[str, Any] = {
    "data.area": (0.5, 1.0),
    "data.aspect": (1.0, 1.0),
    "data.color": "paper",
    "data.pca_noise": 0.1,
    "data.alternate_flip": True,
    "data.fixed_augmentation": True,
    "data.operators": "dali",
    "data.balance": 0.5,
    "model.whitening": True,
    "model.aux_head": True,
    "schedule.first_size": 0.5,
    "loss.mixup_alpha": 0.2,
    "loss.aux_weight": 0.3,
    "distill.teacher": "runs/teacher",
}


@pytest.mark.parametrize("path", HAS["segmentation"])
def test_a_field_that_has_no_effect_is_refused_by_name(path: str) -> None:
    recipe = RECIPES["segment-ade20k"]()
    if path == "model.aux_head":
        recipe = replace_at(replace_at(recipe, "model.name", "inception_v3"), "segment.output_stride", 32)
    if path == "model.whitening":
        recipe = replace_at(replace_at(recipe, "model.name", "cifarnet"), "segment.output_stride", 32)
    with pytest.raises(
        DoesNotApplyError, match=rf"^{path} = .*: has no effect in segmentation, where .*; leave it at "
    ):
        replace_at(recipe, path, OTHERS[path])


def test_a_field_of_segmentation_is_refused_elsewhere() -> None:
    cifar10 = RECIPES["cifar10"]()
    with pytest.raises(DoesNotApplyError, match=r"^segment\.base_size = 40: has no effect in task classification; "):
        replace_at(cifar10, "segment.base_size", 40)


def test_the_tricks_that_apply() -> None:
    """All but those of a class an image. The recipe has none of the paper's schedule."""
    recipe = RECIPES["segment-ade20k"]()
    none = ["distillation", "mixup", "whitening", "identity_init", "alternate_flip", "progressive_resizing"]
    assert [name for name in TRICKS if not applies(recipe, name)] == none
    assert [name for name in TRICKS if is_on(recipe, name)] == ["resnet_d"]
    cosine = parse_recipe(["segment-ade20k", "--tricks.on", "cosine"], prog="test")
    assert cosine.schedule.decay == "cosine" and cosine == dataclasses.replace(
        recipe, schedule=cosine.schedule, tricks=cosine.tricks, run_dir=cosine.run_dir
    )


PAPER: dict[str, tuple[Any, str]] = {
    # section 6.2 of the paper, as recalled
    "epochs": (120, "the paper"),
    "global_batch_size": (16, "the paper; gluon-cv --batch-size"),
    "data.image_size": (480, "the paper: crop; gluon-cv --crop-size"),
    "schedule.decay": ("poly", "the paper; gluon-cv LRScheduler(mode='poly')"),
    "schedule.poly_power": (0.9, "the paper; gluon-cv power=0.9"),
    "sync_batch_norm": (True, "the paper; gluon-cv --syncbn"),
    "segment.output_stride": (8, "the paper: stages 3 and 4 dilated; gluon-cv dilated=True"),
    # the authors' code: scripts/segmentation/train.py, gluoncv/data/segbase.py, gluoncv/model_zoo/fcn.py
    "segment.base_size": (520, "gluon-cv --base-size"),
    "segment.base_side": ("long", "gluon-cv _sync_transform, since September 2018"),
    "segment.scale": ((0.5, 2.0), "gluon-cv _sync_transform: 0.5 to 2 times base_size"),
    "segment.blur": (0.5, "gluon-cv _sync_transform: GaussianBlur, half of the images"),
    "data.flip": (0.5, "gluon-cv _sync_transform: half of the images"),
    "data.color": ("none", "gluon-cv: no colour"),
    "data.pca_noise": (0.0, "gluon-cv: no colour"),
    "optim.base_lr": (0.1, "the paper's 0.01, times the heads' lr_mult of 10 in gluon-cv"),
    "optim.backbone_lr": (0.1, "gluon-cv: heads' lr_mult 10, so the base network has a tenth of theirs"),
    "optim.linear_scaling": (False, "gluon-cv --lr is that of the batch"),
    "optim.momentum": (0.9, "gluon-cv --momentum"),
    "optim.weight_decay": (1e-4, "gluon-cv --weight-decay"),
    "optim.bias_decay": (True, "gluon-cv: --no-wd is off"),
    "schedule.warmup_epochs": (0, "gluon-cv --warmup-epochs"),
    "precision": ("fp32", "gluon-cv --dtype float32"),
    # others
    "segment.aux_weight": (0.4, "PSPNet, section 5.1; gluon-cv --aux-weight has 0.5"),
    "data.val_resize": (520, "whole images at base_size; torchvision's references"),
    "model.name": ("resnet50d", "the paper's best base networks are ResNet-50-D"),
    "task": ("segmentation", "this project"),
    "recipe": ("segment-ade20k", "this project"),
}


def test_the_recipe_is_the_tables_field_by_field() -> None:
    """Every field that is not in the table has the default of the config."""
    config, plain = RECIPES["segment-ade20k"](), TrainConfig(recipe="", epochs=6, global_batch_size=1)
    assert {path: get_at(config, path) for path in PAPER} == {path: value for path, (value, _) in PAPER.items()}
    from lib.configs import leaves

    others = [path for path, _, _ in leaves(TrainConfig) if path not in PAPER]
    assert {path: get_at(config, path) for path in others} == {path: get_at(plain, path) for path in others}
    assert config.peak_lr * config.optim.backbone_lr == pytest.approx(0.01)


# -------------------------------------------------------------------------------------------------------- on paper, refused
@pytest.mark.slow
def test_a_run_is_counted_on_paper(tiny_masks: Path) -> None:
    recipe = RECIPES["segment-ade20k"]()
    plan = PlanConfig(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}, gpus=4, gpu="v100-32gb")
    size = find_data_size(plan)
    assert (size.images, size.classes, size.source) == (20_210, 150, "ADE20K")
    small = dataclasses.replace(
        plan, data=dataclasses.replace(plan.data, root=str(tiny_masks), image_size=64), model=dataclasses.replace(
            plan.model, name="resnet8d", width=0.125
        )
    )  # fmt: skip
    made = make_plan(small)
    assert (made.data.images, made.data.classes, made.steps_per_epoch) == (19, 3, 2)
    assert made.footprint.at_peak["input"] == 4 * (3 * 64 * 64 * 4 + 64 * 64 * 8)
    assert made.steps_per_epoch == count_steps(made.shards, small)


def test_a_table_of_tricks_refuses_it() -> None:
    wrong = r"^task = 'segmentation': cannot be ablated by table4, which is of classification; take transfer-segment$"
    with pytest.raises(ConfigError, match=wrong):
        find_tables(["table4"], extend(RECIPES["segment-ade20k"]()))


def test_evaluated_as_configured(run_folder: Path) -> None:
    """The scores are what the Python API and the command get."""
    saved = read_saved(run_folder)
    found = evaluation.evaluate(saved, evaluation.as_run(saved.config))
    assert isinstance(found.answers, PixelScores) and isinstance(evaluation.as_run(saved.config), EvaluateConfig)
    assert found.answers.iou.shape == (3,)
