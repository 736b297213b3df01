import itertools
import json

import numpy as np
import pytest

from lightning_modules.dissection.formulas import (
    And,
    Formula,
    Leaf,
    Neighbors,
    Not,
    Or,
    equivalent,
    formula_from_json,
    minor_negate,
    parse_formula,
)

A, B, C = Leaf(0), Leaf(1), Leaf(2)
FORMULAS: list[Formula] = [
    A,
    Not(B),
    Or(A, B),
    And(Or(A, B), Not(C)),
    And(Neighbors(A), Not(Or(B, C))),
    Or(Not(Not(A)), And(B, C)),
]


@pytest.mark.parametrize("formula", FORMULAS)
def test_text_and_tree_bring_the_formula_back(formula: Formula) -> None:
    names = ["-lrb-", "a OR b", "art gallery (indoor)"]
    assert parse_formula(str(formula)) == formula
    text = formula.to_str(names.__getitem__)
    assert parse_formula(text, {name: i for i, name in enumerate(names)}) == formula
    assert formula_from_json(json.loads(json.dumps(formula.to_json()))) == formula


def test_names_that_are_brackets() -> None:
    names = {"(": 0, ")": 1, "NOT": 2}
    assert parse_formula("(( OR ))", names) == Or(A, B)
    assert parse_formula("((NOT NOT) AND ()", names) == And(Not(C), A)


def test_the_longer_name_is_meant() -> None:
    names = {"sky": 0, "sky AND sea": 1, "sea": 2}
    assert parse_formula("(sky AND sea)", {"sky": 0, "sea": 2}) == And(A, C)
    assert parse_formula("sky AND sea", names) == B


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a concept or a bracket"),
        ("(0 XOR 1)", "OR or AND at ' XOR 1"),
        ("(0 OR 1", "a closing bracket"),
        ("(0 OR 1) 2", "the end at ' 2'"),
        ("(0 OR sky)", "a concept or a bracket at 'sky"),
    ],
)
def test_unreadable_text(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="is no formula.*" + message):
        parse_formula(text)


@pytest.mark.parametrize("tree", [{}, 3, {"leaf": "a"}, {"or": [{"leaf": 1}]}, {"xor": []}])
def test_unreadable_tree(tree: object) -> None:
    with pytest.raises(ValueError, match="is no formula"):
        formula_from_json(tree)


def test_equality_is_of_structure() -> None:
    assert Or(A, B) == Or(Leaf(0), Leaf(1))
    assert Or(A, B) != And(A, B)
    assert Or(A, B) != Or(B, A)
    assert len({Or(A, B), Or(A, B), And(A, B), Not(A), Neighbors(A)}) == 4


def test_both_lengths() -> None:
    formula = And(Or(Neighbors(A), B), Not(C))
    assert (formula.n_leaves, formula.length_reference) == (3, 5)


def test_evaluation() -> None:
    masks = np.array(list(itertools.product((False, True), repeat=3))).T
    a, b, c = masks
    assert (And(Or(A, B), Not(C)).evaluate(masks) == ((a | b) & ~c)).all()
    near = {0: [2]}
    assert (And(Neighbors(A), B).evaluate(masks, near) == ((a | c) & b)).all()
    assert (Neighbors(B).evaluate(masks, near) == b).all()
    with pytest.raises(ValueError, match=r"\(NEIGHBORS 0\) needs `neighbors`"):
        Neighbors(A).evaluate(masks)


def test_operands_are_sorted_by_their_text() -> None:
    formula = And(Or(Leaf(1), Leaf(0)), Not(Or(Leaf(2), Leaf(1))))
    assert formula.to_str(sort=True) == "((0 OR 1) AND (NOT (2 OR 1)))"


def test_near_misses_flip_one_leaf_of_the_longer_side() -> None:
    assert minor_negate(Or(A, And(B, C))) == Or(A, And(Not(B), C))
    assert minor_negate(And(A, Not(B))) == And(A, B)
    assert minor_negate(Or(Neighbors(A), B)) == Or(Not(Neighbors(A)), B)


def test_equivalence() -> None:
    assert equivalent(And(A, Not(B)), Not(Or(Not(A), B)))
    assert equivalent(Or(A, And(A, B)), A)
    assert not equivalent(Or(A, B), And(A, B))
    assert not equivalent(A, B)
    assert not equivalent(A, Neighbors(A))
    many: Formula = A
    for label in range(1, 22):
        many = Or(many, Leaf(label))
    with pytest.raises(ValueError, match="up to 20 concepts, not 22"):
        equivalent(many, A)
