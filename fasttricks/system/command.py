"""The start and end of a command: errors in one line, Ctrl-C with the way to resume, output that may be lost. No torch."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fasttricks.config import UserError, show_name
from fasttricks.system.output import LostOutputError, kept_output

_RANK_0_SPEAKS_S = 3.0


def run_main(main: Callable[[Sequence[str]], object], *, prints_result: bool = False) -> None:
    """Run an entry point on sys.argv. A UserError is one line and exits 2. Ctrl-C prints the way to resume and exits 130.

    prints_result: only the output holds the result, so a lost standard output ends the command, with SIGPIPE's status where
    the reader has closed it. Else the command continues without it.
    Under torchrun an error of one rank is mostly an error of all: rank 0 prints it first, and torchrun then ends the others.
    """
    with kept_output(needed=prints_result), _warnings_as_notes():
        try:
            try:
                main(sys.argv[1:])
            finally:
                sys.stdout.flush()
        except SystemExit as end:
            _wait_for_rank_0(bool(end.code))
            raise
        except UserError as error:
            _wait_for_rank_0(True)
            if isinstance(error, LostOutputError) and error.quietly:
                raise SystemExit(128 + signal.SIGPIPE) from None
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as stop:
            if not _rank():
                print(show_name(f"stopped; {stop}") if stop.args else "stopped", file=sys.stderr)
            raise SystemExit(130) from None


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
    return int(os.environ.get("RANK", 0))


def _wait_for_rank_0(failed: bool) -> None:
    if failed and _rank() > 0:
        time.sleep(_RANK_0_SPEAKS_S)
