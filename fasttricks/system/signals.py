"""SIGTERM, Ctrl-C and a closed terminal: the run saves after the current step and ends; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fasttricks.system.distributed import Vote, World
from fasttricks.system.output import say
from fasttricks.system.process import under_torchrun

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_END = b"\0"
"""The number of no signal: ends the thread."""
_FORWARDED_S = 2.0
"""torchrun passes on to its ranks a Ctrl-C that the terminal has sent them already."""
_STUCK_S = 10.0
"""With several ranks, a rank that has not ended its step by then waits for one that is gone. torchrun kills after 30 s."""


class StopRequest:
    """Whether this run is to stop: asked by a signal to any rank, answered on all of them at the same step."""

    def __init__(self, world: World) -> None:
        self.asked = False
        """A signal came to this rank."""
        self.agreed = False
        """All ranks are to stop now; stays True."""
        self._vote, self._polls = Vote(world), 0
        self._speaks, self._alone = world.is_main, world.size == 1

    def poll(self) -> bool:
        """Ask all ranks; returns and keeps whether to stop. A collective on the host: every rank must call it as often.

        Never waits for the device. With one rank the answer is at once, with several it is that of the poll before, so
        that a rank which is ahead waits for nobody. The cost is in docs/reliability.md.
        """
        self.agreed = self._vote(self.asked) or self.agreed
        self._polls += 1
        return self.agreed

    def close(self) -> None:
        """Wait for the last poll's answers. A collective, for the end of a run that went well."""
        self._vote.close()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT and SIGHUP within the block; the earlier handlers return after it.

        A SIGHUP that is ignored stays so: nohup has the run outlive its terminal.

        A thread of its own takes them, through a pipe that the C handler writes to: so a second Ctrl-C ends even a process
        whose main thread sits in a collective that never returns. Signals come to the main thread only; call it there.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        taken = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, lambda *_: None) for number in taken}
        old_fd = signal.set_wakeup_fd(writer)
        thread = threading.Thread(target=self._take, args=(reader,), name="signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_fd)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.write(writer, _END)  # to close it would not do: a worker that was forked within the block has it open
            os.close(writer)
            thread.join()
            os.close(reader)

    def _take(self, reader: int) -> None:
        first = 0.0
        while (number := os.read(reader, 1)) and number != _END:
            if number[0] not in _SIGNALS:
                continue
            again = number[0] == signal.SIGINT and self.asked
            if again and not (under_torchrun() and time.monotonic() - first < _FORWARDED_S):
                show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
                say(f"{show_cursor}stopped at once; the last checkpoint is unchanged")
                os._exit(128 + signal.SIGINT)
            if not self.asked:
                first, self.asked = time.monotonic(), True
                if not self._alone:
                    threading.Thread(target=self._end_if_stuck, args=(self._polls,), daemon=True).start()
                if self._speaks:
                    name = signal.Signals(number[0]).name
                    say(f"{name}: saving after this step; Ctrl-C again ends at once")

    def _end_if_stuck(self, polls: int) -> None:
        """torchrun ends with SIGTERM the ranks that wait for one that was killed: it is not to wait for them in turn."""
        time.sleep(_STUCK_S)
        if self._polls == polls:
            os._exit(128 + signal.SIGTERM)
