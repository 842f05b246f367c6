"""The first hour on a GPU, in nine minutes: every CUDA line runs, the first table stands. Needs torch, Triton and NumPy alone.

    make gpu                          # or, without set-up, with the machine's own Python:
    python -m bench.gpu
    python -m bench.gpu --device cpu  # walks every part at tiny shapes: no figure of a GPU

bench/out/gpu.json and gpu.md are rewritten with each row. A part that cannot run is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

from bench.gpu import report
from bench.gpu.parts import CARD, CUDA, PARTS, Job, Part, why_skipped
from bench.gpu.runner import REPOSITORY, Outcome, run
from fasttricks.config.errors import ConfigError
from fasttricks.system.command import run_main

OUT, RESULTS = Path(__file__).parents[1] / "out", Path(__file__).parents[1] / "results"
NAMES = [part.name for part in PARTS]
BUDGET_S, WALK_S = 540.0, 600.0
RUN_IMAGES = 24
"""Images of a step of bench.soak.tiny's run, whose import needs Pillow."""
LEAST_S = 5.0
"""A part that would get less is skipped."""


def read_options(words: list[str]) -> argparse.Namespace:
    """The command line. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the walk (default: cuda)")
    parser.add_argument(
        "--budget-s", type=float, default=0.0, help="seconds for all (540; the walk: 600, of which it takes a few)"
    )
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--ranks", type=int, default=2, help="ranks of the last part, a GPU each (2; 1: leave it out)")
    parser.add_argument("--output", type=Path, default=OUT, help="folder of gpu.json and gpu.md (bench/out)")
    parser.add_argument("--save", action="store_true", help="write bench/results/gpu-CARD.json and .md too")
    options = parser.parse_args(words)
    options.budget_s = options.budget_s or (WALK_S if options.device == "cpu" else BUDGET_S)
    if options.budget_s < LEAST_S:
        raise ConfigError(f"budget_s = {options.budget_s:g}: must be {LEAST_S:g} seconds or more")
    if options.ranks < 1 or RUN_IMAGES % options.ranks:
        raise ConfigError(f"ranks = {options.ranks}: must divide the {RUN_IMAGES} images of the run that is stopped")
    if options.save and options.device == "cpu":
        raise ConfigError("save = True: must be with --device cuda; the walk on the CPU is no result")
    return options


def main(words: list[str]) -> None:
    """Do the parts. Ends with exit code 1 where one failed."""
    options = read_options(words)
    began, outcomes = time.monotonic(), dict[str, Outcome]()
    head = {
        "card": "not known yet",
        "device": options.device,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "seconds": 0.0,
        "budget_s": options.budget_s,
    }

    def keep() -> None:
        card = report.card_of(outcomes)
        head.update(card=card or head["card"], seconds=round(time.monotonic() - began, 1))
        report.write(options.output, "gpu", head, outcomes)
        if options.save and card:
            report.write(RESULTS, report.file_name(card), head, outcomes)

    parts = [part for part in PARTS if part.name in options.parts]
    for index, part in enumerate(parts):
        facts = facts_of(outcomes)
        reason = why_skipped(part, options.device, options.ranks, facts)
        rest = [p for p in parts[index:] if not why_skipped(p, options.device, options.ranks, facts)]
        left = options.budget_s - (time.monotonic() - began)
        seconds = 0.0 if reason else left * part.seconds / sum(p.seconds for p in rest)
        if not reason and seconds < LEAST_S:
            reason = f"the time budget ({options.budget_s:g} s) leaves it {max(0.0, seconds):.1f} s"
        if reason:
            outcomes[part.name] = Outcome("skipped", reason)
        else:
            job = job_of(part, options, seconds, facts)
            print(f"{part.name}: at most {seconds:.0f} s", flush=True)

            def told(outcome: Outcome, name: str = part.name) -> None:
                outcomes[name] = outcome
                keep()

            told(Outcome())
            outcomes[part.name] = run(job, told)
        keep()
        print(report.section(part.name, outcomes[part.name]), end="\n\n", flush=True)
    print(f"{time.monotonic() - began:.0f} s; written to {options.output / 'gpu.json'} and gpu.md")
    print("; ".join(f"{name} {outcome.status}" for name, outcome in outcomes.items()))
    lost = options.device == "cuda" and not facts_of(outcomes).get(CUDA, True)
    if lost or any(outcome.errors for outcome in outcomes.values()):
        raise SystemExit(1)


def job_of(part: Part, options: argparse.Namespace, seconds: float, facts: dict[str, object]) -> Job:
    """`part` as its process is told."""
    return Job(
        part=part.name,
        work=part.work,
        device=options.device,
        seconds=seconds,
        ranks=options.ranks,
        facts=facts,
    )


def facts_of(outcomes: dict[str, Outcome]) -> dict[str, object]:
    """name -> value of the rows of the first part, as far as it has come."""
    rows = outcomes[CARD].rows if CARD in outcomes else []
    return {row["name"]: row["value"] for row in rows if "value" in row}


def commit() -> str:
    """The checkout's, with a word where it has changes; `unknown` without git."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    run_main(main)
