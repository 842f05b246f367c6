"""Nesterov SGD, the parameter groups that "no bias decay" needs, FP32 masters, and the average of the weights.

The trainer uses an optimizer's `param_groups[i]["lr"]`, step(), zero_grad(), state_dict() and load_state_dict().
"""

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fasttricks.config import ConfigError, OptimConfig, Precision, require
from fasttricks.models import new_names
from fasttricks.runs.checkpoint import load_weights
from fasttricks_kernels import MasterSGD, sgd_step


def parameter_groups(
    model: nn.Module, *, weight_decay: float, bias_decay: bool, backbone_lr: float = 1.0, bias_lr: float = 1.0
) -> list[dict[str, Any]]:
    """Split the parameters of `model` that are to be trained into those with and those without weight decay.

    The weights of convolutions and linear layers decay; biases, batch-norm gamma and beta, and whatever else there is do
    not (no bias decay, section 3.1), unless bias_decay: then every parameter decays. The split asks for the module's
    type, never for a name or a number of dimensions. A parameter that two modules share counts once; empty groups are
    left out. Parameters that need no gradient, as frozen ones, are in no group. The oracle, torchvision's own parameters, is
    in tests/test_optim.py.

    backbone_lr: other than 1, the parameters that are not the classifier's, or not of the heads on a base network
    (models.new_names), have groups of their own, with this factor as `lr_factor`. Raises ConfigError where there is no
    classifier, or nothing else to train. bias_lr: other than 1, likewise the biases of all modules, those of batch norm too;
    the factors are multiplied.
    """
    layers = [module for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear))]
    decayed = dict.fromkeys(model.parameters() if bias_decay else [layer.weight for layer in layers])
    rest = [p for p in model.parameters() if p not in decayed]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in decayed if p.requires_grad], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.requires_grad], "weight_decay": 0.0},
    ]
    if backbone_lr != 1:
        groups = _with_factor(model, groups, backbone_lr)
    if bias_lr != 1:
        biases = {bias for module in model.modules() if isinstance(bias := getattr(module, "bias", None), nn.Parameter)}
        groups = [part for group in groups for part in _biases_apart(group, biases, bias_lr)]
    return [group for group in groups if group["params"]]


def _with_factor(model: nn.Module, groups: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Each group as the classifier's part of it, and the rest with `factor`."""
    names = set(new_names(model))
    rule = (
        "needs to know the classifier; have a method get_classifier() of the network return its layer, or leave it at 1"
    )
    require(bool(names), "optim.backbone_lr", factor, rule)
    head = {p for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    backbone = [{**g, "params": [p for p in g["params"] if p not in head], "lr_factor": factor} for g in groups]
    rule = "has no effect: model.freeze leaves only the classifier to train; leave one of them out"
    require(any(group["params"] for group in backbone), "optim.backbone_lr", factor, rule)
    return [*({**g, "params": [p for p in g["params"] if p in head]} for g in groups), *backbone]


def _biases_apart(group: dict[str, Any], biases: set[nn.Parameter], factor: float) -> list[dict[str, Any]]:
    """`group` without its biases; and these, their lr times `factor`."""
    others, own = ([p for p in group["params"] if (p in biases) is wanted] for wanted in (False, True))
    return [{**group, "params": others}, {**group, "params": own, "lr_factor": factor * group.get("lr_factor", 1.0)}]


def build_optimizer(model: nn.Module, config: OptimConfig, precision: Precision = "fp32") -> torch.optim.Optimizer:
    """Nesterov SGD over `model`: g += wd x w; v = momentum x v + g; w -= lr x (g + momentum x v).

    precision: fp32, bf16 or fp16, as the weights are. Backends: torch's fused kernel; ours (MasterSGD: FP32 masters under
    FP16 weights, a step whose gradients overflowed is skipped on the device); NVIDIA's apex. auto is ours for fp16, else
    torch's. All make one pass over weights, gradients and momentum and never sync. The learning rate is set before each step
    by `set_lr`; until then it is 0. Raises ConfigError for a backend that cannot do this.
    """
    groups = parameter_groups(
        model,
        weight_decay=config.weight_decay,
        bias_decay=config.bias_decay,
        backbone_lr=config.backbone_lr,
        bias_lr=config.bias_lr,
    )
    options: dict[str, Any] = {"lr": 0.0, "momentum": config.momentum, "nesterov": config.momentum > 0}
    if config.backend == "fused" or (config.backend == "auto" and precision == "fp16"):
        return MasterSGD(groups, **options)
    rule = "keeps no FP32 masters of FP16 weights; take --optim.backend fused (ours), or --precision bf16"
    require(precision != "fp16", "optim.backend", config.backend, rule)
    if config.backend == "apex":
        rule = "needs a CUDA device; take --optim.backend torch"
        require(device_of(model).type == "cuda", "optim.backend", config.backend, rule)
        return apex_sgd(groups, **options)
    return torch.optim.SGD(groups, **options, fused=True)


def device_of(model: nn.Module) -> torch.device:
    """The device that the parameters of `model` are on."""
    return next(model.parameters()).device


def apex_sgd(groups: list[dict[str, object]], **options: Any) -> torch.optim.Optimizer:
    """NVIDIA apex's FusedSGD. Raises ConfigError where there is no apex, or another project of that name."""
    way_out = "docs/distributed.md says how to build it; --optim.backend torch needs nothing"
    if importlib.util.find_spec("apex") is None:
        raise ConfigError(f"optim.backend = 'apex': NVIDIA's apex is not installed; {way_out}")
    try:
        from apex.optimizers import FusedSGD  # type: ignore[import-not-found, unused-ignore]

        return cast(torch.optim.Optimizer, FusedSGD(groups, **options, set_grad_none=True))
    except (ImportError, RuntimeError) as error:  # without its CUDA extensions, apex says so when it is called
        other = "the apex that is installed is not NVIDIA's, or was built without its CUDA extensions"
        raise ConfigError(
            f"optim.backend = 'apex': {other} ({error}). PyPI's apex is an unrelated project: pip uninstall apex; {way_out}"
        ) from error


def master_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """The tensor that `optimizer` updates: the FP32 master of an FP16 `parameter` that it trains, else `parameter` itself."""
    return optimizer.master_of(parameter) if isinstance(optimizer, MasterSGD) and parameter.requires_grad else parameter


def master_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's state_dict with masters in place of FP16 weights, as a checkpoint keeps it. No copy."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {k: master_of(optimizer, parameters[k]) if k in parameters else v for k, v in model.state_dict().items()}


def group_lrs(optimizer: torch.optim.Optimizer, lr: float) -> tuple[float, ...]:
    """The learning rate of each group of `optimizer`: `lr`, times the group's factor where it has one."""
    return tuple(lr * group.get("lr_factor", 1.0) for group in optimizer.param_groups)


def set_lr(optimizer: torch.optim.Optimizer, lrs: Sequence[float | Tensor]) -> None:
    """Give each group of `optimizer` its learning rate."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr


class WeightAverage:
    """Exponential moving average of a model's weights and batch-norm statistics: avg = d x avg + (1 - d) x weights.

    `model` is the averaged copy, to be evaluated. d is min(decay, (1 + n) / (10 + n)) at update n, counted from 0, so
    that a short run is not an average of its random start. Counters are copied. The average is FP32 and, given the
    `optimizer` that keeps them, of the FP32 masters: in FP16 it would stand still. From the first update on, `source` and the
    masters must stay where they are. One fused pass over the weights an update, no sync; memory: an FP32 copy of the model.
    exact: the FP32 values of frozen weights that `source` has in FP16, by name; frozen weights are taken once, as they stay.
    The oracle, NumPy in float64, is in tests/test_optim.py.
    """

    def __init__(
        self,
        source: nn.Module,
        decay: float,
        optimizer: torch.optim.Optimizer | None = None,
        exact: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.decay = decay
        self.num_updates = 0
        self.model = copy.deepcopy(source).float().requires_grad_(False)
        if exact:
            self.model.load_state_dict(dict(exact), strict=False)
        self._source, self._optimizer = source, optimizer
        self._bound: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]] | None = None

    @property
    def gain(self) -> float:
        """1 - d of the next update."""
        return 1.0 - min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))

    def update(self) -> None:
        """blend() by self.gain, and count it."""
        self.blend(self.gain)
        self.num_updates += 1

    @torch.no_grad()
    def blend(self, gain: float | Tensor) -> None:
        """Take the source's present weights into the average. gain: 1 - d; as a tensor () float32, on the device."""
        self._bound = self._bound or self._bind()
        averages, weights, counts, counters = self._bound
        if self._launches(averages[0]):
            # average -= gain (average - weight) is a step of SGD; torch's own would launch once a tensor for a gain on the device
            sgd_step(averages, weights, [], [], lr=gain, weight_decay=1.0, maximize=True)
        else:
            torch._foreach_lerp_(averages, weights, [gain] * len(averages) if isinstance(gain, Tensor) else gain)
        if counts:
            torch._foreach_copy_(counts, counters)

    def state_dict(self) -> dict[str, Any]:
        """`model`: the averaged weights and statistics, no copy; `updates`: how many were taken in."""
        return {"model": self.model.state_dict(), "updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, Any], *, source: str) -> None:
        """Restore the state that state_dict() gave. source: its origin, for an error. Raises CheckpointError as load_weights."""
        load_weights(self.model, state["model"], source=source)
        self.num_updates, self._bound = state["updates"], None

    @staticmethod
    def _launches(average: Tensor) -> bool:
        """Whether it lies where the project's kernels run."""
        return average.is_cuda

    def _bind(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """(averages, the tensors they are of, copies, the counters that they copy), each tensor once: two modules may share one.

        Not before the first update: loading an optimizer's state replaces its masters.
        """
        source, optimizer = self._source, self._optimizer
        pairs: list[tuple[Tensor, Tensor]] = list(zip(self.model.buffers(), source.buffers(), strict=True))
        for average, p in zip(self.model.parameters(), source.parameters(), strict=True):
            if p.requires_grad:
                pairs.append((average, p if optimizer is None else master_of(optimizer, p)))
        floats = [(average, weight) for average, weight in pairs if average.is_floating_point()]
        counted = [(average, counter) for average, counter in pairs if not average.is_floating_point()]
        averages, weights, counts, counters = (
            [pair[side] for pair in of] for of in (floats, counted) for side in (0, 1)
        )
        return averages, weights, counts, counters
