"""Batch norm with the addition and the activation behind it, as one layer of a network."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fasttricks.config import TrainConfig
from fasttricks_kernels import batch_norm_act, batch_norm_compiled

Act = Literal["none", "relu", "relu6"]
Norm = Literal["auto", "fused", "torch"]
FEWEST_ON_CPU = 262_144
"""Values of a tensor from which the CPU's kernel is used, a megabyte: fewer stay in a core's cache, where torch's passes cost
less than the call, which is Python's (`python -m bench.batch_norm --small`)."""
_SECOND = "_second_use"
"""The attribute of a fork's output that is the other: hooks and callers see one tensor."""


def activated(x: Tensor, residual: Tensor | None, act: Act) -> Tensor:
    """act(x + residual) by torch, in the memory of `x`.

    That is safe behind batch norm: its backward pass needs its input, not its output, and relu's needs its own output.
    """
    x = x if residual is None else x.add_(residual)
    if act == "none":
        return x
    return F.relu(x, inplace=True) if act == "relu" else F.relu6(x, inplace=True)


def second_use(y: Tensor) -> Tensor:
    """`y` for its second use: the other output of a fork; `y` itself where it is none."""
    other: Tensor = y if torch.compiler.is_compiling() else y.__dict__.get(_SECOND, y)
    return other


class BatchNormAct(nn.BatchNorm2d):
    """act(batch_norm(x) + residual), of channels-last x by one operator: an nn.BatchNorm2d, with its keys.

    norm: fused: by fasttricks_kernels.batch_norm_act where that has a kernel: on CUDA, and for float32 on a CPU with a C
    compiler, from FEWEST_ON_CPU values on. Otherwise, and under torch.compile, export and tracing, by torch's operators, which a
    compiler fuses itself. Both agree within rounding; tests/test_models_norm.py compares them. auto: as fused on a CPU; on CUDA
    torch's, whose launches take the host half as long (bench.host). norm_of() has it fused where a graph is replayed.

    The fused form counts its batches on the host. `num_batches_tracked` is brought up to date by settle_counts(), one operator
    for all layers, which a training step ends with, and by state_dict().

    `forks`: the output has two uses, of which the second takes second_use() of it; the backward pass then adds the two gradients
    itself, where autograd would need a pass over three tensors.
    """

    norm: Norm = "auto"
    forks = False

    def __init__(self, num_features: int, act: Act = "none", *, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps=eps)
        self.act: Act = act
        self._uncounted = [0]
        """Batches since num_batches_tracked was brought up to date; a list, as an nn.Module's attribute is slow to set."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C, H, W), of x's dtype. residual: of x's shape and dtype; None: 0. x and residual are not modified."""
        if not self._has_kernel(x):
            return activated(super().forward(x), residual, self.act)
        tensors: tuple[Any, ...] = self.weight, self.bias, self.running_mean, self.running_var
        momentum: Any = self.momentum
        fork: Any = self.forks and torch.is_grad_enabled()
        if isinstance(x, FakeTensor):
            y = _Outline.apply(x, *tensors, residual, fork, self.act, self.training, momentum, self.eps)
        else:
            y = batch_norm_act(
                x, *tensors, residual=residual, act=self.act, training=self.training, momentum=momentum, eps=self.eps, fork=fork
            )  # fmt: skip
        self._uncounted[0] += self.training
        if fork:
            y, second = y
            setattr(y, _SECOND, second)
        out: Tensor = y
        return out

    def _has_kernel(self, x: Tensor) -> bool:
        if self.norm == "torch" or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return False
        if not isinstance(x, Tensor) or x.dim() != 4:  # a tracer's, or one that torch refuses
            return False
        if isinstance(x, FakeTensor):  # it stands for one on a GPU
            here = self.norm == "fused" and x.dtype != torch.float64
        elif x.is_cpu:
            here = x.dtype == torch.float32 and x.numel() >= FEWEST_ON_CPU and batch_norm_compiled()
        else:
            here = self.norm == "fused" and x.is_cuda and x.dtype != torch.float64
        return (
            here
            and self.momentum is not None  # else of all batches, by their number
            and self.weight.dtype == torch.float32
            and x.is_contiguous(memory_format=torch.channels_last)
        )

    def _check_input_dim(self, input: Any) -> None:
        if isinstance(input, Tensor):  # torch.fx has no dimensions; it does not look into torch's own layer
            super()._check_input_dim(input)

    def reset_running_stats(self) -> None:
        """As nn.BatchNorm2d, whose constructor calls it."""
        self.__dict__.get("_uncounted", [0])[0] = 0
        super().reset_running_stats()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        settle_counts([self])
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        settle_counts([self])  # a file without the counter leaves it
        super()._load_from_state_dict(*args)


class _Outline(torch.autograd.Function):
    """batch_norm_act on tensors without data, as an eager call on a GPU: its operators know their results' shapes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> Any:
        weight, bias, mean, var, residual, fork, *options = others
        operator: Any = torch.ops.fasttricks_kernels.batch_norm_act
        y, _, numbers_4C, bits, *_ = operator(x, weight, bias, mean, var, residual, None, False, *options)
        keeps_mask = residual is not None and options[0] != "none"
        mask = bits if bits.numel() else y
        ctx.save_for_backward(x, mask if keeps_mask else None, numbers_4C)
        ctx.set_materialize_grads(False)
        ctx.options = options
        return (y.view_as(y), y.view_as(y)) if fork else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, second: Tensor | None = None) -> Any:
        grad, second = (second, None) if grad is None else (grad, second)
        operator: Any = torch.ops.fasttricks_kernels.batch_norm_act_backward
        needs_residual = ctx.needs_input_grad[5]
        *grads, of_residual = operator(grad, second, *ctx.saved_tensors, needs_residual, *ctx.options)
        of_residual = of_residual if of_residual.numel() else grad
        wanted = [x if needed else None for x, needed in zip(grads, ctx.needs_input_grad, strict=False)]
        return *wanted, None, None, of_residual if needs_residual else None, *(None,) * 5


class SyncBatchNormAct(_BatchNorm):
    """BatchNormAct over the images of all ranks: fused, and on a CPU always, by batch_norm_act; else by nn.SyncBatchNorm's
    operators, which take CUDA alone. So does torch.compile.

    It is no nn.SyncBatchNorm, since DistributedDataParallel refuses one on a CPU.
    """

    norm: Norm = "auto"
    forks = False
    act: Act = "none"
    process_group: Any = None
    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """As BatchNormAct."""
        if not self._is_synchronized(x):
            return activated(nn.SyncBatchNorm.forward(self, x), residual, self.act)  # type: ignore[arg-type]
        tensors: tuple[Any, ...] = self.weight, self.bias, self.running_mean, self.running_var
        counter, momentum = self.num_batches_tracked, cast(Any, self.momentum)
        if counter is not None:
            counter.add_(1)
            momentum = momentum if momentum is not None else counter.double().reciprocal()  # of all batches
        options: dict[str, Any] = {
            "residual": residual, "act": self.act, "training": True, "eps": self.eps, "momentum": momentum or 0.0,
            "process_group": self.process_group or dist.group.WORLD, "fork": self.forks and torch.is_grad_enabled(),
        }  # fmt: skip
        y: Any = batch_norm_act(x, *tensors, **options)
        if isinstance(y, tuple):
            y, second = y
            setattr(y, _SECOND, second)
        out: Tensor = y
        return out

    def _is_synchronized(self, x: Tensor) -> bool:
        return (
            self.training
            and not torch.compiler.is_compiling()
            and not isinstance(x, FakeTensor)
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
            and (self.norm == "fused" or x.is_cpu)
        )


@torch.no_grad()
def settle_counts(modules: Iterable[nn.Module]) -> None:
    """Bring num_batches_tracked of each BatchNormAct in `modules` up to date, by one operator for all."""
    behind = [module for module in modules if isinstance(module, BatchNormAct) and module._uncounted[0]]
    if not behind:
        return
    counters: list[Any] = [module.num_batches_tracked for module in behind]
    torch._foreach_add_(counters, [module._uncounted[0] for module in behind])
    for module in behind:
        module._uncounted[0] = 0


def fused_arithmetic(device: torch.device) -> str:
    """The implementation of the fused form: Triton's on a GPU, compiled C on a CPU, or torch there without a compiler."""
    if device.type != "cpu":
        return "fused"
    return "compiled" if batch_norm_compiled() else "torch"


def norm_of(config: TrainConfig) -> Norm:
    """The norm of a run's networks: auto is fused where its steps are replayed, so that launches cost the host nothing."""
    return "fused" if config.model.norm == "auto" and config.cuda_graph else config.model.norm


def use_norm(model: nn.Module, norm: Norm) -> None:
    """Have every BatchNormAct in `model` compute so."""
    for module in model.modules():
        if isinstance(module, BatchNormAct | SyncBatchNormAct):
            module.norm = norm


def synchronized(module: nn.Module) -> nn.Module:
    """`module` with every batch norm in it over the images of all ranks, which keeps its tensors; as
    nn.SyncBatchNorm.convert_sync_batchnorm, which knows no activation."""
    if isinstance(module, _BatchNorm):
        found: Any = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        found.__class__ = SyncBatchNormAct
        for name in ("act", "norm", "forks"):
            setattr(found, name, getattr(module, name, getattr(found, name)))
        return cast(SyncBatchNormAct, found)
    for name, child in module.named_children():
        setattr(module, name, synchronized(child))
    return module
