"""Signatures: positions with the same set of concepts are the same to every formula, so they are counted together.

The 784,000 positions of a thousand small images have some 10,000 signatures. All that a search needs of a unit is how
many positions of every signature it fires on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

BITS_OF_A_WORD = 64


@dataclass(frozen=True)
class Signatures:
    """Distinct sets of concepts and how many positions have each.

    Attributes:
        indptr: Long [S+1]; the concepts of signature s are ``indices[indptr[s] : indptr[s+1]]``.
        indices: Long [nnz], rows of the concepts, ascending within a signature.
        weights: Long [S], positions of every signature.
        index_map: Long [D], the signature of every position; None where the positions were streamed.
    """

    indptr: Tensor
    indices: Tensor
    weights: Tensor
    index_map: Tensor | None = None

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def owners(self) -> Tensor:
        """Long [nnz], the signature that every entry of ``indices`` belongs to."""
        numbers = torch.arange(len(self), device=self.indptr.device)
        return numbers.repeat_interleave(self.indptr.diff())

    def to(self, device: torch.device | str) -> "Signatures":
        """The same on another device."""
        index_map = None if self.index_map is None else self.index_map.to(device)
        return Signatures(
            self.indptr.to(device), self.indices.to(device), self.weights.to(device), index_map
        )


def _group(columns: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Numbers [D] that are equal where all columns are equal, and how many there are; exact, no hashing."""
    values, inverse = columns[0].unique(return_inverse=True)
    for column in columns[1:]:
        known, coded = column.unique(return_inverse=True)
        values, inverse = (inverse * len(known) + coded).unique(return_inverse=True)
    return inverse, len(values)


def _representatives(inverse: Tensor, groups: int) -> Tensor:
    """The first position [S] of every group."""
    first = torch.full((groups,), len(inverse), device=inverse.device)
    positions = torch.arange(len(inverse), device=inverse.device)
    return first.scatter_reduce(0, inverse, positions, "amin")


def unique_signatures(masks: Tensor) -> Signatures:
    """The signatures of concept masks that fit into memory.

    Args:
        masks: bool [C, ...] with D positions.

    Returns:
        Signatures in the order of their bit patterns, with ``index_map`` [D].

    Raises:
        ValueError: no position.
    """
    flat = masks.flatten(1).bool()
    if not flat.shape[1]:
        raise ValueError(f"concept masks of shape {tuple(masks.shape)} have no position")
    size = -(-max(len(flat), 1) // BITS_OF_A_WORD) * BITS_OF_A_WORD // 8
    octets = torch.zeros(size, flat.shape[1], dtype=torch.uint8, device=flat.device)
    for row, mask in enumerate(flat):
        octets[row // 8] |= mask.to(torch.uint8) << row % 8
    words = octets.T.contiguous().view(torch.long).unbind(1)
    inverse, groups = _group(words)
    members = flat[:, _representatives(inverse, groups)].T
    owners, indices = members.nonzero(as_tuple=True)
    return Signatures(
        _pointers(owners, groups), indices, torch.bincount(inverse, minlength=groups), inverse
    )


def _pointers(owners: Tensor, groups: int) -> Tensor:
    counts = torch.bincount(owners, minlength=groups)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


class SignatureBuilder:
    """Collects the signatures of a set of images batch by batch, in memory that grows with the signatures alone.

    Args:
        labels: labels of the concepts, ascending; a concept's row is its position here.

    Raises:
        ValueError: labels that are not ascending and positive.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        if list(labels) != sorted(set(labels)) or (labels and labels[0] < 1):
            raise ValueError("the labels of concepts must be different, ascending and at least 1")
        self.labels = list(labels)
        self._numbers: dict[tuple[int, ...], int] = {}
        self._weights: list[int] = []

    def __len__(self) -> int:
        return len(self._weights)

    def add(self, layers: Tensor, count: bool = True) -> Tensor:
        """Adds the positions of a batch.

        Args:
            layers: labels [N, K, ...], 0 for none, see :func:`~lightning_modules.dissection.masks.label_layers`.
            count: False in a second pass over the images, whose positions are only looked up.

        Returns:
            Long [N, ...], the signature of every position, valid as long as the builder lives.

        Raises:
            ValueError: a label that is not one of ``labels``.
        """
        known = torch.tensor([0, *self.labels], device=layers.device)
        rows = torch.searchsorted(known, layers.contiguous()).clamp_max(len(known) - 1)
        if not torch.equal(known[rows], layers.long()):
            strange = sorted(set(layers.unique().tolist()) - set(known.tolist()))
            raise ValueError(
                f"labels {strange[:5]} of the label maps are not among the {len(self.labels)} concepts: "
                "add them to the list of concepts or correct the maps"
            )
        flat = rows.movedim(1, -1).flatten(0, -2).sort(dim=1).values
        shape = (layers.shape[0], *layers.shape[2:])
        if not len(flat):
            return torch.zeros(shape, dtype=torch.long, device=layers.device)
        nothing = torch.zeros(len(flat), dtype=torch.long, device=layers.device)
        inverse, groups = _group([nothing, *flat.T])
        sets = flat[_representatives(inverse, groups)].tolist()
        weights = (torch.bincount(inverse, minlength=groups) * count).tolist()
        # A label in two channels is one concept.
        members = [tuple(sorted({row - 1 for row in entry if row})) for entry in sets]
        return self._number(members, weights).to(layers.device)[inverse].view(shape)

    def merge(self, other: Signatures) -> Tensor:
        """Adds the signatures another process collected over the same labels.

        Returns:
            Long [S of the other], our number of each of its signatures.
        """
        bounds, indices = other.indptr.tolist(), other.indices.tolist()
        members = [tuple(indices[a:b]) for a, b in pairwise(bounds)]
        return self._number(members, other.weights.tolist())

    def _number(self, members: list[tuple[int, ...]], weights: list[int]) -> Tensor:
        numbers = []
        for rows, weight in zip(members, weights, strict=True):
            number = self._numbers.setdefault(rows, len(self._weights))
            if number == len(self._weights):
                self._weights.append(0)
            self._weights[number] += weight
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.long)

    def signatures(self) -> Signatures:
        """What was collected so far."""
        sizes = torch.tensor([len(rows) for rows in self._numbers], dtype=torch.long)
        indices = [row for rows in self._numbers for row in rows]
        return Signatures(
            torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]),
            torch.tensor(indices, dtype=torch.long),
            torch.tensor(self._weights, dtype=torch.long),
        )


class UnitCounts:
    """On how many positions of every signature a unit fires; units fire rarely, so only what is not 0 is kept.

    Args:
        n_units: units U.
    """

    def __init__(self, n_units: int) -> None:
        self.n_units = n_units
        self._keys = torch.zeros(0, dtype=torch.long)
        self._counts = torch.zeros(0, dtype=torch.long)

    def add(self, unit_masks: Tensor, signature_of: Tensor) -> None:
        """Adds a batch.

        Args:
            unit_masks: bool [U, ...].
            signature_of: Long [...], from :meth:`SignatureBuilder.add`.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if unit_masks.shape != (self.n_units, *signature_of.shape):
            raise ValueError(
                f"unit masks of shape {tuple(unit_masks.shape)} must be "
                f"{(self.n_units, *signature_of.shape)}: units, then the shape of the signatures"
            )
        units, positions = unit_masks.flatten(1).nonzero(as_tuple=True)
        keys = _key(units, signature_of.flatten()[positions])
        self._merge(*(part.cpu() for part in keys.unique(return_counts=True)))

    def merge(self, other: "UnitCounts", renumbered: Tensor) -> None:
        """Adds what another process counted.

        Args:
            other: its counts.
            renumbered: our number of each of its signatures, from :meth:`SignatureBuilder.merge`.
        """
        units, signatures = other._keys >> 32, other._keys & 0xFFFFFFFF
        self._merge(_key(units, renumbered[signatures]), other._counts)

    def _merge(self, keys: Tensor, counts: Tensor) -> None:
        self._keys, inverse = torch.cat([self._keys, keys]).unique(return_inverse=True)
        total = torch.zeros_like(self._keys)
        self._counts = total.index_add(0, inverse, torch.cat([self._counts, counts]))

    def unit(self, unit: int, n_signatures: int) -> Tensor:
        """Long [S], the counts of one unit."""
        bounds = torch.tensor([unit << 32, (unit + 1) << 32])
        start, stop = torch.searchsorted(self._keys, bounds).tolist()
        counts = torch.zeros(n_signatures, dtype=torch.long)
        counts[self._keys[start:stop] & 0xFFFFFFFF] = self._counts[start:stop]
        return counts

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, as tensors."""
        return {"keys": self._keys, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._keys, self._counts = state["keys"], state["counts"]


def _key(units: Tensor, signatures: Tensor) -> Tensor:
    """Unit and signature in one number that sorts by unit."""
    return (units << 32) | signatures
