"""make transfer: does a better classifier make a better base network? Section 6 of the paper at a scale of two CPU cores.

Trains the BASES on CIFAR-10, and then the TABLES on them: an FCN on CamVid, compared on its test split, and Faster R-CNN on
raccoons. Every run has one thread, and --jobs of them run at once. Nothing is done twice, so the same command continues after a
kill or the end of its time. It ends with the tables as they then are; OUT/TABLE/ has TABLE.md, TABLE.png and results.json.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fasttricks.ablation.transfer import RANDOM, SEED

VARIABLE = "FASTTRICKS_TEST_DATA"
MINUTES = 90.0
SEEDS = 3
SAME = shlex.split("--device cpu --data.threads 1")
CLASSIFIER = shlex.split("cifar10 --epochs 3 --schedule.warmup-epochs 0.5 --data.image-size 24 --data.val-resize 27")
BASES: dict[str, list[str]] = {
    "plain": [*CLASSIFIER, "--loss.smoothing", "0"],
    "smoothing and mixup": [*CLASSIFIER, "--loss.smoothing", "0.1", "--loss.mixup-alpha", "0.2"],
}
"""Row -> the arguments of fasttricks.train. Random weights are a row too, the first."""


class Small(NamedTuple):
    """A table at a small scale."""

    archive: str
    root: str
    """The folder of the data in the archive."""
    options: list[str]


TABLES: dict[str, Small] = {
    "transfer-segment": Small(
        "seg_small",
        "camvid/ADEChallengeData2016",
        shlex.split(
            "--split test --epochs 4 --global-batch-size 8 --no-sync-batch-norm --data.image-size 320 --data.val-resize 360 "
            "--model.stem-stride 4 --segment.output-stride 16 --segment.base-size 360 --segment.base-side short "
            "--segment.scale 0.5 1.5 --segment.blur 0 --segment.aux-weight 0 --optim.backbone-lr 1 --optim.no-bias-decay "
            "--optim.weight-decay 5e-4 --ema-decay 0.98 --schedule.warmup-epochs 0.5 --eval.every-epochs 4 "
            "--loss.class-weights balanced"
        ),
    ),
    "transfer-detect": Small(
        "voc_small",
        "raccoon/VOCdevkit",
        shlex.split(
            "--epochs 15 --global-batch-size 8 --model.stem-stride 4 --model.freeze --detect.base-size 256 --detect.max-size 340 "
            "--detect.channels 32 --detect.head-features 256 --detect.train-samples 32 --detect.train-proposals 300 "
            "--detect.test-proposals 300 --detect.anchor-scales 8 --detect.anchor-ratios 0.7 1.3 --optim.base-lr 0.64 "
            "--schedule.decay cosine --schedule.warmup-epochs 1 --ema-decay 0.98 --eval.every-epochs 15"
        ),
    ),
}
_EXIT_S = 60.0
"""Seconds that a run has to save after a signal."""


@dataclass(frozen=True)
class Work:
    """A call: its places, its end by time.monotonic(), and the runs at once."""

    data: Path
    out: Path
    until_s: float
    jobs: int


def find_data(data: Path, name: str) -> Path:
    """The folder NAME/ or the archive NAME.tar of `data`. Raises SystemExit without either."""
    for found in (data / name, data / f"{name}.tar"):
        if found.exists():
            return found
    raise SystemExit(f"{data}: must hold {name}/ or {name}.tar; give --data DIR, or set {VARIABLE}")


def unpacked(work: Work, name: str) -> Path:
    """The folder of that data; an archive is unpacked once, into OUT/data."""
    found = find_data(work.data, name)
    if found.is_dir():
        return found
    folder, done = work.out / "data", work.out / "data" / f"{name}.done"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(found) as tar:
            tar.extractall(folder, filter="data")
        done.touch()
    return folder / name


def base_commands(work: Work, data: Path) -> list[tuple[list[str], Path]]:
    """The (arguments of python, log) of each base network that is not finished."""
    commands = []
    for seed in range(SEEDS):
        for name, options in BASES.items():
            run = place_of(work, name, str(seed))
            if (run / "summary.json").exists():
                continue
            more = ["--resume"] if run.exists() else []
            places = ["--seed", str(seed), "--data.root", str(data), "--run-dir", str(run)]
            commands.append((["-m", "fasttricks.train", *options, *SAME, *places, *more], run.with_suffix(".log")))
    return commands


def place_of(work: Work, base: str, seed: str) -> Path:
    """The run folder of a base network."""
    return work.out / "bases" / f"{base.replace(' ', '-')}-{seed}"


def table_command(work: Work, table: str, data: Path) -> list[str]:
    """The arguments of python that train the rows of `table`, or some of them where others do the same."""
    bases = [RANDOM, *(f"{name}={place_of(work, name, SEED)}" for name in BASES)]
    small = TABLES[table]
    places = ["--data.root", str(data / small.root), "--run-dir", str(work.out / table)]
    return ["-m", "fasttricks.ablate", table, *small.options, *SAME, "--seeds", str(SEEDS), "--bases", *bases, *places]


def run_all(commands: Sequence[tuple[list[str], Path]], work: Work) -> bool:
    """Run the commands, work.jobs at once, each with one thread and its output in its log. Returns whether all succeeded.

    At work.until_s those that still run are asked to save and end, and no other begins.
    """
    waiting, ok = list(commands), True
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            if time.monotonic() > work.until_s:
                return False
            while waiting and len(running) < work.jobs:
                command, log = waiting.pop(0)
                log.parent.mkdir(parents=True, exist_ok=True)
                with open(log, "a") as output:
                    print(f"{time.strftime('%H:%M:%S')}  {shlex.join(['python', *command])}", flush=True)
                    started = subprocess.Popen(
                        [sys.executable, *command], env=environment, stdout=output, stderr=output
                    )
                running.append((started, log))
            time.sleep(0.2)
            for process, log in [one for one in running if one[0].poll() is not None]:
                running.remove((process, log))
                if process.returncode:
                    ok = False
                    print(f"{time.strftime('%H:%M:%S')}  ended with {process.returncode}: {log}", flush=True)
        return ok
    finally:
        stop([process for process, _ in running])


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to save and end; end those that do not."""
    for process in processes:
        process.terminate()  # in the background of a shell they are deaf to SIGINT
    for process in processes:
        try:
            process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get(VARIABLE), help=f"folder of archives; ${VARIABLE}")
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="folder for all runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time after which the runs are saved and ended")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once")
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--check", action="store_true", help="see that the data is there, and train nothing")
    given = parser.parse_args(args)
    if given.data is None:
        parser.error(f"give --data DIR, or set {VARIABLE}: a folder with cifar10.tar, seg_small.tar and voc_small.tar")
    work = Work(given.data, given.out, time.monotonic() + 60 * given.minutes, given.jobs)
    archives = ["cifar10", *(TABLES[table].archive for table in given.tables)]
    for name in archives:
        find_data(work.data, name)
    if given.check:
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends its runs
    done = run_all(base_commands(work, unpacked(work, "cifar10")), work)
    commands = {table: table_command(work, table, unpacked(work, TABLES[table].archive)) for table in given.tables}
    for table, command in commands.items():
        logs = [work.out / f"{table}-{number}.log" for number in range(work.jobs)]
        done = done and run_all([(command, log) for log in logs], work)
    for command in commands.values():
        subprocess.run([sys.executable, *command, "--report"], check=False)
    if not done:
        print("not finished: the same command continues", flush=True)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
