import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.osrci.losses import (
    augment_logits,
    clamp_to_unit_sphere,
    discriminator_loss,
    generator_adversarial_loss,
    gradient_penalty,
    kplusone_loss,
    normalize_latent,
    one_vs_rest_softplus_loss,
    open_set_score,
    plus_minus_one_targets,
    reconstruction_loss,
    reconstruction_score,
    sample_latent,
)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


# ------------------------------------------------------------------ latents
def test_clamp_divides_every_chunk_by_its_own_norm() -> None:
    x = rand(3, 12)
    y = clamp_to_unit_sphere(x, 4)
    for row, out in zip(x.tolist(), y.tolist(), strict=True):
        for chunk in range(4):
            part = row[3 * chunk : 3 * chunk + 3]
            norm = math.sqrt(sum(v * v for v in part))
            assert out[3 * chunk : 3 * chunk + 3] == pytest.approx([v / norm for v in part])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_zero_chunk_stays_zero_with_a_finite_gradient(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 8, dtype=dtype)
    x[0, :4] = 1
    x.requires_grad_()
    y = clamp_to_unit_sphere(x, 2)
    y.sum().backward()
    assert y[0, 4:].tolist() == [0] * 4
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("components", [5, 0, 24])
def test_indivisible_latents_are_an_error(components: int) -> None:
    with pytest.raises(ValueError, match="chunks"):
        clamp_to_unit_sphere(torch.ones(2, 12), components)


def test_normalising_by_position_or_by_channel_group() -> None:
    x = rand(2, 3 * 4)
    by_position = normalize_latent(x, 2, "position").view(2, 3, 2, 2)
    torch.testing.assert_close(
        by_position, x.view(2, 3, 2, 2) / x.view(2, 3, 2, 2).norm(dim=1, keepdim=True)
    )
    torch.testing.assert_close(normalize_latent(x, 2), clamp_to_unit_sphere(x, 4))
    with pytest.raises(ValueError, match="normalize"):
        normalize_latent(x, 2, "nonsense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="map"):
        normalize_latent(torch.ones(2, 10), 2, "position")


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_samples_have_norm_scale_and_follow_the_generator(scale: int) -> None:
    draw = [sample_latent(5, 6, scale, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draw[0].shape == (5, 6 * scale**2)
    torch.testing.assert_close(draw[0].norm(dim=1), torch.full((5,), float(scale)))
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert sample_latent(1, 2, 1, dtype=torch.float64).dtype == torch.float64


# ------------------------------------------------------------------ gradient penalty
class SmoothCritic(torch.nn.Module):
    """Has a known input gradient: d/dx sum_k tanh(x w)_k = w (1 - tanh^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(rand(12, 3, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.weight)


@pytest.mark.parametrize("norm", ["channel", "sample"])
@pytest.mark.parametrize("outputs", ["all", "first"])
def test_gradient_penalty_by_hand(norm: Any, outputs: Any) -> None:
    critic, alpha = SmoothCritic(), torch.tensor([0.25, 0.8]).double()
    real, fake = rand(2, 3, 2, 2, seed=1), rand(2, 3, 2, 2, seed=2)
    value = gradient_penalty(critic, real, fake, alpha, weight=3.0, norm=norm, outputs=outputs)
    terms = []
    for b in range(2):
        mix = (alpha[b] * real[b] + (1 - alpha[b]) * fake[b]).flatten()
        gradient = torch.zeros(12, dtype=torch.float64)
        for k in range(3 if outputs == "all" else 1):
            w = critic.weight[:, k].detach()
            gradient += w * (1 - torch.tanh(mix @ w) ** 2)
        gradient = gradient.view(3, 4)
        if norm == "sample":
            terms.append((gradient.square().sum().sqrt().item() - 1) ** 2)
        else:
            terms += [(g.square().sum().sqrt().item() - 1) ** 2 for g in gradient.T]
    assert value.item() == pytest.approx(3.0 * sum(terms) / len(terms))


def test_gradient_penalty_can_be_differentiated_and_leaves_images_alone() -> None:
    critic = SmoothCritic()
    real, fake = rand(2, 3, 2, 2).requires_grad_(), rand(2, 3, 2, 2, seed=3).requires_grad_()
    alpha = torch.tensor([0.3, 0.6]).double()

    def penalty(weight: Tensor) -> Tensor:
        return gradient_penalty(lambda x: torch.tanh(x.flatten(1) @ weight), real, fake, alpha)

    assert torch.autograd.gradcheck(penalty, critic.weight)
    gradient_penalty(critic, real, fake).backward()
    assert critic.weight.grad is not None
    assert real.grad is None
    assert fake.grad is None


def test_gradient_penalty_runs_in_float32_under_autocast() -> None:
    critic = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    seen = []
    critic[1].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    images = rand(2, 3, 2, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = gradient_penalty(critic, images, images + 1)
    assert seen == [torch.float32]
    assert value.dtype == torch.float32


def test_gradient_penalty_draws_one_alpha_per_sample() -> None:
    mixes = []

    def critic(x: Tensor) -> Tensor:
        mixes.append(x.detach())
        return x.flatten(1)

    gradient_penalty(critic, torch.ones(64, 3, 2, 2), torch.zeros(64, 3, 2, 2))
    shares = mixes[0].flatten(1)
    assert torch.equal(shares, shares[:, :1].expand_as(shares))
    assert shares[:, 0].unique().numel() > 60
    assert 0 <= shares.min() < 0.2
    assert 0.8 < shares.max() <= 1


@pytest.mark.parametrize(
    "options", [{"norm": "batch"}, {"outputs": "last"}, {"fake": torch.ones(3, 3, 2, 2)}]
)
def test_gradient_penalty_rejects(options: dict[str, Any]) -> None:
    images = torch.ones(2, 3, 2, 2)
    with pytest.raises(ValueError):
        gradient_penalty(SmoothCritic(), **{"real": images, "fake": images, **options})


# ------------------------------------------------------------------ the other losses
def test_adversarial_losses_use_column_zero_only() -> None:
    real, fake = rand(4, 3), rand(5, 3, seed=1)
    terms = discriminator_loss(real, fake, real_weight=0.01, fake_weight=2.0)
    loss_real = 0.01 * sum(softplus(-v) for v in real[:, 0].tolist()) / 4
    loss_fake = 2.0 * sum(softplus(v) for v in fake[:, 0].tolist()) / 5
    assert terms["loss_real"].item() == pytest.approx(loss_real)
    assert terms["loss_fake"].item() == pytest.approx(loss_fake)
    assert terms["total"].item() == pytest.approx(loss_real + loss_fake)
    linear = discriminator_loss(real, fake, 0.5, 2.0, adversarial="wasserstein")
    assert linear["loss_real"].item() == pytest.approx(-0.5 * real[:, 0].mean().item())
    assert linear["loss_fake"].item() == pytest.approx(2 * fake[:, 0].mean().item())
    assert generator_adversarial_loss(fake, 0.1).item() == pytest.approx(
        -0.1 * fake[:, 0].mean().item()
    )
    with pytest.raises(ValueError, match="adversarial"):
        discriminator_loss(real, fake, adversarial="hinge")  # type: ignore[arg-type]


def test_reconstruction() -> None:
    x, y = rand(2, 1, 2, 2), rand(2, 1, 2, 2, seed=1)
    errors = [abs(a - b) for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)]
    assert reconstruction_loss(x, y, 3.0).item() == pytest.approx(3 * sum(errors) / 8)
    assert reconstruction_score(x, y).tolist() == pytest.approx(
        [sum(e * e for e in errors[:4]), sum(e * e for e in errors[4:])]
    )


def test_one_vs_rest_loss() -> None:
    logits, target = rand(3, 4), torch.tensor([2, 0, -1])
    signs = plus_minus_one_targets(target, 4)
    assert signs.tolist() == [[-1, -1, 1, -1], [1, -1, -1, -1], [-1, -1, -1, -1]]
    slow = sum(
        softplus(-t * v)
        for ts, vs in zip(signs.tolist(), logits.tolist(), strict=True)
        for t, v in zip(ts, vs, strict=True)
    )
    assert one_vs_rest_softplus_loss(logits, target).item() == pytest.approx(slow / 12)

    signs[0, 1] = 0
    leaf = logits.clone().requires_grad_()
    partial = one_vs_rest_softplus_loss(leaf, signs)
    partial.backward()
    assert leaf.grad is not None
    assert leaf.grad[0, 1] == 0
    changed = slow - softplus(logits[0, 1].item()) + math.log(2)
    assert partial.item() == pytest.approx(changed / 12)


def test_kplusone_loss_is_two_means_with_a_zero_logit() -> None:
    known, unknown, target = rand(3, 2), rand(4, 2, seed=1), [1, 0, 1]
    total = [sum(math.exp(v) for v in [*row, 0.0]) for row in known.tolist()]
    closed = -sum(known[i, t].item() - math.log(total[i]) for i, t in enumerate(target)) / 3
    opened = sum(math.log(1 + sum(math.exp(v) for v in row)) for row in unknown.tolist()) / 4
    terms = kplusone_loss(known, torch.tensor(target), unknown)
    assert terms["closed"].item() == pytest.approx(closed)
    assert terms["open"].item() == pytest.approx(opened)
    assert terms["total"].item() == pytest.approx(closed + opened)
    assert augment_logits(known)[:, -1].tolist() == [0, 0, 0]


# ------------------------------------------------------------------ scores
def test_scores_by_formula() -> None:
    logits = rand(5, 3)
    for i, row in enumerate(logits.tolist()):
        total = sum(math.exp(v) for v in row)
        slow = {
            "kplusone": 1 / (1 + total),
            "margin": (1 - max(math.exp(v) for v in row)) / (1 + total),
            "msp": -max(math.exp(v) for v in row) / total,
            "mls": -max(row),
            "energy": -math.log(total),
        }
        for kind, value in slow.items():
            assert open_set_score(logits, kind)[i].item() == pytest.approx(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["margin", "kplusone", "msp", "mls", "energy"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_scores_are_finite_and_ordered_for_huge_logits(kind: Any, dtype: torch.dtype) -> None:
    confident, unsure = [6e4, -6e4, 0.0], [-6e4, -6e4, -6e4]
    score = open_set_score(torch.tensor([confident, unsure], dtype=dtype), kind)
    assert torch.isfinite(score).all()
    assert score[0] < score[1]


def test_unknown_score_names_the_choices() -> None:
    with pytest.raises(ValueError, match="margin, kplusone, msp, mls, energy"):
        open_set_score(torch.zeros(1, 2), "entropy")  # type: ignore[arg-type]
