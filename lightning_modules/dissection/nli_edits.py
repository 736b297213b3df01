"""Copy-paste edits of sentences: put in the word that a unit looks for, and see what the classifier says then.

A word goes where it was seen after the word before and before the word behind; one that it replaces is of its own part
of speech. So an edit keeps to what the sentences of the probing set look like; whether it keeps the truth is for the
reader to judge.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.dissection.contributions import copy_paste_outcomes
from lightning_modules.dissection.formulas import And, Formula, Not, Or
from lightning_modules.randomness import mix

Part = Literal["pre", "hyp"]
PARTS: tuple[Part, Part] = ("pre", "hyp")
EDGE = ""
"""Stands before the first and after the last word."""


@dataclass(frozen=True)
class TaggedPair:
    """A pair of sentences: the words and the tags of premise and hypothesis."""

    words: tuple[tuple[str, ...], tuple[str, ...]]
    tags: tuple[tuple[str, ...], tuple[str, ...]]

    def with_words(self, part: Part, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Premise and hypothesis with other words in one of them."""
        premise, hypothesis = self.words
        return (list(words), list(hypothesis)) if part == "pre" else (list(premise), list(words))

    @property
    def texts(self) -> list[str]:
        """Premise and hypothesis as text."""
        return [" ".join(words) for words in self.words]


@dataclass
class WordUse:
    """How the words of a probing set are used in one part of the pairs.

    Attributes:
        tags: parts of speech of a word.
        words: words of a part of speech, in the order in which they first occur.
        after: words that were seen after a word.
    """

    tags: dict[str, set[str]] = field(default_factory=dict)
    words: dict[str, dict[str, None]] = field(default_factory=dict)
    after: dict[str, dict[str, None]] = field(default_factory=dict)

    @classmethod
    def of(cls, pairs: Sequence[TaggedPair], part: Part) -> "WordUse":
        """Counts the premises or the hypotheses."""
        use, place = cls(), PARTS.index(part)
        for pair in pairs:
            words, tags = pair.words[place], pair.tags[place]
            for word, tag in zip(words, tags, strict=True):
                use.tags.setdefault(word, set()).add(tag)
                use.words.setdefault(tag, {})[word] = None
            for one, two in zip((EDGE, *words), (*words, EDGE), strict=True):
                use.after.setdefault(one, {})[two] = None
        return use

    def fits(self, word: str, before: str, behind: str) -> bool:
        """Whether the word was seen after the one word and before the other."""
        return word in self.after.get(before, ()) and behind in self.after.get(word, ())


@dataclass(frozen=True)
class Edit:
    """A word that is put into a sentence, or taken out of it.

    Attributes:
        kind: ``replace``, ``insert`` or ``delete``.
        position: of the word that is replaced or deleted, or before which it is inserted.
        word: new word, or the deleted one.
    """

    kind: Literal["replace", "insert", "delete"]
    position: int
    word: str

    def apply(self, words: Sequence[str]) -> list[str]:
        """The edited sentence."""
        rest = self.position if self.kind == "insert" else self.position + 1
        new = [] if self.kind == "delete" else [self.word]
        return [*words[: self.position], *new, *words[rest:]]


def edits_with(
    word: str, words: Sequence[str], tags: Sequence[str], use: WordUse
) -> Iterator[Edit]:
    """The ways to put a word into a sentence that has not got it."""
    if word in words:
        return
    bounded = [EDGE, *words, EDGE]
    for position, tag in enumerate(tags):
        if tag in use.tags.get(word, ()) and use.fits(
            word, bounded[position], bounded[position + 2]
        ):
            yield Edit("replace", position, word)
    for position, (before, behind) in enumerate(pairwise(bounded)):
        if use.fits(word, before, behind):
            yield Edit("insert", position, word)


def edits_without(word: str, words: Sequence[str], use: WordUse) -> Iterator[Edit]:
    """The ways to take a word out of a sentence so that its neighbours were seen side by side."""
    bounded = [EDGE, *words, EDGE]
    for position, found in enumerate(words):
        if found == word and bounded[position + 2] in use.after.get(bounded[position], ()):
            yield Edit("delete", position, word)


def wanted_words(formula: Formula | None, names: Sequence[str]) -> list[tuple[Part, str, bool]]:
    """The words that a formula asks for (True) or excludes (False), with their part, in its order."""
    found: dict[tuple[Part, str, bool], None] = {}
    for label, positive in _literals(formula, True):
        part, kind, word = names[label].split(":", 2)
        if kind == "tok":
            found["pre" if part == "pre" else "hyp", word, positive] = None
    return list(found)


def _literals(formula: Formula | None, positive: bool) -> Iterator[tuple[int, bool]]:
    if formula is None:
        return
    if isinstance(formula, Not):
        yield from _literals(formula.operand, not positive)
    elif isinstance(formula, And | Or):
        yield from _literals(formula.left, positive)
        yield from _literals(formula.right, positive)
    else:
        yield from ((label, positive) for label in formula.leaves())


def possible_edits(
    pair: TaggedPair, words: Sequence[tuple[Part, str, bool]], uses: dict[Part, WordUse]
) -> Iterator[tuple[Part, Edit]]:
    """The edits of a pair that put a word in that is asked for, or take one out that is excluded."""
    for part, word, wanted in words:
        place, use = PARTS.index(part), uses[part]
        sentence, tags = pair.words[place], pair.tags[place]
        found = (
            edits_with(word, sentence, tags, use) if wanted else edits_without(word, sentence, use)
        )
        yield from ((part, edit) for edit in found)


def editable(
    pairs: Sequence[TaggedPair],
    words: Sequence[tuple[Part, str, bool]],
    uses: dict[Part, WordUse],
) -> float:
    """Share of the pairs that have a possible edit, 0 without pairs."""
    found = [any(True for _ in possible_edits(pair, words, uses)) for pair in pairs]
    return sum(found) / max(len(found), 1)


Network = Callable[[Sequence[tuple[list[str], list[str]]]], tuple[Tensor, Tensor]]
"""From pairs of sentences to the activations of all units [B, U] and the logits [B, K]."""


def edit_pairs(
    pairs: Sequence[TaggedPair],
    words: Sequence[tuple[Part, str, bool]],
    uses: dict[Part, WordUse],
    network: Network,
    unit: int,
    source: int,
    target: int,
    shown: int = 3,
) -> dict[str, Any]:
    """Edits pairs that are predicted ``source`` so that a unit that speaks for ``target`` fires.

    Of all edits of a pair with the unit's words, the one that activates the unit most is taken, and only then the
    prediction is looked at. As a control, the same place gets another word that could stand there.

    Args:
        pairs: to edit.
        words: of the unit's formula, see :func:`wanted_words`.
        uses: of both parts.
        network: says activations and logits.
        unit: whose words these are.
        source: class predicted before.
        target: class to reach.
        shown: successful edits kept as examples.

    Returns:
        ``tried`` pairs that could be edited, the shares ``success`` (predicted as the target), ``failure`` (still the
        source) and ``partial_success`` (another class) of them, all of this with ``control_`` in front for the
        control; ``activated``, the share after whose edit the unit is larger; ``examples`` of success. Shares of
        nothing are left out.
    """
    options: list[tuple[int, Part, Edit, Edit | None]] = []
    for number, pair in enumerate(pairs):
        for part, edit in possible_edits(pair, words, uses):
            place, use = PARTS.index(part), uses[part]
            avoid = {word for where, word, _ in words if where == part}
            key = mix("control word", unit, source, target, len(options))
            other = _control(edit, pair.words[place], pair.tags[place], use, avoid, key)
            options.append((number, part, edit, other))
    if not options:
        return {"tried": 0, "control_tried": 0, "examples": []}
    edited = [
        pairs[number].with_words(part, edit.apply(pairs[number].words[PARTS.index(part)]))
        for number, part, edit, _ in options
    ]
    activations, logits = network(edited)
    before, before_logits = network([(list(p.words[0]), list(p.words[1])) for p in pairs])
    best: dict[int, int] = {}
    for place, (number, *_) in enumerate(options):
        if number not in best or activations[place, unit] > activations[best[number], unit]:
            best[number] = place
    chosen = list(best.values())
    predictions = logits[chosen].argmax(1).tolist()
    report: dict[str, Any] = {
        "tried": len(chosen),
        **copy_paste_outcomes(predictions, source, target, None),
        "activated": float((activations[chosen, unit] > before[list(best), unit]).double().mean()),
    }
    controls = [
        pairs[number].with_words(part, control.apply(pairs[number].words[PARTS.index(part)]))
        for number, part, _, control in (options[place] for place in chosen)
        if control is not None
    ]
    report["control_tried"] = len(controls)
    if controls:
        outcome = copy_paste_outcomes(network(controls)[1].argmax(1).tolist(), source, target, None)
        report |= {f"control_{name}": share for name, share in outcome.items()}
    report["examples"] = [
        {
            "before": pairs[number].texts,
            "after": [" ".join(words) for words in edited[place]],
            "word": options[place][2].word,
            "kind": options[place][2].kind,
            "activation_before": float(before[number, unit]),
            "activation_after": float(activations[place, unit]),
            "margin_change": float(
                (logits[place, target] - logits[place, source])
                - (before_logits[number, target] - before_logits[number, source])
            ),
        }
        for (number, place), predicted in zip(best.items(), predictions, strict=True)
        if predicted == target
    ][:shown]
    return report


def _control(
    edit: Edit, words: Sequence[str], tags: Sequence[str], use: WordUse, avoid: set[str], key: int
) -> Edit | None:
    """The same kind of edit with another word; None if there is none that fits."""
    bounded = [EDGE, *words, EDGE]
    if edit.kind == "delete":
        others = [e for word in words if word != edit.word for e in edits_without(word, words, use)]
        return others[key % len(others)] if others else None
    possible = use.words[tags[edit.position]] if edit.kind == "replace" else use.tags
    behind = bounded[edit.position + (2 if edit.kind == "replace" else 1)]
    fitting = [
        word
        for word in possible
        if word not in avoid
        and word not in words
        and use.fits(word, bounded[edit.position], behind)
    ]
    return Edit(edit.kind, edit.position, fitting[key % len(fitting)]) if fitting else None


def evaluate(
    representation: Callable[[Any, Any], Tensor], classify: Callable[[Tensor], Tensor], batch: int
) -> Network:
    """A :data:`Network` that sees ``batch`` pairs at a time."""

    def network(pairs: Sequence[tuple[list[str], list[str]]]) -> tuple[Tensor, Tensor]:
        units, logits = [], []
        for first in range(0, len(pairs), batch):
            part = pairs[first : first + batch]
            found = representation([p for p, _ in part], [h for _, h in part])
            units.append(found.cpu())
            logits.append(classify(found).cpu())
        return torch.cat(units), torch.cat(logits)

    return network
