"""The tricks of short training, none of them the paper's: a whitened first layer, convolutions that start as the identity, a rate
of the biases, flips in alternation; and cifarnet, the network for them. Against NumPy and plain torch."""

from __future__ import annotations

import copy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fasttricks.config import ConfigError, DataConfig, DoesNotApplyError, ModelConfig, OptimConfig, TrainConfig
from fasttricks.config.recipes import RECIPES
from fasttricks.config.resolve import resolve
from fasttricks.data.pipeline.draws import alternating_flip, image_draws
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.shards import Shards
from fasttricks.data.sources.folder import scan_folder
from fasttricks.learning.learner import make_learner
from fasttricks.learning.optim import build_optimizer, group_lrs, parameter_groups, set_lr
from fasttricks.models import build_model, whiten
from fasttricks.models.cifarnet import CifarNet
from fasttricks.models.whitening import ENOUGH_PATCHES, LEAST_VARIANCE
from fasttricks.system.distributed import join_world
from fasttricks.tasks.classification import CLASSIFICATION
from fasttricks.trainer import fit
from fasttricks.training.build import build, make_network
from fasttricks.training.run import Run
from lib.forked import on_ranks
from lib.runs import final_state, interrupt, let_go
from lib.tiny import ALONE, configure, write_images

SHORT = shlex.split(
    "--model.name cifarnet --model.stem-stride 4 --model.whitening --model.identity-init --optim.bias-lr 8 --data.alternate-flip"
)


def natural(count: int, side: int = 32) -> Tensor:
    """Images whose neighbours are alike, as a photograph's: sums of noise along rows and columns, (count, 3, side, side)."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))
    images = noise.cumsum(2).cumsum(3) + 3 * noise.mean(1, keepdim=True).cumsum(3)
    return (images - images.mean()) / images.std()


# ------------------------------------------------------------------------------------------------------ whitening
def test_the_outputs_of_the_whitened_layer_have_variance_1_and_no_correlation() -> None:
    """By NumPy in float64, of patches that it cuts itself; and the filters come with their negatives."""
    images = natural(200)
    model = CifarNet(num_classes=5, whitening=True)
    whiten(model, images.split(64))
    weight = model.conv1.weight.detach()
    assert not model.conv1.weight.requires_grad
    assert torch.equal(weight[12:], -weight[:12])
    pixels = images.double().numpy()
    shifts = [pixels[:, :, i : 31 + i, j : 31 + j] for i in range(2) for j in range(2)]
    patches = (
        np.stack(shifts, 2).reshape(200, 12, -1).transpose(0, 2, 1).reshape(-1, 12)
    )  # channel, row, column as in a filter
    outputs = patches @ weight[:12].double().numpy().reshape(12, 12).T
    found = outputs.T @ outputs / len(outputs)
    variances = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    np.testing.assert_allclose(found, np.diag(variances / (variances + LEAST_VARIANCE)), atol=2e-5)
    np.testing.assert_allclose(model.conv1(images)[:, :12].detach().double().var(), 1, atol=0.1)


def test_it_reads_no_more_images_than_it_needs_and_the_batches_do_not_matter() -> None:
    images = natural(64, 129)  # 16,384 patches each
    asked: list[int] = []

    def batches(size: int) -> Any:
        for part in images.split(size):
            asked.append(size)
            yield part

    found = []
    for size in (62, 31):
        model = CifarNet(num_classes=5, whitening=True)
        whiten(model, batches(size))
        found.append(model.conv1.weight)
    assert asked == [62, 31, 31] and 62 * 128**2 >= ENOUGH_PATCHES > 61 * 128**2
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


def test_images_of_one_colour_and_no_images() -> None:
    model = CifarNet(num_classes=5, whitening=True)
    whiten(model, [torch.zeros(4, 3, 16, 16)])
    assert model.conv1.weight.isfinite().all()
    with pytest.raises(ConfigError, match=r"model\.whitening = True: needs training images"):
        whiten(model, [])


# ------------------------------------------------------------------------------------------------------ the network
@pytest.mark.parametrize("whitening", [True, False])
def test_the_network_is_that_of_plain_torch(whitening: bool) -> None:
    """Layer by layer from the state_dict, in evaluation and in training."""
    torch.manual_seed(0)
    model = CifarNet(num_classes=5, width=0.5, whitening=whitening)
    for value in model.buffers():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    images = torch.randn(8, 3, 33, 32)
    for training in (False, True):
        state = copy.deepcopy(model.state_dict())

        def norm(x: Tensor, name: str, state: Any = state, training: bool = training) -> Tensor:
            numbers = [state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
            return F.batch_norm(x, *numbers, training=training)

        x = F.conv2d(images, state["conv1.weight"], state.get("conv1.bias"))
        x = F.relu(x if whitening else norm(x, "bn1"))
        for stage in range(3):
            at = f"blocks.{stage}"
            x = F.max_pool2d(F.conv2d(x, state[f"{at}.conv1.weight"], padding=1), 2)
            x = F.relu(norm(x, f"{at}.bn1"))
            x = F.relu(norm(F.conv2d(x, state[f"{at}.conv2.weight"], padding=1), f"{at}.bn2"))
        logits = F.linear(x.flatten(2).max(2).values, state["fc.weight"], state["fc.bias"]) / 9
        torch.testing.assert_close(model.train(training)(images), logits, rtol=1e-5, atol=1e-6)


def test_channels_pass_a_stage_unchanged_at_its_start() -> None:
    """The first 24 of 32 channels, without batch norm and ReLU; torch's dirac_ is the rule, as far as the input has channels."""
    model = CifarNet(num_classes=5, identity_init=True)
    x = torch.randn(2, 24, 8, 8)
    maxima = F.max_pool2d(x, 2)
    assert torch.equal(model.blocks[0].conv1(x)[:, :24], maxima)  # type: ignore[operator, union-attr]
    assert model.blocks[0].conv1.weight[24:].any()  # type: ignore[union-attr, index]
    assert torch.equal(model.blocks[1].conv2.weight, nn.init.dirac_(torch.empty(128, 128, 3, 3)))  # type: ignore[union-attr]
    plain = CifarNet(num_classes=5)
    assert not torch.equal(plain.blocks[0].conv1(x)[:, :24], maxima)  # type: ignore[operator, union-attr]


def test_images_that_are_too_small_are_refused_before_the_training(tmp_path: Path, tiny_data: Path) -> None:
    config = configure(tiny_data, tmp_path / "run", *SHORT, "--data.image-size", "8", "--data.val-resize", "8")
    with pytest.raises(ConfigError, match=r"data\.image_size = 8: "):
        build(config, ALONE)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["resnet8d", "mobilenet_v1", "timm:resnet18"])
def test_another_network_is_refused_with_a_way_out_that_works(name: str) -> None:
    with pytest.raises(DoesNotApplyError, match=rf"^model\.\w+ = .*: not for model\.name = '{name}': ") as refused:
        resolve(RECIPES["cifar10-fast"](), {"model.name": name})
    tricks = str(refused.value).partition("--tricks.off ")[2].partition(" switches")[0].split()
    assert tricks == ["whitening", "identity_init"]
    changes = {"model.name": name, "model.width": 1.0, "tricks.off": tuple(tricks)}
    assert resolve(RECIPES["cifar10-fast"](), changes).model == ModelConfig(name=name)


# -------------------------------------------------------------------------------------------------- the biases' rate
@pytest.mark.parametrize(("backend", "precision"), [("torch", "fp32"), ("fused", "fp32"), ("fused", "fp16")])
@pytest.mark.parametrize("backbone", [1.0, 0.25])
def test_biases_have_their_rate_in_every_optimizer(backend: str, precision: str, backbone: float) -> None:
    """One step on gradients of 1 without momentum moves each by its rate, and the factors are multiplied."""
    model = nn.Sequential()
    model.body, model.norm, model.fc = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
    for parameter in model.parameters():
        parameter.data.zero_()
    if precision == "fp16":
        model.body.half(), model.fc.half()
    options = OptimConfig(backend=backend, momentum=0.0, bias_lr=8.0, backbone_lr=backbone)  # type: ignore[arg-type]
    sgd = build_optimizer(model, options, precision)  # type: ignore[arg-type]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(sgd, group_lrs(sgd, 1.0))
    sgd.step()
    moved = {name: parameter.unique().item() for name, parameter in model.named_parameters()}
    body = {"body.weight": -backbone, "body.bias": -8 * backbone, "norm.weight": -backbone, "norm.bias": -8 * backbone}
    assert moved == body | {"fc.weight": -1.0, "fc.bias": -8.0}


def test_biases_keep_the_decay_that_they_had() -> None:
    model = build_model(ModelConfig(name="resnet8d", width=0.125), 3)
    names, kernels = {id(p): name for name, p in model.named_parameters()}, dict(model.named_parameters())
    for bias_decay in (True, False):
        groups = parameter_groups(model, weight_decay=0.1, bias_decay=bias_decay, bias_lr=64.0)
        rows = {names[id(p)]: (g["weight_decay"], g.get("lr_factor", 1.0)) for g in groups for p in g["params"]}
        assert len(rows) == len(names) == sum(len(g["params"]) for g in groups)
        for name, (decay, factor) in rows.items():
            assert factor == (64.0 if name.endswith("bias") else 1.0), name
            assert decay == (0.1 if bias_decay or kernels[name].ndim > 1 else 0.0), name


# ----------------------------------------------------------------------------------------------------------- flips
@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
def test_an_image_is_flipped_by_turns(share: float) -> None:
    """Each epoch flips its share of the images; with 0.5 each image is flipped once in two epochs, and the third is the first."""
    images = np.arange(20_000)
    flips = np.stack([alternating_flip(5, epoch, images) < share for epoch in range(4)])
    assert (flips[0] == (image_draws(5, 0, images).flip < share)).all()
    assert (flips[2:] == flips[:2]).all()
    assert np.abs(flips.mean(1) - share).max() < 4.5 * np.sqrt(0.25 / 20_000)
    once = flips[:2].sum(0)
    assert set(once) == {0.5: {1}, 0.25: {0, 1}, 1.0: {2}}[share]


@pytest.mark.parametrize("operators", ["fused", "dali"])
def test_the_loader_mirrors_an_image_in_every_second_epoch(tmp_path: Path, operators: str) -> None:
    """Without a crop an image has two forms, which come by turns; half of the images begin with each."""
    write_images(tmp_path / "data", train=24, val=3, sides=(40, 40))
    source = scan_folder(tmp_path / "data" / "train")
    config = DataConfig(
        image_size=16, val_resize=16, threads=1, area=(1, 1), aspect=(1, 1), color="none", pca_noise=0.0,
        alternate_flip=True, operators=operators,  # type: ignore[arg-type]
    )  # fmt: skip
    loader = Loader(source, config, training=True, batch_size=8, device=torch.device("cpu"), seed=2)
    epochs = []
    for _ in range(3):
        epochs.append({int(i): image for batch in loader for i, image in zip(batch.shown, batch.images, strict=True)})
    assert sorted(epochs[0]) == list(range(len(source)))
    for i, image in epochs[0].items():
        torch.testing.assert_close(epochs[1][i], image.flip(2), rtol=0, atol=0.02)
        assert not torch.equal(epochs[1][i], image)
        assert torch.equal(epochs[2][i], image)


def test_a_flip_that_is_drawn_once_cannot_alternate() -> None:
    with pytest.raises(ConfigError, match=r"data\.fixed_augmentation = True: draws a flip once .*; leave one out"):
        DataConfig(fixed_augmentation=True, alternate_flip=True)


# ------------------------------------------------------------------------------------------------------- whole runs
def filters_of(run: Run) -> Tensor:
    weight = run.model.get_parameter("conv1.weight")
    assert not weight.requires_grad
    return weight.detach().clone()


def test_a_run_keeps_its_filters_and_is_the_same_after_a_resume(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (*SHORT, "--ema-decay", "0.9", "--epochs", "2", "--checkpoint-steps", "1")
    whole = build(configure(tiny_data, tmp_path / "whole", *args), ALONE)
    filters = filters_of(whole)
    fit(whole)
    state = final_state(whole)
    assert torch.equal(state["model"]["conv1.weight"], filters)
    assert torch.equal(state["average"]["conv1.weight"], filters)
    stopped = build(configure(tiny_data, tmp_path / "parts", *args), ALONE)
    interrupt(stopped, monkeypatch, at_step=3)
    let_go([stopped])
    resumed = build(configure(tiny_data, tmp_path / "parts", *args, "--resume"), ALONE)
    assert resumed.step == 3
    fit(resumed)
    again = final_state(resumed)
    for part in ("model", "average"):
        for name, value in again[part].items():
            assert torch.equal(value, state[part][name]), (part, name)


def test_weights_to_start_from_bring_their_filters(tiny_data: Path, tmp_path: Path) -> None:
    first = build(configure(tiny_data, tmp_path / "first", *SHORT), ALONE)
    fit(first)
    own = filters_of(build(configure(tiny_data, tmp_path / "own", *SHORT, "--data.area", "0.2", "0.3"), ALONE))
    init = (*SHORT, "--data.area", "0.2", "0.3", "--init", str(tmp_path / "first"))
    started = build(configure(tiny_data, tmp_path / "second", *init), ALONE)
    assert torch.equal(filters_of(started), filters_of(first))
    assert not torch.equal(own, filters_of(first))


def test_fp16_keeps_the_exact_filters(tiny_data: Path) -> None:
    """The network has them in FP16; a checkpoint and the average have them in FP32."""
    config = TrainConfig(
        recipe="t", epochs=9, global_batch_size=8, precision="fp16", ema_decay=0.5,
        model=ModelConfig(name="cifarnet", width=0.25, whitening=True),
    )  # fmt: skip
    model, exact, _ = make_network(CLASSIFICATION, config, ("ant", "bee"), ALONE, patches=[natural(20)])
    learner = make_learner(
        CLASSIFICATION, config, ALONE, Shards(num_images=8, batch_size=8, world_size=1, source=""), model, exact=exact
    )
    assert list(exact) == ["conv1.weight"] and exact["conv1.weight"].dtype == torch.float32
    half = learner.model.get_parameter("conv1.weight")
    assert half.dtype == torch.float16 and torch.equal(half, exact["conv1.weight"].half())
    assert not torch.equal(half.float(), exact["conv1.weight"])
    state = learner.state_dict()
    for part in ("model", "average"):
        assert torch.equal(state[part]["conv1.weight"], exact["conv1.weight"]), part


def _filters(data: Path, folder: Path) -> None:
    """The filters of each rank before the training and after it."""
    args = (*SHORT, "--accumulate", "1", "--global-batch-size", "12")
    with join_world("cpu") as world:
        run = build(configure(data, folder / "run", *args), world)
        before = filters_of(run)
        fit(run)
        torch.save([before, filters_of(run)], folder / f"{world.rank}.pt")


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_have_the_filters_of_one(tiny_data: Path, tmp_path: Path, ranks: int) -> None:
    args = (*SHORT, "--accumulate", "1", "--global-batch-size", "12")
    alone = filters_of(build(configure(tiny_data, tmp_path / "alone", *args), ALONE))
    on_ranks(ranks, _filters, tiny_data, tmp_path)
    for rank in range(ranks):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert torch.equal(found, alone), rank
