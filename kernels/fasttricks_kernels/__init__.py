"""Fused training kernels: losses, mixup, augmentation, batch norm and SGD. Needs torch, triton and numpy; no GPU to import.

Public beside the names below: `native` (C compiled at first use), `reference` (the maths in plain PyTorch), `images.color`
(the published constants too) and `proof` (machine code and bytes, without a GPU). A name with an underscore may change.
"""

from .images.augment import augment
from .images.color import color_matrix, random_color_matrix
from .images.mixup import mixup
from .losses._cpu import losses_compiled
from .losses.cross_entropy import CrossEntropyLoss, cross_entropy, cross_entropy_loss_and_grad
from .losses.distillation import DistillationLoss, distillation_loss, distillation_loss_and_grad
from .norm._cpu import batch_norm_compiled
from .norm.batch_norm_act import batch_norm_act
from .optim.master import MasterSGD
from .optim.sgd import overflow, sgd_step

__version__ = "0.1.0"
"""That of the distribution `fasttricks`, which holds this package."""

__all__ = [
    "CrossEntropyLoss",
    "DistillationLoss",
    "MasterSGD",
    "augment",
    "batch_norm_act",
    "batch_norm_compiled",
    "color_matrix",
    "cross_entropy",
    "cross_entropy_loss_and_grad",
    "distillation_loss",
    "distillation_loss_and_grad",
    "losses_compiled",
    "mixup",
    "overflow",
    "random_color_matrix",
    "sgd_step",
]
