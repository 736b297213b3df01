import pytest
import torch

from lightning_modules.matchgan.pairs import match_pair_indices, match_targets


@pytest.mark.parametrize("group_size", [4, 6])
@pytest.mark.parametrize("n", [3, 4, 7])
def test_pairs_say_the_truth_about_groups(n: int, group_size: int) -> None:
    anchor, other, is_match = match_pair_indices(n * group_size, group_size)
    assert len(anchor) == 4 * n
    same = anchor // group_size == other // group_size
    assert torch.equal(same.long(), is_match)
    assert is_match.sum() == 2 * n
    assert sorted(set((anchor % group_size).tolist())) == [0, 2]
    assert sorted(set((other % group_size).tolist())) == [1, 3]
    assert len(set(zip(anchor.tolist(), other.tolist(), strict=True))) == 4 * n
    half = match_pair_indices(n * group_size, group_size, both=False)
    assert all(
        torch.equal(a, b[: 2 * n]) for a, b in zip(half, (anchor, other, is_match), strict=True)
    )


def test_negatives_of_the_two_anchors_are_in_the_groups_before() -> None:
    anchor, other, is_match = match_pair_indices(20)
    negatives = {int(a): int(o) for a, o, m in zip(anchor, other, is_match, strict=True) if not m}
    assert negatives[14] == 11  # slot 2 of group 3, slot 3 of group 2
    assert negatives[12] == 7  # slot 0 of group 3, slot 3 of group 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 4), r"2 groups .* --data\.n_groups"),
        ((4, 4), "1 groups"),
        ((14, 4), "14 is not made of groups of 4"),
        ((12, 3), "group_size=3"),
    ],
)
def test_pair_errors(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_pair_indices(*sizes)


@pytest.mark.parametrize(("n", "group_size"), [(3, 4), (4, 4), (5, 6)])
def test_targets_regroup(n: int, group_size: int) -> None:
    chosen = torch.arange(10, 10 + n)
    targets, regroup = match_targets(chosen, group_size)
    assert targets.tolist() == chosen.tolist() * group_size
    assert targets[regroup].tolist() == [k for k in chosen.tolist() for _ in range(group_size)]
    assert regroup.view(n, group_size)[0].tolist() == list(range(0, n * group_size, n))
    vectors, again = match_targets(torch.eye(n), group_size)
    assert torch.equal(vectors.argmax(1), targets - 10)
    assert torch.equal(regroup, again)
