"""The needs of a training step, counted in a real train_step on fake tensors: memory by kind, FLOPs, traffic.

Fake tensors have shape, dtype and storage but no data: a step of ResNet-152 at any batch size takes seconds and no memory.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fasttricks.config import ModelConfig, TrainConfig
from fasttricks.learning.freezing import freeze
from fasttricks.learning.learner import Learner, Task, make_learner
from fasttricks.learning.placement import place
from fasttricks.learning.precision import image_dtype
from fasttricks.learning.teacher import Teacher, teacher_network
from fasttricks.models import build_model, norm_of, use_norm
from fasttricks.system.distributed import World
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step

if TYPE_CHECKING:
    from fasttricks.data.pipeline.shards import Shards

aten = torch.ops.aten
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A training step of one rank, in bytes and FLOPs (a multiplication and an addition are two)."""

    at_peak: Counter[str]
    """Bytes of live tensors at the moment they are most, by kind: parameters, statistics (of batch norm), gradients, optimizer,
    average (of the weights), teacher (its weights), input (all micro-batches of the step), activations (all else)."""
    num_parameters: int
    gradient_bytes: int
    """All gradients together, of the weights that are trained; the ranks sum them over the link once a step."""
    flops: int
    """FLOPs of the convolutions and matrix products, forward and backward."""
    traffic: Counter[str]
    """Bytes that the operators read and write one by one, by their names, each input and output once: the least of eager mode."""
    again: Counter[str]
    """Bytes that batch norm reads and writes beyond that, by operator: it goes over its tensors twice."""

    @property
    def traffic_bytes(self) -> int:
        """All of `traffic`."""
        return self.traffic.total()


class LiveTensors(TorchDispatchMode):
    """Follows each storage that an operator returns until it is freed: bytes live now and at the peak, by kind.

    A storage counts once, with its whole size, however many views it has. Memory that an operator allocates and
    frees within itself (a convolution's workspace) is not seen. Also counts FLOPs and traffic. The oracle,
    torch.profiler's memory events of the same step on the CPU, is in tests/test_plan.py.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], str]] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0
        self.traffic: Counter[str] = Counter()
        self.again: Counter[str] = Counter()

    def restart(self) -> None:
        """Count peak, FLOPs and traffic from here on."""
        self.peak = self.now.copy()
        self.flops = 0
        self.traffic.clear()
        self.again.clear()

    def label(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count `tensors` as `kind` from now on."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, num_bytes = storage._cdata, storage.nbytes()
            if key in self._live:
                self.now[self._live[key][1]] -= num_bytes
            self._live[key] = weakref.ref(storage, lambda _, key=key, size=num_bytes: self._freed(key, size)), kind  # type: ignore[misc]
            self.now[kind] += num_bytes

    def _freed(self, key: int, num_bytes: int) -> None:
        self.now[self._live.pop(key)[1]] -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in self._live]
        self.label(new, "activations")
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()
        if func is aten.convolution_backward.default:
            self.flops += convolution_backward_flops(*args)
        elif func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        if not _moves_nothing(func):
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            name = func._overloadpacket.__name__
            self.traffic[name] += sum(tensor.nbytes for tensor in inputs + outputs)
            self.again[name] += bytes_again(func, args, outputs)
        return out


def bytes_again(func: Any, args: Any, outputs: list[Tensor]) -> int:
    """Bytes of batch norm's second pass in training: the first is for its statistics, or for its sums of gradients.

    torch's kernels for channels-last tensors read x again, and in backward the gradient too. Ours do so too, but where the first
    pass wrote the gradient of a residual, the second reads that.
    """
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    match func._overloadpacket.__name__ if given.get("training", given.get("train")) is True else "":
        case "native_batch_norm":
            again = [given["input"]]
        case "native_batch_norm_backward":
            again = [given["grad_out"], given["input"]]
        case "batch_norm_act":
            again = [given["x"]]
        case "batch_norm_act_backward":
            grads = [given["grad"], given["second"]] if given["second"] is not None else [given["grad"]]
            again = [given["x"], *([outputs[-1]] if outputs[-1].numel() else grads)]
        case _:
            return 0
    return sum(tensor.nbytes for tensor in again)


def convolution_backward_flops(grad_out: Tensor, images: Tensor, weight: Tensor, *options: Any) -> int:
    """As many as forward for each gradient asked for. torch's own formula takes a grouped convolution's for a whole one's."""
    of_images, of_weight, _ = options[-1]
    return 2 * weight.numel() * grad_out[:, 0].numel() * (bool(of_images) + bool(of_weight))


def _moves_nothing(func: Any) -> bool:
    """Whether an operator only asks of a tensor, makes a view, or returns uninitialised memory."""
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return is_view or func.namespace == "prim" or "empty" in func._schema.name


def footprint(
    config: TrainConfig,
    shards: Shards,
    num_classes: int,
    teacher: ModelConfig | None = None,
    *,
    task: Task | None = None,
) -> Footprint:
    """Count a step of one of the ranks that `shards` has, in the middle of a run: momentum is there, gradients are freed.

    teacher: the teacher of a distillation; None: config.distill's. task: the task to train; None:
    that of config.task.

    config.precision: fp32, bf16 or fp16, not auto. The step is eager; of its micro-batches two are run, as the others are
    like the second. Several ranks keep their gradients in buckets all the time, as DistributedDataParallel does.
    """
    task, micro_batches = task or find_task(config.task), min(config.accumulate, 2)
    # on meta first: a module of fake tensors can be made, but not be converted to channels-last or FP16
    with torch.device("meta"):
        model = place(task.make_model(config, num_classes), _world(shards, torch.device("meta")), config.precision)
        use_norm(model, norm_of(config))
        teacher = teacher or (teacher_network(config.distill) if config.distill.teacher else None)
        judge = blank_teacher(teacher, num_classes) if teacher is not None else None
    dtype = image_dtype(config.precision, _CPU)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveTensors() as live:
        freeze(model.to_empty(device="cpu"), config.model.freeze)
        learner = make_learner(task, countable(config), _world(shards, _CPU), shards, model)
        average = blank_average(model) if config.ema_decay else []
        learner.teacher = judge.to_empty(device="cpu") if judge is not None else None
        label_state(learner, average, live)
        keep_gradients(learner, live, micro_batches)
        size = shards.batch_size
        batches = [task.example(config, size, num_classes, device=_CPU, dtype=dtype) for _ in range(micro_batches)]
        inputs = tree_leaves([vars(batch) for batch in batches])
        live.label((value for value in inputs if isinstance(value, Tensor)), "input")
        live.restart()
        train_step(learner, batches)
    parameters = list(model.parameters())
    repeat = config.accumulate / micro_batches
    # the trainer takes all micro-batches of a step from the loader before the first is used
    live.peak["input"] = round(live.peak["input"] * repeat)
    return Footprint(
        at_peak=live.peak,
        num_parameters=sum(p.numel() for p in parameters),
        gradient_bytes=sum(p.nbytes for p in _trained(model)),
        flops=round(live.flops * repeat),
        **{
            name: Counter({op: round(value * repeat) for op, value in counted.items() if value})
            for name, counted in (("traffic", live.traffic), ("again", live.again))
        },
    )


def label_state(learner: Learner, average: list[Tensor], live: LiveTensors) -> None:
    """Count by kind the memory that stays from step to step; has the optimizer make its momentum and masters first."""
    live.label(learner.model.parameters(), "parameters")
    live.label(learner.model.buffers(), "statistics")
    live.label(average, "average")
    if isinstance(learner.teacher, Teacher):
        live.label((*learner.teacher.parameters(), *learner.teacher.buffers()), "teacher")
    fill_optimizer_state(learner)
    states = learner.optimizer.state.values()
    live.label((value for state in states for value in state.values() if isinstance(value, Tensor)), "optimizer")


def _world(shards: Shards, device: torch.device) -> World:
    return World(rank=0, size=shards.world_size, local_rank=0, local_size=1, device=device)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that get gradients: all but the frozen ones."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def countable(config: TrainConfig) -> TrainConfig:
    """`config` without the parts that fake tensors cannot run: the average copies the model, and apex's SGD needs a GPU."""
    backend = "torch" if config.optim.backend == "apex" else config.optim.backend
    return dataclasses.replace(config, ema_decay=0.0, optim=dataclasses.replace(config.optim, backend=backend))


def blank_teacher(network: ModelConfig, num_classes: int) -> Teacher:
    """The teacher of a distillation, as load_teacher makes it on CUDA, without weights. Its statistics are taken to be ours."""
    model = build_model(network, num_classes)
    return Teacher(model, name="", digest="", device=torch.device("meta"), dtype=torch.float16)


def blank_average(model: nn.Module) -> list[Tensor]:
    """As large as optim.WeightAverage, which copies the model (fake tensors cannot be) and then updates it in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return [torch.zeros_like(t, dtype=torch.float32 if t.is_floating_point() else t.dtype) for t in tensors]


def fill_optimizer_state(learner: Learner) -> None:
    """Have the optimizer make its momentum and masters, which come with its first step."""
    for parameter in _trained(learner.model):
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def keep_gradients(learner: Learner, live: LiveTensors, micro_batches: int) -> None:
    """Count gradients as such and, on several ranks, keep them as DistributedDataParallel does with gradient_as_bucket_view.

    That is, a step's last micro-batch moves each gradient into a bucket, which stays.
    """
    parameters = _trained(learner.model)
    several = learner.world.size > 1
    buckets: dict[Tensor, Tensor] = {p: torch.zeros_like(p) for p in parameters} if several else {}
    live.label(buckets.values(), "gradients")
    seen: Counter[Tensor] = Counter()

    def keep(parameter: Tensor) -> None:
        assert parameter.grad is not None
        seen[parameter] += 1
        if several and seen[parameter] == micro_batches:
            buckets[parameter].copy_(parameter.grad)
            parameter.grad = buckets[parameter]
        live.label([parameter.grad], "gradients")

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(keep)  # type: ignore[no-untyped-call]
