"""Tensors on their way to the device, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, device


def to_device(values: Tensor, place: device) -> Tensor:
    """`values`, of the host, on the device. No sync: the host does not wait for the copy."""
    return values.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else values


def to_host(state: Any) -> Any:
    """`state`, a nest of dicts and lists, with every tensor on the host; those that are there already are not copied. A sync."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {name: to_host(value) for name, value in state.items()}
    return [to_host(value) for value in state] if isinstance(state, list) else state
