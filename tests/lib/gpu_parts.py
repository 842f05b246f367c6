"""Parts for make gpu that need no device: one that ends well, one that raises, one that dies, one that hangs with a child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from bench.gpu import __main__ as command
from bench.gpu.child import attempt
from bench.gpu.parts import CARD, Job, Part, Row


def good(job: Job) -> Iterator[Row]:
    """Two rows, as the first part has them."""
    yield {"name": CARD, "value": "NVIDIA Test 9000"}
    yield {"name": "copy rate", "value": 1.5e12}


def raising(job: Job) -> Iterator[Row]:
    """A row, and an error that ends the part."""
    yield {"n": 1}
    raise ValueError("the reason in words")


def one_row_raises(job: Job) -> Iterator[Row]:
    """A row that fails between two that do not."""
    yield from attempt({"n": 1}, lambda: iter([{"m": 1}]))
    yield from attempt({"n": 2}, lambda: iter([{"m": 1 // (job.seconds < 0)}]))
    yield {"n": 3, "told": job.facts.get("copy rate")}


def dying(job: Job) -> Iterator[Row]:
    """Ends as a process does whose device fails under it."""
    yield {"n": 1}
    os.abort()


def hanging(job: Job) -> Iterator[Row]:
    """Hangs, deaf to SIGTERM, with a process of its own and the pipe open in it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], close_fds=False)
    yield {"pid": os.getpid(), "child": child.pid}
    print("the last words", flush=True)
    time.sleep(600)


def waiting(job: Job) -> Iterator[Row]:
    """Is at work until it is killed."""
    yield {"pid": os.getpid()}
    time.sleep(600)


def fake(work: str, **more: object) -> Part:
    """The part of that name here."""
    return Part(**{"name": work, "title": work, "work": f"lib.gpu_parts:{work}", "seconds": 1.0, **more})  # type: ignore[arg-type]


def run_fakes(folder: str, works: list[str], *options: str) -> None:
    """make gpu with these parts; the first is the one of the card's facts."""
    names = [CARD, *works[1:]]
    parts = tuple(fake(work, name=name) for work, name in zip(works, names, strict=True))
    with mock.patch.multiple(command, PARTS=parts, NAMES=names, LEAST_S=0.0, RESULTS=Path(folder, "results")):
        command.main(["--output", folder, *options])
