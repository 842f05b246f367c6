"""Memory of DALI's that torch's kernels read: kept from DALI until they have read it."""

from __future__ import annotations

import contextlib
from collections import deque

import torch
from torch import Tensor


# DALI 2.4 frees an output in the order of its own stream (include/dali/core/mm/memory.h, AsyncDeleter.release_on_stream), and its
# next operator may write there at once (async_pool.h, try_allocate). release_outputs() does nothing under the dynamic executor,
# and __dlpack__() has torch's stream wait for DALI's, not DALI's for torch's (dltensor.h, GetSharedDLTensor keeps that deleter).
# So a reference has to outlive the kernels; DALI's own iterator leaves that to its user.
class Lent:
    """Tensors in DALI's memory, each until torch's stream has done all that it was given before the tensor was held."""

    def __init__(self) -> None:
        self._held: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def hold(self, tensor: Tensor) -> None:
        """Keep `tensor`, and let go of those that have been read. No sync.

        On the CPU nothing: an operator ends there before it returns.
        """
        if tensor.device.type != "cuda":
            return
        while self._held and self._held[0][0].query():  # type: ignore[no-untyped-call]
            self._held.popleft()
        read = torch.cuda.Event()  # type: ignore[no-untyped-call]
        read.record(torch.cuda.current_stream(tensor.device))
        self._held.append((read, tensor))

    def __del__(self) -> None:
        """The memory outlives its pipeline: another one takes it from the same pool."""
        with contextlib.suppress(RuntimeError):  # a card that has failed, which the next operation says
            for read, _ in self._held:
                read.synchronize()
