"""Parameter groups of every model, one update against torch's SGD and float64, the average against float64 and torch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from fasttricks.config import Backend, ConfigError, ModelConfig, OptimConfig, Precision
from fasttricks.learning.optim import (
    WeightAverage,
    apex_sgd,
    build_optimizer,
    group_lrs,
    master_state_dict,
    parameter_groups,
    set_lr,
)
from fasttricks.learning.precision import halve
from fasttricks.models import MODELS, build_model
from fasttricks_kernels import MasterSGD
from lib.card import CARD, card
from lib.tables import mostly_slow


def names_by_decay(model: nn.Module, *, bias_decay: bool = False) -> dict[float, list[str]]:
    """Weight decay -> names of the parameters that have it, in the model's own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.5, bias_decay=bias_decay)
    found: dict[float, list[str]] = {}
    for group in groups:
        assert isinstance(group["weight_decay"], float)
        assert isinstance(group["params"], list)
        found[group["weight_decay"]] = [names[parameter] for parameter in group["params"]]
    return found


# --------------------------------------------------------------------------------------------- parameter groups


def layers(depth: int, letter: str) -> int:
    """Convolutions and FC layers of a ResNet, counted from the paper's table of the architecture.

    `depth` counts the stem, the blocks' convolutions and the FC layer; projections on the shortcut come on top, one a
    stage but for the first of the basic blocks, whose input has its width already. C and D have three stem layers for one.
    """
    stages = 3 if depth == 8 else 4
    projections = stages if depth >= 50 else stages - 1
    return depth + projections + (2 if letter in "cd" else 0)


COUNTED = {
    "inception_v3": 94 + 1,  # torchvision's: 94 convolutions and the classifier
    "cifarnet": 1 + 3 * 2 + 1,
    "mobilenet_v1": 1 + 13 * 2 + 1,  # the paper's table 1: stem, depthwise and pointwise by turns, classifier
}


@pytest.mark.parametrize(
    "name", mostly_slow(MODELS, *(name for name in MODELS if not name.startswith(("resnet101", "resnet152"))))
)
def test_convolutions_and_fc_weights_alone_decay(name: str) -> None:
    """By count, and by number of dimensions: in these networks a kernel or matrix is a weight, a vector is not."""
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name), 10)
    found = names_by_decay(model)
    by_rank = {0.5: [n for n, p in model.named_parameters() if p.ndim > 1]}
    by_rank[0.0] = [n for n, p in model.named_parameters() if p.ndim == 1]
    assert found == by_rank
    num_layers = COUNTED.get(name) or layers(int(name[6:-1]), name[-1])
    # each convolution has a batch norm with gamma and beta, the FC layer a bias
    assert [len(found[0.5]), len(found[0.0])] == [num_layers, 2 * (num_layers - 1) + 1]


@pytest.mark.parametrize("depth", [18, 50])
def test_groups_name_the_parameters_of_torchvisions_model(depth: int) -> None:
    import torchvision

    with torch.device("meta"):
        model, theirs = (
            build_model(ModelConfig(name=f"resnet{depth}b"), 1000),
            getattr(torchvision.models, f"resnet{depth}")(),
        )
    weights = [
        n
        for n, _ in theirs.named_parameters()
        if n.endswith("weight") and ("conv" in n or "fc" in n or "downsample.0" in n)
    ]
    assert names_by_decay(model)[0.5] == weights
    assert set(names_by_decay(model)[0.0]) == {n for n, _ in theirs.named_parameters()} - set(weights)


def test_bias_decay_gives_one_group_of_all() -> None:
    model = build_model(ModelConfig(name="resnet18a", width=0.125), 10)
    assert names_by_decay(model, bias_decay=True) == {0.5: [n for n, _ in model.named_parameters()]}


def test_the_split_asks_for_the_type_and_not_for_the_shape() -> None:
    """A 1 x 1 ... x 1 scale or an embedding has many dimensions and is no layer's weight; a 1-D convolution's is."""
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(1, 1, 1))
    model.embedding = nn.Embedding(3, 4)
    model.conv = nn.Conv1d(2, 3, 1)
    model.transposed = nn.ConvTranspose2d(2, 3, 1)
    model.norm = nn.GroupNorm(1, 3)
    found = names_by_decay(model)
    assert found[0.5] == ["conv.weight", "transposed.weight"]
    assert set(found[0.0]) == {"scale", "embedding.weight", "conv.bias", "transposed.bias", "norm.weight", "norm.bias"}


def test_a_shared_weight_counts_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    groups = parameter_groups(nn.Sequential(first, second), weight_decay=0.1, bias_decay=False)
    assert [[id(p) for p in g["params"]] for g in groups] == [[id(first.weight)], [id(first.bias)]]  # type: ignore[attr-defined]


def test_an_empty_group_is_left_out() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), weight_decay=0.1, bias_decay=False)) == 1
    assert len(parameter_groups(nn.BatchNorm2d(2), weight_decay=0.1, bias_decay=False)) == 1


# ---------------------------------------------------------------------------------------------------- the update


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def gradients(model: nn.Module, steps: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=generator) for p in model.parameters()]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("bias_decay", [False, True])
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_updates_are_the_formulas_in_float64(momentum: float, bias_decay: bool, backend: Backend) -> None:
    """Three steps at changing rates, so that the momentum is in use; and no further off than torch's own unfused SGD."""
    config = OptimConfig(momentum=momentum, weight_decay=0.05, bias_decay=bias_decay, backend=backend)
    model, plain = small_model(), small_model()
    optimizer = build_optimizer(model, config)
    decays = [0.05 if bias_decay or p.ndim > 1 else 0.0 for p in plain.parameters()]
    groups = [{"params": [p], "weight_decay": d} for p, d in zip(plain.parameters(), decays, strict=True)]
    unfused = torch.optim.SGD(groups, lr=0.1, momentum=momentum, nesterov=momentum > 0, foreach=False)
    weights = [p.detach().double().numpy().copy() for p in model.parameters()]
    velocities = [np.zeros_like(w) for w in weights]
    for lr, grads in zip((0.1, 0.4, 0.02), gradients(model, 3), strict=True):
        for sgd, net in ((optimizer, model), (unfused, plain)):
            set_lr(sgd, group_lrs(sgd, lr))
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter.grad = grad.clone()
            sgd.step()
        for index, (decay, grad) in enumerate(zip(decays, grads, strict=True)):
            g = grad.double().numpy() + decay * weights[index]
            velocities[index] = momentum * velocities[index] + g
            weights[index] -= lr * (g + momentum * velocities[index])
    for got, torchs, want in zip(model.parameters(), plain.parameters(), weights, strict=True):
        truth = torch.from_numpy(want)
        error, torch_error = (got.double() - truth).abs().max(), (torchs.double() - truth).abs().max()
        assert error <= torch_error + 2**-22 * truth.abs().max()


def test_the_rate_is_0_until_it_is_set_and_then_that_of_every_group() -> None:
    optimizer = build_optimizer(small_model(), OptimConfig())
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    set_lr(optimizer, group_lrs(optimizer, 0.3))
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


def test_the_state_loads_into_an_optimizer_of_the_same_model() -> None:
    model = small_model()
    optimizer = build_optimizer(model, OptimConfig())
    set_lr(optimizer, group_lrs(optimizer, 0.1))
    for parameter, grad in zip(model.parameters(), next(gradients(model, 1)), strict=True):
        parameter.grad = grad
    optimizer.step()
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, OptimConfig())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch's own would share the momentum
    for net, sgd in ((model, optimizer), (twin, resumed)):
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_backends_by_precision() -> None:
    def made(backend: Backend, precision: Precision) -> type:
        return type(build_optimizer(small_model(), OptimConfig(backend=backend), precision))

    assert made("auto", "fp32") is made("auto", "bf16") is made("torch", "fp32") is torch.optim.SGD
    assert made("auto", "fp16") is made("fused", "fp16") is made("fused", "fp32") is MasterSGD


@pytest.mark.parametrize("backend", ["torch", "apex"])
def test_a_backend_without_masters_refuses_fp16(backend: Backend) -> None:
    with pytest.raises(
        ConfigError, match=rf"optim.backend = '{backend}': keeps no FP32 masters .*--optim.backend fused"
    ):
        build_optimizer(small_model(), OptimConfig(backend=backend), "fp16")


def test_a_checkpoint_has_the_masters_of_fp16_weights() -> None:
    model = halve(small_model())
    optimizer = build_optimizer(model, OptimConfig(), "fp16")
    set_lr(optimizer, group_lrs(optimizer, 1e-5))  # below FP16's resolution for most of the weights
    for parameter, grad in zip(model.parameters(), next(gradients(model, 1)), strict=True):
        parameter.grad = grad.to(parameter.dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.step()
    state = master_state_dict(model, optimizer)
    assert list(state) == list(model.state_dict())
    assert {value.dtype for name, value in state.items() if name != "1.num_batches_tracked"} == {torch.float32}
    half_moved, master_moved = (
        (now["0.weight"] != before["0.weight"]).float().mean() for now in (model.state_dict(), state)
    )
    assert master_moved > 0.99 > half_moved + 0.3
    other = halve(small_model())
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)), "rounded alike"


# ---------------------------------------------------------------------------------------------------------- apex


def install_apex(monkeypatch: pytest.MonkeyPatch, *, optimizers: object) -> None:
    """A package named apex; its module apex.optimizers as given, None: it has none."""
    package = ModuleType("apex")
    package.__path__ = []
    package.__spec__ = ModuleSpec("apex", None, is_package=True)
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)  # type: ignore[arg-type]


def test_apex_needs_cuda() -> None:
    with pytest.raises(ConfigError, match=r"optim.backend = 'apex': needs a CUDA device; take --optim.backend torch"):
        build_optimizer(small_model(), OptimConfig(backend="apex"))


def test_apex_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"NVIDIA's apex is not installed; docs/distributed.md says how to build it"):
        apex_sgd([], lr=0.0)


def test_pypis_unrelated_apex_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    install_apex(monkeypatch, optimizers=None)
    with pytest.raises(ConfigError, match=r"is not NVIDIA's.*PyPI's apex is an unrelated project: pip uninstall apex"):
        apex_sgd([], lr=0.0)


def test_apex_without_its_cuda_extensions_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_sgd(*args: object, **options: object) -> None:
        raise RuntimeError("apex.optimizers.FusedSGD requires cuda extensions")

    install_apex(monkeypatch, optimizers=SimpleNamespace(FusedSGD=fused_sgd))
    with pytest.raises(ConfigError, match=r"built without its CUDA extensions \(apex.optimizers.FusedSGD requires"):
        apex_sgd([], lr=0.0)


def test_nvidias_apex_gets_the_groups_and_nesterov(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's SGD in the place of FusedSGD, which needs a GPU."""

    def fused_sgd(groups: object, *, set_grad_none: bool, **options: object) -> torch.optim.SGD:
        assert set_grad_none, "its zero_grad() takes no argument"
        return torch.optim.SGD(groups, **options)  # type: ignore[arg-type]

    install_apex(monkeypatch, optimizers=SimpleNamespace(FusedSGD=fused_sgd))
    with torch.device("meta"):
        model = small_model()
    monkeypatch.setattr("fasttricks.learning.optim.device_of", lambda model: torch.device("cuda"))
    optimizer = build_optimizer(model, OptimConfig(backend="apex", weight_decay=0.05))
    assert [(g["weight_decay"], g["momentum"], g["nesterov"]) for g in optimizer.param_groups] == [
        (0.05, 0.9, True),
        (0.0, 0.9, True),
    ]


# ------------------------------------------------------------------------------------------------------- average


def walk(model: nn.Module, steps: int) -> Iterator[None]:
    """Random updates of weights and batch-norm statistics, as training would make them."""
    torch.manual_seed(2)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model(torch.randn(2, 3, 4, 4))
        yield


def test_the_average_is_the_formulas_in_float64() -> None:
    model = small_model()
    average = WeightAverage(model, decay=0.6)
    want = {k: v.double().clone() for k, v in model.state_dict().items()}
    decays = []
    for n, _ in enumerate(walk(model, 12)):
        average.update()
        d = min(0.6, (1 + n) / (10 + n))
        decays.append(d)
        want = {k: d * want[k] + (1 - d) * v.double() for k, v in model.state_dict().items()}
    assert decays[0] == 0.1
    assert decays[-1] == pytest.approx(12 / 21)
    got = average.model.state_dict()
    assert "1.running_var" in got
    assert average.num_updates == 12
    for name, value in got.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), want[name], rtol=1e-6, atol=1e-6)
    assert got["1.num_batches_tracked"] == 12  # a counter is copied, not averaged
    assert not any(p.requires_grad for p in average.model.parameters())


class Operators(TorchDispatchMode):
    """The names of those that change something in place."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_device", [False, True])
def test_on_a_card_it_is_one_launch_with_a_gain_of_either_place(on_device: bool) -> None:
    """And one for the counters. In float64 too it is the formula's, for every gain of a run's start."""
    with card():
        model = small_model().to(CARD)
        average = WeightAverage(model, decay=0.95)
        want = {name: value.double() for name, value in host_of(model).items()}
        for n in range(12):
            with torch.no_grad():
                for value in model.state_dict().values():
                    value.add_(1 if not value.is_floating_point() else torch.full_like(value, 0.1 * n))
            gain = average.gain
            average.num_updates += 1
            with Operators() as operators:
                average.blend(torch.tensor(gain, dtype=torch.float32, device=CARD) if on_device else gain)
            assert operators.names == ["sgd_step", "_foreach_copy_"]
            want = {k: (1 - gain) * want[k] + gain * v.double() for k, v in host_of(model).items()}
        got = host_of(average.model)
    counters = [name for name, value in got.items() if not value.is_floating_point()]
    assert [got.pop(name).item() for name in counters] == [12] * len(counters) != []
    for name, value in got.items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-6, atol=1e-6)


def host_of(model: nn.Module) -> dict[str, Any]:
    """Its values as they are now."""
    return {name: value.detach().host.clone() for name, value in model.state_dict().items()}


def test_the_average_is_torchs_once_its_decay_is_reached() -> None:
    model = small_model()
    average = WeightAverage(model, decay=0.7)
    average.num_updates = 1000  # from here on d is the decay
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    torchs.update_parameters(model)  # its first update copies
    for _ in walk(model, 5):
        average.update()
        torchs.update_parameters(model)
    for name, value in torchs.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(average.model.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_the_average_goes_by_itself_and_the_source_is_left_alone() -> None:
    model = small_model()
    average = WeightAverage(model, decay=0.9)
    before = copy.deepcopy(average.model.state_dict())
    for _ in walk(model, 1):
        pass
    assert all(torch.equal(a, b) for a, b in zip(average.model.state_dict().values(), before.values(), strict=True))
    source = copy.deepcopy(model.state_dict())
    average.update()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.values(), strict=True))


def test_the_average_follows_weights_that_are_loaded() -> None:
    """A resumed run loads weights into source and average after both are made."""
    model, other = small_model(), small_model()
    average = WeightAverage(model, decay=0.9)
    for _ in walk(other, 1):
        pass
    model.load_state_dict(other.state_dict())
    average.model.load_state_dict(other.state_dict())
    average.update()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name])


def test_a_shared_weight_is_averaged_once_an_update() -> None:
    first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    second.weight = first.weight
    average = WeightAverage(nn.Sequential(first, second), decay=0.9)
    before = first.weight.detach().clone()
    with torch.no_grad():
        first.weight.add_(1.0)
    average.update()
    shared = list(average.model.parameters())
    assert len(shared) == 1
    torch.testing.assert_close(shared[0], before + 0.9)


def test_the_average_of_fp16_weights_is_that_of_their_masters() -> None:
    """100 updates, each too small for FP16: an average of the FP16 weights would hardly have left the start."""
    model = halve(small_model())
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.0, momentum=0.0), "fp16")
    average = WeightAverage(model, 0.99, optimizer)
    want = {name: value.double().clone() for name, value in master_state_dict(model, optimizer).items()}
    start = want["0.weight"].clone()
    set_lr(optimizer, group_lrs(optimizer, 1e-6))
    for n in range(100):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        average.update()
        d = min(0.99, (1 + n) / (10 + n))
        want = {k: d * want[k] + (1 - d) * v.double() for k, v in master_state_dict(model, optimizer).items()}
    got = average.model.state_dict()
    assert got["0.weight"].dtype == torch.float32
    assert (want["0.weight"] - start).abs().max() > 5e-5
    for name in ("0.weight", "3.bias", "1.weight"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=0, atol=1e-6)


def test_the_average_keeps_the_memory_format() -> None:
    model = small_model().to(memory_format=torch.channels_last)
    assert WeightAverage(model, 0.9).model[0].weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[index]
