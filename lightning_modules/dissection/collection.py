"""What the units of a layer do on a probing set, collected batch by batch and merged over processes.

Everything is integers or a maximum, so that neither batches nor processes change it.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.dissection.masks import unit_masks
from lightning_modules.dissection.scores import CategoryTally
from lightning_modules.dissection.signatures import SignatureBuilder, Signatures, UnitCounts

LARGEST_BLOCK = 2**24
"""Upsampled activations held at a time."""


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """A layer by its dotted name; that of a module of this collection may be given without ``network.``.

    Raises:
        ValueError: there is none; the message lists the nearest names.
    """
    layers = dict(network.named_modules())
    for candidate in (name, f"network.{name}"):
        if candidate and candidate in layers:
            return layers[candidate]
    names = [known for known in layers if known]
    inner = [known.removeprefix("network.") for known in names]
    near = get_close_matches(name, dict.fromkeys([*names, *inner]), n=6, cutoff=0.4)
    raise ValueError(
        f"{type(network).__name__} has no layer {name!r} (--model.layer); "
        + (f"nearest names: {', '.join(near)}" if near else f"it has {', '.join(inner[:12])}")
    )


def as_maps(output: Any) -> Tensor:
    """What a layer gives, as maps [B, U, h, w].

    Args:
        output: maps; tokens [B, T, D], of which a class token before a square grid is dropped; vectors [B, U], which
            are maps of one position; or a tuple, list or dict with one of these in the first place.

    Raises:
        ValueError: anything else.
    """
    if isinstance(output, dict) and output:
        output = next(iter(output.values()))
    if isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.ndim == 4:
        return output
    if isinstance(output, Tensor) and output.ndim == 2:
        return output[:, :, None, None]
    if isinstance(output, Tensor) and output.ndim == 3:
        tokens = output.shape[1]
        for extra in (0, 1):
            side = math.isqrt(tokens - extra)
            if side and side * side == tokens - extra:
                grid = output[:, extra:].transpose(1, 2)
                return grid.reshape(len(output), -1, side, side)
    shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise ValueError(
        f"the layer gives {shape}; expected maps [B, U, h, w], vectors [B, U] or tokens [B, T, D] of a square grid: "
        "choose another --model.layer"
    )


def layer_activations(
    network: nn.Module, layer: nn.Module, run: Callable[[], Any]
) -> tuple[Tensor, Any]:
    """What a layer gives while the network runs; the last time, if it is used several times.

    Args:
        network: whose layer it is.
        layer: of it.
        run: runs the network.

    Returns:
        Activations [B, U, h, w] and what ``run`` returned.

    Raises:
        ValueError: the layer took no part, or gives something else than maps, tokens or vectors.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        # A copy: what follows may work in place.
        seen[:] = [as_maps(output).detach().clone()]

    handle = layer.register_forward_hook(keep)
    try:
        result = run()
    finally:
        handle.remove()
    if not seen:
        raise ValueError(
            f"the layer takes no part when {type(network).__name__} classifies an image: choose another --model.layer"
        )
    return seen[0], result


def fingerprint_of(*parts: Any) -> str:
    """A hash of tensors, networks (class, structure and state) and anything whose ``repr`` says it all."""
    digest = hashlib.blake2b(digest_size=12)

    def add(value: Tensor) -> None:
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        octets = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(octets.numpy().tobytes())

    for part in parts:
        if isinstance(part, Tensor):
            add(part)
        else:
            digest.update(repr(part).encode())
        if isinstance(part, nn.Module):
            for name, value in part.state_dict().items():
                digest.update(name.encode())
                add(value)
        digest.update(b"\0")
    return digest.hexdigest()


@dataclass
class Collected:
    """Everything a search needs.

    Attributes:
        signatures: of all positions, in the order of their concepts.
        counts: of every unit.
        presence: bool [N, C], which image has which concept.
        unit_area: per scope but ``all``, the unit's area in the images that count for a category, Long [U, K].
    """

    signatures: Signatures
    counts: UnitCounts
    presence: Tensor
    unit_area: dict[str, Tensor]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors."""
        found = self.signatures
        return {
            "signatures": (found.indptr, found.indices, found.weights),
            "n_units": self.counts.n_units,
            "counts": self.counts.state_dict(),
            "presence": self.presence,
            "unit_area": self.unit_area,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Collected":
        """What :meth:`state_dict` gave."""
        counts = UnitCounts(state["n_units"])
        counts.load_state_dict(state["counts"])
        return cls(Signatures(*state["signatures"]), counts, state["presence"], state["unit_area"])


class Collector:
    """Counts where units fire, batch by batch.

    Args:
        labels: numbers of the concepts, ascending.
        categories: of the concepts.
        thresholds: of the units [U].
        upsampling: arguments of :func:`~lightning_modules.dissection.masks.unit_masks`.
    """

    def __init__(
        self,
        labels: Sequence[int],
        categories: Sequence[str],
        thresholds: Tensor,
        upsampling: dict[str, Any],
    ) -> None:
        self.labels = list(labels)
        self.thresholds = thresholds
        self.upsampling = upsampling
        self.builder = SignatureBuilder(self.labels)
        n_units = len(thresholds)
        self._counts, self._recent = UnitCounts(n_units), UnitCounts(n_units)
        kinds = list(dict.fromkeys(categories))
        self.tally = CategoryTally(n_units, len(kinds))
        # Bit k of a label's entry: its category is k.
        self._bits = torch.zeros(max(self.labels, default=0) + 1, dtype=torch.int64)
        for label, category in zip(self.labels, categories, strict=True):
            self._bits[label] = 1 << kinds.index(category)
        self._n_kinds = len(kinds)
        self._presence: list[Tensor] = []
        self._index: list[Tensor] = []

    def add(self, activations: Tensor, layers: Tensor, index: Tensor) -> None:
        """Adds a batch.

        Args:
            activations: [B, U, h, w].
            layers: numbers of concepts [B, K, H, W], 0 for none.
            index: of the images [B].

        Raises:
            ValueError: a number that is no concept, or layers of another size than the masks.
        """
        size = self.upsampling["size"]
        if tuple(layers.shape[-2:]) != tuple(size):
            raise ValueError(
                f"the concept masks of a batch are {tuple(layers.shape[-2:])}, expected {tuple(size)} (height, width): "
                "all masks of a probing set have one size"
            )
        layers = layers.long().cpu()
        signature_of = self.builder.add(layers)
        self._index.append(index.cpu())
        self._presence.append(self._present(layers))
        codes = self._bits[layers].unbind(1)
        kinds = codes[0]
        for code in codes[1:]:
            kinds = kinds | code
        found, kind_of = kinds.unique(return_inverse=True)
        has_category = (found[:, None] >> torch.arange(self._n_kinds)) & 1 == 1
        height, width = size
        step = max(1, LARGEST_BLOCK // (len(self.thresholds) * height * width))
        for first in range(0, len(layers), step):
            part = slice(first, first + step)
            fires = unit_masks(activations[part], self.thresholds, **self.upsampling)
            self._recent.add(fires, signature_of[part].to(fires.device))
            self.tally.add(fires, kind_of[part].to(fires.device), has_category.to(fires.device))
        # Merging into a large table for every batch would cost more than everything else.
        sizes = [len(part.state_dict()["keys"]) for part in (self._recent, self._counts)]
        if 4 * sizes[0] > sizes[1]:
            self._settle()

    def _settle(self) -> None:
        self._counts.merge(self._recent, torch.arange(len(self.builder)))
        self._recent = UnitCounts(self._counts.n_units)

    def _present(self, layers: Tensor) -> Tensor:
        known = torch.tensor([0, *self.labels])
        rows = torch.searchsorted(known, layers.contiguous()).flatten(1)
        present = torch.zeros(len(layers), len(known), dtype=torch.bool)
        return present.scatter_(1, rows, True)[:, 1:]

    def part(self) -> dict[str, Any]:
        """What this process has collected."""
        self._settle()
        empty = torch.zeros(0, dtype=torch.int64)
        return {
            "signatures": self.builder.signatures(),
            "counts": self._counts,
            "index": torch.cat([empty, *self._index]),
            "presence": torch.cat(
                [torch.zeros(0, len(self.labels), dtype=torch.bool), *self._presence]
            ),
            "unit_area": {"category": self.tally.category, "active": self.tally.active},
        }


def merge_parts(labels: Sequence[int], parts: Sequence[dict[str, Any]]) -> Collected:
    """Joins what the processes have collected; the same whatever their number.

    Args:
        labels: numbers of the concepts, ascending.
        parts: from :meth:`Collector.part`.
    """
    builder = SignatureBuilder(labels)
    numbers = [builder.merge(part["signatures"]) for part in parts]
    signatures, place = _sorted(builder.signatures())
    counts = UnitCounts(parts[0]["counts"].n_units)
    for part, number in zip(parts, numbers, strict=True):
        counts.merge(part["counts"], place[number])
    order = torch.cat([part["index"] for part in parts]).argsort()
    presence = torch.cat([part["presence"] for part in parts])[order]
    scopes = parts[0]["unit_area"]
    area = {
        scope: torch.stack([part["unit_area"][scope] for part in parts]).sum(0) for scope in scopes
    }
    return Collected(signatures, counts, presence, area)


def _sorted(found: Signatures) -> tuple[Signatures, Tensor]:
    """Signatures in the order of their concepts, and the new place of each."""
    indices = found.indices.tolist()
    members = [indices[a:b] for a, b in pairwise(found.indptr.tolist())]
    order = sorted(range(len(members)), key=members.__getitem__)
    place = torch.empty(len(order), dtype=torch.int64)
    place[torch.tensor(order, dtype=torch.int64)] = torch.arange(len(order))
    sizes = torch.tensor([len(members[i]) for i in order], dtype=torch.int64)
    rows = torch.tensor([row for i in order for row in members[i]], dtype=torch.int64)
    indptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return Signatures(indptr, rows, found.weights[order]), place
