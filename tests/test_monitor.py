"""The GPU monitor against a driver that plays its part: NVIDIA's own binding, with the calls to the library replaced."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasttricks.system.monitor import GpuMonitor, start_monitor
from lib.tiny import environment

pynvml = pytest.importorskip("pynvml")
CUDA = torch.device("cuda", 0)
UUIDS = ("11111111-2222-3333-4444-555555555555", "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")
"""Of the two cards in NVML's order. CUDA's is the other way round."""
NEVER = 3600.0
"""A period (s) in which the thread takes no sample of its own."""


class FakeDriver:
    """Two cards. `gpus` holds each one's readings in NVML's units; an exception in place of one is raised."""

    def __init__(self) -> None:
        self.gpus: list[dict[str, Any]] = [
            {"power": 50_000, "util": 5, "used": 1 << 20, "clocks": {1: 300, 2: 400}, "energy": 7_000_000},
            {"power": 300_000, "util": 90, "used": 1 << 34, "clocks": {1: 1980, 2: 2619}, "energy": 1_000_000},
        ]
        self.kind, self.shutdowns, self.init_error, self.now = "GPU", 0, None, 0.0

    def module(self) -> types.ModuleType:
        """pynvml with our answers; every name we answer for is one that the real module has."""

        def read(gpu: int, key: str) -> Any:
            value = self.gpus[gpu][key]
            if isinstance(value, Exception):
                raise value
            return value

        answers: dict[str, Callable[..., Any]] = {
            "nvmlInit": self.init,
            "nvmlShutdown": self.shutdown,
            "nvmlDeviceGetHandleByUUID": self.find,
            "nvmlDeviceGetPowerUsage": lambda gpu: read(gpu, "power"),
            "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=read(gpu, "util"), memory=1),
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=read(gpu, "used"), free=3, total=1 << 36),
            "nvmlDeviceGetClockInfo": lambda gpu, kind: read(gpu, "clocks")[kind],
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: read(gpu, "energy"),
        }
        assert all(callable(getattr(pynvml, name)) for name in answers)
        fake = types.ModuleType("pynvml")
        fake.__dict__.update(vars(pynvml), **answers)
        return fake

    def init(self) -> None:
        if self.init_error:
            raise self.init_error

    def shutdown(self) -> None:
        self.shutdowns += 1

    def find(self, uuid: str) -> int:
        for index, known in enumerate(UUIDS):
            if uuid == f"{self.kind}-{known}":
                return index
        raise pynvml.NVMLError_NotFound

    def clock(self) -> float:
        return self.now


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake.module())
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUIDS[1 - device.index])
    )
    return fake


@pytest.fixture
def watch(driver: FakeDriver) -> Iterator[Callable[..., GpuMonitor]]:
    """start_monitor on the fake clock; what it started is closed after the test."""
    started: list[GpuMonitor] = []

    def start(device: torch.device = CUDA, period_s: float = NEVER) -> GpuMonitor:
        started.append(start_monitor(device, period_s, clock=driver.clock))
        return started[-1]

    yield start
    for monitor in started:
        monitor.close()


def monitor_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "gpu-monitor"]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_card_is_this_ranks_though_nvml_counts_in_another_order(watch: Callable[..., GpuMonitor]) -> None:
    monitor = watch(torch.device("cuda", 0))
    assert monitor.note == ""
    assert monitor.take() == {
        "gpu_power_w": 300.0,
        "gpu_util_pct": 90.0,
        "gpu_memory_bytes": float(1 << 34),
        "gpu_sm_clock_mhz": 1980.0,
        "gpu_memory_clock_mhz": 2619.0,
    }
    assert watch(torch.device("cuda", 1)).take()["gpu_power_w"] == 50.0


def test_take_gives_means_since_the_last_take(driver: FakeDriver, watch: Callable[..., GpuMonitor]) -> None:
    monitor = watch()
    readings = [300_000, 100_000, 245_000]
    for driver.gpus[1]["power"] in readings[1:]:
        monitor.sample()
    assert monitor.take()["gpu_power_w"] == pytest.approx(np.mean(readings) / 1e3)
    assert monitor.take() == {}
    driver.gpus[1]["power"] = 60_000
    monitor.sample()
    assert monitor.take()["gpu_power_w"] == 60.0


def test_energy_is_the_difference_of_the_cards_own_counter(
    driver: FakeDriver, watch: Callable[..., GpuMonitor]
) -> None:
    monitor = watch()
    assert monitor.energy_j == 0.0
    driver.now, driver.gpus[1]["energy"] = 10.0, 1_000_000 + 2_750_000
    monitor.sample()
    assert monitor.energy_j == 2750.0
    driver.gpus[1]["energy"] = pynvml.NVMLError_Unknown()  # one reading that fails loses nothing
    monitor.sample()
    assert monitor.energy_j == 2750.0
    driver.gpus[1]["energy"] = 1_000_000 + 4_000_000
    monitor.close()
    assert monitor.energy_j == 4000.0, "close() shall have taken a last sample"


def test_without_a_counter_energy_is_the_integral_of_power(
    driver: FakeDriver, watch: Callable[..., GpuMonitor]
) -> None:
    driver.gpus[1]["energy"] = pynvml.NVMLError_NotSupported()
    monitor = watch()
    assert monitor.note == "GPU metrics that could not be read: energy counter (Not Supported)"
    assert monitor.energy_j == 0.0
    generator = np.random.default_rng(0)
    times = np.concatenate([[0.0], np.cumsum(generator.uniform(0.2, 3.0, size=50))])
    watts = np.concatenate([[300.0], generator.uniform(40, 700, size=50).round(3)])
    for now, power in zip(times[1:], watts[1:], strict=True):
        driver.now, driver.gpus[1]["power"] = now, power * 1e3
        monitor.sample()
    assert monitor.energy_j == pytest.approx(np.trapezoid(watts, times), rel=1e-12)


def test_a_missed_power_reading_is_bridged(driver: FakeDriver, watch: Callable[..., GpuMonitor]) -> None:
    driver.gpus[1]["energy"] = pynvml.NVMLError_NotSupported()
    monitor = watch()
    for driver.now, driver.gpus[1]["power"] in [(1.0, pynvml.NVMLError_Timeout()), (2.0, 100_000)]:
        monitor.sample()
    assert monitor.energy_j == pytest.approx((300 + 100) / 2 * 2)


def test_what_a_card_lacks_is_left_out_and_said_once(driver: FakeDriver, watch: Callable[..., GpuMonitor]) -> None:
    driver.gpus[1] |= {"util": pynvml.NVMLError_NotSupported(), "power": pynvml.NVMLError_NotSupported()}
    monitor = watch()
    monitor.sample()
    said = "GPU metrics that could not be read: gpu_power_w (Not Supported), gpu_util_pct (Not Supported)"
    assert monitor.note == said
    assert set(monitor.take()) == {"gpu_memory_bytes", "gpu_sm_clock_mhz", "gpu_memory_clock_mhz"}
    driver.gpus[1]["used"] = pynvml.NVMLError_GpuIsLost()
    monitor.sample()
    assert monitor.note == f"{said}, gpu_memory_bytes (GPU is lost)"
    assert "gpu_memory_bytes" not in monitor.take()


def test_with_neither_counter_nor_power_the_energy_is_unknown(
    driver: FakeDriver, watch: Callable[..., GpuMonitor]
) -> None:
    driver.gpus[1] |= {"energy": pynvml.NVMLError_NotSupported(), "power": pynvml.NVMLError_NotSupported()}
    monitor = watch()
    monitor.sample()
    assert math.isnan(monitor.energy_j)


def test_a_binding_too_old_for_a_call_lacks_that_metric(
    driver: FakeDriver, watch: Callable[..., GpuMonitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["pynvml"], "nvmlDeviceGetTotalEnergyConsumption")
    monitor = watch()
    assert "energy counter" in monitor.note
    assert monitor.energy_j == 0.0, "the integral of power"


def test_a_mig_slice_is_found_too(driver: FakeDriver, watch: Callable[..., GpuMonitor]) -> None:
    driver.kind = "MIG"
    assert watch().take()["gpu_memory_bytes"] == float(1 << 34)


def is_idle(monitor: GpuMonitor, reason: str = "") -> bool:
    """What is true of a monitor that watches nothing, before and after it is closed."""
    for _ in range(2):
        assert monitor.note == (f"no GPU metrics: {reason}" if reason else "")
        assert monitor.take() == {}
        assert math.isnan(monitor.energy_j)
        monitor.close()
    return not monitor_threads()


def test_a_cpu_run_has_none(driver: FakeDriver) -> None:
    """Nor has it a note, as nothing is missing."""
    assert is_idle(start_monitor(torch.device("cpu")))


def test_an_error_at_the_start_is_a_reason(driver: FakeDriver) -> None:
    driver.init_error = pynvml.NVMLError_DriverNotLoaded()
    assert is_idle(start_monitor(CUDA), "NVML does not start (Driver Not Loaded)")
    assert driver.shutdowns == 0


def test_a_card_that_nvml_does_not_know_is_a_reason(driver: FakeDriver) -> None:
    driver.kind = "another"
    assert is_idle(start_monitor(CUDA), f"NVML finds no GPU with the UUID {UUIDS[1]}")
    assert driver.shutdowns == 1, "NVML was started and must be left"


def test_a_missing_binding_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # how Python makes an import fail
    assert is_idle(start_monitor(CUDA), "pynvml is not installed; install it with: pip install nvidia-ml-py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said where there is no driver; here is one")
def test_the_real_absence_of_a_driver_is_a_reason() -> None:
    assert is_idle(start_monitor(CUDA), "NVML does not start (NVML Shared Library Not Found)")


@pytest.mark.parametrize("period_s", [0.0, -1.0, math.nan])
def test_a_period_that_would_never_rest_is_refused(period_s: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 seconds"):
        start_monitor(CUDA, period_s)


def test_the_thread_samples_by_the_period_and_ends_on_close(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = sys.modules["pynvml"].nvmlDeviceGetPowerUsage

    def count(gpu: int) -> Any:
        calls.append(threading.current_thread().name)
        return real(gpu)

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetPowerUsage", count)
    began = time.monotonic()
    monitor = start_monitor(CUDA, period_s=0.02)
    (thread,) = monitor_threads()
    assert thread.daemon
    wait_until(lambda: len(calls) >= 6)
    monitor.close()
    most = 2 + (time.monotonic() - began) / 0.02  # one at the start, one at the end
    assert len(calls) <= most, "it samples between the periods too"
    assert set(calls[1:]) == {"gpu-monitor"}
    assert not monitor_threads()
    taken = len(calls)
    time.sleep(0.06)
    assert len(calls) == taken
    assert driver.shutdowns == 1
    monitor.close()
    assert driver.shutdowns == 1


def test_close_leaves_behind_a_driver_that_does_not_answer(
    driver: FakeDriver, watch: Callable[..., GpuMonitor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttricks.system.monitor._HUNG_S", 0.05)
    monitor, answer = watch(), threading.Event()
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlDeviceGetPowerUsage", lambda gpu: answer.wait(20) and 0)
    before = time.monotonic()
    monitor.close()
    assert time.monotonic() - before < 5
    assert monitor.take()["gpu_power_w"] == 300.0, "take() shall not wait for the driver either"
    assert monitor.energy_j == 0.0
    answer.set()
    wait_until(lambda: not monitor_threads())


AT_EXIT = """
from fasttricks.system.monitor import GpuMonitor
readers = {"gpu_power_w": lambda: 50, "energy counter": lambda: 0}
monitor = GpuMonitor(readers, period_s=3600, shutdown=lambda: print("NVML was left", flush=True))
print(monitor.take())
"""


@pytest.mark.slow
def test_a_monitor_that_nobody_closed_ends_with_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT], capture_output=True, text=True, env=environment(), timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{'gpu_power_w': 50.0}\nNVML was left\n", "")


@pytest.mark.gpu
def test_a_real_card_is_read() -> None:
    held = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
    monitor = start_monitor(torch.device("cuda", torch.cuda.current_device()), period_s=0.05)
    time.sleep(0.3)
    values = monitor.take()
    monitor.close()
    assert values["gpu_memory_bytes"] >= held.numel()
    assert 0 <= values.get("gpu_util_pct", 0) <= 100
    assert monitor.energy_j > 0 or math.isnan(monitor.energy_j)
