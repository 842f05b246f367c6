"""Whole runs as a user starts them: the demo recipe, and a run that is stopped within an epoch and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.parts import Job, Row
from bench.soak import processes, tiny
from bench.soak.processes import last_step, until

STOP_AFTER = 6
"""The step after which a run is stopped: within its second epoch of four steps."""


class RunError(RuntimeError):
    """A run did not end as it must; the end of its output."""


def demo(job: Job) -> Iterator[Row]:
    """The recipe demo from its first command on; the images are drawn first, on the CPU's cores."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        args = ["demo", "--run-dir", str(run_dir), "--device", job.device]
        if job.tiny:
            root = tiny.write_images(Path(folder) / "data")
            args += ["--data.root", str(root), "--epochs", "1", "--schedule.warmup-epochs", "0", "--data.threads", "1"]
        else:
            from fasttricks.config import DataConfig
            from fasttricks.data.sources import open_split

            started = time.monotonic()
            images = len(open_split(DataConfig(root="demo"), "train"))
            yield {
                "work": f"drew the demo's images, or found them: {images:,} for training",
                "s": time.monotonic() - started,
            }
        started = time.monotonic()
        finish(processes.command(args, Path(folder) / "log"), Path(folder) / "log")
        summary = json.loads((run_dir / "summary.json").read_text())
        yield {"work": "demo", "s": time.monotonic() - started, **_plain(summary)}


def resume(job: Job) -> Iterator[Row]:
    """A run stopped by SIGTERM within an epoch and resumed, beside the same run left alone: the same bits, or an error."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        more: dict[str, Any] = {"device": job.device}
        if not job.tiny:  # cuDNN's algorithms of a real network, in FP16
            more |= {"model.name": "resnet50d", "model.width": 1, "data.image-size": 64, "data.val-resize": 72}
        yield from stopped_and_left_alone(folder, "fp16", more, ranks=1)


def stopped_and_left_alone(folder: Path, variant: str, more: dict[str, Any], ranks: int) -> Iterator[Row]:
    """Rows of both; they run at the same time. more: fields of the run. Raises RunError."""
    data = tiny.write_images(folder / "data")
    started = time.monotonic()
    args = {name: tiny.arguments(data, folder / name, variant, **more) for name in ("alone", "stopped")}
    both = {name: start(args[name], folder / f"{name}.log", ranks) for name in args}
    stop_within_epoch(both["stopped"], folder / "stopped", ranks)
    finish(both["stopped"], folder / "stopped.log", may_stop=True)
    saved = last_step(folder / "stopped")
    finish(both["alone"], folder / "alone.log")
    wanted = tiny.digest(folder / "alone")
    yield {"run": f"left alone, {ranks} rank(s)", "digest": wanted, "s": time.monotonic() - started}
    started = time.monotonic()
    finish(start([*args["stopped"], "--resume"], folder / "stopped.log", ranks), folder / "stopped.log")
    found = tiny.digest(folder / "stopped")
    row: Row = {
        "run": f"stopped by SIGTERM after step {saved}, resumed",
        "digest": found,
        "s": time.monotonic() - started,
    }
    row["same bits"] = found == wanted
    yield row if found == wanted else row | {"error": f"the resumed run ended with {found}, the other with {wanted}"}


def start(args: list[str], log: Path, ranks: int) -> subprocess.Popen[bytes]:
    """The command, under torchrun where there are several ranks."""
    return processes.command(args, log) if ranks == 1 else processes.torchrun(args, log, ranks=ranks)


def stop_within_epoch(process: subprocess.Popen[bytes], run_dir: Path, ranks: int) -> None:
    """SIGTERM to the run, or to one of its ranks, once it has done a step within an epoch. Raises RunError."""
    if not until(lambda: last_step(run_dir) >= STOP_AFTER, lambda: process.poll() is None):
        raise RunError(f"it ended before it could be stopped:\n{_said(run_dir.with_name(run_dir.name + '.log'))}")
    os.kill(process.pid if ranks == 1 else processes.children(process.pid)[ranks - 1], signal.SIGTERM)


def finish(process: subprocess.Popen[bytes], log: Path, *, may_stop: bool = False) -> None:
    """Wait for its end. Raises RunError unless it ended well, and for may_stop said how to resume."""
    code, said = process.wait(), _said(log)
    if code != 0 or (may_stop and "resume with: " not in said):
        raise RunError(f"exit code {code}:\n{said}")


def _said(log: Path) -> str:
    return log.read_text(errors="replace")[-8000:] if log.exists() else ""


def _plain(summary: dict[str, Any]) -> Row:
    return {name: value for name, value in summary.items() if isinstance(value, (int, float)) or name == "device"}
