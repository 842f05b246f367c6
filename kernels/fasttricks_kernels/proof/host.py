"""The host's time of the calls that launch kernels on a GPU, without a GPU: all of Python and torch, the kernels not started.

    python -m fasttricks_kernels.proof.host

Forward and backward on CPU tensors of 2 x 10, by the thread's own clock, one thread, in alternation with F.cross_entropy on the
same logits. There torch's own time is hardly more than the host's. Triton's launch, left out, comes on top: once a launch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice, permutations
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from .. import _checks, _direct, _launch, augment, cross_entropy, cross_entropy_loss_and_grad, distillation_loss, mixup

Work = Callable[[], object]
WARM_UP = 20


class HostTime(NamedTuple):
    """Medians, of one call."""

    name: str
    us: float
    torch_us: float
    """F.cross_entropy(label_smoothing=0.1), forward and backward, in the same turns."""
    over_torch: float
    """Median of the turns' ratios."""
    over_operator: float
    """Over the same call by its operator, through torch's dispatcher."""


def _not_run(*arguments: Any, **options: Any) -> None:
    """In the place of Triton's launch. A mock would take 50 us."""


@contextmanager
def kernels_left_out() -> Iterator[None]:
    """Within, CPU tensors take the way of a GPU's, up to the launch."""
    with (
        mock.patch.object(_launch, "INTERPRETED", True),
        mock.patch.object(JITFunction, "run", _not_run),
    ):
        yield


_NO_DEVICE = 1 << 20
"""The number of the device that is not there: a kernel keeps its machine code by device, and a GPU's stays apart."""


class Launches(NamedTuple):
    """Names of kernels, in order."""

    compiled: list[str]
    """Each time that one was compiled, or its code was read from Triton's cache on the disk."""
    started: list[str]


class _Driver:
    """Triton's driver of a GPU that is not there: code is compiled for it, and neither loaded nor started."""

    def __init__(self, arch: int) -> None:
        self.launches = Launches([], [])
        self.kernels: set[JITFunction] = set()
        self.utils = self
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return _NO_DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 1 << 16}

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None: ...

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        name = source.fn.fn.__name__
        self.kernels.add(source.fn)
        self.launches.compiled.append(name)
        return lambda *arguments: self.launches.started.append(name)


@contextmanager
def launched_nowhere(arch: int = 90) -> Iterator[Launches]:
    """Within, CPU tensors take the way of a GPU's, through Triton's own launch: its binder, cache, and compiler for sm_`arch`.

    Only the last call, of the driver, is left out.
    """
    pretended = _Driver(arch)
    with mock.patch.object(_launch, "INTERPRETED", True), mock.patch.object(driver, "_active", pretended):
        try:
            yield pretended.launches
        finally:
            for kernel in pretended.kernels:
                kernel.device_caches.pop(_NO_DEVICE, None)


def works() -> dict[str, Work]:
    """The calls; torch's own last."""
    logits, teacher = torch.randn(2, 10, requires_grad=True), torch.randn(2, 10)
    a, b = torch.tensor([[1, 2], [2, 1]])
    images, reverse = torch.zeros(4, 3, 8, 8), torch.arange(3, -1, -1)
    decoded, matrix = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, 3, 4)
    pair: dict[str, Any] = {"label_smoothing": 0.1, "target_b": b, "lam": 0.3}

    def both(loss: Callable[[], Tensor]) -> Work:
        def passes() -> None:
            logits.grad = None
            loss().backward()

        return passes

    def dense() -> Tensor:
        target = 0.3 * F.one_hot(a, 10).float() + 0.7 * F.one_hot(b, 10).float()
        return F.cross_entropy(logits, target, label_smoothing=0.1)

    return {
        "cross_entropy, one label": both(lambda: cross_entropy(logits, a, label_smoothing=0.1)),
        "cross_entropy, mixup's pair": both(lambda: cross_entropy(logits, a, **pair)),
        "cross_entropy, pair, ignore_index=None": both(lambda: cross_entropy(logits, a, ignore_index=None, **pair)),
        "distillation_loss": both(lambda: distillation_loss(logits, teacher, a, label_smoothing=0.1)),
        "cross_entropy_loss_and_grad, pair": lambda: cross_entropy_loss_and_grad(logits, a, **pair),
        "mixup, forward": lambda: mixup(images, reverse, 0.3, pairs=True),
        "augment, forward": lambda: augment(decoded, matrix),
        "F.cross_entropy, dense targets of the pair": both(dense),
        "F.cross_entropy, no smoothing": both(lambda: F.cross_entropy(logits, a)),
        "F.cross_entropy": both(lambda: F.cross_entropy(logits, a, label_smoothing=0.1)),
    }


def host_times(turns: int) -> list[HostTime]:
    """All of works(), in alternation."""
    _checks.check_count("turns", turns, least=1)
    torch.set_num_threads(1)
    contestants = works()
    torchs = contestants["F.cross_entropy"]
    found = []
    with kernels_left_out():
        for name, work in contestants.items():
            ways = partial(_seconds, work), partial(_seconds, torchs), partial(_through_the_dispatcher, work)
            rows = []
            orders = cycle(permutations(range(len(ways))))  # the code that ran before is still in the cache
            for order in islice(orders, turns + WARM_UP):
                taken = {way: ways[way]() for way in order}
                rows.append((taken[0], taken[1], taken[0] / taken[1], taken[0] / taken[2]))
            ours, theirs, over_torch, over_operator = (statistics.median(x) for x in zip(*rows[WARM_UP:], strict=True))
            found.append(HostTime(name, ours * 1e6, theirs * 1e6, over_torch, over_operator))
    return found


def _through_the_dispatcher(work: Work) -> float:
    keys = _direct.OTHER_THREAD_KEYS
    _direct.OTHER_THREAD_KEYS = -1  # as a thread in which something watches every call
    try:
        return _seconds(work)
    finally:
        _direct.OTHER_THREAD_KEYS = keys


def _seconds(work: Work) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=301)
    print("| call, 2 x 10 | host, us | F.cross_entropy, us | ratio | over its operator's |\n|---|---|---|---|---|")
    for row in host_times(parser.parse_args().turns):
        over_operator = "" if row.name.startswith("F.") else f"{row.over_operator:.2f}"
        print(f"| {row.name} | {row.us:.0f} | {row.torch_us:.0f} | {row.over_torch:.2f} | {over_operator} |")


if __name__ == "__main__":
    main()
