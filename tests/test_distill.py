"""Distillation: the loss and a step against torch in float64, the teacher's own rules, what is refused, and resuming."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttricks.commands import train
from fasttricks.config import ConfigError, DataConfig, DistillConfig, LossConfig, UserError
from fasttricks.data.batch import Batch
from fasttricks.learning.teacher import Teacher, load_teacher, weights_digest
from fasttricks.planning.planner import PlanConfig, make_plan
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.saved import read_saved
from fasttricks.tasks.classification import evaluate
from fasttricks.tasks.losses import Targets, training_loss
from fasttricks.trainer import fit, train_step
from fasttricks.training.run import Run
from lib.runs import final_state, groups, interrupt, records
from lib.states import same
from lib.syncs import NoHostCopy, NoHostSync
from lib.tiny import ALONE, arguments, call, configure

K = 3


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("hard", "soft"), [(1.0, 1.0), (0.5, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_loss_and_gradient_are_those_of_section_5_3_in_float64(hard: float, soft: float, mixed: bool) -> None:
    """Against F.kl_div and dense targets: T^2 KL(teacher || student) is the paper's cross-entropy less T^2 x its entropy."""
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(6, K, generator=generator).mul(4) for _ in range(2))
    labels, labels_b, lam, temperature = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 1, 0, 0, 2, 1]), 0.3, 5.0
    targets = Targets(labels, labels_b, lam, teacher) if mixed else Targets(labels, teacher_logits=teacher)
    distill = DistillConfig(teacher="x", temperature=temperature, hard_weight=hard, soft_weight=soft)
    logits.requires_grad_()
    loss = training_loss(logits, targets, LossConfig(smoothing=0.1, smoothing_over="all"), distill)
    (gradient,) = torch.autograd.grad(loss, logits)
    plain = logits.detach().double().requires_grad_()
    one_hot = partial(F.one_hot, num_classes=K)
    dense = one_hot(labels) * (lam if mixed else 1.0) + one_hot(labels_b) * (1 - lam if mixed else 0.0)
    of_labels = F.cross_entropy(plain, dense.double(), label_smoothing=0.1, reduction="sum")
    of_teacher = F.kl_div(
        F.log_softmax(plain / temperature, 1), F.softmax(teacher.double() / temperature, 1), reduction="sum"
    )
    wanted = hard * of_labels + soft * temperature**2 * of_teacher
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(wanted, plain)[0], rtol=1e-5, atol=1e-6)


def test_the_auxiliary_head_learns_from_the_labels_alone() -> None:
    logits, auxiliary, teacher = torch.randn(3, 4, K, generator=torch.Generator().manual_seed(0)).unbind()
    labels, config, distill = torch.tensor([0, 1, 2, 0]), LossConfig(aux_weight=0.3), DistillConfig(teacher="x")
    with_head = training_loss((logits, auxiliary), Targets(labels, teacher_logits=teacher), config, distill)
    without = training_loss(logits, Targets(labels, teacher_logits=teacher), config, distill)
    expected = 0.3 * F.cross_entropy(auxiliary, labels, reduction="sum")
    torch.testing.assert_close(with_head - without, expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- the step


def test_a_step_is_plain_sgd_on_the_papers_loss_of_the_mixed_images(
    start: Callable[..., Run], teacher_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own losses and unfused SGD, the teacher restored apart and shown what the student saw."""
    seen: list[Tensor] = []
    run = start("--loss.mixup-alpha", "0.5", "--distill.teacher", str(teacher_run), "--ema-decay", "0")
    student = restore_like(run)
    run.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    batch, before = next(groups(run))[0], {key: value.clone() for key, value in run.model.state_dict().items()}
    train_step(run, [batch])
    lam = mixing_factor(seen[0], batch)
    assert 0.01 < lam < 0.99, "nothing was mixed"
    teacher = read_saved(teacher_run).network()
    with torch.no_grad():
        soft = F.softmax(teacher(seen[0]) / 20, 1)
    logits = student(seen[0])
    one_hot = F.one_hot(batch.labels, K).float()
    labels = lam * one_hot + (1 - lam) * one_hot.flip(0)
    smoothing = run.config.loss.smoothing
    labels = labels * (1 - smoothing) + (1 - labels) * smoothing / (K - 1)
    loss = F.cross_entropy(logits, labels) + 400 * F.cross_entropy(logits / 20, soft)
    loss.backward()
    config, lr = run.config.optim, run.lr_at(0)
    for name, parameter in student.named_parameters():
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        step = parameter.grad + decay * before[name]
        wanted = before[name] - lr * (1 + config.momentum) * step
        got = run.model.state_dict()[name]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def restore_like(run: Run) -> nn.Module:
    """A twin of the run's network as it stands."""
    return copy.deepcopy(run.model)


def mixing_factor(mixed: Tensor, batch: Batch) -> float:
    """The lambda that makes `mixed` of the batch and itself reversed."""
    a, b = batch.images, batch.images.flip(0)
    return float(((mixed - b) * (a - b)).sum() / ((a - b) ** 2).sum())


def test_the_teacher_is_frozen_and_in_evaluation_mode(start: Callable[..., Run], teacher_run: Path) -> None:
    run = start("--distill.teacher", str(teacher_run))
    assert run.teacher is not None
    before = {key: value.clone() for key, value in run.teacher.state_dict().items()}
    for group in groups(run):
        train_step(run, group)
    assert not any(module.training for module in run.teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in run.teacher.state_dict().items())
    owned = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert not owned & {id(p) for p in run.teacher.parameters()}


def test_the_averaged_weights_teach_where_the_run_kept_an_average(teacher_run: Path) -> None:
    state = load_checkpoint(teacher_run)
    teacher = load_teacher(
        DistillConfig(teacher=str(teacher_run)), state["classes"], DataConfig(image_size=32, val_resize=32), ALONE
    )
    assert torch.equal(teacher.model.fc.weight, state["average"]["fc.weight"])
    assert not torch.equal(teacher.model.fc.weight, state["model"]["fc.weight"])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_step_with_a_teacher_never_waits_in_any_precision(
    precision: str, start: Callable[..., Run], teacher_run: Path
) -> None:
    run = start("--distill.teacher", str(teacher_run), "--loss.mixup-alpha", "0.2", "--precision", precision)
    group = next(groups(run))
    train_step(run, group)
    with NoHostSync(), NoHostCopy():
        train_step(run, group)
    assert all(bool(value.isfinite().all()) for value in run.model.state_dict().values())


def test_an_empty_batch_has_no_loss(start: Callable[..., Run], teacher_run: Path) -> None:
    run = start("--distill.teacher", str(teacher_run))
    assert run.teacher is not None
    logits = run.teacher(torch.empty(0, 3, 32, 32))
    assert training_loss(logits, Targets(torch.empty(0, dtype=torch.int64), teacher_logits=logits), LossConfig()) == 0


@pytest.mark.slow
def test_a_student_learns_from_the_teacher_alone(start: Callable[..., Run], teacher_run: Path) -> None:
    """With no weight on the labels, its outputs approach the teacher's: the loss is what is left of their difference."""
    args = ["--distill.teacher", str(teacher_run), "--distill.hard-weight", "0", "--optim.base-lr", "0.2"]
    run = start(*args, epochs=8)
    fit(run)
    losses = [r["train_loss"] for r in records(run) if "train_loss" in r]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


# ------------------------------------------------------------------------------------------------------- normalisation


@pytest.fixture
def timm_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, nn.Module]]:
    """Gives timm a small network's weights, from a file, as it keeps those that it downloads."""
    timm = pytest.importorskip("timm")

    def make(**trained: Any) -> tuple[str, nn.Module]:
        torch.manual_seed(5)
        model = timm.create_model("test_resnet", num_classes=K).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        file = tmp_path / "weights.pth"
        torch.save(model.state_dict(), file)
        default = timm.models.get_pretrained_cfg("test_resnet").to_dict()
        own = {**default, "file": str(file), "num_classes": K, "hf_hub_id": None, "url": "", **trained}
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, **more: create(name, **more, pretrained_cfg=own))
        return "timm:test_resnet", model

    return make


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IN_HALVES = {"mean": (127.5,) * 3, "std": (127.5,) * 3}


@pytest.mark.parametrize(
    ("statistics", "student", "converted"),
    [(IMAGENET, {}, False), (HALF, {}, True), (HALF, IN_HALVES, False), (IMAGENET, IN_HALVES, True)],
)
def test_a_teacher_of_timms_sees_its_own_normalisation(
    statistics: dict[str, Any],
    student: dict[str, Any],
    converted: bool,
    timm_teacher: Callable[..., tuple[str, nn.Module]],
) -> None:
    """Against the very pixels: what it makes of ours is what timm's network makes of (pixel - mean) / std."""
    name, plain = timm_teacher(**statistics)
    data = DataConfig(image_size=32, val_resize=32, **student)
    teacher = load_teacher(DistillConfig(teacher=name), ["ant", "bee", "cat"], data, ALONE)
    assert (teacher.conversion is not None) == converted
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    mean, std = (torch.tensor(statistics[key]).view(3, 1, 1) for key in ("mean", "std"))
    ours = ((pixels - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)).float()
    ours = ours.contiguous(memory_format=torch.channels_last)
    expected = plain((pixels / 255 - mean) / std)
    # without a conversion mean and std may be off by half a grey level, which is 0.9 % of a standard deviation
    tolerance = 1e-5 if converted else 0.01
    torch.testing.assert_close(teacher(ours), expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))
    mixed = 0.3 * ours + 0.7 * ours.flip(0)
    pixels_mixed = 0.3 * pixels + 0.7 * pixels.flip(0)
    expected = plain((pixels_mixed / 255 - mean) / std)
    torch.testing.assert_close(teacher(mixed), expected, rtol=0, atol=tolerance * float(expected.detach().abs().max()))


def test_half_precision_is_close_to_full(teacher_run: Path) -> None:
    timm = pytest.importorskip("timm")
    model = read_saved(teacher_run).network()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model(images)
    statistics = ([127.5] * 3, [127.5] * 3)
    half = Teacher(model, name="", digest="", device=torch.device("cpu"), dtype=torch.float16, statistics=statistics)
    assert half.conversion is not None
    factor, shift = (x.float() for x in half.conversion)
    logits = half((images - shift) / factor)
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), expected, rtol=0.01, atol=0.01 * float(expected.detach().abs().max()))
    vit = timm.create_model("test_vit", num_classes=K)
    half = Teacher(vit, name="", digest="", device=torch.device("cpu"), dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


# ------------------------------------------------------------------------------------------------------- what is refused


def refused(match: str, **distill: Any) -> None:
    classes, size = distill.pop("classes", ["ant", "bee", "cat"]), distill.pop("image_size", 32)
    with pytest.raises(UserError, match=match):
        load_teacher(DistillConfig(**distill), classes, DataConfig(image_size=size, val_resize=size), ALONE)


def test_a_teacher_of_other_classes_is_refused(
    teacher_run: Path, timm_teacher: Callable[..., tuple[str, nn.Module]]
) -> None:
    run, name = str(teacher_run), timm_teacher()[0]
    refused(
        r"distill\.teacher = .*run': knows 3 classes, the training images have 2", teacher=run, classes=["ant", "bee"]
    )
    refused(r"must know the classes .* does not know dog", teacher=run, classes=["dog", "ant", "cat"])
    refused(r"timm:test_resnet': knows 3 classes, the training images have 2", teacher=name, classes=["ant", "bee"])


def test_a_teacher_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    refused(r"distill\.teacher: checkpoint = '.*gone': must be a file.*train it first", teacher=str(tmp_path / "gone"))
    refused(r"'timm:resnet50x': is no model of timm", teacher="timm:resnet50x")
    without = next(name for name in timm.list_models("resnet*") if not timm.models.get_pretrained_cfg(name).has_weights)
    refused(r"'timm:.*': timm finds no trained weights of it \(.*take a checkpoint", teacher=f"timm:{without}")
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(r"needs timm; install it with: pip install timm", teacher="timm:resnet18d")


def test_a_teacher_that_cannot_take_the_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_vit", num_classes=K)
    monkeypatch.setattr("fasttricks.learning.teacher.pretrained_timm_model", lambda name, field: (model, None))
    refused(r"takes no images of data\.image_size \(40\) pixels", teacher="timm:test_vit", image_size=40)


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.slow
def test_a_distilled_run_goes_on_bit_for_bit_wherever_its_teacher_lies(
    start: Callable[..., Run], teacher_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere.pt"
    moved.write_bytes(
        next((teacher_run / "checkpoints").glob("*4.pt"), max((teacher_run / "checkpoints").iterdir())).read_bytes()
    )
    begin = partial(start, "--loss.mixup-alpha", "0.2", epochs=3)
    whole = begin("--distill.teacher", str(teacher_run))
    fit(whole)
    folder = tmp_path / "stopped"
    interrupt(begin("--distill.teacher", str(teacher_run), run_dir=folder), monkeypatch, at_step=4)
    resumed = begin("--distill.teacher", str(moved), run_dir=folder, resume=True)
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)
    digest = json.loads((folder / "config.json").read_text())["config"]["distill"]["digest"]
    assert digest == weights_digest(read_saved(moved).network()) != ""


def test_another_teacher_is_refused_on_resume(
    start: Callable[..., Run], teacher_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    other, folder = tmp_path / "other", tmp_path / "run"
    assert call(train.main, *arguments(tiny_data, other, "--seed", "9", "--epochs", "1")) == 0
    start("--distill.teacher", str(teacher_run), run_dir=folder).log.close()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')  # else there is nothing to lose
    with pytest.raises(
        ConfigError, match=r"its own config; changed: distill\.digest: '[0-9a-f]{16}' -> '[0-9a-f]{16}'"
    ):
        start("--distill.teacher", str(other), run_dir=folder, resume=True)
    with pytest.raises(ConfigError, match=r"changed: distill\.digest: '[0-9a-f]{16}' -> ''"):
        start(run_dir=folder, resume=True)
    with pytest.raises(
        ConfigError, match=r"distill\.digest = 'abc': the teacher's weights .* not the weights of the run so far"
    ):
        start("--distill.teacher", str(other), "--distill.digest", "abc", run_dir=tmp_path / "third")


def test_one_bit_of_a_weight_changes_the_digest(teacher_run: Path) -> None:
    model = read_saved(teacher_run).network()
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model.fc.bias[0] = torch.nextafter(model.fc.bias[0], torch.tensor(1.0))
    assert weights_digest(model) != before


# ------------------------------------------------------------------------------------------------------- what is shown


def test_the_header_names_teacher_and_weights(
    start: Callable[..., Run], teacher_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start("--distill.teacher", str(teacher_run), "--distill.soft-weight", "0.5")
    assert run.teacher is not None
    line = f"teacher  resnet8d {run.teacher.digest} from {teacher_run}; 1 x labels + 0.5 x T^2 x teacher, T = 20"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_plan_counts_the_teacher(teacher_run: Path, tiny_data: Path) -> None:
    def plan(*more: str) -> Any:
        values = vars(configure(tiny_data, Path("x"), *more))
        return make_plan(PlanConfig(**values, gpus=1)).footprint

    alone, taught = plan(), plan("--distill.teacher", str(teacher_run))
    weights = read_saved(teacher_run).network()
    halved = sum(t.nbytes // (2 if t.dim() > 1 or n.startswith("fc.") else 1) for n, t in weights.state_dict().items())
    assert taught.at_peak["teacher"] == halved
    assert alone.at_peak["teacher"] == 0
    # forward of a network twice as wide; the student's own is a third of its step
    assert taught.flops > alone.flops * 2


def test_a_distilled_checkpoint_is_an_ordinary_one(
    start: Callable[..., Run], teacher_run: Path, tmp_path: Path
) -> None:
    run = start("--distill.teacher", str(teacher_run), epochs=1)
    summary = fit(run)
    state = load_checkpoint(run.folder)
    assert set(state["model"]) == set(run.model.state_dict())
    metrics = evaluate(read_saved(run.folder).network(), run.val_loader, ALONE, flip=run.config.eval.flip)
    assert metrics["top1"] == summary["top1"]
