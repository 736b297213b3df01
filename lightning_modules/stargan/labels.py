"""Source and target labels of StarGAN: vectors, permutations, single and named edits, joint labels."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.attributes import (
    HAIR_COLOURS,
    ExclusiveGroups,
    LabelKind,
    attribute_index,
    exclusive_indices,
)


def name_sets(attributes: Sequence[Any]) -> list[Sequence[str]]:
    """Names of every data set, of which there may be one."""
    one = not attributes or isinstance(attributes[0], str)
    return [attributes] if one else list(attributes)


def one_hot(labels: Tensor, n_classes: int) -> Tensor:
    """Class indices [B] as float32 vectors [B, n_classes]."""
    return F.one_hot(labels.long(), n_classes).float()


def permute_targets(
    labels: Tensor, perm: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Target labels of training: those of the batch in another order (released code).

    So targets follow the labels of the data, and a sample keeps its own one with a chance of at least 1/B.

    Args:
        labels: [B, ...].
        perm: permutation of 0..B-1 [B]; drawn if not given.
        generator: source of randomness for it.

    Returns:
        ``labels[perm]``.
    """
    if perm is None:
        device = generator.device if generator is not None else None
        perm = torch.randperm(len(labels), generator=generator, device=device)
    return labels[perm.to(labels.device)]


def single_attribute_targets(
    labels: Tensor, attributes: Sequence[str], exclusive: ExclusiveGroups = HAIR_COLOURS
) -> list[Tensor]:
    """For every attribute the labels with it edited, everything else as in the source (released code).

    An attribute of an exclusive group is set and the others of its group are cleared, also where it was set before;
    any other attribute is flipped.

    Args:
        labels: [B, c] with zeros and ones.
        attributes: their c names.
        exclusive: mutually exclusive groups.

    Returns:
        c tensors [B, c].

    Raises:
        ValueError: the number of names is not c, or names repeat.
    """
    _demand_width(labels, attributes)
    group_of = {i: group for group in exclusive_indices(attributes, exclusive) for i in group}
    targets = []
    for i in range(len(attributes)):
        target = labels.clone()
        if i in group_of:
            target[:, group_of[i]] = 0
            target[:, i] = 1
        else:
            target[:, i] = 1 - target[:, i]
        targets.append(target)
    return targets


def class_targets(batch_size: int, n_classes: int) -> list[Tensor]:
    """For every class its one-hot vector in all rows: ``n_classes`` tensors [batch_size, n_classes]."""
    return [row.repeat(batch_size, 1) for row in torch.eye(n_classes)]


def joint_label(
    labels: Tensor, dataset_index: int, dims: Sequence[int], kinds: Sequence[LabelKind]
) -> Tensor:
    """Label of one of several data sets as the generator takes it: all blocks, then a mask (paper, sec. 3.3).

    The blocks of the other data sets are zeros; the mask is the one-hot index of the data set.

    Args:
        labels: of this data set: zeros and ones [B, dims[i]]; for ``single_label`` also class indices [B].
        dataset_index: i.
        dims: number of attributes or classes of every data set.
        kinds: of their labels.

    Returns:
        float32 tensor [B, sum(dims) + len(dims)].

    Raises:
        ValueError: ``dataset_index`` is none of the data sets, ``dims`` and ``kinds`` differ in length, or
            the labels have another width.
    """
    if len(dims) != len(kinds):
        raise ValueError(f"{len(dims)} dims and {len(kinds)} kinds of labels differ in number")
    if not 0 <= dataset_index < len(dims):
        raise ValueError(f"dataset_index={dataset_index} must be in 0..{len(dims) - 1}")
    width = dims[dataset_index]
    own = labels.float()
    if kinds[dataset_index] == "single_label" and labels.dim() == 1:
        own = one_hot(labels, width)
    if own.dim() != 2 or own.shape[1] != width:
        raise ValueError(
            f"labels of data set {dataset_index} have shape {tuple(labels.shape)}; expected "
            f"[B, {width}] for {kinds[dataset_index]}"
        )
    blocks = [
        own if i == dataset_index else own.new_zeros(len(own), dim) for i, dim in enumerate(dims)
    ]
    mask = own.new_zeros(len(own), len(dims))
    mask[:, dataset_index] = 1
    return torch.cat([*blocks, mask], 1)


def parse_edits(
    edits: str, attributes: Sequence[str], exclusive: ExclusiveGroups = HAIR_COLOURS
) -> Callable[[Tensor], Tensor]:
    """Named edits, such as ``"+Smiling,-Young"``, as a function from source to target labels.

    ``+`` (or no sign) sets an attribute and clears the others of its exclusive group, ``-`` clears it; what is not
    named stays as it is.

    Args:
        edits: separated by commas.
        attributes: the c names.
        exclusive: mutually exclusive groups.

    Returns:
        Function from labels [B, c] with zeros and ones to new labels [B, c].

    Raises:
        ValueError: no edit, an unknown name (the nearest ones are listed), a name given twice, or two attributes of
            one exclusive group set at once. The function: the labels do not have c columns.
    """
    groups = exclusive_indices(attributes, exclusive)
    values: dict[int, int] = {}
    for edit in filter(None, map(str.strip, edits.split(","))):
        sign, name = _signed(edit, attributes)
        index = attribute_index(name, attributes)
        if index in values:
            raise ValueError(f"attribute {name!r} is edited twice in {edits!r}; name it once")
        values[index] = sign
    if not values:
        raise ValueError(
            f"{edits!r} names no attribute; write for example {'+' + attributes[0]!r} (--model.edits)"
        )
    cleared: list[int] = []
    for group in groups:
        added = [i for i in group if values.get(i)]
        if len(added) > 1:
            names = " and ".join(attributes[i] for i in added)
            raise ValueError(f"{names} exclude each other; set only one of them in {edits!r}")
        cleared += [i for i in group if added]

    def apply(labels: Tensor) -> Tensor:
        _demand_width(labels, attributes)
        target = labels.clone()
        target[:, cleared] = 0
        for i, value in values.items():
            target[:, i] = value
        return target

    return apply


def _signed(edit: str, attributes: Sequence[str]) -> tuple[int, str]:
    # A folder may be called "-5": a name as it stands comes before a sign.
    if edit in attributes:
        return 1, edit
    sign, name = re.fullmatch(r"([+-]?)\s*(.*)", edit).groups()  # type: ignore[union-attr]
    return (0 if sign == "-" else 1), name


def _demand_width(labels: Tensor, attributes: Sequence[str]) -> None:
    if labels.dim() != 2 or labels.shape[1] != len(attributes):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for {len(attributes)} attributes "
            f"({', '.join(attributes)}); expected [B, {len(attributes)}]"
        )
