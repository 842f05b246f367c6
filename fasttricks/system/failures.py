"""The cause of a RuntimeError: torch, NCCL and DALI raise the same kind for a lost rank, a failed card and a bad argument."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

_LOST = (
    *("timed out", "timing out", "timeout"),
    *("connection closed", "connection was likely closed", "connection reset", "connection refused", "broken pipe"),
    *("remote process exiting", "remote process exited", "remote peer closed", "communicator was aborted"),
)
"""Words of torch's store, gloo and NCCL, which gives the system's own after its `Last error`."""
_SETTING = re.compile(r"timeout\(ms\)=\d+")
"""In the description of any NCCL operation: the limit, which says nothing of whether it was reached."""
_CARD = (
    *("cuda error", "cuda out of memory", "cuda failure", "unhandled cuda error", "cudnn error", "cudnn_status"),
    *("cuda runtime api error", "cuda driver api error", "cuda allocation failed"),
)
"""Words of torch, NCCL and DALI."""


def card_failed(error: BaseException) -> bool:
    """Whether `error` is of this rank's own card: no memory there, an access that is not allowed, a kernel that failed."""
    kinds = (torch.AcceleratorError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(words in str(error).lower() for words in _CARD)


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed with `error` because another rank ended, or hung for longer than the timeout.

    A card's failure is none, though the card's own watchdog says `the launch timed out`.
    """
    if isinstance(error, dist.DistNetworkError):
        return True
    said = _SETTING.sub("", str(error).lower())
    return not card_failed(error) and any(words in said for words in _LOST)
