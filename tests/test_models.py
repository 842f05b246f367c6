"""ResNet against torchvision and timm (keys, outputs, gradients, sizes); the initial weights against float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttricks.models import MODELS
from fasttricks.models.resnet import LAYOUTS, Block, ResNet
from lib.networks import multiply_adds, on_meta, with_random_norms, without_norms
from lib.tables import covering

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")


def torchvision_a(depth: int) -> nn.Module:
    """torchvision's ResNet with the stride of each bottleneck moved back to its first 1x1."""
    model = torchvision.models.get_model(f"resnet{depth}")
    for block in model.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
    return model


def timm_c(depth: int) -> nn.Module:
    """timm names a C for 50 layers and above; for the others its class takes the same stem."""
    block = getattr(timm.models.resnet, LAYOUTS[depth][0].__name__)
    return timm.models.resnet.ResNet(block, LAYOUTS[depth][1], stem_width=32, stem_type="deep")


REFERENCES: dict[str, Callable[[int], nn.Module]] = {
    "a": torchvision_a,
    "b": lambda depth: torchvision.models.get_model(f"resnet{depth}"),
    "c": timm_c,
    "d": lambda depth: timm.create_model(f"resnet{depth}d"),
}
PUBLISHED_DEPTHS = (18, 34, 50, 101, 152)
EVERY_REFERENCE = covering(PUBLISHED_DEPTHS, list(REFERENCES))
# One class makes all depths: 18 and 50 try both blocks in every variant, 34 the longer stages.
OUTPUT_REFERENCES = [
    *[(18, "b"), (18, "c"), (50, "a"), (50, "d")],
    *(pytest.param(*one, marks=pytest.mark.slow) for one in ((18, "a"), (18, "d"), (34, "d"), (50, "b"), (50, "c"))),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("depth", "letter"), OUTPUT_REFERENCES)
def test_outputs_and_gradients_agree_with_torchvision_and_timm(depth: int, letter: str) -> None:
    reference = with_random_norms(REFERENCES[letter](depth)).eval()
    ours = on_meta(MODELS[f"resnet{depth}{letter}"]).eval()  # its own weights are not needed
    ours.load_state_dict(copy.deepcopy(reference.state_dict()), strict=True, assign=True)
    for side in (64, 49):  # 49 is odd at every stage: 25, 13, 7, 4, 2
        images = torch.randn(2, 3, side, side)
        logits, expected = ours(images), reference(images)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for output in (logits, expected):
        (output**2).sum().backward()
    for (name, parameter), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None
        assert theirs.grad is not None
        scale = float(theirs.grad.abs().max())
        difference = float((parameter.grad - theirs.grad).abs().max())
        assert difference <= 1e-5 * scale, f"gradient of {name} is off by {difference:g} of {scale:g}"


@pytest.mark.parametrize(("depth", "letter"), EVERY_REFERENCE)
def test_state_dict_has_the_references_keys_and_shapes(depth: int, letter: str) -> None:
    ours, reference = on_meta(MODELS[f"resnet{depth}{letter}"]), on_meta(lambda: REFERENCES[letter](depth))
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, reference)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("depth", "letter"), [(18, "d"), (50, "a"), (50, "c"), (50, "d")])
def test_multiply_adds_are_the_references(depth: int, letter: str) -> None:
    ours, reference = on_meta(MODELS[f"resnet{depth}{letter}"]), on_meta(lambda: REFERENCES[letter](depth))
    assert multiply_adds(ours) == multiply_adds(reference)


@pytest.mark.parametrize("depth", PUBLISHED_DEPTHS)
def test_size_of_b_is_the_one_torchvision_publishes(depth: int) -> None:
    published = torchvision.models.get_model_weights(f"resnet{depth}").IMAGENET1K_V1.meta
    model = on_meta(MODELS[f"resnet{depth}b"])
    assert sum(p.numel() for p in model.parameters()) == published["num_params"]
    assert round(multiply_adds(model) / 1e9, 3) == published["_ops"]


def test_size_of_resnet50_is_the_papers() -> None:
    """Table 1: 3.9 GFLOPs for A, 4.3 with the tweaks. 25,557,032 and 25,576,264 are the well-known parameter counts."""
    models = {letter: on_meta(MODELS[f"resnet50{letter}"]) for letter in "abcd"}
    assert round(multiply_adds(models["a"]) / 1e9, 1) == 3.9
    assert round(multiply_adds(models["d"]) / 1e9, 1) == 4.3
    assert [sum(p.numel() for p in m.parameters()) for m in models.values()] == 2 * [25_557_032] + 2 * [25_576_264]


def test_stem_of_stride_1_makes_the_usual_cifar_resnet18() -> None:
    """11,173,962 parameters is what the ResNet-18 with a 3x3 stem that is common for CIFAR-10 has."""
    model = on_meta(lambda: MODELS["resnet18b"](num_classes=10, stem_stride=1))
    assert sum(p.numel() for p in model.parameters()) == 11_173_962


def test_a_and_b_differ_only_in_where_a_bottleneck_strides() -> None:
    def strides(letter: str) -> dict[str, int]:
        modules = on_meta(MODELS[f"resnet50{letter}"]).named_modules()
        return {name: module.stride[0] for name, module in modules if isinstance(module, nn.Conv2d)}

    a, b = strides("a"), strides("b")
    assert {name: (a[name], b[name]) for name in a if a[name] != b[name]} == {
        f"layer{stage}.0.conv{conv}": (2, 1) if conv == 1 else (1, 2) for stage in (2, 3, 4) for conv in (1, 2)
    }
    # The first 1x1 of stages 2 to 4 sees 4 times as many positions in B; all three cost the same.
    saved = 3 * (256 * 128 * 56**2 - 256 * 128 * 28**2)
    assert multiply_adds(on_meta(MODELS["resnet50b"])) - multiply_adds(on_meta(MODELS["resnet50a"])) == saved


def test_a_and_b_of_basic_blocks_are_the_same_network() -> None:
    a, b = MODELS["resnet18a"](num_classes=10).eval(), MODELS["resnet18b"](num_classes=10).eval()
    b.load_state_dict(a.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(a(images), b(images))


@pytest.mark.parametrize("name", ["resnet10a", "resnet50d"])
def test_initial_weights_are_the_papers_xavier(name: str) -> None:
    model = MODELS[name](num_classes=1000, width=0.5)
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            d_in = module.in_channels * math.prod(module.kernel_size)
            d_out = module.out_channels * math.prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            d_in, d_out = module.in_features, module.out_features
        else:
            continue
        bound = math.sqrt(6 / (d_in + d_out))
        drawn = np.sort(module.weight.detach().numpy().astype(np.float64).ravel())
        assert abs(drawn).max() <= bound * (1 + 1e-6), module_name
        # Kolmogorov-Smirnov distance to U[-bound, bound]; 2.5 / sqrt(n) is exceeded once in 130,000 draws.
        distance = abs((drawn / bound + 1) / 2 - (np.arange(drawn.size) + 0.5) / drawn.size).max()
        assert distance < 2.5 / math.sqrt(drawn.size), module_name


def test_initial_biases_are_0_and_norms_the_identity() -> None:
    model = MODELS["resnet50d"](num_classes=10)
    assert not model.fc.bias.any()
    assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Conv2d))
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert bool((norm.weight == 1).all())
        assert not norm.bias.any()


def test_the_global_seed_fixes_the_weights() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(MODELS["resnet8d"](num_classes=10).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def blocks_and_inputs(model: nn.Module) -> Iterator[tuple[Block, Tensor]]:
    """Each residual block with a random input that is not negative, as every block's is."""
    for block in model.modules():
        if isinstance(block, Block):
            yield block, torch.rand(2, block.conv1.in_channels, 8, 8)


@pytest.mark.parametrize("name", ["resnet18b", "resnet50a", "resnet50d"])
def test_zero_gamma_starts_every_block_as_its_path_b(name: str) -> None:
    for block, x in blocks_and_inputs(MODELS[name](num_classes=10, width=0.25, zero_gamma=True)):
        path_b = x if block.downsample is None else block.downsample(x)
        assert torch.equal(block(x), path_b.relu())
    for block, x in blocks_and_inputs(MODELS[name](num_classes=10, width=0.25, zero_gamma=False)):
        path_b = x if block.downsample is None else block.downsample(x)
        assert not torch.allclose(block(x), path_b.relu())


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_gamma_zeroes_the_norms_that_torchvision_zeroes(depth: int) -> None:
    def zeroed(model: nn.Module) -> set[str]:
        return {name for name, p in model.named_parameters() if not p.any() and name.endswith("weight")}

    reference = torchvision.models.get_model(f"resnet{depth}", zero_init_residual=True)
    assert zeroed(MODELS[f"resnet{depth}b"](zero_gamma=True)) == zeroed(reference)


def test_features_are_torchvisions_stage_outputs() -> None:
    reference = torchvision.models.resnet18().eval()
    ours = MODELS["resnet18b"]().eval()
    ours.load_state_dict(reference.state_dict())
    nodes = ["layer1", "layer2", "layer3", "layer4"]
    images = torch.randn(1, 3, 64, 64)
    expected = torchvision.models.feature_extraction.create_feature_extractor(reference, nodes)(images)
    # Compared after the whole pass: no stage may have written into the output of the one before.
    for feature, node in zip(ours.features(images), nodes, strict=True):
        torch.testing.assert_close(feature, expected[node], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
@pytest.mark.parametrize(("name", "channels"), [("resnet8a", (64, 128, 256)), ("resnet50d", (256, 512, 1024, 2048))])
@pytest.mark.parametrize("side", [224, 75])
def test_feature_shapes(name: str, channels: tuple[int, ...], stem_stride: int, side: int) -> None:
    model = on_meta(lambda: MODELS[name](stem_stride=stem_stride))
    with without_norms():
        features = model.features(torch.empty(2, 3, side, side, device="meta"))
    sides = [math.ceil(side / (stem_stride * 2**stage)) for stage in range(len(channels))]
    assert [tuple(f.shape) for f in features] == [(2, c, s, s) for c, s in zip(channels, sides, strict=True)]
    assert model.num_features == channels[-1] == model.fc.in_features


@pytest.mark.parametrize("name", ["resnet18a", "resnet18d", "resnet50a", "resnet50d"])
@pytest.mark.parametrize("stem_stride", [4, 1])
def test_channels_last_goes_through_every_layer(name: str, stem_stride: int) -> None:
    model = MODELS[name](num_classes=10, width=0.25, stem_stride=stem_stride).to(memory_format=torch.channels_last)
    wrong: list[str] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.dim() == 4 and output.stride(1) != 1:
            wrong.append(type(module).__name__)

    for module in model.modules():
        if not isinstance(module, ResNet):
            module.register_forward_hook(watch)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    features = model.features(images)
    assert not wrong
    for feature in features:
        assert feature.is_contiguous(memory_format=torch.channels_last)
        assert not feature.is_contiguous()


@pytest.mark.parametrize(("width", "stem", "stages"), [(0.25, 8, (16, 32, 64, 128)), (0.375, 16, (24, 48, 96, 192))])
def test_width_scales_every_channel_count_to_a_multiple_of_8(width: float, stem: int, stages: tuple[int, ...]) -> None:
    model = on_meta(lambda: MODELS["resnet10d"](num_classes=10, width=width))
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert [convolutions[f"conv1.{i}"].out_channels for i in (0, 3, 6)] == [stem, stem, stages[0]]
    assert tuple(convolutions[f"layer{stage}.0.conv2"].out_channels for stage in (1, 2, 3, 4)) == stages
    assert model.num_features == stages[-1]


def test_width_does_not_go_below_8_channels() -> None:
    model = on_meta(lambda: MODELS["resnet8d"](width=0.01))
    assert {m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)} == {8}
