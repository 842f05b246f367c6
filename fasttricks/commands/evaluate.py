"""Evaluate a checkpoint: python -m fasttricks.evaluate CHECKPOINT [--data.root DIR ...]; each validation image counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fasttricks.commands import prog
from fasttricks.config import DataConfig, EvalConfig, Precision, check_fields, show_name

if TYPE_CHECKING:
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World

PROG = prog("evaluate")
USAGE = f"""usage: {PROG} CHECKPOINT [--section.field value ...]

CHECKPOINT is a file, or a run folder, of which the newest checkpoint is taken. Fields are as the run had them unless given.
{PROG} CHECKPOINT --help lists them."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How to evaluate; what is not given is as in the checkpoint's run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    precision: Precision = "auto"
    """auto: fp16 on CUDA, fp32 on CPU."""
    average: bool = True
    """Evaluate the averaged weights where the run kept an average (ema_decay)."""
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_fields(self)


def evaluate_checkpoint(config: EvaluateConfig, saved: Saved, world: World) -> dict[str, float]:
    """Metrics of the network of `saved` over the validation images of config.data.root, by name; val_loss and val_images too.

    Raises DataError where val/ has a class that the checkpoint lacks. A collective: every rank must call it.
    """
    from fasttricks.data.sources import open_split
    from fasttricks.learning.placement import place
    from fasttricks.learning.precision import check_precision, image_dtype, make_autocast, resolve_precision
    from fasttricks.tasks import find_task

    check_precision(config.precision, world.device)
    task = find_task(saved.task)
    images = open_split(config.data.root, "val", classes=saved.classes)
    precision = resolve_precision(config.precision, world.device)
    model = place(saved.network(average=config.average), world, precision)
    batch_size = config.eval.batch_size or saved.config.micro_batch_size(saved.ranks)
    dtype = image_dtype(precision, world.device)
    batches = task.val_batches(config.data, images, world, batch_size=batch_size, dtype=dtype)
    return task.evaluate(model, batches, world, config.eval, make_autocast(precision, world.device))


def main(args: Sequence[str]) -> None:
    """Evaluate the checkpoint that `args` name, and print one line."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    from fasttricks.system.distributed import join_world, keep_freed_memory

    keep_freed_memory()
    from fasttricks.config.cli import parse
    from fasttricks.runs.metric import show_all
    from fasttricks.runs.saved import read_saved
    from fasttricks.tasks import find_task

    saved = read_saved(Path(args[0]))
    run = saved.config
    default = EvaluateConfig(device=run.device, precision=run.precision, data=run.data, eval=run.eval)
    config = parse(default, args[1:], prog=f"{PROG} {args[0]}", description=f"Evaluate {saved.path}.")
    with join_world(config.device) as world:
        found = evaluate_checkpoint(config, saved, world)
        if world.is_main:
            scores = f"{show_all(find_task(saved.task).metrics, found)}  loss {found['val_loss']:.4f}"
            print(f"{scores}  {found['val_images']} images  {show_name(saved.path)}")
