from itertools import chain

import pytest

from datamodules.sampler import ShardedSampler


def batches(sampler: ShardedSampler, size: int) -> list[list[int]]:
    indices = list(sampler)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def global_batches(
    world: int, epoch: int = 0, images: int = 103, batch: int = 24
) -> list[list[int]]:
    ranks = []
    for rank in range(world):
        sampler = ShardedSampler(range(images), batch, world, rank)
        sampler.set_epoch(epoch)
        ranks.append(batches(sampler, batch // world))
    return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_processes(world: int) -> None:
    assert global_batches(world) == global_batches(1)


def test_an_epoch_draws_without_replacement_and_drops_the_rest() -> None:
    drawn = list(chain(*global_batches(1)))
    assert len(drawn) == len(set(drawn)) == 96
    assert drawn != sorted(drawn)


def test_order_is_a_function_of_epoch_and_global_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    first = global_batches(1)
    assert global_batches(1) == first
    assert global_batches(1, epoch=1) != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert global_batches(1) != first


@pytest.mark.parametrize(("images", "world"), [(10, 1), (10, 3), (11, 4), (4, 4)])
def test_evaluation_covers_each_index_exactly_once(images: int, world: int) -> None:
    shares = []
    for rank in range(world):
        sampler = ShardedSampler(range(images), 4, world, rank, shuffle=False, drop_last=False)
        share = list(sampler)
        assert share == list(range(rank, images, world))
        assert len(sampler) == len(share)
        shares += share
    assert sorted(shares) == list(range(images))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_length_is_what_a_pass_yields(world: int) -> None:
    sampler = ShardedSampler(range(103), 24, world, world - 1)
    assert len(sampler) == len(list(sampler)) == 96 // world


def test_skip_leaves_out_the_head_of_one_pass_only() -> None:
    sampler = ShardedSampler(range(50), 10, 2, 1)
    whole = list(sampler)
    sampler.skip = 10
    assert list(sampler) == whole[10:]
    assert list(sampler) == whole
    assert len(sampler) == len(whole)


def test_a_global_batch_that_cannot_be_divided_names_the_nearest_that_can() -> None:
    with pytest.raises(ValueError, match=r"batch_size=10 .* 4 processes.* 8 or 12"):
        ShardedSampler(range(50), 10, 4, 0)
    ShardedSampler(range(50), 10, 4, 0, shuffle=False, drop_last=False)
