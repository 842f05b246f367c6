"""Goes through the runs of an ablation, then writes its tables: the loop behind `python -m fasttricks.ablate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import (
    Job,
    PlannedCell,
    check_data,
    check_disk,
    claimed,
    make_job,
    plan_cells,
    results_of,
)
from fasttricks.ablation.paper import Table
from fasttricks.ablation.report import Filled, FilledCell, write_report
from fasttricks.ablation.statistics import paired_difference
from fasttricks.ablation.worker import run_job, tidy
from fasttricks.runs.folder import write_json

Plan = list[tuple[Table, list[PlannedCell]]]
POLL_S = 1.0  # between looks at what another process is at


def ablate(tables: Sequence[Table], config: AblateConfig, *, command: str) -> int:
    """Train what is not finished of `tables`, seed by seed, and write and print the tables. Returns how many runs failed.

    Raises UserError before the first run for what would stop it, and KeyboardInterrupt, saying how to go on.
    """
    data, classes = check_data(config)
    plan = [(table, plan_cells(table, config, classes)) for table in tables]
    folder = Path(config.run_dir)
    failures: dict[str, str] = {}
    if not config.report:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "data.json", data)
        first = jobs_of(plan, config, config.seeds)
        print(f"{len(first)} runs, {len(unfinished(first))} to do, in {folder}/", flush=True)
        check_disk(unfinished(first), config, data["classes"])
        try:
            work(first, config, failures)
            more = jobs_of(plan, config, config.more_seeds, only_nearly_decided=True) if config.more_seeds else []
            if unfinished(more):
                print(f"{len(unfinished(more))} more runs where they would decide", flush=True)
                check_disk(unfinished(more), config, data["classes"])
                work(more, config, failures)
        except KeyboardInterrupt:
            left = len(unfinished(first))
            write_report(fill(plan, config, failures), config, data, command=command)
            raise KeyboardInterrupt(f"{left} of {len(first)} runs are left; the same command goes on") from None
    print(write_report(fill(plan, config, failures), config, data, command=command))
    return len(failures)


def jobs_of(plan: Plan, config: AblateConfig, seeds: int, *, only_nearly_decided: bool = False) -> list[Job]:
    """The runs of `plan`, each once: table by table, and in a table seed by seed, so that a part is a whole table."""
    jobs: dict[str, Job] = {}
    for table, cells in plan:
        wanted = nearly_decided(table, cells, config) if only_nearly_decided else cells
        for seed in range(seeds):
            for cell in wanted:
                if cell.config is not None:
                    job = make_job(cell, config, table, seed)
                    jobs.setdefault(job.config.run_dir, job)
    return list(jobs.values())


def nearly_decided(table: Table, cells: list[PlannedCell], config: AblateConfig) -> list[PlannedCell]:
    """The cells whose difference more_seeds seeds would decide at the same spread, and the baselines of their columns."""
    chosen = []
    for column in table.columns:
        own = [cell for cell in cells if cell.cell.column == column]
        scores = [top1(results_of(cell, config, table)) for cell in own]
        near = []
        for cell, values in zip(own[1:], scores[1:], strict=True):
            difference = paired_difference(values, scores[0])
            if difference is not None and difference.would_be_decided_by(config.more_seeds):
                near.append(cell)
        chosen += [own[0], *near] if near else []
    return chosen


def top1(results: dict[int, dict[str, Any]]) -> dict[int, float]:
    """Seed -> top-1, without the runs that diverged."""
    return {seed: result["top1"] for seed, result in results.items() if "top1" in result}


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Those without a result."""
    return [job for job in jobs if job.result() is None]


def work(jobs: Sequence[Job], config: AblateConfig, failures: dict[str, str]) -> None:
    """Run what is not finished of `jobs`, one after another, with a line each. What fails goes into `failures`.

    Another process with the same folder, on this machine or on one that shares it, has its part of them: what it is at is
    left to it, and at the end waited for.
    """
    before, told = 0, False
    while waiting := [
        (number, job)
        for number, job in enumerate(jobs, 1)
        if job.result() is None and job.config.run_dir not in failures
    ]:
        if len(waiting) == before:  # every one is another's
            if not told:
                print(f"{len(waiting)} runs are another process's; waiting for them", flush=True)
            told = True
            time.sleep(POLL_S)
        before = len(waiting)
        for number, job in waiting:
            with claimed(job) as mine:
                if mine:
                    train(job, config, failures, f"{number:4d}/{len(jobs)}  {job.label}")


def train(job: Job, config: AblateConfig, failures: dict[str, str], label: str) -> None:
    """Run `job`, and say in a line that begins with `label` how it went."""
    started = time.monotonic()
    wrong = run_job(job)
    result = None if wrong else job.result()
    if result is None:
        failures[job.config.run_dir] = wrong or f"left no result in {job.folder}"
        outcome = f"failed: {failures[job.config.run_dir]}"
    else:
        tidy(job, keep_checkpoints=config.keep_checkpoints)
        score = f"top-1 {result['top1']:.2f} %" if "top1" in result else "diverged"
        outcome = f"{score}  {result['cpu_seconds']:.1f} CPU s  {time.monotonic() - started:.0f} s"
    print(f"{label}  {outcome}", flush=True)


def fill(plan: Plan, config: AblateConfig, failures: dict[str, str]) -> list[Filled]:
    """The tables with what is finished."""
    filled = []
    for table, cells in plan:
        rows = []
        for planned in cells:
            seeds = range(max(config.seeds, config.more_seeds)) if planned.config else ()
            jobs = [make_job(planned, config, table, seed) for seed in seeds]
            notes = [
                f"seed {job.config.seed} failed: {failures[job.config.run_dir]}"
                for job in jobs
                if job.config.run_dir in failures
            ]
            notes += [planned.reason] if planned.reason else []
            example = jobs[0].config if jobs else None
            rows.append(FilledCell(planned.cell, example, results_of(planned, config, table), tuple(notes)))
        filled.append(Filled(table, rows))
    return filled
