from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.nn.penalties import gradient_penalty


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
