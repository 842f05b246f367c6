"""output_stride: dilated stages of ResNets and MobileNet against torchvision's and timm's, with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from fasttricks.models import MODELS
from lib.networks import on_meta, with_random_norms

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

REPLACED = {8: [False, True, True], 16: [False, False, True], 32: [False, False, False]}
REFERENCES: dict[str, Callable[[int], nn.Module]] = {
    "resnet50b": lambda stride: torchvision.models.resnet50(replace_stride_with_dilation=REPLACED[stride]),
    "resnet50d": lambda stride: timm.create_model("resnet50d", output_stride=stride),
    "resnet18b": lambda stride: timm.create_model("resnet18", output_stride=stride),
    "resnet34d": lambda stride: timm.create_model("resnet34d", output_stride=stride),
    "mobilenet_v1": lambda stride: timm.create_model("mobilenetv1_100", output_stride=stride),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


SLOW = (("resnet34d", 8), ("resnet34d", 16), ("resnet50b", 16), ("resnet50d", 16))
EVERY = [
    pytest.param(name, stride, marks=[pytest.mark.slow] if (name, stride) in SLOW else [])
    for name in REFERENCES
    for stride in (8, 16)
]


@pytest.mark.parametrize(("name", "stride"), EVERY)
def test_outputs_are_the_references(name: str, stride: int) -> None:
    """On odd sides too; the keys are those of the network without dilation, so classifiers' weights load."""
    reference = with_random_norms(REFERENCES[name](stride)).eval()
    ours = on_meta(lambda: MODELS[name](output_stride=stride)).eval()
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    assert ours.state_dict().keys() == on_meta(MODELS[name]).state_dict().keys()
    with torch.no_grad():
        for side in (64, 49):
            images = torch.randn(2, 3, side, side)
            torch.testing.assert_close(ours(images), reference(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stem_stride", "output_stride", "strides"),
    [
        ("resnet50a", 4, 32, (4, 8, 16, 32)),
        ("resnet50a", 4, 16, (4, 8, 16, 16)),
        ("resnet50d", 4, 8, (4, 8, 8, 8)),
        ("resnet10d", 2, 8, (2, 4, 8, 8)),
        ("resnet10d", 1, 8, (1, 2, 4, 8)),
        ("resnet8d", 4, 8, (4, 8, 8)),
        ("mobilenet_v1", None, 8, (4, 8, 8, 8)),
        ("mobilenet_v1", None, 16, (4, 8, 16, 16)),
        ("mobilenet_v1", None, 32, (4, 8, 16, 32)),
    ],
)
def test_features_have_the_strides_that_the_network_says(
    name: str, stem_stride: int | None, output_stride: int, strides: tuple[int, ...]
) -> None:
    stem = {} if stem_stride is None else {"stem_stride": stem_stride}
    model = on_meta(lambda: MODELS[name](**stem, output_stride=output_stride)).eval()
    assert model.feature_strides == strides
    features = model.features(torch.empty(1, 3, 67, 93, device="meta"))
    assert [one.shape[1] for one in features] == list(model.feature_channels)
    assert [one.shape[2:] for one in features] == [(-(-67 // s), -(-93 // s)) for s in strides]


@pytest.mark.parametrize("letter", "abcd")
def test_a_narrow_network_keeps_its_keys(letter: str) -> None:
    """At this width all stages have 8 channels, so that a dilated block would not need its path B for the shape."""
    plain, dilated = (
        on_meta(lambda stride=stride: MODELS[f"resnet18{letter}"](width=0.01, output_stride=stride))  # type: ignore[misc]
        for stride in (32, 8)
    )
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (plain, dilated)]
    assert shapes[0] == shapes[1]
