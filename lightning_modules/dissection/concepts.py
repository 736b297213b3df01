"""The concepts of a probing set, and how often formulas over them meet every concept.

With ``a = |F & c|`` the areas of all three ways to extend a formula F by a concept c are known: ``|F| + |c| - a`` for
OR, ``a`` for AND, ``|F| - a`` for AND NOT; the same holds for the part that a unit fires on. So one product of a sparse
0/1 matrix [C, S] with the weighted signatures that F is true on scores every extension of F at once.
"""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.dissection.formulas import And, Formula, Leaf, Not, Or, formula_from_json
from lightning_modules.dissection.signatures import Signatures, unique_signatures
from lightning_modules.files import read_tensors
from lightning_modules.randomness import mix

LARGEST_COUNT = 2**53
"""Whole numbers up to here are exact in float64, in which the products are computed."""
LARGE_TABLE = 2**15
"""Signatures above which it pays to look only at those that a formula is true on."""
LARGEST_CACHE = 2**25
"""Numbers kept of formulas that were counted before; every unit meets many of them again."""


class Incidence:
    """Which concept is in which signature, as a sparse 0/1 matrix [C, S].

    Args:
        indptr: Long [C+1]; the signatures of concept c are ``columns[indptr[c] : indptr[c+1]]``.
        columns: Long [nnz], ascending within a concept.
        n_columns: signatures S.
    """

    def __init__(self, indptr: Tensor, columns: Tensor, n_columns: int) -> None:
        self.indptr, self.columns = indptr, columns
        self.shape = (len(indptr) - 1, n_columns)
        ones = torch.ones(len(columns), dtype=torch.float64, device=columns.device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            self._matrix = torch.sparse_csr_tensor(
                indptr, columns, ones, self.shape, check_invariants=False
            )

    @property
    def rows(self) -> Tensor:
        """Long [nnz], the concept of every entry."""
        concepts = torch.arange(self.shape[0], device=self.indptr.device)
        return concepts.repeat_interleave(self.indptr.diff())

    def __matmul__(self, weights: Tensor) -> Tensor:
        """Sums [C, F] of the columns' weights [S, F] over the signatures of every concept, float64."""
        return self._matrix @ weights

    def row(self, concept: int) -> Tensor:
        """Bool [S], the signatures of one concept."""
        start, stop = self.indptr[concept : concept + 2].tolist()
        mask = torch.zeros(self.shape[1], dtype=torch.bool, device=self.columns.device)
        return mask.index_fill_(0, self.columns[start:stop], True)

    def restricted(self, keep: Tensor) -> "Incidence":
        """The columns where ``keep`` [S] is True, renumbered."""
        # index_select is ten times faster than indexing here.
        kept = keep.index_select(0, self.columns).nonzero()[:, 0]
        numbers = keep.cumsum(0) - 1
        columns = numbers.index_select(0, self.columns.index_select(0, kept))
        return Incidence(torch.searchsorted(kept, self.indptr), columns, int(keep.sum()))

    def pair_counts(self, weights: Tensor, block: int = 2**22) -> Tensor:
        """Weighted number of signatures that two concepts share.

        Args:
            weights: of the signatures [S], whole numbers.
            block: pairs written down at a time.

        Returns:
            float64 [C, C].
        """
        n = self.shape[0]
        total = torch.zeros(n * n, dtype=torch.float64, device=weights.device)
        sizes = torch.bincount(self.columns, minlength=self.shape[1])
        order = self.columns.argsort(stable=True)
        concepts, signatures = self.rows[order], self.columns[order]
        starts = sizes.cumsum(0) - sizes
        # Every entry meets all entries of its signature.
        partners = sizes[signatures]
        ends = partners.cumsum(0)
        first = 0
        while first < len(concepts):
            done = int(ends[first] - partners[first])
            last = max(int(torch.searchsorted(ends, done + block, right=True)), first + 1)
            entry = torch.arange(first, last, device=weights.device)
            entry = entry.repeat_interleave(partners[first:last])
            place = torch.arange(len(entry), device=weights.device) + done
            place -= (ends - partners)[entry]
            partner = concepts[starts[signatures[entry]] + place]
            weight = weights[signatures[entry]].double()
            # Not bincount, which has no deterministic way to sum weights on CUDA.
            total.index_add_(0, concepts[entry] * n + partner, weight)
            first = last
        return total.view(n, n)


class ConceptMasks:
    """Concepts of a probing set, grouped by signature.

    Args:
        atoms: what a search may use as operands, one per row; an int is the leaf of that label.
        signatures: of all positions.
        names: name of every label, for those that have one.
        categories: category of every row.
        presence: bool [N, C], which image has which concept.

    Raises:
        ValueError: rows that do not fit the signatures, or more positions than can be counted exactly.
    """

    def __init__(
        self,
        atoms: Iterable[Formula | int],
        signatures: Signatures,
        names: dict[int, str] | None = None,
        categories: Sequence[str] | None = None,
        presence: Tensor | None = None,
    ) -> None:
        self.atoms = tuple(Leaf(atom) if isinstance(atom, int) else atom for atom in atoms)
        self.signatures = signatures
        self.names = names or {}
        self.categories = None if categories is None else list(categories)
        self.presence = presence
        n = len(self.atoms)
        if len(set(self.atoms)) != n:
            raise ValueError("every concept needs a label of its own, but labels repeat")
        if len(signatures.indices) and int(signatures.indices.max()) >= n:
            raise ValueError(
                f"the signatures name concept {int(signatures.indices.max())}, but there are {n}"
            )
        for what, given in (("categories", self.categories), ("columns of presence", presence)):
            if given is not None and (len(given) if what == "categories" else given.shape[1]) != n:  # type: ignore[union-attr]
                raise ValueError(f"{n} concepts need {n} {what}")
        self.n_positions = int(signatures.weights.sum())
        if self.n_positions >= LARGEST_COUNT:
            raise ValueError(f"{self.n_positions} positions cannot be counted exactly in float64")
        order = signatures.indices.argsort(stable=True)
        indptr = torch.searchsorted(
            signatures.indices[order], torch.arange(n + 1, device=order.device)
        )
        self.incidence = Incidence(indptr, signatures.owners[order], len(signatures))
        lengths = [atom.length_reference for atom in self.atoms]
        self.lengths = torch.tensor(lengths, dtype=torch.long, device=order.device)
        self.areas = (self.incidence @ signatures.weights.double()[:, None])[:, 0].long()
        # Row 0 measures the area of a mask, row 1 its fingerprint.
        self._measures = torch.stack([signatures.weights.double(), self._fingerprint_weights()])
        self.fingerprints = (self.incidence @ self._measures[1:].T)[:, 0]
        self._measured: dict[Formula, tuple[Tensor, Tensor]] = {}
        self._pairs: Tensor | None = None

    @classmethod
    def from_masks(
        cls,
        masks: Tensor,
        labels: Iterable[Formula | int] | None = None,
        names: dict[int, str] | None = None,
        categories: Sequence[str] | None = None,
    ) -> "ConceptMasks":
        """Of masks that fit into memory.

        Args:
            masks: bool [C, D] or [C, N, H, W]; the latter also gives ``presence``.
            labels: of the rows; 0 to C-1 by default.
            names: see the class.
            categories: see the class.

        Raises:
            ValueError: not one label or category per mask.
        """
        atoms = list(range(len(masks)) if labels is None else labels)
        if len(atoms) != len(masks):
            raise ValueError(f"{len(masks)} concept masks need as many labels, not {len(atoms)}")
        presence = masks.flatten(2).any(2).T if masks.ndim == 4 else None
        return cls(atoms, unique_signatures(masks), names, categories, presence)

    def __len__(self) -> int:
        return len(self.atoms)

    def to(self, device: torch.device | str) -> "ConceptMasks":
        """The same on another device."""
        presence = None if self.presence is None else self.presence.to(device)
        return ConceptMasks(
            self.atoms, self.signatures.to(device), self.names, self.categories, presence
        )

    def _fingerprint_weights(self) -> Tensor:
        """A random whole number per signature [S], whose sums over any mask are exact.

        Two different masks have the same sum with probability below ``S / 2**53``; searches compare their counts, too.
        """
        size = max(len(self.signatures), 1)
        generator = torch.Generator().manual_seed(mix("fingerprints of masks"))
        drawn = torch.randint(1, LARGEST_COUNT // size, (size,), generator=generator)
        return drawn[: len(self.signatures)].double().to(self.signatures.weights.device)

    # ------------------------------------------------------------------ what every unit shares
    def name(self, label: int) -> str:
        """The name of a label, or its number."""
        return self.names.get(label, str(label))

    def images_with(self, name: str) -> list[int]:
        """Positions of the images in which a concept occurs.

        Raises:
            KeyError: no concept has this name.
            ValueError: the concepts were built without ``presence``.
        """
        if self.presence is None:
            raise ValueError("these concepts do not know their images: build them with `presence`")
        for row, atom in enumerate(self.atoms):
            if isinstance(atom, Leaf) and self.name(atom.label) == name:
                return self.presence[:, row].nonzero().flatten().tolist()
        raise KeyError(f"no concept has the name {name!r}")

    def pair_intersections(self) -> Tensor:
        """Long [C, C], positions that two concepts share; computed once."""
        if self._pairs is None:
            self._pairs = self.incidence.pair_counts(self.signatures.weights).long()
        return self._pairs

    def unit_counts(self, unit: Tensor) -> Tensor:
        """Positions of every signature on which a unit fires, Long [S].

        Args:
            unit: its mask, bool with as many entries as there are positions; or these counts themselves.

        Raises:
            ValueError: neither, or more counts than a signature has positions.
        """
        device, size = self.signatures.weights.device, len(self.signatures)
        unit = unit.to(device)
        if unit.dtype == torch.bool:
            index_map = self.signatures.index_map
            if index_map is None:
                raise ValueError(
                    "the positions of these concepts were streamed: give counts per signature"
                )
            if unit.numel() != len(index_map):
                raise ValueError(
                    f"a unit's mask of shape {tuple(unit.shape)} has {unit.numel()} positions, the concepts have "
                    f"{len(index_map)}: upsample the activations to the size of the concept masks"
                )
            fires = unit.flatten().nonzero()[:, 0]
            return torch.bincount(index_map.index_select(0, fires), minlength=size)
        if unit.dtype != torch.long or unit.shape != (size,):
            raise ValueError(
                f"a unit is a boolean mask or int64 counts of {size} signatures, not {unit.dtype} of shape "
                f"{tuple(unit.shape)}"
            )
        if (unit < 0).any() or (unit > self.signatures.weights).any():
            raise ValueError(
                "a unit fires on fewer than 0 or on more positions than a signature has"
            )
        return unit

    # ------------------------------------------------------------------ formulas
    def row_of(self, atom: Formula) -> int:
        """The row of an atom.

        Raises:
            KeyError: it has none.
        """
        try:
            return self.atoms.index(atom)
        except ValueError:
            raise KeyError(f"{atom} is none of the {len(self.atoms)} concepts") from None

    def signature_mask(self, formula: Formula) -> Tensor:
        """Bool [S], the signatures that a formula is true on.

        Raises:
            KeyError: the formula names a concept that has no row.
        """
        if isinstance(formula, Or):
            return self.signature_mask(formula.left) | self.signature_mask(formula.right)
        if isinstance(formula, And):
            return self.signature_mask(formula.left) & self.signature_mask(formula.right)
        if isinstance(formula, Not):
            return ~self.signature_mask(formula.operand)
        return self.incidence.row(self.row_of(formula))

    def measure(
        self, formulas: Sequence[Formula], masks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Areas and fingerprints of what formulas share with every concept; remembered for the next unit.

        Args:
            formulas: F formulas.
            masks: their :meth:`signature_mask`.

        Returns:
            float64, both [F, C].
        """
        new = [i for i, formula in enumerate(formulas) if formula not in self._measured]
        if new:
            if (len(self._measured) + len(new)) * 2 * len(self) > LARGEST_CACHE:
                self._measured = {f: self._measured[f] for f in formulas if f in self._measured}
            unseen, measures, incidence = (
                torch.stack([masks[i] for i in new]),
                self._measures,
                self.incidence,
            )
            if len(self.signatures) > LARGE_TABLE:
                used = unseen.any(0)
                incidence, places = incidence.restricted(used), used.nonzero()[:, 0]
                unseen, measures = (x.index_select(1, places) for x in (unseen, measures))
            weighted = (unseen[:, None] * measures).flatten(0, 1)
            counts = (incidence @ weighted.T).T.view(len(new), 2, len(self))
            for i, (area, fingerprint) in zip(new, counts, strict=True):
                self._measured[formulas[i]] = (area, fingerprint)
        found = [self._measured[formula] for formula in formulas]
        return torch.stack([a for a, _ in found]), torch.stack([f for _, f in found])

    # ------------------------------------------------------------------ files
    def save(self, path: str | Path) -> None:
        """Writes everything to one file, which loads with ``weights_only``."""
        signatures = self.signatures
        torch.save(
            {
                "atoms": [atom.to_json() for atom in self.atoms],
                "names": self.names,
                "categories": self.categories,
                "presence": self.presence,
                "indptr": signatures.indptr,
                "indices": signatures.indices,
                "weights": signatures.weights,
                "index_map": signatures.index_map,
            },
            path,
        )

    @classmethod
    def load(cls, path: str | Path) -> "ConceptMasks":
        """Reads what :meth:`save` wrote."""
        state = read_tensors(path, "file of concept masks")
        parts = (state[name] for name in ("indptr", "indices", "weights", "index_map"))
        atoms = [formula_from_json(tree) for tree in state["atoms"]]
        return cls(
            atoms, Signatures(*parts), state["names"], state["categories"], state["presence"]
        )
