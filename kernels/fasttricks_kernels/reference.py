"""The maths of every kernel in plain PyTorch: short, and right on any device and dtype. It also serves CPU tensors.

This is the one definition. The Triton kernels are tested against it; it is itself tested against
torch.nn.functional in float64, torch.optim.SGD, NumPy and PIL.

Shape suffixes: N samples, K classes, P pixels, C channels, H rows, W columns; 1 an axis to broadcast along.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Share = Tensor | float  # share of a sample's first label or image, in [0, 1]: one number, a () tensor, or (N,)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic is done in, and losses have: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    dtype = wide_dtype(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)  # the call alone takes 8 us


# ---------------------------------------------------------------------------------------------------------- labels


def label_weight(label_N: Tensor, share: Share, num_classes: int, ignore_index: int | None) -> Tensor:
    """Weight of a label in its row: its share; 0 where it is ignored; NaN where label or share is out of range."""
    label_N = label_N.long()  # in int32, torch takes 2^31 for -2^31
    dtype = None if isinstance(share, Tensor) else torch.float64
    share_N = torch.as_tensor(share, dtype=dtype, device=label_N.device)
    good_N = (label_N >= 0) & (label_N < num_classes) & (share_N >= 0) & (share_N <= 1)
    weight_N = torch.where(good_N, share_N, torch.nan)
    return weight_N if ignore_index is None else torch.where(label_N == ignore_index, 0, weight_N)


def labels_and_weights(
    logits_NK: Tensor, target_N: Tensor, target_b_N: Tensor | None, lam: Share, ignore_index: int | None
) -> list[tuple[Tensor, Tensor]]:
    """One or two (label_N, weight_N), the labels clamped to where they can index."""
    num_classes = logits_NK.shape[1]
    lam = lam.to(wide_dtype(logits_NK.dtype)) if isinstance(lam, Tensor) else lam  # before 1 - lam
    pairs = [(target_N, lam)] if target_b_N is None else [(target_N, lam), (target_b_N, 1 - lam)]
    return [
        (
            label_N.long().clamp(0, num_classes - 1),
            label_weight(label_N, share, num_classes, ignore_index).to(wide_dtype(logits_NK.dtype)),
        )
        for label_N, share in pairs
    ]


def total_weight(labels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Total weight of the row's labels: 1, or less where one is ignored."""
    return torch.stack([weight_N for _, weight_N in labels]).sum(0)


def class_weights(weight_K: Tensor | None, logits_NK: Tensor) -> Tensor | None:
    """The class weights in the loss's dtype, (K,), or (K, 1) for (N, K, P) logits."""
    if weight_K is None:
        return None
    return weight_K.to(wide_dtype(logits_NK.dtype)).view(-1, *[1] * (logits_NK.dim() - 2))


def weighed(labels: list[tuple[Tensor, Tensor]], weight_K: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Each label's weight in the row times its class's."""
    if weight_K is None:
        return labels
    return [(label_N, share_N * weight_K.flatten()[label_N]) for label_N, share_N in labels]


# --------------------------------------------------------------------------------------------------- cross-entropy


def cross_entropy(
    logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Tensor | None = None,
    lam: Share = 1.0,
    *,
    uniform: float = 0.0,
    ignore_index: int | None = None,
    weight_K: Tensor | None = None,
) -> Tensor:
    """(N,) losses: the sum over a row's labels y, of weight w_y, of

    w_y (-(1 - uniform) c_y log p_y - uniform mean_k c_k log p_k),    p = softmax(logits), c_k = weight_K, or 1:

    `uniform` is the share of the target that is spread evenly over all K classes. Logits of (N, K, P) have (N, P) labels.
    A target of the logits' shape is a distribution t: -sum_k q_k log p_k,    q_k = c_k ((1 - uniform) t_k + uniform / K).
    """
    log_p_NK = F.log_softmax(wide(logits_NK), dim=1)
    if target_N.is_floating_point():
        q_NK = dense_target(logits_NK, target_N, uniform, weight_K)
        return -torch.where(q_NK == 0, 0, q_NK * log_p_NK).sum(1)
    weight_K = class_weights(weight_K, logits_NK)
    # mean(1) is 2.5 x as slow on the CPU
    even_N = even_log_p(log_p_NK, weight_K) / log_p_NK.shape[1] if uniform else 0
    loss_N = torch.zeros_like(log_p_NK.select(1, 0))
    for label_N, weight_N in labels_and_weights(logits_NK, target_N, target_b_N, lam, ignore_index):
        log_p_N = log_p_NK.gather(1, label_N.unsqueeze(1)).squeeze(1)
        if weight_K is not None:
            log_p_N = log_p_N * weight_K.flatten()[label_N]
        label_loss_N = -(1 - uniform) * log_p_N - uniform * even_N
        loss_N = loss_N + torch.where(weight_N == 0, 0, weight_N * label_loss_N)
    return loss_N


def even_log_p(log_p_NK: Tensor, weight_K: Tensor | None) -> Tensor:
    """sum_k c_k log p_k; a c_k of 0 counts nothing."""
    return log_p_NK.sum(1) if weight_K is None else torch.where(weight_K == 0, 0, weight_K * log_p_NK).sum(1)


def dense_target(logits_NK: Tensor, target_NK: Tensor, uniform: float, weight_K: Tensor | None) -> Tensor:
    """q_NK: the target, smoothed, then weighed by class."""
    q_NK = (1 - uniform) * target_NK.to(wide_dtype(logits_NK.dtype))
    if uniform:
        q_NK = q_NK + uniform / q_NK.shape[1]
    weight_K = class_weights(weight_K, logits_NK)
    return q_NK if weight_K is None else q_NK * weight_K


def dense_target_grad(
    scale_N: Tensor, logits_NK: Tensor, target_NK: Tensor, uniform: float, weight_K: Tensor | None
) -> Tensor:
    """The gradient of sum_n scale_n loss_n of a dense target: -(1 - uniform) c_k log p_k scale. A c_k of 0 counts nothing."""
    grad_NK = (uniform - 1) * scale_N.unsqueeze(1) * F.log_softmax(wide(logits_NK), dim=1)
    weight_K = class_weights(weight_K, logits_NK)
    if weight_K is not None:
        grad_NK = torch.where(weight_K == 0, 0, weight_K * grad_NK)
    return grad_NK.to(target_NK.dtype)


def cross_entropy_grad(
    scale_N: Tensor,
    logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Tensor | None = None,
    lam: Share = 1.0,
    *,
    uniform: float = 0.0,
    ignore_index: int | None = None,
    weight_K: Tensor | None = None,
) -> Tensor:
    """The gradient of sum_n scale_n loss_n: scale (W p - q), rounded once to the logits' dtype.

    q are the row's targets, of each label w_y (1 - uniform) c_y at y and w_y uniform c_k / K everywhere; W is their sum.
    """
    scale_N1 = scale_N.unsqueeze(1)
    if target_N.is_floating_point():
        q_NK = dense_target(logits_NK, target_N, uniform, weight_K)
        grad_NK = wide(logits_NK).softmax(1).mul_(q_NK.sum(1, keepdim=True)).sub_(q_NK).mul_(scale_N1)
        return grad_NK.to(logits_NK.dtype)
    labels = labels_and_weights(logits_NK, target_N, target_b_N, lam, ignore_index)
    weight_K = class_weights(weight_K, logits_NK)
    total_N, even_N = totals(labels, weight_K, uniform)
    # In place, because passes over N K elements dominate: 3 passes of 35 us behind the softmax's 180 (256 x 1000, one core);
    # addcmul with two broadcast columns does the first two in one, and takes 2.4 x as long.
    grad_NK = wide(logits_NK).softmax(1).mul_((total_N * scale_N).unsqueeze(1))
    if uniform:
        even_N1 = (uniform / grad_NK.shape[1] * even_N * scale_N).unsqueeze(1)
        grad_NK.sub_(even_N1 if weight_K is None else even_N1 * weight_K)
    for label_N, weight_N in weighed(labels, weight_K):
        grad_NK.scatter_add_(1, label_N.unsqueeze(1), (-(1 - uniform) * scale_N * weight_N).unsqueeze(1))
    if ignore_index is not None:  # 0, and not 0 * NaN, in the rows that are ignored
        ignored_N = torch.stack([weight_N == 0 for _, weight_N in labels]).all(0)
        grad_NK.masked_fill_(ignored_N.unsqueeze(1), 0)
    return grad_NK.to(logits_NK.dtype)


def totals(labels: list[tuple[Tensor, Tensor]], weight_K: Tensor | None, uniform: float) -> tuple[Tensor, Tensor]:
    """The sum of the row's targets, and that of its labels' weights; without class weights one and the same."""
    even_N = total_weight(labels)
    if weight_K is None:
        return even_N, even_N
    return (1 - uniform) * total_weight(weighed(labels, weight_K)) + uniform * weight_K.mean() * even_N, even_N


def cross_entropy_grad_vjp(
    v_NK: Tensor,
    scale_N: Tensor,
    logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Tensor | None,
    lam: Share,
    *,
    uniform: float,
    ignore_index: int | None,
    weight_K: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of sum(v * cross_entropy_grad) with respect to scale, logits and a dense target; itself differentiable.

    d/d scale = sum_k v (W p - q),    d/d logits = scale W p (v - sum_k p v),    d/d t = (1 - uniform) c scale (sum_k p v - v).
    """
    p_NK, v_NK = wide(logits_NK).softmax(1), wide(v_NK)
    mean_v_N1 = (p_NK * v_NK).sum(1, keepdim=True)
    d_target = None
    if target_N.is_floating_point():
        q_NK = dense_target(logits_NK, target_N, uniform, weight_K)
        total_N, vq_N = q_NK.sum(1), (v_NK * q_NK).sum(1)
        d_target = (1 - uniform) * scale_N.unsqueeze(1) * (mean_v_N1 - v_NK)
        of_classes = class_weights(weight_K, logits_NK)
        d_target = (d_target if of_classes is None else of_classes * d_target).to(target_N.dtype)
    else:
        labels = labels_and_weights(logits_NK, target_N, target_b_N, lam, ignore_index)
        weight_K = class_weights(weight_K, logits_NK)
        total_N, even_N = totals(labels, weight_K, uniform)
        vq_N = uniform * even_N * (v_NK if weight_K is None else v_NK * weight_K).mean(1)
        for label_N, weight_N in weighed(labels, weight_K):
            vq_N = vq_N + (1 - uniform) * weight_N * v_NK.gather(1, label_N.unsqueeze(1)).squeeze(1)
    d_logits_NK = (scale_N * total_N).unsqueeze(1) * p_NK * (v_NK - mean_v_N1)
    return total_N * mean_v_N1.squeeze(1) - vq_N, d_logits_NK.to(logits_NK.dtype), d_target


# ---------------------------------------------------------------------------------------------------- distillation


def distillation(
    logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Tensor | None = None,
    lam: Share = 1.0,
    *,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    uniform: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """(N,) losses: hard_weight ce(logits, labels) + soft_weight W T^2 ce(logits / T, softmax(teacher_logits / T)).

    W is the weight of the row's labels that are not ignored: 1, and 0 for a row that is left out.
    """
    hard_N = cross_entropy(logits_NK, target_N, target_b_N, lam, uniform=uniform, ignore_index=ignore_index)
    total_N = total_weight(labels_and_weights(logits_NK, target_N, target_b_N, lam, ignore_index))
    teacher_NK = (wide(teacher_logits_NK) / temperature).softmax(1)
    log_p_NK = F.log_softmax(wide(logits_NK) / temperature, dim=1)
    soft_N = -torch.where(teacher_NK == 0, 0, teacher_NK * log_p_NK).sum(1)
    soft_N = torch.where(total_N == 0, 0, total_N * temperature**2 * soft_N)
    return hard_weight * hard_N + soft_weight * soft_N


def distillation_grad(
    scale_N: Tensor,
    logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Tensor | None = None,
    lam: Share = 1.0,
    *,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    uniform: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """scale (hard_weight (W p - q) + soft_weight W T (softmax(logits / T) - softmax(teacher / T))), rounded once."""
    grad_NK = cross_entropy_grad(
        hard_weight * scale_N,
        wide(logits_NK),
        target_N,
        target_b_N,
        lam,
        uniform=uniform,
        ignore_index=ignore_index,
    )
    total_N = total_weight(labels_and_weights(logits_NK, target_N, target_b_N, lam, ignore_index))
    soft_NK = (wide(logits_NK) / temperature).softmax(1)
    soft_NK.sub_((wide(teacher_logits_NK) / temperature).softmax(1))
    soft_NK.mul_((soft_weight * temperature * total_N * scale_N)[:, None])
    if ignore_index is not None:
        soft_NK.masked_fill_((total_N == 0)[:, None], 0)
    return grad_NK.add_(soft_NK).to(logits_NK.dtype)


def distillation_grad_vjp(
    v_NK: Tensor,
    scale_N: Tensor,
    logits_NK: Tensor,
    teacher_logits_NK: Tensor,
    target_N: Tensor,
    target_b_N: Tensor | None,
    lam: Share,
    *,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    uniform: float,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, None]:
    """The gradient of sum(v * distillation_grad) with respect to scale and logits; itself differentiable."""
    d_hard_scale_N, hard_NK, _ = cross_entropy_grad_vjp(
        v_NK, scale_N, wide(logits_NK), target_N, target_b_N, lam, uniform=uniform, ignore_index=ignore_index
    )
    total_N = total_weight(labels_and_weights(logits_NK, target_N, target_b_N, lam, ignore_index))
    v_NK = wide(v_NK)
    p_NK = (wide(logits_NK) / temperature).softmax(1)
    mean_v_N1 = (p_NK * v_NK).sum(1, keepdim=True)
    teacher_v_N = ((wide(teacher_logits_NK) / temperature).softmax(1) * v_NK).sum(1)
    d_soft_scale_N = total_N * temperature * (mean_v_N1[:, 0] - teacher_v_N)
    soft_NK = (scale_N * total_N)[:, None] * p_NK * (v_NK - mean_v_N1)
    return (
        hard_weight * d_hard_scale_N + soft_weight * d_soft_scale_N,
        (hard_weight * hard_NK + soft_weight * soft_NK).to(logits_NK.dtype),
        None,
    )


# ------------------------------------------------------------------------------------------------------ batch norm


def activation(y: Tensor, act: str) -> Tensor:
    """act: "none", "relu" or "relu6"."""
    return y if act == "none" else F.relu(y) if act == "relu" else F.hardtanh(y, 0.0, 6.0)


def batch_norm_act(
    x: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    running_mean_C: Tensor | None,
    running_var_C: Tensor | None,
    residual: Tensor | None,
    *,
    act: str,
    training: bool,
    momentum: Tensor | float,
    eps: float,
    fork: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """act(batch_norm(x) + residual), in float32 (float64 for float64), rounded once; moves the running statistics in place.

    With `fork` twice, on one memory.
    """
    running: list[Tensor | None] = [running_mean_C, running_var_C]
    later = isinstance(momentum, Tensor) and training and running_mean_C is not None and x.numel() > 0
    if later:  # torch takes no tensor for the momentum: the batch's own statistics first
        running = [torch.zeros_like(statistic) for statistic in running]  # type: ignore[arg-type]
    share = 1.0 if isinstance(momentum, Tensor) else momentum
    y = F.batch_norm(wide(x), running[0], running[1], weight_C, bias_C, training, share, eps)
    if later:
        for statistic, of_batch in zip((running_mean_C, running_var_C), running, strict=True):
            statistic.lerp_(of_batch, momentum.to(of_batch.dtype))  # type: ignore[union-attr, arg-type]
    if residual is not None:
        y = y + wide(residual)
    y = activation(y, act).to(x.dtype)
    return (y, y.view_as(y)) if fork else y


def shut(y: Tensor, act: str) -> Tensor:
    """Where ReLU or ReLU6 passes no gradient, judged by its output as stored. A NaN passes it."""
    return (y <= 0) if act == "relu" else (y <= 0) | (y >= 6)


def batch_norm_act_grad(
    grad: Tensor,
    second: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    mean_C: Tensor,
    rstd_C: Tensor,
    *,
    act: str,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual; themselves differentiable in grad, second, x and weight.

    `grad` and `second` are those of a fork's two outputs, and are added in float32 (float64 for float64). The mask is that
    of the output as stored: y, or without a residual y computed again. With g the masked gradient and h = (x - mean) rstd,
    that of x is weight rstd (g - mean(g) - h mean(g h)), and weight rstd g in evaluation.
    """
    axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    x_wide, g = wide(x), wide(grad) if second is None else wide(grad) + wide(second)
    mean, rstd = mean_C.to(x_wide.dtype).view(shape), rstd_C.view(shape)
    scale = 1.0 if weight_C is None else weight_C.view(shape)
    if act != "none":
        if y is None:
            y = (x_wide - mean) * (scale * rstd) + (0.0 if bias_C is None else bias_C.view(shape))
            y = activation(y, act).to(x.dtype)
        g = g.masked_fill(shut(y.detach(), act), 0.0)
    if training:  # as functions of x
        var, mean = torch.var_mean(x_wide, axes, correction=0, keepdim=True)
        rstd = (var + eps).rsqrt()
    h = (x_wide - mean) * rstd
    grad_weight_C, grad_bias_C = (g * h).sum(axes), g.sum(axes)
    grad_x = g
    if training:
        grad_x = g - g.mean(axes, keepdim=True) - h * (g * h).mean(axes, keepdim=True)
    return (scale * rstd * grad_x).to(x.dtype), grad_weight_C, grad_bias_C, g.to(x.dtype)


# ----------------------------------------------------------------------------------------------------------- mixup


def mixup(images_NCHW: Tensor, permutation_N: Tensor, lam: Share) -> Tensor:
    """lam * images + (1 - lam) * images[permutation], in float32 (float64 for float64), rounded once."""
    dtype = wide_dtype(images_NCHW.dtype)
    share = lam.to(dtype) if isinstance(lam, Tensor) else lam
    share = share[:, None, None, None] if isinstance(share, Tensor) and share.dim() else share
    mixed = wide(images_NCHW[permutation_N]) * (1 - share)
    return mixed.add_(share * wide(images_NCHW)).to(images_NCHW.dtype)


# --------------------------------------------------------------------------------------------------------- augment


def augment(
    images_NHW3: Tensor,
    matrix_N34: Tensor,
    flip_N: Tensor | None,
    permutation_N: Tensor | None,
    lam: Share,
    dtype: torch.dtype,
) -> Tensor:
    """matrix (r, g, b, 1) of each pixel, mirrored, blended with the partner; (N, 3, H, W) in channels-last memory."""
    if flip_N is not None:
        images_NHW3 = torch.where(flip_N.bool()[:, None, None, None], images_NHW3.flip(2), images_NHW3)
    pixels_NP3 = images_NHW3.flatten(1, 2).to(matrix_N34.dtype)
    # One multiply-add over all pixels: half the time of channel by channel (16 x 224 x 224, one core).
    out_NP3 = torch.baddbmm(matrix_N34[:, None, :, 3], pixels_NP3, matrix_N34[:, :, :3].transpose(1, 2))
    out = out_NP3.view(images_NHW3.shape).permute(0, 3, 1, 2)
    return (out if permutation_N is None else mixup(out, permutation_N, lam)).to(dtype)


# ------------------------------------------------------------------------------------------------------------- sgd


def sgd_step(
    weights: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    momenta: list[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    device_lr: Tensor | None = None,
) -> None:
    """In place, with g negated if maximize; without momenta w -= lr g:

    g = grad / grad_scale + decay w; v = momentum v + (1 - dampening) g; w -= lr (g + momentum v if nesterov else v).
    """
    if found_inf is not None and bool(found_inf != 0):  # on the CPU, inside the operator: no sync
        return
    lr = lr if device_lr is None else float(device_lr)
    for i, (weight, grad, master) in enumerate(zip(weights, grads, masters or weights, strict=True)):
        g = wide(grad) if grad_scale is None else wide(grad) / grad_scale
        g = (-g if maximize else g).add(master, alpha=weight_decay)
        if momenta:
            velocity = momenta[i].mul_(momentum).add_(g, alpha=1 - dampening)
            g = g.add(velocity, alpha=momentum) if nesterov else velocity
        master.add_(g, alpha=-lr)
        if master is not weight:
            weight.copy_(master)


def overflow(grads: list[Tensor]) -> Tensor:
    """1 if any element of any gradient is not finite, else 0; () float32."""
    return torch.stack([grad.isfinite().all().logical_not() for grad in grads]).any().float()
