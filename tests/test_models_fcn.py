"""FCN: outputs and keys of torchvision's; base networks of ours and of timm; the weights that it starts from; its parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttricks.config import ConfigError, DataConfig, ModelConfig, SegmentConfig
from fasttricks.learning.freezing import freeze
from fasttricks.learning.initial import start_from
from fasttricks.learning.optim import parameter_groups
from fasttricks.learning.precision import halve
from fasttricks.models import base_prefix, build_model, head_names, new_names
from fasttricks.models.fcn import FCN, build_fcn
from fasttricks.runs.stored import CheckpointError
from fasttricks.runs.weights import Weights
from lib.networks import on_meta, with_random_norms

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

TINY = ModelConfig(name="resnet8d", width=0.125)
CLASSES = ("sky", "road", "tree")
DATA = DataConfig()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(**segment: object) -> FCN:
    return build_fcn(TINY, SegmentConfig(**segment), len(CLASSES))  # type: ignore[arg-type]


def test_outputs_are_torchvisions() -> None:
    """fcn_resnet50, whose keys and weights are those of the FCN on our ResNet-50-B; the auxiliary head's too."""
    reference = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=7, aux_loss=True
    )
    with_random_norms(reference).eval()
    ours = on_meta(lambda: build_fcn(ModelConfig(name="resnet50b"), SegmentConfig(), 7))
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    assert isinstance(ours, FCN) and ours.aux_classifier is not None
    with torch.no_grad():
        for sides in ((48, 64), (41, 33)):
            images = torch.randn(1, 3, *sides)
            expected = reference(images)
            torch.testing.assert_close(ours.eval()(images), expected["out"], rtol=1e-5, atol=1e-5)
            for module in ours.modules():  # the heads' outputs of training, with the statistics of evaluation
                module.training = module is ours
            for found, name in zip(ours(images), ("out", "aux"), strict=True):
                torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        *((f"resnet18{letter}", 8) for letter in "abcd"),
        ("resnet11d", 16),
        ("mobilenet_v1", 8),
        ("cifarnet", 32),
        ("timm:resnet18d", 8),
        ("timm:convnext_atto", 32),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                ("inception_v3", 32),
                ("timm:resnet18d", 32),
                ("timm:mobilenetv3_small_050", 32),
                ("timm:efficientnet_b0", 8),
                ("timm:regnetx_002", 16),
            )
        ),
    ],
)
def test_every_base_network_gives_logits_of_the_images_size(name: str, stride: int) -> None:
    """With an auxiliary head in training, and without a parameter that has no gradient: ranks would wait for it."""
    width = {"width": 0.125} if not name.startswith("timm:") else {}
    model = build_fcn(ModelConfig(name=name, **width), SegmentConfig(output_stride=stride), 5)  # type: ignore[arg-type]
    images = torch.randn(2, 3, 96, 128)
    logits, auxiliary = model(images)
    assert logits.shape == auxiliary.shape == (2, 5, 96, 128) and logits.dtype == torch.float32
    features = model.backbone.features(images)  # type: ignore[operator]
    assert model.backbone.feature_strides[-1] <= stride  # type: ignore[index]
    if name not in ("inception_v3", "cifarnet"):  # whose convolutions without padding lose a border
        assert features[-1].shape[2:] == (96 // stride, 128 // stride)
    (logits.sum() + auxiliary.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert model.eval()(images).shape == (2, 5, 96, 128)


def test_without_an_auxiliary_head_there_is_none() -> None:
    model = tiny(aux_weight=0.0)
    assert model.aux_classifier is None and model(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    assert not [name for name in model.state_dict() if name.startswith("aux_classifier")]


@pytest.mark.parametrize(
    ("name", "stride", "says"),
    [
        ("nets:make", 8, r"model\.name = 'nets:make': has no features that are known here; "),
        ("inception_v3", 8, r"segment\.output_stride = 8: inception_v3 has no dilated stages; give 32, or"),
        ("resnet9z", 8, r"model\.name = 'resnet9z': is no model; the nearest is "),
        ("resnet50", 8, r"model\.name = 'resnet50': needs its variant: resnet50b is "),
        ("timm:vgg11", 8, r"segment\.output_stride = 8: timm:vgg11 does not take it \(.*\); give 32, or"),
        ("timm:resnet18x", 8, r"model\.name = 'timm:resnet18x': is no model of timm"),
    ],
)
def test_a_network_that_cannot_be_a_base_is_refused_by_name(name: str, stride: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_fcn(ModelConfig(name=name), SegmentConfig(output_stride=stride), 3)  # type: ignore[arg-type]


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttricks.system.extras._present", lambda name: False)
    with pytest.raises(ConfigError, match=r"task segmentation needs torchvision, not installed here; "):
        tiny()


# ------------------------------------------------------------------------------------------------ weights, lr, frozen parts
def start(model: FCN, tensors: dict[str, torch.Tensor], config: ModelConfig = TINY, **facts: object) -> str:
    return start_from(Weights(tensors=tensors, source="w", **facts), model, config, DATA, CLASSES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["resnet8d", "mobilenet_v1", "timm:resnet18d", pytest.param("timm:efficientnet_b0", marks=pytest.mark.slow)],
)
def test_a_classifiers_weights_are_the_base_networks(name: str) -> None:
    config = ModelConfig(name=name) if name.startswith("timm:") else ModelConfig(name=name, width=0.125)
    classifier = with_random_norms(build_model(config, 10))
    model = build_fcn(config, SegmentConfig(), len(CLASSES))
    heads = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    account = start(model, classifier.state_dict(), config, network=name, classes=("a", *"bcdefghij"))
    assert account.endswith("a new head of 3 classes on it")
    now, prefix = model.state_dict(), base_prefix(model)
    for key, value in classifier.state_dict().items():
        if f"{prefix}{key}" in now:
            assert torch.equal(now[f"{prefix}{key}"], value), key
    assert all(torch.equal(now[key], value) for key, value in heads.items())
    assert {key for key in now if key.startswith("backbone.")} <= {f"{prefix}{key}" for key in classifier.state_dict()}


def test_an_fcns_weights_come_with_their_heads_by_class_name() -> None:
    theirs, ours = tiny(), build_fcn(TINY, SegmentConfig(aux_weight=0.0), 3)
    account = start(ours, theirs.state_dict(), network="resnet8d", classes=("road", "sea", "sky"))
    assert account.endswith("its classifier by class name: 2 of 3 classes, 1 new")
    for ours_at, theirs_at in ((0, 2), (1, 0)):
        assert torch.equal(ours.classifier[4].weight[ours_at], theirs.classifier[4].weight[theirs_at])  # type: ignore[index]
    assert torch.equal(ours.classifier[0].weight, theirs.classifier[0].weight)  # type: ignore[index]
    again = tiny()
    assert "3 tensors" not in start(again, ours.state_dict(), network="resnet8d", classes=CLASSES)


def test_weights_of_another_network_are_refused() -> None:
    wide = build_model(ModelConfig(name="resnet8d", width=0.25), 10).state_dict()
    with pytest.raises(CheckpointError, match=r"must have the keys and shapes of this network .* of another shape"):
        start(tiny(), wide)
    with pytest.raises(CheckpointError, match=r"1 missing: backbone\.conv1\.0\.weight"):
        start(tiny(), {k: v for k, v in build_model(TINY, 10).state_dict().items() if k != "conv1.0.weight"})
    with pytest.raises(CheckpointError, match=r"1 unknown: backbone\.strange"):
        start(tiny(), {**build_model(TINY, 10).state_dict(), "strange": torch.zeros(1)})


def test_the_heads_alone_have_the_whole_learning_rate() -> None:
    model = tiny()
    groups = parameter_groups(model, weight_decay=1e-4, bias_decay=True, backbone_lr=0.1)
    factors = {id(p): group.get("lr_factor", 1.0) for group in groups for p in group["params"]}
    found = {name: factors[id(p)] for name, p in model.named_parameters()}
    assert found == {name: 0.1 if name.startswith("backbone.") else 1.0 for name in found}
    assert {name.partition(".")[0] for name in new_names(model)} == {"classifier", "aux_classifier"}
    assert set(head_names(model)) == {
        f"{h}.4.{p}" for h in ("classifier", "aux_classifier") for p in ("weight", "bias")
    }


@pytest.mark.parametrize("name", ["resnet8d", "mobilenet_v1", "timm:resnet18d"])
def test_parts_of_the_base_network_freeze_by_their_names_there(name: str) -> None:
    model = build_fcn(ModelConfig(name=name), SegmentConfig(), 3)
    first = "blocks.0" if name == "mobilenet_v1" else "layer1"
    freeze(model, ["stem", first]).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen and all(name.startswith(base_prefix(model)) for name in frozen)
    assert {name for name, _ in model.named_parameters() if f".{first}." in name} < frozen
    norms = [m.training for n, m in model.named_modules() if f".{first}." in n and isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(norms)
    with pytest.raises(ConfigError, match=r"model\.freeze = 'layer9': unknown; did you mean"):
        freeze(tiny(), ["layer9"])


def test_half_precision_keeps_the_logits_in_float32() -> None:
    model = halve(tiny().to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    logits, auxiliary = model(torch.randn(2, 3, 32, 32).half().contiguous(memory_format=torch.channels_last))
    assert logits.dtype == auxiliary.dtype == torch.float32 and bool(logits.isfinite().all())
    assert logits.is_contiguous(memory_format=torch.channels_last), "rows of classes are then a view"
    assert {p.dtype for p in parameter_groups(model, weight_decay=0, bias_decay=False)[0]["params"]} == {torch.float16}
