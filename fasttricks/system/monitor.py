"""Readings of this rank's GPU, through NVML on a thread of its own: power, energy, utilisation, memory, clocks.

NVML is the library of nvidia-smi; pynvml, of the package nvidia-ml-py, is NVIDIA's binding to it. It asks the driver, never
the CUDA context: no reading waits for a kernel, and none is taken in a training step.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

POWER = "gpu_power_w"
_ENERGY_COUNTER = "energy counter"
_HUNG_S = 5.0
"""How long close() waits for a reading that a failing driver does not answer; such a thread is left behind."""

Reader = Callable[[], float]


class GpuMonitor:
    """Means of the readings between two take(), and the energy since the start. Made by start_monitor()."""

    def __init__(
        self,
        readers: Mapping[str, Reader],
        *,
        errors: tuple[type[Exception], ...] = (),
        reason: str = "",
        period_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        shutdown: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the first readings, then one every `period_s` on a daemon thread. No `readers`: no thread, for `reason`.

        `note` names the `errors` that a reader raises. `clock` gives seconds; `shutdown` is called once, at the end.
        """
        self._readers, self._errors, self._reason = readers, errors, reason
        self._clock, self._shutdown, self._period_s = clock, shutdown, period_s
        self._missing: dict[str, str] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._energy_j = math.nan
        self._counter_at_start: float | None = None
        self._last_power: tuple[float, float] | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        if not readers:
            return
        self._counter_at_start = self._read(_ENERGY_COUNTER)
        self.sample()
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def note(self) -> str:
        """One line: the reason why there is no monitoring, or the missing readings; empty without any. Grows with new errors."""
        if self._reason:
            return f"no GPU metrics: {self._reason}"
        left_out = ", ".join(f"{name} ({why})" for name, why in self._missing.items())
        return f"GPU metrics that could not be read: {left_out}" if left_out else ""

    @property
    def energy_j(self) -> float:
        """Joules that the whole GPU took from the start to the last sample, which is at most period_s old. NaN: not known.

        The difference of the card's own counter (Volta and newer); without one, the trapezoidal integral of the power samples.
        """
        return self._energy_j

    def take(self) -> dict[str, float]:
        """Means of the samples since the last take(), by name with unit; empty where there are none. Calls no driver."""
        with self._lock:
            sums, self._sums = self._sums, {}
        return {name: total / count for name, (total, count) in sums.items()}

    def sample(self) -> None:
        """Read every metric once. For the thread; a test may call it."""
        counter = self._read(_ENERGY_COUNTER) if self._counter_at_start is not None else None
        values = {name: self._read(name) for name in self._readers if name != _ENERGY_COUNTER}
        with self._lock:
            for name, value in values.items():
                if value is not None:
                    total, count = self._sums.get(name, (0.0, 0))
                    self._sums[name] = total + value, count + 1
        self._count_energy(counter, values.get(POWER))

    def close(self) -> None:
        """Take a last sample, end the thread and leave NVML. Done at the interpreter's exit where nobody called it."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join(_HUNG_S)
        atexit.unregister(self.close)

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._period_s)
            self.sample()
        with suppress(*self._errors):
            self._shutdown()

    def _read(self, name: str) -> float | None:
        try:
            return float(self._readers[name]())
        except self._errors as error:
            self._missing.setdefault(name, str(error))
            return None

    def _count_energy(self, counter_j: float | None, power_w: float | None) -> None:
        if self._counter_at_start is not None:
            if counter_j is not None:
                self._energy_j = counter_j - self._counter_at_start
        elif power_w is not None:
            now = self._clock()
            if self._last_power is None:
                self._energy_j = 0.0
            else:
                then, before = self._last_power
                self._energy_j += (now - then) * (before + power_w) / 2
            self._last_power = now, power_w


def start_monitor(
    device: torch.device, period_s: float = 1.0, clock: Callable[[], float] = time.monotonic
) -> GpuMonitor:
    """Watch the GPU of `device`, a sample every `period_s` seconds (above 0). Raises ValueError for another period.

    Always returns a monitor: on a CPU, without pynvml, without a driver or for a GPU that NVML does not find it is an idle
    one, whose `note` says why. take() gives, as far as the card has them:

        gpu_power_w             W, averaged over a second by Ampere and newer (not by GA100, the A100), else at that moment
        gpu_util_pct            % of the time in which some kernel ran; says nothing of how full it kept the GPU
        gpu_memory_bytes        bytes in use on the card, by all processes and the driver
        gpu_sm_clock_mhz, gpu_memory_clock_mhz

    All of them are of the whole card. Meanings and units are those of NVML's reference (nvmlDeviceGetPowerUsage, and so on).
    Cost: a few driver calls a period on a thread; ctypes lets go of the interpreter lock in each.
    """
    if not period_s > 0:
        raise ValueError(f"period_s = {period_s!r}: must be above 0 seconds")
    if device.type != "cuda":
        return GpuMonitor({})  # nothing is missing, so there is no note
    try:
        import pynvml
    except ImportError:
        return GpuMonitor({}, reason="pynvml is not installed; install it with: pip install nvidia-ml-py")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuMonitor({}, reason=f"NVML does not start ({error})")
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    gpu = find_gpu(pynvml, uuid)
    if gpu is None:
        pynvml.nvmlShutdown()
        return GpuMonitor({}, reason=f"NVML finds no GPU with the UUID {uuid}")
    return GpuMonitor(
        _readers(pynvml, gpu),
        errors=(pynvml.NVMLError, AttributeError),  # the second: a pynvml too old for a call
        period_s=period_s,
        clock=clock,
        shutdown=pynvml.nvmlShutdown,
    )


def find_gpu(nvml: Any, uuid: str) -> Any:
    """NVML's handle of the GPU, or of the MIG slice, with that UUID; None where there is none.

    By UUID because NVML counts all cards in the order of the bus, and CUDA those of CUDA_VISIBLE_DEVICES in its order.
    """
    for kind in ("GPU", "MIG"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
        except nvml.NVMLError:
            continue
    return None


def _readers(nvml: Any, gpu: Any) -> dict[str, Reader]:
    return {
        POWER: lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,  # mW
        "gpu_util_pct": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "gpu_memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(gpu).used,
        "gpu_sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "gpu_memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        _ENERGY_COUNTER: lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1e3,  # mJ
    }
