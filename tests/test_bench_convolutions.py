"""python -m bench.convolutions: the network's shapes, forms that compute the same, and its table's sums."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import convolutions, parts
from bench.convolutions import PASSES, Shape
from fasttricks.config import ModelConfig
from fasttricks_kernels.convolution import winograd

WIDE = Shape(64, 96, 3, 1, 1, 16)


@pytest.mark.parametrize(
    "shape", [WIDE, Shape(5, 7, 1, 1, 0, 6), Shape(3, 8, 3, 2, 1, 9), Shape(3, 4, 7, 2, 3, 16)], ids=str
)
def test_all_forms_compute_the_same(shape: Shape) -> None:
    torch.manual_seed(0)
    images = 8
    found = convolutions.forms(shape, images)
    del found["bound"]
    assert list(found) == list(PASSES)
    for name, forms in found.items():
        wanted = forms["torch, channels-last"]()
        for form, call in forms.items():
            value = call()
            if value.dim() == 2:  # of a matrix product: pixels or weights by channels
                like = wanted if name == "grad_weight" else wanted.movedim(1, -1)
                value = (
                    value.view_as(like)
                    if name != "grad_weight" or form == "matrix product"
                    else value.view(wanted.shape)
                )
                value = value if name == "grad_weight" else value.movedim(-1, 1)
            torch.testing.assert_close(
                value, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()), msg=f"{name}, {form}"
            )
    taken = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and winograd.compiled() is not None
    assert all(("winograd" in forms) == (taken and shape == WIDE) for forms in found.values())


def test_the_shapes_are_the_networks() -> None:
    shapes = convolutions.shapes_of(ModelConfig(name="resnet50d"), 224, 1000)
    assert shapes[Shape(64, 64, 3, 1, 1, 56)] == 3 and shapes[Shape(256, 1024, 1, 1, 0, 14)] == 6
    assert shapes.total() == 55  # 50 layers less the classifier; a stem of three, and four paths B
    flops = sum(layers * shape.flops(1) for shape, layers in shapes.items())
    assert flops == pytest.approx(2 * 4.35e9, rel=0.01)  # timm's count of multiply-adds, in millions: 4,350


def test_others_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="without groups"):
        convolutions.shapes_of(ModelConfig(name="mobilenet_v1"), 32, 10)


def test_the_table_adds_up_its_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(calls: dict[str, convolutions.Forms], turns: int, repeats: int) -> dict[str, dict[str, float]]:
        assert turns == 2 and repeats >= 1
        return {
            name: {form: 1e-3 * (index + 1) for index, form in enumerate(reversed(forms))}
            for name, forms in calls.items()
        }

    monkeypatch.setattr(convolutions, "best_seconds", seconds)
    monkeypatch.setattr(parts, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(sys, "argv", ["convolutions", "cifar10", "--batch-size", "2", "--turns", "2"])
    convolutions.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    sums = {row[0].removeprefix("| "): [float(cell.removesuffix(" |")) for cell in row[1:]] for row in rows[-4:]}
    assert list(sums) == [*PASSES, "all"]
    layers = convolutions.shapes_of(ModelConfig(name="resnet10d", width=0.5, stem_stride=2), 32, 10).total()
    assert sums["forward"][1] == sums["forward"][2] == layers, "a millisecond each"
    assert sums["all"] == pytest.approx([sum(sums[name][column] for name in PASSES) for column in range(3)])
