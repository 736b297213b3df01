"""The CycleGAN module: its updates, its pools, its translations, what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.cyclegan import CycleGAN
from lightning_modules.cyclegan import module as cyclegan_module
from tests.scripted import Pairs, fit_one_epoch

TINY: dict[str, Any] = {
    "generator": "resnet_1blocks",
    "ngf": 2,
    "ndf": 2,
    "n_layers": 1,
    "n_epochs": 1,
    "n_epochs_decay": 0,
}


def pairs(count: int = 4, size: int = 12, channels: int = 3) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return Pairs(*(torch.rand(shape, generator=generator) for _ in range(2)))


def weights(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


class Watched(CycleGAN):
    """Keeps what happened in each batch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.found: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.found.append(dict(self.losses))
        self.rates += [group["lr"] for group in self.optimizers()[0].param_groups]  # type: ignore[index]


def test_every_term_is_logged_and_identities_only_with_a_weight() -> None:
    for weight, expected in ((0.5, {"identity_ab", "identity_ba"}), (0.0, set())):
        module = Watched(**TINY, lambda_identity=weight)
        fit_one_epoch(module, pairs(1), 1)
        common = {f"{kind}_{way}" for kind in ("adversarial",) for way in ("ab", "ba")}
        common |= {f"{kind}_{side}" for kind in ("cycle", "discriminator") for side in ("a", "b")}
        assert set(module.found[0]) == common | expected


def test_the_generators_step_leaves_no_gradient_in_the_discriminators() -> None:
    """Their weights move in their own step alone, and the flags come back."""

    class Stopped(Watched):
        def update_discriminators(self, *images: Tensor) -> None:
            judges = (self.discriminator_a, self.discriminator_b)
            assert all(p.grad is None for judge in judges for p in judge.parameters())
            assert all(p.requires_grad for judge in judges for p in judge.parameters())

    module = Stopped(**TINY)
    before = weights(module.discriminator_a), weights(module.generator_ab)
    fit_one_epoch(module, pairs(1), 1)
    assert all(map(torch.equal, before[0], weights(module.discriminator_a)))
    assert not all(map(torch.equal, before[1], weights(module.generator_ab)))


def test_discriminators_get_translations_from_before_the_generators_step() -> None:
    seen: dict[str, Tensor] = {}

    class Seen(Watched):
        def update_generators(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                seen["before"] = self.translate_raw(a, "AtoB")
            return super().update_generators(a, b)

        def _from_pool(self, side: str, fake: Tensor) -> Tensor:
            seen.setdefault(side, fake)
            return super()._from_pool(side, fake)

    fit_one_epoch(Seen(**TINY), pairs(1), 1)
    assert torch.equal(seen["before"], seen["b"])
    assert not seen["b"].requires_grad


def test_pools_fill_are_in_the_state_and_hand_out_old_images() -> None:
    module = Watched(**TINY, pool_size=3)
    fit_one_epoch(module, pairs(8), 2)
    assert len(module.pool_a) == len(module.pool_b) == 3
    state = module.state_dict()
    assert state["pool_b.images"].shape == (3, 3, 12, 12)
    fresh = CycleGAN(**TINY, pool_size=3)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.pool_b.images, module.pool_b.images)


def test_the_rate_follows_the_schedule() -> None:
    arguments = {**TINY, "n_epochs": 2, "n_epochs_decay": 2}
    module = CycleGAN(**arguments)
    optimizers = module.build_optimizers()
    schedulers = module.build_schedulers(optimizers)
    rates = []
    for _ in range(4):
        rates.append([o.param_groups[0]["lr"] / 2e-4 for o in optimizers.values()])
        for optimizer, scheduler in zip(optimizers.values(), schedulers, strict=True):
            optimizer.step()
            scheduler.step()
    assert rates == [pytest.approx([f, f]) for f in (1, 1, 2 / 3, 1 / 3)]
    assert module.total_epochs == 4


@pytest.mark.parametrize(("height", "width"), [(12, 12), (13, 18), (30, 11)])
def test_a_translation_has_the_size_of_its_image(height: int, width: int) -> None:
    module = CycleGAN(**TINY).eval()
    images = torch.rand(2, 3, height, width)
    for direction in ("AtoB", "BtoA"):
        translated = module.translate(images, direction)  # type: ignore[arg-type]
        assert translated.shape == images.shape
        assert 0 <= translated.min() <= translated.max() <= 1
    assert torch.equal(
        module.predict_step({"image": images, "domain": "b"}, 0)["image"], translated
    )


def test_a_running_average_translates_outside_the_training() -> None:
    module = CycleGAN(**TINY).eval()
    images = torch.rand(1, 3, 12, 12)
    plain = module.translate(images)
    average = module.register_ema("generator_ab")
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(0.1)
    assert not torch.equal(module.translate(images), plain)
    assert torch.equal((module.train().translate_raw(images * 2 - 1, "AtoB") + 1) / 2, plain)


def test_evaluation_measures_against_the_truth() -> None:
    module = CycleGAN(**TINY).eval()
    images = torch.rand(2, 3, 12, 12)
    translated = module.translate(images, "BtoA")
    found = module.evaluate({"image": images, "domain": "b", "counterpart": translated})
    assert found["error"].abs().max() == 0
    assert torch.allclose(
        found["error_of_identity"], (images - translated).abs().mean((1, 2, 3)), atol=1e-6
    )
    assert torch.equal(found["change"], found["error_of_identity"])
    assert "error" not in module.evaluate({"image": images, "domain": "b"})


def test_correlation_tells_inverted_colours() -> None:
    images = torch.rand(3, 8, 8)
    assert torch.allclose(cyclegan_module._correlation(images, images), torch.ones(3))
    assert torch.allclose(cyclegan_module._correlation(images, 1 - images), -torch.ones(3))
    assert cyclegan_module._correlation(images, torch.ones(3, 8, 8)).abs().max() == 0


def test_a_critic_of_wgan_has_a_penalty() -> None:
    module = Watched(**TINY, objective="wgangp")
    assert module.gradient_penalised == ("discriminator_a", "discriminator_b")
    fit_one_epoch(module, pairs(2), 2)
    assert {"penalty_a", "penalty_b"} <= module.found[0].keys()
    assert module.found[0]["penalty_a"] > 0


def test_layout_and_recomputation_change_nothing_but_rounding() -> None:
    """Also the choice that keeps less in memory; one batch, in float64."""
    ends = []
    for options in ({}, {"channels_last": True}, {"checkpoint_blocks": True}):
        torch.manual_seed(0)
        module = CycleGAN(**TINY, **options).double()
        data = pairs(2)
        data.images = {side: images.double() for side, images in data.images.items()}
        fit_one_epoch(module, data, 2)
        ends.append(weights(module.generator_ab))
    for other in ends[1:]:
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(ends[0], other, strict=True))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"generator": "resnet_0blocks"}, "resnet_0blocks"),
        ({"generator": "vit"}, "vit"),
        ({"channels_b": 1}, "lambda_identity 0"),
        ({"n_epochs": 0}, "n_epochs=0"),
        ({"lambda_A": -1.0}, "lambda_A=-1.0"),
        ({"pool_size": -1}, "pool_size=-1"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        CycleGAN(**{**TINY, **options})


def test_an_unknown_direction() -> None:
    with pytest.raises(ValueError, match="AtoB or BtoA"):
        CycleGAN(**TINY).translate(torch.rand(1, 3, 12, 12), "AtoC")  # type: ignore[arg-type]
