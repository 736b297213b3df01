"""Pairs of sentences for natural language inference: SNLI, and a small set that a grammar makes."""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from datamodules.base import AdversariaDataModule
from datamodules.datasets import BatchDataset
from lightning_modules.arguments import demand_at_least
from lightning_modules.randomness import mix

LABELS = ("entailment", "neutral", "contradiction")
NO_LABEL = -1
"""Label of a pair on which the annotators did not agree (``-`` in SNLI)."""
DISAGREEMENT = "-"

SPLITS = ("train", "val", "test")
Split = Literal["train", "val", "test"]
FILE_OF_SPLIT = {"train": "train", "val": "dev", "test": "test"}


@dataclass(frozen=True)
class Sentence:
    """Words in lower case and their tags (Penn Treebank), one each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A premise and a hypothesis with the number of their label, or ``NO_LABEL``."""

    premise: Sentence
    hypothesis: Sentence
    label: int


class SentencePairDataset(BatchDataset):
    """Pairs of sentences in memory.

    Args:
        pairs: the set.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = list(pairs)
        self.labels = torch.tensor([pair.label for pair in self.pairs], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these pairs.

        Returns:
            ``premise``, ``hypothesis``, ``premise_tags``, ``hypothesis_tags`` (B lists of words), ``label`` and
            ``index`` (int64 [B]).
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        chosen = [self.pairs[i] for i in index.tolist()]
        return {
            "index": index,
            "label": self.labels.index_select(0, index),
            "premise": [list(pair.premise.words) for pair in chosen],
            "hypothesis": [list(pair.hypothesis.words) for pair in chosen],
            "premise_tags": [list(pair.premise.tags) for pair in chosen],
            "hypothesis_tags": [list(pair.hypothesis.tags) for pair in chosen],
        }


class NLIDataModule(AdversariaDataModule):
    """Premises and hypotheses that are entailed, neutral or contradicted.

    - ``grammar``: a person or an animal somewhere doing something, and a claim about it that is true, open or false.
      Labels, tags and the bias are exact, see :func:`grammar_pairs`. Nothing is needed.
    - ``snli``: a folder with the three files ``*train.jsonl``, ``*dev.jsonl``, ``*test.jsonl`` of SNLI or of a set in
      its format. Words and tags are those of the parse trees in the files, in lower case, so that no tokeniser and no
      tagger is needed (released code: those of spaCy, which differ in details).

    Pairs with the label ``-`` are left out of the training (released code); elsewhere they have label -1, which counts
    in no accuracy, but they are sentences like any other for whoever probes a network. Batches are those of
    :class:`SentencePairDataset`.

    Args:
        dataset: see above.
        root: folder of ``snli``, or of one with a folder ``snli_1.0`` in it.
        test_split: what ``test`` and ``predict`` load. Compositional Explanations probes SNLI's ``val``.
        train_size: pairs of ``train``; None: 6,000 of the grammar, all of SNLI. A number takes the first ones.
        val_size: of ``val``; None: 1,000 of the grammar.
        test_size: of ``test``; None: 2,000 of the grammar.
        negation_rates: share of the hypotheses of the grammar that have a negation, by label; equal rates take the bias
            out.
        grammar_seed: makes another set. The seed of the run does not.
        batch_size: training batch over all processes together.
        eval_batch_size: batch of one process; it does not change any result.
        num_workers: loader processes.

    Attributes:
        class_names: of the labels.

    Raises:
        ValueError: impossible arguments, or a file that is not of the format.
        FileNotFoundError: a file is missing.
    """

    class_names = LABELS

    def __init__(
        self,
        dataset: Literal["grammar", "snli"] = "grammar",
        root: str = "data",
        test_split: Split = "test",
        train_size: int | None = None,
        val_size: int | None = None,
        test_size: int | None = None,
        negation_rates: Sequence[float] = (0.1, 0.1, 0.7),
        grammar_seed: int = 0,
        batch_size: int = 100,
        eval_batch_size: int = 500,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        self.save_hyperparameters(logger=False)
        demand_at_least(
            1, option="--data.", train_size=train_size, val_size=val_size, test_size=test_size
        )
        if dataset not in ("grammar", "snli"):
            raise ValueError(f"dataset={dataset!r} must be grammar or snli (--data.dataset)")
        if test_split not in SPLITS:
            raise ValueError(
                f"test_split={test_split!r} must be one of {', '.join(SPLITS)} (--data.test_split)"
            )
        _check_rates(negation_rates)
        self.dataset = dataset
        self.root = root
        self.test_split: Split = test_split
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        self.negation_rates = tuple(negation_rates)
        self.grammar_seed = grammar_seed
        self._loaded: dict[str, SentencePairDataset] = {}

    @property
    def split_info(self) -> dict[str, Any]:
        """What was loaded, in plain values for the results."""
        counts = {name: self._counts(part) for name, part in self._loaded.items()}
        bias = {"negation_rates": list(self.negation_rates), "grammar_seed": self.grammar_seed}
        return {
            "dataset": self.dataset,
            "test_split": self.test_split,
            "counts": counts,
            **(bias if self.dataset == "grammar" else {}),
        }

    def _counts(self, part: SentencePairDataset) -> dict[str, int]:
        names = {NO_LABEL: DISAGREEMENT, **dict(enumerate(LABELS))}
        found, counts = part.labels.unique(return_counts=True)
        return {names[k]: n for k, n in zip(found.tolist(), counts.tolist(), strict=True)}

    def check_files(self, stage: TrainerFn | None) -> None:
        """Looks whether the files are there."""
        if self.dataset == "snli":
            for split in SPLITS:
                snli_file(self.root, split)

    def open_parts(self, stage: str | None) -> None:
        """Loads the splits of a stage."""
        if stage == "fit":
            self.train = self.pairs_of("train")
        if stage in ("fit", "validate"):
            self.val = self.pairs_of("val")
        if stage in ("test", "predict"):
            self.test = self.pairs_of(self.test_split)

    def pairs_of(self, split: Split) -> SentencePairDataset:
        """A split, loaded once; the training set has no pairs without a label."""
        if split not in self._loaded:
            size = self.sizes[split]
            if self.dataset == "grammar":
                size = size or {"train": 6000, "val": 1000, "test": 2000}[split]
                pairs = grammar_pairs(size, self.negation_rates, self.grammar_seed, split)
            else:
                path = snli_file(self.root, split)
                pairs = list(read_snli(path, split == "train", size))
                if not pairs:
                    raise ValueError(f"{path} holds no pair with a label")
            self._loaded[split] = SentencePairDataset(pairs)
        return self._loaded[split]

    def training_set(self) -> SentencePairDataset:
        """The training pairs, for an analysis that trains its own classifier."""
        return self.pairs_of("train")

    @property
    def vocabulary(self) -> list[str]:
        """All words of the training pairs, in the order in which they first occur (no word is too rare)."""
        pairs = self.pairs_of("train").pairs
        return list(
            dict.fromkeys(w for p in pairs for s in (p.premise, p.hypothesis) for w in s.words)
        )


# ------------------------------------------------------------------ SNLI
_LEAF = re.compile(r"\(([^\s()]+) ([^\s()]+)\)")


def snli_file(root: str, split: str) -> Path:
    """The file of a split.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    pattern = f"*{FILE_OF_SPLIT[split]}.jsonl"
    base = Path(root).expanduser()
    for folder in (base, base / "snli_1.0"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(
                f"{folder} holds {len(found)} files {pattern} ({', '.join(p.name for p in found)}); leave one there"
            )
        if found:
            return found[0]
    raise FileNotFoundError(
        f"no file {pattern} in {base} or {base / 'snli_1.0'}; give the folder of snli_1.0.zip by --data.root DIR"
    )


def parsed_sentence(tree: str) -> Sentence:
    """Words, in lower case, and tags of a bracketed parse tree.

    Raises:
        ValueError: the tree has no leaf.
    """
    leaves = _LEAF.findall(tree)
    if not leaves:
        raise ValueError(f"{tree[:60]!r} is no parse tree with leaves such as (NN dog)")
    tags, words = zip(*leaves, strict=True)
    return Sentence(tuple(word.lower() for word in words), tags)


def read_snli(path: Path, labelled_only: bool, limit: int | None = None) -> Iterator[Pair]:
    """The pairs of a file in SNLI's format, one JSON object a line.

    Args:
        path: the file.
        labelled_only: leave out pairs with the label ``-``.
        limit: end after so many pairs.

    Raises:
        ValueError: naming the line that is not of the format.
    """
    done = 0
    with path.open(encoding="utf-8") as file:
        hidden = getattr(rank_zero_only, "rank", 0) != 0
        for number, line in enumerate(
            tqdm(file, desc=f"reading {path.name}", unit=" pairs", leave=False, disable=hidden), 1
        ):
            if limit is not None and done >= limit:
                return
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                gold = row["gold_label"]
                if labelled_only and gold == DISAGREEMENT:
                    continue
                if gold not in (*LABELS, DISAGREEMENT):
                    raise ValueError(f"gold_label {gold!r} is none of {', '.join(LABELS)}, -")
                label = NO_LABEL if gold == DISAGREEMENT else LABELS.index(gold)
                premise, hypothesis = (parsed_sentence(row[f"sentence{i}_parse"]) for i in (1, 2))
                pair = Pair(premise, hypothesis, label)
            except KeyError as error:
                raise ValueError(f"{path}, line {number} has no {error}") from error
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{path}, line {number} is not of SNLI's format: {error}"
                ) from error
            done += 1
            yield pair


# ------------------------------------------------------------------ grammar
KINDS: dict[str, tuple[str, ...]] = {
    "person": ("man", "woman", "boy", "girl", "doctor", "farmer"),
    "animal": ("dog", "cat", "horse", "cow"),
}
OPPOSITES = (
    ("young", "old"),
    ("tall", "short"),
    ("happy", "sad"),
    ("wet", "dry"),
    ("clean", "dirty"),
)
ACTIVITIES: dict[str, tuple[str, ...]] = {
    "moving": ("running", "walking", "jumping", "swimming"),
    "resting": ("sitting", "sleeping", "lying", "kneeling"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "outdoors": ("park", "street", "field", "forest", "garden"),
    "indoors": ("kitchen", "house", "office", "hall", "shop"),
}
ITEMS = ("hat", "scarf", "coat", "collar")
NEVER = 0.3
"""Share of ``never`` among the negations of what is true: it would be false, or no consequence, anywhere else."""

Tagged = tuple[tuple[str, str], ...]
Draw = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class _Scene:
    noun: str
    kind: str
    adjective: str | None
    activity: str
    activity_kind: str
    place: str
    side: str
    item: str | None
    wears: bool

    def premise(self) -> Tagged:
        described = [(self.adjective, "JJ")] if self.adjective else []
        words: list[Any] = [
            ("an" if self.adjective == "old" else "a", "DT"),
            *described,
            (self.noun, "NN"),
            ("is", "VBZ"),
            (self.activity, "VBG"),
            *_in(self.place),
        ]
        if self.item:
            words += [("and", "CC"), ("is", "VBZ"), *([] if self.wears else [("not", "RB")])]
            words += _wearing(self.item)
        return tuple(words)

    def claims(self, truth: bool | None) -> list[list[Tagged]]:
        """What is true, false or open (None) of the scene, a list for each kind of claim."""
        opposite = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
        adjectives: list[str] = []
        items = [self.item] if self.item and self.wears == truth else []
        if truth is None:
            known = {self.adjective, opposite.get(self.adjective or "")}
            adjectives = [word for word in opposite if word not in known]
            items = [item for item in ITEMS if item != self.item]
        elif self.adjective:
            adjectives = [self.adjective if truth else opposite[self.adjective]]
        found: list[list[Tagged]] = [
            [((word, "JJ"),) for word in adjectives],
            [_wearing(item) for item in items],
        ]
        if truth is not None:
            found += [
                [((word, "VBG"),) for word in _other(ACTIVITIES, self.activity, truth)],
                [((word, "VBG"),) for word in ACTIVITIES if (word == self.activity_kind) == truth],
                [_in(word) for word in _other(PLACES, self.place, truth)],
                [((word, "RB"),) for word in PLACES if (word == self.side) == truth],
            ]
        return [kind for kind in found if kind]


def _other(table: dict[str, tuple[str, ...]], own: str, same: bool) -> list[str]:
    return [word for words in table.values() for word in words if (word == own) == same]


def _in(place: str) -> Tagged:
    return (("in", "IN"), ("the", "DT"), (place, "NN"))


def _wearing(item: str) -> Tagged:
    return (("wearing", "VBG"), ("a", "DT"), (item, "NN"))


def _check_rates(rates: Sequence[float]) -> None:
    if len(rates) != len(LABELS) or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(
            f"negation_rates={list(rates)} must be three numbers in [0, 1], for {', '.join(LABELS)} "
            "(--data.negation_rates)"
        )


def grammar_pairs(
    count: int,
    negation_rates: Sequence[float] = (0.1, 0.1, 0.7),
    seed: int = 0,
    split: str = "train",
) -> list[Pair]:
    """Premises such as ``an old man is running in the park and is not wearing a hat``, and claims about them.

    A hypothesis is ``the man`` or ``the person``, ``is``, perhaps ``not`` or ``never``, and a claim: a quality, an
    activity or its kind (``moving``), a place or its side (``outdoors``), clothes. The premise says whether the claim
    is true, false, or neither; with the negation that makes the label, which is therefore right by construction:
    ``not`` of what is false is entailed, of what is open it is neutral. What is biased is only how often each label is
    negated, so that a network may take a negation for a contradiction.

    Args:
        count: pairs; every label has probability 1/3.
        negation_rates: share with a negation by label.
        seed: of the set.
        split: tells sets of one seed apart.

    Raises:
        ValueError: rates outside [0, 1].
    """
    _check_rates(negation_rates)
    # random() is the one method whose numbers Python promises to keep.
    stream = random.Random(mix("nli grammar", seed, split))

    def draw(options: Sequence[Any]) -> Any:
        return options[int(stream.random() * len(options))]

    pairs = []
    for _ in range(count):
        scene = _scene(draw, stream)
        label = draw(range(len(LABELS)))
        negated = stream.random() < negation_rates[label]
        truth = {"entailment": not negated, "neutral": None, "contradiction": negated}[
            LABELS[label]
        ]
        words: list[Any] = [("the", "DT"), (draw((scene.noun, scene.kind)), "NN"), ("is", "VBZ")]
        if negated:
            possible = LABELS[label] != "entailment"
            words.append(("never" if possible and stream.random() < NEVER else "not", "RB"))
        words += draw(draw(scene.claims(truth)))
        pairs.append(Pair(_sentence(scene.premise()), _sentence(tuple(words)), label))
    return pairs


def _scene(draw: Draw, stream: random.Random) -> _Scene:
    kind = draw(tuple(KINDS))
    activity_kind, side = draw(tuple(ACTIVITIES)), draw(tuple(PLACES))
    return _Scene(
        noun=draw(KINDS[kind]),
        kind=kind,
        adjective=draw(draw(OPPOSITES)) if stream.random() < 0.6 else None,
        activity=draw(ACTIVITIES[activity_kind]),
        activity_kind=activity_kind,
        place=draw(PLACES[side]),
        side=side,
        item=draw(ITEMS) if stream.random() < 0.5 else None,
        wears=stream.random() < 0.5,
    )


def _sentence(tagged: Tagged) -> Sentence:
    words, tags = zip(*tagged, strict=True)
    return Sentence(words, tags)
