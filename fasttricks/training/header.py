"""The header of a run: network, data, device, batch and schedule."""

from __future__ import annotations

from pathlib import Path

from fasttricks.data.sources import Source
from fasttricks.data.sources.class_order import describe_order
from fasttricks.learning.precision import resolve_precision
from fasttricks.learning.schedule import image_sizes
from fasttricks.learning.teacher_cache import CachedTeacher
from fasttricks.training.resume import Resumed
from fasttricks.training.run import Run


def header(run: Run, data: Path, train: Source, resumed: Resumed, *, initial: str = "") -> list[str]:
    """A line for each fact.

    data: the folder that holds the images. train: those of training. initial: the account of the weights that it started from.
    """
    config, world = run.config, run.world
    parameters = sum(p.numel() for p in run.model.parameters())
    counts = f"{run.shards.num_images:,} training and {run.val_loader.shards.num_images:,} validation images"
    batch = f"{world.size} rank(s) x {config.accumulate} micro-batch(es) x {run.shards.batch_size} images"
    share, most = config.data.val_share, config.data.limit_per_class
    counts += f" (held out: data.val_share {share:g})" if share else ""
    counts += f" (at most {most:,} a class for training: data.limit_per_class)" if most else ""
    near = f"; threads on the {world.near_cores} cores beside it" if world.near_cores else ""
    classes = f"{len(run.classes)} class{'es' if len(run.classes) > 1 else ''}"
    rows = {
        "recipe": config.recipe,
        "model": f"{config.model.name}, {parameters / 1e6:.2f} M parameters",
        "data": f"{counts} of {classes} in {data}",
        "device": f"{world.device_name}, precision {resolve_precision(config.precision, world.device)}{near}",
        "batch": f"{config.global_batch_size} = {batch}; {run.steps_per_epoch} steps an epoch, {config.epochs} epochs",
        "lr": f"peak {config.peak_lr:g}, warm-up {config.schedule.warmup_epochs:g} epochs, then {config.schedule.decay}",
        "run": f"{run.folder}/",
    }
    if config.optim.backbone_lr != 1:
        rows["lr"] += f"; x {config.optim.backbone_lr:g} for all weights but the {run.task.facts.heads}"
    if config.model.freeze:
        trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        rows["frozen"] = f"{', '.join(config.model.freeze)}; {trained / 1e6:.2f} M parameters are trained"
    rows["counts"] = run.task.describe(config, train, run.class_weights)
    if order := describe_order(run.classes, config.data.class_order):
        rows["classes"] = order
    sizes = image_sizes(config.schedule, full=config.data.image_size, epochs=config.epochs)
    if config.schedule.first_size < 1:
        growth = "they grow over the epochs" if len(sizes) > 1 else "too few epochs to grow in"
        rows["images"] = f"{', '.join(map(str, sizes))} pixels: {growth} (progressive resizing)"
    if run.train_loader.note:
        rows["input"] = run.train_loader.note
    if initial:
        rows["init"] = initial
    rows |= _teacher_rows(run)
    if run.monitor.note:
        rows["monitor"] = run.monitor.note
    if config.resume:
        done = f"{resumed.path}, after epoch {run.epoch} of {config.epochs}"
        done += f" and {run.step_in_epoch} of {run.steps_per_epoch} steps" if run.step_in_epoch else ""
        rows["resume"] = done if resumed else "no checkpoint was saved yet: from the beginning"
    if resumed.extends:
        last = resumed.extended[-1]
        schedule = (
            f"the schedule is from here on that of {last['to_epochs']}, lr {run.lr_at(run.step):.4g} in the next step"
        )
        rows["extended"] = f"from {last['from_epochs']} to {last['to_epochs']} epochs: {schedule}"
    rows |= {f"note {number}" if number else "note": note for number, note in enumerate(resumed.notes)}
    return [f"{name:8s} {value}" for name, value in rows.items()]


def _teacher_rows(run: Run) -> dict[str, str]:
    if run.teacher is None:
        return {}
    distill, teacher, rows = run.config.distill, run.teacher, {}
    if isinstance(teacher, CachedTeacher):
        rows["cache"] = f"the teacher's logits in {teacher.file}"
        teacher = teacher.teacher
    weights = f"{distill.hard_weight:g} x labels + {distill.soft_weight:g} x T^2 x teacher, T = {distill.temperature:g}"
    return {"teacher": f"{teacher.name} {teacher.digest} from {distill.teacher}; {weights}", **rows}
