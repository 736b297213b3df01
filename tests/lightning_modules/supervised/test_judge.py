"""Judges: equal for equal seeds, trained without a trace in the run around them."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.supervised import Classifier, Segmenter, fit_judge
from lightning_modules.supervised.judge import _flip, _places


class Brightness:
    """Dark images are of class 0, bright ones of class 1."""

    def __init__(self, count: int = 20) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices: Tensor, device: torch.device | None = None) -> dict[str, Any]:
        labels = indices % 2
        noise = torch.rand(self.count, 3, 8, 8, generator=torch.Generator().manual_seed(0))[indices]
        images = 0.4 * labels.view(-1, 1, 1, 1) + 0.2 * noise
        return {"image": images, "label": labels, "mask": labels[:, None, None].expand(-1, 8, 8)}


def fit(**options: Any) -> Classifier:
    given: dict[str, Any] = {"steps": 40, "batch_size": 8, "lr": 0.01, **options}
    return fit_judge(lambda: Classifier(2, width=2), Brightness(), **given)


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return all(torch.equal(a[key], b[key]) for key in a)


def test_it_learns_and_is_frozen() -> None:
    judge = fit()
    batch = Brightness().batch(torch.arange(20))
    assert torch.equal(judge(batch["image"]).argmax(1), batch["label"])
    assert not judge.training
    assert not any(p.requires_grad for p in judge.parameters())


def test_it_depends_on_its_own_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = fit(steps=3)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    torch.manual_seed(77)
    assert equal(judge, fit(steps=3))
    assert not equal(judge, fit(steps=3, seed=1))
    assert not equal(judge, fit(steps=3, keys=("other",)))


def test_nothing_around_it_changes() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    deterministic = torch.backends.cudnn.deterministic
    with torch.inference_mode():
        judge = fit(steps=3)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.backends.cudnn.deterministic == deterministic
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(judge, fit(steps=3)), "float32, whatever the default"
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_sample_comes_once_before_any_comes_again() -> None:
    places = torch.cat([_places(10, step, 4, 0, ()) for step in range(10)])
    assert set(Counter(places.tolist()).values()) == {4}
    for turn in range(4):
        assert len(set(places[10 * turn : 10 * turn + 10].tolist())) == 10
    assert not torch.equal(places[:10], places[10:20])


def test_flips_take_the_mask_along() -> None:
    image = torch.arange(4.0).expand(2, 3, 4, 4).clone()
    batch: dict[str, Any] = {"image": image, "mask": torch.arange(4).expand(2, 4, 4).clone()}
    _flip(batch, torch.tensor([True, False]))
    assert batch["image"][:, 0, 0].tolist() == [[3, 2, 1, 0], [0, 1, 2, 3]]
    assert batch["mask"][:, 0].tolist() == [[3, 2, 1, 0], [0, 1, 2, 3]]
    assert not equal(fit(steps=3), fit(steps=3, horizontal_flip=True))


def test_rates_and_flips_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    flips: list[Tensor] = []

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    monkeypatch.setattr("lightning_modules.supervised.judge.Adam", Noted)
    monkeypatch.setattr("lightning_modules.supervised.judge._flip", lambda _, c: flips.append(c))
    fit(steps=4, horizontal_flip=True)
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert len({tuple(chosen.tolist()) for chosen in flips}) == 4


def test_a_segmenter_as_judge() -> None:
    judge = fit_judge(lambda: Segmenter(2, 2), Brightness(), 40, 8, 0.01)
    batch = Brightness().batch(torch.arange(20))
    assert (judge.classes(batch["image"]) == batch["mask"]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"), [({"steps": 0}, "steps=0"), ({"batch_size": 0}, "batch_size=0")]
)
def test_impossible_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(**options)
    with pytest.raises(ValueError, match="no images to learn from"):
        fit_judge(lambda: Classifier(2), Brightness(0))
