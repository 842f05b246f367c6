"""Nesterov SGD, the parameter groups that "no bias decay" needs, and the average of the weights.

`build_optimizer` is the seam at which another update comes in (FP32 masters under FP16 weights): what the trainer asks
of an optimizer is `param_groups[i]["lr"]`, step(), zero_grad(), state_dict() and load_state_dict().
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fasttricks.config import OptimConfig


def parameter_groups(model: nn.Module, *, weight_decay: float, bias_decay: bool) -> list[dict[str, object]]:
    """Split the parameters of `model` into those with and those without weight decay.

    The weights of convolutions and linear layers decay; biases, batch-norm gamma and beta, and whatever else there is do
    not (no bias decay, section 3.1), unless bias_decay: then every parameter decays. The split asks for the module's
    type, never for a name or a number of dimensions. A parameter that two modules share counts once; empty groups are
    left out. The oracle, torchvision's own parameters, is in tests/test_optim.py.
    """
    layers = [module for module in model.modules() if isinstance(module, (_ConvNd, nn.Linear))]
    decayed = dict.fromkeys(model.parameters() if bias_decay else [layer.weight for layer in layers])
    rest = [p for p in model.parameters() if p not in decayed]
    groups: list[dict[str, object]] = [
        {"params": list(decayed), "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.SGD:
    """Nesterov SGD over `model`: g += wd x w; v = momentum x v + g; w -= lr x (g + momentum x v).

    torch's fused kernel, on the CPU and on CUDA: one pass over weights, gradients and momentum, no sync. The learning
    rate is set before each step by `set_lr`; until then it is 0.
    """
    groups = parameter_groups(model, weight_decay=config.weight_decay, bias_decay=config.bias_decay)
    nesterov = config.momentum > 0
    return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=nesterov, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class WeightAverage:
    """Exponential moving average of a model's weights and batch-norm statistics: avg = d x avg + (1 - d) x weights.

    `model` is the averaged copy, to be evaluated. d is min(decay, (1 + n) / (10 + n)) at update n, counted from 0, so
    that a short run is not an average of its random start. Counters are copied. `source` must stay where it is: make the
    average after moving it to its device. One fused pass over the weights an update, no sync; memory: one more copy of
    the model. The oracle, NumPy in float64, is in tests/test_optim.py.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.model = copy.deepcopy(source).requires_grad_(False)
        pairs = list(zip(_tensors(self.model), _tensors(source), strict=True))
        self._averaged = [average for average, _ in pairs if average.is_floating_point()]
        self._sources = [weights for average, weights in pairs if average.is_floating_point()]
        self._counters = [(average, counter) for average, counter in pairs if not average.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the source's present weights into the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self._averaged, self._sources, 1.0 - decay)
        for average, counter in self._counters:
            average.copy_(counter)
        self.num_updates += 1


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once: one that two modules share must not be averaged twice in an update."""
    return [*model.parameters(), *model.buffers()]
