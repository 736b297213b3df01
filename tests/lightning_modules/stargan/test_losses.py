import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.stargan.losses import (
    critic_losses,
    cycle_reconstruction_loss,
    decayed_lr,
    discriminator_terms,
    domain_classification_loss,
    generator_adversarial_loss,
    generator_terms,
    joint_classification_loss,
    weighted,
)
from lightning_modules.stargan.networks import StarGANDiscriminator, StarGANGenerator


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bce(logit: float, target: float) -> float:
    return math.log1p(math.exp(-abs(logit))) + max(logit, 0.0) - logit * target


# ------------------------------------------------------------------ single terms
def test_adversarial_terms_are_means_over_patches() -> None:
    real, fake = rand(3, 1, 2, 2), rand(5, 1, 2, 2, seed=1)
    d_real, d_fake = critic_losses(real, fake)
    assert d_real.item() == pytest.approx(-sum(real.flatten().tolist()) / 12)
    assert d_fake.item() == pytest.approx(sum(fake.flatten().tolist()) / 20)
    assert generator_adversarial_loss(fake).item() == pytest.approx(-d_fake.item())


def test_classification_reductions() -> None:
    logits, labels = rand(3, 4), torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])
    terms = map(bce, logits.flatten().tolist(), labels.flatten().tolist())
    total = sum(terms)
    loss = partial(domain_classification_loss, logits, labels, "multi_label")
    assert loss().item() == pytest.approx(total / 3)
    assert loss("mean").item() == pytest.approx(total / 12)
    classes = torch.tensor([3, 0, 1])
    single = domain_classification_loss(logits, classes, "single_label")
    picked = logits.log_softmax(1)[range(3), classes.tolist()]
    assert single.item() == pytest.approx(-picked.mean().item())


@pytest.mark.parametrize(
    ("target", "kind", "reduction", "message"),
    [
        (torch.zeros(2, 3), "multi_label", "sum", "one output per selected attribute"),
        (torch.zeros(2, 4), "single_label", "sum", r"class indices \[2\], got shape \(2, 4\)"),
        (torch.zeros(3), "single_label", "sum", "class indices"),
        (torch.zeros(2, 4), "labels", "sum", "unknown kind='labels'"),
        (torch.zeros(2, 4), "multi_label", "max", r"--model\.cls_reduction"),
    ],
)
def test_classification_errors(target: Tensor, kind: Any, reduction: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        domain_classification_loss(torch.zeros(2, 4), target, kind, reduction)


def test_joint_classification_uses_the_own_slice_alone() -> None:
    dims, kinds = [2, 3, 1], ["multi_label", "single_label", "multi_label"]
    logits = rand(4, 6).requires_grad_()
    labels = [torch.ones(4, 2), torch.tensor([0, 1, 2, 0]), torch.zeros(4, 1)]
    for i, (start, stop) in enumerate([(0, 2), (2, 5), (5, 6)]):
        loss = joint_classification_loss(logits, labels[i], i, dims, kinds, "mean")  # type: ignore[arg-type]
        own = domain_classification_loss(logits[:, start:stop], labels[i], kinds[i], "mean")  # type: ignore[arg-type]
        assert loss.item() == own.item()
        (gradient,) = torch.autograd.grad(loss, logits)
        outside = torch.ones(6, dtype=torch.bool)
        outside[start:stop] = False
        assert (gradient[:, outside] == 0).all()


def test_joint_classification_errors() -> None:
    with pytest.raises(ValueError, match="5 class logits for data sets of"):
        joint_classification_loss(
            torch.zeros(1, 5), torch.zeros(1, 2), 0, [2, 4], ["multi_label"] * 2
        )
    with pytest.raises(ValueError, match=r"dataset_index=-1 must be in 0\.\.1"):
        joint_classification_loss(
            torch.zeros(1, 6), torch.zeros(1, 2), -1, [2, 4], ["multi_label"] * 2
        )


def test_reconstruction_and_weights() -> None:
    x, y = rand(2, 1, 2, 2), rand(2, 1, 2, 2, seed=1)
    assert cycle_reconstruction_loss(x, y).item() == pytest.approx((x - y).abs().mean().item())
    terms = {name: torch.tensor(1.0) for name in ("d_real", "d_cls", "g_rec")}
    result = {name: value.item() for name, value in weighted(terms, {"cls": 2, "rec": 10}).items()}
    assert result == {"d_real": 1, "d_cls": 2, "g_rec": 10}


# ------------------------------------------------------------------ objectives
def networks() -> tuple[StarGANGenerator, StarGANDiscriminator]:
    torch.manual_seed(0)
    return StarGANGenerator(2, 3, 1).double(), StarGANDiscriminator(8, 2, 3, 2).double()


def test_discriminator_terms_reach_neither_the_generator_nor_fake_labels() -> None:
    generator, discriminator = networks()
    x, labels = rand(4, 3, 8, 8), torch.eye(4, 3).double()
    classify = partial(domain_classification_loss, kind="multi_label")
    fake = generator(x, labels)
    terms = discriminator_terms(discriminator, x, fake, labels, classify)
    assert terms["d_real"].item() == pytest.approx(-discriminator(x)[0].mean().item())
    assert terms["d_fake"].item() == pytest.approx(discriminator(fake)[0].mean().item())
    assert terms["d_cls"].item() == pytest.approx(classify(discriminator(x)[1], labels).item())
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in generator.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())


def test_generator_terms_go_there_and_back() -> None:
    _, discriminator = networks()
    x = rand(4, 3, 8, 8)
    source, target = torch.zeros(4, 3).double(), torch.ones(4, 3).double()
    calls = []

    def shift(images: Tensor, c: Tensor) -> Tensor:
        calls.append(c)
        return images + c.mean() + 0.5

    classify = partial(domain_classification_loss, kind="multi_label")
    terms = generator_terms(shift, discriminator, x, source, target, target, classify)
    assert calls[0] is target
    assert calls[1] is source
    assert terms["g_rec"].item() == pytest.approx(2.0)  # 1.5 there, 0.5 back
    scores, logits = discriminator(x + 1.5)
    assert terms["g_fake"].item() == pytest.approx(-scores.mean().item())
    assert terms["g_cls"].item() == pytest.approx(classify(logits, target).item())


def test_reconstruction_differentiates_both_translations() -> None:
    generator, discriminator = networks()
    x, c = rand(2, 3, 8, 8), torch.ones(2, 3).double()
    classify = partial(domain_classification_loss, kind="multi_label")
    terms = generator_terms(generator, discriminator, x, c, c, c, classify)
    first = next(generator.parameters())
    (both,) = torch.autograd.grad(terms["g_rec"], first, retain_graph=True)
    once = cycle_reconstruction_loss(x, generator(generator(x, c).detach(), c))
    (second,) = torch.autograd.grad(once, first)
    assert not torch.allclose(both, second)


# ------------------------------------------------------------------ learning rate
def test_linear_decay_is_a_staircase_that_ends_at_zero() -> None:
    rates = [decayed_lr(step, 1.0, 10, 4, every=2) for step in range(13)]
    assert rates == pytest.approx([1] * 8 + [0.5] * 2 + [0] * 3)
    assert [decayed_lr(step, 2.0, 10, 0) for step in (0, 10)] == [2.0, 2.0]


def test_reference_decay_subtracts_one_step_per_update() -> None:
    rates = [decayed_lr(step, 1.0, 10, 4, every=2, mode="reference") for step in range(11)]
    assert rates == pytest.approx([1] * 8 + [0.75] * 2 + [0.5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_steps": 11}, r"decay_steps=11 must be in 0\.\.10"),
        ({"decay_steps": -1}, r"--model\.decay_steps"),
        ({"every": 0}, "every=0"),
        ({"mode": "cosine"}, r"--model\.lr_schedule"),
    ],
)
def test_schedule_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decayed_lr(0, 1.0, 10, **{"decay_steps": 5, **options})
