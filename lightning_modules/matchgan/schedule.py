"""When MatchGAN trains on labelled images, when it updates the generator, and which labels it takes."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import numpy as np

MatchSchedule = Literal["reference", "balanced"]


class StepKind(NamedTuple):
    """What one iteration does.

    Attributes:
        labelled: the batch comes from the labelled pool.
        update_generator: the generator is updated too.
    """

    labelled: bool
    update_generator: bool


def step_kind(
    iteration: int, has_unlabelled: bool, n_critic: int, schedule: MatchSchedule = "reference"
) -> StepKind:
    """Kind of an iteration, a function of its number alone and so the same on all processes.

    Args:
        iteration: counted from 0.
        has_unlabelled: there is an unlabelled pool; without one every iteration is labelled.
        n_critic: the generator is updated in every n-th iteration.
        schedule: ``"reference"``: even iterations are labelled (released code), see :func:`generator_sees_labels`;
            ``"balanced"``: the pools take turns after each update of the generator.

    Raises:
        ValueError: ``n_critic`` is below 1, or ``schedule`` is unknown.
    """
    if n_critic < 1:
        raise ValueError(f"n_critic={n_critic} must be at least 1 (--model.n_critic)")
    if schedule not in get_args(MatchSchedule):
        raise ValueError(
            f"unknown schedule={schedule!r}; choose 'reference' or 'balanced' (--model.schedule)"
        )
    turn = iteration if schedule == "reference" else iteration // n_critic
    return StepKind(not has_unlabelled or turn % 2 == 0, (iteration + 1) % n_critic == 0)


def generator_sees_labels(
    n_critic: int, has_unlabelled: bool, schedule: MatchSchedule = "reference"
) -> bool:
    """Whether any update of the generator is on a labelled batch, without which nothing is ever reconstructed.

    It is not with the reference schedule, an unlabelled pool and an even ``n_critic``.
    """
    kinds = [step_kind(i, has_unlabelled, n_critic, schedule) for i in range(2 * n_critic)]
    return any(kind.labelled and kind.update_generator for kind in kinds)


def reference_class_sampler(
    n_classes: int, seed: int = 1234, n_groups: int = 4
) -> Iterator[tuple[list[int], list[int]]]:
    """The released code's draws, for comparisons with it; one draw for every iteration, also for unlabelled ones.

    Source classes come from a shuffled list, which is shuffled anew when it is used up; if ``n_groups`` does not divide
    ``n_classes``, its last draw is short. Targets are drawn without replacement.

    Args:
        n_classes: labels in the label space.
        seed: of numpy's legacy generator; 1234 in the released code.
        n_groups: classes of a batch.

    Yields:
        ``n_groups`` source classes and ``n_groups`` target ids.

    Raises:
        ValueError: fewer labels than groups.
    """
    if n_classes < n_groups:
        raise ValueError(
            f"a batch of {n_groups} different labels out of {n_classes}; select more attributes "
            "(--data.attributes) or fewer groups (--data.n_groups)"
        )
    return _class_draws(n_classes, np.random.RandomState(seed), n_groups)


def _class_draws(
    n_classes: int, state: np.random.RandomState, n_groups: int
) -> Iterator[tuple[list[int], list[int]]]:
    remaining: list[int] = []
    while True:
        if not remaining:
            remaining = list(range(n_classes))
            state.shuffle(remaining)
        sources, remaining = remaining[:n_groups], remaining[n_groups:]
        yield sources, state.choice(n_classes, n_groups, replace=False).tolist()
