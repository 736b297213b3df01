"""Losses of OGNet as pure functions.

Polarity: a logit is large for what is anomalous. Good images have target 0, bad ones target 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_TERM = 100.0
"""A log probability is not taken below minus this (released code, through torch's binary cross entropy)."""


def bad_loss(logits: Tensor) -> Tensor:
    """Binary cross entropy to the target 1: mean of ``-log sigmoid``, a term at most 100.

    Args:
        logits: [B].

    Returns:
        Scalar.
    """
    return F.softplus(-logits).clamp(max=LARGEST_TERM).mean()


def good_loss(logits: Tensor) -> Tensor:
    """Binary cross entropy to the target 0, see :func:`bad_loss`."""
    return F.softplus(logits).clamp(max=LARGEST_TERM).mean()


def add_input_noise(x: Tensor, noise: Tensor) -> Tensor:
    """Noisy images, clipped to the range of clean ones (released code).

    On a background at the end of the range half of the noise is clipped away: that is the released code's behaviour.

    Args:
        x: in [-1, 1].
        noise: of the same shape, already scaled.

    Returns:
        In [-1, 1], of the same shape.
    """
    return (x + noise).clamp(-1, 1)


def noise_std(sigma_noise: float, squared: bool = True) -> float:
    """Standard deviation of the input noise for the published ``sigma_noise``.

    Args:
        sigma_noise: 0.9 in the released code.
        squared: the released code passes the square as the standard deviation; False for the paper's reading
            (not verified).
    """
    return sigma_noise**2 if squared else sigma_noise


def discriminator_loss(fake_logits: Tensor, real_logits: Tensor) -> dict[str, Tensor]:
    """Phase one, D: half of each cross entropy (released code).

    Args:
        fake_logits: of reconstructions [B].
        real_logits: of images [B].

    Returns:
        Scalars ``fake``, ``real`` (without the half) and ``total``.
    """
    fake, real = bad_loss(fake_logits), good_loss(real_logits)
    return {"fake": fake, "real": real, "total": 0.5 * (fake + real)}


def generator_loss(
    fake_logits: Tensor,
    recon: Tensor,
    x: Tensor,
    adversarial_weight: float = 0.5,
    recon_weight: float = 0.5,
) -> dict[str, Tensor]:
    """Phase one, G: squared error to the clean image, and reconstructions that D takes for good.

    Args:
        fake_logits: of the reconstructions [B].
        recon: reconstructions, in [-1, 1].
        x: clean images of the same shape.
        adversarial_weight: 0.5 in the released code, 1 in the paper (recalled, not verified).
        recon_weight: 0.5 in the released code, 0.2 in the paper (recalled, not verified).

    Returns:
        Scalars ``recon`` (mean over all elements), ``adversarial`` and the weighted ``total``.
    """
    error, adversarial = F.mse_loss(recon, x), good_loss(fake_logits)
    total = recon_weight * error + adversarial_weight * adversarial
    return {"recon": error, "adversarial": adversarial, "total": total}


def pseudo_anomaly_input(old_recon_a: Tensor, old_recon_b: Tensor) -> Tensor:
    """Mean of two old reconstructions, which the current generator then reconstructs."""
    return (old_recon_a + old_recon_b) / 2


def phase_two_loss(
    real_logits: Tensor,
    recon_logits: Tensor,
    old_logits: Tensor,
    pseudo_logits: Tensor,
    alpha: float = 0.1,
    beta: float = 0.001,
) -> dict[str, Tensor]:
    """Phase two: good are images and their reconstructions, bad are old and pseudo-anomalous ones.

    ``alpha BCE(D(x), 0) + (1 - alpha) BCE(D(G(x)), 0) + beta BCE(D(G_old(x)), 1) + (1 - beta) BCE(D(pseudo), 1)``
    (released code; the weights of the paper are recalled to be the same). The names of the released code mislead: its
    ``psuedo_anomaly_contribution`` is beta, the weight of the *old* reconstructions.

    Args:
        real_logits: [B].
        recon_logits: [B].
        old_logits: [B].
        pseudo_logits: [B].
        alpha: share of the images among the good, in [0, 1].
        beta: share of the old reconstructions among the bad, in [0, 1].

    Returns:
        Scalars ``real``, ``recon``, ``old``, ``pseudo`` (unweighted) and ``total``.
    """
    parts = {
        "real": good_loss(real_logits),
        "recon": good_loss(recon_logits),
        "old": bad_loss(old_logits),
        "pseudo": bad_loss(pseudo_logits),
    }
    weights = torch.tensor([alpha, 1 - alpha, beta, 1 - beta]).to(real_logits)
    return {**parts, "total": torch.stack(list(parts.values())) @ weights}


def reference_phase_two_updates(
    num_batches: int, max_epochs: int = 10, iterations: int = 75
) -> tuple[int, bool]:
    """What the released code's phase two does with a loader of so many batches; ours always makes ``iterations``.

    It takes three batches an update, ends an epoch early, stops one update late, and saves nothing unless it gets
    there.

    Returns:
        Number of updates, and whether the tuned discriminator is saved.
    """
    per_epoch = max(0, (num_batches - 1) // 3)
    updates = min(per_epoch * max_epochs, iterations + 1)
    return updates, updates == iterations + 1
