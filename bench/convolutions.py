"""`python -m bench.convolutions`: each shape of a network's convolutions on the CPU, all passes, in several forms.

    python -m bench.convolutions resnet50d --batch-size 16 --threads 1
    python -m bench.convolutions cifar10

oneDNN's by torch, channels-last and default layout; a 1x1 of stride 1 as a matrix product; the project's Winograd; the weight's
gradient as a product with unfolded pixels, and by halves of the batch. GFLOP/s are of the definition, by CPU time, the
best of the turns, which alternate. "Ours" is the form that the networks take. The bound is the lower of two rates: of a square
matrix product, and of reading two tensors and writing the third once, as fast as a copy. Winograd's fewer operations can pass the
first. The last rows add up all layers. docs/convolutions.md has the tables of two kinds of CPU.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.parts import chosen, options_of
from bench.step import GEMM_SIDES
from fasttricks.config import ModelConfig
from fasttricks.models import build_model
from fasttricks.planning.planner import IMAGENET_CLASSES
from fasttricks_kernels.convolution import pointwise, winograd

PASSES = ("forward", "grad_input", "grad_weight")
PLAIN, PRODUCT, WINOGRAD = "torch, channels-last", "matrix product", "winograd"
AT_LEAST = 1e9
"""FLOPs of a turn: a small convolution is repeated."""
COPIED = 32_000_000
"""Values of the copy, 128 MB: more than the caches of two cores hold."""
Forms = dict[str, Callable[[], Tensor]]


class Shape(NamedTuple):
    """A convolution without groups, its kernel, stride and padding alike in both directions."""

    channels: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    side: int
    """Pixels along a side of the input."""

    @property
    def out_side(self) -> int:
        """Pixels along a side of the output."""
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1

    def flops(self, images: int) -> int:
        """FLOPs of one pass, a multiplication and an addition being two."""
        return 2 * images * self.out_side**2 * self.outputs * self.channels * self.kernel**2

    def bytes(self, images: int) -> int:
        """Bytes of input, output and weight in float32: each pass reads two of them and writes the third."""
        pixels = images * (self.side**2 * self.channels + self.out_side**2 * self.outputs)
        return 4 * (pixels + self.outputs * self.channels * self.kernel**2)


def shapes_of(config: ModelConfig, image_size: int, num_classes: int) -> Counter[Shape]:
    """Shape -> the number of the network's layers that have it. Raises NotImplementedError for other convolutions."""
    found: Counter[Shape] = Counter()

    def see(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        sides = layer.kernel_size, layer.stride, layer.padding, inputs[0].shape[2:]
        if layer.groups != 1 or layer.dilation != (1, 1) or any(len(set(pair)) > 1 for pair in sides):
            raise NotImplementedError(f"{layer}: bench.convolutions knows square ones, without groups and dilation")
        found[Shape(layer.in_channels, layer.out_channels, *(int(pair[0]) for pair in sides))] += 1

    with torch.device("meta"):
        model = build_model(config, num_classes)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(see)
        model(torch.empty(2, 3, image_size, image_size))
    return found


def drawn(shape: Shape, images: int, draw: Callable[..., Tensor] = torch.randn) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and gradient of y, channels-last, of draw(size)."""
    channels, outputs, kernel, _, _, side = shape
    sizes = (
        (images, channels, side, side),
        (outputs, channels, kernel, kernel),
        (images, outputs, *[shape.out_side] * 2),
    )
    x, weight, grad = (draw(size).contiguous(memory_format=torch.channels_last) for size in sizes)
    return x, weight, grad


def ours(shape: Shape, images: int) -> dict[str, str]:
    """Pass -> the form that Conv2d takes."""
    x, weight, _ = drawn(shape, images, torch.empty)
    if shape[2:5] == (3, 1, 1) and winograd.takes(x, weight):
        few = winograd.has_few_pixels(x, shape.outputs)
        return dict.fromkeys(PASSES, WINOGRAD) | ({"grad_weight": PLAIN} if few else {})
    if shape[2:5] == (1, 1, 0) and pointwise.takes(x, weight):
        by_product = pointwise.products(shape.channels, shape.outputs)
        return {name: PRODUCT if so else PLAIN for name, so in zip(PASSES, by_product, strict=True)}
    return dict.fromkeys(PASSES, PLAIN)


def forms(shape: Shape, images: int) -> dict[str, Forms]:
    """Pass -> name of a form -> its call, on random numbers."""
    _, _, kernel, stride, padding, _ = shape
    x, weight, grad = drawn(shape, images)
    found: dict[str, Forms] = {name: {} for name in PASSES}

    def gradient(number: int, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        how = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [number == 0, number == 1, False]
        made: Tensor = torch.ops.aten.convolution_backward(grad, x, weight, None, *how)[number]
        return made

    for name, one in ((PLAIN, (x, weight, grad)), ("torch, default layout", None)):
        a, b, c = one or (value.contiguous() for value in (x, weight, grad))
        found["forward"][name] = lambda a=a, b=b: F.conv2d(a, b, None, stride, padding)
        found["grad_input"][name] = lambda a=a, b=b, c=c: gradient(0, c, a, b)
        found["grad_weight"][name] = lambda a=a, b=b, c=c: gradient(1, c, a, b)
    pixels, grads = (value.permute(0, 2, 3, 1).flatten(0, 2) for value in (x, grad))
    if kernel == stride == 1:
        matrix = weight.flatten(1)
        found["forward"][PRODUCT] = lambda: pixels @ matrix.t()
        found["grad_input"][PRODUCT] = lambda: grads @ matrix
        found["grad_weight"][PRODUCT] = lambda: grads.t() @ pixels
    else:

        def unfolded() -> Tensor:
            return grads.t() @ F.unfold(x, kernel, 1, padding, stride).transpose(1, 2).flatten(0, 1)

        found["grad_weight"]["unfolded"] = unfolded
    if images > 1:
        halves = [value.tensor_split(2) for value in (grad, x)]
        found["grad_weight"]["by halves"] = lambda: sum(
            (gradient(1, a, b, weight) for a, b in zip(*halves, strict=True)), torch.zeros(())
        )
    if (kernel, stride, padding) == (3, 1, 1) and winograd.takes(x, weight):
        found["forward"][WINOGRAD] = lambda: winograd.convolve(x, weight)
        found["grad_input"][WINOGRAD] = lambda: winograd.grad_input(grad, weight)
        found["grad_weight"][WINOGRAD] = lambda: winograd.grad_weight(x, grad)
    return found


@torch.no_grad()
def best_seconds(calls: dict[str, Forms], turns: int, repeats: int) -> dict[str, dict[str, float]]:
    """The CPU seconds of each call, the best of `turns`, which alternate, after one that does not count."""
    seconds = {name: dict.fromkeys(forms, float("inf")) for name, forms in calls.items()}
    for turn in range(turns + 1):
        for name, forms in calls.items():
            for form, call in forms.items():
                began = time.process_time()
                for _ in range(repeats):
                    call()
                if turn:
                    seconds[name][form] = min(seconds[name][form], (time.process_time() - began) / repeats)
    return seconds


def table(shapes: Counter[Shape], images: int, turns: int) -> Iterator[str]:
    """The lines of the table."""
    product, copied = roof(turns)
    yield f"a square matrix product: {product / 1e9:.0f} GFLOP/s; a copy: {copied / 1e9:.1f} GB/s read and written\n"
    yield (
        "| in, out, kernel, stride, side | layers | pass | GFLOP/s by form | best | ours | bound |\n" + "|---" * 7 + "|"
    )
    plain, best, own, bound = (Counter[str]() for _ in range(4))
    for shape, layers in shapes.items():
        flops = shape.flops(images)
        arithmetic, memory = flops / product, shape.bytes(images) / copied
        seconds = best_seconds(forms(shape, images), turns, max(1, int(AT_LEAST / flops)))
        for name, form in ours(shape, images).items():
            taken = seconds[name]
            first = min(taken, key=lambda form: taken[form])
            for total, value in ((plain, taken[PLAIN]), (best, taken[first]), (own, taken[form])):
                total[name] += layers * value
            bound[name] += layers * max(arithmetic, memory)
            rates = ", ".join(f"{form} {flops / taken[form] / 1e9:.0f}" for form in taken)
            size = f"{shape.channels}, {shape.outputs}, {shape.kernel}, {shape.stride}, {shape.side}"
            roofs = f"{flops / max(arithmetic, memory) / 1e9:.0f}, {'arithmetic' if arithmetic > memory else 'memory'}"
            yield f"| {size} | {layers} | {name} | {rates} | {first} | {form} | {roofs} |"
    yield "\n| all layers, ms | torch, channels-last | best | ours | bound |\n|---|---|---|---|---|"
    for name in PASSES:
        yield f"| {name} | {' | '.join(f'{1e3 * total[name]:.1f}' for total in (plain, best, own, bound))} |"
    yield f"| all | {' | '.join(f'{1e3 * total.total():.1f}' for total in (plain, best, own, bound))} |"


def roof(turns: int) -> tuple[float, float]:
    """FLOP/s of the fastest square matrix product, and bytes/s of a copy, read and written: by CPU time, the best of `turns`."""
    matrices = {side: torch.randn(side, side) for side in GEMM_SIDES}
    source, target = torch.zeros(COPIED), torch.zeros(COPIED)
    calls: dict[str, Forms] = {str(side): {"": lambda a=a: a @ a} for side, a in matrices.items()}
    seconds = best_seconds(calls | {"copy": {"": lambda: target.copy_(source)}}, turns, 1)
    products = [2 * side**3 / seconds[str(side)][""] for side in GEMM_SIDES]
    return max(products), 2 * source.nbytes / seconds["copy"][""]


def main() -> None:
    given = options_of(__doc__).parse_args()
    config, side = chosen(given)
    model, images = config.model, config.global_batch_size
    print(f"{model.name}, {images} images, {side} pixels, {given.threads} threads\n")
    for line in table(shapes_of(model, side, IMAGENET_CLASSES), images, given.turns):
        print(line, flush=True)


if __name__ == "__main__":
    main()
