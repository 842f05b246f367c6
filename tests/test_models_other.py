"""Inception-V3 and MobileNet-V1 against torchvision and timm: keys, outputs, gradients, sizes; timm's networks by name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttricks.config import ConfigError, DataConfig, LossConfig, ModelConfig, TrainConfig
from fasttricks.learning.precision import halve
from fasttricks.models import MODELS, build_model
from fasttricks.tasks.classification import CLASSIFICATION
from fasttricks.tasks.losses import Targets, training_loss
from fasttricks.trainer import train_step
from fasttricks.training.build import build
from fasttricks.training.checks import check_sizes
from lib.networks import multiply_adds, on_meta, with_random_norms
from lib.tiny import ALONE, configure

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def reference_inception(*, aux: bool = False) -> nn.Module:
    """torchvision's, on images normalised as they come."""
    model: nn.Module = torchvision.models.inception_v3(
        weights=None, aux_logits=aux, transform_input=False, init_weights=False
    )
    return with_random_norms(model)


REFERENCES: dict[str, Callable[[], nn.Module]] = {
    "inception_v3": reference_inception,
    "mobilenet_v1": lambda: with_random_norms(timm.create_model("mobilenetv1_100")),
}
# sides that are odd and even at other stages; at the published ones test_every_model.py has the features' sides
SIDES = {"inception_v3": (123, 100), "mobilenet_v1": (64, 49)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def assert_same_gradients(ours: nn.Module, reference: nn.Module) -> None:
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        expected = theirs[name].grad
        assert parameter.grad is not None and expected is not None, name
        scale, difference = float(expected.abs().max()), float((parameter.grad - expected).abs().max())
        assert difference <= 1e-5 * scale, f"gradient of {name} is off by {difference:g} of {scale:g}"


@pytest.mark.parametrize("name", REFERENCES)
def test_outputs_and_gradients_agree_with_the_reference(name: str) -> None:
    reference, ours = REFERENCES[name]().eval(), MODELS[name]().eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    for side in SIDES[name]:
        images = torch.randn(1, 3, side, side)
        logits, expected = ours(images), reference(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for output in (logits, expected):
        (output**2).sum().backward()
    assert_same_gradients(ours, reference)


@pytest.mark.slow
def test_the_auxiliary_head_is_torchvisions() -> None:
    """In training mode, dropout and all: both draw the same mask from the same generator."""
    reference, ours = reference_inception(aux=True), MODELS["inception_v3"](aux_head=True)
    ours.load_state_dict(reference.state_dict(), strict=True)
    images, labels = torch.randn(2, 3, 299, 299), torch.tensor([3, 997])
    torch.manual_seed(1)
    logits, auxiliary = ours(images)
    torch.manual_seed(1)
    expected = reference(images)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(auxiliary, expected.aux_logits, rtol=1e-5, atol=1e-5)
    loss = training_loss((logits, auxiliary), Targets(labels), LossConfig(aux_weight=0.3))
    criterion = nn.CrossEntropyLoss(reduction="sum")
    theirs = criterion(expected.logits, labels) + 0.3 * criterion(expected.aux_logits, labels)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert ours.AuxLogits.fc.weight.grad.abs().max() > 0
    assert isinstance(ours.eval()(images), Tensor)


def test_sizes_are_the_published_ones() -> None:
    """torchvision publishes Inception-V3 with its auxiliary head; 4.2 M and 569 M are the MobileNet paper's (its table 8)."""
    published = torchvision.models.get_model_weights("inception_v3").IMAGENET1K_V1.meta
    with_head = on_meta(lambda: MODELS["inception_v3"](aux_head=True))
    assert sum(p.numel() for p in with_head.parameters()) == published["num_params"]
    assert round(multiply_adds(with_head.eval(), 299) / 1e9, 3) == published["_ops"]
    inception, mobilenet = on_meta(MODELS["inception_v3"]), on_meta(MODELS["mobilenet_v1"])
    assert sum(p.numel() for p in inception.parameters()) == 23_834_568
    assert sum(p.numel() for p in mobilenet.parameters()) == 4_231_976
    assert round(multiply_adds(mobilenet) / 1e6) == 569


FEATURES: dict[str, tuple[list[str], list[int]]] = {
    "inception_v3": (["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"], [192, 288, 768, 2048]),
    "mobilenet_v1": ([f"blocks.{i}" for i in (1, 2, 3, 4)], [128, 256, 512, 1024]),
}


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_the_references_stage_outputs(name: str) -> None:
    nodes, channels = FEATURES[name]
    reference, ours = REFERENCES[name]().eval(), MODELS[name]().eval()
    ours.load_state_dict(reference.state_dict())
    found: list[Tensor] = []
    for node in nodes:
        reference.get_submodule(node).register_forward_hook(lambda module, args, out: found.append(out.clone()))
    images = torch.randn(1, 3, SIDES[name][0], SIDES[name][0])
    with torch.no_grad():
        reference(images)
        features = ours.features(images)
    # compared after the whole pass: no stage may have written into the output of the one before
    for feature, expected in zip(features, found, strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-5, atol=1e-5)
    assert [f.shape[1] for f in features] == channels
    assert ours.num_features == channels[-1]


def test_width_scales_every_channel_count_to_a_multiple_of_8() -> None:
    for make in (MODELS["inception_v3"], MODELS["mobilenet_v1"]):
        full, half = (on_meta(partial(make, width=width)) for width in (1.0, 0.5))
        for (key, wide), (_, narrow) in zip(full.named_modules(), half.named_modules(), strict=True):
            if isinstance(wide, nn.Conv2d):
                assert abs(narrow.out_channels - wide.out_channels / 2) <= 4, key
                assert narrow.out_channels % 8 == 0


def small_config(data: Path, run_dir: Path, side: int, **model: Any) -> TrainConfig:
    """A run of seconds with another network, its width small where it has one."""
    width = 1.0 if model["name"].startswith("timm:") else 0.125
    data_config = DataConfig(root=str(data), image_size=side, val_resize=side, threads=1)
    network = ModelConfig(**{"width": width, **model})
    return dataclasses.replace(configure(data, run_dir), model=network, data=data_config, device="cpu")


@pytest.mark.slow
def test_dropout_of_a_step_depends_on_seed_step_and_rank_alone(tiny_data: Path, tmp_path: Path) -> None:
    """So a resumed run of a network with dropout is the same run, whatever drew from torch's generator before."""
    weights = []
    for index, drawn in enumerate((0, 7)):
        run = build(small_config(tiny_data, tmp_path / f"run{index}", 75, name="inception_v3"), ALONE)
        batch = next(iter(run.train_loader))
        torch.rand(drawn)
        train_step(run, [batch])
        train_step(run, [batch])
        run.log.close()
        weights.append(run.model.fc.weight.clone())
    assert torch.equal(*weights)
    torch.manual_seed(0)
    one, other = (run.model.train()(batch.images) for _ in range(2))
    assert not torch.equal(one, other), "nothing was dropped"


# ------------------------------------------------------------------------------------------------ too small an image


@pytest.mark.parametrize(
    ("options", "side", "fits"),
    [
        ({"name": "inception_v3"}, 75, True),
        ({"name": "inception_v3"}, 74, False),
        ({"name": "inception_v3", "aux_head": True}, 299, True),
        ({"name": "inception_v3", "aux_head": True}, 298, False),
        ({"name": "mobilenet_v1"}, 8, True),
        ({"name": "cifarnet"}, 9, True),
        ({"name": "cifarnet"}, 8, False),
        ({"name": "timm:test_vit"}, 32, True),
        ({"name": "timm:test_vit"}, 40, False),
    ],
)
def test_an_image_that_the_network_cannot_take_is_refused(
    options: dict[str, Any], side: int, fits: bool, tmp_path: Path
) -> None:
    config = small_config(tmp_path, tmp_path / "run", side, **options)
    if fits:
        check_sizes(CLASSIFICATION, config, 3, smallest_batch=2)
    else:
        with pytest.raises(ConfigError, match=rf"data\.image_size = {side}: is not accepted by {options['name']}"):
            check_sizes(CLASSIFICATION, config, 3, smallest_batch=2)


@pytest.mark.parametrize(
    ("name", "side"), [("mobilenet_v1", 32), ("inception_v3", 75), ("resnet10d", 32), ("cifarnet", 9)]
)
def test_one_image_that_shrinks_to_one_pixel_is_refused(name: str, side: int, tmp_path: Path) -> None:
    config = small_config(tmp_path, tmp_path / "run", side, name=name)
    check_sizes(CLASSIFICATION, config, 3, smallest_batch=2)
    with pytest.raises(ConfigError, match=rf"batch of one image, whose {side} pixels the network shrinks to 1"):
        check_sizes(CLASSIFICATION, config, 3, smallest_batch=1)


# ------------------------------------------------------------------------------------------------------------- timm's


def test_a_name_of_timms_is_timms_network() -> None:
    torch.manual_seed(1)
    ours = build_model(ModelConfig(name="timm:resnet18d"), num_classes=7)
    torch.manual_seed(1)
    theirs = timm.create_model("resnet18d", num_classes=7)
    assert type(ours) is type(theirs) and ours.training
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_network_of_timms_trains(tiny_data: Path, tmp_path: Path) -> None:
    run = build(small_config(tiny_data, tmp_path / "run", 32, name="timm:test_resnet"), ALONE)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    train_step(run, [next(iter(run.train_loader))])
    run.log.close()
    after = run.model.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not torch.equal(before["fc.weight"], after["fc.weight"])


def test_an_unknown_name_of_timms_is_answered_with_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.name = 'timm:resnet50x': is no model of timm .*; the nearest is timm:resnet50"
    ):
        build_model(ModelConfig(name="timm:resnet50x"), num_classes=3)


def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ConfigError, match=r"model\.name = 'timm:resnet18': needs timm; install it with: pip install timm"
    ):
        build_model(ModelConfig(name="timm:resnet18"), num_classes=3)


@pytest.mark.parametrize("option", [{"width": 0.5}, {"zero_gamma": True}, {"stem_stride": 2}, {"aux_head": True}])
def test_options_of_our_networks_are_refused_for_timms(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{next(iter(option))} = .*: not for model\.name = 'timm:resnet18'"):
        ModelConfig(name="timm:resnet18", **option)


def test_fp16_refuses_a_network_it_does_not_know_how_to_halve() -> None:
    vit = build_model(ModelConfig(name="timm:test_vit"), num_classes=3)
    with pytest.raises(ConfigError, match=r"precision = 'fp16': knows convolutions, .*--precision bf16"):
        halve(vit)
    assert {m.weight.dtype for m in halve(timm.create_model("test_resnet")).modules() if isinstance(m, nn.Conv2d)} == {
        torch.float16
    }
