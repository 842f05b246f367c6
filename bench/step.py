"""Images a second of the training step of ResNet-50-D at 224 pixels, beside timm's model with torch's loss and optimizer.

Synthetic images that lie on the device: no loader. FP32 on the CPU, bfloat16 autocast on CUDA, for all alike. Each
contestant is a process of its own, as its user would run it: what fasttricks.train sets for its process (memory that stays
with it) is not set for the others. They wait for their turn, so one computes at a time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fasttricks.config import LossConfig, ModelConfig, OptimConfig, Precision
from fasttricks.distributed import keep_freed_memory
from fasttricks.losses import Targets, training_loss
from fasttricks.models import build_model
from fasttricks.optim import build_optimizer, set_lr
from fasttricks.precision import make_autocast

IMAGE_SIZE, NUM_CLASSES, SMOOTHING, LR = 224, 1000, 0.1, 0.01
FLOPS_PER_IMAGE = 2 * 3 * 4.35e9
"""Of a step of ResNet-50-D: 4.35 G multiply-adds forward, and twice as many backward."""
GEMM_SIDE = 2048


@contextmanager
def contestants(device: torch.device, batch_size: int) -> Iterator[dict[str, Callable[[], float]]]:
    """Name -> one training step, returning images a second; the processes end with the context."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(_process(name, device, batch_size)) for name in CONTESTANTS}


@contextmanager
def _process(name: str, device: torch.device, batch_size: int) -> Iterator[Callable[[], float]]:
    command = [sys.executable, "-m", "bench.step", name, str(device), str(batch_size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        turns, answers = process.stdin, process.stdout

        def measure() -> float:
            print(file=turns, flush=True)
            answer = answers.readline()
            if not answer:
                raise RuntimeError(f"{name}: the process ended with exit code {process.wait()}; its error is above")
            return float(answer)

        yield measure
        turns.close()


def main(name: str, device_name: str, batch_size: int) -> None:
    """The process of one contestant: a measurement for each line of standard input."""
    device = torch.device(device_name)
    images = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), device=device)
    step = CONTESTANTS[name](images, labels)
    repeats = 10 if device.type == "cuda" else 1
    for _ in sys.stdin:
        _wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        _wait(device)
        print(repeats * batch_size / (time.perf_counter() - start), flush=True)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fasttricks(images: Tensor, labels: Tensor) -> Callable[[], None]:
    keep_freed_memory()
    model = build_model(ModelConfig(name="resnet50d", zero_gamma=True), NUM_CLASSES)
    model = model.to(images.device, memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, OptimConfig())
    autocast = make_autocast(_precision(images.device), images.device)
    loss_config = LossConfig(smoothing=SMOOTHING)

    def step() -> None:
        with autocast():
            logits = model(images)
        (training_loss(logits, Targets(labels), loss_config) / len(labels)).backward()
        set_lr(optimizer, LR)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _timm(images: Tensor, labels: Tensor, *, layout: torch.memory_format) -> Callable[[], None]:
    import timm

    model: nn.Module = timm.create_model("resnet50d", zero_init_last=True, num_classes=NUM_CLASSES)
    model = model.to(images.device, memory_format=layout)  # type: ignore[call-overload]
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=1e-4)
    autocast = make_autocast(_precision(images.device), images.device)

    def step() -> None:
        with autocast():
            loss = functional.cross_entropy(model(images), labels, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _precision(device: torch.device) -> Precision:
    return "bf16" if device.type == "cuda" else "fp32"


CONTESTANTS: dict[str, Callable[[Tensor, Tensor], Callable[[], None]]] = {
    "fasttricks resnet50d": _fasttricks,
    "timm resnet50d, channels-last": partial(_timm, layout=torch.channels_last),
    "timm resnet50d, default layout": partial(_timm, layout=torch.contiguous_format),
}


def matrix_product(device: torch.device) -> Callable[[], float]:
    """A large matrix product in float32, as the images a second that its FLOP/s would be: the roof of a step."""
    shape = (GEMM_SIDE, GEMM_SIDE)
    a, b, out = (torch.randn(shape, device=device) for _ in range(3))

    def measure() -> float:
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):
            torch.mm(a, b, out=out)
        _wait(device)
        return 10 * 2 * GEMM_SIDE**3 / (time.perf_counter() - start) / FLOPS_PER_IMAGE

    return measure


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
