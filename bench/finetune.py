"""Fine-tuning beside training from scratch, on five classes of CIFAR-10, from a network that learned the other five.

    python -m bench.finetune --data DIR                 # DIR/train and DIR/val: CIFAR-10 as folders of images
    python -m bench.finetune --data DIR --jobs 2        # two runs at once

50, 500 and 5,000 images a class, three seeds. A seed draws the images, weights, order and augmentation. Both ways have the same
images, network and settings: those of the recipe finetune. Each run has one thread. Its CPU seconds are those of the whole
process, with start and validation; base_cpu_seconds are those of the first network's training on the same machine, as machines
differ. A run that --output holds already is not done again; the table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from threading import Lock
from typing import Any

import numpy as np

from fasttricks.runs.folder import versions, write_json

OUTPUT = Path(__file__).parent / "results" / "finetune.json"
COUNTS, SEEDS, CLASSES = (50, 500, 5000), (0, 1, 2), 5
WAYS = ("from trained weights", "from scratch")
SMALL = shlex.split(
    "--model.name resnet10d --model.width 0.25 --model.stem-stride 2 --data.image-size 24 --data.val-resize 27"
)
SAME = shlex.split("--device cpu --data.threads 1 --eval.batch-size 500")
BASE = ["cifar10", *SMALL, *SAME, "--epochs", "8", "--ema-decay", "0.99"]


def link_classes(root: Path, target: Path, classes: list[str], count: int | None, seed: int) -> Path:
    """A data set of links: `count` images a class drawn by `seed`, or all; and every validation image of the classes."""
    draws = np.random.default_rng(seed)
    shutil.rmtree(target, ignore_errors=True)  # of a call that was cut off
    for split, name in ((split, name) for split in ("train", "val") for name in classes):
        files = sorted((root / split / name).iterdir())
        if split == "train" and count is not None:
            files = [files[index] for index in sorted(draws.choice(len(files), count, replace=False))]
        (target / split / name).mkdir(parents=True)
        for file in files:
            (target / split / name / file.name).symlink_to(file.resolve())
    return target


def train(words: list[str], data: Path, run_dir: Path) -> dict[str, Any]:
    """Train, in a process of one thread. Returns summary, command and seconds."""
    command = ["-m", "fasttricks.train", *words, "--data.root", str(data), "--run-dir", str(run_dir)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shutil.rmtree(run_dir, ignore_errors=True)
    start = time.monotonic()
    with open(run_dir.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"{shlex.join(command)} ended with {process.returncode}:\n{Path(log.name).read_text()[-2000:]}"
        )
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        "top1": summary["top1"],
        "val_images": summary["val_images"],
        "epochs": summary["epochs"],
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.monotonic() - start, 1),
        "options": shlex.join(words),
    }


def table(runs: dict[str, dict[str, Any]], options: str = "") -> str:
    """The runs with these further options as Markdown: a row for each number of images, the seeds' top-1 side by side."""
    rows = ["| images a class | epochs | " + " | ".join(WAYS) + " | difference, each seed | CPU s a run, at most |"]
    rows.append("|---" * 6 + "|")
    for count in COUNTS:
        found = [[runs.get(f"{count} {way} {seed} {options}".strip()) for seed in SEEDS] for way in WAYS]
        if not all(run for way in found for run in way):
            continue
        tops = [[run["top1"] for run in way if run] for way in found]
        gains = ", ".join(f"{a - b:+.2f}" for a, b in zip(*tops, strict=True))
        cpu = max(run["cpu_seconds"] for way in found for run in way if run)
        cells = [f"{mean(top):.2f} ({', '.join(f'{t:.2f}' for t in top)})" for top in tops]
        rows.append(f"| {count:,} | {found[0][0]['epochs']} | {' | '.join(cells)} | {gains} | {cpu:.0f} |")
    return "\n".join(rows)


def others(runs: dict[str, dict[str, Any]]) -> str:
    """The runs with other settings as Markdown: a row a setting, beside the recipe's runs of the same images, way and seeds."""
    rows = ["| images a class | setting | top-1 | the recipe's | difference, each seed |", "|---" * 5 + "|"]
    pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for key, run in sorted(runs.items()):
        found = re.fullmatch(r"(\d+) (\D+) (\d+) (-.*)", key)
        if found and (same := runs.get(" ".join(found.groups()[:3]))):
            count, way, _, options = found.groups()
            pairs.setdefault((options, count, way), []).append((run["top1"], same["top1"]))
    for (options, count, way), tops in sorted(pairs.items(), key=lambda row: (row[0][0], int(row[0][1]))):
        theirs, recipes = (f"{mean(column):.2f}" for column in zip(*tops, strict=True))
        gains = ", ".join(f"{a - b:+.2f}" for a, b in tops)
        rows.append(f"| {int(count):,}, {way} | `{options}` | {theirs} | {recipes} | {gains} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10: train/CLASS/IMAGE and val/CLASS/IMAGE")
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="folder for links and run folders")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument(
        "--options", default="", help="options of fasttricks.train: another setting, in a table of its own"
    )
    args = parser.parse_args()
    classes = sorted(path.name for path in (args.data / "train").iterdir())
    known, new = classes[:CLASSES], classes[CLASSES : 2 * CLASSES]
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"runs": {}}
    args.work.mkdir(parents=True, exist_ok=True)
    base, lock = args.work / "base", Lock()
    of_base = base.with_suffix(".json")  # this machine's, where --output may hold another's

    def keep(key: str, run: dict[str, Any]) -> None:
        with lock:
            found["runs"][key] = run
            write_json(args.output, {"versions": versions(), "known": known, "new": new, **found})
            print(f"{key}: top-1 {run['top1']:.2f}, {run['epochs']} epochs, {run['cpu_seconds']} CPU s", flush=True)

    if not of_base.exists():
        data = link_classes(args.data, args.work / "data-base", known, None, 0)
        write_json(of_base, run := train(BASE, data, base))
        keep("base", run)
    base_cpu_seconds = json.loads(of_base.read_text())["cpu_seconds"]

    def one(count: int, seed: int, way: str) -> None:
        key = f"{count} {way} {seed} {args.options}".strip()
        if key in found["runs"]:
            return
        name = f"{count}-{WAYS.index(way)}-{seed}{''.join(filter(str.isalnum, args.options))}"
        data = link_classes(args.data, args.work / f"data-{name}", new, count, seed)
        start = ["--init", str(base)] if way == WAYS[0] else SMALL
        words = ["finetune", *start, *SAME, "--seed", str(seed), *shlex.split(args.options)]
        run = train(words, data, args.work / f"run-{name}")
        options = run["options"].replace(str(base), "BASE")
        keep(key, {**run, "options": options, "base_cpu_seconds": base_cpu_seconds})

    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(one, count, seed, way) for count in args.counts for seed in args.seeds for way in args.ways]
        for job in jobs:
            job.result()
    print(f"{table(found['runs'])}\n\n{others(found['runs'])}")


if __name__ == "__main__":
    main()
