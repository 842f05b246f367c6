"""The task detection: trained, resumed and evaluated by the trainer's own parts; what it has no use for is refused by name."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.ablation.cells import extend
from fasttricks.ablation.tables import find_tables
from fasttricks.commands import evaluate as evaluation
from fasttricks.commands import predict
from fasttricks.commands.evaluate import EvaluateConfig, answer_checkpoint
from fasttricks.commands.train import next_commands
from fasttricks.config import ConfigError, DoesNotApplyError, TrainConfig, get_at, replace_at
from fasttricks.config.cli import arguments_of, parse_recipe
from fasttricks.config.recipes import RECIPES
from fasttricks.config.transfer import HAS
from fasttricks.config.tricks import TRICKS, applies, is_on
from fasttricks.data.boxes.places import open_box_split
from fasttricks.data.sources.errors import DataError
from fasttricks.models.faster_rcnn import LOSSES
from fasttricks.planning.planner import PlanConfig, find_data_size, make_plan
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.overview import look_at
from fasttricks.runs.saved import read_saved
from fasttricks.system.distributed import World
from fasttricks.tasks.average_precision import AveragePrecision, BoxScores
from fasttricks.tasks.detection import DETECTION, detect, truths
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.boxes import annotation, write_boxes
from lib.detected import arguments_for, config_for
from lib.forked import on_ranks
from lib.runs import final_state, interrupt, records
from lib.states import same
from lib.tiny import ALONE, call

pytestmark = pytest.mark.usefixtures("no_curves")


def train_on_ranks(run_dir: Path, data: Path, *options: str) -> None:
    from fasttricks.commands import train

    train.main(arguments_for(data, run_dir, *options))


@pytest.fixture(scope="module")
def run_folder(detected_run: Path) -> Path:
    return detected_run


# ----------------------------------------------------------------------------------------------------------------- the run
def test_a_run_learns_and_says_its_metrics(run_folder: Path) -> None:
    """Without a validation loss, which no file and no picture needs."""
    summary = json.loads((run_folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    names = [f"train_loss_{name}" for name in ("objectness", "rpn_box_reg", "classifier", "box_reg")]
    parts = [[row[name] for name in names] for row in rows if "train_loss" in row]
    assert [sum(some) for some in parts] == pytest.approx(losses, rel=1e-6) and min(map(min, parts)) > 0
    table = list(csv.DictReader((run_folder / "metrics.csv").read_text().splitlines()))
    assert [*table[0]][:9] == ["epoch", "step", "lr", "train_loss", "images_per_sec", *names]
    for place, name in enumerate(names):
        means = [np.mean([some[place] for some in parts[first : first + 3]]) for first in (0, 3)]
        assert [float(row[name]) for row in table] == pytest.approx(means)
    assert look_at(run_folder).metrics == ("map", "map_voc07", "map_area")
    validated = [row for row in rows if "map" in row]
    assert [row["epoch"] for row in validated] == [1, 2]
    assert {"map", "map_voc07", "map_area"} < summary.keys() and summary["val_images"] == 5
    assert "val_loss" not in summary and summary["map"] == summary["map_voc07"]
    assert summary["best_map"] == max(row["map"] for row in validated)
    assert (run_folder / "curves.png").stat().st_size > 1000 and (run_folder / "checkpoints" / "best.pt").is_file()
    assert load_checkpoint(run_folder)["task"] == "detection"
    named = [line.split()[0] for line in next_commands("runs/x", "detection")]
    assert named[-4:] == ["evaluate", "predict", "export", "curves"]


def test_a_run_resumes_bit_for_bit_within_an_epoch(
    tiny_boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With EMA, micro-batches, and samples of anchors and regions that torch's generator draws."""

    def begin(folder: str, **changes: Any) -> Any:
        return build(config_for(tiny_boxes, tmp_path / folder, "--accumulate", "2", **changes), ALONE)

    whole = begin("whole")
    fit(whole)
    torch.manual_seed(99)  # the state of another process
    interrupt(begin("parts"), monkeypatch, at_step=4)
    torch.manual_seed(7)
    resumed = begin("parts", resume=True)
    assert resumed.step == 4 and resumed.step_in_epoch
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_and_score_alike(ranks: int, tiny_boxes: Path, tmp_path: Path) -> None:
    """Each validation image counts once, and the scores of the weights are those of one rank, to the last bit."""
    batch = {2: "4", 3: "3"}[ranks]
    on_ranks(ranks, train_on_ranks, tmp_path / "run", tiny_boxes, "--global-batch-size", batch, "--epochs", "1")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["ranks"], summary["val_images"]) == (ranks, 5)
    saved = read_saved(tmp_path / "run")
    found = answer_checkpoint(evaluation.as_run(saved.config), saved, ALONE)
    assert {name: summary[name] for name in found.metrics} == found.metrics


@pytest.mark.parametrize("precision", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_lower_precisions_follow_float32(precision: str, tiny_boxes: Path, tmp_path: Path) -> None:
    losses = {}
    for one in ("fp32", precision):
        run = build(config_for(tiny_boxes, tmp_path / one, "--precision", one), ALONE)
        batch = next(iter(run.train_loader))
        torch.manual_seed(0)
        loss, images = DETECTION.loss(run, batch, lam=1.0)
        loss.sum().backward()
        losses[one] = float(loss.detach().sum() / images)
        gradient = run.model.roi_heads.box_predictor.cls_score.weight.grad
        assert gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.1)
    assert losses["fp32"] < 5


def test_the_losses_are_the_detectors_times_the_images(tiny_boxes: Path, tmp_path: Path) -> None:
    """Of images without boxes too, and 0 of no image, as a rank has them at the end of an epoch."""
    run = build(config_for(tiny_boxes, tmp_path / "run"), ALONE)
    batch = next(iter(run.train_loader))
    torch.manual_seed(5)
    loss, images = DETECTION.loss(run, batch, lam=1.0)
    torch.manual_seed(5)
    objects = zip(batch.boxes, batch.labels, strict=True)
    parts = run.model(batch.images, [{"boxes": boxes, "labels": labels + 1} for boxes, labels in objects])
    assert images == len(batch) == 4
    assert tuple(f"loss_{name}" for name in DETECTION.facts.loss_parts) == LOSSES and {*parts} == {*LOSSES}
    assert loss.tolist() == pytest.approx([4 * float(parts[name].detach()) for name in LOSSES], rel=1e-6)
    for count, empty in ((2, True), (0, False)):
        some = DETECTION.example(run.config, count, 3, device=torch.device("cpu"), dtype=torch.float32)
        if empty:
            some = dataclasses.replace(
                some, boxes=[one[:0] for one in some.boxes], labels=[one[:0] for one in some.labels]
            )
        run.model.zero_grad()
        loss, images = DETECTION.loss(run, some, lam=1.0)
        loss.sum().backward()
        assert images == count and bool(loss.isfinite().all()) and (float(loss.detach().sum()) > 0) == empty
        assert loss.shape == (4,) and all(p.grad is not None for p in run.model.parameters())


# ------------------------------------------------------------------------------------------------------------- evaluation
def test_the_scores_are_those_of_each_image_alone(run_folder: Path) -> None:
    """And of ranks, whose parts come in another order."""
    saved = read_saved(run_folder)
    found = answer_checkpoint(evaluation.as_run(saved.config), saved, ALONE)
    model, precision = saved.network().eval(), AveragePrecision(3)
    source = open_box_split(saved.config.data, "val")
    for rank in (1, 0):
        world = World(rank=rank, size=2, local_rank=rank, local_size=2, device=torch.device("cpu"))
        for batch in DETECTION.val_batches(saved.config, source, world, batch_size=3, dtype=torch.float32):
            if len(batch):
                assert batch.shown is not None
                precision.update(detect(model, batch.images, torch.no_grad), truths(batch), batch.shown)
    alone = precision.result(ALONE)
    for name, value in found.answers._asdict().items():
        assert np.array_equal(value, getattr(alone, name), equal_nan=True), name
    assert found.metrics["map_area"] == found.answers.map_area and found.answers.detections.sum() > 0
    assert json.loads((run_folder / "summary.json").read_text())["map"] == found.metrics["map"]


class Knows(torch.nn.Module):
    """A detector that gives the objects of a loader's images, moved to the right."""

    num_classes = 3

    def __init__(self, loader: Any, moved: float) -> None:
        super().__init__()
        self._batches, self._moved = iter(loader), moved

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        batch = next(self._batches)
        move = torch.tensor([self._moved, 0.0, self._moved, 0.0])
        one = {"boxes": batch.boxes[0] + move, "labels": batch.labels[0] + 1, "scores": torch.ones(len(batch.boxes[0]))}
        return [one]


@pytest.mark.parametrize(("moved", "score"), [(0.0, 100.0), (100.0, 0.0)])
def test_a_detector_that_knows_the_objects_has_100_percent(
    moved: float, score: float, tiny_boxes: Path, tmp_path: Path
) -> None:
    config = config_for(tiny_boxes, tmp_path)
    source = open_box_split(config.data, "val")
    loaders = [DETECTION.val_batches(config, source, ALONE, batch_size=1, dtype=torch.float32) for _ in range(2)]
    metrics = DETECTION.evaluate(Knows(loaders[0], moved), loaders[1], ALONE, config, torch.no_grad)
    assert metrics == {"map": score, "map_voc07": score, "map_area": score, "val_images": 5}


def test_the_command_prints_and_writes_the_average_precision_of_each_class(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    options = ["--split", "test", "--output", str(file), "--detect.average", "area", "--detect.score-threshold", "0.01"]
    assert call(evaluation.main, str(run_folder), *options) == 0
    lines, table = capsys.readouterr().out.splitlines(), json.loads(file.read_text())
    assert lines[0].startswith("mAP ") and "mAP by area" in lines[0] and "  5 images  " in lines[0]
    there = [one for one in table["classes"] if one["objects"]]
    assert "  loss " not in lines[0] and lines[1].startswith("class  AP, 11 recalls") and 0 < len(there) < 3
    assert {line.split()[0] for line in lines[2:-1]} == {one["name"] for one in there}
    assert lines[-1] == f"{3 - len(there)} of 3 classes have no object that counts here, and are in no mean"
    assert [one["name"] for one in table["classes"]] == ["ball", "car", "tree"]
    for form in ("voc07", "area"):
        known = [one[f"ap_{form}"] for one in table["classes"] if one[f"ap_{form}"] is not None]
        assert table["metrics"][f"map_{form}"] == pytest.approx(np.mean(known))
    assert table["metrics"]["map"] == table["metrics"]["map_area"] and table["split"] == "test"
    assert all(0 <= one["found"] <= one["objects"] for one in table["classes"])


def test_the_fields_of_the_detections_count_in_evaluation(run_folder: Path) -> None:
    saved = read_saved(run_folder)
    plain = evaluation.as_run(saved.config)
    counts = {
        path: int(answer_checkpoint(replace_at(plain, path, value), saved, ALONE).answers.detections.sum())
        for path, value in (("detect.average", "area"), ("detect.most_detections", 2), ("detect.score_threshold", 0.99))
    }
    assert counts["detect.average"] > 10 >= counts["detect.most_detections"] > counts["detect.score_threshold"] == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--calibrate"], "calibrate = True: is for classification alone"),
        (
            ["--data.image-size", "24"],
            "data.image_size = 24: has no effect: whole images are shown, their short side at det",
        ),
        (["--detect.channels", "9"], "option = '--detect.channels': has no effect here, only in training"),
        (["--eval.flip"], "eval.flip = True: has no effect in detection, where the boxes of an image and its mirror"),
        (["--data.root", "WITHOUT"], "no list val.txt for the split val"),
    ],
)
def test_what_evaluate_cannot_do_is_refused_by_name(
    options: list[str], says: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_boxes(tmp_path, {"VOC2007/train": 1})
    given = [str(tmp_path) if option == "WITHOUT" else option for option in options]
    assert call(evaluation.main, str(run_folder), *given) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_predict_draws_the_boxes_of_validation(
    run_folder: Path,
    tiny_boxes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the pixels of the file, all in the table; an image that cannot be read is named, and the others are drawn."""
    saved, folder, bad = read_saved(run_folder), tmp_path / "pictures", tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    source = open_box_split(saved.config.data, "val")
    paths = [str(tiny_boxes / name) for name in source.images]
    assert call(predict.main, str(run_folder), *paths, str(bad), "--draw", str(folder), "--draw-score", "0") == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 5 and err.startswith(f"error: {bad}: no image")
    with open(folder / "boxes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    model = saved.network().eval()
    for number, batch in enumerate(
        DETECTION.val_batches(saved.config, source, ALONE, batch_size=1, dtype=torch.float32)
    ):
        (found,) = detect(model, batch.images, torch.no_grad)
        (height, width), shown = batch.sizes[0].tolist(), batch.images[0].shape
        scale = torch.tensor([width / shown[2], height / shown[1]] * 2)
        mine = [row for row in rows if row["image"] == paths[number]]
        edges = torch.tensor([[float(row[e]) for e in ("left", "top", "right", "bottom")] for row in mine])
        torch.testing.assert_close(edges.reshape(-1, 4), found.xyxy * scale, rtol=0, atol=0.006)
        assert [row["class"] for row in mine] == [saved.classes[label] for label in found.labels.tolist()]
        assert [float(row["score"]) for row in mine] == pytest.approx(found.scores.tolist(), abs=1e-6)
        with Image.open(folder / mine[0]["picture"]) as picture, Image.open(paths[number]) as image:
            assert picture.size == image.size == (width, height)
            changed = (np.array(picture) != np.array(image.convert("RGB"))).any(2)
            left, top = int(edges[0, 0]), int(edges[0, 1])
            assert changed[min(top, height - 1), min(left, width - 1)], "the corner of the surest box"
    assert call(predict.main, str(run_folder), *paths, "--draw", str(folder)) == 2
    assert "already exists and is never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "options", "says"),
    [
        (predict.main, ["IMAGE"], "task = 'detection': gives each box a class, and an image none; add --draw DIR"),
    ],
)
def test_what_a_command_cannot_do_is_refused_by_name(
    main: Any, options: list[str], says: str, run_folder: Path, tiny_boxes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next((tiny_boxes / "VOC2007" / "JPEGImages").iterdir()))
    assert call(main, str(run_folder), *(image if option == "IMAGE" else option for option in options)) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


# ------------------------------------------------------------------------------------------------------- odd data
def test_one_class_and_images_without_boxes_train(tmp_path: Path) -> None:
    """A detector tells objects from the background, so one class is enough; half of the images have no object."""
    data = write_boxes(tmp_path / "data", {"VOC2007/train": 4, "VOC2007/val": 2}, sides=(40, 50), classes=("ball",))
    for path in sorted((data / "VOC2007" / "Annotations").iterdir())[1:4]:
        path.write_text(annotation(size=_size(path)))
    run = build(config_for(data, tmp_path / "run", "--epochs", "1"), ALONE)
    fit(run)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run.classes == ("ball",) and 0 <= summary["map"] <= 100 and summary["steps"] == 1


def _size(path: Path) -> tuple[str, str]:
    text = path.read_text()
    return tuple(text.partition(f"<{side}>")[2].partition("<")[0] for side in ("width", "height"))  # type: ignore[return-value]


def test_validation_without_an_object_is_one_line(tmp_path: Path) -> None:
    data = write_boxes(tmp_path / "data", {"VOC2007/train": 4, "VOC2007/val": 1}, sides=(40, 50))
    for path in (data / "VOC2007" / "Annotations").glob("1*.xml"):
        path.write_text(annotation(size=_size(path)))
    with pytest.raises(DataError, match=r"^validation boxes: no object on the 1 images counts"):
        fit(build(config_for(data, tmp_path / "run", "--epochs", "1"), ALONE))


def test_batch_norm_of_random_weights_is_not_frozen(tiny_boxes: Path, tmp_path: Path) -> None:
    config = config_for(tiny_boxes, tmp_path / "run", "--model.freeze", "batch_norm")
    with pytest.raises(
        ConfigError, match=r"^model\.freeze = 'batch_norm': would keep random weights; give trained ones by"
    ):
        build(config, ALONE)


# ------------------------------------------------------------------------------------------------- the base network's weights
def test_it_starts_from_a_classification_run_with_its_batch_norm_frozen(
    finished_run: Any, tiny_boxes: Path, tmp_path: Path
) -> None:
    """The recipe takes its network and normalisation from the run, and its averaged weights into the base network."""
    run = finished_run.folder
    fitted = fit_recipe("detect-voc", lambda path: {"init": str(run)}.get(path, ""))
    before = read_saved(run).config
    assert (fitted.model.name, fitted.model.width) == (before.model.name, before.model.width)
    assert parse_recipe(arguments_of(fitted), prog="test", fit=fit_recipe).model == fitted.model
    frozen = dataclasses.replace(before.model, freeze=("stem", "batch_norm"))
    built = build(config_for(tiny_boxes, tmp_path / "run", "--init", str(run), "--epochs", "1", model=frozen), ALONE)
    saved = read_saved(run)
    weights = {name: one for name, one in (saved.average or saved.weights).items() if not name.startswith("fc.")}

    def state() -> dict[str, torch.Tensor]:
        return {name: built.model.state_dict()[f"backbone.body.{name}"].clone() for name in weights}

    begun = state()
    assert all(torch.equal(begun[name], one.to(begun[name])) for name, one in weights.items())
    fit(built)
    stay = {name for name, one in state().items() if torch.equal(one, begun[name])}
    kinds = ("running_mean", "running_var", "num_batches_tracked", "bias")
    assert stay == {
        name for name in weights if name.endswith(kinds) or name.startswith("conv1.") or begun[name].dim() == 1
    }


# ----------------------------------------------------------------------------------------------------------- the config
OTHERS: dict[str, Any] = {
    "data.image_size": 128,
    "data.val_resize": 300,
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
    "loss.smoothing": 0.1,
    "loss.mixup_alpha": 0.2,
    "loss.class_weights": "balanced",
    "loss.aux_weight": 0.3,
    "distill.teacher": "runs/teacher",
    "eval.batch_size": 2,
    "eval.flip": True,
    "compile": "default",
}


@pytest.mark.parametrize("path", HAS["detection"])
def test_a_field_that_has_no_effect_is_refused_by_name(path: str) -> None:
    recipe = RECIPES["detect-voc"]()
    if path == "model.aux_head":
        recipe = replace_at(recipe, "model.name", "inception_v3")
    if path == "model.whitening":
        recipe = replace_at(recipe, "model.name", "cifarnet")
    with pytest.raises(DoesNotApplyError, match=rf"^{path} = .*: has no effect in detection, where .*; leave it at "):
        replace_at(recipe, path, OTHERS[path])


def test_a_field_of_detection_is_refused_elsewhere() -> None:
    for recipe in ("cifar10", "segment-ade20k"):
        task = RECIPES[recipe]().task
        says = rf"^detect\.base_size = 40: has no effect in task {task}; leave it at 600, or add --task detection"
        with pytest.raises(DoesNotApplyError, match=says):
            replace_at(RECIPES[recipe](), "detect.base_size", 40)
    with pytest.raises(DoesNotApplyError, match=r"^segment\.base_size = 40: has no effect in task detection; "):
        replace_at(RECIPES["detect-voc"](), "segment.base_size", 40)


def test_the_tricks_that_apply() -> None:
    """All but those of a class an image, or of one size."""
    recipe = RECIPES["detect-voc"]()
    none = ["label_smoothing", "distillation", "mixup"]
    none += ["whitening", "identity_init", "alternate_flip", "progressive_resizing"]
    assert [name for name in TRICKS if not applies(recipe, name)] == none
    assert [name for name in TRICKS if is_on(recipe, name)] == ["linear_scaling", "warmup", "resnet_d"]


PAPER: dict[str, tuple[Any, str]] = {
    # section 6.1 of the paper, as recalled
    "epochs": (20, "gluon-cv --epochs; the paper: a long schedule"),
    "schedule.warmup_epochs": (
        0.5,
        "the paper: linear warm-up; torchvision's has 1000 steps, about half an epoch of 8 images",
    ),
    # the authors' code: scripts/detection/faster_rcnn/train_faster_rcnn.py, gluoncv/model_zoo/faster_rcnn, --dataset voc
    "optim.base_lr": (0.256, "gluon-cv --lr 0.001 for a batch of 1 image, so 0.256 for 256"),
    "optim.weight_decay": (5e-4, "gluon-cv --wd"),
    "optim.momentum": (0.9, "gluon-cv --momentum"),
    "optim.bias_decay": (True, "gluon-cv decays all that is trained"),
    "schedule.decay": ("step", "gluon-cv --lr-decay"),
    "schedule.step_epochs": ((14,), "gluon-cv --lr-decay-epoch 14,20, and 20 is the end"),
    "schedule.step_factor": (0.1, "gluon-cv --lr-decay"),
    "model.freeze": (
        ("stem", "layer1", "batch_norm"),
        "gluon-cv train_patterns: convolutions of layers 2 to 4; use_global_stats",
    ),
    "detect.base_size": (600, "gluon-cv short=600"),
    "detect.max_size": (1000, "gluon-cv max_size=1000"),
    "detect.nms_threshold": (0.3, "gluon-cv nms_thresh=0.3"),
    "detect.most_detections": (100, "gluon-cv post_nms=100"),
    "detect.score_threshold": (1e-4, "gluon-cv valid_thresh=0.0001"),
    "detect.train_proposals": (2000, "gluon-cv rpn_train_post_nms=2000"),
    "detect.average": ("voc07", "gluon-cv VOC07MApMetric"),
    "data.flip": (0.5, "gluon-cv FasterRCNNDefaultTrainTransform"),
    "data.color": ("none", "gluon-cv: no colour"),
    "data.pca_noise": (0.0, "gluon-cv: no colour"),
    "precision": ("fp32", "gluon-cv without --amp"),
    # the feature pyramid, which the authors' VOC networks lack: gluon-cv's custom-model and torchvision's
    "detect.channels": (256, "gluon-cv --num-fpn-filters"),
    "detect.head_features": (1024, "gluon-cv --num_box_head_dense_filters"),
    "detect.anchor_scales": ((8.0,), "gluon-cv --anchor-scales 2,4,8,16,32 times 16 pixels on strides 4 to 64"),
    "detect.anchor_ratios": ((0.5, 1.0, 2.0), "gluon-cv --anchor-aspect-ratio"),
    "detect.test_proposals": (1000, "gluon-cv --rpn-test-post-nms"),
    "detect.train_samples": (512, "gluon-cv --rcnn-num-samples"),
    # others
    "global_batch_size": (8, "an image on each of 8 GPUs; gluon-cv has one an image a GPU"),
    "optim.linear_scaling": (True, "gluon-cv --lr is that of one image"),
    "model.name": ("resnet50d", "the paper's best base networks are ResNet-50-D"),
    "task": ("detection", "this project"),
    "recipe": ("detect-voc", "this project"),
}


def test_the_recipe_is_the_tables_field_by_field() -> None:
    """Every field that is not in the table has the default of the config."""
    config, plain = RECIPES["detect-voc"](), TrainConfig(recipe="", epochs=6, global_batch_size=1)
    assert {path: get_at(config, path) for path in PAPER} == {path: value for path, (value, _) in PAPER.items()}
    from lib.configs import leaves

    others = [path for path, _, _ in leaves(TrainConfig) if path not in PAPER]
    assert {path: get_at(config, path) for path in others} == {path: get_at(plain, path) for path in others}
    assert config.peak_lr == pytest.approx(0.001 * config.global_batch_size)


# -------------------------------------------------------------------------------------------------------- on paper, refused
def test_a_run_is_counted_on_paper(tiny_boxes: Path) -> None:
    """Batches of the largest images; the regions that are judged are as many as there can be."""
    recipe = RECIPES["detect-voc"]()
    plan = PlanConfig(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}, gpus=4, gpu="a100")
    size = find_data_size(plan)
    assert (size.images, size.classes, size.source) == (16_551, 20, "VOC 07+12")
    small = dataclasses.replace(
        plan,
        data=dataclasses.replace(plan.data, root=str(tiny_boxes)),
        model=dataclasses.replace(plan.model, name="resnet8d", width=0.125),
        detect=dataclasses.replace(plan.detect, base_size=64, max_size=96, channels=8, head_features=8),
    )
    made = make_plan(small)
    assert (made.data.images, made.data.classes, made.steps_per_epoch) == (11, 3, 2)
    boxes, labels, difficult = 4 * 4 * 2, 2 * 2 * 8, 2
    assert made.footprint.at_peak["input"] == 2 * 3 * 64 * 96 * 4 + boxes + labels + difficult
    fewer = make_plan(dataclasses.replace(small, detect=dataclasses.replace(small.detect, train_samples=256)))
    head = 2 * 256 * (8 * 49 * 8 + 8 * 8 + 8 * 4 * (1 + 4)) * 2 * 3
    assert made.footprint.flops - fewer.footprint.flops == head, (
        "products of the two layers and the predictor, both passes"
    )


def test_a_table_of_classifiers_refuses_it() -> None:
    wrong = r"^task = 'detection': cannot be ablated by table4, which is of classification; take transfer-detect$"
    with pytest.raises(ConfigError, match=wrong):
        find_tables(["table4"], extend(RECIPES["detect-voc"]()))


def test_evaluated_as_configured(run_folder: Path) -> None:
    """The Python API and the command get the scores of each class."""
    saved = read_saved(run_folder)
    found = evaluation.evaluate(saved, evaluation.as_run(saved.config))
    assert isinstance(found.answers, BoxScores) and isinstance(evaluation.as_run(saved.config), EvaluateConfig)
    assert found.answers.ap_area.shape == (3,)
