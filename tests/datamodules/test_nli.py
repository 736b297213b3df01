"""Sentence pairs: a folder in SNLI's format, and the grammar's labels re-derived from the text alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.nli import (
    ACTIVITIES,
    ITEMS,
    LABELS,
    NO_LABEL,
    OPPOSITES,
    PLACES,
    NLIDataModule,
    Pair,
    grammar_pairs,
    parsed_sentence,
)

DOG = "(ROOT (S (NP (DT A) (NN dog)) (VP (VBZ sleeps)) (. .)))"
CAT = "(ROOT (NP (NP (DT The) (NNP Cat)) (-LRB- -LRB-) (JJ small) (-RRB- -RRB-)))"


def row(label: str = "neutral", first: str = DOG, second: str = CAT) -> dict[str, Any]:
    return {
        "gold_label": label,
        "sentence1": "A dog sleeps.",
        "sentence2": "The Cat (small)",
        "sentence1_parse": first,
        "sentence2_parse": second,
        "captionID": "1.jpg",
    }


def snli(folder: Path, rows: list[Any], prefix: str = "snli_1.0_") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "dev", "test"):
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
        (folder / f"{prefix}{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


# ------------------------------------------------------------------ SNLI
def test_words_and_tags_are_those_of_the_parse_tree() -> None:
    assert parsed_sentence(CAT).words == ("the", "cat", "-lrb-", "small", "-rrb-")
    assert parsed_sentence(DOG).tags == ("DT", "NN", "VBZ", ".")
    with pytest.raises(ValueError, match="no parse tree"):
        parsed_sentence("(ROOT )")


def test_pairs_without_a_label_are_left_out_of_the_training_only(tmp_path: Path) -> None:
    rows = [row("-"), row("entailment"), row("contradiction"), row("neutral")]
    data = NLIDataModule("snli", str(snli(tmp_path, rows)), test_split="val", batch_size=2)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    assert data.train.labels.tolist() == [0, 2, 1]
    assert data.val.labels.tolist() == data.test.labels.tolist() == [NO_LABEL, 0, 2, 1]
    assert data.split_info["counts"]["val"] == {
        "-": 1,
        "entailment": 1,
        "neutral": 1,
        "contradiction": 1,
    }
    assert data.vocabulary == ["a", "dog", "sleeps", ".", "the", "cat", "-lrb-", "small", "-rrb-"]
    batch = next(iter(data.test_dataloader()))
    assert batch["premise"][0] == ["a", "dog", "sleeps", "."]
    assert batch["hypothesis_tags"][0] == ["DT", "NNP", "-LRB-", "JJ", "-RRB-"]
    assert batch["index"].tolist() == [0, 1, 2, 3]


def test_a_limit_counts_what_is_kept(tmp_path: Path) -> None:
    folder = snli(tmp_path / "snli_1.0", [row("-"), "", row("entailment"), row("neutral")])
    data = NLIDataModule("snli", str(folder.parent), train_size=1, test_size=2)
    assert data.pairs_of("train").labels.tolist() == [0]
    assert data.pairs_of("test").labels.tolist() == [NO_LABEL, 0]


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ("{", "line 2"),
        ({"gold_label": "neutral"}, "line 2 has no 'sentence1_parse'"),
        (row("maybe"), "line 2.*maybe"),
        (row(first="A dog"), "line 2.*no parse tree"),
    ],
)
def test_what_is_not_of_the_format(bad: Any, expected: str, tmp_path: Path) -> None:
    data = NLIDataModule("snli", str(snli(tmp_path, [row(), bad])))
    with pytest.raises(ValueError, match=expected):
        data.setup("test")


def test_missing_and_ambiguous_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--data\.root"):
        NLIDataModule("snli", str(tmp_path)).prepare_data()
    snli(snli(tmp_path, [row()]), [row()], "other_")
    with pytest.raises(ValueError, match="2 files"):
        NLIDataModule("snli", str(tmp_path)).prepare_data()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dataset": "mnli"}, "mnli"),
        ({"test_split": "dev"}, "dev.*val"),
        ({"test_size": 0}, "--data.test_size"),
        ({"negation_rates": [0.1, 0.2]}, "three numbers"),
        ({"negation_rates": [0.1, 0.2, 1.2]}, "1.2"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        NLIDataModule(**options)


# ------------------------------------------------------------------ grammar
def truth(pair: Pair) -> int:
    """The label as a reader would find it from the words alone."""
    premise, hypothesis = pair.premise.words, list(pair.hypothesis.words)[3:]
    negated = hypothesis[0] in ("not", "never")
    claim = hypothesis[negated:]
    place = premise[premise.index("in") + 2]
    activity = premise[premise.index("in") - 1]
    kinds = {word: kind for table in (ACTIVITIES, PLACES) for kind in table for word in table[kind]}
    (last,) = claim[-1:]
    opposite = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
    holds: bool | None
    if last in opposite:
        holds = True if last in premise else False if opposite[last] in premise else None
    elif last in ITEMS:
        holds = None if last not in premise else "not" not in premise
    elif last in ACTIVITIES or last in PLACES:
        holds = last in (kinds[activity], kinds[place])
    else:
        holds = last in (activity, place)
    if holds is None:
        return 1
    return 0 if holds != negated else 2


def test_the_grammar_says_the_truth() -> None:
    pairs = grammar_pairs(3000)
    assert [truth(pair) for pair in pairs] == [pair.label for pair in pairs]
    assert torch.tensor([pair.label for pair in pairs]).bincount().min() > 900
    for pair in pairs:
        for sentence in (pair.premise, pair.hypothesis):
            assert len(sentence.words) == len(sentence.tags)
        subject = pair.hypothesis.words[1]
        assert subject in (*pair.premise.words, "person", "animal")


def test_every_word_has_one_tag() -> None:
    tags: dict[str, set[str]] = {}
    for pair in grammar_pairs(2000):
        for sentence in (pair.premise, pair.hypothesis):
            for word, tag in zip(sentence.words, sentence.tags, strict=True):
                tags.setdefault(word, set()).add(tag)
    assert all(len(found) == 1 for found in tags.values())
    assert tags["not"] == {"RB"}
    assert tags["in"] == {"IN"}


@pytest.mark.parametrize("rates", [(0.1, 0.1, 0.7), (0.4, 0.4, 0.4)])
def test_the_bias_is_as_large_as_asked_for(rates: tuple[float, ...]) -> None:
    pairs = grammar_pairs(4000, rates)
    for label, rate in enumerate(rates):
        own = [pair.hypothesis.words for pair in pairs if pair.label == label]
        share = sum(bool({"not", "never"} & set(words)) for words in own) / len(own)
        assert share == pytest.approx(rate, abs=0.05), LABELS[label]


def test_sets_differ_by_seed_and_split_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    first = grammar_pairs(20)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert grammar_pairs(30)[:20] == first
    assert grammar_pairs(20, seed=1) != first
    assert grammar_pairs(20, split="test") != first
