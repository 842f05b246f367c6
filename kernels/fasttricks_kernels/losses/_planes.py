"""Cross-entropy of planes, (N, K, P) logits with (N, P) labels: consecutive lanes are pixels, and a pixel's classes lie P apart.

Shape suffixes: N images, K classes, P pixels, of a program in device code; C classes of a chunk.
"""

# No `from __future__ import annotations`: Triton reads tl.constexpr from annotations.
import functools
import math
from typing import Any, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._launch import PINNED, WIDEST_BYTES, on_device_of
from ._options import Labels
from ._rows import label_and_weight, load_weights, packed, store_label_weight, unpacked

HELD_CLASSES = 160  # in registers; more are read again
FEW_CLASSES = 64  # held by 4 warps for 128 pixels, more by 8 for 64: with more in a thread, programs spill

# ----------------------------------------------------------------------------------------------------- device code


@triton.jit
def load_chunk(plane_ptr, class_C, pixel_P, size, K: tl.constexpr):
    """[C, P] values in their dtype, -inf outside the plane."""
    inside_CP = (class_C < K)[:, None] & (pixel_P < size)[None, :]
    offset_CP = (class_C.to(tl.int64) * size)[:, None] + pixel_P[None, :]
    return tl.load(plane_ptr + offset_CP, mask=inside_CP, other=float("-inf"))


@triton.jit(do_not_specialize=["groups", "blocks"])
def planes_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    device_scale_ptr,
    loss_ptr,
    grad_ptr,
    label_weight_ptr,
    groups,
    blocks,
    uniform,
    host_scale,
    SPREAD: tl.constexpr,
    IGNORE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    K: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    HELD: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Loss and scaled gradient of PIXELS pixels of an image; an output or an option whose pointer is None is compiled away.

    A plane has groups * GROUP pixels: so the compiler sees that GROUP divides the distance of two classes.
    """
    size = groups * GROUP
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel_P = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)
    live_P = pixel_P < size
    first = image * size
    logits_ptr += first * K
    kept_P = tl.full([PIXELS], 1.0, tl.float32)
    label_P, kept_P = label_and_weight(target_ptr + first, kept_P, pixel_P, size, K, IGNORE)
    total_P = kept_P
    if weight_ptr is not None:
        total_P *= load_weights(weight_ptr, tl.where(live_P, label_P, -1), K)
    if label_weight_ptr is not None:
        store_label_weight(label_weight_ptr + first, pixel_P, total_P, size)
    labelled_P = (1 - uniform) * total_P
    if SPREAD:
        total_P = labelled_P + uniform / K * kept_P * tl.sum(load_weights(weight_ptr, tl.arange(0, WEIGHTS), K), 0)

    # The plane is read here, once, and HELD in registers; only one of too many classes is read again below.
    held = ()
    max_CP = tl.full([BLOCK, PIXELS], float("-inf"), tl.float32)
    sum_CP = tl.zeros([BLOCK, PIXELS], tl.float32)
    if HELD:
        for chunk in tl.static_range(CHUNKS):
            x_CP = packed(load_chunk(logits_ptr, chunk * BLOCK + tl.arange(0, BLOCK), pixel_P, size, K), True)
            max_CP = tl.maximum(max_CP, x_CP.to(tl.float32))
            held = held + (x_CP,)  # type: ignore[assignment]
        max_P = tl.max(max_CP, 0)
        known_P = tl.where((max_P == 0) & (size < 0), -1.0, 0.0)  # always 0, known only when the maximum is
        for chunk in tl.static_range(CHUNKS):
            sum_CP += tl.exp(unpacked(held[chunk], known_P[None, :], True) - max_P[None, :])
        sum_P = tl.sum(sum_CP, 0)
    else:
        max_P = tl.full([PIXELS], float("-inf"), tl.float32)
        sum_P = tl.zeros([PIXELS], tl.float32)
        for chunk in range(CHUNKS):
            x_CP = load_chunk(logits_ptr, chunk * BLOCK + tl.arange(0, BLOCK), pixel_P, size, K).to(tl.float32)
            old_max_P = max_P
            max_P = tl.maximum(max_P, tl.max(x_CP, 0))
            safe_P = tl.where(max_P == float("-inf"), 0.0, max_P)  # -inf - -inf would be NaN for good
            sum_P = sum_P * tl.exp(old_max_P - safe_P) + tl.sum(tl.exp(x_CP - safe_P[None, :]), 0)

    log_sum_P = tl.log(sum_P)
    cross_P = tl.zeros([PIXELS], tl.float32)
    even_P = uniform / K * kept_P
    scale_P = tl.full([PIXELS], 1.0, tl.float32) * host_scale
    if device_scale_ptr is not None:
        if SCALE_STRIDE == 0:
            scale_P *= tl.load(device_scale_ptr).to(tl.float32)
        else:
            scale_P *= tl.load(device_scale_ptr + first + pixel_P, mask=live_P, other=0.0).to(tl.float32)
    if HELD:
        cross_CP = tl.zeros([BLOCK, PIXELS], tl.float32)
        for chunk in tl.static_range(CHUNKS):
            class_C = chunk * BLOCK + tl.arange(0, BLOCK)
            x_CP = unpacked(held[chunk], sum_P[None, :], True) - max_P[None, :]
            q_CP = plane_target(weight_ptr, class_C, label_P, labelled_P, even_P, SPREAD, K)
            if loss_ptr is not None:
                cross_CP += plane_cross(q_CP, x_CP, class_C, K)
            if grad_ptr is not None:
                grad_CP = scale_P[None, :] * (total_P[None, :] * tl.exp(x_CP - log_sum_P[None, :]) - q_CP)
                store_chunk(grad_ptr + first * K, grad_CP, kept_P, class_C, pixel_P, size, K)
        cross_P = tl.sum(cross_CP, 0)
    else:
        for chunk in range(CHUNKS):
            class_C = chunk * BLOCK + tl.arange(0, BLOCK)
            x_CP = load_chunk(logits_ptr, class_C, pixel_P, size, K).to(tl.float32) - max_P[None, :]
            q_CP = plane_target(weight_ptr, class_C, label_P, labelled_P, even_P, SPREAD, K)
            if loss_ptr is not None:
                cross_P += tl.sum(plane_cross(q_CP, x_CP, class_C, K), 0)
            if grad_ptr is not None:
                grad_CP = scale_P[None, :] * (total_P[None, :] * tl.exp(x_CP - log_sum_P[None, :]) - q_CP)
                store_chunk(grad_ptr + first * K, grad_CP, kept_P, class_C, pixel_P, size, K)

    if loss_ptr is not None:
        loss_P = tl.where(kept_P == 0, 0.0, total_P * log_sum_P - cross_P)
        tl.store(loss_ptr + first + pixel_P, loss_P, mask=live_P)


@triton.jit
def plane_target(weight_ptr, class_C, label_P, labelled_P, even_P, SPREAD: tl.constexpr, K: tl.constexpr):
    """q_CP: the label's share where it is, and an even one everywhere, by class weights if SPREAD."""
    q_CP = tl.where(class_C[:, None] == label_P[None, :], labelled_P[None, :], 0.0)
    if SPREAD:
        return q_CP + even_P[None, :] * load_weights(weight_ptr, class_C, K)[:, None]
    elif weight_ptr is None:
        return q_CP + even_P[None, :]
    else:
        return q_CP


@triton.jit
def plane_cross(q_CP, x_CP, class_C, K: tl.constexpr):
    """q x, but 0 for a q of 0, though x be -inf, and beyond the classes."""
    return tl.where((q_CP != 0) & (class_C < K)[:, None], q_CP * x_CP, 0.0)


@triton.jit
def store_chunk(plane_ptr, value_CP, kept_P, class_C, pixel_P, size, K: tl.constexpr):
    """Write [C, P] float32 values, rounded once; 0 in pixels that are ignored."""
    inside_CP = (class_C < K)[:, None] & (pixel_P < size)[None, :]
    offset_CP = (class_C.to(tl.int64) * size)[:, None] + pixel_P[None, :]
    value_CP = tl.where((kept_P == 0)[None, :], 0.0, value_CP).to(plane_ptr.dtype.element_ty)
    tl.store(plane_ptr + offset_CP, value_CP, mask=inside_CP)


# ---------------------------------------------------------------------------------------------------------- launch


@functools.lru_cache(maxsize=1024)
def tile_of_planes(num_classes: int, num_pixels: int, size: int) -> dict[str, Any]:
    """How a kernel cuts (N, K, P) planes of `size`-byte numbers: its compile-time constants and launch options."""
    many = FEW_CLASSES < num_classes <= HELD_CLASSES
    block = min(32 if many else 16, triton.next_power_of_2(num_classes))
    return {
        "K": num_classes,
        "PIXELS": 64 if many else 128,
        "BLOCK": block,
        "CHUNKS": triton.cdiv(num_classes, block),
        "WEIGHTS": triton.next_power_of_2(num_classes),
        "HELD": num_classes <= HELD_CLASSES,
        "GROUP": math.gcd(num_pixels, WIDEST_BYTES // size),
        **PINNED,
        "num_warps": 8 if many else 4,
        "maxnreg": None if num_classes <= HELD_CLASSES else 168,  # not told, the assembler stops at 128, and spills
    }


def launch_planes(
    logits_NKP: Tensor,
    labels: Labels,
    device_scale: Optional[Tensor] = None,
    host_scale: float = 1.0,
    *,
    want_loss: bool = True,
    want_grad: bool = True,
    label_weight_N: Optional[Tensor] = None,
) -> tuple[Any, Any]:
    """Loss (N, P) float32 and gradient (N, K, P), scaled; None for the one not wanted. label_weight_N: (N, P), or none."""
    logits_NKP = logits_NKP.contiguous()
    num_images, num_classes, num_pixels = logits_NKP.shape
    loss_NP = logits_NKP.new_empty((num_images, num_pixels), dtype=torch.float32) if want_loss else None
    grad_NKP = logits_NKP.new_empty(logits_NKP.shape) if want_grad else None
    if logits_NKP.numel() == 0:  # a grid of 0 programs is an error
        return loss_NP, grad_NKP
    one_scale = device_scale is None or not any(device_scale.stride())
    tile = tile_of_planes(num_classes, num_pixels, logits_NKP.element_size())
    blocks = triton.cdiv(num_pixels, tile["PIXELS"])
    weight_K = None if labels.weight_K is None else labels.weight_K.contiguous()
    with on_device_of(logits_NKP):
        planes_kernel[(num_images * blocks,)](
            logits_NKP,
            labels.target.contiguous(),
            weight_K,
            device_scale if one_scale or device_scale is None else device_scale.contiguous(),
            loss_NP,
            grad_NKP,
            label_weight_N,
            num_pixels // tile["GROUP"],
            blocks,
            labels.uniform,
            host_scale,
            SPREAD=weight_K is not None and labels.uniform != 0,
            IGNORE=labels.ignore_index,
            SCALE_STRIDE=0 if one_scale else 1,
            **tile,
        )
    return loss_NP, grad_NKP
