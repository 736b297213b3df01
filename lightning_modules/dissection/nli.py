"""Compositional explanations of sentence-pair classifiers: features, NEIGHBORS, search, pointwise mutual information.

A position is a pair of premise and hypothesis, a concept is a feature that pairs have or have not. Feature names are
``pre:tok:dog``, ``hyp:tag:nn``, ``oth:overlap:overlap50``: part, kind, value.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.formulas import Formula, Leaf, Neighbors
from lightning_modules.dissection.quantiles import quantile_threshold
from lightning_modules.dissection.scores import NLI_EPS, Metric
from lightning_modules.dissection.search import Explanation, Mode, beam_search, nothing_found

Words = str | Sequence[str]
Vectors = Mapping[str, Tensor | Sequence[float]]

PAD = "PAD"
UNINFORMATIVE = frozenset(("a", "an", "the", "of", ".", ",", "UNK", PAD))
"""Words that are no features (released code)."""
OVERLAPS = (25, 50, 75)
OVERLAP_EPS = 1e-5


@dataclass(frozen=True)
class SentenceFeatures:
    """Features of sentence pairs.

    Attributes:
        names: of the features [C].
        values: bool [n, C].
        overlap: ratio behind the overlap features [n].
    """

    names: list[str]
    values: Tensor
    overlap: Tensor


def overlap_ratio(premise: Words, hypothesis: Words, include_pad: bool = False) -> float:
    """Words in both sentences per word in only one of them; not Jaccard's index, and without upper limit.

    Args:
        premise: words, or text that is split at blanks.
        hypothesis: the same.
        include_pad: count the padding of the shorter sentence for a word, as the released code does by accident.
    """
    first, second = _words(premise), _words(hypothesis)
    one, two = set(first), set(second)
    if include_pad and len(first) != len(second):
        (one if len(first) < len(second) else two).add(PAD)
    return len(one & two) / (len(one ^ two) + OVERLAP_EPS)


def _words(sentence: Words) -> list[str]:
    return sentence.split() if isinstance(sentence, str) else list(sentence)


def sentence_features(
    pairs: Sequence[tuple[Words, Words]],
    tags: Sequence[tuple[Sequence[str], Sequence[str]]],
    n_tokens: int = 2000,
    include_pad: bool = False,
    skip: frozenset[str] | Sequence[str] = UNINFORMATIVE,
) -> SentenceFeatures:
    """Words, part-of-speech tags and overlap of sentence pairs.

    Args:
        pairs: premise and hypothesis of every pair, words or text that is split at blanks.
        tags: their tags, with or without ``tag:`` in front; taken in lower case.
        n_tokens: so many most frequent words of both sentences are features, of equal ones those that come first.
        include_pad: see :func:`overlap_ratio`.
        skip: words that are no features.

    Returns:
        The features: words of the premises, of the hypotheses, tags of both, overlap above 25, 50 and 75 %.

    Raises:
        ValueError: not one pair of tag sequences per pair of sentences.
    """
    if len(pairs) != len(tags):
        raise ValueError(f"{len(pairs)} sentence pairs need as many pairs of tags, not {len(tags)}")
    sentences = [(_words(premise), _words(hypothesis)) for premise, hypothesis in pairs]
    counts = Counter(word for pair in sentences for part in pair for word in part)
    vocabulary = [word for word, _ in counts.most_common() if word not in set(skip)][:n_tokens]
    found: list[set[str]] = []
    overlap = []
    for pair, pair_tags in zip(sentences, tags, strict=True):
        here = set()
        for part, words, labels in zip(("pre", "hyp"), pair, pair_tags, strict=True):
            here |= {f"{part}:tok:{word}" for word in words}
            here |= {f"{part}:tag:{label.removeprefix('tag:').lower()}" for label in labels}
        ratio = overlap_ratio(*pair, include_pad)
        here |= {f"oth:overlap:overlap{percent}" for percent in OVERLAPS if ratio > percent / 100}
        found.append(here)
        overlap.append(ratio)
    names = [f"{part}:tok:{word}" for part in ("pre", "hyp") for word in vocabulary]
    seen = sorted({name for here in found for name in here if name[3:8] == ":tag:"}, reverse=False)
    names += [name for part in ("pre", "hyp") for name in seen if name.startswith(part)]
    names += [f"oth:overlap:overlap{percent}" for percent in OVERLAPS]
    column = {name: i for i, name in enumerate(names)}
    values = torch.zeros(len(pairs), len(names), dtype=torch.bool)
    for row, here in enumerate(found):
        values[row, [column[name] for name in here if name in column]] = True
    return SentenceFeatures(names, values, torch.tensor(overlap, dtype=torch.float64))


# ------------------------------------------------------------------ neighbours
def nearest_neighbors(word: str, vectors: Vectors, k: int = 5) -> list[str]:
    """The ``k`` words with the smallest cosine distance, the word itself excluded.

    Args:
        word: any word.
        vectors: of the vocabulary; of equal distances the earlier word comes first.
        k: number of words.

    Returns:
        Words by ascending distance; none for a word without a vector.
    """
    return _all_neighbors([word], vectors, k)[word]


def _all_neighbors(words: Sequence[str], vectors: Vectors, k: int) -> dict[str, list[str]]:
    near: dict[str, list[str]] = {word: [] for word in words}
    known = [word for word in near if word in vectors]
    if not known:
        return near
    vocabulary = list(vectors)
    rows = [torch.as_tensor(vectors[word], dtype=torch.float64) for word in vocabulary]
    table = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    position = {word: i for i, word in enumerate(vocabulary)}
    for word in known:
        distances = 1 - table @ table[position[word]]
        distances[position[word]] = torch.inf
        order = distances.sort(stable=True).indices[: min(k, len(vocabulary) - 1)]
        near[word] = [vocabulary[i] for i in order.tolist()]
    return near


def _part_and_word(name: str, released: bool) -> tuple[str, str]:
    """``pre:tok`` and ``dog`` of ``pre:tok:dog``; ``pre`` and ``dog`` of ``pre:dog``.

    The released code looks ``tok:dog`` up, which is no word, so that its NEIGHBORS never has any neighbour.
    """
    part, _, word = name.partition(":")
    if word.startswith("tok:") and not released:
        return f"{part}:tok", word.removeprefix("tok:")
    return part, word


def feature_neighbors(
    names: Sequence[str], vectors: Vectors, k: int = 5, released: bool = False
) -> dict[int, list[int]]:
    """For every feature, the features of the nearest words in the same part of the pair.

    Args:
        names: of the features.
        vectors: of words.
        k: nearest words; those that are no features are left out.
        released: look up as the released code does, with no effect on names of three parts.

    Returns:
        Columns by column; empty for tags, overlap and words without a vector.
    """
    split = [_part_and_word(name, released) for name in names]
    near = _all_neighbors([word for _, word in split], vectors, k)
    column = {name: i for i, name in enumerate(names)}
    places = [[column.get(f"{part}:{word}") for word in near[of]] for part, of in split]
    return {i: [c for c in row if c is not None] for i, row in enumerate(places)}


def neighbor_mask(
    feature: str, features: Tensor, names: Sequence[str], vectors: Vectors, k: int = 5
) -> Tensor:
    """Pairs that have a word or one of its nearest words in the same part.

    Args:
        feature: its name.
        features: bool [n, C].
        names: of the features [C].
        vectors: of words.
        k: nearest words.

    Returns:
        Bool [n].

    Raises:
        ValueError: no such feature.
    """
    if feature not in names:
        raise ValueError(f"{feature!r} is none of the {len(names)} features")
    column = list(names).index(feature)
    near = feature_neighbors(names, vectors, k)[column]
    return features[:, [column, *near]].any(1)


# ------------------------------------------------------------------ search
@dataclass(frozen=True)
class SentenceConcepts:
    """Features as concepts, and NEIGHBORS of them; built once for all units, see :func:`sentence_concepts`."""

    concepts: ConceptMasks
    neighbors: dict[int, list[int]]
    mode: Mode


def sentence_concepts(
    features: Tensor,
    names: Sequence[str],
    vectors: Vectors | None = None,
    k: int = 5,
    mode: Mode = "distinct",
    released_neighbors: bool = False,
) -> SentenceConcepts:
    """The concepts of a sentence probing set.

    Args:
        features: bool [n, C].
        names: of the features [C].
        vectors: of words; without them there are no neighbours.
        k: neighbours of a word.
        mode: ``reference`` adds NEIGHBORS of every feature, as the released code, ``distinct`` only where there is a
            neighbour.
        released_neighbors: see :func:`feature_neighbors`.

    Raises:
        ValueError: not one name per feature.
    """
    if features.ndim != 2 or features.shape[1] != len(names):
        raise ValueError(
            f"features {tuple(features.shape)} must be [n, {len(names)}], one column per name"
        )
    near = feature_neighbors(names, vectors or {}, k, released_neighbors)
    atoms: list[Formula] = []
    columns = []
    values = features.bool()
    for column in range(len(names)):
        atoms.append(Leaf(column))
        columns.append(values[:, column])
        if near[column] or mode == "reference":
            atoms.append(Neighbors(Leaf(column)))
            columns.append(values[:, [column, *near[column]]].any(1))
    concepts = ConceptMasks.from_masks(torch.stack(columns), atoms, dict(enumerate(names)))
    return SentenceConcepts(concepts, near, mode)


def sentence_search(
    activations: Tensor,
    concepts: SentenceConcepts,
    beam_size: int = 10,
    max_length: int = 5,
    length_penalty: float = 1.0,
    alpha: float | None = None,
    min_activations: int = 500,
    metric: Metric = "iou",
) -> Explanation:
    """Explains a unit of a sentence-pair classifier.

    In ``reference`` mode NEIGHBORS can only be the left-most operand, and every feature that scores above 0 is offered
    twice, as in the released code; in ``distinct`` mode NEIGHBORS is an operand like any other.

    Args:
        activations: of the unit on every pair [n].
        concepts: from :func:`sentence_concepts`, whose mode holds.
        beam_size: formulas kept.
        max_length: operands of a formula.
        length_penalty: see :func:`~lightning_modules.dissection.search.beam_search`.
        alpha: the unit fires above its quantile ``1 - alpha``; above 0 by default.
        min_activations: a unit that is positive on fewer pairs has no explanation.
        metric: see :func:`~lightning_modules.dissection.scores.formula_score`.

    Returns:
        The explanation; its formula is None for a unit that rarely fires.

    Raises:
        ValueError: another number of pairs than the features have, or an impossible argument.
    """
    if activations.shape != (concepts.concepts.n_positions,):
        raise ValueError(
            f"activations {tuple(activations.shape)} must be one per pair, [{concepts.concepts.n_positions}]"
        )
    fires = activations > 0
    if int(fires.sum()) < min_activations:
        return nothing_found(int(fires.sum()))
    if alpha is not None:
        fires = activations > quantile_threshold(activations.float()[:, None], alpha)
    atoms = concepts.concepts.atoms

    def offered(scores: Tensor) -> Tensor:
        rows = (scores > 0).nonzero()[:, 0].tolist()
        # A NEIGHBORS follows its leaf.
        plain = [row - isinstance(atoms[row], Neighbors) for row in rows]
        return torch.tensor(plain, device=scores.device)

    return beam_search(
        fires,
        concepts.concepts,
        beam_size,
        max_length,
        length_penalty,
        mode=concepts.mode,
        offered=offered if concepts.mode == "reference" else None,
        metric=metric,
        eps=NLI_EPS,
    )


# ------------------------------------------------------------------ classes
def pmi(features: Tensor, labels: Tensor, n_classes: int, smoothing: float = 0.0) -> Tensor:
    """Pointwise mutual information of features and classes, natural logarithm.

    Args:
        features: bool [n, C].
        labels: [n]; pairs with a negative label (no gold label) are left out.
        n_classes: K.
        smoothing: 0: ``log p(f, c) / (p(f) p(c))`` of the events. Above: added to every cell of the table of counts
            [C, K], which is then normalised (Gururangan et al. 2018, who add 100).

    Returns:
        float64 [C, K]; minus infinity for what never occurs together (nan if the feature never occurs).

    Raises:
        ValueError: labels outside the classes, or lengths that differ.
    """
    if len(features) != len(labels):
        raise ValueError(
            f"{len(features)} rows of features and {len(labels)} labels must be of the same pairs"
        )
    if len(labels) and int(labels.max()) >= n_classes:
        raise ValueError(f"label {int(labels.max())} is none of the {n_classes} classes")
    gold = labels >= 0
    classes = torch.nn.functional.one_hot(labels[gold].long(), n_classes).double()
    counts = features[gold].double().T @ classes
    if smoothing:
        table = (counts + smoothing) / (counts + smoothing).sum()
        return (table / (table.sum(1, keepdim=True) * table.sum(0))).log()
    n = len(classes)
    return (counts * n / (counts.sum(1, keepdim=True) * classes.sum(0))).log()
