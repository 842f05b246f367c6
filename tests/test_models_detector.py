"""The detector: losses, detections and keys of torchvision's; base networks of ours and of timm; weights, frozen batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fasttricks.config import ConfigError, DataConfig, DetectConfig, ModelConfig
from fasttricks.learning.freezing import freeze, moving_buffers
from fasttricks.learning.initial import start_from
from fasttricks.learning.optim import parameter_groups
from fasttricks.learning.precision import halve
from fasttricks.models import base_prefix, build_model, head_names, new_names
from fasttricks.models.detector import build_detector
from fasttricks.models.norm import activated
from fasttricks.runs.stored import CheckpointError
from fasttricks.runs.weights import Weights
from lib.networks import with_random_norms

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

TINY = ModelConfig(name="resnet8d", width=0.125)
SMALL = DetectConfig(channels=8, head_features=8, train_proposals=40, test_proposals=40, train_samples=8)
CLASSES = ("ball", "car", "tree")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(classes: int = 3) -> Any:
    return build_detector(TINY, SMALL, classes)


def targets(*boxes: list[list[float]]) -> list[dict[str, Tensor]]:
    """Of each image its boxes, of the classes 1, 2, ..."""
    return [
        {"boxes": torch.tensor(one, dtype=torch.float32).reshape(-1, 4), "labels": torch.arange(1, len(one) + 1)}
        for one in boxes
    ]


IMAGES = [(64, 96), (80, 70)]
BOXES = targets([[5, 5, 40, 40], [10, 20, 60, 60]], [])


def test_losses_and_detections_are_torchvisions() -> None:
    """fasterrcnn_resnet50_fpn with the same weights, a sum of random norms, and an image without boxes in the batch."""
    reference = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=4, rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100
    )
    with_random_norms(reference)
    reference.transform.resize = lambda image, target=None: (image, target)
    ours: Any = build_detector(
        ModelConfig(name="resnet50b"),
        DetectConfig(score_threshold=0.05, nms_threshold=0.5, train_proposals=100),
        3,
    )
    ours.rpn._pre_nms_top_n["training"] = 200
    found = ours.load_state_dict(reference.state_dict(), strict=True)
    assert not found.missing_keys and not found.unexpected_keys
    images = [torch.rand(3, *size) for size in IMAGES]
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (reference.transform.image_mean, reference.transform.image_std)
    )
    shown = [(image - mean) / std for image in images]
    losses = []
    for model, given in ((reference, images), (ours, shown)):
        model.train()
        model.backbone.eval()  # the statistics of batch norm are those of the weights
        torch.manual_seed(1)  # of the samples
        losses.append(model(given, [dict(one) for one in BOXES]))
    assert losses[1].keys() == losses[0].keys() and len(losses[0]) == 4
    for name, loss in losses[0].items():
        torch.testing.assert_close(losses[1][name], loss, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        pairs = zip(reference.eval()(images), ours.eval()(shown), strict=True)
    for theirs, mine in pairs:
        assert len(theirs["scores"]) > 5 and torch.equal(mine["labels"], theirs["labels"])
        torch.testing.assert_close(mine["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine["boxes"], theirs["boxes"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("resnet10a", (4, 8, 16, 32)),
        ("resnet8d", (4, 8, 16)),
        ("mobilenet_v1", (4, 8, 16, 32)),
        ("timm:resnet18d", (4, 8, 16, 32)),
        *(
            pytest.param(name, (4, 8, 16, 32), marks=pytest.mark.slow)
            for name in ("resnet18b", "resnet18c", "resnet50d", "timm:convnext_atto", "timm:efficientnet_b0")
        ),
    ],
)
def test_every_base_network_trains_and_detects(name: str, strides: tuple[int, ...]) -> None:
    """No parameter that is trained goes without a gradient: ranks would wait for it; also of no boxes, and of no images."""
    width = {"width": 0.125} if not name.startswith("timm:") else {}
    model: Any = build_detector(ModelConfig(name=name, **width), SMALL, 3)  # type: ignore[arg-type]
    assert tuple(model.backbone.body.feature_strides) == strides
    batches = [([torch.randn(3, *size) for size in IMAGES], BOXES), ([torch.randn(3, 64, 64)], targets([])), ([], [])]
    for images, boxes in batches:
        model.zero_grad(set_to_none=True)
        losses = model(images, boxes)
        assert all(bool(loss.isfinite()) and loss.dtype == torch.float32 for loss in losses.values())
        sum(losses.values()).backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(bool(p.grad.any()) for p in model.parameters())
    with torch.no_grad():
        (found,) = model.eval()([torch.randn(3, 40, 70)])
    assert found["boxes"].shape == (len(found["scores"]), 4) and bool((found["labels"] > 0).all())
    assert bool((found["boxes"][:, 2] <= 70).all()) and bool((found["boxes"][:, 3] <= 40).all())


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            ModelConfig(name="inception_v3"),
            r"^model\.name = 'inception_v3': makes no feature pyramid: its convolutions",
        ),
        (
            ModelConfig(name="cifarnet"),
            r"^model\.name = 'cifarnet': makes no feature pyramid: its convolutions",
        ),
        (ModelConfig(name="nets:make"), r"^model\.name = 'nets:make': has no features that are known here; "),
        (
            ModelConfig(name="timm:vit_tiny_patch16_224"),
            r"makes no feature pyramid: .* the strides 16, 16, 16, 16; take",
        ),
        (ModelConfig(name="timm:resnet18x"), r"model\.name = 'timm:resnet18x': is no model of timm"),
    ],
)
def test_a_network_that_makes_no_pyramid_is_refused_by_name(model: ModelConfig, says: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=says):
        build_detector(model, SMALL, 3)


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttricks.system.extras._present", lambda name: False)
    with pytest.raises(ConfigError, match=r"task detection needs torchvision, not installed here; "):
        tiny()


@pytest.mark.parametrize("stem", [4, 2, 1])
def test_the_anchors_are_as_large_as_the_strides_say(stem: int) -> None:
    """torchvision's 32 to 512 pixels on strides of 4 to 64, and smaller ones for a network that shrinks small images less."""
    model: Any = build_detector(ModelConfig(name="resnet10d", width=0.125, stem_stride=stem), SMALL, 1)  # type: ignore[arg-type]
    sides = [8.0 * stem * 2**level for level in range(5)]
    assert model.rpn.anchor_generator.sizes == tuple((side,) for side in sides)
    areas = [(a[:, 2:] - a[:, :2]).prod(1) for a in model.rpn.anchor_generator.cell_anchors]
    for side, area in zip(sides, areas, strict=True):  # corners are whole pixels
        assert len(area) == 3 and bool(((area - side**2).abs() <= 2.5 * side).all())


def test_regions_are_read_at_the_strides_of_the_maps_whatever_came_before() -> None:
    """torchvision infers the strides from the first image without its filling: of 33 pixels, filled up to 64, half of them."""
    boxes = [torch.tensor([[2.0, 3.0, 30.0, 31.0], [0.0, 0.0, 12.0, 9.0]])]
    maps = {str(level): torch.randn(1, 4, 16 // 2**level, 16 // 2**level) for level in range(3)}
    found, plain = [], torchvision.ops.MultiScaleRoIAlign(["0", "1", "2"], 7, 2)
    for first in ((33, 33), (64, 64)):
        pool = tiny().roi_heads.box_roi_pool
        pool(maps, boxes, [first])
        found.append(pool(maps, boxes, [(64, 64)]))
    assert torch.equal(*found)
    assert torch.equal(found[0], plain(maps, boxes, [(64, 64)]))


# ------------------------------------------------------------------------------------------- weights, lr, frozen parts
def start(model: nn.Module, tensors: dict[str, Tensor], config: ModelConfig = TINY, **facts: Any) -> str:
    return start_from(Weights(tensors=tensors, source="w", **facts), model, config, DataConfig(), CLASSES)


@pytest.mark.parametrize("name", ["resnet8d", "mobilenet_v1", "timm:resnet18d"])
def test_a_classifiers_weights_are_the_base_networks(name: str) -> None:
    config = ModelConfig(name=name) if name.startswith("timm:") else ModelConfig(name=name, width=0.125)
    classifier = with_random_norms(build_model(config, 10))
    model = build_detector(config, SMALL, 3)
    prefix = base_prefix(model)
    heads = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(prefix)}
    account = start(model, classifier.state_dict(), config, network=name, classes=(*"abcdefghij",))
    assert account.endswith("a new head of 3 classes on it")
    now = model.state_dict()
    base = {key: value for key, value in classifier.state_dict().items() if f"{prefix}{key}" in now}
    assert all(torch.equal(now[f"{prefix}{key}"], value) for key, value in base.items())
    assert set(now) == {f"{prefix}{key}" for key in base} | set(heads)
    assert (
        all(torch.equal(now[key], value) for key, value in heads.items())
        and "backbone.fpn.inner_blocks.0.0.weight" in heads
    )


def test_a_detectors_weights_come_with_its_heads_by_class_name() -> None:
    theirs, ours = tiny(2), tiny()
    account = start(ours, theirs.state_dict(), network="resnet8d", classes=("tree", "ball"))
    assert account.endswith("its classifier by class name: 2 of 3 classes, 1 new")
    mine, old = ours.roi_heads.box_predictor, theirs.roi_heads.box_predictor
    for at, there in ((0, 0), (1, 2), (3, 1)):  # the background, ball, tree
        assert torch.equal(mine.cls_score.weight[at], old.cls_score.weight[there])
        assert torch.equal(mine.bbox_pred.bias[4 * at : 4 * at + 4], old.bbox_pred.bias[4 * there : 4 * there + 4])
    assert torch.equal(ours.rpn.head.cls_logits.weight, theirs.rpn.head.cls_logits.weight)
    new = tiny()
    assert start(new, theirs.state_dict()).endswith("a new classifier of 3 classes: there it has 2")
    with pytest.raises(CheckpointError, match=r"names 5 classes, and its classifier has 2; use another one"):
        start(tiny(), theirs.state_dict(), classes=(*"abcde",))


def test_weights_of_another_network_are_refused() -> None:
    wide = build_model(ModelConfig(name="resnet8d", width=0.25), 10).state_dict()
    with pytest.raises(CheckpointError, match=r"must have the keys and shapes of this network .* of another shape"):
        start(tiny(), wide)
    with pytest.raises(CheckpointError, match=r"1 unknown: backbone\.body\.strange"):
        start(tiny(), {**build_model(TINY, 10).state_dict(), "strange": torch.zeros(1)})


def test_all_but_the_base_network_has_the_whole_learning_rate() -> None:
    model = tiny()
    groups = parameter_groups(model, weight_decay=1e-4, bias_decay=True, backbone_lr=0.1)
    factors = {id(p): group.get("lr_factor", 1.0) for group in groups for p in group["params"]}
    found = {name: factors[id(p)] for name, p in model.named_parameters()}
    assert found == {name: 0.1 if name.startswith("backbone.body.") else 1.0 for name in found}
    assert {name.partition(".")[0] for name in new_names(model)} == {"backbone", "rpn", "roi_heads"}
    layers = ("cls_score", "bbox_pred")
    assert set(head_names(model)) == {
        f"roi_heads.box_predictor.{one}.{p}" for one in layers for p in ("weight", "bias")
    }


@pytest.mark.parametrize("make", [lambda: build_model(TINY, 5), tiny], ids=["classifier", "detector"])
def test_frozen_batch_norm_is_torchvisions(make: Callable[[], Any]) -> None:
    """A fixed affine map by the weights' statistics, in training too; its keys stay, and the network around it is trained."""
    model = with_random_norms(make())
    keys = list(model.state_dict())
    freeze(model, ["batch_norm"]).train()
    assert list(model.state_dict()) == keys
    norms = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.BatchNorm2d)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert len(norms) == len([key for key in keys if key.endswith("running_mean")]) > 5
    for _, norm in norms[:3]:
        frozen = torchvision.ops.FrozenBatchNorm2d(norm.num_features)
        frozen.load_state_dict(norm.state_dict())
        images = torch.randn(4, norm.num_features, 5, 6, requires_grad=True)
        found = norm(images)
        torch.testing.assert_close(found, activated(frozen(images), None, norm.act), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and trained == {
        name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in dict(norms)
    }
    assert list(moving_buffers(model)) == []


def test_half_precision_is_for_the_base_network_and_the_pyramid() -> None:
    model = halve(tiny())
    dtypes = {name: p.dtype for name, p in model.named_parameters() if name.endswith("weight") and p.dim() > 1}
    assert dtypes == {name: torch.half if name.startswith("backbone.") else torch.float32 for name in dtypes}
    losses = model([torch.randn(3, 64, 64).half()], targets([[4, 4, 40, 40]]))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_autocast_leaves_boxes_in_float32() -> None:
    """bfloat16 has 8 bits: of 500 pixels it would know only every second."""
    model = tiny().eval()
    images = [torch.randn(3, 96, 500)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model.backbone(images[0][None])
        _, deltas = model.rpn.head(list(maps.values()))
        (found,) = model(images)
    assert {one.dtype for one in (*maps.values(), *deltas, found["boxes"], found["scores"])} == {torch.float32}
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())
