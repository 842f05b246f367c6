"""Evaluate a checkpoint: python -m fasttricks.evaluate CHECKPOINT [--data.root DIR ...]; each validation image counts once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fasttricks.config import DataConfig, EvalConfig, Precision
from fasttricks.system.extras import require_train_extra

if TYPE_CHECKING:
    from fasttricks.system.distributed import World
    from fasttricks.tasks.classification import Metrics

PROG = "python -m fasttricks.evaluate"
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


def evaluate_checkpoint(config: EvaluateConfig, state: dict[str, Any], world: World) -> Metrics:
    """Metrics of the model of `state`, as load_checkpoint returned it, over the validation images of config.data.root.

    Raises DataError where val/ has a class that the checkpoint lacks. A collective: every rank must call it.
    """
    from fasttricks.data.pipeline.loader import Loader
    from fasttricks.data.sources import open_split
    from fasttricks.learning.precision import check_precision, image_dtype, make_autocast, resolve_precision
    from fasttricks.runs.restore import restore_model, saved_config
    from fasttricks.tasks.classification import evaluate
    from fasttricks.training.build import place

    check_precision(config.precision, world.device)
    saved = saved_config(state)
    folder = open_split(config.data.root, "val", classes=tuple(state["classes"]))
    precision = resolve_precision(config.precision, world.device)
    model = place(restore_model(state, average=config.average), world, precision)
    batch_size = config.eval.batch_size or saved.micro_batch_size(len(state["ranks"]))
    loader = Loader(
        folder,
        config.data,
        training=False,
        batch_size=batch_size,
        device=world.device,
        dtype=image_dtype(precision, world.device),
        rank=world.rank,
        world_size=world.size,
    )
    autocast = make_autocast(precision, world.device)
    return evaluate(model, loader, world, flip=config.eval.flip, autocast=autocast)


def main(args: Sequence[str]) -> None:
    """Evaluate the checkpoint that `args` name, and print one line."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    from fasttricks.system.distributed import join_world, keep_freed_memory

    keep_freed_memory()
    from fasttricks.config.cli import parse
    from fasttricks.runs.checkpoint import load_checkpoint
    from fasttricks.runs.restore import saved_config

    state = load_checkpoint(Path(args[0]))
    saved = saved_config(state)
    default = EvaluateConfig(device=saved.device, precision=saved.precision, data=saved.data, eval=saved.eval)
    config = parse(default, args[1:], prog=f"{PROG} {args[0]}", description=f"Evaluate {state['path']}.")
    with join_world(config.device) as world:
        metrics = evaluate_checkpoint(config, state, world)
        if world.is_main:
            scores = f"top-1 {metrics.top1:.2f} %  top-5 {metrics.top5:.2f} %  loss {metrics.loss:.4f}"
            print(f"{scores}  {metrics.images} images  {state['path']}")


if __name__ == "__main__":
    require_train_extra()
    from fasttricks.config.cli import run_main

    run_main(main)
