from itertools import islice

import pytest

from lightning_modules.matchgan.schedule import (
    generator_sees_labels,
    reference_class_sampler,
    step_kind,
)


def test_reference_schedule() -> None:
    kinds = [step_kind(i, True, 3) for i in range(12)]
    assert [kind.labelled for kind in kinds] == [True, False] * 6
    assert [i for i, kind in enumerate(kinds) if kind.update_generator] == [2, 5, 8, 11]
    assert all(step_kind(i, False, 3).labelled for i in range(6))


def test_balanced_schedule_turns_after_every_update_of_the_generator() -> None:
    kinds = [step_kind(i, True, 2, "balanced") for i in range(8)]
    assert [kind.labelled for kind in kinds] == [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2
    assert [kind.update_generator for kind in kinds] == [False, True] * 4
    assert all(step_kind(i, False, 2, "balanced").labelled for i in range(8))


@pytest.mark.parametrize("n_critic", [1, 2, 3, 4, 5])
def test_only_even_intervals_keep_labels_from_the_generator(n_critic: int) -> None:
    assert generator_sees_labels(n_critic, True) == (n_critic % 2 == 1)
    assert generator_sees_labels(n_critic, False)
    assert generator_sees_labels(n_critic, True, "balanced")


def test_schedule_errors() -> None:
    with pytest.raises(ValueError, match=r"n_critic=0 .* \(--model\.n_critic\)"):
        step_kind(0, True, 0)
    with pytest.raises(ValueError, match=r"schedule='random'.*--model\.schedule"):
        step_kind(0, True, 5, "random")  # type: ignore[arg-type]


def test_class_sampler_covers_all_classes_before_any_repeats() -> None:
    draws = list(islice(reference_class_sampler(10, seed=3), 6))
    for first in (0, 3):
        sources = [c for draw in draws[first : first + 3] for c in draw[0]]
        assert sorted(sources) == list(range(10))
    assert [len(sources) for sources, _ in draws] == [4, 4, 2] * 2
    assert all(len(set(targets)) == 4 for _, targets in draws)
    assert list(islice(reference_class_sampler(10, seed=3), 6)) == draws
    assert list(islice(reference_class_sampler(10, seed=4), 6)) != draws
    assert [len(part) for part in next(reference_class_sampler(10, n_groups=5))] == [5, 5]


def test_class_sampler_refuses_at_once() -> None:
    with pytest.raises(ValueError, match=r"4 different labels out of 3; .*--data\.n_groups"):
        reference_class_sampler(3)
