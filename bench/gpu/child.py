"""The process of one part: it writes each row, as soon as it has it, as a line of JSON to the pipe that it is given.

python -m bench.gpu.child JOB FILE_DESCRIPTOR
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module

from bench.gpu.parts import Job, Row

_PR_SET_PDEATHSIG = 1


def attempt(names: Row, work: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of `work`, each with the columns `names`; where it raises, a last one with the error in full.

    For the rows of a part that can do without each other, such as one that needs more memory than the card has.
    """
    try:
        for row in work():
            yield names | row
    except Exception:
        yield names | {"error": traceback.format_exc()}


def main(job: Job, rows: int) -> None:
    """Do the part and end; an exception is for standard error."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # no orphan holds the GPU
    os.set_inheritable(rows, False)
    module, _, name = job.work.partition(":")
    with os.fdopen(rows, "w") as pipe:
        for row in getattr(import_module(module), name)(job):
            print(json.dumps(row), file=pipe, flush=True)


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])), int(sys.argv[2]))
