"""What only a GPU can show of the trainer. Every test here is marked gpu: skipped, aloud, where there is none."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn

from bench.no_sync import no_sync
from fasttricks.commands.evaluate import EvaluateConfig, evaluate_checkpoint
from fasttricks.config.recipes import cifar10
from fasttricks.config.resolve import resolve
from fasttricks.data.batch import Batch
from fasttricks.data.pipeline.shards import Shards
from fasttricks.learning import step_graph
from fasttricks.learning.learner import Learner, make_learner
from fasttricks.learning.placement import place, wrap
from fasttricks.learning.precision import image_dtype
from fasttricks.learning.step_graph import WARM_UP, StepGraph, Streams, cuda_graph, on_all_ranks
from fasttricks.models import build_model
from fasttricks.runs.saved import read_saved
from fasttricks.system.determinism import ask_for_one_order
from fasttricks.system.distributed import World, join_world
from fasttricks.system.extras import TRAIN_MODULES, missing_extra
from fasttricks.tasks.classification import CLASSIFICATION
from fasttricks.trainer import fit, train_step
from fasttricks.training.build import build
from fasttricks.training.run import Run
from lib.forked import on_ranks
from lib.states import same
from lib.tiny import ALONE, configure

pytestmark = pytest.mark.gpu
_missing = missing_extra("train", TRAIN_MODULES, "a test with images")
with_images = pytest.mark.skipif(bool(_missing), reason=_missing)
TRICKS = ["--loss.mixup-alpha", "0.2", "--ema-decay", "0.9", "--device", "cuda"]


def start(data: Path, folder: Path, *more: str) -> Run:
    world = World.alone(torch.device("cuda", 0))
    return build(configure(data, folder, *TRICKS, *more), world)


def on_random_images(precision: str, world: World, streams: Streams) -> tuple[Learner, list[Batch]]:
    """A learner under mixup with an average of its weights, and three batches for it; no loader, so no DALI."""
    model = {"model.name": "resnet8d", "model.width": 0.125, "data.image_size": 32, "data.val_resize": 36}
    config = resolve(cifar10(), {**model, "loss.mixup_alpha": 0.2, "ema_decay": 0.9, "precision": precision})
    shards = Shards(num_images=48 * world.size, batch_size=16, world_size=world.size, source="random")
    network = place(build_model(config.model, 3), world, precision)
    with streams.on_step():
        forward = wrap(network, config, world, print)
    learner = make_learner(CLASSIFICATION, config, world, shards, network, forward=forward)
    dtype = image_dtype(precision, world.device)
    return learner, [CLASSIFICATION.example(config, 16, 3, device=world.device, dtype=dtype) for _ in range(3)]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_step_never_synchronizes(precision: str) -> None:
    learner, (first, *rest) = on_random_images(precision, World.alone(torch.device("cuda", 0)), Streams())
    train_step(learner, [first])  # compiles the kernels, makes the momenta
    with no_sync():
        for batch in rest:
            train_step(learner, [batch])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_as_a_cuda_graph_has_the_bits_of_the_launched_one(precision: str) -> None:
    """Over WARM_UP steps that are launched, one that is recorded, and more that are replayed; the host waits in none of these."""
    ask_for_one_order(torch.device("cuda", 0), on=True)
    assert same(*launched_and_replayed(precision, World.alone(torch.device("cuda", 0))))


def launched_and_replayed(precision: str, world: World) -> list[dict[str, Any]]:
    """The states after 30 steps, of which a graph replays all but WARM_UP."""
    states = []
    for graphed in (False, True):
        torch.manual_seed(0)
        streams = Streams.on(world.device) if graphed else Streams()
        learner, batches = on_random_images(precision, world, streams)
        learner.graph = StepGraph(on_all_ranks(cuda_graph, world), streams) if graphed else None
        taken = iter if learner.graph is None else learner.graph.taken
        with nullcontext() if learner.graph is None else learner.graph.running():
            for batch in taken(batches * 5):
                train_step(learner, [batch])
            with no_sync():
                for batch in taken(batches * 5):
                    train_step(learner, [batch])
        assert learner.graph is None or learner.graph.launched == WARM_UP
        states.append(learner.state_dict())
    return states


def replays_as_it_launches() -> None:
    """A rank's part, on a GPU of its own."""
    with join_world("cuda") as world:
        ask_for_one_order(world.device, on=True)
        for precision in ("fp32", "fp16"):
            assert same(*launched_and_replayed(precision, world)), precision


@pytest.mark.parametrize("ranks", [2, 3])
def test_so_has_the_step_of_several_ranks(ranks: int) -> None:
    """Three add up their gradients in their order, by collectives of the project's own."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(
            f"needs {ranks} GPUs, and here are {torch.cuda.device_count()}: --cuda-graph-ranks is untested here"
        )
    on_ranks(ranks, replays_as_it_launches)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@with_images
def test_the_input_never_synchronizes_the_step(precision: str, tiny_data: Path, tmp_path: Path) -> None:
    """The same with the loader's own batches, which lie in DALI's memory or in torch's."""
    run = start(tiny_data, tmp_path / "run", "--precision", precision)
    first, *rest = list(run.train_loader)
    train_step(run, [first])
    with no_sync():
        for batch in rest:
            train_step(run, [batch])
    run.log.close()


@with_images
def test_a_run_by_a_cuda_graph_ends_with_the_bits_of_the_launched_one(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the loader, whose batches are made on a stream beside the step's."""
    monkeypatch.setattr(step_graph, "WARM_UP", 1)
    states = []
    for name, options in (("launched", ()), ("replayed", ("--cuda-graph",))):
        run = start(tiny_data, tmp_path / name, "--precision", "fp16", "--model.norm", "fused", *options)
        fit(run)
        assert run.graph is None or (run.graph.launched == 1 and run.step > 2)
        states.append(Learner.state_dict(run))
    assert same(*states)


@with_images
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_the_gpu_measures_what_the_cpu_measures_of_it(precision: str, tiny_data: Path, tmp_path: Path) -> None:
    """Trained there, evaluated here."""
    run = start(tiny_data, tmp_path / "run", "--precision", precision)
    summary = fit(run)
    config = EvaluateConfig(device="cpu", data=run.config.data, eval=run.config.eval)
    metrics = evaluate_checkpoint(config, read_saved(run.folder), ALONE)
    assert metrics["val_loss"] == pytest.approx(summary["val_loss"], rel=2e-2)


def test_synchronized_batch_norm_keeps_channels_last(tmp_path: Path) -> None:
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        norm = nn.BatchNorm2d(8).cuda()
        synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(8))).cuda()
        images = torch.randn(4, 8, 6, 6, device="cuda").contiguous(memory_format=torch.channels_last)
        out = synchronized(images)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, norm(images))
    finally:
        dist.destroy_process_group()
