"""Fused training kernels: losses, mixup, augmentation and SGD. Needs torch, triton and numpy; no GPU to import."""

from .cross_entropy import cross_entropy
from .mixup import mixup

__all__ = ["cross_entropy", "mixup"]
