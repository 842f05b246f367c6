"""`python -m bench.parts`: the seconds of a training step on the CPU by part, without a profiler.

    python -m bench.parts resnet50d --batch-size 32 --image-size 224
    python -m bench.parts cifar10

A network by its name, trained as bench.step has it, or a recipe; random images. Timers stand around each layer's forward pass and
around each node of autograd's graph. A convolution's two gradients are computed one after the other, as torch does within one
call. GFLOP/s are those of a convolution's definition; winograd.conv3x3 takes fewer operations. Steps with timers and without
alternate: their ratio is the timers' own cost. The clock is the time of day or, with --clock cpu, the CPU time of all threads,
which other work changes less; a thread that waits for another in torch's pool counts there too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from bench.step import GEMM_SIDES, StepCase
from bench.stopwatch import Stopwatch
from fasttricks import trainer
from fasttricks.config import TrainConfig, replace_fields
from fasttricks.config.recipes import RECIPES
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place
from fasttricks.models import build_model
from fasttricks.models.norm import use_norm
from fasttricks.planning.planner import IMAGENET_CLASSES
from fasttricks.system.distributed import World, keep_freed_memory
from fasttricks.tasks import find_task
from fasttricks.trainer import train_step
from fasttricks_kernels.convolution import pointwise, winograd

FORWARD, GRAD_INPUT, GRAD_WEIGHT = (f"convolution, {name}" for name in ("forward", "grad_input", "grad_weight"))
NORM, POOL, HEAD, LOSS, UPDATE, REST = "batch norm", "pooling", "classifier", "loss", "optimizer", "the rest"
LAYERS: dict[type[nn.Module], str] = {nn.BatchNorm2d: NORM, nn.MaxPool2d: POOL, nn.AvgPool2d: POOL, nn.Linear: HEAD}
"""Layer -> part. The project's batch norm has the addition and the activation in it."""
NODES = {
    NORM: ("BatchNorm", "Relu", "Hardtanh"),
    POOL: ("Pool",),
    HEAD: ("Addmm", "Mean", "TBackward"),
    LOSS: ("CrossEntropy", "Mul", "Sum", "NllLoss", "LogSoftmax"),
}
"""Part -> words in the names of its nodes of the graph."""
PARTS = (
    *(FORWARD, GRAD_INPUT, GRAD_WEIGHT),
    *(f"{part}, {way}" for part in (NORM, POOL, HEAD, LOSS) for way in ("forward", "backward")),
    *(UPDATE, REST),
)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class _Convolution(torch.autograd.Function):
    """A convolution whose passes are parts of their own; `flops` counts those of one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, watch: Stopwatch, flops: Any, *how: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.watch, ctx.flops, ctx.bias = how, watch, flops, bias is not None
        with watch.part(FORWARD):
            y: Tensor = torch.ops.aten.convolution(x, weight, bias, *how)
        ctx.count = 2 * y.numel() * weight[0].numel()
        flops[FORWARD] += ctx.count
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        sizes = [len(weight)] if ctx.bias else None
        found: list[Tensor | None] = [None, None, None]
        for part, mask in ((GRAD_INPUT, (1, 0, 0)), (GRAD_WEIGHT, (0, 1, 1))):
            wanted = [bool(a and b) for a, b in zip(mask, ctx.needs_input_grad[:3], strict=True)]
            if any(wanted):
                with ctx.watch.part(part):
                    made = torch.ops.aten.convolution_backward(grad, x, weight, sizes, *ctx.how, wanted)
                found = [new if new is not None else old for new, old in zip(made, found, strict=True)]
                ctx.flops[part] += ctx.count
        return *found, *(None,) * (2 + len(ctx.how))


@contextmanager
def watched(model: nn.Module, learner: Learner, watch: Stopwatch, flops: dict[str, int]) -> Iterator[None]:
    """Within, a train_step of `learner` on `model` tells `watch` its parts, and `flops` those of its convolutions."""

    def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise NotImplementedError(f"{layer}: bench.parts knows a padding of zeros, given by numbers")
        how = layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups
        y: Tensor = _Convolution.apply(x, weight, bias, watch, flops, *how)  # type: ignore[no-untyped-call]
        return y

    def counted(part: str, module: Any, name: str, flops_of: Callable[..., int]) -> tuple[Any, str, Callable[..., Any]]:
        function = getattr(module, name)

        def call(*tensors: Tensor, **how: bool) -> Any:
            flops[part] += flops_of(*tensors)
            with watch.part(part):
                return function(*tensors, **how)

        return module, name, call

    def of_3x3(pixels: Tensor, other: Tensor, second: int = 1) -> int:
        return 2 * 9 * pixels.numel() * other.shape[second]

    def of_1x1(x: Tensor, weight: Tensor, *_: Tensor) -> int:
        return 2 * x.numel() * len(weight)

    def backward(loss: Tensor) -> None:
        with watch.part(REST):
            for node in _nodes(loss):
                part = next((part for part, words in NODES.items() if any(word in node.name() for word in words)), "")
                node.register_prehook(lambda _, part=part: watch.begin(f"{part}, backward" if part else REST))
                node.register_hook(lambda *_: watch.end())
            plain_backward(loss)

    plain_backward = torch.autograd.backward
    forward, loss_of = learner.forward, learner.task.loss
    with ExitStack() as stack:
        for layer in model.modules():
            part = next((part for kind, part in LAYERS.items() if isinstance(layer, kind)), None)
            if part is not None:
                begin = layer.register_forward_pre_hook(lambda *_, part=part: watch.begin(f"{part}, forward"))
                end = layer.register_forward_hook(lambda *_: watch.end())
                stack.callback(begin.remove)
                stack.callback(end.remove)
        for where, name, new in (
            (nn.Conv2d, "_conv_forward", convolve),
            counted(FORWARD, winograd, "convolve", lambda x, weight: of_3x3(x, weight, 0)),
            counted(FORWARD, winograd, "convolve_pool", lambda x, weight: of_3x3(x, weight, 0)),
            counted(GRAD_INPUT, winograd, "grad_input", of_3x3),
            counted(GRAD_WEIGHT, winograd, "grad_weight", of_3x3),
            counted(FORWARD, pointwise, "convolve", of_1x1),
            counted(GRAD_INPUT, pointwise, "grad_input", of_1x1),
            counted(GRAD_WEIGHT, pointwise, "grad_weight", of_1x1),
            (learner, "forward", watch.timed(REST, forward)),
            (type(learner.task), "loss", lambda _, *given: watch.timed(f"{LOSS}, forward", loss_of)(*given)),
            (torch.autograd, "backward", backward),
            (trainer, "update", watch.timed(UPDATE, trainer.update)),
        ):
            stack.enter_context(mock.patch.object(where, name, new))
        yield


def _nodes(loss: Tensor) -> set[Any]:
    """Every node of the graph behind `loss`."""
    found: set[Any] = set()
    left = [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [before for before, _ in node.next_functions]
    return found


def training(config: TrainConfig, num_classes: int, image_size: int) -> tuple[nn.Module, Learner, Batch]:
    """The network of `config`, its learner, and a batch of random images."""
    world = World.alone(torch.device("cpu"))
    size = config.global_batch_size
    shards = Shards(num_images=100 * size, batch_size=size, world_size=1, source="random")
    model = place(build_model(config.model, num_classes), world, config.precision)
    use_norm(model, config.model.norm)
    learner = make_learner(find_task(config.task), config, world, shards, model)
    images = torch.randn(size, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    return model, learner, Batch(images, torch.randint(num_classes, (size,)))


def measure(
    config: TrainConfig, num_classes: int, image_size: int, turns: int, clock: Callable[[], float]
) -> tuple[dict[str, float], dict[str, int], float, float]:
    """Each part's seconds, the FLOPs of the convolutions, the seconds of a step without timers, and FLOP/s of a matrix product.

    Medians over `turns` steps of each kind, by `clock`.
    """
    model, learner, batch = training(config, num_classes, image_size)
    seconds: dict[str, list[float]] = defaultdict(list)
    plain, rates, flops = [], [], defaultdict[str, int](int)
    for turn in range(turns + 2):  # the first two fetch memory
        rates.append(matrix_rate(clock))
        began = clock()
        train_step(learner, [batch])
        plain.append(clock() - began)
        watch = Stopwatch(clock)
        flops.clear()
        with watched(model, learner, watch, flops), watch.part(REST):
            train_step(learner, [batch])
        for part in PARTS:
            seconds[part].append(watch.seconds.pop(part, 0.0))
        assert not watch.seconds, f"parts without a row: {list(watch.seconds)}"
        learner.step = turn  # the schedule's end is not to be reached
    found = {part: statistics.median(of[2:]) for part, of in seconds.items()}
    return found, flops, statistics.median(plain[2:]), statistics.median(rates[2:])


def matrix_rate(clock: Callable[[], float], side: int = GEMM_SIDES[1]) -> float:
    """FLOP/s of a matrix product in float32."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    began = clock()
    for _ in range(4):
        a @ b
    return 8 * side**3 / (clock() - began)


def options_of(description: str | None) -> argparse.ArgumentParser:
    """The options of a command that chosen() reads."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="resnet50d", help="network, or recipe")
    parser.add_argument("--batch-size", type=int, help="images; of a recipe its own, else 16")
    parser.add_argument("--image-size", type=int, help="pixels; of a recipe its own, else 224")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def chosen(given: argparse.Namespace) -> tuple[TrainConfig, int]:
    """The config of a step and the side of its images; and the process as a run has it, with so many threads."""
    keep_freed_memory()
    torch.set_num_threads(given.threads)
    if given.name in RECIPES:
        config = RECIPES[given.name]()
        config = replace_fields(config, {"global_batch_size": given.batch_size or config.global_batch_size})
        return config, given.image_size or config.data.image_size
    case = StepCase(model=given.name, batch_size=given.batch_size or StepCase.batch_size)
    return case.config, given.image_size or case.image_size


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    config, size = chosen(given)
    classes = 10 if "cifar10" in config.recipe else IMAGENET_CLASSES
    found, flops, plain, rate = measure(config, classes, size, given.turns, CLOCKS[given.clock])
    step = sum(found.values())
    print(
        f"{config.model.name}, {config.global_batch_size} images, {size} pixels, {given.threads} threads, {given.clock} time\n"
    )
    print("| part | ms | share | GFLOP/s |\n|---|---|---|---|")
    for part, seconds in found.items():
        speed = f"{flops[part] / seconds / 1e9:.0f}" if flops.get(part) else ""
        print(f"| {part} | {1e3 * seconds:.1f} | {seconds / step:.1%} | {speed} |")
    print(f"| a step with timers | {1e3 * step:.1f} | | {sum(flops.values()) / step / 1e9:.0f} |")
    print(f"| a step without | {1e3 * plain:.1f} | | {sum(flops.values()) / plain / 1e9:.0f} |")
    print(f"| a matrix product | | | {rate / 1e9:.0f} |")


if __name__ == "__main__":
    main()
