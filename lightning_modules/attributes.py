"""Binary attributes by name: mutually exclusive groups and the space of sensible labels.

What data modules and papers must agree on. A label is a vector of zeros and ones, one entry per
selected attribute; among the attributes of an exclusive group at most one is 1.
"""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal

import torch
from torch import Tensor

LabelKind = Literal["multi_label", "single_label"]
"""Labels are binary vectors [B, c], or class indices [B]."""

ExclusiveGroups = Sequence[str] | Sequence[Sequence[str]]
"""One group of attribute names, or several; names that are not selected are ignored."""

HAIR_COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
"""The exclusive group of CelebA in StarGAN and MatchGAN."""

LARGEST_LABEL_SPACE = 2**16


def attribute_index(name: str, attributes: Sequence[str]) -> int:
    """Position of an attribute.

    Raises:
        ValueError: there is no such attribute; names the nearest ones.
    """
    if name in attributes:
        return list(attributes).index(name)
    by_lower = {other.lower(): other for other in attributes}
    close = [by_lower[near] for near in get_close_matches(name.lower(), by_lower, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(attributes)}"
    raise ValueError(f"no attribute {name!r}; {hint}")


def exclusive_indices(attributes: Sequence[str], exclusive: ExclusiveGroups) -> list[list[int]]:
    """Positions of the selected attributes of every exclusive group; groups without any are left out.

    Raises:
        ValueError: an attribute is selected twice, or belongs to two groups; ``exclusive`` is a string.
    """
    if isinstance(exclusive, str):
        raise ValueError(f"exclusive={exclusive!r} must be a list of names, or of such lists")
    _demand_distinct(attributes, "is selected twice; give every attribute once")
    flat = [name for name in exclusive if isinstance(name, str)]
    several = [group for group in exclusive if not isinstance(group, str)]
    groups = [flat, *several] if flat else several
    names = [name for group in groups for name in group]
    _demand_distinct(names, "is in two exclusive groups; leave it in one")
    found = [[i for i, name in enumerate(attributes) if name in group] for group in groups]
    return [indices for indices in found if indices]


def _demand_distinct(names: Sequence[str], message: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"attribute {name!r} {message}")


def enumerate_label_space(
    attributes: Sequence[str], exclusive: ExclusiveGroups = HAIR_COLOURS, at_most: int = 1
) -> Tensor:
    """All labels with at most ``at_most`` attributes of every exclusive group, in the order of binary numbers.

    The last attribute changes fastest, row 0 is all zeros. MatchGAN's released code has a second enumeration, which
    is wrong for fewer than three hair colours; this is the first one.

    Args:
        attributes: the c selected attributes.
        exclusive: mutually exclusive groups.
        at_most: how many attributes of a group may be 1.

    Returns:
        float32 tensor [K, c].

    Raises:
        ValueError: no attribute, a repeated one, ``at_most`` below 1, or more than 65536 labels.
    """
    if not attributes:
        raise ValueError("no attribute is selected; give at least one (--data.attributes)")
    if at_most < 1:
        raise ValueError(f"at_most={at_most} must be at least 1")
    groups = exclusive_indices(attributes, exclusive)
    group_of = {i: group for group in groups for i in group}
    rows: list[list[int]] = [[]]
    for i in range(len(attributes)):
        before = [j for j in group_of.get(i, []) if j < i]
        rows = [
            [*row, value]
            for row in rows
            for value in (0, 1)
            if not value or i not in group_of or sum(row[j] for j in before) < at_most
        ]
        if len(rows) > LARGEST_LABEL_SPACE:
            raise ValueError(
                f"{len(attributes)} attributes have more than {LARGEST_LABEL_SPACE} sensible labels; "
                "select fewer, or use the labels that occur (observed_label_space)"
            )
    return torch.tensor(rows, dtype=torch.float32)


def observed_label_space(labels: Tensor) -> Tensor:
    """The distinct labels of a data set in the order of :func:`enumerate_label_space`.

    Args:
        labels: [N, c] with zeros and ones.

    Returns:
        float32 tensor [K, c].
    """
    return labels.float().unique(dim=0)


def label_ids(labels: Tensor, label_space: Tensor) -> Tensor:
    """Row of the label space that every label equals, -1 for a label outside of it.

    Args:
        labels: [N, c] with zeros and ones.
        label_space: [K, c], distinct rows in any order.

    Returns:
        int64 tensor [N].

    Raises:
        ValueError: the numbers of attributes differ, or a label has other entries than 0 and 1.
    """
    if labels.shape[1] != label_space.shape[1]:
        raise ValueError(
            f"labels have {labels.shape[1]} attributes, the label space has {label_space.shape[1]}"
        )
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError("labels must be 0 or 1; convert -1/1 with (labels > 0)")
    together = torch.cat([label_space.to(labels), labels])
    _, group = together.unique(dim=0, return_inverse=True)
    rows = torch.full((len(together),), -1, device=labels.device)
    rows[group[: len(label_space)]] = torch.arange(len(label_space), device=labels.device)
    return rows[group[len(label_space) :]]
