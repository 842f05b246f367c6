"""From a config's model name to the network, and what a wrong name is answered with."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fasttricks.config import ConfigError, ModelConfig
from fasttricks.config.model_names import variant_of
from fasttricks.models import MODELS, build_model
from fasttricks.models.resnet import ResNet


def test_build_model_passes_every_field_on() -> None:
    config = ModelConfig(name="resnet10d", num_classes=0, stem_stride=1, width=0.25, zero_gamma=True)
    model = build_model(config, num_classes=7)
    assert isinstance(model, ResNet)
    assert model.fc.weight.shape == (7, 128)
    assert model.features(torch.randn(2, 3, 32, 32))[0].shape == (2, 16, 32, 32)
    assert not model.layer1[0].bn2.weight.any()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnet50", "resnet50b"), ("resnt50d", "resnet50d"), ("RESNET101A", "resnet101a"), ("ResNet18", "resnet18b")],
)
def test_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.name = '{name}'.* {nearest}\b.*MODELS"):
        build_model(ModelConfig(name=name), num_classes=10)


def test_no_classes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="num_classes = 0"):
        build_model(ModelConfig(name="resnet8d"), num_classes=0)


def test_variant_of_names_models_that_exist() -> None:
    assert variant_of("resnet50a", "d") == "resnet50d"
    resnets = {name for name in MODELS if name.startswith("resnet")}
    assert {variant_of(name, letter) for name in resnets for letter in "abcd"} == resnets
    for name, letter in [("resnet50", "d"), ("inception_v3", "d"), ("resnet50a", "e"), ("resnet50a", "")]:
        with pytest.raises(ConfigError):
            variant_of(name, letter)


def test_model_names_do_not_import_torch() -> None:
    code = "import sys, fasttricks.config.model_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
