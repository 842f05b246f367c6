"""Mixup: each image blended with a partner from the same batch, in one pass.

Two forms. Any permutation: every image is read twice, once as itself and once as a partner (a cache may serve the
second read). A permutation that is its own inverse, such as the reversed batch: partners are blended together, and
every image is read once and written once, which is the floor.

Shape suffixes: N images, M elements an image; in device code B lanes.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr, and torch.library the schema, from annotations.
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, reference
from .._direct import past_dispatcher
from .._launch import NAMESPACE, PINNED, broadcast_stride, on_device_of, runs_triton
from .._transforms import transformed, untransformed

BLOCK = 2048  # elements of an image a program takes: 16 bytes a lane in FP16, twice that in FP32, at 8 warps

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit
def share_of(lam_ptr, lam, image, LAM_STRIDE: tl.constexpr):
    """The image's lam, NaN where it is out of range."""
    if lam_ptr is not None:
        lam = tl.load(lam_ptr + image.to(tl.int64) * LAM_STRIDE).to(tl.float32)
    return tl.where((lam >= 0) & (lam <= 1), lam, float("nan"))


@triton.jit
def partner_of(permutation_ptr, image, N, PAIRS: tl.constexpr):
    """The image's partner and whether it is a good one: in range, and under PAIRS one that points back. A bad one: itself."""
    partner = tl.load(permutation_ptr + image)
    good = (partner >= 0) & (partner < N)
    partner = tl.where(good, partner, image)
    if PAIRS:
        good = good & (tl.load(permutation_ptr + partner) == image)
    return partner, good


@triton.jit(do_not_specialize=["N"])
def mixup_kernel(
    images_ptr,
    permutation_ptr,
    lam_ptr,
    mixed_ptr,
    N,
    lam,
    M: tl.constexpr,
    LAM_STRIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK elements of one image, and under PAIRS of its partner too. A bad partner makes the image NaN."""
    image = tl.program_id(1)
    partner, good = partner_of(permutation_ptr, image, N, PAIRS)
    if PAIRS:  # the lower of the two blends both
        works = (partner >= image) | (good == 0)
    else:
        works = True
    if works:
        lane_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live_B = lane_B < M
        image_offset = image.to(tl.int64) * M
        partner_offset = partner.to(tl.int64) * M
        a_B = tl.load(images_ptr + image_offset + lane_B, mask=live_B).to(tl.float32)
        b_B = tl.load(images_ptr + partner_offset + lane_B, mask=live_B & (partner != image), other=0.0).to(tl.float32)
        b_B = tl.where(partner == image, a_B, b_B)
        share = tl.where(good, share_of(lam_ptr, lam, image, LAM_STRIDE), float("nan"))
        mixed_B = share * a_B + (1 - share) * b_B
        tl.store(mixed_ptr + image_offset + lane_B, mixed_B.to(mixed_ptr.dtype.element_ty), mask=live_B)
        if PAIRS:
            share = share_of(lam_ptr, lam, partner, LAM_STRIDE)
            mixed_B = share * b_B + (1 - share) * a_B
            also = live_B & (partner != image) & good
            tl.store(mixed_ptr + partner_offset + lane_B, mixed_B.to(mixed_ptr.dtype.element_ty), mask=also)


# ---------------------------------------------------------------------------------------------------------- launch


def launch_mixup(
    images_NCHW: Tensor, permutation_N: Tensor, lam_N: Optional[Tensor], lam: float, pairs: bool
) -> Tensor:
    images_NCHW = dense_images(images_NCHW)
    mixed_NCHW = torch.empty_like(images_NCHW)
    if images_NCHW.numel() == 0:
        return mixed_NCHW
    num_images, num_elements = images_NCHW.shape[0], images_NCHW[0].numel()
    with on_device_of(images_NCHW):
        mixup_kernel[(triton.cdiv(num_elements, BLOCK), num_images)](
            images_NCHW,
            permutation_N.contiguous(),
            lam_N,
            mixed_NCHW,
            num_images,
            lam,
            M=num_elements,
            LAM_STRIDE=broadcast_stride(lam_N),
            PAIRS=pairs,
            BLOCK=BLOCK,
            num_warps=8,
            **PINNED,
        )
    return mixed_NCHW


def dense_images(images_NCHW: Tensor) -> Tensor:
    """The images as they lie, if each is one dense run of memory, NCHW or channels-last; a copy if not."""
    if images_NCHW.is_contiguous() or images_NCHW.is_contiguous(memory_format=torch.channels_last):
        return images_NCHW
    return images_NCHW.contiguous()


# ------------------------------------------------------------------------------------------------------ torch.func


def check_transformed(permutation: Tensor, lam: "Tensor | float | None", pairs: bool) -> None:
    """_checks.check_permutation_values() under torch.func's transforms, of each permutation that vmap hides."""
    if not permutation.is_cpu or torch.compiler.is_compiling():
        return
    _checks.check_lam_values(untransformed(lam) if isinstance(lam, Tensor) else None)
    every = torch.arange(len(permutation))
    if not untransformed((permutation.long().sort().values == every).all()).all():
        raise ValueError(
            f"permutation must hold each of 0 .. {len(every) - 1} once, but does not in each call under vmap"
        )
    if pairs and not untransformed((permutation[permutation.long()] == every).all()).all():
        raise ValueError("pairs=True needs permutations that are their own inverses; pass pairs=False")


# ------------------------------------------------------------------------------------------------------ custom ops


def _blend(images: Tensor, permutation: Tensor, lam_N: Optional[Tensor], lam: float, pairs: bool) -> Tensor:
    if runs_triton(images):
        return launch_mixup(images, permutation, lam_N, lam, pairs)
    _checks.check_permutation_values(permutation, lam_N, pairs)
    return reference.mixup(dense_images(images), permutation, lam if lam_N is None else lam_N)


_mixup = torch.library.custom_op(f"{NAMESPACE}::mixup", _blend, mutates_args=())


@_mixup.register_fake
def _(images: Tensor, permutation: Tensor, lam_N: Optional[Tensor], lam: float, pairs: bool) -> Tensor:
    return torch.empty_like(dense_images(images))


# -------------------------------------------------------------------------------------------------------- autograd


def _save(ctx, inputs, output) -> None:
    _, permutation, lam_N, ctx.lam, _ = inputs
    ctx.save_for_backward(permutation, lam_N)


def _vjp(ctx, grad: Tensor):
    """An image's gradient comes from itself and from the one image that it was the partner of."""
    permutation, lam_N = ctx.saved_tensors
    share = ctx.lam if lam_N is None else lam_N.to(reference.wide_dtype(grad.dtype))
    if lam_N is not None and lam_N.dim():
        share = share[:, None, None, None]
    grad_NCHW = reference.wide(grad)
    back_N = permutation.argsort()
    mixed = share * grad_NCHW + ((1 - share) * grad_NCHW)[back_N]
    return mixed.to(grad.dtype), None, None, None, None


_mixup.register_autograd(_vjp, setup_context=_save)
_either = past_dispatcher(_mixup, _blend)

# ------------------------------------------------------------------------------------------------ public functions


def mixup(images: Tensor, permutation: Tensor, lam: "Tensor | float", *, pairs: bool = False) -> Tensor:
    """Blend each image with its partner: lam images + (1 - lam) images[permutation], rounded once.

    Args:
        images: (N, C, H, W) float16, bfloat16, float32 or float64, NCHW or channels-last; not modified. Other
            layouts are copied first.
        permutation: (N,) int64 or int32, each of 0 .. N - 1 once: the partner of each image.
        lam: weight of the image itself, in [0, 1]: a number, a () tensor, or (N,) for one an image. No gradient
            flows to it.
        pairs: the permutation is its own inverse (permutation[permutation[n]] == n), as `arange(N).flip(0)` is: each
            pair is blended together, each image read once instead of twice.

    Returns:
        The blended images, in the images' shape, dtype and memory format. Labels are not blended: pass both, and lam,
        to `cross_entropy`.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or range. An error in a tensor's values (not
            a permutation, no inverse of itself under `pairs`, lam outside [0, 1]) is an error on the CPU; on CUDA the
            image becomes NaN, without a sync. A repeated partner is not looked for there.

    Costs: one launch, no sync. Bytes an image of E bytes: 2 E with `pairs` (the floor), else 3 E of which a cache may
    serve one. Deterministic. Differentiable in images; where no gradient is asked for, an eager call launches directly.

    Source: He et al. 2018 (arXiv:1812.01187), section 5.4; Zhang et al. 2017 (arXiv:1710.09412). Oracle:
    reference.mixup, and NumPy in float64.
    """
    _checks.check_tensor("images", images)
    if images.dim() != 4:
        raise ValueError(f"images must be (N, C, H, W), but have shape {tuple(images.shape)}")
    if images.dtype not in _checks.FLOATS:
        raise TypeError(
            f"images must be float16, bfloat16, float32 or float64, not {images.dtype}; uint8 images are for augment()"
        )
    _checks.check_permutation(permutation, images)
    _checks.check_lam(lam, images.shape[0], "images", images)
    if transformed(images, permutation, lam):
        check_transformed(permutation, lam, pairs)
        return reference.mixup(images, permutation, lam)
    if isinstance(lam, Tensor):
        return _either(images, permutation, lam, 1.0, pairs)
    return _either(images, permutation, None, float(lam), pairs)
