"""The checkpoint that a run resumes from: the newest intact one of the same run, or a refusal that names the differences."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttricks.config import ConfigError, TrainConfig, model_info
from fasttricks.data.sources import Source
from fasttricks.learning.learner import Task
from fasttricks.learning.precision import resolve_precision
from fasttricks.models import OF_CONV2D, convolution_arithmetic, fused_arithmetic, norm_of
from fasttricks.runs.checkpoint import read_checkpoint
from fasttricks.runs.folder import deciding_fields, releases
from fasttricks.runs.stored import CheckpointError, DamagedError, checkpoints, named_checkpoints, set_aside
from fasttricks.system.distributed import World
from fasttricks.tasks import TASKS
from fasttricks.tasks.losses import arithmetic

_ANY = TrainConfig(recipe="", epochs=6, global_batch_size=1)
"""For the defaults of its fields."""
_RANKS = ("ranks", "accumulate")
"""The facts that may differ under --allow-other-ranks."""
_SOFTWARE = (
    *("device kind", "torch", "nvidia-dali-cuda120", "numpy", "triton", "fasttricks", "cross-entropy", "batch norm"),
    "convolution",
    *dict.fromkeys(package for task in TASKS.values() for package in task.facts.packages),
)
"""The facts that may differ under --allow-other-versions: each computes or draws numbers that affect the weights."""


@dataclass
class Resumed:
    """A checkpoint to resume from; an empty one for a new run."""

    state: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """Notes for the user about the search."""
    damaged: list[Path] = field(default_factory=list)
    extended: list[dict[str, Any]] = field(default_factory=list)
    """How the run got more epochs than it began with, the last time now where `extends`."""
    extends: bool = False

    def __bool__(self) -> bool:
        return bool(self.state)

    @property
    def path(self) -> str:
        """The checkpoint's file; empty where there is none."""
        return str(self.state.get("path", ""))

    def set_damaged_aside(self) -> None:
        """Rename the damaged checkpoints, with a note where that fails. For the main rank, once the folder is its own."""
        try:
            set_aside(self.damaged)
        except OSError as error:
            self.notes.append(f"the damaged file stays where it is ({error})")


# ---------------------------------------------------------------------------------------------------- the conditions
def conditions(
    task: Task, config: TrainConfig, world: World, train: Source, val: Source, weights: Tensor | None = None
) -> dict[str, Any]:
    """The facts that make a resumed run the same run, by name, with the names and labels of the images in order.

    weights: those of the classes, of which a file may hold others by then. A checkpoint holds the facts as `fingerprint`.
    """
    packages = releases(*task.facts.packages)
    found = {package: version for package, version in packages.items() if package in _SOFTWARE}
    if world.device.type == "cpu":
        found.pop("triton", None)  # the CPU runs none of its kernels
        found["cross-entropy"] = arithmetic()
        found["convolution"] = _convolution(config, world.device)
    return {
        "recipe": config.recipe,
        **deciding_fields(config),
        "task": task.name,
        "resolved precision": resolve_precision(config.precision, world.device),
        "ranks": world.size,
        "training images": f"{len(train)}, {train.fingerprint()}",
        "validation images": f"{len(val)}, {val.fingerprint()}",
        "device kind": world.device.type,
        "batch norm": _batch_norm(config, world.device),
        **({} if weights is None else {"class weights": weights.tolist()}),
        **found,
    }


def _batch_norm(config: TrainConfig, device: torch.device) -> str:
    """The implementation of batch norm in a run: fused on a GPU, compiled C on the CPU, or torch. Their last bits differ.

    torch.compile is left torch's; a teacher runs eagerly, and on the CPU in FP32.
    """
    ours = "norm" in model_info(config.model.name).options and config.compile == "off"
    if device.type == "cpu":
        ours = ours and resolve_precision(config.precision, device) == "fp32"
    if norm_of(config) == "torch" or not (ours or config.distill.teacher):
        return "torch"
    if norm_of(config) == "auto" and device.type != "cpu":
        return "torch"
    return fused_arithmetic(device)


def _convolution(config: TrainConfig, device: torch.device) -> str:
    """The implementation of convolutions in a run on a CPU: own in FP32 where a network has it, or torch."""
    plain = config.compile == "off" and resolve_precision(config.precision, device) == "fp32"
    ours = plain and model_info(config.model.name).family in OF_CONV2D
    return convolution_arithmetic() if ours or config.distill.teacher else "torch"


def check_conditions(saved: dict[str, Any], now: dict[str, Any], config: TrainConfig, *, at: str, edge: str) -> None:
    """Raise ConfigError, naming every field that differs and the way out.

    at: where the checkpoint stands, empty at an epoch's end. edge: the newest checkpoint of an epoch's end, or empty.
    """
    saved = deciding_fields(_ANY) | saved  # a field that was added since behaved before as its default does
    if "cross-entropy" in now:
        saved.setdefault("cross-entropy", "torch")  # as in every run before it was recorded
    for name in ("batch norm", "convolution"):
        if name in now:
            saved.setdefault(name, "torch")  # likewise
    changed = {n: f"{n}: {saved.get(n)!r} -> {now.get(n)!r}" for n in [*now, *saved] if saved.get(n) != now.get(n)}
    ranks = [changed.pop(name) for name in _RANKS if name in changed]
    software = [changed.pop(name) for name in _SOFTWARE if name in changed]
    where = f"run_dir = {config.run_dir!r}"
    if changed:
        raise ConfigError(f"{where}: a run resumes only with its own config; changed: {'; '.join(changed.values())}")
    if software and not config.allow_other_versions:
        rule = f"began with another; changed: {'; '.join(software)}"
        if any(change.startswith("batch norm: 'torch'") for change in software):
            rule += " (torch's is that of --model.norm torch)"
        raise ConfigError(f"{where}: {rule}; go back, or resume with --allow-other-versions, no longer bit for bit")
    if not ranks:
        return
    if not config.allow_other_ranks:
        rule = f"must be the same to resume; changed: {'; '.join(ranks)}"
        raise ConfigError(f"{where}: {rule}; --allow-other-ranks lets them differ from the end of an epoch on")
    if at:
        can = f"the last checkpoint that can is {edge}: move newer ones out of its folder" if edge else "none here can"
        rule = f"may differ only at the end of an epoch, and the newest checkpoint is {at}"
        raise ConfigError(f"{where}: {'; '.join(ranks)}: {rule}; {can}, or resume with the ranks that it started with")


# ------------------------------------------------------------------------------------------------------- finding one
def find_state(config: TrainConfig, world: World, now: dict[str, Any]) -> Resumed:
    """The newest whole checkpoint of config.run_dir, whose conditions are `now`; empty where none is to be or none is there.

    A damaged one is passed over, with a note. Raises CheckpointError where all are, and ConfigError for another run's.
    """
    found, folder = Resumed(), Path(config.run_dir) / "checkpoints"
    paths = named_checkpoints(folder) if config.resume else []
    for path in paths:
        try:
            found.state = read_checkpoint(path)
            break
        except DamagedError as error:
            found.damaged.append(path)
            found.notes.append(f"{error}; resuming from the previous one")
    if paths and not found:
        rule = "every checkpoint there is damaged; give another --run-dir, or delete this one to start again"
        raise CheckpointError(f"run_dir = {config.run_dir!r}: {rule}:\n  " + "\n  ".join(found.notes))
    if found:
        _check(found, config, world, now)
    _check_same_on_all_ranks(found, world)
    return found


def _check(found: Resumed, config: TrainConfig, world: World, now: dict[str, Any]) -> None:
    state, at, edge = found.state, "", ""
    saved = json.loads(state["fingerprint"])
    found.extended = json.loads(state.get("extended", "[]"))
    if saved["epochs"] != config.epochs:
        found.extended.append(_extension(state, saved["epochs"], config))
        found.extends, saved["epochs"] = True, config.epochs
    if state["step_in_epoch"]:
        at = f"in mid-epoch ({state['path']}, {state['step_in_epoch']} steps into epoch {state['epoch'] + 1})"
        edge = _newest_edge(Path(state["path"]).parent) if config.allow_other_ranks else ""
    check_conditions(saved, now, config, at=at, edge=edge)
    if state["hardware"] != world.device_name:
        began = f"started on {state['hardware']} and resumes on {world.device_name}"
        found.notes.append(f"the run {began}: weights may differ in their last bits from those of one machine")


def _extension(state: dict[str, Any], before: int, config: TrainConfig) -> dict[str, Any]:
    """Notes about more epochs for a finished run. Raises ConfigError where the epochs cannot change."""
    done = state["epoch"] + (state["step_in_epoch"] > 0)
    if config.epochs < done:
        rule = f"must be at least the {done} that the run in {config.run_dir} has started"
        raise ConfigError(f"epochs = {config.epochs}: {rule}; resume with --epochs {before}, or give another --run-dir")
    if state["epoch"] < before:
        rule = f"must be the {before} that the run in {config.run_dir} started with until those are done; then it can be extended"
        raise ConfigError(f"epochs = {config.epochs}: {rule}; resume with --epochs {before}, or give another --run-dir")
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"from_epochs": before, "to_epochs": config.epochs, "step": state["step"], "when": when}


def _newest_edge(folder: Path) -> str:
    for path in checkpoints(folder):
        try:
            if not read_checkpoint(path)["step_in_epoch"]:
                return str(path)
        except CheckpointError:
            continue
    return ""


def _check_same_on_all_ranks(found: Resumed, world: World) -> None:
    step = found.state.get("step", -1)
    total = int(world.sum_(torch.tensor(step, dtype=torch.int64, device=world.device)).item())
    if total != step * world.size:
        rule = "must be the same for all ranks, on one shared disk"
        raise CheckpointError(f"checkpoints: {rule}; this rank (number {world.rank}) found that of step {step}")
