"""Boolean formulas over concepts: what an explanation of a unit is.

A formula is an immutable tree. The searches of this package build left-deep chains of ``F OR leaf``, ``F AND leaf`` and
``F AND (NOT leaf)``; every other tree can be written down, parsed and evaluated too.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Namer = Callable[[int], str]

LARGEST_TRUTH_TABLE = 20
"""Atoms up to which :func:`equivalent` writes down the truth table."""


@dataclass(frozen=True)
class Formula(ABC):
    """A formula; two formulas are equal if they have the same structure."""

    @property
    def n_leaves(self) -> int:
        """Number of concepts, with repetitions: the length in the paper."""
        return len(self.leaves())

    @property
    @abstractmethod
    def length_reference(self) -> int:
        """The length of the released code, in which NOT and NEIGHBORS count 1 too: ``A AND (NOT B)`` has 3."""

    @abstractmethod
    def leaves(self) -> list[int]:
        """Labels of the concepts from left to right, with repetitions."""

    @abstractmethod
    def evaluate(self, masks: Any, neighbors: Mapping[int, Sequence[int]] | None = None) -> Any:
        """The mask of the formula.

        Args:
            masks: boolean masks of one shape, found by ``masks[label]``: a tensor, an array or a mapping.
            neighbors: labels of the neighbours of a label, for NEIGHBORS.

        Raises:
            ValueError: NEIGHBORS without ``neighbors``.
        """

    @abstractmethod
    def to_str(self, namer: Namer = str, sort: bool = False) -> str:
        """Fully bracketed text.

        Args:
            namer: name of a label; the number itself by default.
            sort: put the two operands of OR and AND in alphabetical order, so that equal sets of operands read the
                same.
        """

    @abstractmethod
    def to_json(self) -> Any:
        """Nested dictionaries and lists, see :func:`formula_from_json`; safe whatever the names contain."""

    @abstractmethod
    def atoms(self) -> Iterator["Leaf | Neighbors"]:
        """Leaves and NEIGHBORS from left to right, with repetitions."""

    def __str__(self) -> str:
        return self.to_str()


@dataclass(frozen=True)
class Leaf(Formula):
    """One concept."""

    label: int

    @property
    def length_reference(self) -> int:
        """Always 1."""
        return 1

    def leaves(self) -> list[int]:
        """The label."""
        return [self.label]

    def evaluate(self, masks: Any, neighbors: Mapping[int, Sequence[int]] | None = None) -> Any:
        """The mask of the concept."""
        return masks[self.label]

    def to_str(self, namer: Namer = str, sort: bool = False) -> str:
        """The name."""
        return namer(self.label)

    def to_json(self) -> Any:
        """``{"leaf": label}``."""
        return {"leaf": self.label}

    def atoms(self) -> Iterator["Leaf | Neighbors"]:
        """Itself."""
        yield self


@dataclass(frozen=True)
class _Unary(Formula):
    operand: Formula
    word = ""

    @property
    def length_reference(self) -> int:
        """The operand's and 1."""
        return 1 + self.operand.length_reference

    def leaves(self) -> list[int]:
        """The operand's."""
        return self.operand.leaves()

    def to_str(self, namer: Namer = str, sort: bool = False) -> str:
        """``(WORD operand)``; the operand is never sorted (released code)."""
        return f"({self.word} {self.operand.to_str(namer)})"

    def to_json(self) -> Any:
        """``{"word": operand}``."""
        return {self.word.lower(): self.operand.to_json()}

    def atoms(self) -> Iterator["Leaf | Neighbors"]:
        """The operand's."""
        yield from self.operand.atoms()


class Not(_Unary):
    """What the operand is not true on."""

    word = "NOT"

    def evaluate(self, masks: Any, neighbors: Mapping[int, Sequence[int]] | None = None) -> Any:
        """The complement."""
        return ~self.operand.evaluate(masks, neighbors)


class Neighbors(_Unary):
    """A word or one of the words nearest to it (NLI)."""

    word = "NEIGHBORS"
    operand: Leaf

    def evaluate(self, masks: Any, neighbors: Mapping[int, Sequence[int]] | None = None) -> Any:
        """The union of the masks of the word and its neighbours."""
        if neighbors is None:
            raise ValueError(f"{self} needs `neighbors`, the labels near {self.operand.label}")
        mask = masks[self.operand.label]
        for label in neighbors.get(self.operand.label, ()):
            mask = mask | masks[label]
        return mask

    def atoms(self) -> Iterator["Leaf | Neighbors"]:
        """Itself."""
        yield self


@dataclass(frozen=True)
class _Binary(Formula):
    left: Formula
    right: Formula
    word = ""

    @property
    def length_reference(self) -> int:
        """Of both operands together."""
        return self.left.length_reference + self.right.length_reference

    def leaves(self) -> list[int]:
        """The left operand's, then the right one's."""
        return self.left.leaves() + self.right.leaves()

    def to_str(self, namer: Namer = str, sort: bool = False) -> str:
        """``(left WORD right)``."""
        operands = [self.left.to_str(namer, sort), self.right.to_str(namer, sort)]
        return f"({f' {self.word} '.join(sorted(operands) if sort else operands)})"

    def to_json(self) -> Any:
        """``{"word": [left, right]}``."""
        return {self.word.lower(): [self.left.to_json(), self.right.to_json()]}

    def atoms(self) -> Iterator["Leaf | Neighbors"]:
        """The left operand's, then the right one's."""
        yield from self.left.atoms()
        yield from self.right.atoms()


class Or(_Binary):
    """Union."""

    word = "OR"

    def evaluate(self, masks: Any, neighbors: Mapping[int, Sequence[int]] | None = None) -> Any:
        """The union of both masks."""
        return self.left.evaluate(masks, neighbors) | self.right.evaluate(masks, neighbors)


class And(_Binary):
    """Intersection."""

    word = "AND"

    def evaluate(self, masks: Any, neighbors: Mapping[int, Sequence[int]] | None = None) -> Any:
        """The intersection of both masks."""
        return self.left.evaluate(masks, neighbors) & self.right.evaluate(masks, neighbors)


_UNARY = {kind.word: kind for kind in (Not, Neighbors)}
_BINARY = {kind.word: kind for kind in (Or, And)}


def formula_from_json(tree: Any) -> Formula:
    """The formula of which ``tree`` is the :meth:`Formula.to_json`.

    Raises:
        ValueError: no such tree.
    """
    if isinstance(tree, dict) and len(tree) == 1:
        ((word, operands),) = tree.items()
        if word == "leaf" and isinstance(operands, int):
            return Leaf(operands)
        if word.upper() in _UNARY:
            return _UNARY[word.upper()](formula_from_json(operands))
        if word.upper() in _BINARY and isinstance(operands, list) and len(operands) == 2:
            return _BINARY[word.upper()](*map(formula_from_json, operands))
    raise ValueError(
        f"{tree!r} is no formula: expected {{'leaf': label}} or one of not, neighbors, or, and with its operands"
    )


def parse_formula(text: str, names: Mapping[str, int] | None = None) -> Formula:
    """The formula that :meth:`Formula.to_str` wrote.

    Args:
        text: fully bracketed, as ``((water OR river) AND (NOT blue))``.
        names: label of a name; without it, leaves are numbers. Names may contain blanks and brackets; where two fit,
            the longer one is meant.

    Raises:
        ValueError: not a formula; the message says where reading stopped.
    """
    known = None if names is None else sorted(names, key=len, reverse=True)

    def fail(at: int, wanted: str) -> ValueError:
        return ValueError(f"{text!r} is no formula: expected {wanted} at {text[at : at + 20]!r}")

    def leaf(at: int) -> tuple[Leaf, int] | None:
        if names is None or known is None:
            end = at
            while end < len(text) and text[end].isdigit():
                end += 1
            return (Leaf(int(text[at:end])), end) if end > at else None
        for name in known:
            end = at + len(name)
            rest = text[end : end + 5]
            if text.startswith(name, at) and (
                rest[:1] in ("", ")") or rest[:4] == " OR " or rest == " AND "
            ):
                return Leaf(names[name]), end
        return None

    def read(at: int) -> tuple[Formula, int]:
        found = leaf(at)
        if found is not None:
            return found
        if text[at : at + 1] != "(":
            raise fail(at, "a concept or a bracket")
        for word, unary in _UNARY.items():
            if text.startswith(f"({word} ", at):
                operand, end = read(at + len(word) + 2)
                return unary(operand), close(end)
        left, end = read(at + 1)
        for word, binary in _BINARY.items():
            if text.startswith(f" {word} ", end):
                right, end = read(end + len(word) + 2)
                return binary(left, right), close(end)
        raise fail(end, "OR or AND")

    def close(at: int) -> int:
        if text[at : at + 1] != ")":
            raise fail(at, "a closing bracket")
        return at + 1

    formula, end = read(0)
    if end != len(text):
        raise fail(end, "the end")
    return formula


def minor_negate(formula: Formula) -> Formula:
    """The formula with one leaf negated, whose examples are near misses (released code).

    The leaf is found by going to the longer operand, to the left one if both are equally long.
    """
    if isinstance(formula, Leaf | Neighbors):
        return Not(formula)
    if isinstance(formula, Not):
        inner = formula.operand
        return inner if isinstance(inner, Leaf | Neighbors) else Not(minor_negate(inner))
    if not isinstance(formula, _Binary):
        raise TypeError(f"{type(formula).__name__} is no formula")
    left, right = formula.left, formula.right
    if left.length_reference < right.length_reference:
        return type(formula)(left, minor_negate(right))
    return type(formula)(minor_negate(left), right)


def equivalent(first: Formula, second: Formula) -> bool:
    """Whether two formulas are true on the same positions whatever the masks of the concepts are.

    NEIGHBORS of a concept is taken for a concept of its own.

    Raises:
        ValueError: more than 20 different concepts, whose truth table is too large.
    """
    atoms = list(dict.fromkeys([*first.atoms(), *second.atoms()]))
    if len(atoms) > LARGEST_TRUTH_TABLE:
        raise ValueError(
            f"equivalent() compares up to {LARGEST_TRUTH_TABLE} concepts, not {len(atoms)}"
        )
    position = {atom: i for i, atom in enumerate(atoms)}
    return all(
        _truth(first, position, row) == _truth(second, position, row)
        for row in product((False, True), repeat=len(atoms))
    )


def _truth(formula: Formula, position: Mapping[Any, int], row: tuple[bool, ...]) -> bool:
    if isinstance(formula, Leaf | Neighbors):
        return row[position[formula]]
    if isinstance(formula, Not):
        return not _truth(formula.operand, position, row)
    assert isinstance(formula, _Binary)
    left, right = _truth(formula.left, position, row), _truth(formula.right, position, row)
    return (left or right) if isinstance(formula, Or) else (left and right)
