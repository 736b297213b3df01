"""Groups of images with one label, and the pairs of images that the match head compares."""

import torch
from torch import Tensor

FEWEST_GROUPS = 3
SMALLEST_GROUP = 4


def match_pair_indices(
    batch_size: int, group_size: int = 4, both: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs within a batch of n groups, each of one label and all labels different (released code).

    Slots 0 and 2 of every group are anchors; slot 1 is the positive of both. The negative of slot 2 is slot 3 of the
    group before, that of slot 0 is slot 3 of the group before that one. Slots from 4 on are not used.

    Args:
        batch_size: images, group after group.
        group_size: images of one label.
        both: with the second half of the pairs: both anchors with a positive and a negative each.

    Returns:
        ``anchor``, ``other`` and ``is_match``, int64 [P]; P = 4n, or 2n without ``both``; half of the pairs match.

    Raises:
        ValueError: groups of fewer than 4 images, a batch that is no multiple of the group, or fewer than 3 groups,
            with which negatives would have the label of their anchor.
    """
    if group_size < SMALLEST_GROUP:
        raise ValueError(
            f"group_size={group_size}: pairs need {SMALLEST_GROUP} images of a label (--data.group_size)"
        )
    if batch_size % group_size:
        raise ValueError(f"a batch of {batch_size} is not made of groups of {group_size} images")
    n = batch_size // group_size
    if n < FEWEST_GROUPS:
        raise ValueError(
            f"{n} groups of {group_size} images: with fewer than {FEWEST_GROUPS} labels in a batch, images of the "
            "same label would count as different; raise --data.n_groups"
        )
    groups = torch.arange(n)

    def slot(number: int, back: int = 0) -> Tensor:
        return (groups - back) % n * group_size + number

    blocks = [(slot(0), slot(1), 1), (slot(2), slot(3, 1), 0)]
    if both:
        blocks += [(slot(0), slot(3, 2), 0), (slot(2), slot(1), 1)]
    anchors, others, labels = zip(*blocks, strict=True)
    return torch.cat(anchors), torch.cat(others), torch.tensor(labels).repeat_interleave(n)


def match_targets(chosen: Tensor, group_size: int = 4) -> tuple[Tensor, Tensor]:
    """Target labels of a batch, and the order in which its translations form groups of one target (released code).

    The targets a, b, c, d follow each other all over the batch, so that every group of sources is translated to each.

    Args:
        chosen: distinct target labels [n, ...], vectors or ids.
        group_size: images per target.

    Returns:
        ``targets`` [n * group_size, ...], and ``regroup``, int64 [n * group_size]: ``translations[regroup]`` has group
        after group, image j of a group coming from the j-th stretch of n sources.
    """
    n = len(chosen)
    targets = chosen.repeat(group_size, *[1] * (chosen.dim() - 1))
    regroup = torch.arange(n * group_size, device=chosen.device).view(group_size, n).T.flatten()
    return targets, regroup
