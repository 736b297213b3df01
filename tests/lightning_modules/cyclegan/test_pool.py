from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.cyclegan.pool import ImagePool


def numbered(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).clone()


def numbers(images: Tensor) -> list[float]:
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def filled(size: int, start: int = 0) -> ImagePool:
    pool = ImagePool(size)
    pool.query(numbered(*range(start, start + size)))
    return pool


def test_an_image_can_meet_one_of_its_own_batch() -> None:
    pool = filled(2)
    always, first = torch.tensor([0.9, 0.9, 0.2]), torch.tensor([1, 1, 1])
    assert numbers(pool.query(numbered(7, 8, 9), always, first)) == [1, 7, 9]
    assert numbers(pool.images) == [0, 8]


def test_a_batch_that_fills_the_pool_and_goes_on() -> None:
    pool = ImagePool(2)
    answer = pool.query(numbered(1, 2, 3, 4), torch.tensor([0.9] * 4), torch.tensor([1, 1, 0, 1]))
    assert numbers(answer) == [1, 2, 1, 2]
    assert numbers(pool.images) == [3, 4]


def test_one_half_is_no_swap() -> None:
    pool = filled(1)
    assert numbers(pool.query(numbered(5), torch.tensor([0.5]), torch.tensor([0]))) == [5]
    assert numbers(pool.images) == [0]


def test_answer_and_pool_are_apart_from_the_images_and_each_other() -> None:
    pool = ImagePool(2)
    images = numbered(1, 2).requires_grad_()
    answer = pool.query(images * 1)
    assert not answer.requires_grad
    assert not pool.images.requires_grad
    answer.zero_()
    assert numbers(pool.images) == [1, 2]
    old = pool.query(numbered(3), torch.tensor([0.9]), torch.tensor([0]))
    pool.images.zero_()
    assert numbers(old) == [1]


def test_size_zero_gives_the_batch_back_with_its_graph() -> None:
    images = numbered(1, 2).requires_grad_()
    pool = ImagePool(0)
    assert pool.query(images) is images
    assert len(pool) == 0


def test_statistics_of_its_own_draws() -> None:
    torch.manual_seed(0)
    pool = filled(4)
    steps = 4000
    swapped, ages = 0, torch.zeros(4)
    for step in range(steps):
        before = numbers(pool.images)
        (given,) = numbers(pool.query(numbered(10.0 + step)))
        if given != 10.0 + step:
            swapped += 1
            ages[before.index(given)] += 1
    assert swapped / steps == pytest.approx(0.5, abs=0.03)
    assert (ages / swapped).tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_it_is_a_function_of_draws_and_state() -> None:
    pool = filled(3)
    chance, slot = torch.rand(6), torch.randint(3, (6,))
    twin = deepcopy(pool)
    torch.manual_seed(5)
    first = pool.query(numbered(*range(6)), chance, slot)
    assert torch.equal(first, twin.query(numbered(*range(6)), chance, slot))
    # One batch of six is six batches of one.
    single = filled(3)
    rows = [
        single.query(image[None], chance[i : i + 1], slot[i : i + 1])
        for i, image in enumerate(numbered(*range(6)))
    ]
    assert torch.equal(torch.cat(rows), first)
    assert torch.equal(single.images, pool.images)


@pytest.mark.parametrize("fill", [0, 2, 4])
@pytest.mark.parametrize("strict", [True, False])
def test_any_fill_survives_a_file(fill: int, strict: bool, tmp_path: Path) -> None:
    pool, restored = ImagePool(4), filled(4, 50)
    pool.query(numbered(*range(fill)))
    torch.save(torch.nn.ModuleDict({"pool": pool}).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == ["pool.images"]
    torch.nn.ModuleDict({"pool": restored}).load_state_dict(state, strict)
    chance, slot = torch.full((3,), 0.9), torch.tensor([3, 0, 1])
    new = numbered(7, 8, 9)
    answers = [p.query(new, chance, slot) for p in (pool, restored)]
    assert torch.equal(*answers)
    assert torch.equal(pool.images, restored.images)


def test_loading_stays_strict() -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        ImagePool(2).load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ImagePool(2).load_state_dict({"images": numbered(1), "more": numbered(1)})
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"more than pool_size=2.*--model.pool_size 3"):
            ImagePool(2).load_state_dict(filled(3).state_dict(), strict)


def test_a_loaded_pool_does_not_share_memory_with_the_state() -> None:
    state = filled(2).state_dict()
    pool = ImagePool(2)
    pool.load_state_dict(state)
    pool.query(numbered(9), torch.tensor([0.9]), torch.tensor([0]))
    assert numbers(state["images"]) == [0, 1]


def test_type_that_images_are_kept_in() -> None:
    pool = ImagePool(1, torch.float16)
    pool.query(torch.full((1, 1, 1, 1), 1 / 3))
    assert pool.images.dtype == torch.float16
    restored = ImagePool(1, torch.float16)
    restored.load_state_dict(pool.state_dict())
    answer = restored.query(torch.ones(1, 1, 1, 1), torch.tensor([0.9]), torch.tensor([0]))
    assert restored.images.dtype == torch.float16
    assert answer.dtype == torch.float32
    assert answer.item() == pytest.approx(1 / 3, abs=1e-3)
    assert answer.item() != torch.tensor(1 / 3).item()
    as_given = ImagePool(2)
    as_given.query(torch.ones(1, 1, 1, 1).double())
    assert as_given.images.dtype == torch.float64


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="pool_size=-1"):
        ImagePool(-1)
    pool = filled(2)
    with pytest.raises(ValueError, match=r"\[2, 3, 3\].*\[2, 4, 4\].*--model.pool_size 0"):
        pool.query(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="2 images need as many draws, not 1 chances and 2 slots"):
        pool.query(numbered(1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"slots \[-1\] must be in 0..1"):
        pool.query(numbered(1), torch.zeros(1), torch.tensor([-1]))
