"""The start and end of a command: errors in one line, Ctrl-C with the way to resume, output that may be lost. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from fasttricks.config import UserError, read_launch, show_name
from fasttricks.system.output import LostOutputError, kept_output
from fasttricks.system.refusals import refusal

_RANK_0_SPEAKS_S = 3.0
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Where torchrun looks for the reason of a rank's end, which it prints last in its report."""


def run_main(main: Callable[[Sequence[str]], object], *, prints_result: bool = False) -> None:
    """Run an entry point on sys.argv. Each of these errors is one line without a traceback:

    a UserError, a file or disk that the kernel refuses, lack of memory: exit code 2; Ctrl-C, with the way to resume: 130.
    Any other exception is a fault of the program and keeps its traceback.

    prints_result: only the output holds the result, so a lost standard output ends the command, with SIGPIPE's status where
    the reader has closed it. Else the command continues without it.
    Under torchrun an error of one rank is mostly an error of all: rank 0 prints it first, and torchrun then ends the others.
    torchrun's report, 35 lines, repeats it at its end.
    """
    with kept_output(needed=prints_result), _warnings_as_notes():
        try:
            try:
                read_launch()
                main(sys.argv[1:])
            finally:
                sys.stdout.flush()
        except SystemExit as end:
            if end.code:
                _wait_for_rank_0()
                _tell_torchrun("see the lines above this report for the reason")
            raise
        except UserError as error:
            if isinstance(error, LostOutputError) and error.quietly:
                raise SystemExit(128 + signal.SIGPIPE) from None
            _refuse(str(error))
        except KeyboardInterrupt as stop:
            if not _rank():
                print(show_name(f"stopped; {stop}") if stop.args else "stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except Exception as error:
            words = refusal(error)
            if not words:
                raise
            _refuse(show_name(words))


@contextmanager
def ended_as_by_ctrl_c() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP, a closed terminal, end the work as Ctrl-C does: by KeyboardInterrupt.

    A SIGHUP that is ignored, as nohup has it, stays ignored.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    ends = [signal.SIGTERM, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])]
    before = {number: signal.signal(number, stop) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refuse(words: str) -> NoReturn:
    line = f"error: {words}"
    _wait_for_rank_0()
    if not _told_by_another(line):
        print(line, file=sys.stderr, flush=True)
    _tell_torchrun(line)
    raise SystemExit(2) from None


def _tell_torchrun(words: str) -> None:
    """Have torchrun's report end with `words` in place of `traceback: To enable traceback see: https://...`."""
    file = os.environ.get(_ERROR_FILE, "")
    if file:
        report = {"message": {"message": words, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps(report), encoding="utf-8")


def _told_by_another(line: str) -> bool:
    """Whether another rank of this machine has printed the same: torchrun gives each a file .../LOCAL_RANK/error.json."""
    file = os.environ.get(_ERROR_FILE, "")
    if not file or not _rank():
        return False
    said = json.dumps(line)
    with contextlib.suppress(OSError):
        return any(said in other.read_text(encoding="utf-8") for other in Path(file).parent.parent.glob("*/error.json"))
    return False


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Within the block, a warning of this project's own is a line on standard error, of rank 0 alone, and names no source."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not _is_own(filename):
            before(message, category, filename, lineno, file, line)
        elif not _rank():
            print(show_name(f"note: {message}"), file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _is_own(filename: str) -> bool:
    packages = (sys.modules.get(name) for name in ("fasttricks", "fasttricks_kernels"))
    folders = [Path(package.__file__).parent for package in packages if package and package.__file__]
    return any(Path(filename).is_relative_to(folder) for folder in folders)


def _rank() -> int:
    try:
        return read_launch().rank
    except UserError:
        return 0


def _wait_for_rank_0() -> None:
    if _rank() > 0:
        time.sleep(_RANK_0_SPEAKS_S)
