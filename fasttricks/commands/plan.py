"""Scale on paper: python -m fasttricks.plan RECIPE --gpus N --gpu CARD [--section.field value ...]; --help lists the recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fasttricks.commands import prog
from fasttricks.config import TrainConfig, show_classes
from fasttricks.learning.schedule import image_sizes
from fasttricks.planning.launch import launch_command
from fasttricks.planning.planner import USABLE, Plan, PlanConfig, make_plan, with_more_accumulation
from fasttricks.runs.config_file import load_config
from fasttricks.runs.fitted import fit_recipe

PROG = prog("plan")
MIB = 2**20


def plan_text(plan: Plan) -> str:
    """The plan in words and numbers, for a terminal."""
    config = plan.config
    machine = f"{config.gpus} x {config.gpu} in {config.nodes} node(s)"
    fitting = plan if plan.fits else with_more_accumulation(plan)
    sections = {
        f"{config.recipe} on {machine}, {config.precision}: figures on paper, not measured": training_rows(plan),
        "memory of a GPU, MiB: live tensors of an eager step at the peak": memory_rows(plan, fitting),
        "time of a step, ms: from data sheets": time_rows(plan),
        "the whole run: training steps alone, without validation, checkpoints and start": run_rows(plan, fitting),
    }
    lines = []
    for head, rows in sections.items():
        lines += [head, *(f"  {name:21s}  {value}".rstrip() for name, value in rows.items()), ""]
    return "\n".join(lines[:-1])


def training_rows(plan: Plan) -> dict[str, str]:
    """The training: images, batch, rate and steps."""
    config, schedule = plan.config, plan.config.schedule
    batch = f"{config.gpus} GPU(s) x {config.accumulate} micro-batch(es) x {plan.shards.batch_size} images"
    warmup = f"warm-up {schedule.warmup_epochs:g} epochs = {plan.warmup_steps:,} steps, then {schedule.decay}"
    steps = f"{plan.steps_per_epoch:,} an epoch, {plan.steps_per_epoch * config.epochs:,} in {config.epochs} epochs"
    sizes = image_sizes(schedule, full=config.data.image_size, epochs=config.epochs)
    grow = {"image sizes": f"{', '.join(map(str, sizes))} pixels over the epochs; all below is at the last"}
    return {
        "training images": f"{plan.data.images:,} of {show_classes(plan.data.classes)} ({plan.data.source})",
        "global batch": f"{config.global_batch_size:,} = {batch}",
        "learning rate": f"peak {config.peak_lr:g}, {warmup}",
        "steps": steps,
        **(grow if len(sizes) > 1 else {}),
    }


def memory_rows(plan: Plan, fitting: Plan | None) -> dict[str, str]:
    """The memory of a GPU by kind, and whether the run fits."""
    memory, gradients = plan.memory, plan.footprint.gradient_bytes / MIB
    notes = {
        "parameters": f"{plan.footprint.num_parameters / 1e6:.2f} M",
        "statistics": "of batch norm",
        "gradients": "in the buckets of DistributedDataParallel"
        if plan.config.gpus > 1
        else f"at that moment; {gradients:,.1f} in all",
        "optimizer": "momentum and FP32 masters" if plan.config.precision == "fp16" else "momentum",
        "average": "of the weights",
        "teacher": f"{plan.config.distill.teacher}, in FP16",
        "activations": "and all else",
        "input": f"of the step, and {plan.config.data.prefetch} batch(es) prefetched",
    }
    rows = {kind: f"{memory[kind] / MIB:10,.1f}  {note}" for kind, note in notes.items() if memory.get(kind)}
    missing = ("convolution workspace", "allocator slack", "CUDA, NCCL, DALI")
    answer = "yes" if plan.fits else "no"
    rows |= {
        "all of these": f"{plan.memory_bytes / MIB:10,.1f}",
        **dict.fromkeys(missing, "       not modelled"),
        f"fits {plan.card.memory_gib} GiB": f"       {answer}: {USABLE:.0%} of it for these, the rest for parts not modelled",
    }
    return rows if plan.fits else rows | {"way out": way_out(plan, fitting)}


def way_out(plan: Plan, other: Plan | None) -> str:
    """A change that makes `plan` fit. other: with_more_accumulation's."""
    if other is None:
        return "       a larger card or a smaller model: not even one image at once fits"
    batch_norm = f"batch norm then averages over {other.shards.batch_size} images"
    mode = other.config.compile
    options = f"--accumulate {other.config.accumulate}" + (f" --compile {mode}" if mode != plan.config.compile else "")
    return f"{other.memory_bytes / MIB:10,.1f}  with {options}; {batch_norm}"


def time_rows(plan: Plan) -> dict[str, str]:
    """The time of a step in each part, and the bottleneck."""
    config, card, found = plan.config, plan.card, plan.footprint
    summed = (
        f"{found.gradient_bytes / 1e6:,.1f} MB all-reduced: {plan.link_bytes / 1e6:,.1f} MB sent by a GPU in a ring"
    )
    path = f"the slower of {card.link} and {config.network_gbit:g} Gbit/s a node" if config.nodes > 1 else card.link
    link = f"{summed} at {plan.link_bandwidth / 1e9:g} GB/s ({path}), no latency"
    peak = f"{card.peak_flops[config.precision] / 1e12:g} TFLOP/s{' (TF32)' if config.precision == 'fp32' and card.tf32 else ''}"
    traffic = f"{found.traffic_bytes / 1e9:,.1f} GB in and out of its operators"
    notes = {
        "compute": f"{found.flops / 1e12:,.2f} TFLOP at {config.efficiency:g} (assumed) of {peak}",
        "traffic": f"{traffic}, at {card.memory_bandwidth / 1e9:,.0f} GB/s",
        "link": link if config.gpus > 1 else "one GPU",
        "host": f"{config.host_ms:g} ms a micro-batch, as given",
        "loader": f"{config.loader_rate:,g} imgs/sec a node, as given",
    }
    rows = {name: f"{seconds * 1e3:10,.2f}  {notes[name]}" for name, seconds in plan.seconds.items()}
    speed = f"then about {plan.images_per_sec:,.0f} imgs/sec"
    left_out = {"loader": config.loader_rate, "host": config.host_ms}
    aside = [name for name, given in left_out.items() if not given]
    options = [{"loader": "--loader-rate", "host": "--host-ms"}[name] for name in aside]
    unknown = f" ({' and '.join(aside)} aside: give {' and '.join(options)})" if aside else ""
    return {
        **rows,
        "loader needed": f"       {plan.loader_need:,.0f} imgs/sec a node",
        "bottleneck": f"       {plan.bottleneck}{unknown}; {speed}",
    }


def run_rows(plan: Plan, fitting: Plan | None) -> dict[str, str]:
    """How long the run takes, and the command that starts it: of the plan that fits, where one does."""
    config = plan.config
    whole = plan.epoch_seconds * config.epochs
    gpu_hours = whole * config.gpus / 3600
    spent = f"{three_figures(gpu_hours)} GPU-hours" if gpu_hours >= 0.01 else "below 0.01 GPU-hours"
    bound = " at most: earlier images are smaller" if config.schedule.first_size < 1 else ""
    rows = {
        "an epoch": f"{duration(plan.epoch_seconds)}{bound}",
        f"{config.epochs} epoch(s)": f"{duration(whole)}, {spent}{bound}",
    }
    where = " on each node" if config.nodes > 1 else ""
    return rows | ({f"start it{where}": launch_command(fitting)} if fitting else {})


def duration(seconds: float) -> str:
    """In the largest unit that it has one of: 0.420 s, 36.2 s, 2.77 minutes, 1,250 hours."""
    size, unit = next((size, unit) for size, unit in ((3600, "hours"), (60, "minutes"), (0, "s")) if seconds >= size)
    return f"{three_figures(seconds / (size or 1))} {unit}"


def three_figures(value: float) -> str:
    """0.420, 36.2, 2.77, 1,250."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def main(args: Sequence[str]) -> None:
    """Print the plan of the recipe and machine that `args` name."""
    from fasttricks.config.cli import parse_extended

    print(plan_text(make_plan(parse_extended(args, prog=PROG, extend=extend, fit=fit_recipe, load=load_config))))


def extend(recipe: TrainConfig) -> PlanConfig:
    """`recipe` with the machine's fields at their defaults."""
    return PlanConfig(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)})
