"""From a config's model name to the network, and what a wrong name is answered with."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature

import pytest
import torch

from fasttricks.config import NETWORKS, ConfigError, DataConfig, ModelConfig, model_info, variant_of
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


def test_every_network_has_a_constructor_and_a_row_that_agree() -> None:
    assert list(MODELS) == list(NETWORKS)
    for name, info in NETWORKS.items():
        assert info == model_info(name) and info.name == name
        options = signature(MODELS[name]).parameters.keys() - {"num_classes", "spec"}
        options -= {"output_stride"}  # of segmentation: segment.output_stride
        assert options == set(info.options), name
        assert name.startswith(info.family)
        assert name == (f"{name[:-1]}{info.variant}" if info.family == "resnet" else name)
        assert (info.variant in tuple("abcd")) == (info.family == "resnet")


def test_images_are_those_that_each_network_was_made_for() -> None:
    """As timm has them of weights that were trained as the networks' papers say; each of its names is the network's own."""
    timm = pytest.importorskip("timm")
    weights = {"resnet50b": "gluon", "resnet50d": "gluon", "inception_v3": "gluon", "mobilenet_v1": "ra4_e3600_r224"}
    for name, tag in weights.items():
        info = model_info(name)
        trained = timm.get_pretrained_cfg(f"{info.timm}.{tag}_in1k")
        assert trained.input_size == (3, info.image_size, info.image_size)
        assert info.val_resize == round(info.image_size / trained.crop_pct)
    sizes = {(info.image_size, info.val_resize) for info in NETWORKS.values() if info.family in ("resnet", "mobilenet")}
    assert sizes == {(DataConfig().image_size, DataConfig().val_resize)}


def test_a_name_of_no_known_network_is_judged_when_it_is_built() -> None:
    config = ModelConfig(name="resnet50", width=0.5, zero_gamma=True, aux_head=True)
    assert model_info("resnet50").family == ""
    with pytest.raises(ConfigError, match=r"model\.name = 'resnet50': needs its variant"):
        build_model(config, num_classes=3)


def test_no_classes_is_an_error() -> None:
    with pytest.raises(ConfigError, match="num_classes = 0"):
        build_model(ModelConfig(name="resnet8d"), num_classes=0)


def test_variant_of_names_models_that_exist() -> None:
    assert variant_of("resnet50a", "d") == "resnet50d"
    resnets = {name for name in MODELS if name.startswith("resnet")}
    assert {variant_of(name, letter) for name in resnets for letter in "abcd"} == resnets
    for name, letter in [
        ("resnet50", "d"),
        ("inception_v3", "d"),
        ("resnet99a", "d"),
        ("resnet50a", "e"),
        ("resnet50a", ""),
    ]:
        with pytest.raises(ConfigError):
            variant_of(name, letter)


def test_what_is_known_of_networks_does_not_import_torch() -> None:
    code = "import sys, fasttricks.config.networks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
