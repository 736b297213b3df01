"""Losses, class maps and erasing of ACoL as pure functions.

Maps are attentions in [0, 1] of one class; a location is erased where the attention is high.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.nn.maps import normalize_map
from lightning_modules.nn.precision import at_least_float32

RestLoss = Literal["rest", "complement"]
Reduction = Literal["mean", "sum", "none"]


def rest_cross_entropy(
    logits: Tensor, target: Tensor, reduction: Reduction = "mean", kind: RestLoss = "rest"
) -> Tensor:
    """Loss of a stage that must find anything but the labelled class.

    ``rest`` is the cross entropy to the uniform distribution over the other classes (released code of the variant, here
    in a form that does not overflow): ``logsumexp(x) - mean of the other logits``, at least log(K - 1). ``complement``
    is ``-log(1 - softmax(x)_target)``, at least 0, and does not ask for equal probabilities.

    Args:
        logits: [B, K], K at least 2; computed in float32 or better.
        target: labels [B] in 0 .. K-1.
        reduction: over the batch.
        kind: see above.

    Returns:
        Scalar, or [B] for ``none``.

    Raises:
        ValueError: one class only, or an unknown ``kind`` or ``reduction``.
    """
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError("rest_cross_entropy needs at least 2 classes: with one there is no rest")
    logits = at_least_float32(logits)
    labelled = F.one_hot(target, classes).bool()
    match kind:
        case "rest":
            rest = logits.masked_fill(labelled, 0).sum(1) / (classes - 1)
        case "complement":
            rest = logits.masked_fill(labelled, -torch.inf).logsumexp(1)
        case _:
            raise ValueError(
                f"unknown kind={kind!r}; choose one of {', '.join(get_args(RestLoss))}"
            )
    losses = logits.logsumexp(1) - rest
    match reduction:
        case "mean":
            return losses.mean()
        case "sum":
            return losses.sum()
        case "none":
            return losses
    raise ValueError(
        f"unknown reduction={reduction!r}; choose one of {', '.join(get_args(Reduction))}"
    )


def class_activation_map(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """CAM: feature maps summed with the weights of one class (Zhou et al., CVPR 2016).

    It is that class's channel of a 1x1 convolution with the same weights, less its bias (ACoL, section 3.1), which is
    why the networks here read maps off their last convolution.

    Args:
        features: [B, C, H, W].
        weight: of the linear layer behind the global average [K, C].
        labels: [B].

    Returns:
        [B, H, W].
    """
    return torch.einsum("bc,bchw->bhw", weight[labels], features)


def select_class_maps(score_maps: Tensor, classes: Tensor) -> Tensor:
    """The channels of the asked classes.

    Args:
        score_maps: [B, K, H, W].
        classes: [B] or [B, T].

    Returns:
        [B, H, W] or [B, T, H, W].
    """
    rows = torch.arange(len(score_maps), device=score_maps.device)
    return score_maps[rows.view(-1, *[1] * (classes.dim() - 1)), classes]


def class_attention(score_maps: Tensor, classes: Tensor) -> Tensor:
    """Min-max normalised maps of one class an image: in float32 or better, without gradient.

    Args:
        score_maps: [B, K, H, W].
        classes: [B].

    Returns:
        [B, H, W] in [0, 1]; zeros where a map is constant.
    """
    return normalize_map(select_class_maps(score_maps.detach(), classes))


def erase_mask(attention: Tensor, threshold: float, inclusive: bool = True) -> Tensor:
    """Locations that stay.

    Args:
        attention: [B, H, W] in [0, 1]; compared in float32 or better.
        threshold: delta, in (0, 1).
        inclusive: erase where the attention equals the threshold, too (released code of ACoL); the variant and the
            paper's text erase above it only.

    Returns:
        Bool [B, H, W], False where the location is erased.
    """
    attention = at_least_float32(attention)
    return attention < threshold if inclusive else attention <= threshold


def erase_features(
    features: Tensor, attention: Tensor, threshold: float, inclusive: bool = True
) -> Tensor:
    """Features with all channels 0 where :func:`erase_mask` is False; no gradient reaches the attention.

    Args:
        features: [B, C, H, W].
        attention: [B, H, W].
        threshold: delta.
        inclusive: see :func:`erase_mask`.

    Returns:
        [B, C, H, W].
    """
    keep = erase_mask(attention.detach(), threshold, inclusive)
    return features.masked_fill(~keep[:, None], 0)
