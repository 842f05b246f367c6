"""SIGTERM and Ctrl-C: heard at once by a thread of its own, answered on all ranks at one step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttricks.commands import train
from fasttricks.runs.stored import checkpoints, step_of
from fasttricks.system.signals import StopRequest
from fasttricks.tasks import classification
from lib.tables import mostly_slow
from lib.tiny import ALONE, arguments, call, environment

# Main thread in a call that does not return, as in a collective whose other rank is gone.
DEAF = """
import ctypes, torch
from fasttricks.system.distributed import World
from fasttricks.system.signals import StopRequest
stop = StopRequest(World.alone(torch.device("cpu")))
sleep = ctypes.CDLL(None).sleep
with stop.listening():
    print("ready", flush=True)
    mask = ctypes.c_uint64(0)
    ctypes.CDLL(None).poll(None, 0, 60_000)
    ctypes.CDLL(None).poll(None, 0, 60_000)
    ctypes.CDLL(None).poll(None, 0, 60_000)
"""


def asked(stop: StopRequest) -> bool:
    """Whether the signal's thread has heard it, within 5 s."""
    end = time.monotonic() + 5
    while not stop.asked and time.monotonic() < end:
        time.sleep(0.001)
    return stop.asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_and_the_old_handlers_come_back(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    stop = StopRequest(ALONE)
    with stop.listening():
        assert not stop.poll()
        os.kill(os.getpid(), number)
        assert asked(stop)
        assert stop.poll() and stop.agreed
    assert {n: signal.getsignal(n) for n in before} == before
    said = capfd.readouterr().err
    assert said == f"{signal.Signals(number).name}: saving after this step; Ctrl-C again ends at once\n"


@pytest.mark.timeout(20)
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_listening_ends_while_a_forked_worker_lives() -> None:
    """It has every open file of this process, the pipe of the signals too."""
    with StopRequest(ALONE).listening():
        if not (worker := os.fork()):
            time.sleep(60)
            os._exit(0)
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)


def test_another_signal_asks_for_nothing() -> None:
    stop, seen = StopRequest(ALONE), []
    old = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        with stop.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert seen and not stop.asked


def test_a_second_ctrl_c_ends_a_process_that_hears_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("SIGINT: saving after this step")
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 128 + signal.SIGINT
    assert time.monotonic() - sent < 2
    assert process.stderr.read() == "stopped at once; the last checkpoint is unchanged\n"
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("number", mostly_slow([signal.SIGTERM, signal.SIGINT], signal.SIGTERM))
def test_a_signal_saves_at_the_end_of_its_step_and_exits_0(
    number: int, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sent in the middle of step 2 of 6."""
    args, judge = arguments(tiny_data, tmp_path / "run"), classification.training_loss
    losses = iter(range(100))

    def judging(*of: object) -> object:
        if next(losses) == 1:
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # until the thread has heard it
        return judge(*of)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(classification, "training_loss", judging)
        assert call(train.main, *args) == 0
    assert [step_of(path) for path in checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("stopped after step 2, saved; resume with: ") and last.endswith(" --resume")
    assert call(train.main, *args, "--resume") == 0
    assert (tmp_path / "run" / "summary.json").is_file()
