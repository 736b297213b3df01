"""The OP-GAN module: CycleGAN's updates with a cooperative Siamese network between them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.opgan import OPGAN
from lightning_modules.opgan.losses import content_consistency_loss
from tests.lightning_modules.cyclegan.test_module import TINY, pairs, weights
from tests.scripted import fit_one_epoch

SMALL = {**TINY, "siamese_width": 2}
SIDE = 30


class Watched(OPGAN):
    """Keeps what happened in each batch."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.found: list[dict[str, Tensor]] = []
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.found.append(dict(self.losses))
        self.seen.append(dict(self._pairs))


def test_the_objective_is_that_of_the_paper() -> None:
    """Equation 7: no identities, alpha times the cycles, beta times the Siamese losses of both directions."""
    module = Watched(**SMALL, alpha=3.0, beta=0.0)
    assert module.cycle_weights == (3.0, 3.0)
    assert module.hp.lambda_identity == 0
    assert "lambda_A" not in module.hparams
    fit_one_epoch(module, pairs(2, SIDE), 2)
    found = module.found[0]
    assert not [name for name in found if name.startswith("identity")]
    assert all(
        found[f"{kind}_{way}"] == 0 for kind in ("content", "domain") for way in ("ab", "ba")
    )
    assert found["siamese_domain"] > 0


def test_both_steps_see_the_same_pairs_which_differ_between_batches_and_directions() -> None:
    torch.manual_seed(0)
    module = Watched(**SMALL, beta=1.0, lr=0.0)
    fit_one_epoch(module, pairs(4, SIDE), 2)
    for found in module.found:
        # With weights that stand still the Siamese step repeats the losses of the generators' step.
        for kind in ("content", "domain"):
            both = found[f"{kind}_ab"] + found[f"{kind}_ba"]
            assert found[f"siamese_{kind}"] == pytest.approx(float(both), rel=1e-5)
    first, second = module.seen
    assert not torch.equal(first["ab"], second["ab"])
    assert not torch.equal(first["ab"], first["ba"])
    assert first["ab"].shape == (8, 3)


def test_the_siamese_network_is_fixed_in_the_generators_step() -> None:
    class Stopped(Watched):
        def update_siamese(self, *images: Tensor) -> None:
            assert all(p.grad is None for p in self.siamese.parameters())

    module = Stopped(**SMALL)
    before = weights(module.siamese)
    fit_one_epoch(module, pairs(2, SIDE), 2)
    assert all(map(torch.equal, before, weights(module.siamese)))


def test_generators_learn_from_the_siamese_losses() -> None:
    ends = []
    for beta in (0.0, 5.0):
        torch.manual_seed(0)
        module = OPGAN(**SMALL, beta=beta)
        fit_one_epoch(module, pairs(2, SIDE), 2)
        ends.append(weights(module.generator_ab))
    assert not all(map(torch.equal, *ends))


def test_the_hinge_is_a_matter_of_the_siamese_step() -> None:
    module = Watched(**SMALL, attention_norm="instance", content_negative_weight=2.0)
    fit_one_epoch(module, pairs(2, SIDE), 2)
    assert module.found[0]["siamese_negative"] > 0
    plain = Watched(**SMALL)
    fit_one_epoch(plain, pairs(2, SIDE), 2)
    assert "siamese_negative" not in plain.found[0]


def test_a_siamese_network_for_each_direction() -> None:
    module = Watched(**SMALL, shared_siamese=False)
    before = {way: weights(module.siamese_network(way)) for way in ("ab", "ba")}
    fit_one_epoch(module, pairs(2, SIDE), 2)
    for way, start in before.items():
        assert not all(map(torch.equal, start, weights(module.siamese_network(way))))
    assert list(OPGAN(**SMALL).build_optimizers()) == ["generators", "siamese", "discriminators"]


def test_the_rate_of_the_siamese_network() -> None:
    optimizers = OPGAN(**SMALL, lr=1e-3, lr_s=1e-4).build_optimizers()
    rates = {name: o.param_groups[0]["lr"] for name, o in optimizers.items()}
    assert rates == {"generators": 1e-3, "siamese": 1e-4, "discriminators": 1e-3}


def test_pictures_have_the_content_maps() -> None:
    module = OPGAN(**SMALL).eval()
    rows = module.image_grid({"image": torch.rand(2, 3, 31, 33), "domain": "a"})
    maps = rows["content map, domain A"]
    assert maps.shape == (2, 1, 30, 33)
    assert float(maps.min()) == 0
    assert float(maps.max()) == 1


def test_evaluation_tells_whether_maps_see_a_distortion() -> None:
    module = OPGAN(**SMALL).eval()
    found = module.evaluate({"image": torch.rand(2, 3, SIDE, SIDE), "domain": "b"})
    assert found["content_ratio"].shape == (2,)
    with torch.no_grad():
        module.siamese.content_head.weight.zero_()
    found = module.evaluate({"image": torch.rand(2, 3, SIDE, SIDE), "domain": "b"})
    assert torch.equal(found["content_ratio"], torch.ones(2))


def test_content_maps_are_stitched_in_place() -> None:
    """The map of a patch is where the patch is: an image whose patches have colours of their own."""
    module = OPGAN(**SMALL, siamese_norm="none").eval()
    images = torch.zeros(1, 3, SIDE, SIDE)
    images[..., 10:20, 20:] = 1
    maps = module.image_grid({"image": images, "domain": "a"})["content map, domain A"][0, 0]
    inside = maps[12:18, 22:28].mean()
    outside = torch.stack([maps[2:8, 2:8].mean(), maps[22:28, 12:18].mean()])
    assert (inside - outside).abs().min() > 0.2
    assert (
        content_consistency_loss(
            maps[None, None, :8, :8], maps[None, None, :8, 10:18], torch.tensor([True])
        )
        < 0.05
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"grid": 1}, "grid=1"),
        ({"pair_sampling": "all"}, "pair_sampling='all'"),
        ({"attention_norm": "batch"}, "attention_norm='batch'"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"channels_b": 1}, "channels_b=1"),
        ({"pairs_per_scenario": 0}, "pairs_per_scenario=0"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        OPGAN(**{**SMALL, **options})
