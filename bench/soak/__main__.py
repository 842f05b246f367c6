"""make soak: kill, stop, starve and damage runs until so many of each were survived; the counts are kept and added to.

Each run is written down as soon as it is over, so that a stopped soak continues where it was. `make soak` counts in
bench/out/soak.json. `make soak-save` adds to bench/results/soak.json and makes the table in docs/reliability.md from it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from bench.soak import files, processes, runs, table
from bench.soak.runs import Lab, Result
from fasttricks.config import Range, check_fields, require
from fasttricks.config.cli import parse
from fasttricks.runs.folder import versions, write_json
from fasttricks.system.command import run_main
from fasttricks.system.distributed import cpu_name


@dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """The number of each kind in all, with those that the output file already has."""

    kills: Annotated[int, Range(0)] = 6 * table.CELLS
    """Runs of 24 steps that are killed with -9 three times each, on 1 to 4 ranks, in each of four variants."""
    restarts: Annotated[int, Range(0)] = 30
    """Runs under torchrun --max-restarts of which one rank is killed."""
    saves: Annotated[int, Range(0)] = 200
    """Checkpoints saved by a process that is killed over and over."""
    flips: Annotated[int, Range(0)] = 500
    """Checkpoints with one bit flipped."""
    truncations: Annotated[int, Range(0)] = 100
    """Checkpoints cut short."""
    payloads: Annotated[int, Range(0)] = 1
    """Passes over all kinds of code in a checkpoint."""
    signals: Annotated[int, Range(0)] = 40
    """Runs that SIGTERM or SIGINT stops."""
    launchers: Annotated[int, Range(0)] = 10
    """Runs whose torchrun is killed."""
    hangs: Annotated[int, Range(0)] = 1
    """Runs of which a rank is stopped for good, with a timeout of 10 s."""
    n: Annotated[int, Range(1, zero="each its own")] = 0
    """This many kill runs, restarts and signals."""
    plain: Annotated[int, Range(0)] = 4
    """The first so many kill runs use the user's own command; the others are forked, which saves their imports."""
    first: Annotated[int, Range(0)] = 0
    """Number of the first run, which its random choices come from: for several soaks that share the work."""
    only: tuple[str, ...] = ()
    """Kinds to run; empty: all."""
    seconds: Annotated[float, Range(0, above=True, zero="no limit")] = 0.0
    """Start nothing after so long, and exit 3 if something is left."""
    output: str = ""
    """The JSON file to add to; empty: bench/out/soak.json."""
    save: bool = False
    """Add to bench/results/soak.json, which is committed, and to the table in docs/reliability.md."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            not (self.save and self.output), "output", self.output, "is another place than --save has; leave one out"
        )


Kind = Callable[[Lab, int, random.Random], list[Result]]


def kinds(config: SoakConfig) -> dict[str, tuple[int, Kind]]:
    """Name -> number of runs, and the function that makes one run (or all of the cheap ones)."""
    first = config.first
    many = {name: config.n or getattr(config, name) for name in ("kills", "restarts", "signals")}
    return {
        "kills": (many["kills"], lambda lab, number, draws: _kill(lab, number, draws, plain=number < config.plain)),
        "restarts": (many["restarts"], lambda lab, number, draws: [runs.restart(lab, number, draws)]),
        "saves": (
            config.saves,
            lambda lab, number, draws: files.saves(lab, min(50, first + config.saves - number), draws),
        ),
        "flips": (
            config.flips,
            lambda lab, number, draws: files.damage(lab, min(100, first + config.flips - number), 0, draws),
        ),
        "truncations": (
            config.truncations,
            lambda lab, number, draws: files.damage(lab, 0, min(100, first + config.truncations - number), draws),
        ),
        "payloads": (config.payloads * len(files.PAYLOADS), lambda lab, number, draws: files.payloads(lab)),
        "signals": (many["signals"], lambda lab, number, draws: [runs.stop_by_signal(lab, number, draws)]),
        "launchers": (config.launchers, lambda lab, number, draws: [runs.kill_launcher(lab, number, draws)]),
        "hangs": (config.hangs, lambda lab, number, draws: [runs.hang(lab, number)]),
    }


def _kill(lab: Lab, number: int, draws: random.Random, *, plain: bool) -> list[Result]:
    ranks, variant = table.cell(number)
    return [runs.kill_run(lab, number, ranks=ranks, variant=variant, plain=plain, draws=draws)]


def main(args: list[str]) -> None:
    """Run the missing ones, one after another."""
    config = parse(SoakConfig(), args, prog="python -m bench.soak", description="Kill runs and count the survivors.")
    os.environ["OMP_NUM_THREADS"] = "1"
    processes.get_ready()
    output = Path(config.output) if config.output else table.RESULTS if config.save else table.OUT
    output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"runs": {}}
    found |= {"machine": f"{cpu_name()}, {os.cpu_count()} cores", "versions": versions()}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        lab = Lab(Path(folder))
        for kind, (wanted, run) in kinds(config).items():
            if config.only and kind not in config.only:
                continue
            done: list[dict[str, Any]] = found["runs"].setdefault(kind, [])
            while (number := table.count(kind, done)) < wanted:
                if config.seconds and time.monotonic() - started > config.seconds:
                    raise SystemExit(3)
                results = _attempt(lab, kind, config.first + number, run)
                done += results
                write_json(output, found)
                print(f"{kind} {table.count(kind, done)} of {wanted}: {results[-1]}", flush=True)
                if not results[-1]["ok"]:
                    raise SystemExit(1)
    print(table.markdown(found))
    if config.save:
        table.write(found)


def _attempt(lab: Lab, kind: str, number: int, run: Kind) -> list[dict[str, Any]]:
    started = time.monotonic()
    try:
        results = run(lab, number, random.Random(f"{kind} {number}"))
    except Exception as error:
        traceback.print_exc()
        keep = Path(tempfile.mkdtemp(prefix=f"soak-failed-{kind}-{number}-"))
        shutil.copytree(lab.folder, keep, dirs_exist_ok=True)
        print(f"its remains are in {keep}", file=sys.stderr)
        return [{"ok": False, "number": number, "error": f"{type(error).__name__}: {error}"}]
    seconds = round((time.monotonic() - started) / len(results), 3)
    return [{"ok": True, "number": number + at, "seconds": seconds, **_rounded(r)} for at, r in enumerate(results)]


def _rounded(result: Result) -> Result:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}


if __name__ == "__main__":
    run_main(main)
