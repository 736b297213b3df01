"""Discrepancies between a float network P and its quantized copy Q, and the two losses of ZAQ's game.

Liu, Zhang, Wang, "Zero-shot Adversarial Quantization", CVPR 2021. The released code compares feature maps by what is
called SCRM here; the channel relation map and its layer weights are in the paper alone.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce

from lightning_modules.arguments import demand_choice
from lightning_modules.zaq.quantizers import full_precision

RelationMode = Literal["batch", "sample"]
FeatureLoss = Literal["crm", "scrm", "gram", "none"]
Outputs = Tensor | Sequence[Tensor]


def channel_relation_map(
    feat: Tensor, mode: RelationMode = "batch", eps: float = 1e-8, sync: bool = False
) -> Tensor:
    """Cosine similarities between the channels of a feature map (paper's CRM).

    Computed in float32 or better. A channel without activity has similarity 0 to every channel, itself included, and no
    gradient.

    Args:
        feat: [B, C, ...], C channels at any number of positions.
        mode: ``batch`` takes a channel's values over batch and space as one vector (paper); ``sample`` makes a map per
            image (a function of the released code that is never called).
        eps: a channel is without activity if its norm is at most this.
        sync: with ``batch``, over the batches of all processes; every one of them must call.

    Returns:
        [C, C] for ``batch``, [B, C, C] for ``sample``, entries in [-1, 1].

    Raises:
        ValueError: unknown mode.
    """
    gram = _gram(feat, mode, sync)
    squared = gram.diagonal(dim1=-2, dim2=-1)
    alive = squared > eps**2
    # The inner where keeps the square root's infinite slope at 0 out of the gradient.
    inverse = torch.where(alive, torch.where(alive, squared, 1).rsqrt(), 0)
    return gram * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def _gram(feat: Tensor, mode: RelationMode, sync: bool = False) -> Tensor:
    demand_choice(RelationMode, mode=mode)
    # Half precision cannot hold squared norms of small features.
    with torch.autocast(feat.device.type, enabled=False):
        vectors = full_precision(feat).flatten(2)
        if mode == "sample":
            return vectors @ vectors.transpose(1, 2)
        vectors = vectors.transpose(0, 1).flatten(1)
        gram = vectors @ vectors.T
        if sync and distributed.is_initialized():
            # Differentiable: the gradients of all processes arrive at each, and DDP averages them.
            gram = all_reduce(gram)
        return gram


def crm_distance(
    fp: Tensor, fq: Tensor, mode: RelationMode = "batch", eps: float = 1e-8, sync: bool = False
) -> Tensor:
    """Mean absolute difference of two channel relation maps, over images too for ``sample``.

    Args:
        fp: feature map of P [B, C, ...].
        fq: feature map of Q with as many channels; the positions may differ.
        mode: see :func:`channel_relation_map`, as for the others.
        eps: see there.
        sync: see there.

    Returns:
        Scalar in [0, 2].

    Raises:
        ValueError: unknown mode, or different numbers of channels.
    """
    _demand_same_channels(fp, fq)
    map_p, map_q = (channel_relation_map(feat, mode, eps, sync) for feat in (fp, fq))
    return F.l1_loss(map_q, map_p)


def spatial_relation(feat: Tensor, gamma: float = 0.1) -> Tensor:
    """A feature map plus ``gamma`` times its self-attention over positions (released code).

    Every position holds a unit vector over channels first. The attention of a position is the softmax of its inner
    products with all positions.

    Args:
        feat: [B, C, ...].
        gamma: weight of the attention.

    Returns:
        The shape of ``feat``.
    """
    unit = _unit_channels(feat)
    positions = unit.flatten(2).transpose(1, 2)
    # The fused attention never holds the map of all pairs of positions where the device has one.
    attended = F.scaled_dot_product_attention(positions, positions, positions, scale=1.0)
    return unit + gamma * attended.transpose(1, 2).reshape_as(unit)


def channel_relation(feat: Tensor, gamma: float = 0.1) -> Tensor:
    """A feature map plus ``gamma`` times an attention over channels, to the *least* similar most (released code).

    Every position holds a unit vector over channels first. The attention of a channel is the softmax of its negated
    inner products with all channels.

    Args:
        feat: [B, C, ...].
        gamma: weight of the attention.

    Returns:
        The shape of ``feat``.
    """
    unit = _unit_channels(feat)
    channels = unit.flatten(2)
    attention = (-(channels @ channels.transpose(1, 2))).softmax(-1)
    return unit + gamma * (attention @ channels).reshape_as(unit)


def _unit_channels(feat: Tensor) -> Tensor:
    return F.normalize(full_precision(feat), dim=1, eps=1e-8)


def layer_distances(
    feats_p: Sequence[Tensor],
    feats_q: Sequence[Tensor],
    kind: FeatureLoss = "crm",
    mode: RelationMode = "batch",
    gamma: float = 0.1,
    sync: bool = False,
) -> Tensor:
    """How far the feature maps of Q are from those of P, layer by layer.

    ``crm``: :func:`crm_distance` (paper). ``scrm``: mean absolute differences of :func:`spatial_relation` and
    :func:`channel_relation`, summed (released code). ``gram``: as ``crm`` with inner products, averaged over the
    positions instead of normalised (an ablation of the paper; its scale is ours). ``none``: zeros.

    Args:
        feats_p: L maps [B, C_l, ...] of P.
        feats_q: the maps of Q.
        kind: see above.
        mode: of ``crm`` and ``gram``, see :func:`channel_relation_map`.
        gamma: of ``scrm``.
        sync: of ``crm`` in mode ``batch``, see :func:`channel_relation_map`.

    Returns:
        [L].

    Raises:
        ValueError: unknown kind or mode, no map, or maps that do not correspond.
    """
    demand_choice(FeatureLoss, kind=kind)
    if not feats_p or len(feats_p) != len(feats_q):
        raise ValueError(
            f"{len(feats_p)} feature maps of P and {len(feats_q)} of Q; give as many of both, at least one "
            "(--model.taps)"
        )
    pairs = list(zip(feats_p, feats_q, strict=True))
    for pair in pairs:
        _demand_same_channels(*pair)
    with torch.autocast(feats_p[0].device.type, enabled=False):
        match kind:
            case "crm":
                return torch.stack([crm_distance(*pair, mode, sync=sync) for pair in pairs])
            case "scrm":
                return torch.stack(
                    [
                        F.l1_loss(spatial_relation(fq, gamma), spatial_relation(fp, gamma))
                        + F.l1_loss(channel_relation(fq, gamma), channel_relation(fp, gamma))
                        for fp, fq in pairs
                    ]
                )
            case "gram":
                return torch.stack(
                    [F.l1_loss(_mean_gram(fq, mode), _mean_gram(fp, mode)) for fp, fq in pairs]
                )
    return torch.zeros(len(pairs), device=feats_p[0].device)


def _mean_gram(feat: Tensor, mode: RelationMode) -> Tensor:
    positions = feat[0, 0].numel() * (len(feat) if mode == "batch" else 1)
    return _gram(feat, mode) / positions


def combine_distances(
    distances: Tensor, weights: Tensor | None = None, kind: FeatureLoss = "crm"
) -> Tensor:
    """D_f: the weighted sum of the layers' distances.

    Args:
        distances: [L], of :func:`layer_distances`.
        weights: [L], no gradient flows into them; without them 1/L each (paper, before the first update), for ``scrm``
            1 each (released code).
        kind: of the distances.

    Returns:
        Scalar.

    Raises:
        ValueError: another number of weights.
    """
    if weights is None:
        return distances.sum() if kind == "scrm" else distances.mean()
    if weights.shape != distances.shape:
        raise ValueError(
            f"{weights.numel()} layer weights for {distances.numel()} feature maps; give one per map"
        )
    return (weights.detach() * distances).sum()


def feature_discrepancy(
    feats_p: Sequence[Tensor],
    feats_q: Sequence[Tensor],
    weights: Tensor | None = None,
    kind: FeatureLoss = "crm",
    mode: RelationMode = "batch",
    gamma: float = 0.1,
    sync: bool = False,
) -> Tensor:
    """D_f of two lists of feature maps: :func:`combine_distances` of :func:`layer_distances`.

    Returns:
        Scalar.

    Raises:
        ValueError: as those two.
    """
    distances = layer_distances(feats_p, feats_q, kind, mode, gamma, sync)
    return combine_distances(distances, weights, kind)


def output_discrepancy(logits_p: Outputs, logits_q: Outputs) -> Tensor:
    """D_o: mean absolute difference of the outputs, over batch and classes (released code).

    Args:
        logits_p: outputs of P of any shape, or several of them, such as a detector's classes and boxes.
        logits_q: those of Q.

    Returns:
        Scalar; of several outputs the mean of their means.

    Raises:
        ValueError: outputs that do not correspond.
    """
    outputs_p = [logits_p] if isinstance(logits_p, Tensor) else list(logits_p)
    outputs_q = [logits_q] if isinstance(logits_q, Tensor) else list(logits_q)
    shapes_p, shapes_q = ([tuple(o.shape) for o in outputs] for outputs in (outputs_p, outputs_q))
    if shapes_p != shapes_q or not shapes_p:
        raise ValueError(f"P gives outputs of shape {shapes_p}, Q of {shapes_q}; they must agree")
    pairs = zip(outputs_p, outputs_q, strict=True)
    return torch.stack([F.l1_loss(q, p) for p, q in pairs]).mean()


def activation_regularizer(feat: Tensor) -> Tensor:
    """L_a: minus the mean absolute activation of P's last feature map, of any shape."""
    return -feat.abs().mean()


def zaq_student_loss(
    logits_p: Outputs,
    logits_q: Outputs,
    feats_p: Sequence[Tensor],
    feats_q: Sequence[Tensor],
    alpha: float = 1.0,
    weights: Tensor | None = None,
    kind: FeatureLoss = "crm",
    mode: RelationMode = "batch",
    sync: bool = False,
) -> dict[str, Tensor]:
    """L_Q = D_o + alpha * D_f, which Q minimises on images that were detached from the generator.

    Args:
        logits_p: see :func:`output_discrepancy`; detached, as ``feats_p``.
        logits_q: see there.
        feats_p: see :func:`layer_distances`.
        feats_q: see there.
        alpha: weight of the features; 1 in the released code, 0.1 in the paper as others report it (not verified).
        weights: see :func:`combine_distances`.
        kind: see :func:`layer_distances`, as for the others.
        mode: see there.
        sync: see there.

    Returns:
        Scalars ``output`` and ``feature`` (unweighted), ``total``, and ``distances`` [L] without a graph, from which
        layer weights are updated.

    Raises:
        ValueError: see the functions named.
    """
    output = output_discrepancy(logits_p, logits_q)
    distances = layer_distances(feats_p, feats_q, kind, mode, sync=sync)
    feature = combine_distances(distances, weights, kind)
    total = output + alpha * feature
    return {"output": output, "feature": feature, "total": total, "distances": distances.detach()}


def zaq_generator_loss(
    logits_p: Outputs,
    logits_q: Outputs,
    feats_p: Sequence[Tensor],
    feats_q: Sequence[Tensor],
    alpha: float = 1.0,
    beta: float = 0.1,
    weights: Tensor | None = None,
    kind: FeatureLoss = "crm",
    mode: RelationMode = "batch",
    sync: bool = False,
) -> dict[str, Tensor]:
    """L_G = -D_o - alpha * D_f + beta * L_a, which G minimises; its gradient passes through P and Q.

    Args:
        logits_p: see :func:`zaq_student_loss`, as for the others; nothing is detached.
        logits_q: see there.
        feats_p: the last one is the map of L_a.
        feats_q: see there.
        alpha: see there.
        beta: weight of L_a; 0.1 in the released code, 0.05 in the paper as others report it (not verified).
        weights: see there.
        kind: see there.
        mode: see there.
        sync: see there.

    Returns:
        Scalars ``output``, ``feature`` (the two discrepancies, unweighted and positive), ``activation`` (L_a, negative)
        and ``total``.

    Raises:
        ValueError: see :func:`zaq_student_loss`.
    """
    terms = zaq_student_loss(logits_p, logits_q, feats_p, feats_q, alpha, weights, kind, mode, sync)
    activation = activation_regularizer(feats_p[-1])
    return {
        "output": terms["output"],
        "feature": terms["feature"],
        "activation": activation,
        "total": beta * activation - terms["total"],
    }


def _demand_same_channels(fp: Tensor, fq: Tensor) -> None:
    if fp.shape[1] != fq.shape[1]:
        raise ValueError(
            f"feature maps of P {tuple(fp.shape)} and Q {tuple(fq.shape)} differ in their channels; tap the same "
            "layers of both (--model.taps)"
        )
