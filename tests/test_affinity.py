"""A rank's threads on the cores beside its GPU, against a driver that plays its part: NVIDIA's binding, its calls replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fasttricks.system import affinity, process
from fasttricks.system.affinity import stay_near
from fasttricks.system.distributed import join_world
from lib.forked import forked

pynvml = pytest.importorskip("pynvml")
SOCKETS = set(range(64)), set(range(64, 128))


@dataclass
class Machine:
    """Cores and GPUs. beside[i]: the cores of GPU i, or NVML's error, in NVML's order, which is the reverse of CUDA's."""

    cores: set[int] = field(default_factory=lambda: set(range(128)))
    beside: list[Any] = field(default_factory=lambda: [*[SOCKETS[0]] * 4, *[SOCKETS[1]] * 4])
    inits: int = 0
    init_error: Any = None
    set_to: list[set[int]] = field(default_factory=list)

    def init(self) -> None:
        if self.init_error:
            raise self.init_error
        self.inits += 1

    def shutdown(self) -> None:
        self.inits -= 1

    def find(self, uuid: str) -> int:
        if not uuid.startswith("GPU-"):
            raise pynvml.NVMLError_NotFound
        return int(uuid[4:])

    def mask(self, gpu: int, words: int) -> Any:
        beside = self.beside[gpu]
        if isinstance(beside, Exception):
            raise beside
        return (pynvml.c_ulonglong * words)(*(sum(1 << c % 64 for c in beside if c // 64 == at) for at in range(words)))

    def play(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": self.init,
            "nvmlShutdown": self.shutdown,
            "nvmlDeviceGetHandleByUUID": self.find,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetCount": lambda: len(self.beside),
            "nvmlDeviceGetCpuAffinity": self.mask,
        }
        assert all(callable(getattr(pynvml, name)) for name in answers)
        fake = types.ModuleType("pynvml")
        fake.__dict__.update(vars(pynvml), **answers)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        last = len(self.beside) - 1
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=last - device.index)
        )

    def pretend(self, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
        """As play(), and the cores are the machine's too; what the process is set to is kept."""
        self.play(monkeypatch)
        monkeypatch.setattr(os, "sched_getaffinity", lambda thread: set(self.cores))
        monkeypatch.setattr(os, "cpu_count", lambda: 128)
        monkeypatch.setattr(affinity, "keep_to", lambda cores: self.set_to.append(cores) or True)
        monkeypatch.setattr(process, "read_launch", lambda: SimpleNamespace(local_size=ranks))


def test_each_of_eight_ranks_stays_on_its_gpus_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.pretend(monkeypatch, ranks=8)
    assert [stay_near(torch.device("cuda", number), 8) for number in range(8)] == [64] * 8
    assert machine.set_to == [*[SOCKETS[1]] * 4, *[SOCKETS[0]] * 4], "CUDA counts in the other order"
    assert machine.inits == 0, "NVML was left"


@pytest.mark.parametrize(
    ("machine", "ranks"),
    [
        pytest.param(Machine(), 1, id="one rank would lose the other socket's half of its cores"),
        pytest.param(Machine(beside=[SOCKETS[0]] * 8), 8, id="all GPUs on one socket: half the cores would idle"),
        pytest.param(Machine(beside=[set(range(128))] * 8), 8, id="one socket"),
        pytest.param(Machine(beside=[set()] * 8), 8, id="no core is beside it"),
        pytest.param(Machine(cores=SOCKETS[0], beside=[SOCKETS[1]] * 8), 8, id="bound elsewhere by who started it"),
        pytest.param(Machine(cores={0, 1}), 8, id="bound to some of them by who started it"),
        pytest.param(Machine(beside=[pynvml.NVMLError_NotSupported()] * 8), 8, id="NVML does not know"),
        pytest.param(Machine(init_error=pynvml.NVMLError_LibraryNotFound()), 8, id="no driver"),
    ],
)
def test_off_where_it_is_not_known_or_would_cost_cores(
    machine: Machine, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.pretend(monkeypatch, ranks)
    assert stay_near(torch.device("cuda", 7), ranks) == 0
    assert machine.set_to == [] and machine.inits == 0


def test_without_a_gpu_or_pynvml_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    machine.pretend(monkeypatch, ranks=8)
    monkeypatch.setattr(machine, "init_error", AssertionError("NVML was asked"))
    assert stay_near(torch.device("cpu"), 8) == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert stay_near(torch.device("cuda", 0), 8) == 0
    assert machine.set_to == []


def keep_every_thread() -> None:
    """Threads that run, those that start later, and processes. In a process of its own, whose cores do not come back."""
    first, *others = sorted(os.sched_getaffinity(0))
    running, go_on = threading.Event(), threading.Event()
    seen: list[set[int]] = []

    def report() -> None:
        running.set()
        go_on.wait(20)
        seen.append(os.sched_getaffinity(0))

    threads = [threading.Thread(target=report) for _ in range(2)]
    threads[0].start()
    running.wait(20)
    with pytest.MonkeyPatch.context() as patch:
        Machine(beside=[{first}, set(others)]).play(patch)
        patch.setenv("LOCAL_RANK", "0")
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        patch.setattr("fasttricks.system.distributed.resolve_device", lambda wanted, rank: torch.device("cuda", rank))
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        share = process.threads_per_rank()
        with join_world("cuda") as world:
            assert world.near_cores == len(others)
        assert process.threads_per_rank() == share
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert seen == [set(others)] * 2
    command = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    assert subprocess.check_output(command, text=True).strip() == str(others)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_every_thread_is_kept_there_and_the_share_of_cores_stays() -> None:
    child = forked(keep_every_thread)
    child.join()
    assert child.exitcode == 0


def test_a_system_that_refuses_leaves_the_process_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cores: set[int]) -> None:
        raise OSError(22, "Invalid argument")

    before = os.sched_getaffinity(0)
    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert process.keep_to({0}) is False
    assert os.sched_getaffinity(0) == before
    assert process.threads_per_rank() == len(before)
