"""Runs that are killed, stopped and orphaned, and the checks of their remains."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.soak import processes, tiny
from bench.soak.processes import alive, children, last_step, records, until

KINDS = ("step", "save", "edge", "start")
Result = dict[str, Any]


class Failed(AssertionError):
    """A promise that was not kept."""


def expect(ok: object, what: str) -> None:
    """Raise Failed unless `ok`."""
    if not ok:
        raise Failed(what)


class Lab:
    """Images, and for each kind of run the uninterrupted one to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = tiny.write_images(folder / "data")
        self._references: dict[tuple[int, str], _Reference] = {}

    def log(self, name: str) -> Path:
        """The log of the run called `name`."""
        return self.folder / f"{name}.log"

    def fresh(self, name: str) -> Path:
        """A run folder that is not there, nor a cache of the teacher's logits that an earlier one filled."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        shutil.rmtree(self._cache(self.folder / name), ignore_errors=True)
        self.log(name).unlink(missing_ok=True)
        return self.folder / name

    def arguments(self, run_dir: Path, variant: str = tiny.PLAIN, ranks: int = 1, **more: Any) -> list[str]:
        """The result of the tiny run on so many ranks."""
        if "skipped" in variant:
            more["max_loss"] = tiny.MAX_LOSS[ranks]
        if "cache" in variant:
            more |= {"distill.teacher": self._teacher(), "distill.cache": self._cache(run_dir)}
        return tiny.arguments(self.data, run_dir, variant, **more)

    @staticmethod
    def _cache(run_dir: Path) -> Path:
        return run_dir.with_name(f"{run_dir.name}-cache")

    def _teacher(self) -> Path:
        teacher = self.folder / "teacher"
        if not (teacher / "summary.json").exists():
            args = tiny.arguments(self.data, self.fresh(teacher.name), tiny.PLAIN, epochs=2)
            expect(processes.wait(processes.fork_ranks(args, 1, self.log(teacher.name))) == [0], "no teacher")
        return teacher

    def _whole(self, ranks: int, variant: str) -> _Reference:
        """The uninterrupted run. Raises Failed where it proves nothing: most of its steps left the weights as they were."""
        if (ranks, variant) not in self._references:
            whole = self.fresh(f"whole-{ranks}-{variant}")
            changes = self.folder / f"{whole.name}-changes"
            changes.unlink(missing_ok=True)
            pids = processes.fork_ranks(
                self.arguments(whole, variant, ranks), ranks, self.log(whole.name), changes=changes
            )
            expect(processes.wait(pids) == [0] * ranks, f"the uninterrupted run failed: {self.log(whole.name)}")
            counts = [int(line) for line in changes.read_text().split()]
            changed = sum(count > 0 for count in counts)
            expect(len(counts) == tiny.STEPS, f"{whole}: {len(counts)} steps instead of {tiny.STEPS}")
            expect(2 * changed >= tiny.STEPS, f"{whole}: only {changed} of {tiny.STEPS} steps changed the weights")
            lines = records(whole)
            expect("skipped" not in variant or changed < tiny.STEPS, f"{whole}: no step was skipped")
            self._references[ranks, variant] = _Reference(tiny.digest(whole), lines, changed)
        return self._references[ranks, variant]

    def check(self, run_dir: Path, ranks: int, variant: str = tiny.PLAIN) -> int:
        """How many steps of the run in `run_dir` changed the weights.

        Raises Failed unless it ended as the uninterrupted one, weights and log, bit for bit.
        """
        wanted, found = self._whole(ranks, variant), tiny.digest(run_dir)
        expect(found == wanted.digest, f"{run_dir}: ended with {found}, uninterrupted: {wanted.digest}")
        expect(records(run_dir) == wanted.records, f"{run_dir}: metrics.jsonl differs from the uninterrupted run's")
        expect((run_dir / "summary.json").is_file(), f"{run_dir}: no summary.json")
        return wanted.changed


class _Reference(NamedTuple):
    digest: str
    records: list[dict[str, Any]]
    changed: int


# ------------------------------------------------------------------------------------------------------------ kill -9
def kill_run(lab: Lab, number: int, *, ranks: int, variant: str, plain: bool, draws: random.Random) -> Result:
    """One run, killed three times and resumed by the same command, compared with the uninterrupted one."""
    run_dir = lab.fresh(f"kill-{number}")
    args = [*lab.arguments(run_dir, variant, ranks), "--resume"]  # the same command each time, the first too
    kinds = draws.sample(KINDS, 3)
    steps = sorted(draws.sample(range(2, tiny.STEPS - 4), len(kinds)))
    done = []
    for kind, step in zip(kinds, steps, strict=True):
        start = _Started(args, ranks, lab.log(run_dir.name), plain)
        if kind == "start":
            time.sleep(draws.uniform(0, 10.0 if plain else 2.0))
        elif not until(_trigger(kind, step, run_dir), start.running):
            raise Failed(f"{run_dir}: ended before it could be killed ({kind}, {step}); see {start.log}")
        time.sleep(draws.uniform(0, 0.02) if kind in ("step", "edge") else 0)
        inside = any((run_dir / "checkpoints").glob(".step-*.tmp"))
        start.kill(draws)
        done.append({"kind": kind, "after_step": last_step(run_dir), "in_save": inside})
    final = _Started(args, ranks, lab.log(run_dir.name), plain)
    expect(final.wait() == 0, f"{run_dir}: the last start failed; see {final.log}")
    changed = lab.check(run_dir, ranks, variant)
    lab.fresh(run_dir.name)
    command = "plain" if plain else "forked"
    return {"ranks": ranks, "variant": variant, "command": command, "changed": changed, "kills": done}


def _trigger(kind: str, step: int, run_dir: Path) -> Callable[[], bool]:
    def reached() -> bool:
        last = last_step(run_dir)
        if last < step:
            return False
        if kind == "save":
            return any((run_dir / "checkpoints").glob(".step-*.tmp"))
        return kind == "step" or last % tiny.STEPS_PER_EPOCH == 0

    return reached


class _Started:
    """A start of the command: of a user's own command, or of forked ranks."""

    def __init__(self, args: list[str], ranks: int, log: Path, plain: bool) -> None:
        self.log = log
        self._pids: list[int] = []
        self._process = None
        if plain:
            self._process = processes.command(args, log) if ranks == 1 else processes.torchrun(args, log, ranks=ranks)
        else:
            self._pids = processes.fork_ranks(args, ranks, log)

    def running(self) -> bool:
        """Whether all of it runs."""
        return self._process.poll() is None if self._process else all(map(alive, self._pids))

    def kill(self, draws: random.Random) -> None:
        """kill -9 of every process, or of one rank, on which the others end by themselves."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            return
        victims = self._pids if draws.random() < 0.5 else [draws.choice(self._pids)]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        if len(victims) < len(self._pids):
            time.sleep(0.5)
            for pid in self._pids:  # torchrun would end the rest: a rank may sit where it notices nothing
                os.kill(pid, signal.SIGKILL)
        processes.wait(self._pids)

    def wait(self) -> int:
        """The exit code of all."""
        return self._process.wait(processes.GIVE_UP_S) if self._process else max(map(abs, processes.wait(self._pids)))


# ----------------------------------------------------------------------------------------------------------- restarts
def restart(lab: Lab, number: int, draws: random.Random) -> Result:
    """One rank of two is killed under torchrun --max-restarts; the run resumes by itself, without --resume."""
    run_dir = lab.fresh(f"restart-{number}")
    process = processes.torchrun(lab.arguments(run_dir), lab.log(run_dir.name), "--max-restarts", "3")
    step, victim = draws.randrange(1, tiny.STEPS - 8), number % 2
    started = time.monotonic()
    expect(until(_trigger("step", step, run_dir), lambda: process.poll() is None), f"{run_dir} ended early")
    start_s = time.monotonic() - started
    time.sleep(draws.uniform(0, 0.02))
    file = (run_dir / "metrics.jsonl").stat().st_ino
    os.kill(children(process.pid)[victim], signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: (run_dir / "metrics.jsonl").stat().st_ino != file, lambda: process.poll() is None)
    before = len(records(run_dir))
    until(lambda: len(records(run_dir)) > before, lambda: process.poll() is None)
    seconds = time.monotonic() - killed
    expect(process.wait(processes.GIVE_UP_S) == 0, f"{run_dir}: torchrun failed; see {lab.log(run_dir.name)}")
    lab.check(run_dir, 2)
    shutil.rmtree(run_dir)
    return {
        "rank": victim,
        "after_step": step,
        "seconds_to_the_next_step": seconds,
        "seconds_of_a_first_start": start_s,
    }


# ------------------------------------------------------------------------------------------------------------ signals
def stop_by_signal(lab: Lab, number: int, draws: random.Random) -> Result:
    """SIGTERM or SIGINT to one rank of one or two: all save after the same step, exit 0, and resume to the same weights."""
    ranks, name = 1 + number % 2, ("SIGTERM", "SIGINT")[number // 2 % 2]
    run_dir = lab.fresh(f"signal-{number}")
    args, log = lab.arguments(run_dir), lab.log(run_dir.name)
    pids = processes.fork_ranks(args, ranks, log)
    expect(until(_trigger("step", draws.randrange(1, tiny.STEPS - 8), run_dir), lambda: alive(pids[0])), "ended early")
    step = last_step(run_dir)
    sent = time.monotonic()
    os.kill(draws.choice(pids), getattr(signal, name))
    codes = processes.wait(pids)
    seconds = time.monotonic() - sent
    expect(codes == [0] * ranks, f"{run_dir}: exit codes {codes}; see {log}")
    said = log.read_text()
    saved = int(said.partition("stopped after step ")[2].partition(",")[0])
    expect("resume with: " in said and "--resume" in said.partition("resume with: ")[2], f"{log}: no command to resume")
    expect(saved - step <= 1 + ranks, f"{run_dir}: signal after step {step}, saved after {saved}")
    codes = processes.wait(processes.fork_ranks([*args, "--resume"], ranks, log))
    expect(codes == [0] * ranks, f"{run_dir}: resumed, exit codes {codes}; see {log}")
    lab.check(run_dir, ranks)
    shutil.rmtree(run_dir)
    return {"signal": name, "ranks": ranks, "steps_until_saved": saved - step, "seconds_until_ended": seconds}


# ------------------------------------------------------------------------------------------------------------ orphans
def kill_launcher(lab: Lab, number: int, draws: random.Random) -> Result:
    """kill -9 of torchrun at a random time, imports included: no rank outlives it."""
    run_dir = lab.fresh(f"launcher-{number}")
    process = processes.torchrun(lab.arguments(run_dir), lab.log(run_dir.name))
    until(lambda: len(children(process.pid)) == 2, lambda: process.poll() is None)
    if number % 2:
        until(_trigger("step", draws.randrange(1, tiny.STEPS - 8), run_dir), lambda: process.poll() is None)
    else:
        time.sleep(draws.uniform(0.3, 6))
    ranks = list(children(process.pid).values())
    expect(len(ranks) == 2 and process.poll() is None, f"{run_dir}: ended early; see {lab.log(run_dir.name)}")
    process.kill()
    killed = time.monotonic()
    until(lambda: not any(map(alive, ranks)), lambda: True, 10)
    seconds = time.monotonic() - killed
    process.wait()
    shutil.rmtree(run_dir, ignore_errors=True)
    return {"while": "training" if number % 2 else "starting", "seconds_until_gone": seconds}


def hang(lab: Lab, number: int, timeout_s: int = 10) -> Result:
    """A rank that is stopped (SIGSTOP): the others end at the timeout, and torchrun ends it."""
    run_dir = lab.fresh(f"hang-{number}")
    args = lab.arguments(run_dir, timeout_s=timeout_s)
    process = processes.torchrun(args, lab.log(run_dir.name))
    expect(until(_trigger("step", 4, run_dir), lambda: process.poll() is None), f"{run_dir} ended early")
    ranks = children(process.pid)
    os.kill(ranks[1 - number % 2], signal.SIGSTOP)
    stopped = time.monotonic()
    code = process.wait(timeout_s + 60)
    seconds = time.monotonic() - stopped
    gone = not any(map(alive, ranks.values()))
    expect(code != 0 and gone, f"{run_dir}: exit code {code}, ranks gone: {gone}")
    said = lab.log(run_dir.name).read_text()
    expect("timeout_s" in said, f"{lab.log(run_dir.name)} does not name timeout_s")
    codes = processes.wait(processes.fork_ranks([*lab.arguments(run_dir), "--resume"], 2, lab.log(run_dir.name)))
    expect(codes == [0, 0], f"{run_dir}: resumed, exit codes {codes}")
    lab.check(run_dir, 2)
    shutil.rmtree(run_dir)
    return {"rank": 1 - number % 2, "timeout_s": timeout_s, "seconds_until_all_ended": seconds}
