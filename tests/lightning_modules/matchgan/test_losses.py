from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.matchgan.losses import (
    discriminator_terms,
    generator_terms,
    group_match_loss,
    match_loss,
)
from lightning_modules.matchgan.networks import MatchGANDiscriminator
from lightning_modules.matchgan.pairs import match_pair_indices, match_targets
from lightning_modules.stargan.losses import domain_classification_loss
from lightning_modules.stargan.networks import StarGANGenerator

CLASSIFY = partial(domain_classification_loss, kind="single_label")
WRONG = partial(match_loss, reduction="sum")  # type: ignore[arg-type]
LABELS = torch.arange(4).repeat_interleave(4)
TARGETS, REGROUP = match_targets(torch.tensor([3, 1, 0, 2]))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def discriminator() -> MatchGANDiscriminator:
    torch.manual_seed(0)
    return MatchGANDiscriminator(8, 2, 4, 2).double()


@pytest.fixture
def generator() -> StarGANGenerator:
    torch.manual_seed(1)
    return StarGANGenerator(2, 4, 2).double()


# ------------------------------------------------------------------ match loss
def test_match_loss_over_unequal_numbers_of_pairs() -> None:
    logits, is_match = rand(5, 2), torch.tensor([1, 0, 0, 1, 0])
    terms = [-logits[i].log_softmax(0)[k].item() for i, k in enumerate(is_match.tolist())]
    assert match_loss(logits, is_match).item() == pytest.approx(sum(terms) / 5)
    same, different = (terms[0] + terms[3]) / 2, (terms[1] + terms[2] + terms[4]) / 3
    assert match_loss(logits, is_match, "sum_of_means").item() == pytest.approx(same + different)
    with pytest.raises(ValueError, match=r"match_reduction='sum'.*--model\.match_reduction"):
        match_loss(logits, is_match, "sum")  # type: ignore[arg-type]


def test_gathered_features_give_the_loss_of_gathered_images(
    discriminator: MatchGANDiscriminator,
) -> None:
    x, y = rand(16, 3, 8, 8), rand(16, 3, 8, 8, seed=1)
    anchor, other, is_match = match_pair_indices(16)
    losses = [match_loss(discriminator.match(z[anchor], z[other]), is_match) for z in (x, y)]
    features = [discriminator.features(z) for z in (x, y)]
    assert group_match_loss(discriminator, features[0]).item() == pytest.approx(losses[0].item())
    both = group_match_loss(discriminator, *features)
    assert both.item() == pytest.approx((losses[0] + losses[1]).item() / 2)
    doubled = group_match_loss(
        discriminator, *features, matching=partial(match_loss, reduction="sum_of_means")
    )
    assert doubled.item() == pytest.approx(2 * both.item())
    wide = group_match_loss(discriminator, rand(18, 4, 2, 2), group_size=6)
    assert torch.isfinite(wide)


def test_pairs_stay_within_their_block(discriminator: MatchGANDiscriminator) -> None:
    features = rand(24, 4, 2, 2)
    blocks = group_match_loss(discriminator, features, n_groups=3)
    apart = group_match_loss(discriminator, features[:12], features[12:])
    assert blocks.item() == apart.item()
    assert blocks.item() != group_match_loss(discriminator, features).item()


# ------------------------------------------------------------------ terms of D
@pytest.mark.parametrize(
    ("labelled", "match_source", "names"),
    [
        (True, "real", {"d_real", "d_fake", "d_cls", "d_match"}),
        (True, "fake", {"d_real", "d_fake", "d_cls", "d_match"}),
        (True, "both", {"d_real", "d_fake", "d_cls", "d_match"}),
        (False, "real", {"d_real", "d_fake", "d_idle"}),
        (False, "fake", {"d_real", "d_fake", "d_match", "d_idle"}),
        (False, "both", {"d_real", "d_fake", "d_match", "d_idle"}),
    ],
)
def test_terms_and_pairs_of_the_discriminator(
    discriminator: MatchGANDiscriminator, labelled: bool, match_source: Any, names: set[str]
) -> None:
    x, fake = rand(16, 3, 8, 8), rand(16, 3, 8, 8, seed=1).requires_grad_()
    labels = LABELS if labelled else None
    terms = discriminator_terms(
        discriminator, x, fake, labels, REGROUP, CLASSIFY, match_source=match_source
    )
    assert set(terms) == names
    assert terms["d_real"].item() == pytest.approx(-discriminator(x)[0].mean().item())
    assert terms["d_fake"].item() == pytest.approx(discriminator(fake)[0].mean().item())
    if labelled:
        assert terms["d_cls"].item() == pytest.approx(CLASSIFY(discriminator(x)[1], LABELS).item())
    if "d_match" in names:
        batches = [x] if match_source != "fake" and labelled else []
        batches += [fake[REGROUP]] if match_source != "real" else []
        expected = group_match_loss(discriminator, *map(discriminator.features, batches))
        assert terms["d_match"].item() == pytest.approx(expected.item())
    torch.stack(list(terms.values())).sum().backward()
    assert fake.grad is None
    assert all(p.grad is not None for p in discriminator.parameters())


def test_idle_heads_have_zero_or_no_gradients(discriminator: MatchGANDiscriminator) -> None:
    x = rand(16, 3, 8, 8)
    idle = [discriminator.class_head.weight, discriminator.match_head.weight]
    terms = discriminator_terms(discriminator, x, x, None, REGROUP, CLASSIFY)
    assert terms["d_idle"].item() == 0
    torch.stack(list(terms.values())).sum().backward()
    for weight in idle:
        assert weight.grad is not None
        assert not weight.grad.any()
    discriminator.zero_grad()
    terms = discriminator_terms(discriminator, x, x, None, REGROUP, CLASSIFY, idle_heads="skip")
    assert set(terms) == {"d_real", "d_fake"}
    torch.stack(list(terms.values())).sum().backward()
    assert all(weight.grad is None for weight in idle)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match_source": "none"}, r"--model\.d_match_source"),
        ({"idle_heads": "none"}, r"--model\.idle_heads"),
        ({"group_size": 8}, "2 groups of 8"),
        ({"matching": WRONG}, r"--model\.match_reduction"),
    ],
)
def test_discriminator_term_errors(
    discriminator: MatchGANDiscriminator, options: dict[str, Any], message: str
) -> None:
    x = rand(16, 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        discriminator_terms(discriminator, x, x, LABELS, REGROUP, CLASSIFY, **options)


# ------------------------------------------------------------------ terms of G
@pytest.mark.parametrize("labelled", [True, False])
def test_terms_of_the_generator(
    discriminator: MatchGANDiscriminator, generator: StarGANGenerator, labelled: bool
) -> None:
    x, vectors = rand(16, 3, 8, 8), torch.eye(4).double()
    source = vectors[LABELS] if labelled else None
    terms = generator_terms(
        generator, discriminator, x, source, vectors[TARGETS], TARGETS, REGROUP, CLASSIFY
    )
    assert set(terms) == {"g_fake", "g_cls", "g_match"} | ({"g_rec"} if labelled else set())
    fake = generator(x, vectors[TARGETS])
    scores, logits = discriminator(fake)
    assert terms["g_fake"].item() == pytest.approx(-scores.mean().item())
    assert terms["g_cls"].item() == pytest.approx(CLASSIFY(logits, TARGETS).item())
    expected = group_match_loss(discriminator, discriminator.features(fake[REGROUP]))
    assert terms["g_match"].item() == pytest.approx(expected.item())
    if source is not None:
        error = (x - generator(fake, source)).abs().mean()
        assert terms["g_rec"].item() == pytest.approx(error.item())


def test_generator_term_errors(
    discriminator: MatchGANDiscriminator, generator: StarGANGenerator
) -> None:
    x, c = rand(8, 3, 8, 8), torch.zeros(8, 4).double()
    with pytest.raises(ValueError, match="2 groups of 4"):
        generator_terms(generator, discriminator, x, c, c, TARGETS[:8], torch.arange(8), CLASSIFY)
