"""Which images of an attribute data set are for testing, and which of the others keep their label.

Reproduces the splits of the released codes of StarGAN and MatchGAN; all are functions of what is given, without state.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.attributes import label_ids

REFERENCE_TEST_IMAGES = 1999


class LabelSplit(NamedTuple):
    """Images by their number in the attribute file, counted from 1.

    Attributes:
        labelled_ids: [L], class by class, in file order within a class.
        labelled_class: row of the label space of each [L].
        unlabelled_ids: [U] in file order.
        test_ids: [T] in file order.
    """

    labelled_ids: Tensor
    labelled_class: Tensor
    unlabelled_ids: Tensor
    test_ids: Tensor


def reference_celeba_split(n_images: int, seed: int = 1234) -> tuple[list[int], list[int]]:
    """StarGAN's random split of CelebA, which needs nothing but the number of images (released code).

    The first 1,999 of the shuffled images are for testing (2,000 in the paper); all, if there are no more. It ignores
    the official partition, so identities are on both sides.

    Args:
        n_images: 202,599 for CelebA.
        seed: of Python's generator; 1234 in the released code.

    Returns:
        Training and test images by their number in ``list_attr_celeba.txt``, counted from 1, in shuffled order.

    Raises:
        ValueError: no image.
    """
    if n_images < 1:
        raise ValueError(f"{n_images} images cannot be split; is --data.root right?")
    ids = list(range(1, n_images + 1))
    random.Random(seed).shuffle(ids)
    return ids[REFERENCE_TEST_IMAGES:], ids[:REFERENCE_TEST_IMAGES]


def balanced_label_split(
    labels: Tensor, partition: Sequence[int] | Tensor, n_labelled: float, label_space: Tensor
) -> LabelSplit:
    """Labels for about ``n_labelled`` training images, as equally many of each class as there are (released code).

    Every round takes the next image of every class in file order, until at least ``n_labelled`` are taken: whole
    rounds, so the split is deterministic, a little larger than asked for, and nested in ``n_labelled``. A class
    without images left is skipped. Training images with a label outside the space are in neither pool.

    Args:
        labels: [N, c]; an attribute is present where it is positive (-1 and 1, or 0 and 1).
        partition: [N]; 0 is training, 1 validation (not used), 2 test.
        n_labelled: wanted number of labelled images, also a fraction of one.
        label_space: [K, c] with zeros and ones, the classes.

    Raises:
        ValueError: sizes differ, a partition is not 0, 1 or 2, ``n_labelled`` is not positive, or no training
            image has a label of the space.
    """
    partition = torch.as_tensor(partition)
    if len(labels) != len(partition):
        raise ValueError(f"{len(labels)} labels and {len(partition)} partition entries differ")
    odd = sorted({int(value) for value in partition.unique()} - {0, 1, 2})
    if odd:
        raise ValueError(f"partition has {odd}; it must be 0 (train), 1 (validation) or 2 (test)")
    if not n_labelled > 0:
        raise ValueError(f"n_labelled={n_labelled} must be positive (--data.labelled)")
    ids = label_ids((labels > 0).float(), label_space)
    ids = torch.where(partition == 0, ids, -1)
    of_class = [(ids == k).nonzero().flatten() for k in range(len(label_space))]
    available = sum(map(len, of_class))
    if not available:
        raise ValueError("no training image has a label of the label space (--data.attributes)")
    rounds = taken = 0
    while taken < min(n_labelled, available):
        taken += sum(len(members) > rounds for members in of_class)
        rounds += 1
    labelled = torch.cat([members[:rounds] for members in of_class])
    unlabelled = ids >= 0
    unlabelled[labelled] = False
    return LabelSplit(
        labelled + 1,
        ids[labelled],
        unlabelled.nonzero().flatten() + 1,
        (partition == 2).nonzero().flatten() + 1,
    )


def identity_label_split(
    identities: Sequence[str], percent: float, seed: int = 1234
) -> tuple[list[str], list[str]]:
    """People whose images keep their label: the first ``ceil(n * percent / 100)`` of n shuffled ones (released code).

    Args:
        identities: in the order of their first appearance; repetitions count once.
        percent: of the identities, in (0, 100].
        seed: of Python's generator; 1234 in the released code.

    Returns:
        Identities with and without labels; nested in ``percent``.

    Raises:
        ValueError: no identity, or ``percent`` out of range.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"percent={percent} of labelled identities must be in (0, 100]")
    people = list(dict.fromkeys(identities))
    if not people:
        raise ValueError("there is no identity to split; is --data.root right?")
    random.Random(seed).shuffle(people)
    count = math.ceil(len(people) * percent / 100)
    return people[:count], people[count:]
