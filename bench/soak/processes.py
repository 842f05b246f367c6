"""Processes to kill: the plain command, torchrun, and ranks forked from this process, which has the imports done already.

A forked rank runs the same entry point on the same arguments; only the eight seconds of imports are saved. The process that
forks must never have gone backward (torch's autograd does not survive a fork) and must run one thread.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttricks import trainer
from fasttricks.commands import train
from fasttricks.config import cli
from fasttricks.learning.learner import Learner
from fasttricks.learning.optim import master_state_dict
from fasttricks.runs import log
from fasttricks.system.command import run_main
from fasttricks.training import build  # noqa: F401  (a start-up imports it)

REPOSITORY = Path(__file__).parents[2]
MODULE = "fasttricks.train"
GIVE_UP_S = 400.0


def get_ready() -> None:
    """Import the modules of a first step, stay on one thread, and draw no curves, which take longer than the 40 steps."""
    torch.set_num_threads(1)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    log.plot_curves = lambda folder, metrics: None


def fork_ranks(args: Sequence[str], ranks: int, log: Path, *, changes: Path | None = None) -> list[int]:
    """The process ids of a run on so many ranks; their output goes to `log`. changes: file for note_changes()."""
    port = free_port()
    return [_fork(args, rank, ranks, port, log, None if rank else changes) for rank in range(ranks)]


def note_changes(file: Path) -> None:
    """From now on, have each step of this process add a line to `file`: the parameters that it changed, masters under fp16."""
    step = trainer.train_step

    def noting(learner: Learner, batches: Sequence[Any]) -> Any:
        before = {name: value.clone() for name, value in _weights(learner).items()}
        counted = step(learner, batches)
        changed = sum(not torch.equal(value, before[name]) for name, value in _weights(learner).items())
        with open(file, "a") as lines:
            lines.write(f"{changed}\n")
        return counted

    trainer.train_step = noting


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    state = master_state_dict(learner.model, learner.optimizer)
    return {name: state[name] for name, _ in learner.model.named_parameters()}


def _fork(args: Sequence[str], rank: int, ranks: int, port: int, log: Path, changes: Path | None) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        numbers = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
        os.environ.update({name: str(value) for name, value in numbers.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
        cli._RANK = rank
        if changes is not None:
            note_changes(changes)
        sys.argv = [MODULE, *args]
        sys.orig_argv = [sys.executable, "-m", MODULE, *args]
        run_main(train.main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    """The environment of a command: it finds both packages and takes one thread."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(args: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The plain command of a user."""
    return _start([sys.executable, "-m", MODULE, *args], log)


def torchrun(args: Sequence[str], log: Path, *options: str, ranks: int = 2) -> subprocess.Popen[bytes]:
    """The command under torchrun, with further options of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *options]
    return _start([*launcher, "-m", MODULE, *args], log)


def _start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as output:
        return subprocess.Popen(words, stdout=output, stderr=output, env=environment(), start_new_session=True)


def children(pid: int) -> dict[int, int]:
    """Rank -> process id of the ranks that the torchrun `pid` has started."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent != pid:
                continue
            words = (status.parent / "environ").read_bytes().split(b"\0")
            rank = next((word for word in words if word.startswith(b"RANK=")), None)
        except (OSError, ValueError):
            continue
        if rank is not None:
            found[int(rank.partition(b"=")[2])] = int(status.parent.name)
    return found


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped; a zombie does neither."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait(pids: Sequence[int], seconds: float = GIVE_UP_S) -> list[int]:
    """The exit codes of forked ranks, negative for a signal. Raises TimeoutError, after killing them."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"ranks did not end within {seconds:g} s")
        time.sleep(0.002)
    return [codes[pid] for pid in pids]


def until(true: Callable[[], Any], running: Callable[[], bool], seconds: float = GIVE_UP_S) -> bool:
    """Wait until `true`; False where `running` ends first. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not true():
        if not running():
            return bool(true())
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s in vain")
        time.sleep(0.001)
    return True


def last_step(folder: Path) -> int:
    """The step of the last whole record of metrics.jsonl, 0 where there is none. It is read a thousand times a second."""
    try:
        lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")
    except OSError:
        return 0
    return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0


def records(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times; a line that is being written is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except OSError:
        return []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in record.items() if name not in log.TIMINGS} for record in whole]
