"""Frozen parts and the backbone's learning rate, against plain torch; in every precision, on several ranks, after a resume."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fasttricks.config import Backend, ConfigError, ModelConfig, OptimConfig, TrainConfig
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning.freezing import freeze, moving_buffers
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.optim import build_optimizer, group_lrs, parameter_groups, set_lr
from fasttricks.learning.placement import wrap
from fasttricks.models import build_model, head_names
from fasttricks.planning.footprint import footprint
from fasttricks.system.distributed import join_world
from fasttricks.tasks.classification import CLASSIFICATION, evaluate
from fasttricks.trainer import fit, share_statistics, train_step
from fasttricks.training.build import make_network
from fasttricks.training.checks import check_frozen
from fasttricks.training.run import Run
from lib.forked import on_ranks
from lib.runs import final_state, groups, interrupt, own_convolutions
from lib.tiny import ALONE, configure, write_images

STEPS = 20
FROZEN = ("stem", "layer1")


def config_of(**fields: object) -> TrainConfig:
    optim = OptimConfig(base_lr=0.8, backbone_lr=0.1)
    return TrainConfig(
        **{"recipe": "t", "epochs": 10, "global_batch_size": 8, "precision": "fp32", "optim": optim} | fields
    )  # type: ignore[arg-type]


def make(config: TrainConfig) -> Learner:
    torch.manual_seed(0)
    model, exact, _ = make_network(CLASSIFICATION, config, ("ant", "bee", "cat"), ALONE)
    shards = Shards(num_images=8 * STEPS, batch_size=8, world_size=1, source="")
    return make_learner(CLASSIFICATION, config, ALONE, shards, model, exact=exact)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[Batch]:
    draws = torch.Generator().manual_seed(1)
    made = [(torch.randn(8, 3, 16, 16, generator=draws), torch.randint(3, (8,), generator=draws)) for _ in range(count)]
    return [Batch(i.to(dtype).contiguous(memory_format=torch.channels_last), labels) for i, labels in made]


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name in model.state_dict() if name.startswith(("conv1.", "bn1.", "layer1."))}


# ------------------------------------------------------------------------------------------------ against plain torch
def test_20_steps_are_those_of_a_loop_of_plain_torch() -> None:
    """torch's own SGD over two rates and two decays, no gradient for the frozen weights, their batch norm by hand in eval."""
    model = ModelConfig(name="resnet8d", width=0.125, stem_stride=1, freeze=FROZEN)
    learner = make(config_of(model=model))
    plain = copy.deepcopy(learner.model)
    assert isinstance(plain, nn.Module)
    before = copy.deepcopy(learner.model.state_dict())
    rows: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in plain.named_parameters():
        if name not in frozen_names(plain):
            rows.setdefault((name.startswith("fc."), parameter.ndim > 1), []).append(parameter)
    assert len(rows) == 4
    options = [
        {"params": p, "weight_decay": 1e-4 if decays else 0.0, "head": head} for (head, decays), p in rows.items()
    ]
    sgd = torch.optim.SGD(options, lr=0.0, momentum=0.9, nesterov=True, fused=True)
    for step, batch in enumerate(batches(STEPS)):
        for group in sgd.param_groups:
            group["lr"] = learner.lr_at(step) * (1.0 if group["head"] else 0.1)
        train_step(learner, [batch])
        plain.train()
        for module in (plain.conv1, plain.bn1, plain.layer1):
            nn.Module.train(module, False)
        logits = plain(batch.images)
        (functional.cross_entropy(logits, batch.labels, reduction="sum") / 8).backward()
        sgd.step()
        plain.zero_grad()
    after = learner.model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(after[name], before[name]) == (name in frozen_names(plain)), name
    assert not any(name in frozen_names(plain) for name in moving_buffers(learner.model))


@pytest.mark.parametrize(("backend", "precision"), [("torch", "fp32"), ("fused", "fp32"), ("fused", "fp16")])
def test_the_backbone_has_its_rate_in_every_optimizer(backend: Backend, precision: str) -> None:
    """One step on gradients of 1 without momentum moves each weight by its rate: the classifier's by 1, the rest by 1/4."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.body, model.fc = nn.Linear(3, 4), nn.Linear(4, 2)
    for parameter in model.parameters():
        parameter.data.zero_()
    if precision == "fp16":
        model.half()
    sgd = build_optimizer(model, OptimConfig(backend=backend, momentum=0.0, backbone_lr=0.25), precision)  # type: ignore[arg-type]
    resumed = build_optimizer(model, OptimConfig(backend=backend, momentum=0.0, backbone_lr=0.25), precision)  # type: ignore[arg-type]
    resumed.load_state_dict(sgd.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    set_lr(resumed, group_lrs(resumed, 1.0))
    resumed.step()
    moved = {name: parameter.unique().tolist() for name, parameter in model.named_parameters()}
    assert moved == {"body.weight": [-0.25], "body.bias": [-0.25], "fc.weight": [-1.0], "fc.bias": [-1.0]}


def test_with_one_rate_the_groups_are_as_they_were() -> None:
    model = build_model(ModelConfig(name="resnet8d", width=0.125), 3)
    groups = parameter_groups(model, weight_decay=0.1, bias_decay=False, backbone_lr=1.0)
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2


def test_the_groups_hold_every_weight_once_and_the_head_of_an_inception_has_two_parts() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(name="inception_v3", aux_head=True), 3)
    groups = parameter_groups(model, weight_decay=0.1, bias_decay=False, backbone_lr=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(names.values())
    full = {names[id(p)] for group in groups if "lr_factor" not in group for p in group["params"]}  # type: ignore[attr-defined]
    assert full == set(head_names(model)) == {"fc.weight", "fc.bias", "AuxLogits.fc.weight", "AuxLogits.fc.bias"}


# -------------------------------------------------------------------------------------------------------- refusals
def test_a_rate_that_has_nothing_to_act_on_is_refused() -> None:
    headless = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2))
    with pytest.raises(
        ConfigError, match=r"optim.backbone_lr = 0.5: needs to know the classifier; have a method get_cl"
    ):
        parameter_groups(headless, weight_decay=0, bias_decay=False, backbone_lr=0.5)
    with pytest.raises(ConfigError, match=r"optim.backbone_lr = 0.1: has no effect: model.freeze leaves only"):
        make(config_of(model=ModelConfig(name="resnet8d", freeze=("stem", "layer1", "layer2", "layer3"))))


def test_all_frozen_and_frozen_random_weights_are_refused() -> None:
    everything = ModelConfig(name="resnet8d", freeze=("stem", "layer1", "layer2", "layer3", "fc"))
    with pytest.raises(ConfigError, match=r"model.freeze = 'stem layer1 layer2 layer3 fc': leaves no weight to train"):
        make(config_of(model=everything))
    some = config_of(model=ModelConfig(name="resnet8d", freeze=FROZEN))
    with pytest.raises(
        ConfigError, match=r"model.freeze = 'stem layer1': would keep random weights; give trained ones by"
    ):
        check_frozen(some)
    check_frozen(dataclasses.replace(some, init="runs/base"))
    check_frozen(config_of())


# ------------------------------------------------------------------------------------------------------- the modes
def test_frozen_modules_stay_in_evaluation_mode_whoever_switches_the_network() -> None:
    """Also the copy that the average is of."""
    model = freeze(build_model(ModelConfig(name="resnet8d", width=0.125), 3), FROZEN)
    for net in (model, copy.deepcopy(model)):
        for _ in range(2):
            assert not net.conv1.training and not net.layer1[0].bn1.training and not net.bn1.training
            assert net.training and net.layer2.training and net.layer2[0].bn1.training and net.fc.training
            evaluate(net, batches(1), ALONE)
            net.eval()
            assert not any(module.training for module in net.modules())
            net.train()


# -------------------------------------------------------------------------------------------------------- the cost
def test_the_backward_pass_ends_at_the_frozen_parts_that_come_first() -> None:
    def flops(frozen: tuple[str, ...]) -> int:
        learner = make(config_of(model=ModelConfig(name="resnet8d", width=0.125, freeze=frozen), optim=OptimConfig()))
        with FlopCounterMode(display=False, depth=1) as counter:
            train_step(learner, batches(1))
        found = counter.get_flop_counts()["Global"]
        return sum(count for operator, count in found.items() if "backward" in str(operator))

    convolutions = flops(("stem", "layer1", "layer2", "layer3"))
    assert convolutions == 0 < flops(("stem", "layer1", "layer2")) < flops(("stem",)) < flops(())


def test_a_plan_counts_no_gradients_and_no_momentum_of_frozen_weights() -> None:
    shards = Shards(num_images=64, batch_size=8, world_size=2, source="")

    def counted(frozen: tuple[str, ...], precision: str = "fp32") -> tuple[int, int, int]:
        config = config_of(
            model=ModelConfig(name="resnet8d", freeze=frozen), precision=precision, optim=OptimConfig(), ema_decay=0.9
        )
        found = footprint(config, shards, 3)
        assert found.at_peak["gradients"] == found.gradient_bytes
        return found.num_parameters, found.gradient_bytes, found.at_peak["optimizer"]

    model = build_model(ModelConfig(name="resnet8d"), 3)
    left = 4 * sum(p.numel() for name, p in model.named_parameters() if name not in frozen_names(model))
    everything = 4 * sum(p.numel() for p in model.parameters())
    assert counted(()) == (everything // 4, everything, everything)
    assert counted(FROZEN) == (everything // 4, left, left)
    assert counted(FROZEN, "fp16")[2] < counted((), "fp16")[2]


# ------------------------------------------------------------------------------------------------------------ FP16
def test_frozen_fp16_weights_are_saved_and_averaged_as_their_fp32_values() -> None:
    config = config_of(model=ModelConfig(name="resnet8d", width=0.125, freeze=FROZEN), precision="fp16", ema_decay=0.5)
    torch.manual_seed(0)
    exact = build_model(config.model, 3).state_dict()
    learner = make(config)
    assert learner.model.conv1[0].weight.dtype == torch.float16  # type: ignore[union-attr, index]
    for batch in batches(3, torch.float16):
        train_step(learner, [batch])
    state = copy.deepcopy({**learner.state_dict(), "path": "here"})
    weights = frozen_names(learner.model)
    assert any(not torch.equal(exact[name], exact[name].half().float()) for name in weights)
    held = {name for row in learner.optimizer.param_groups for p in row["params"] for name in [id(p)]}
    assert len(learner.optimizer.state) == len(held) == sum(p.requires_grad for p in learner.model.parameters())
    other = make(config)
    for value in other.exact.values():
        value.zero_()
    other.load_state_dict(state)
    again = other.state_dict()
    for part in ("model", "average"):
        for name in weights:
            assert state[part][name].dtype == exact[name].dtype
            assert torch.equal(state[part][name], exact[name]), (part, name)
            assert torch.equal(again[part][name], exact[name]), (part, name)
        assert not torch.equal(state[part]["fc.weight"], exact["fc.weight"])


@pytest.mark.slow
def test_a_compiled_step_leaves_frozen_parts_alone_and_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """aot_eager traces and differentiates as inductor does."""
    compile_ = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda model, mode: compile_(model, backend="aot_eager"))
    config = config_of(model=ModelConfig(name="resnet8d", width=0.125, freeze=FROZEN), compile="default")
    eager, compiled = make(config), make(config)
    compiled.forward = wrap(compiled.model, config, ALONE, print)
    before = copy.deepcopy(compiled.model.state_dict())
    for batch in batches(3):
        train_step(eager, [batch])
        train_step(compiled, [batch])
    for name, value in compiled.model.state_dict().items():
        torch.testing.assert_close(value, eager.model.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(value, before[name]) == (name in frozen_names(compiled.model)), name


# --------------------------------------------------------------------------------------------------------- resuming
OPTIONS = ("--optim.backbone-lr", "0.1", "--ema-decay", "0.9", "--model.freeze", *FROZEN, "--init")


def trained(folder: Path) -> str:
    """A file of weights to start from."""
    torch.manual_seed(7)
    model = build_model(ModelConfig(name="resnet8d", width=0.125, stem_stride=1), 3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)  # the mean of three equal numbers may be another one
    torch.save(model.state_dict(), folder / "base.pt")
    return str(folder / "base.pt")


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), "fp16"])
def test_a_resumed_run_is_the_same_run(precision: str, start: Callable[..., Run], tmp_path: Path) -> None:
    options = (*OPTIONS, trained(tmp_path), "--precision", precision, "--checkpoint-steps", "2")
    whole = start(*options, run_dir=tmp_path / "a")
    fit(whole)
    first = start(*options, run_dir=tmp_path / "b")
    interrupt(first, pytest.MonkeyPatch(), at_step=4)
    again = start(*options, run_dir=tmp_path / "b", resume=True)
    assert again.step == 4
    fit(again)
    one, other = final_state(whole), final_state(again)
    for part in ("model", "average"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
    torch.testing.assert_close(one["optimizer"], other["optimizer"], rtol=0, atol=0)


def test_a_run_with_other_frozen_parts_does_not_resume(start: Callable[..., Run], tmp_path: Path) -> None:
    options = ("--init", trained(tmp_path), "--model.freeze", "layer1")
    fit(start(*options, run_dir=tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"model.freeze"):
        start(*options, "stem", run_dir=tmp_path / "a", resume=True)


# ------------------------------------------------------------------------------------------------------------ ranks
def work(folder: Path, precision: str) -> None:
    """A rank of a run of two epochs."""
    from fasttricks.training.build import build

    with own_convolutions(), join_world("cpu") as world:
        options = (*OPTIONS, str(folder / "base.pt"), "--precision", precision, "--global-batch-size", "12")
        run = build(configure(folder / "data", folder / f"run-{world.size}-{precision}", *options), world)
        first = copy.deepcopy(run.state_dict()["model"])
        for step in groups(run):
            train_step(run, step)
        share_statistics(run)
        run.log.close()
        state = run.state_dict()
        torch.save(
            {"first": first, **{part: state[part] for part in ("model", "average")}}, folder / f"{world.rank}.pt"
        )


@pytest.mark.parametrize(("ranks", "precision"), [(2, "fp16"), pytest.param(3, "fp32", marks=pytest.mark.slow)])
def test_on_several_ranks_frozen_parts_keep_every_bit(ranks: int, precision: str, tmp_path: Path) -> None:
    """Also their statistics, of which the others' are averaged over the ranks at the end of an epoch."""
    write_images(tmp_path / "data", train=36, val=3)
    trained(tmp_path)
    on_ranks(ranks, work, tmp_path, precision)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    names = frozen_names(build_model(ModelConfig(name="resnet8d", width=0.125), 3))
    assert any(name.endswith("running_var") for name in names)
    for state in states:
        for name, value in states[0]["first"].items():
            if name in names:
                assert torch.equal(state["model"][name], value) and torch.equal(state["average"][name], value), name
            elif not name.endswith("num_batches_tracked"):
                assert not torch.equal(state["model"][name], value), name
                assert torch.equal(state["model"][name], states[0]["model"][name]), name
