"""FP16 with FP32 masters and a loss scale: what it is made of, how near float64 it stays, and what is lost without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttricks.config import ConfigError, ModelConfig, OptimConfig
from fasttricks.learning.optim import build_optimizer, group_lrs, master_of, parameter_groups, set_lr
from fasttricks.learning.precision import (
    LossScale,
    check_precision,
    halve,
    image_dtype,
    make_loss_scale,
    resolve_precision,
)
from fasttricks.models import MODELS, build_model
from fasttricks_kernels import MasterSGD
from lib.syncs import NoHostCopy, NoHostSync

CPU = torch.device("cpu")
OPTIM = OptimConfig(weight_decay=1e-4)


def half_network() -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(name="resnet8d", width=0.125, stem_stride=2, zero_gamma=True)
    return halve(build_model(config, 10).to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def test_auto_is_fp16_on_cuda_and_fp32_on_the_cpu() -> None:
    assert resolve_precision("auto", torch.device("cuda", 1)) == "fp16"
    assert resolve_precision("auto", CPU) == "fp32"
    assert image_dtype("auto", torch.device("cuda")) == image_dtype("fp16", CPU) == torch.float16
    assert image_dtype("bf16", CPU) == image_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_refused_on_a_card_without_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    if supported:
        check_precision("bf16", torch.device("cuda"))
        return
    with pytest.raises(ConfigError, match=r"precision = 'bf16': needs a card with bfloat16 .* take --precision fp16"):
        check_precision("bf16", torch.device("cuda"))


@pytest.mark.parametrize("name", ["resnet18a", "resnet50d"])
def test_convolutions_and_linear_layers_are_fp16_and_batch_norm_is_fp32(name: str) -> None:
    assert name in MODELS
    model = halve(build_model(ModelConfig(name=name, width=0.125), 10))
    for module in model.modules():
        wanted = torch.float32 if isinstance(module, nn.BatchNorm2d) else torch.float16
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        assert {t.dtype for t in tensors if t.is_floating_point()} <= {wanted}, module
    dtypes = [p.dtype for p in model.parameters()]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert dtypes.count(torch.float32) == 2 * norms


# ----------------------------------------------------------------------------------------------------- the loss scale
def flags(*values: int) -> Iterator[Tensor]:
    return (torch.tensor(float(value)) for value in values)


def test_a_dynamic_scale_halves_at_an_overflow_and_doubles_after_steps_without() -> None:
    scale, seen = LossScale(8.0, CPU, growth_steps=3), []
    for overflow in flags(0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0):
        scale.update(overflow)
        seen.append(scale.value.item())
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 4, 2, 2]
    assert scale.report() == {"loss_scale": 2.0, "skipped_steps": 3}


def test_a_static_scale_stays_and_counts() -> None:
    scale = make_loss_scale(OptimConfig(loss_scale=128.0), "fp16", CPU)
    for overflow in flags(0, 1, 1, 0):
        scale.update(overflow)
    assert scale.report() == {"loss_scale": 128.0, "skipped_steps": 2}


def test_the_scale_stops_at_the_ends_of_fp32() -> None:
    scale = LossScale(2.0**-126, CPU, growth_steps=1)
    scale.update(torch.tensor(1.0))
    assert scale.value.item() == 2.0**-126
    scale = LossScale(2.0**126, CPU, growth_steps=1)
    scale.update(torch.tensor(0.0))
    assert scale.value.item() == 2.0**126


def test_a_resumed_scale_goes_on_as_it_stood() -> None:
    config = OptimConfig(loss_scale_steps=3)
    first, second = (make_loss_scale(config, "fp16", CPU) for _ in range(2))
    for overflow in flags(1, 0, 0):
        first.update(overflow)
    second.load_state_dict(first.state_dict())
    for overflow in flags(0, 1, 0):
        first.update(overflow)
        second.update(overflow)
        assert first.report() == second.report()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_no_scale(precision: str) -> None:
    scale = make_loss_scale(OptimConfig(loss_scale=128.0), precision, CPU)  # type: ignore[arg-type]
    assert scale.value.item() == 1.0
    assert scale.report() == {}


# ------------------------------------------------------------------------------------------------ a step that overflows
class Trainee(NamedTuple):
    """An FP16 network and what updates it."""

    model: nn.Module
    optimizer: MasterSGD
    scale: LossScale

    def step(self, images: Tensor, labels: Tensor, lr: float = 0.05) -> Tensor:
        loss = functional.cross_entropy(self.model(images.half()).float(), labels, label_smoothing=0.1)
        torch.autograd.backward(loss * self.scale.value)
        set_lr(self.optimizer, group_lrs(self.optimizer, lr))
        self.scale.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def weights(self) -> list[Tensor]:
        """Copies of all that a step changes but batch-norm statistics."""
        state = [value for p in self.model.parameters() for value in self.optimizer.state[p].values()]
        return [value.detach().clone() for value in (*self.model.parameters(), *state)]


def trainee(config: OptimConfig = OPTIM) -> Trainee:
    model = half_network()
    optimizer = build_optimizer(model, config, "fp16")
    assert isinstance(optimizer, MasterSGD)
    return Trainee(model, optimizer, make_loss_scale(config, "fp16", CPU))


CENTRES = torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def batches(count: int, size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of ten classes that can be told apart: a pattern a class, under noise."""
    draws = torch.Generator().manual_seed(2)
    for _ in range(count):
        labels = torch.randint(0, 10, (size,), generator=draws)
        noise = torch.randn(size, 3, 12, 12, generator=draws)
        images = functional.interpolate(CENTRES[labels], size=12) + noise
        yield images.contiguous(memory_format=torch.channels_last), labels


def test_gradients_that_overflow_skip_exactly_that_step_and_halve_the_scale() -> None:
    """Beside a run that never saw the batch: all weights, masters and momenta are the same, bit for bit."""
    first, poisoned, last = batches(3)
    run, twin = trainee(), trainee()
    for who in (run, twin):
        who.step(*first)
    statistics = {name: value.clone() for name, value in run.model.named_buffers()}
    before = run.scale.value.item()
    run.scale.value.fill_(2.0**40)
    loss = run.step(*poisoned)
    assert loss.isfinite(), "the gradients shall overflow, not the loss"
    assert run.scale.value.item() == 2.0**39
    assert run.scale.report()["skipped_steps"] == 1
    assert all(map(torch.equal, run.weights(), twin.weights()))
    run.scale.value.fill_(before)
    for name, value in run.model.named_buffers():  # batch norm saw the batch; it is not the optimizer's to undo
        value.copy_(statistics[name])
    for who in (run, twin):
        who.step(*last)
    assert all(map(torch.equal, run.weights(), twin.weights()))
    assert run.scale.report()["skipped_steps"] == 1


def test_neither_an_update_nor_a_skip_waits_for_the_device() -> None:
    run = trainee()
    good, bad = batches(2)
    run.step(*good)
    with NoHostCopy(), NoHostSync():
        run.step(*good)
        run.scale.value.fill_(2.0**40)
        run.step(*bad)
    assert run.scale.report()["skipped_steps"] == 1


def test_a_power_of_two_changes_no_bit() -> None:
    results = []
    for scale in (2.0**10, 2.0**14):
        run = trainee(OptimConfig(loss_scale=scale))
        for batch in batches(3):
            run.step(*batch)
        results.append(run)
    # the classifier's gradients are far from both ends of FP16's normal range at either scale
    a, b = (dict(r.model.named_parameters()) for r in results)
    assert torch.equal(a["fc.weight"], b["fc.weight"])


# ----------------------------------------------------------------------------------- beside float64, and what is lost without
def distance(model: list[Tensor], twin: nn.Module, start: nn.Module) -> float:
    """How far `model` is from `twin`, in units of how far `twin` has come from `start`."""
    there, begin = ([p.detach() for p in network.parameters()] for network in (twin, start))
    gone = [a.detach().double() - b for a, b in zip(model, there, strict=True)]
    came = [a - b for a, b in zip(begin, there, strict=True)]
    norms = [torch.stack([t.square().sum() for t in tensors]).sum().sqrt() for tensors in (gone, came)]
    return float(norms[0] / norms[1])


def plain_sgd(model: nn.Module) -> torch.optim.SGD:
    groups = parameter_groups(model, weight_decay=OPTIM.weight_decay, bias_decay=False)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, foreach=False, fused=False)


class Steps(NamedTuple):
    """200 steps at a small learning rate, as at the end of a cosine, in FP16 with masters, without, and in float64."""

    losses: list[list[float]]
    with_masters: float
    without_masters: float


@pytest.fixture(scope="module")
def two_hundred_steps() -> Steps:
    lr, run = 2e-4, trainee()
    twin, bare = copy.deepcopy(run.model).double(), copy.deepcopy(run.model)
    start = copy.deepcopy(twin)
    others = [(model, plain_sgd(model)) for model in (twin, bare)]
    losses = []
    for images, labels in batches(200):
        # what FP16 cannot hold of an image is not what is compared
        row = [run.step(images, labels, lr).item()]
        for model, optimizer in others:
            logits = model(images.half().to(next(model.parameters()).dtype))
            loss = functional.cross_entropy(logits.double(), labels, label_smoothing=0.1)
            loss.backward()
            set_lr(optimizer, group_lrs(optimizer, lr))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row.append(loss.item())
        losses.append(row)
    masters = [master_of(run.optimizer, p) for p in run.model.parameters()]
    return Steps(losses, distance(masters, twin, start), distance(list(bare.parameters()), twin, start))


@pytest.mark.slow
def test_with_masters_200_steps_stay_within_3_percent_of_float64(two_hundred_steps: Steps) -> None:
    assert two_hundred_steps.with_masters < 0.03
    losses = torch.tensor(two_hundred_steps.losses)
    assert (losses[:, 0] - losses[:, 1]).abs().max() < 4e-3
    assert losses[-20:, 1].mean() < losses[:20, 1].mean() - 0.05, "the twin hardly learned: nothing was shown"


@pytest.mark.slow
def test_without_masters_small_updates_are_lost(two_hundred_steps: Steps) -> None:
    """The same steps on FP16 weights alone end far from float64: an update below half a unit in the last place rounds away."""
    assert two_hundred_steps.without_masters > 0.2


def stem_gradient(model: nn.Module, images: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Gradient of the output of the stem's second convolution: a rank's 32 images in a step of 1024."""
    found: list[Tensor] = []
    layer = model.conv1[3]  # type: ignore[index]
    hook = layer.register_forward_hook(lambda module, args, out: out.register_hook(found.append) and None)
    loss = functional.cross_entropy(model(images).to(torch.float64), labels, reduction="sum") / 1024
    torch.autograd.backward(loss * scale)
    hook.remove()
    return found[0]


def test_without_a_loss_scale_small_gradients_are_lost() -> None:
    """Share of the elements that are 0 in FP16 and not in float64."""
    model = half_network()
    twin = copy.deepcopy(model).double()
    draws = torch.Generator().manual_seed(3)
    images = torch.randn(32, 3, 32, 32, generator=draws).half().contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (32,), generator=draws)
    exact = stem_gradient(twin, images.double(), labels, 1.0)
    lost = {}
    for scale in (1.0, 2.0**16):
        half = stem_gradient(model, images, labels, scale)
        assert half.dtype == torch.float16
        assert half.isfinite().all()
        lost[scale] = float(((half == 0) & (exact != 0)).sum() / (exact != 0).sum())
    assert lost[1.0] > 0.05, lost
    assert lost[2.0**16] < 1e-3, lost
