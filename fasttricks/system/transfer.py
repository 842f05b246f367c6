"""Tensors on their way to the device."""

from __future__ import annotations

from torch import Tensor, device


def to_device(values: Tensor, place: device) -> Tensor:
    """`values`, of the host, on the device. No sync: the host does not wait for the copy."""
    return values.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else values
