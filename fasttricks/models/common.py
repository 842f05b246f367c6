"""Shared by the networks: rounded channel counts, and the paper's initial weights."""

from __future__ import annotations

from torch import nn


def scaled(channels: int, width: float) -> int:
    """channels x width as a multiple of 8 (half rounds up), at least 8, which suits vector units and tensor cores."""
    return max(8, int(channels * width / 8 + 0.5) * 8)


def xavier_(model: nn.Module) -> None:
    """Initial weights as in section 2.1, in place: U[-a, a], a = sqrt(6 / (d_in + d_out)); biases 0; gamma 1, beta 0.

    d_in is the channels that an output sees (1 of a depthwise convolution), d_out the output channels, both times kernel
    area, as the authors' MXNet has them; gamma and beta are as torch makes them. Draws from torch's global generator.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
