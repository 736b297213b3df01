import torch
from torch import Tensor

from lightning_modules.dissection.formulas import And, Leaf, Neighbors, Not, Or
from lightning_modules.dissection.nli_edits import (
    Edit,
    TaggedPair,
    WordUse,
    edit_pairs,
    editable,
    edits_with,
    edits_without,
    evaluate,
    possible_edits,
    wanted_words,
)

NAMES = ["pre:tok:dog", "hyp:tok:not", "hyp:tag:nn", "oth:overlap:overlap50", "hyp:tok:a:b"]
TAGS = {"dog": "NN", "cat": "NN", "bird": "NN", "is": "VBZ", "not": "RB", "wet": "JJ", "dry": "JJ"}


def pair(premise: str, hypothesis: str) -> TaggedPair:
    words = tuple(premise.split()), tuple(hypothesis.split())
    first, second = (tuple(TAGS[word] for word in part) for part in words)
    return TaggedPair((words[0], words[1]), (first, second))


SEEN = [
    pair("dog is wet", "dog is not wet"),
    pair("cat is dry", "cat is dry"),
    pair("bird is not wet", "bird is wet"),
]
USE = {part: WordUse.of(SEEN, part) for part in ("pre", "hyp")}


def test_words_of_a_formula() -> None:
    formula = And(Or(Neighbors(Leaf(0)), Leaf(2)), Not(Or(Leaf(1), Leaf(4))))
    assert wanted_words(formula, NAMES) == [
        ("pre", "dog", True),
        ("hyp", "not", False),
        ("hyp", "a:b", False),
    ]
    assert wanted_words(Leaf(3), NAMES) == wanted_words(None, NAMES) == []


def test_an_edit_keeps_to_what_was_seen() -> None:
    words, tags = ("cat", "is", "dry"), ("NN", "VBZ", "JJ")
    assert list(edits_with("dog", words, tags, USE["hyp"])) == [Edit("replace", 0, "dog")]
    assert list(edits_with("wet", words, tags, USE["hyp"])) == [Edit("replace", 2, "wet")]
    assert list(edits_with("dry", words, tags, USE["hyp"])) == []
    # `not` was only ever seen before `wet`.
    assert list(edits_with("not", words, tags, USE["hyp"])) == []
    assert list(edits_with("not", ("cat", "is", "wet"), tags, USE["hyp"])) == [
        Edit("insert", 2, "not")
    ]
    assert list(edits_without("not", ("dog", "is", "not", "wet"), USE["hyp"])) == [
        Edit("delete", 2, "not")
    ]
    # `dry` was never seen right after `cat`.
    assert list(edits_without("is", words, USE["hyp"])) == []


def test_edits_are_applied_where_they_are() -> None:
    words = ["dog", "is", "wet"]
    assert Edit("insert", 2, "not").apply(words) == ["dog", "is", "not", "wet"]
    assert Edit("replace", 0, "cat").apply(words) == ["cat", "is", "wet"]
    assert Edit("delete", 1, "is").apply(words) == ["dog", "wet"]
    assert Edit("insert", 3, "dog").apply(words) == [*words, "dog"]
    assert SEEN[0].with_words("hyp", ["x"]) == (["dog", "is", "wet"], ["x"])


def test_pairs_that_can_be_edited() -> None:
    wanted = [("hyp", "not", True), ("pre", "not", False)]
    found = [list(possible_edits(pair, wanted, USE)) for pair in SEEN]
    assert found == [
        [],
        [],
        [("hyp", Edit("insert", 2, "not")), ("pre", Edit("delete", 2, "not"))],
    ]
    assert editable(SEEN, wanted, USE) == 1 / 3
    assert editable([], wanted, USE) == 0


def units(premises: list[list[str]], hypotheses: list[list[str]]) -> Tensor:
    """Unit 0 counts `wet` in both, unit 1 fires on `dog` in the hypothesis."""
    rows = [
        [first.count("wet") + 2 * second.count("wet"), float("dog" in second)]
        for first, second in zip(premises, hypotheses, strict=True)
    ]
    return torch.tensor(rows)


def classify(found: Tensor) -> Tensor:
    """Class 2 from two `wet` on, class 1 for a dog, class 0 otherwise."""
    return torch.stack([torch.full((len(found),), 1.0), 2 * found[:, 1], found[:, 0]], 1)


def test_the_strongest_edit_is_judged_by_the_prediction() -> None:
    network = evaluate(units, classify, 2)
    given = [pair("cat is dry", "cat is dry"), pair("bird is dry", "bird is dry")]
    report = edit_pairs(given, [("pre", "wet", True), ("hyp", "wet", True)], USE, network, 0, 0, 2)
    assert report["tried"] == 2
    assert report["success"] == report["activated"] == 1
    assert report["examples"][0]["after"] == ["cat is dry", "cat is wet"]
    assert report["examples"][0]["margin_change"] == 2
    # Nothing but `dry` and `wet` could stand there.
    assert report["control_tried"] == 0

    report = edit_pairs(given, [("hyp", "dog", True)], USE, network, 1, 0, 2)
    assert (report["success"], report["partial_success"], report["examples"]) == (0, 1, [])
    assert report["control_tried"] == 2
    assert report["control_failure"] == 1

    nothing = edit_pairs(given, [("hyp", "bird is", True)], USE, network, 0, 0, 2)
    assert nothing == {"tried": 0, "control_tried": 0, "examples": []}
