"""Processes forked from one that has torch, DALI and the trainer imported: each starts without the five seconds of that.

A forked process runs what a new one would: a module by `python -m`, or a function on ranks as torchrun starts them. What a
test shows of the start itself (imports, torchrun, a terminal) needs a real new process.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import pty
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.soak.processes import free_port
from fasttricks.ablation.worker import PRELOAD
from lib.refusing import become_user
from lib.tiny import environment, own_terminal

_CONTEXT = multiprocessing.get_context("forkserver")
# also the modules of ablation/worker.py, which forks from the same server; those of a command line; and pytest, by this one
_CONTEXT.set_forkserver_preload([*PRELOAD, "tyro", __name__])
GIVE_UP_S = 120
CLOSED = "closed"
UNSET = "\0unset"
"""As a variable's value: it is not set."""


def python_m(
    module: str, *args: str, user: int | None = None, give_up_s: float = GIVE_UP_S, **env: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module args`, with further variables of the environment, as the user of that uid."""
    with running(module, *args, user=user, **env) as started:
        return started.wait(give_up_s)


def said_by(module: str, *args: str, codes: Collection[int] = (0,)) -> str:
    """What `python -m module args` says, both streams; it ends with one of these exit codes and without a traceback."""
    done = python_m(module, *args)
    assert done.returncode in codes, (done.returncode, done.stderr[-3000:])
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout + done.stderr


class Running:
    """A command that has been started, on a terminal where one is given.

    stdout: where standard output goes instead of a file; CLOSED: nowhere. nohup: SIGHUP is ignored. user: the uid that
    it runs as, where root runs the tests.
    """

    def __init__(
        self,
        module: str,
        args: tuple[str, ...],
        env: Mapping[str, str],
        folder: str,
        *,
        terminal: str = "",
        stdout: str = "",
        nohup: bool = False,
        user: int | None = None,
    ) -> None:
        self.args, self._folder = [module, *args], Path(folder)
        self.process = _start(_run_module, (module, args), dict(env), terminal or folder, stdout, nohup, user)
        assert self.process.pid is not None
        self.pid = self.process.pid

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop_at(self, path: Path) -> None:
        """Hold it (SIGSTOP) as soon as it has made `path`."""
        wait_for_file(path, self)
        self.signal(signal.SIGSTOP)

    def wait(self, give_up_s: float = GIVE_UP_S) -> subprocess.CompletedProcess[str]:
        """Its end, and what it said; it is killed where it takes too long, and stderr says so."""
        in_time = _end([self.process], give_up_s)
        files = [self._folder / name for name in ("stdout", "stderr")]
        said = [file.read_text() if file.exists() else "" for file in files]
        said[1] += "" if in_time else f"killed by the test after {give_up_s} s\n"
        return subprocess.CompletedProcess(self.args, self.process.exitcode or 0, *said)


def wait_for_file(path: Path, *makers: Running) -> None:
    """Until one of these commands has made `path`. Fails where all have ended without it, or it takes too long."""
    until_s = time.monotonic() + GIVE_UP_S
    while not path.exists():
        alive = any(maker.process.is_alive() for maker in makers)
        assert alive and time.monotonic() < until_s, [maker.wait(0) for maker in makers]


@contextmanager
def running(
    module: str,
    *args: str,
    terminal: str = "",
    stdout: str = "",
    nohup: bool = False,
    user: int | None = None,
    **env: str,
) -> Iterator[Running]:
    """`python -m module args` meanwhile; killed at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {"terminal": terminal, "stdout": stdout, "nohup": nohup, "user": user}
        started = Running(module, args, environment(**env), folder, **how)
        try:
            yield started
        finally:
            started.process.kill()
            started.process.join()


def on_terminal(module: str, *args: str, until: str = "", keys: bytes = b"") -> tuple[int, str]:
    """(exit code, all that was shown) of the same on a terminal of 120 columns; `keys` are typed once `until` is read."""
    main, terminal = pty.openpty()
    env = environment(COLUMNS="120", LINES="40", TERM="xterm-256color")
    process = _start(_run_module, (module, args), env, os.ttyname(terminal))
    shown, until_s = b"", time.monotonic() + GIVE_UP_S
    while main in (ready := wait([main, process.sentinel], max(0, until_s - time.monotonic()))):
        shown += os.read(main, 65536)
        if keys and until.encode() in shown:
            os.write(main, keys)
            keys = b""
    if not ready:
        process.kill()
    _end([process])
    assert ready, shown.decode()
    os.close(main)
    os.close(terminal)
    return process.exitcode or 0, shown.decode()


def on_ranks(count: int, function: Callable[..., object], *args: object) -> list[tuple[str, str]]:
    """function(*args), found by its name in its module, on `count` ranks; fails with what a rank said that failed.

    Returns (standard output, standard error) of each rank.
    """
    ranks = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(count):
            own = {name: str(value) for name, value in (ranks | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            (Path(folder) / str(rank)).mkdir()
            started.append(_start(function, args, environment(**own), f"{folder}/{rank}"))
        _end(started)
        files = [[Path(folder) / str(rank) / name for name in ("stdout", "stderr")] for rank in range(count)]
        said = [(out.read_text(), err.read_text()) for out, err in files]
    assert [process.exitcode for process in started] == [0] * count, [err for _, err in said]
    return said


def forked(function: Callable[..., object], *args: object) -> BaseProcess:
    """function(*args), found by its name in its module, in a process of its own, with the output of this one."""
    process = _CONTEXT.Process(target=function, args=args)
    _start_server()
    process.start()
    return process


@functools.cache
def _start_server() -> None:
    """Python 3.11 gives it no sys.path, where this module is; it is started by the first of all."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()


def _start(
    function: Callable[..., object],
    args: tuple[object, ...],
    env: dict[str, str],
    output: str,
    stdout: str = "",
    nohup: bool = False,
    user: int | None = None,
) -> BaseProcess:
    process = _CONTEXT.Process(target=_become, args=(function, args, env, output, stdout, nohup, user))
    _start_server()
    process.start()
    return process


def _end(processes: list[BaseProcess], give_up_s: float = GIVE_UP_S) -> bool:
    """Whether all ended by themselves within that time each; those that did not are killed."""
    in_time = True
    for process in processes:
        process.join(give_up_s)
        in_time &= not process.is_alive()
        process.kill()
        process.join()
    return in_time


def _become(
    function: Callable[..., object],
    args: tuple[object, ...],
    env: Mapping[str, str],
    output: str,
    stdout: str,
    nohup: bool,
    user: int | None,
) -> None:
    """In the forked process: what a new one has of its own. output: a folder for two files, or a terminal."""
    if os.path.isdir(output):
        for name, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(f"{output}/{name}", os.O_CREAT | os.O_WRONLY), number)
    else:
        for number in range(3):
            os.dup2(os.open(output, os.O_RDWR), number)
        own_terminal()
        sys.stdout.reconfigure(line_buffering=True)
    if stdout == CLOSED:
        os.close(1)
    elif stdout:
        os.dup2(os.open(stdout, os.O_WRONLY), 1)
    # the server may have been started by a fixture of the session, where nohup's deafness still holds
    signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update({name: value for name, value in env.items() if value != UNSET})
    if encoding := env.get("PYTHONIOENCODING"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding=encoding)
    if user is not None:
        become_user(user)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP}
    )  # an ablation, whose children are deaf, may have begun the server
    function(*args)


def _run_module(module: str, args: tuple[str, ...]) -> None:
    sys.modules.pop(module, None)  # a new process would not have it
    sys.argv, sys.orig_argv = [module, *args], [sys.executable, "-m", module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
