"""GPUs on paper: memory, peak rates and links as the vendor's data sheets give them. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fasttricks.config import ConfigError, Precision, unknown


@dataclass(frozen=True)
class Card:
    """One GPU of a node of eight."""

    memory_gib: int
    peak_flops: Mapping[Precision, float]
    """FLOP/s of dense matrix products in the format that convolutions use at each precision; unsupported ones are absent."""
    memory_bandwidth: float
    """Bytes/s of its own memory."""
    link_bandwidth: float
    """Bytes/s of `link` each way: half of the data sheets' figure, which is the sum of both ways."""
    link: str = "NVLink"
    """Connection between the GPUs of a node."""
    tf32: bool = False
    """Whether fp32 above is TF32, which torch has cuDNN's convolutions use unless told otherwise."""


# Data sheets of the SXM form: "NVIDIA V100 Tensor Core GPU" (2020), "NVIDIA A100 Tensor Core GPU" (2022), "NVIDIA H100 Tensor
# Core GPU" (2022), "NVIDIA H200 Tensor Core GPU" (2024), "NVIDIA DGX B200" and "NVIDIA HGX B200" (2024; an eighth of each
# figure); and "NVIDIA L4 Tensor Core GPU" (2023). White papers: "NVIDIA Turing GPU Architecture" (2018) for the T4, "NVIDIA
# Ada GPU Architecture" (2022) for the RTX 4090, whose rates are with FP32 accumulation. All rates are without sparsity: half
# of the figures in the data sheets of L4, H100, H200 and B200. Without TF32 the A100 does 19.5e12, H100 and H200 67e12, B200
# 80e12, L4 30.3e12, and the RTX 4090 the same.
_V100: dict[Precision, float] = {"fp32": 15.7e12, "fp16": 125e12}
_T4: dict[Precision, float] = {"fp32": 8.1e12, "fp16": 65e12}
_A100: dict[Precision, float] = {"fp32": 156e12, "bf16": 312e12, "fp16": 312e12}
_H100: dict[Precision, float] = {"fp32": 494.5e12, "bf16": 989e12, "fp16": 989e12}
_B200: dict[Precision, float] = {"fp32": 1.1e15, "bf16": 2.25e15, "fp16": 2.25e15}
_L4: dict[Precision, float] = {"fp32": 60e12, "bf16": 121e12, "fp16": 121e12}
_RTX4090: dict[Precision, float] = {"fp32": 82.6e12, "bf16": 165.2e12, "fp16": 165.2e12}
# PCI Express, 16 lanes: 8 GT/s a lane in 3.0, 16 GT/s in 4.0, with 128 of 130 bits for data
_PCIE3, _PCIE4 = 15.75e9, 31.5e9

CARDS = {
    "v100": Card(16, _V100, memory_bandwidth=900e9, link_bandwidth=150e9),
    "v100-32gb": Card(32, _V100, memory_bandwidth=900e9, link_bandwidth=150e9),
    "t4": Card(16, _T4, memory_bandwidth=320e9, link_bandwidth=_PCIE3, link="PCIe 3.0"),
    "a100": Card(40, _A100, memory_bandwidth=1555e9, link_bandwidth=300e9, tf32=True),
    "a100-80gb": Card(80, _A100, memory_bandwidth=2039e9, link_bandwidth=300e9, tf32=True),
    "l4": Card(24, _L4, memory_bandwidth=300e9, link_bandwidth=_PCIE4, link="PCIe 4.0", tf32=True),
    "rtx4090": Card(24, _RTX4090, memory_bandwidth=1008e9, link_bandwidth=_PCIE4, link="PCIe 4.0", tf32=True),
    "h100": Card(80, _H100, memory_bandwidth=3350e9, link_bandwidth=450e9, tf32=True),
    "h200": Card(141, _H100, memory_bandwidth=4800e9, link_bandwidth=450e9, tf32=True),
    "b200": Card(180, _B200, memory_bandwidth=8000e9, link_bandwidth=900e9, tf32=True),
}


def find_card(name: str) -> Card:
    """The card called `name`. Raises ConfigError with the nearest right name."""
    if name in CARDS:
        return CARDS[name]
    raise ConfigError(f"gpu = {name!r}: {unknown(name.lower(), CARDS)}; the cards are {', '.join(CARDS)}")
