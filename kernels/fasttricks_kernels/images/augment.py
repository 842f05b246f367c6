"""Colour augmentation, normalisation, flip and mixup of decoded images, in one pass: uint8 HWC in, network input out.

Each colour step of the paper is affine in RGB, so together with the normalisation they are one 3x4 matrix an image:
color.py makes it.

Shape suffixes: N images, H rows, W columns, P pixels of a program; in a matrix, 3 x 4: row of the output channel,
columns of the input's R, G, B and 1.
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
from .._transforms import transformed
from .mixup import check_transformed, partner_of, share_of

BLOCK = 2048  # pixels of an image a program takes
OUTPUTS = (torch.float16, torch.bfloat16, torch.float32)

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit
def coloured(images_ptr, matrix_ptr, flip_ptr, image, pixel_P, live_P, H: tl.constexpr, W: tl.constexpr):
    """The three output channels of an image's pixels, float32: matrix (r, g, b, 1), from the mirrored column if flipped.

    Three loads of one byte with a stride of 3: every byte is asked for once, and neighbouring lanes share sectors.
    """
    source_P = pixel_P
    if flip_ptr is not None:
        mirrored_P = pixel_P // W * W + (W - 1 - pixel_P % W)
        source_P = tl.where(tl.load(flip_ptr + image) != 0, mirrored_P, pixel_P)
    pixel_ptr = images_ptr + image.to(tl.int64) * (H * W * 3) + source_P * 3
    r_P = tl.load(pixel_ptr, mask=live_P, other=0).to(tl.float32)
    g_P = tl.load(pixel_ptr + 1, mask=live_P, other=0).to(tl.float32)
    b_P = tl.load(pixel_ptr + 2, mask=live_P, other=0).to(tl.float32)
    m = matrix_ptr + image * 12
    red_P = tl.load(m) * r_P + tl.load(m + 1) * g_P + tl.load(m + 2) * b_P + tl.load(m + 3)
    green_P = tl.load(m + 4) * r_P + tl.load(m + 5) * g_P + tl.load(m + 6) * b_P + tl.load(m + 7)
    blue_P = tl.load(m + 8) * r_P + tl.load(m + 9) * g_P + tl.load(m + 10) * b_P + tl.load(m + 11)
    return red_P, green_P, blue_P


@triton.jit
def store_blend(out_ptr, image, pixel_P, live_P, share, a_P, b_P, channel: tl.constexpr, PIXELS: tl.constexpr):
    mixed_P = share * a_P + (1 - share) * b_P
    pointer_P = out_ptr + image.to(tl.int64) * (PIXELS * 3) + pixel_P * 3 + channel
    tl.store(pointer_P, mixed_P.to(out_ptr.dtype.element_ty), mask=live_P)


@triton.jit(do_not_specialize=["N"])
def augment_kernel(
    images_ptr,
    matrix_ptr,
    flip_ptr,
    permutation_ptr,
    lam_ptr,
    out_ptr,
    N,
    lam,
    H: tl.constexpr,
    W: tl.constexpr,
    LAM_STRIDE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK pixels of one image, blended with its partner's if there is a permutation; under PAIRS, both ways."""
    image = tl.program_id(1)
    pixel_P = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live_P = pixel_P < H * W
    if permutation_ptr is None:
        red_P, green_P, blue_P = coloured(images_ptr, matrix_ptr, flip_ptr, image, pixel_P, live_P, H, W)
        store_blend(out_ptr, image, pixel_P, live_P, 1.0, red_P, 0.0, 0, H * W)
        store_blend(out_ptr, image, pixel_P, live_P, 1.0, green_P, 0.0, 1, H * W)
        store_blend(out_ptr, image, pixel_P, live_P, 1.0, blue_P, 0.0, 2, H * W)
    else:
        partner, good = partner_of(permutation_ptr, image, N, PAIRS)
        partner = partner.to(tl.int32)
        if PAIRS:  # the lower of the two blends both
            works = (partner >= image) | (good == 0)
        else:
            works = True
        if works:
            red_P, green_P, blue_P = coloured(images_ptr, matrix_ptr, flip_ptr, image, pixel_P, live_P, H, W)
            red2_P, green2_P, blue2_P = coloured(
                images_ptr, matrix_ptr, flip_ptr, partner, pixel_P, live_P & (partner != image), H, W
            )
            if partner == image:
                red2_P, green2_P, blue2_P = red_P, green_P, blue_P
            share = tl.where(good, share_of(lam_ptr, lam, image, LAM_STRIDE), float("nan"))
            store_blend(out_ptr, image, pixel_P, live_P, share, red_P, red2_P, 0, H * W)
            store_blend(out_ptr, image, pixel_P, live_P, share, green_P, green2_P, 1, H * W)
            store_blend(out_ptr, image, pixel_P, live_P, share, blue_P, blue2_P, 2, H * W)
            if PAIRS:
                share = share_of(lam_ptr, lam, partner, LAM_STRIDE)
                also_P = live_P & (partner != image) & good
                store_blend(out_ptr, partner, pixel_P, also_P, share, red2_P, red_P, 0, H * W)
                store_blend(out_ptr, partner, pixel_P, also_P, share, green2_P, green_P, 1, H * W)
                store_blend(out_ptr, partner, pixel_P, also_P, share, blue2_P, blue_P, 2, H * W)


# ---------------------------------------------------------------------------------------------------------- launch


def launch_augment(
    images_NHW3: Tensor,
    matrix_N34: Tensor,
    flip_N: Optional[Tensor],
    permutation_N: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    pairs: bool,
    dtype: torch.dtype,
) -> Tensor:
    """(N, 3, H, W) in channels-last memory."""
    num_images, height, width, _ = images_NHW3.shape
    out = torch.empty(num_images, height, width, 3, dtype=dtype, device=images_NHW3.device)
    if out.numel():
        with on_device_of(images_NHW3):
            augment_kernel[(triton.cdiv(height * width, BLOCK), num_images)](
                images_NHW3.contiguous(),
                matrix_N34.contiguous(),
                None if flip_N is None else flip_N.contiguous(),
                None if permutation_N is None else permutation_N.contiguous(),
                lam_N,
                out,
                num_images,
                lam,
                H=height,
                W=width,
                LAM_STRIDE=broadcast_stride(lam_N),
                PAIRS=pairs,
                BLOCK=BLOCK,
                num_warps=8,
                **PINNED,
            )
    return out.permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------------ custom ops
# No autograd: the input is uint8, and the matrix is drawn.


def _colour_and_blend(
    images: Tensor,
    matrix: Tensor,
    flip: Optional[Tensor],
    permutation: Optional[Tensor],
    lam_N: Optional[Tensor],
    lam: float,
    pairs: bool,
    dtype: torch.dtype,
) -> Tensor:
    if runs_triton(images):
        return launch_augment(images, matrix, flip, permutation, lam_N, lam, pairs, dtype)
    if permutation is not None:
        _checks.check_permutation_values(permutation, lam_N, pairs)
    return reference.augment(images, matrix, flip, permutation, lam if lam_N is None else lam_N, dtype)


_augment = torch.library.custom_op(f"{NAMESPACE}::augment", _colour_and_blend, mutates_args=())
_either = past_dispatcher(_augment, _colour_and_blend)


@_augment.register_fake
def _(images, matrix, flip, permutation, lam_N, lam, pairs, dtype) -> Tensor:
    num_images, height, width, _ = images.shape
    return images.new_empty(num_images, height, width, 3, dtype=dtype).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------------ public functions


def augment(
    images: Tensor,
    matrix: Tensor,
    *,
    flip: Optional[Tensor] = None,
    permutation: Optional[Tensor] = None,
    lam: "Tensor | float | None" = None,
    pairs: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Colour, normalise, flip and blend decoded images in one pass.

        pixel_n = matrix_n (r, g, b, 1), mirrored if flip_n;   out_n = lam pixel_n + (1 - lam) pixel_permutation[n]

    Args:
        images: (N, H, W, 3) uint8, RGB, 0 to 255; not modified.
        matrix: (N, 3, 4) float32, from `color_matrix` or `random_color_matrix`; normalisation included.
        flip: (N,) bool or uint8: mirror the image left to right.
        permutation, lam, pairs: mixup's partner, its weight, and whether partners point at each other, as in `mixup`.
            Partners are augmented by their own matrix and flip. Together or not at all.
        dtype: dtype of the result: float16, bfloat16 or float32. Arithmetic is float32, rounded once; nothing is clipped.

    Returns:
        (N, 3, H, W) in channels-last memory.

    Raises: TypeError, ValueError: a wrong dtype, shape, device or range; see `mixup` for values on a GPU.

    Costs: one launch, no sync; 3 bytes a pixel read and 6 (FP16) written, the floor; with a permutation not given as
    pairs 3 bytes more, which a cache may serve. Deterministic.

    Source: He et al. 2018 (arXiv:1812.01187), sections 2.1 and 5.4. Oracle: reference.augment, and NumPy in float64.
    """
    for name, tensor in (("images", images), ("matrix", matrix), ("flip", flip)):
        if name != "flip" or tensor is not None:
            _checks.check_tensor(name, tensor)
    if images.dim() != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (N, H, W, 3), the channels last, but have shape {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, not {images.dtype}")
    if dtype not in OUTPUTS:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, not {dtype}")
    if matrix.shape != (images.shape[0], 3, 4) or matrix.dtype != torch.float32:
        raise ValueError(
            f"matrix must be ({images.shape[0]}, 3, 4) float32, one an image, but is "
            f"{tuple(matrix.shape)} {matrix.dtype}; torch.from_numpy(m).float() converts"
        )
    _checks.check_device("matrix", matrix, "images", images)
    if flip is not None:
        if flip.shape != images.shape[:1] or flip.dtype not in (torch.bool, torch.uint8):
            raise ValueError(
                f"flip must be ({images.shape[0]},) bool or uint8, but is {tuple(flip.shape)} {flip.dtype}"
            )
        _checks.check_device("flip", flip, "images", images)
    if (permutation is None) != (lam is None):
        raise ValueError(f"permutation and lam come together, but {'lam' if lam is None else 'permutation'} is None")
    if permutation is not None and lam is not None:
        _checks.check_permutation(permutation, images)
        _checks.check_lam(lam, images.shape[0], "images", images)
    if transformed(images, matrix, flip, permutation, lam):
        if permutation is not None:
            check_transformed(permutation, lam, pairs)
        return reference.augment(images, matrix, flip, permutation, 1.0 if lam is None else lam, dtype)
    if permutation is None or lam is None:
        return _either(images, matrix, flip, None, None, 1.0, False, dtype)
    if isinstance(lam, Tensor):
        return _either(images, matrix, flip, permutation, lam, 1.0, pairs, dtype)
    return _either(images, matrix, flip, permutation, None, float(lam), pairs, dtype)
