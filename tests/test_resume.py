"""A run resumes from wherever it was, bit for bit; another run's checkpoint is refused by the name of what differs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttricks import trainer
from fasttricks.config import ConfigError, TrainConfig, replace_at, replace_fields
from fasttricks.data.sources.files import ImageFiles
from fasttricks.runs.checkpoint import load_checkpoint, save_checkpoint
from fasttricks.runs.stored import CheckpointError, checkpoints
from fasttricks.system.distributed import World
from fasttricks.tasks import find_task
from fasttricks.trainer import Stopped, fit
from fasttricks.training import resume
from fasttricks.training.build import build
from fasttricks.training.resume import check_conditions, conditions, find_state
from fasttricks.training.run import Run
from lib.runs import final_state, interrupt, let_go, own_convolutions, records
from lib.states import same
from lib.tiny import ALONE, configure

EVERYTHING = shlex.split(
    "--loss.mixup-alpha 0.2 --ema-decay 0.9 --data.color paper --accumulate 2 --precision fp16 "
    "--optim.loss-scale-steps 2 --checkpoint-steps 2 --eval.every-epochs 2 --log-steps 2"
)


@pytest.fixture(scope="module", autouse=True)
def _fp16_in_time() -> Iterator[None]:
    with own_convolutions():
        yield


@pytest.fixture
def start(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """start(*arguments, **fields) is a Run on the tiny data, its log closed at the end of the test."""
    runs: list[Run] = []
    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)

    def make(*more: str, **changes: Any) -> Run:
        run_dir = changes.pop("run_dir", tmp_path / "run")
        let_go(runs)
        runs.append(build(configure(tiny_data, run_dir, *more, **changes), ALONE))
        return runs[-1]

    yield make
    for run in runs:
        run.log.close()


@pytest.fixture(scope="module")
def whole(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run of 12 steps in 4 epochs, with everything on that has a state."""
    config = configure(tiny_data, tmp_path_factory.mktemp("whole") / "run", *EVERYTHING, "--epochs", "4")
    run = build(config, ALONE)
    fit(run)
    return run


# ------------------------------------------------------------------------------------------------------ bit for bit
@pytest.mark.parametrize("at_step", [1, *(pytest.param(step, marks=pytest.mark.slow) for step in (4, 5, 8))])
def test_a_run_goes_on_from_within_an_epoch(
    at_step: int, whole: Run, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first save, in the middle of an epoch and of a log interval, right after a save, and after several."""
    interrupt(start(*EVERYTHING, epochs=4), monkeypatch, at_step=at_step)
    resumed = start(*EVERYTHING, epochs=4, resume=True)
    assert resumed.step == at_step // 2 * 2
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)


@pytest.mark.parametrize(
    "where", ["in a step", pytest.param("before validation", marks=pytest.mark.slow), "in validation"]
)
def test_a_run_that_is_asked_to_stop_saves_there_and_goes_on(
    where: str, whole: Run, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, measure = start(*EVERYTHING, epochs=4), trainer.measure

    def ask(*_: Any) -> None:
        run.stop.asked = True

    with monkeypatch.context() as patch:
        if where == "in validation":
            patch.setattr(trainer, "measure", lambda run: (ask(), measure(run))[1])  # in validation's first batch
        elif where == "before validation":
            patch.setattr(trainer, "share_statistics", lambda run: ask() if run.epoch == 1 else None)
            patch.setattr(trainer, "validate", lambda run: (run.stop.poll(), trainer.stop_if_asked(run)))
        else:
            step = trainer.train_step
            patch.setattr(trainer, "train_step", lambda run, group: (step(run, group), run.step == 5 and ask())[0])
        with pytest.raises(Stopped, match=r"^after step [56], saved; resume with: .* --resume$"):
            fit(run)
    assert run.step == (5 if where == "in a step" else 6)
    resumed = start(*EVERYTHING, epochs=4, resume=True)
    assert (resumed.step, resumed.unmeasured) == (run.step, where != "in a step")
    fit(resumed)
    assert same(final_state(whole), final_state(resumed))
    assert records(whole) == records(resumed)


def test_resume_where_nothing_is_begins_and_says_so(
    start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """So one command, with --resume, can be given again for ever."""
    fit(start("--epochs", "1", "--resume"))
    assert "resume   no checkpoint was saved yet: from the beginning" in capsys.readouterr().out
    fit(start("--epochs", "1", "--resume"))
    assert re.search(r"resume   .*step-0000000003.pt, after epoch 1 of 1\n", capsys.readouterr().out)


# --------------------------------------------------------------------------------------------------------- damage
def harmed(run: Run, tmp_path: Path, count: int) -> TrainConfig:
    """The config to resume a copy of `run`, whose newest `count` checkpoints have a flipped bit."""
    folder = tmp_path / "harmed"
    shutil.copytree(run.folder, folder)
    for path in checkpoints(folder / "checkpoints")[:count]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    return dataclasses.replace(run.config, run_dir=str(folder), resume=True)


def test_a_damaged_checkpoint_is_passed_over_and_set_aside(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = harmed(whole, tmp_path, 1)
    names = [path.name for path in checkpoints(Path(config.run_dir) / "checkpoints")]
    run = build(config, ALONE)
    assert run.step == 10
    shown = capsys.readouterr().out
    assert re.search(
        rf"note     checkpoint = '.*{names[0]}': must be a whole file .*; resuming from the previous one", shown
    )
    assert (run.folder / "checkpoints" / f"{names[0]}.damaged").is_file()
    fit(run)
    assert same(final_state(whole), final_state(run))
    assert records(whole) == records(run)


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_passed_over(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(paths: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(resume, "set_aside", refuse)
    assert build(harmed(whole, tmp_path, 1), ALONE).step == 10
    assert "the damaged file stays where it is ([Errno 13] Permission denied)" in capsys.readouterr().out


def test_where_all_are_damaged_nothing_begins_anew_by_itself(whole: Run, tmp_path: Path) -> None:
    config = harmed(whole, tmp_path, 3)
    with pytest.raises(
        CheckpointError, match=r"(?s)every checkpoint there is damaged; .*step-0000000012.*step-0000000010"
    ):
        build(config, ALONE)


# ----------------------------------------------------------------------------------------------- another run's
def resuming(run: Run, **changes: Any) -> TrainConfig:
    """The config to resume `run` with these fields, by dotted name, changed."""
    config = dataclasses.replace(run.config, resume=True)
    for path, value in changes.items():
        config = replace_at(config, path, value)
    return config


def forget_config(run: Run, tmp_path: Path) -> Path:
    """A copy of the run whose config.json does not give it away: the checkpoint has to."""
    folder = tmp_path / "copy"
    shutil.copytree(run.folder, folder)
    return folder


OTHER = {
    "seed": {"seed": 1},
    "global_batch_size": {"global_batch_size": 12},
    "model.width": {"model.width": 0.25},
    "model.name": {"model.name": "resnet10d"},
    "recipe": {"recipe": "demo"},
    "precision": {"precision": "fp32"},
    "optim.momentum": {"optim.momentum": 0.8},
}


@pytest.mark.parametrize("name", OTHER)
def test_another_config_is_refused_by_the_checkpoint_itself(
    name: str, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fasttricks.training.build.check_run_dir", lambda config: None
    )  # it asks config.json, and sees most first
    config = resuming(whole, run_dir=str(forget_config(whole, tmp_path)), **OTHER[name])
    before = load_checkpoint(Path(config.run_dir))
    with pytest.raises(ConfigError, match=rf"resumes only with its own config; changed: .*{re.escape(name)}: .* -> "):
        build(config, ALONE)
    assert same(load_checkpoint(Path(config.run_dir)), before)


def test_another_resolved_precision_is_refused(whole: Run) -> None:
    """auto is fp16 on one machine and fp32 on another."""
    saved = json.loads(json.dumps(whole.conditions))
    assert saved["resolved precision"] == "fp16"
    with pytest.raises(ConfigError, match=r"changed: resolved precision: 'fp16' -> 'fp32'$"):
        check(saved, whole.config, {"resolved precision": "fp32"})


def test_a_field_that_a_checkpoint_is_too_old_to_have_was_at_its_default(whole: Run) -> None:
    now = json.loads(json.dumps(whole.conditions))
    old = {name: value for name, value in now.items() if name != "data.fixed_augmentation"}
    check_conditions(old, now, whole.config, at="", edge="")
    with pytest.raises(ConfigError, match=r"changed: data\.fixed_augmentation: False -> True$"):
        check_conditions(old, now | {"data.fixed_augmentation": True}, whole.config, at="", edge="")


def test_losses_by_other_arithmetic_are_another_version(whole: Run) -> None:
    """A machine with a C compiler, and one without; checkpoints of before that was recorded are of torch's losses."""
    now = json.loads(json.dumps(whole.conditions))
    assert now["cross-entropy"] == "compiled"
    old = {name: value for name, value in now.items() if name != "cross-entropy"}
    for saved in (old, now | {"cross-entropy": "torch"}):
        check_conditions(saved, now | {"cross-entropy": "torch"}, whole.config, at="", edge="")
        with pytest.raises(ConfigError, match="changed: cross-entropy: 'torch' -> 'compiled'; go back, or resume with"):
            check_conditions(saved, now, whole.config, at="", edge="")


def test_another_batch_norm_is_another_version(start: Callable[..., Run]) -> None:
    """Checkpoints of before it was recorded are of torch's, which --model.norm torch continues."""
    run = start("--epochs", "1", "--model.norm", "torch")
    fit(run)
    with pytest.raises(
        ConfigError, match=r"changed: batch norm: 'torch' -> 'compiled' \(.* --model\.norm torch\); go back"
    ):
        start("--epochs", "1", "--resume")
    assert start("--epochs", "1", "--model.norm", "torch", "--resume").step == run.step > 0
    assert start("--epochs", "1", "--allow-other-versions", "--resume").step == run.step
    torchs = json.loads(json.dumps(run.conditions))
    old, ours = {n: v for n, v in torchs.items() if n != "batch norm"}, torchs | {"batch norm": "compiled"}
    check_conditions(old, torchs, run.config, at="", edge="")
    with pytest.raises(ConfigError, match=r"changed: batch norm: 'torch' -> 'compiled' \("):
        check_conditions(old, ours, run.config, at="", edge="")
    with pytest.raises(ConfigError, match=r"changed: batch norm: 'compiled' -> 'torch'; go back"):
        check_conditions(ours, torchs, run.config, at="", edge="")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "compiled"),
        ({"model.norm": "fused"}, "compiled"),
        ({"cuda_graph": True}, "compiled"),
        ({"model.norm": "torch", "cuda_graph": True}, "torch"),
        ({"model.norm": "torch"}, "torch"),
        ({"compile": "default"}, "torch"),  # inductor fuses it
        ({"compile": "default", "distill.teacher": "run"}, "compiled"),  # which is not compiled
        ({"precision": "bf16", "model.norm": "fused"}, "torch"),  # on the CPU
        ({"model.name": "timm:resnet18", "model.width": 1.0, "model.stem_stride": 4}, "torch"),
    ],
)
def test_the_batch_norm_of_a_run(changes: dict[str, Any], found: str, tiny_data: Path, tmp_path: Path) -> None:
    config, images = replace_fields(configure(tiny_data, tmp_path), changes), ImageFiles(["a.jpg"])
    assert conditions(find_task("classification"), config, ALONE, images, images)["batch norm"] == found
    on_gpu = dataclasses.replace(ALONE, device=torch.device("cuda"))
    kind = conditions(find_task("classification"), config, on_gpu, images, images)["batch norm"]
    asked = config.model.norm == "fused" or (config.model.norm == "auto" and config.cuda_graph)
    assert kind == ("fused" if asked and (found == "compiled" or "precision" in changes) else "torch")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "own"),
        ({"compile": "default"}, "torch"),
        ({"compile": "default", "distill.teacher": "run"}, "own"),
        ({"precision": "bf16"}, "torch"),
        ({"model.name": "cifarnet", "model.stem_stride": 4}, "own"),
        ({"model.name": "mobilenet_v1", "model.stem_stride": 4}, "torch"),
    ],
)
def test_the_convolutions_of_a_run(changes: dict[str, Any], found: str, tiny_data: Path, tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("winograd.c is for AVX2 and AVX-512")
    config, images = replace_fields(configure(tiny_data, tmp_path), changes), ImageFiles(["a.jpg"])
    now = json.loads(json.dumps(conditions(find_task("classification"), config, ALONE, images, images)))
    assert now["convolution"] == found
    on_gpu = dataclasses.replace(ALONE, device=torch.device("cuda"))
    assert "convolution" not in conditions(find_task("classification"), config, on_gpu, images, images)
    old = {name: value for name, value in now.items() if name != "convolution"}
    if found == "torch":
        check_conditions(old, now, config, at="", edge="")
        return
    with pytest.raises(ConfigError, match=r"changed: convolution: 'torch' -> 'own'; go back, or resume with --allow"):
        check_conditions(old, now, config, at="", edge="")
    check_conditions(old, now, dataclasses.replace(config, allow_other_versions=True), at="", edge="")


@pytest.mark.parametrize("split", ["train", "val"])
def test_another_data_set_is_refused(split: str, start: Callable[..., Run], tmp_path: Path, tiny_data: Path) -> None:
    data = shutil.copytree(tiny_data, tmp_path / "data")
    fit(start("--epochs", "1", "--data.root", str(data)))
    first = sorted((data / split / "ant").iterdir())[0]
    first.rename(first.with_name("renamed.jpg"))
    kind = {"train": "training", "val": "validation"}[split]
    with pytest.raises(ConfigError, match=rf"changed: {kind} images: '\d+, \w+' -> '\d+, \w+'$"):
        start("--epochs", "1", "--data.root", str(data), "--resume")


def check(saved: dict[str, Any], config: TrainConfig, changes: dict[str, Any], *, at: str = "", edge: str = "") -> None:
    check_conditions(saved, saved | changes, config, at=at, edge=edge)


@pytest.mark.parametrize("package", ["torch", "nvidia-dali-cuda120", "numpy", "fasttricks"])
def test_another_version_is_refused_but_where_it_is_meant(package: str, whole: Run) -> None:
    saved = json.loads(json.dumps(whole.conditions))
    assert saved[package]
    rule = rf"changed: {package}: '.*' -> '0\.0'; go back, or resume with --allow-other-versions, no longer bit for bit"
    with pytest.raises(ConfigError, match=rule):
        check(saved, whole.config, {package: "0.0"})
    check(saved, dataclasses.replace(whole.config, allow_other_versions=True), {package: "0.0"})


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_torchvisions_tasks_need_the_releases_that_make_their_images(task: str, whole: Run) -> None:
    """Other tasks do not, so that an upgrade of torchvision keeps their runs."""

    def found(task: str) -> dict[str, Any]:
        images = ImageFiles(["a.jpg"])
        return conditions(find_task(task), whole.config, ALONE, images, images)

    assert not {"torchvision", "pillow"} & found("classification").keys()
    saved = found(task)
    for package in ("torchvision", "pillow"):
        assert saved[package] == metadata.version(package)
        with pytest.raises(ConfigError, match=rf"changed: {package}: '.*' -> '0\.0'; go back, or resume with --allow"):
            check(saved, whole.config, {package: "0.0"})
        check(saved, dataclasses.replace(whole.config, allow_other_versions=True), {package: "0.0"})


def test_other_hardware_is_said_aloud(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    fit(start("--epochs", "1"))
    monkeypatch.setattr(World, "device_name", "a Cray-1")
    run = start("--epochs", "1", "--resume")
    config = run.config
    found = find_state(config, ALONE, json.loads(json.dumps(run.conditions)))
    assert re.search(
        "started on .* threads and resumes on a Cray-1: weights may differ in their last bits", found.notes[0]
    )


# --------------------------------------------------------------------------------------------------------- other ranks
def test_other_ranks_take_an_option_and_the_end_of_an_epoch(whole: Run) -> None:
    saved, allowed = json.loads(json.dumps(whole.conditions)), dataclasses.replace(whole.config, allow_other_ranks=True)
    with pytest.raises(
        ConfigError, match="changed: ranks: 1 -> 2; --allow-other-ranks lets them differ from the end of"
    ):
        check(saved, whole.config, {"ranks": 2})
    check(saved, allowed, {"ranks": 2, "accumulate": 1})
    with pytest.raises(
        ConfigError, match=r"ranks: 1 -> 2: .* is in mid-epoch \(x, 2 steps\); the last .* can is y: move"
    ):
        check(saved, allowed, {"ranks": 2}, at="in mid-epoch (x, 2 steps)", edge="y")
    with pytest.raises(ConfigError, match="none here can, or resume with the ranks that it started with"):
        check(saved, allowed, {"ranks": 2}, at="in mid-epoch (x, 2 steps)")


def test_in_mid_epoch_the_last_checkpoint_that_can_is_named_and_there(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three saves after it, each of which drops the oldest, the epoch's own is still kept."""
    interrupt(start("--checkpoint-steps", "1", "--global-batch-size", "8", epochs=4), monkeypatch, at_step=10)
    again = partial(
        start, "--checkpoint-steps", "1", "--global-batch-size", "8", "--allow-other-ranks", epochs=4, resume=True
    )
    edge = r".*/step-0000000006\.pt"
    with pytest.raises(
        ConfigError, match=rf"accumulate: 1 -> 2: .*in mid-epoch \(.*step-0000000010\.pt, 4 steps .*is {edge}:"
    ):
        again(accumulate=2)
    for path in checkpoints(again().folder / "checkpoints")[:2]:
        path.unlink()
    run = again(accumulate=2)
    assert (run.step, run.epoch) == (6, 1)
    seen: list[int] = []
    monkeypatch.setattr(trainer, "train_step", lambda run, group: seen.append(sum(map(len, group))) or [])
    trainer.train_epoch(run)
    assert sum(seen) == 45, "each image once"


def test_the_folder_is_as_before_after_a_refusal(whole: Run, tmp_path: Path) -> None:
    folder = forget_config(whole, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError):
        build(resuming(whole, run_dir=str(folder), seed=5), ALONE)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_read_only_folder_ends_the_run_with_the_last_checkpoint(
    start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root no mode of a folder refuses: the system call is made to."""
    run = start("--epochs", "2")
    real = os.replace

    def replace(one: Path, other: Path) -> None:
        deny() if run.step == 6 and other.suffix == ".pt" else real(one, other)

    monkeypatch.setattr("fasttricks.runs.checkpoint.os.replace", replace)
    with pytest.raises(
        CheckpointError, match=r"must be on a disk with room that this process may write to.*step-0000000003\.pt"
    ):
        fit(run)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == ["best.pt", "step-0000000003.pt"]


def deny() -> None:
    raise PermissionError(30, "Read-only file system")


def test_a_checkpoint_of_the_old_format_is_named(start: Callable[..., Run]) -> None:
    run = start("--epochs", "1")
    fit(run)
    (path,) = checkpoints(run.folder / "checkpoints")
    state = load_checkpoint(path)
    torch.save({**state, "format": 1}, path)
    with pytest.raises(CheckpointError, match="must have format 2, not 1"):
        start("--epochs", "1", "--resume")
    del state["format"], state["loss_scale"]
    save_checkpoint(path, state)
    with pytest.raises(CheckpointError, match=r"it lacks \['loss_scale'\]"):
        start("--epochs", "1", "--resume")
