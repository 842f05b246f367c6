"""Goes through the runs of an ablation, then writes its tables: the loop behind `python -m fasttricks.ablate`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fasttricks.ablation.cell_runs import CellRuns, Plan, by_column, plan_cells
from fasttricks.ablation.cells import AblateConfig
from fasttricks.ablation.jobs import Job, claimed, resolution
from fasttricks.ablation.paper import Table
from fasttricks.ablation.preflight import check_data, check_disk, check_runs
from fasttricks.ablation.report import write_report
from fasttricks.ablation.statistics import paired_difference
from fasttricks.ablation.worker import run_job, tidy
from fasttricks.config import show_name
from fasttricks.runs.folder import write_json
from fasttricks.runs.log import CONSOLE
from fasttricks.system.output import keep_lost_output

POLL_S = 1.0  # between looks at the runs of another process


def ablate(tables: Sequence[Table], config: AblateConfig, *, command: str) -> int:
    """Train the unfinished runs of `tables`, seed by seed, and write and print the tables. Returns how many runs failed.

    Raises UserError before the first run for an error that would stop it, and KeyboardInterrupt, which says how to resume.
    """
    data, classes = check_data(config)
    plan = [(table, plan_cells(table, config, classes)) for table in tables]
    folder = Path(config.run_dir)
    failures: dict[str, str] = {}
    if not config.report:
        first = jobs_of(plan, config.seeds)
        check_runs(first)
        folder.mkdir(parents=True, exist_ok=True)
        keep_lost_output(folder / CONSOLE, stdout=True)
        write_json(folder / "data.json", data)
        print(f"{len(first)} runs, {len(unfinished(first))} to do, in {show_name(folder)}/", flush=True)
        check_disk(unfinished(first), config, data["classes"])
        try:
            work(first, config, failures)
            near = nearly_decided(plan, config.more_seeds, resolution(config, data)) if config.more_seeds else []
            more = jobs_of(near, config.more_seeds)
            if unfinished(more):
                print(f"{len(unfinished(more))} more runs where they would decide", flush=True)
                check_disk(unfinished(more), config, data["classes"])
                work(more, config, failures)
        except KeyboardInterrupt:
            left = len(unfinished(first))
            write_report(read(plan, failures), config, data, command=command)
            raise KeyboardInterrupt(f"{left} of {len(first)} runs are left; the same command continues") from None
    print(write_report(read(plan, failures), config, data, command=command))
    return len(failures)


def read(plan: Plan, failures: Mapping[str, str]) -> Plan:
    """`plan` with the results of the finished runs; failures: run folder -> error."""
    return [(table, [runs.read(failures) for runs in cells]) for table, cells in plan]


def jobs_of(plan: Plan, seeds: int) -> list[Job]:
    """The first `seeds` jobs of each cell, each once: table by table and seed by seed, so that a part is a whole table."""
    jobs: dict[Path, Job] = {}
    for _, cells in plan:
        for seed in range(seeds):
            for runs in cells:
                for job in runs.jobs[seed : seed + 1]:
                    jobs.setdefault(job.folder, job)
    return list(jobs.values())


def nearly_decided(plan: Plan, seeds: int, step: float) -> Plan:
    """The cells whose difference `seeds` seeds would decide at the same spread, and the baselines of their columns.

    step: as Difference.resolution.
    """

    def chosen(column: Sequence[CellRuns]) -> list[CellRuns]:
        base, *others = [runs.read() for runs in column]
        differences = [paired_difference(runs.scores(), base.scores(), step) for runs in others]
        near = [r for r, d in zip(others, differences, strict=True) if d is not None and d.would_be_decided_by(seeds)]
        return [base, *near] if near else []

    return [(table, [runs for column in by_column(cells).values() for runs in chosen(column)]) for table, cells in plan]


def unfinished(jobs: Sequence[Job]) -> list[Job]:
    """Those without a result."""
    return [job for job in jobs if job.result() is None]


def work(jobs: Sequence[Job], config: AblateConfig, failures: dict[str, str]) -> None:
    """Run the unfinished of `jobs`, one after another, with a line each. Errors are added to `failures`.

    Another process with the same folder, on this machine or on one that shares it, has its part of them. Its
    current run is left to it; at the end this process waits for it.
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
        failures[job.config.run_dir] = wrong or f"wrote no result to {job.folder}"
        outcome = f"failed: {failures[job.config.run_dir]}"
    else:
        tidy(job, keep_checkpoints=config.keep_checkpoints)
        headline = job.headline
        score = headline.show(result[headline.name]) if headline.name in result else "diverged"
        outcome = f"{score}  {result['cpu_seconds']:.1f} CPU s  {time.monotonic() - started:.0f} s"
    print(show_name(f"{label}  {outcome}"), flush=True)
