import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.cyclegan.losses import (
    adversarial_loss,
    cyclegan_generator_losses,
    discriminator_loss,
    gradient_penalty,
    linear_decay_factor,
)

MODES: Any = ("lsgan", "vanilla", "wgangp")


@pytest.mark.parametrize(
    ("mode", "real", "fake"),
    [
        ("lsgan", (1 + 0) / 2, (0 + 1) / 2),
        ("vanilla", (math.log(2) + math.log1p(math.exp(-1))) / 2, (math.log(2) + 1.3132617) / 2),
        ("wgangp", -0.5, 0.5),
    ],
)
def test_adversarial_losses_by_hand(mode: Any, real: float, fake: float) -> None:
    pred = torch.tensor([[[[0.0, 1.0]]]])
    assert adversarial_loss(pred, True, mode).item() == pytest.approx(real)
    assert adversarial_loss(pred, False, mode).item() == pytest.approx(fake)
    judged = discriminator_loss(pred, pred, mode, factor=0.25)
    assert judged.item() == pytest.approx(0.25 * (real + fake))


@pytest.mark.parametrize("mode", MODES)
def test_reductions_are_in_full_precision(mode: Any) -> None:
    # In bfloat16 the mean of these is wrong by a percent.
    pred = torch.full((1, 1, 64, 64), 0.3359375, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = adversarial_loss(pred, True, mode)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(adversarial_loss(pred.double(), True, mode).item())
    assert adversarial_loss(pred.double(), True, mode).dtype == torch.float64


def test_extreme_logits_stay_finite() -> None:
    pred = torch.tensor([-1e4, 1e4])
    assert adversarial_loss(pred, True, "vanilla").item() == 5e3


def objective(**options: Any) -> dict[str, Tensor]:
    zeros = torch.zeros(1, 3, 2, 2)
    arguments = {
        "real_A": zeros,
        "real_B": zeros,
        "rec_A": zeros + 0.1,
        "rec_B": zeros - 0.2,
        "pred_fake_B": torch.zeros(1, 1, 2, 2),
        "pred_fake_A": torch.ones(1, 1, 2, 2),
        "idt_A": zeros + 0.3,
        "idt_B": zeros - 0.4,
    }
    return cyclegan_generator_losses(**{**arguments, **options})


def test_generator_losses_and_the_crossing_of_the_identity_weights() -> None:
    losses = {k: v.item() for k, v in objective(lambda_A=2.0, lambda_B=5.0).items()}
    expected = {
        "loss_G_A": 1.0,
        "loss_G_B": 0.0,
        "loss_cycle_A": 0.2,
        "loss_cycle_B": 1.0,
        "loss_idt_A": 0.5 * 5 * 0.3,
        "loss_idt_B": 0.5 * 2 * 0.4,
    }
    assert losses == pytest.approx({**expected, "loss_G": sum(expected.values())})


def test_without_identities_there_is_no_term() -> None:
    losses = objective(idt_A=None, idt_B=None)
    assert not [name for name in losses if "idt" in name]
    assert losses["loss_G"].item() == pytest.approx(1 + 1 + 2)
    with pytest.raises(ValueError, match="go together"):
        objective(idt_A=None)


def test_images_of_unequal_shape_are_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3, 2, 1\].*same shape"):
        objective(rec_A=torch.zeros(1, 3, 2, 1))


def test_gradient_penalty_is_that_of_the_mean_of_the_map() -> None:
    # Of every sample the mean over a 2x2 map of 8 x is 2 sum(x): a gradient of norm 2 * sqrt(4).
    value = gradient_penalty(lambda x: 8 * x, torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2))
    assert value.item() == pytest.approx((4 - 1) ** 2)


def test_gradient_penalty_takes_the_share_of_real() -> None:
    real, fake = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 4.0)
    value = gradient_penalty(lambda x: x.square(), real, fake, torch.tensor([0.75]))
    assert value.item() == pytest.approx((2 * 2.5 - 1) ** 2)


def test_decay_ends_at_zero_and_stays_there() -> None:
    ends = [linear_decay_factor(e, 3, 2) for e in range(1, 8)]
    assert ends == pytest.approx([1, 1, 1, 2 / 3, 1 / 3, 0, 0])
    starts = [linear_decay_factor(e, 3, 2, "start_of_epoch") for e in range(1, 8)]
    assert starts == pytest.approx([1, 1, 2 / 3, 1 / 3, 0, 0, 0])
    assert [linear_decay_factor(e, 3, 0) for e in (3, 4)] == [1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "counted from 1"),
        ((1, -1), "n_epochs=-1"),
        ((1, 1, -2), "n_epochs_decay=-2"),
        ((1, 1, 1, "lua"), "end_of_epoch, start_of_epoch"),
    ],
)
def test_impossible_schedules(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_decay_factor(*arguments)


def test_unknown_objective() -> None:
    with pytest.raises(ValueError, match="'hinge'; choose one of lsgan, vanilla, wgangp"):
        adversarial_loss(torch.zeros(1), True, "hinge")  # type: ignore[arg-type]
