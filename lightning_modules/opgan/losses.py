"""Losses of OP-GAN as pure functions: tensors in, tensors out.

Xie, Chen, Li, Shen, Ma, Zheng, "Self-Supervised CycleGAN for Object-Preserving Image-to-Image Domain Adaptation", ECCV
2020. The equations are taken from public summaries of the paper; no released code is known, so every choice that these
leave open is marked as inferred. Everything is computed in float32 at least, also under autocast: the squares of small
map differences are below the smallest float16.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.nn.maps import upsample_map
from lightning_modules.nn.precision import at_least_float32

AttentionNorm = Literal["none", "instance", "sigmoid"]


# ------------------------------------------------------------------ content registration
def content_attention_map(
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: tuple[int, int],
    attention_norm: AttentionNorm = "none",
) -> Tensor:
    """Content features as one map an image: 1x1 convolution to one channel, then enlarged to the patch (paper, eq. 5).

    One channel, bilinear interpolation (half-pixel centres) and no activation are inferred.

    Args:
        c: content features [N, C, h, w].
        weight: [1, C, 1, 1].
        bias: [1], or None.
        size: height and width of a patch.
        attention_norm: before enlarging; ``none`` as in the paper; ``instance`` standardises every map (biased
            variance, 1e-5 inside the root, so that flat patches stay finite; our own); ``sigmoid`` (our own).

    Returns:
        [N, 1, *size], float32 or float64.

    Raises:
        ValueError: unknown ``attention_norm``.
    """
    with torch.autocast(c.device.type, enabled=False):
        c = at_least_float32(c)
        bias = None if bias is None else bias.to(c.dtype)
        maps = F.conv2d(c, weight.to(c.dtype), bias)
        match attention_norm:
            case "none":
                pass
            case "instance":
                variance, mean = torch.var_mean(maps, (-2, -1), correction=0, keepdim=True)
                maps = (maps - mean) / (variance + 1e-5).sqrt()
            case "sigmoid":
                maps = maps.sigmoid()
            case _:
                raise ValueError(
                    f"unknown --model.attention_norm={attention_norm!r}; "
                    f"choose one of {', '.join(get_args(AttentionNorm))}"
                )
        return upsample_map(maps, size, "bilinear")


def content_consistency_loss(p_a: Tensor, p_b: Tensor, same_position: Tensor) -> Tensor:
    """Mean squared difference of two content maps, over the C1 pairs of the batch (paper, eq. 5).

    Args:
        p_a: maps [N, 1, H, W] of the first patches.
        p_b: maps of the second patches, same shape.
        same_position: bool [N], True for a C1 pair; no gradient reaches the others.

    Returns:
        Scalar; exactly 0, still in the graph, if there is no C1 pair.

    Raises:
        ValueError: the shapes differ.
    """
    return _mean_or_zero(_squared_difference(p_a[same_position], p_b[same_position]))


def content_negative_loss(p_a: Tensor, p_b: Tensor, margin: float = 1.0) -> Tensor:
    """Hinge that keeps content maps of different positions apart, so that a map cannot become constant (our own).

    Args:
        p_a: maps [N, 1, H, W] of the first patches of C2 pairs.
        p_b: maps of the second patches, same shape.
        margin: mean squared difference from which on a pair costs nothing; 1 is meant for standardised maps.

    Returns:
        Scalar, mean over pairs of ``relu(margin - mean((p_a - p_b)**2))``; 0, still in the graph, without any.

    Raises:
        ValueError: the shapes differ.
    """
    return _mean_or_zero(F.relu(margin - _squared_difference(p_a, p_b)))


# ------------------------------------------------------------------ domain classification
def domain_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over D1, D2 and C (paper, eq. 6; the paper sums over pairs, the mean is inferred).

    Args:
        logits: [N, K].
        labels: [N] in 0 .. K-1.

    Returns:
        Scalar, mean over pairs; nan without any.
    """
    return F.cross_entropy(at_least_float32(logits), labels)


def domain_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the pairs [N, K] whose largest logit is that of the label [N], a scalar in [0, 1] without gradient."""
    return (logits.argmax(1) == labels).float().mean()


# ------------------------------------------------------------------ objective
def opgan_generator_objective(
    adv_ab: Tensor,
    adv_ba: Tensor,
    cyc: Tensor,
    cc_ab: Tensor,
    dc_ab: Tensor,
    cc_ba: Tensor,
    dc_ba: Tensor,
    alpha: float = 10.0,
    beta: float = 1.0,
) -> Tensor:
    """What the generators minimise (paper, eq. 7; that both directions are added is inferred).

    Args:
        adv_ab: least-squares term of G_AB.
        adv_ba: of G_BA.
        cyc: sum of both cycle errors, each a mean absolute error.
        cc_ab: content consistency of the domain-A image and its translation.
        dc_ab: domain classification of these.
        cc_ba: content consistency of the domain-B image and its translation.
        dc_ba: domain classification of these.
        alpha: weight of the cycle errors.
        beta: weight of the self-supervised terms.

    Returns:
        Scalar.
    """
    return adv_ab + adv_ba + alpha * cyc + beta * (cc_ab + dc_ab + cc_ba + dc_ba)


# ------------------------------------------------------------------ signs of a collapsed map
def attention_std(maps: Tensor) -> Tensor:
    """Standard deviation (biased) of the content maps [N, 1, H, W] inside a patch, mean over patches; no gradient.

    Content consistency alone can be minimised by maps that become constant; then this goes to 0.
    """
    return at_least_float32(maps.detach()).flatten(1).std(1, correction=0).mean()


def affine_warp(images: Tensor, degrees: float = 8.0, scale: float = 1.1) -> Tensor:
    """Images turned and enlarged about their centre, the same for all: the distortion that content maps should notice.

    Args:
        images: [B, C, H, W].
        degrees: of the turn.
        scale: of the enlargement.

    Returns:
        Same shape, float32 or float64; pixels from outside are mirrored.
    """
    images = at_least_float32(images)
    height, width = images.shape[-2:]
    angle = torch.deg2rad(torch.tensor(degrees, dtype=images.dtype))
    cos, sin = (angle.cos() / scale).item(), (angle.sin() / scale).item()
    # Sampling coordinates go from -1 to 1 along both sides, whatever their lengths.
    matrix = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    theta = torch.tensor([matrix], dtype=images.dtype, device=images.device)
    where = F.affine_grid(theta.expand(len(images), -1, -1), list(images.shape), False)
    return F.grid_sample(images, where, padding_mode="reflection", align_corners=False)


def _squared_difference(p_a: Tensor, p_b: Tensor) -> Tensor:
    if p_a.shape != p_b.shape:
        raise ValueError(
            f"content maps {tuple(p_a.shape)} and {tuple(p_b.shape)} of the two patches differ in shape"
        )
    return (at_least_float32(p_a) - at_least_float32(p_b)).square().mean((-3, -2, -1))


def _mean_or_zero(values: Tensor) -> Tensor:
    """Mean of [N]; with N = 0 not nan but a 0 that can be differentiated."""
    return values.sum() / max(len(values), 1)
