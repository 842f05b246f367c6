"""python -m bench.convolutions: the network's shapes, forms that compute the same, and its table's sums."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import convolutions, parts
from bench.convolutions import PASSES, Shape
from fasttricks.config import ModelConfig
from fasttricks.models.convolution import Conv2d
from fasttricks_kernels.convolution import winograd

WIDE = Shape(64, 96, 3, 1, 1, 16)


@pytest.mark.parametrize(
    "shape", [WIDE, Shape(5, 7, 1, 1, 0, 6), Shape(3, 8, 3, 2, 1, 9), Shape(3, 4, 7, 2, 3, 16)], ids=str
)
def test_all_forms_compute_the_same(shape: Shape) -> None:
    torch.manual_seed(0)
    images = 8
    found = convolutions.forms(shape, images)
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


@pytest.mark.parametrize(
    ("shape", "own"),
    [
        (WIDE, ["winograd"] * 3),
        (Shape(320, 256, 3, 1, 1, 7), ["winograd", "winograd", "torch, channels-last"]),
        (Shape(256, 128, 1, 1, 0, 12), ["torch, channels-last", "matrix product", "matrix product"]),
        (Shape(256, 128, 1, 2, 0, 12), ["torch, channels-last"] * 3),
        (Shape(3, 8, 3, 2, 1, 9), ["torch, channels-last"] * 3),
    ],
    ids=str,
)
def test_ours_is_what_the_layer_calls(shape: Shape, own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if winograd.compiled() is None:
        pytest.skip("the project's convolutions are for AVX2 and AVX-512")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    images = 16
    found = convolutions.ours(shape, images)
    assert found == dict(zip(PASSES, own, strict=True))
    layer = Conv2d(shape.channels, shape.outputs, shape.kernel, shape.stride, shape.padding, bias=False)
    torch.manual_seed(0)
    x, weight, grad = convolutions.drawn(shape, images)
    layer.weight.data = weight
    y = layer(x.requires_grad_())
    passes = dict(zip(PASSES, (y, *torch.autograd.grad(y, (x, layer.weight), grad)), strict=True))
    torch.manual_seed(0)
    forms = convolutions.forms(shape, images)
    for name, form in found.items():
        made = forms[name][form]()
        got = passes[name] if made.dim() == 4 else passes[name].permute(0, 2, 3, 1).reshape(made.shape)
        assert torch.equal(made, got), name


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
    monkeypatch.setattr(convolutions, "roof", lambda turns: (1e11, 1e10))  # 10 FLOPs a byte
    monkeypatch.setattr(parts, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(sys, "argv", ["convolutions", "cifar10", "--batch-size", "2", "--turns", "2"])
    convolutions.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    sums = {row[0].removeprefix("| "): [float(cell.removesuffix(" |")) for cell in row[1:]] for row in rows[-4:]}
    assert list(sums) == [*PASSES, "all"]
    layers = convolutions.shapes_of(ModelConfig(name="resnet10d", width=0.5, stem_stride=2), 32, 10).total()
    assert sums["forward"][1] == layers, "a millisecond each"
    assert sums["forward"][1] <= sums["forward"][2] <= sums["forward"][0]
    assert sums["all"] == pytest.approx([sum(sums[name][column] for name in PASSES) for column in range(4)], abs=0.2)
    bounds = {row[0]: row[-1].removesuffix(" |").split(", ")[1] for row in rows[1:-5]}
    assert set(bounds.values()) == {"arithmetic", "memory"}
    assert bounds["| 3, 16, 3, 2, 32"] == "memory" and bounds["| 64, 64, 3, 1, 8"] == "arithmetic"


def test_the_roof_is_of_a_product_and_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolutions, "COPIED", 1000)
    monkeypatch.setattr(convolutions, "GEMM_SIDES", (10, 20))
    monkeypatch.setattr(convolutions, "best_seconds", lambda *_: {"10": {"": 2.0}, "20": {"": 4.0}, "copy": {"": 4.0}})
    assert convolutions.roof(1) == (2 * 20**3 / 4, 2000)
