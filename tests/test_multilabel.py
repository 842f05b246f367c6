"""Task multilabel: its scores against torchmetrics and a float64 twin, its loss, its runs, and every command on one of them."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fasttricks as ft
from fasttricks.commands import ablate, evaluate, export, plan, predict, report, runs, train
from fasttricks.config import ConfigError, LossConfig
from fasttricks.learning.numbers import draw_lam
from fasttricks.models import build_model
from fasttricks.runs.saved import read_saved
from fasttricks.tasks.classification import evaluation_logits
from fasttricks.tasks.label_answers import LabelScores, average_precision, score_labels
from fasttricks.tasks.multilabel import MULTILABEL, binary_loss, metrics_in
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.cards import blocks, run_blocks
from lib.forked import on_ranks
from lib.layouts import write_sets
from lib.runs import final_state, interrupt, records
from lib.states import same
from lib.threads import Threads, ranks
from lib.tiny import ALONE, SMALLEST, call, configure

SEPARATED = ("--task", "multilabel", "--data.label-separator", ";")


# ------------------------------------------------------------------------------------------------------------ scores
def twin(scores: list[float], positive: list[bool]) -> float:
    """Average precision of one class by its definition, a threshold at a time."""
    found, before = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        passed = [there for score, there in zip(scores, positive, strict=True) if score >= threshold]
        recall = sum(passed) / sum(positive)
        found += (recall - before) * sum(passed) / len(passed)
        before = recall
    return found


def drawn(kind: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(logits, targets) of 4 classes."""
    draws = np.random.default_rng(len(kind))
    count = 1 if kind == "one image" else 60
    logits = draws.normal(size=(count, 4)).astype(np.float32)
    targets = draws.random((count, 4)) < 0.3
    if kind == "ties":
        logits = np.round(logits)
    if kind == "all the same":
        logits[:] = 1
    if kind == "a class without positives":
        targets[:, 2] = False
    if kind in ("all positives", "one image"):
        targets[:, 1] = True
    return logits, targets


KINDS = ("plain", "ties", "all the same", "a class without positives", "all positives", "one image")


@pytest.mark.filterwarnings(
    "ignore:Average precision score for one or more classes", "ignore:No positive samples found"
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_are_those_of_torchmetrics_and_of_a_twin(kind: str) -> None:
    from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score

    logits, targets = drawn(kind)
    found = score_labels(logits, targets)
    shares, labels = torch.from_numpy(logits).double().sigmoid(), torch.from_numpy(targets).long()
    per_class = multilabel_average_precision(shares, labels, 4, average="none", thresholds=None)
    there = targets.any(0)  # torchmetrics gives 0 to a class without positives, and we none
    np.testing.assert_allclose(found.average_precision[there], per_class[torch.from_numpy(there)].numpy(), rtol=1e-6)
    assert np.isnan(found.average_precision[~there]).all()
    assert there.all() == (kind not in ("a class without positives", "one image")) and there[1]
    for k in np.flatnonzero(there):
        known = twin(logits[:, k].tolist(), targets[:, k].tolist())
        assert found.average_precision[k] == pytest.approx(known, rel=1e-12)
    assert found.mean_average_precision == pytest.approx(per_class[torch.from_numpy(there)].mean().item(), rel=1e-6)
    f1 = multilabel_f1_score(shares, labels, 4, average="micro")
    assert found.micro_f1 == pytest.approx(f1.item(), rel=1e-6)
    of_classes = multilabel_f1_score(shares, labels, 4, average="none")
    np.testing.assert_allclose(np.nan_to_num(found.f1), of_classes.numpy(), rtol=1e-6)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(torch.from_numpy(logits).double(), labels.double())
    assert found.loss == pytest.approx(wanted.item(), rel=1e-12)


def test_a_nan_is_wrong_for_every_class_and_no_score_without_a_label() -> None:
    logits, targets = (
        np.array([[3, np.nan], [np.nan, -1], [-2, 5.0]], np.float32),
        np.array([[1, 1], [0, 0], [1, 0]], bool),
    )
    found = score_labels(logits, targets)
    assert found.undecided == 2 and np.isnan(found.loss)
    # class 0: the negative NaN is ranked first, then the two; class 1: the positive NaN is last of three
    np.testing.assert_allclose(found.average_precision, [(1 / 2 + 2 / 3) / 2, 1 / 3])
    assert found.predicted.tolist() == [2, 1] and found.right.tolist() == [1, 0]
    assert np.isnan(average_precision(np.ones(3), np.zeros(3, bool)))
    nothing = score_labels(-np.ones((3, 2), np.float32), np.zeros((3, 2), bool))
    assert np.isnan(nothing.mean_average_precision) and nothing.micro_f1 == 0 and np.isnan(nothing.f1).all()


def test_infinite_logits_are_ranked_and_cost_what_they_cost() -> None:
    logits, targets = np.array([[np.inf], [-np.inf], [0.0]], np.float32), np.array([[True], [False], [False]])
    found = score_labels(logits, targets)
    assert found.average_precision.tolist() == [1.0] and found.predicted.tolist() == [1]
    assert found.loss == pytest.approx(np.log(2) / 3)


def test_batches_and_their_order_change_nothing() -> None:
    logits, targets = drawn("plain")
    whole = score_labels(logits, targets)  # its loss has last bits that depend on the order of the images
    for size in (1, 7, 60):
        scores = LabelScores()
        for at in np.random.default_rng(0).permutation(-(-60 // size)):
            part = slice(at * size, (at + 1) * size)
            numbers = np.arange(60)[part]
            scores.update(torch.from_numpy(logits[part]), torch.from_numpy(targets[part]).float(), numbers)
        found = scores.result(ALONE)
        for ours, known in zip(found, whole, strict=True):
            np.testing.assert_array_equal(ours, known)
    with pytest.raises(ValueError, match="no image on any rank"):
        LabelScores().result(ALONE)


@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_scores_come_together_by_image(size: int) -> None:
    """Each rank has every size-th image, the last of three none; every rank gets the result of one."""
    logits, targets = drawn("plain")
    whole, filled = score_labels(logits, targets), 2
    results: list[Any] = [None] * size

    def run(world: Threads) -> None:
        scores = LabelScores()
        numbers = np.arange(world.rank, 60, filled) if world.rank < filled else np.arange(0)
        if len(numbers):
            scores.update(torch.from_numpy(logits[numbers]), torch.from_numpy(targets[numbers]).float(), numbers)
        results[world.rank] = scores.result(world)

    threads = [Thread(target=run, args=(world,)) for world in ranks(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        for ours, known in zip(found, whole, strict=True):
            np.testing.assert_array_equal(ours, known)


# -------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize(("over", "to_right", "to_wrong"), [("others", 0.9, 0.1), ("all", 0.95, 0.05)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_loss_is_the_binary_cross_entropy_of_the_smoothed_targets_and_its_gradient_that_of_the_sum(
    over: Any, to_right: float, to_wrong: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(2, (6, 5), generator=generator).float()
    loss = binary_loss(logits, targets, LossConfig(smoothing=0.1, smoothing_over=over))
    z = logits.detach().double().requires_grad_()
    smooth = torch.where(targets > 0, to_right, to_wrong).double()
    known = -(smooth * z.sigmoid().log() + (1 - smooth) * (1 - z.sigmoid()).log()).sum()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(known.item() / 5, rel=1e-6)
    loss.backward()
    known.backward()
    torch.testing.assert_close(logits.grad.double(), z.grad, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-3)  # type: ignore[union-attr]


def test_the_auxiliary_head_has_its_weight_and_no_image_costs_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, more = torch.randn(2, 6, 5, generator=generator)
    targets, config = torch.randint(2, (6, 5), generator=generator).float(), LossConfig(aux_weight=0.3)
    both = binary_loss((logits, more), targets, config)
    assert both.item() == pytest.approx(
        (binary_loss(logits, targets, config) + 0.3 * binary_loss(more, targets, config)).item()
    )
    assert binary_loss(torch.zeros(0, 5), torch.zeros(0, 5), config).item() == 0


# -------------------------------------------------------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def table(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tiny_data, tmp_path_factory.mktemp("table") / "sets.csv")


@pytest.fixture(scope="module")
def options(table: Path) -> list[str]:
    return [*SEPARATED, "--data.labels", str(table), "--log-steps", "2", "--checkpoint-steps", "1"]


@pytest.fixture(scope="module")
def finished(tiny_data: Path, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one epoch. Not to be changed."""
    folder = tmp_path_factory.mktemp("multilabel") / "run"
    args = ["cifar10", *SMALLEST, "--data.root", str(tiny_data), "--run-dir", str(folder), *options, "--epochs", "1"]
    assert call(train.main, *args) == 0
    return folder


def train_on(run_dir: Path, data: Path, *options: str) -> None:
    """As fasttricks.train, on the ranks that the environment says."""
    from fasttricks.system.distributed import join_world

    with join_world("cpu") as world:
        fit(build(configure(data, run_dir, *options), world))


def test_mixup_mixes_the_labels_as_the_images(tiny_data: Path, options: list[str], tmp_path: Path) -> None:
    """The loss is that of the mixed image, lam of its own labels and 1 - lam of its partner's."""
    run = build(
        configure(tiny_data, tmp_path / "run", *options, "--loss.mixup-alpha", "0.4", "--loss.smoothing", "0"), ALONE
    )
    assert run.task is MULTILABEL
    batch = next(iter(run.train_loader))
    run.step = 3
    lam = run.numbers().lam
    assert lam == draw_lam(0.4, seed=0, step=3, rank=0)
    loss, images = run.task.loss(run, batch, lam)
    with torch.no_grad():
        logits = run.model(lam * batch.images + (1 - lam) * batch.images.flip(0)).float()
    parts = [binary_loss(logits, labels, LossConfig()).item() for labels in (batch.labels, batch.labels.flip(0))]
    assert images == len(batch) and loss.item() == pytest.approx(lam * parts[0] + (1 - lam) * parts[1], rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        (),
        pytest.param(("--precision", "bf16"), marks=pytest.mark.slow),
        pytest.param(("--precision", "fp16", "--optim.backend", "fused"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_is_resumed_in_mid_epoch_bit_for_bit(
    more: tuple[str, ...], tiny_data: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin(folder: str, **changes: Any) -> Any:
        mixed = ("--loss.mixup-alpha", "0.2", "--loss.smoothing", "0.1", "--epochs", "1", *more)
        return build(configure(tiny_data, tmp_path / folder, *options, *mixed, **changes), ALONE)

    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)
    whole = begin("whole")
    fit(whole)
    interrupt(begin("parts"), monkeypatch, at_step=2)
    resumed = begin("parts", resume=True)
    assert resumed.step == 2
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_ranks_give_the_metrics_of_one(count: int, tiny_data: Path, options: list[str], tmp_path: Path) -> None:
    """The scores come together by image: those of the ranks are those that one process measures of the saved weights."""
    folder = tmp_path / "run"
    batch = ("--global-batch-size", "12", "--epochs", "1")
    on_ranks(count, train_on, folder, tiny_data, *options, *batch)
    summary = json.loads((folder / "summary.json").read_text())
    found = ft.evaluate(folder)
    assert summary["ranks"] == count and found["val_images"] == summary["val_images"] == 14
    for name in ("map", "micro_f1", "val_loss"):
        assert summary[name] == pytest.approx(found[name], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- commands
def test_the_header_counts_and_the_run_is_listed(
    finished: Path, tiny_data: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert call(runs.main, str(finished)) == 0
    assert f"map {summary['map']:.2f}  micro_f1 {summary['micro_f1']:.2f}" in capsys.readouterr().out
    assert (
        call(
            train.main,
            "cifar10",
            *SMALLEST,
            "--data.root",
            str(tiny_data),
            "--run-dir",
            str(tmp_path / "a"),
            *options,
            "--epochs",
            "1",
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "images a class (fewest: " in shown and "; 0 to 2 labels an image, 1.2" in shown
    assert f"mAP {summary['map']:.2f} %  micro F1 {summary['micro_f1']:.2f} %" in shown
    assert "--data.balance" not in shown, "it is not for several labels"


def test_evaluate_says_each_class(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    file = tmp_path / "a.json"
    assert call(evaluate.main, str(finished), "--output", str(file), "--eval.batch-size", "3") == 0
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first.startswith(
        f"mAP {summary['map']:.2f} %  micro F1 {summary['micro_f1']:.2f} %  loss {summary['val_loss']:.4f}"
    )
    assert head.split() == ["class", "AP", "precision", "recall", "F1", "images"]
    written = json.loads(file.read_text())
    assert [row["name"] for row in written["classes"]] == ["ant", "bee", "cat", "insect"]
    assert {row.split()[0] for row in rows} == {"ant", "bee", "cat", "insect"}
    known = [row["average_precision"] for row in written["classes"]]
    assert 100 * sum(known) / 4 == pytest.approx(summary["map"]) == pytest.approx(written["metrics"]["map"])
    assert [float(row.split()[1]) for row in rows] == sorted(round(100 * value, 2) for value in known)
    found = ft.evaluate(finished)
    assert found.classes == ("ant", "bee", "cat", "insect") and found["map"] == pytest.approx(summary["map"])
    assert found.answers is not None and metrics_in(found.answers) == dict(found)  # type: ignore[arg-type]


def test_predict_gives_the_sigmoid_of_each_class(
    finished: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((tiny_data / "val" / "bee").iterdir())
    (prediction,) = ft.predict(finished, image)
    shares = [share for _, share in prediction.classes]
    assert {name for name, _ in prediction.classes} == {"ant", "bee", "cat", "insect"}
    assert shares == sorted(shares, reverse=True) and sum(shares) != pytest.approx(1, abs=0.05)
    saved = read_saved(finished)
    config = predict.as_run(saved.config)
    (part,) = predict.load([str(image)], config, ALONE)
    assert part.images is not None
    with torch.no_grad():
        logits = evaluation_logits(saved.network(), part.images, flip=config.flip).double()[0]
    known = dict(zip(saved.classes, logits.sigmoid().tolist(), strict=True))
    assert dict(prediction.classes) == pytest.approx(known)


REFUSED = {
    "report": (report.main, (), "task = 'multilabel': has no answers for a page, which are for classification and segmentation"),
    "evaluate --calibrate": (evaluate.main, ("--calibrate",), "calibrate = True: is for classification alone"),
    "predict --calibrated": (predict.main, ("IMAGE", "--calibrated"), "calibrated = True: is for one label an image"),
    "export --calibrated": (export.main, ("--calibrated", "--no-onnx"), "calibrated = True: is for one label an image"),
    "another kind of labels": (
        evaluate.main,
        ("--data.root", "DATA", "--data.labels", "", "--data.label-separator", ""),
        "data.label_separator = '': must separate the labels of an image, as the checkpoint's task is multilabel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", REFUSED)
def test_what_is_for_one_label_is_refused_in_a_line(
    command: str, finished: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, more, said = REFUSED[command]
    image = str(next((tiny_data / "val" / "bee").iterdir()))
    before = sorted(path.name for path in finished.iterdir())
    assert call(main, str(finished), *({"IMAGE": image, "DATA": str(tiny_data)}.get(word, word) for word in more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    assert sorted(path.name for path in finished.iterdir()) == before


def test_the_task_is_part_of_a_run_and_of_an_export(
    finished: Path, tiny_data: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        "cifar10",
        *SMALLEST,
        "--data.root",
        str(tiny_data),
        "--run-dir",
        str(finished),
        "--epochs",
        "1",
        "--resume",
    ]
    assert call(train.main, *args) == 2
    assert "task: 'multilabel' -> 'classification'" in capsys.readouterr().err
    assert call(export.main, str(finished), "--no-onnx", "--output", str(tmp_path / "export")) == 0
    hub = json.loads((tmp_path / "export" / "config.json").read_text())
    card = (tmp_path / "export" / "README.md").read_text()
    assert hub["problem_type"] == "multi_label_classification" and hub["label_names"] == ["ant", "bee", "cat", "insect"]
    assert "logits.sigmoid()[0]" in card and "softmax" not in card and "mAP" in card
    found = ft.evaluate(tmp_path / "export", {"root": str(tiny_data), "labels": str(table)})
    assert found["map"] == pytest.approx(json.loads((finished / "summary.json").read_text())["map"])


def test_the_card_of_an_export_asks_for_each_class(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its Python, without ONNX's, as it is printed: the probabilities are the sigmoids, those above a half are shown."""
    folder = tmp_path / "export"
    assert call(export.main, str(finished), "--no-onnx", "--output", str(folder)) == 0
    code = blocks(folder)
    capsys.readouterr()
    found = run_blocks(code, folder, monkeypatch)
    torch.testing.assert_close(found["shares"], found["logits"].sigmoid()[0])
    shown = {name: float(share) for name, share in zip(found["names"], found["shares"], strict=True) if share > 0.5}
    assert capsys.readouterr().out == f"{shown}\n" and len(code) == 2


def test_it_is_planned_and_not_ablated(
    tiny_data: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--data.root", str(tiny_data), *options[:6]]
    assert call(plan.main, "cifar10", *place, "--global-batch-size", "16") == 0
    assert "45 of 4 classes" in capsys.readouterr().out
    assert call(ablate.main, "add-one", "cifar10", *place, "--run-dir", str(tmp_path / "a")) == 2
    said = "error: task = 'multilabel': cannot be ablated by add-one, which is of classification; take a recipe of classification"
    assert capsys.readouterr().err.strip() == said and not (tmp_path / "a").exists()


def test_a_classifier_gives_its_backbone_and_is_no_teacher(
    finished: Path, finished_run: Any, tiny_data: Path, options: list[str], tmp_path: Path
) -> None:
    run = build(configure(tiny_data, tmp_path / "run", *options, "--init", str(finished_run.folder)), ALONE)
    before, ours = read_saved(finished_run.folder), run.model.state_dict()
    weights = before.average or before.weights
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights.items() if not name.startswith("fc."))
    with pytest.raises(ConfigError, match=r"distill\.teacher = .*learnt the task multilabel.*give a classifier"):
        build(configure(tiny_data, tmp_path / "b", "--distill.teacher", str(finished)), ALONE)
    assert build_model(run.config.model, 4).state_dict()["fc.bias"].shape == ours["fc.bias"].shape
