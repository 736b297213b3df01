"""What explanations say about a network: accuracy when a unit fires, and kinds of units."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch
from scipy.stats import pearsonr
from torch import Tensor

from lightning_modules.dissection.formulas import And, Formula, Not, Or

UnitType = Literal[
    "silent",
    "single concept",
    "lexical abstraction",
    "perceptual abstraction",
    "specialisation",
    "polysemantic",
]
Similarity = Callable[[int, int], float]


def accuracy_when_firing(firing: Tensor, correct: Tensor) -> Tensor:
    """Accuracy of the network over the samples on which a unit fires.

    Args:
        firing: bool [n, U].
        correct: whether the prediction was right, bool [n]; leave out samples that have none of the network's classes.

    Returns:
        float64 [U], nan for a unit that never fires.

    Raises:
        ValueError: different numbers of samples.
    """
    if len(firing) != len(correct):
        raise ValueError(
            f"{len(firing)} samples of firing and {len(correct)} of correct must be the same"
        )
    firing, correct = firing.double(), correct.double()
    return (correct @ firing) / firing.sum(0)


def iou_accuracy_correlation(iou: Tensor, accuracy: Tensor) -> tuple[float, float]:
    """Are well explained units those that help? Pearson correlation over the units that fire.

    Args:
        iou: [U].
        accuracy: from :func:`accuracy_when_firing` [U].

    Returns:
        r and its two-sided p; nan for fewer than two units or where all are the same.

    Raises:
        ValueError: different numbers of units.
    """
    if iou.shape != accuracy.shape:
        raise ValueError(
            f"iou {tuple(iou.shape)} and accuracy {tuple(accuracy.shape)} must be of the same units"
        )
    fires = ~accuracy.isnan()
    x, y = iou[fires].double(), accuracy[fires].double()
    if len(x) < 2 or bool((x == x[0]).all()) or bool((y == y[0]).all()):
        return float("nan"), float("nan")
    result = pearsonr(x.cpu().numpy(), y.cpu().numpy())
    return float(result.statistic), float(result.pvalue)


def consistency(formula: Formula, similarity: Similarity) -> float:
    """Mean similarity of all pairs of concepts in a formula; 1 for a single one (released code).

    Args:
        formula: the explanation.
        similarity: of two labels, as the cosine of their word vectors; nan where one is unknown.

    Returns:
        The mean over the known pairs, 0 if none is known.
    """
    leaves = formula.leaves()
    if len(leaves) < 2:
        return 1.0
    values = torch.tensor([similarity(a, b) for a, b in combinations(leaves, 2)])
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else 0.0


def word_similarity(names: dict[int, str], vectors: dict[str, Tensor]) -> Similarity:
    """Cosine of the vectors of two labels' names, nan where a name has none."""

    def similarity(a: int, b: int) -> float:
        pair = [vectors.get(names.get(label, "")) for label in (a, b)]
        if pair[0] is None or pair[1] is None:
            return float("nan")
        return float(torch.cosine_similarity(pair[0].double(), pair[1].double(), 0))

    return similarity


def unit_type(
    formula: Formula | None,
    lexical: Similarity,
    perceptual: Similarity | None = None,
    threshold: float = 0.4,
) -> UnitType:
    """The kind of a unit: a proxy of what the paper's authors judged by hand on a sample.

    A formula that narrows a concept with AND or AND NOT and has no OR is a specialisation. One with OR is an
    abstraction if the operands of its ORs are similar: ``lexical abstraction`` (in the paper also a perceptual one) by
    their words, ``perceptual abstraction`` by their looks only. Otherwise it is polysemantic.

    Args:
        formula: the explanation, None if there is none.
        lexical: similarity of two labels by meaning.
        perceptual: by looks, as the correlation of their images; without it no unit is a perceptual abstraction.
        threshold: mean similarity from which concepts are related (0.4 is ours; the paper has none).
    """
    if formula is None:
        return "silent"
    alternatives = _alternatives(formula)
    if len(alternatives) < 2:
        narrowed = isinstance(formula, And | Not)
        return "specialisation" if narrowed else "single concept"
    for similarity, name in ((lexical, "lexical"), (perceptual, "perceptual")):
        if similarity is not None and _related(alternatives, similarity) >= threshold:
            return "lexical abstraction" if name == "lexical" else "perceptual abstraction"
    return "polysemantic"


def _alternatives(formula: Formula) -> list[Formula]:
    """The operands between which the ORs of a formula choose, below what narrows them all."""
    if isinstance(formula, Or):
        return _alternatives(formula.left) + _alternatives(formula.right)
    if isinstance(formula, And):
        inner = [_alternatives(side) for side in (formula.left, formula.right)]
        return max(inner, key=len)
    return [formula]


def _related(alternatives: Sequence[Formula], similarity: Similarity) -> float:
    def label(formula: Formula) -> int:
        return formula.leaves()[0]

    values = torch.tensor(
        [similarity(label(a), label(b)) for a, b in combinations(alternatives, 2)]
    )
    known = values[~values.isnan()]
    return float(known.mean()) if len(known) else 0.0
