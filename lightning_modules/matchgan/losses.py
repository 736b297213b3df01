"""Losses and objectives of MatchGAN as pure functions; what it shares with StarGAN is in ``stargan/losses.py``.

Sun, Bhattarai, Kim, "MatchGAN: A Self-Supervised Semi-Supervised Conditional Generative Adversarial Network",
ACCV 2020. Defaults follow the released code. The objectives are the sums of the terms (of D with the gradient penalty),
weighted with ``{"cls": 1, "rec": 10, "gp": 10, "match": 0.5}`` by :func:`lightning_modules.stargan.losses.weighted`.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.matchgan.networks import MatchGANDiscriminator
from lightning_modules.matchgan.pairs import match_pair_indices
from lightning_modules.stargan.losses import (
    Classification,
    Translator,
    critic_losses,
    cycle_reconstruction_loss,
    generator_adversarial_loss,
)

MatchReduction = Literal["mean", "sum_of_means"]
MatchSource = Literal["real", "fake", "both"]
Matching = Callable[[Tensor, Tensor], Tensor]
"""Loss of pair logits [P, 2] and 1 for pairs of one label [P], a scalar."""


def match_loss(pair_logits: Tensor, is_match: Tensor, reduction: MatchReduction = "mean") -> Tensor:
    """Two-way cross entropy of "these two images have the same label"; D and G both minimise it.

    Args:
        pair_logits: [P, 2]; column 1 is "same".
        is_match: [P], 1 for the same label, 0 for different ones.
        reduction: ``"mean"`` over all pairs (released code); ``"sum_of_means"``: mean of the matching pairs plus mean
            of the others (the two expectations of the triplet form), twice as much for equally many of both.

    Returns:
        Scalar.

    Raises:
        ValueError: unknown ``reduction``.
    """
    if reduction not in get_args(MatchReduction):
        raise ValueError(
            f"unknown match_reduction={reduction!r}; choose 'mean' or 'sum_of_means' "
            "(--model.match_reduction)"
        )
    is_match = is_match.to(pair_logits.device).long()
    per_pair = F.cross_entropy(pair_logits, is_match, reduction="none")
    if reduction == "mean":
        return per_pair.mean()
    same = is_match.to(per_pair.dtype)
    different = 1 - same
    return (per_pair * same).sum() / same.sum() + (per_pair * different).sum() / different.sum()


def group_match_loss(
    discriminator: MatchGANDiscriminator,
    *grouped: Tensor,
    group_size: int = 4,
    n_groups: int | None = None,
    matching: Matching = match_loss,
) -> Tensor:
    """:func:`match_loss` over the pairs of batches in groups of one label.

    Args:
        discriminator: whose match head judges.
        grouped: trunk outputs [B, C, h, h] of one or more batches, group after group; pairs are within a batch.
        group_size: images per group.
        n_groups: groups of different labels in a row, a block; pairs are within a block. None: a batch is one block.
        matching: loss of pair logits and of whether they match.

    Returns:
        Scalar.

    Raises:
        ValueError: as :func:`match_pair_indices` and ``matching``.
    """
    logits, labels = [], []
    for features in grouped:
        rows = len(features) if n_groups is None else n_groups * group_size
        for block in features.split(rows):
            anchor, other, is_match = match_pair_indices(len(block), group_size)
            logits.append(discriminator.match_features(block[anchor], block[other]))
            labels.append(is_match)
    return matching(torch.cat(logits), torch.cat(labels))


def discriminator_terms(
    discriminator: MatchGANDiscriminator,
    x: Tensor,
    fake: Tensor,
    labels: Tensor | None,
    regroup: Tensor,
    classification: Classification,
    group_size: int = 4,
    n_groups: int | None = None,
    match_source: MatchSource = "real",
    matching: Matching = match_loss,
    idle_heads: Literal["zero", "skip"] = "zero",
) -> dict[str, Tensor]:
    """Terms of the discriminator without the gradient penalty, not weighted.

    Args:
        discriminator: the critic with its three heads; its trunk runs once per image.
        x: real images [B, C, H, W] in [-1, 1]; labelled ones in groups of one label.
        fake: their translations; no gradient flows into them.
        labels: of ``x`` as ``classification`` takes them; None for unlabelled images.
        regroup: order in which ``fake`` forms groups of one target, see :func:`match_targets`.
        classification: loss of logits and labels; only real images are classified.
        group_size: images per group.
        n_groups: see :func:`group_match_loss`.
        match_source: pairs of ``"real"`` images, on labelled batches (released code); of ``"fake"`` ones, whose targets
            are always known (the abstract; that unlabelled batches take part is inferred); or all pairs of ``"both"``.
        matching: loss of pair logits and of whether they match.
        idle_heads: gradients of heads without a loss: ``"zero"``, with which Adam still moves them by momentum (as
            the released code's PyTorch did), or none, ``"skip"``.

    Returns:
        Scalars ``d_real``, ``d_fake``, with labels ``d_cls``, with pairs ``d_match``, and with idle heads ``d_idle``,
        which is 0.

    Raises:
        ValueError: an unknown option, or groups as in :func:`match_pair_indices`.
    """
    if match_source not in get_args(MatchSource):
        raise ValueError(
            f"unknown d_match_source={match_source!r}; choose one of {', '.join(get_args(MatchSource))} "
            "(--model.d_match_source)"
        )
    if idle_heads not in ("zero", "skip"):
        raise ValueError(
            f"unknown idle_heads={idle_heads!r}; choose 'zero' or 'skip' (--model.idle_heads)"
        )
    real_features, fake_features = discriminator.features(x), discriminator.features(fake.detach())
    real_scores, logits = discriminator.heads(real_features)
    fake_scores, _ = discriminator.heads(fake_features)
    d_real, d_fake = critic_losses(real_scores, fake_scores)
    terms = {"d_real": d_real, "d_fake": d_fake}
    idle = []
    if labels is None:
        idle.append(discriminator.class_head)
    else:
        terms["d_cls"] = classification(logits, labels)
    grouped = [real_features] if match_source != "fake" and labels is not None else []
    if match_source != "real":
        grouped.append(fake_features[regroup])
    if grouped:
        terms["d_match"] = group_match_loss(
            discriminator, *grouped, group_size=group_size, n_groups=n_groups, matching=matching
        )
    else:
        idle.append(discriminator.match_head)
    if idle and idle_heads == "zero":
        terms["d_idle"] = torch.stack([0 * head.weight.sum() for head in idle]).sum()
    return terms


def generator_terms(
    generator: Translator,
    discriminator: MatchGANDiscriminator,
    x: Tensor,
    source: Tensor | None,
    target: Tensor,
    target_labels: Tensor,
    regroup: Tensor,
    classification: Classification,
    group_size: int = 4,
    n_groups: int | None = None,
    matching: Matching = match_loss,
) -> dict[str, Tensor]:
    """Terms of the generator, not weighted.

    Args:
        generator: translates images.
        discriminator: judges them.
        x: real images [B, C, H, W] in [-1, 1].
        source: their own labels as the generator takes them [B, c]; None for unlabelled images, which are not
            reconstructed.
        target: the wanted labels as the generator takes them [B, c].
        target_labels: the wanted labels as ``classification`` takes them.
        regroup: order in which the translations form groups of one target, see :func:`match_targets`.
        classification: loss of logits and labels.
        group_size: images per group.
        n_groups: see :func:`group_match_loss`.
        matching: loss of pair logits and of whether they match.

    Returns:
        Scalars ``g_fake``, ``g_cls``, ``g_match`` and, with source labels, ``g_rec``.

    Raises:
        ValueError: groups as in :func:`match_pair_indices`.
    """
    fake = generator(x, target)
    features = discriminator.features(fake)
    scores, logits = discriminator.heads(features)
    terms = {
        "g_fake": generator_adversarial_loss(scores),
        "g_cls": classification(logits, target_labels),
        "g_match": group_match_loss(
            discriminator,
            features[regroup],
            group_size=group_size,
            n_groups=n_groups,
            matching=matching,
        ),
    }
    if source is not None:
        terms["g_rec"] = cycle_reconstruction_loss(x, generator(fake, source))
    return terms
