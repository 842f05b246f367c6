"""GPUs on paper: memory, peak rates and links as the vendor's data sheets give them. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fasttricks.config import ConfigError, Precision, unknown


@dataclass(frozen=True)
class Card:
    """One GPU of a node of eight, joined by NVLink."""

    memory_gib: int
    peak_flops: Mapping[Precision, float]
    """FLOP/s of dense matrix products in the format that convolutions use at each precision; unsupported ones are absent."""
    memory_bandwidth: float
    """Bytes/s of its own memory."""
    link_bandwidth: float
    """Bytes/s of NVLink each way: half of the data sheets' figure, which is the sum of both ways."""
    tf32: bool = False
    """Whether fp32 above is TF32, which torch has cuDNN's convolutions use unless told otherwise."""


# Data sheets: "NVIDIA V100 Tensor Core GPU" (2020), "NVIDIA A100 Tensor Core GPU" (2022), "NVIDIA H100 Tensor Core GPU" (2022),
# each in its SXM form; rates without sparsity, so half of the H100 sheet's.
# Without TF32 the A100 does 19.5e12, the H100 67e12.
_V100: dict[Precision, float] = {"fp32": 15.7e12, "fp16": 125e12}
_A100: dict[Precision, float] = {"fp32": 156e12, "bf16": 312e12, "fp16": 312e12}
_H100: dict[Precision, float] = {"fp32": 494.5e12, "bf16": 989e12, "fp16": 989e12}

CARDS = {
    "v100": Card(16, _V100, memory_bandwidth=900e9, link_bandwidth=150e9),
    "v100-32gb": Card(32, _V100, memory_bandwidth=900e9, link_bandwidth=150e9),
    "a100": Card(40, _A100, memory_bandwidth=1555e9, link_bandwidth=300e9, tf32=True),
    "a100-80gb": Card(80, _A100, memory_bandwidth=2039e9, link_bandwidth=300e9, tf32=True),
    "h100": Card(80, _H100, memory_bandwidth=3350e9, link_bandwidth=450e9, tf32=True),
}


def find_card(name: str) -> Card:
    """The card called `name`. Raises ConfigError with the nearest right name."""
    if name in CARDS:
        return CARDS[name]
    raise ConfigError(f"gpu = {name!r}: {unknown(name.lower(), CARDS)}; the cards are {', '.join(CARDS)}")
