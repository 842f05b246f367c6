"""One part in a process of its own, with a time limit: its rows as they come, its error in full."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from bench.gpu.parts import Job, Row

REPOSITORY = Path(__file__).parents[2]
ERROR_CHARACTERS = 20_000
"""The last of the output of a part that failed, which are kept."""
_LOOK_S = 0.2


@dataclass
class Outcome:
    """The result of a part."""

    status: str = "running"
    """measured; cut short: its time was up; failed: its process ended with an error; skipped; running."""
    reason: str = ""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)
    error: str = ""
    """The end of its output, where it failed or was cut short."""

    @property
    def errors(self) -> list[str]:
        """All of its errors: its own, and those of its rows."""
        return [*([self.error] if self.status == "failed" else []), *(r["error"] for r in self.rows if "error" in r)]


def run(job: Job, told: Callable[[Outcome], None] = lambda _: None) -> Outcome:
    """Do `job` in a process that is killed, and all that it started, after job.seconds. told: called with each new row."""
    outcome, began = Outcome(), time.monotonic()
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "bench.gpu.child", json.dumps(dataclasses.asdict(job)), str(writer)]
    with tempfile.TemporaryFile() as said, os.fdopen(reader, "rb", buffering=0) as rows:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            pass_fds=[writer],
            cwd=REPOSITORY,
            env=environment(),
            start_new_session=True,
        )
        os.close(writer)
        try:
            _read(process, rows, began + job.seconds, outcome, told)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its group: processes that it started and did not end
            process.wait()
        outcome.seconds = round(time.monotonic() - began, 1)
        if outcome.status != "measured":
            said.seek(max(0, said.seek(0, os.SEEK_END) - ERROR_CHARACTERS))
            outcome.error = said.read().decode(errors="replace").strip()
    return outcome


def _read(
    process: subprocess.Popen[bytes],
    rows: IO[bytes],
    until_s: float,
    outcome: Outcome,
    told: Callable[[Outcome], None],
) -> None:
    """Take rows until the process has ended, or its time is up."""
    rest = b""
    while True:
        ended = process.poll() is not None
        # a process that it started may hold the pipe open, so its end alone says nothing
        while select.select([rows], [], [], 0 if ended else _LOOK_S)[0] and (piece := rows.read(65536)):
            *lines, rest = (rest + piece).split(b"\n")
            outcome.rows += map(json.loads, lines)
            if lines:
                told(outcome)
        if ended:
            code = process.returncode
            outcome.status = "measured" if code == 0 else "failed"
            failed = sum("error" in row for row in outcome.rows)
            outcome.reason = (
                f"exit code {code}" if code else f"{failed} of {len(outcome.rows)} rows failed" if failed else ""
            )
            return
        if time.monotonic() > until_s:
            outcome.status, outcome.reason = "cut short", "its time was up"
            return
        time.sleep(0.02)


def environment() -> dict[str, str]:
    """This process's, with both packages and the tests' checks on the path, set up or not."""
    path = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "tests"), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own}
