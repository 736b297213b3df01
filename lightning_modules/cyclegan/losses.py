"""Losses and schedule of CycleGAN as pure functions.

Zhu, Park, Isola, Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks", ICCV 2017.
The names A and B are those of the released code: ``fake_B`` = G_A(A), and D_A judges images of domain B.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_modules.nn.gradient_penalty import gradient_penalty as slope_penalty
from lightning_modules.nn.precision import at_least_float32

Objective = Literal["lsgan", "vanilla", "wgangp"]
Convention = Literal["end_of_epoch", "start_of_epoch"]


def adversarial_loss(pred: Tensor, target_is_real: bool, mode: Objective = "lsgan") -> Tensor:
    """How far the judgements of a discriminator are from one answer, averaged over all of them.

    ``lsgan``: squared error to 1 or 0 (paper, section 4; released code). ``vanilla``: binary cross entropy of logits
    (paper, eq. 1). ``wgangp``: ``-mean`` to be real, ``+mean`` to be fake.

    Args:
        pred: judgements of any shape, large = real; the mean is taken in float32 at least.
        target_is_real: the wanted answer.
        mode: the objective.

    Returns:
        Scalar.

    Raises:
        ValueError: another objective.
    """
    pred = at_least_float32(pred)
    sign = -1 if target_is_real else 1
    match mode:
        case "lsgan":
            return (pred - float(target_is_real)).square().mean()
        case "vanilla":
            return F.softplus(sign * pred).mean()
        case "wgangp":
            return sign * pred.mean()
    raise ValueError(f"unknown objective {mode!r}; choose one of {', '.join(get_args(Objective))}")


def discriminator_loss(
    pred_real: Tensor, pred_fake: Tensor, mode: Objective = "lsgan", factor: float = 0.5
) -> Tensor:
    """``factor * (L(pred_real, real) + L(pred_fake, fake))``.

    Args:
        pred_real: judgements of images, of any shape.
        pred_fake: judgements of translations without a graph.
        mode: see :func:`adversarial_loss`.
        factor: 1/2 slows the discriminator down (paper, section 4). With Adam it acts through epsilon alone.

    Returns:
        Scalar.

    Raises:
        ValueError: another objective.
    """
    real = adversarial_loss(pred_real, True, mode)
    return factor * (real + adversarial_loss(pred_fake, False, mode))


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, alpha: Tensor | None = None
) -> Tensor:
    """Two-sided gradient penalty of WGAN-GP on the mean of a critic's map, unweighted, in float32 at least.

    The released code has a penalty, which its CycleGAN never calls: its ``wgangp`` is an unconstrained critic.

    Args:
        critic: from images [B, C, H, W] to judgements [B, ...].
        real: images [B, C, H, W].
        fake: images of the same shape.
        alpha: share of ``real`` in the image that the gradient is taken at, [B]; U[0, 1) if not given.

    Returns:
        Scalar ``mean((||gradient|| - 1)**2)``, differentiable by the critic's parameters.

    Raises:
        ValueError: ``real`` and ``fake`` differ in shape.
    """
    return slope_penalty(critic, real, fake, alpha, patch_reduction="mean")


def cyclegan_generator_losses(
    real_A: Tensor,
    real_B: Tensor,
    rec_A: Tensor,
    rec_B: Tensor,
    pred_fake_B: Tensor,
    pred_fake_A: Tensor,
    idt_A: Tensor | None = None,
    idt_B: Tensor | None = None,
    lambda_A: float = 10.0,
    lambda_B: float = 10.0,
    lambda_identity: float = 0.5,
    mode: Objective = "lsgan",
) -> dict[str, Tensor]:
    """What both generators minimise (paper, eq. 3, and section 5.2 for the identity terms; weights: released code).

    Args:
        real_A: images of domain A [B, C, H, W] in [-1, 1].
        real_B: images of domain B.
        rec_A: G_B(G_A(real_A)).
        rec_B: G_A(G_B(real_B)).
        pred_fake_B: judgements of G_A(real_A), of any shape.
        pred_fake_A: judgements of G_B(real_B), of any shape.
        idt_A: G_A(real_B); None leaves the identity terms out.
        idt_B: G_B(real_A); None leaves the identity terms out.
        lambda_A: weight of the cycle that begins in A.
        lambda_B: weight of the cycle that begins in B.
        lambda_identity: weight of the identity terms, relative to the cycle *of the domain of the image*: that of
            ``idt_A`` is ``lambda_identity * lambda_B``.
        mode: see :func:`adversarial_loss`.

    Returns:
        Weighted scalars ``loss_G_A``, ``loss_G_B`` (adversarial, without a half), ``loss_cycle_A``, ``loss_cycle_B``,
        with identities ``loss_idt_A``, ``loss_idt_B``, and their sum ``loss_G``.

    Raises:
        ValueError: one of the identities without the other, images of unequal shapes, or another objective.
    """
    losses = {
        "loss_G_A": adversarial_loss(pred_fake_B, True, mode),
        "loss_G_B": adversarial_loss(pred_fake_A, True, mode),
        "loss_cycle_A": lambda_A * _mean_difference(rec_A, real_A),
        "loss_cycle_B": lambda_B * _mean_difference(rec_B, real_B),
    }
    if idt_A is not None and idt_B is not None:
        losses["loss_idt_A"] = lambda_identity * lambda_B * _mean_difference(idt_A, real_B)
        losses["loss_idt_B"] = lambda_identity * lambda_A * _mean_difference(idt_B, real_A)
    elif idt_A is not None or idt_B is not None:
        raise ValueError("idt_A and idt_B go together: give both or neither")
    return {**losses, "loss_G": sum(losses.values(), start=real_A.new_zeros(()))}


def linear_decay_factor(
    epoch: int,
    n_epochs: int = 100,
    n_epochs_decay: int = 100,
    convention: Convention = "end_of_epoch",
) -> float:
    """Factor of the learning rate of an epoch: 1, then linear towards 0.

    ``end_of_epoch``: ``1 - max(0, epoch - n_epochs) / (n_epochs_decay + 1)`` (what paper and documentation describe).
    ``start_of_epoch``: one epoch earlier, so that the whole last epoch runs at rate 0 (released code since July 2020).
    Counted in steps instead of epochs it is the same schedule for runs that are limited by steps.

    Args:
        epoch: counted from 1. After the last one the factor is 0, where the formula would become negative.
        n_epochs: epochs at the full rate.
        n_epochs_decay: epochs of decay.
        convention: which of the two.

    Returns:
        Factor in [0, 1].

    Raises:
        ValueError: an epoch below 1, a negative number of epochs, or another convention.
    """
    if epoch < 1 or n_epochs < 0 or n_epochs_decay < 0:
        raise ValueError(
            f"epoch={epoch} must be at least 1 (epochs are counted from 1), n_epochs={n_epochs} and "
            f"n_epochs_decay={n_epochs_decay} at least 0"
        )
    if convention not in get_args(Convention):
        raise ValueError(
            f"unknown convention={convention!r}; choose one of {', '.join(get_args(Convention))}"
        )
    decayed = epoch - n_epochs + (convention == "start_of_epoch")
    return max(0.0, 1 - max(0, decayed) / (n_epochs_decay + 1))


def _mean_difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference; torch would broadcast images of unequal shapes."""
    if first.shape != second.shape:
        raise ValueError(
            f"images {list(first.shape)} and {list(second.shape)} must have the same shape; translate_any_size "
            "keeps that of its input"
        )
    return (at_least_float32(first) - at_least_float32(second)).abs().mean()
