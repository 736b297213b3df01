"""Losses and scores of OSRCI as pure functions: tensors in, tensors out.

Neal, Olson, Fern, Wong, Li, "Open Set Learning with Counterfactual Images", ECCV 2018. Where the
equations of the paper and the released code differ, the default is the released code, from which
the published numbers come.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.nn.gradient_penalty import SlopeNorm
from lightning_modules.nn.gradient_penalty import gradient_penalty as slope_penalty

Normalize = Literal["channel_group", "position"]
ScoreKind = Literal["margin", "kplusone", "msp", "mls", "energy"]


def clamp_to_unit_sphere(x: Tensor, components: int = 1, eps: float = 1e-12) -> Tensor:
    """Divides equal contiguous chunks of every row by their L2 norms (released code).

    Args:
        x: [B, D].
        components: number of chunks.
        eps: lower bound of the norm; a zero chunk stays zero instead of becoming nan.

    Returns:
        Tensor [B, D]; every row has norm ``sqrt(components)``.

    Raises:
        ValueError: D is not divisible by ``components``.
    """
    batch, width = x.shape
    if components < 1 or width % components:
        raise ValueError(
            f"cannot split {width} latent entries into {components} equal chunks; "
            "choose a number of components that divides the latent width"
        )
    eps = max(eps, torch.finfo(x.dtype).tiny)
    return F.normalize(x.view(batch, components, -1), dim=-1, eps=eps).view(batch, width)


def normalize_latent(x: Tensor, scale: int, normalize: Normalize = "channel_group") -> Tensor:
    """Projects latents with ``scale**2`` components onto their product of unit spheres.

    Args:
        x: [B, L*s*s], channel-major: entry ``(l, i, j)`` of the latent map [L, s, s] is at ``l*s*s
            + i*s + j``.
        scale: side s of the latent map.
        normalize: ``"channel_group"`` normalises contiguous chunks of L entries (released code:
            with the channel-major order a chunk is a group of L/s**2 channels over all positions);
            ``"position"`` normalises the L-vector of every position.

    Returns:
        Tensor [B, L*s*s]; every row has norm s.

    Raises:
        ValueError: the width is not divisible by ``scale**2``, or ``normalize`` is unknown.
    """
    if normalize == "channel_group":
        return clamp_to_unit_sphere(x, scale**2)
    if normalize != "position":
        raise ValueError(f"unknown normalize={normalize!r}; choose one of {get_args(Normalize)}")
    batch, width = x.shape
    if width % scale**2:
        raise ValueError(f"{width} latent entries do not fill a {scale}x{scale} map")
    by_position = x.view(batch, -1, scale**2).transpose(1, 2).reshape(batch, width)
    unit = clamp_to_unit_sphere(by_position, scale**2)
    return unit.view(batch, scale**2, -1).transpose(1, 2).reshape(batch, width)


def sample_latent(
    batch: int,
    latent_size: int,
    scale: int,
    generator: torch.Generator | None = None,
    normalize: Normalize = "channel_group",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Random latents ``normalize_latent(n, scale)`` with n ~ N(0, I) (released code).

    Args:
        batch: number of rows B.
        latent_size: channels L of the latent map.
        scale: side s of the latent map.
        generator: source of randomness; the rows are drawn on its device.
        normalize: see :func:`normalize_latent`, which also takes a Gaussian that was drawn
            elsewhere.
        dtype: of the result; torch's default one if not given.

    Returns:
        Tensor [B, L*s*s].
    """
    device = generator.device if generator is not None else None
    gaussian = torch.randn(
        batch, latent_size * scale**2, generator=generator, device=device, dtype=dtype
    )
    return normalize_latent(gaussian, scale, normalize)


def gradient_penalty(
    discriminator: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    alpha: Tensor | None = None,
    weight: float = 10.0,
    norm: SlopeNorm = "channel",
    outputs: Literal["all", "first"] = "all",
) -> Tensor:
    """Weighted penalty on the discriminator's input gradient at random interpolates.

    Precision and differentiability: :func:`lightning_modules.nn.gradient_penalty.gradient_penalty`.

    Args:
        discriminator: maps images [B, C, H, W] to [B, K].
        real: images [B, C, H, W]; no gradient flows into them.
        fake: images of the same shape; no gradient flows into them.
        alpha: share of ``real`` in the interpolate of every sample, [B]; U[0, 1) if not given.
        weight: factor of the penalty (lambda).
        norm: ``"channel"``: norm over the channel axis, averaged over batch and positions (released
            code); ``"sample"``: norm over all axes but the batch (WGAN-GP equation, as in the
            paper).
        outputs: ``"all"`` sums the K output columns (released code); ``"first"`` uses column 0
            (paper).

    Returns:
        Scalar ``weight * mean((||gradient|| - 1)**2)``.

    Raises:
        ValueError: ``real`` and ``fake`` differ in shape, or an option is unknown.
    """
    if outputs not in ("all", "first"):
        raise ValueError(f"unknown outputs={outputs!r}; choose 'all' or 'first'")

    def selected(images: Tensor) -> Tensor:
        logits = discriminator(images)
        return logits if outputs == "all" else logits[:, :1]

    return weight * slope_penalty(selected, real, fake, alpha, norm=norm)


def discriminator_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    real_weight: float = 0.01,
    fake_weight: float = 1.0,
    adversarial: Literal["softplus", "wasserstein"] = "softplus",
) -> dict[str, Tensor]:
    """Adversarial terms of the discriminator; only output column 0 is the real/fake logit.

    Args:
        real_logits: [B, K].
        fake_logits: [B, K], of images that were detached from the generator.
        real_weight: factor of the real term (0.01 in the released code, on this term alone).
        fake_weight: factor of the fake term.
        adversarial: ``"softplus"`` (released code) or ``"wasserstein"`` (paper).

    Returns:
        Scalars ``loss_fake``, ``loss_real`` (both weighted) and their sum ``total``.

    Raises:
        ValueError: ``adversarial`` is unknown.
    """
    real, fake = real_logits[:, 0], fake_logits[:, 0]
    if adversarial == "softplus":
        real_term, fake_term = F.softplus(-real).mean(), F.softplus(fake).mean()
    elif adversarial == "wasserstein":
        real_term, fake_term = -real.mean(), fake.mean()
    else:
        raise ValueError(f"unknown adversarial={adversarial!r}; choose 'softplus' or 'wasserstein'")
    loss_real, loss_fake = real_weight * real_term, fake_weight * fake_term
    return {"loss_fake": loss_fake, "loss_real": loss_real, "total": loss_fake + loss_real}


def generator_adversarial_loss(fake_logits: Tensor, weight: float = 0.01) -> Tensor:
    """``-weight * mean(logits[:, 0])``, linear for every discriminator loss.

    Args:
        fake_logits: [B, K], of encoded and decoded images.
        weight: factor of the term.

    Returns:
        Scalar.
    """
    return -weight * fake_logits[:, 0].mean()


def reconstruction_loss(images: Tensor, reconstructions: Tensor, weight: float = 1.0) -> Tensor:
    """``weight`` times the mean absolute error over all elements, both arguments [B, C, H, W]."""
    return weight * F.l1_loss(reconstructions, images)


def plus_minus_one_targets(target: Tensor, num_classes: int) -> Tensor:
    """Targets of the K one-vs-rest problems: +1 in the column of the class, -1 elsewhere.

    Args:
        target: class indices [B]; an index outside 0..K-1, such as -1, is "none of the classes".
        num_classes: K.

    Returns:
        int64 tensor [B, K].
    """
    classes = torch.arange(num_classes, device=target.device)
    return (target[:, None] == classes).long() * 2 - 1


def one_vs_rest_softplus_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over batch and classes of ``softplus(-t * logit)`` (released code; not a cross entropy).

    Args:
        logits: [B, K].
        target: class indices [B], or [B, K] with +1 (is), -1 (is not) and 0 (unknown whether: adds
            the constant log 2 to the mean and no gradient).

    Returns:
        Scalar.
    """
    if target.dim() == 1:
        target = plus_minus_one_targets(target, logits.shape[1])
    return F.softplus(-target.to(logits.dtype) * logits).mean()


def augment_logits(logits: Tensor) -> Tensor:
    """Appends the constant zero logit of "none of the K classes": [B, K] -> [B, K+1]."""
    return F.pad(logits, (0, 1))


def kplusone_loss(known_logits: Tensor, target: Tensor, open_logits: Tensor) -> dict[str, Tensor]:
    """Cross entropies of the (K+1)-way classifier whose last logit is the constant zero.

    Args:
        known_logits: [B, K], of images of the known classes.
        target: their class indices [B].
        open_logits: [B', K], of generated images, whose class is K.

    Returns:
        Scalars ``closed``, ``open`` and their sum ``total``.
    """
    closed = F.cross_entropy(augment_logits(known_logits), target)
    unknown = torch.full(
        (len(open_logits),), open_logits.shape[1], dtype=torch.long, device=open_logits.device
    )
    opened = F.cross_entropy(augment_logits(open_logits), unknown)
    return {"closed": closed, "open": opened, "total": closed + opened}


def open_set_score(logits: Tensor, kind: ScoreKind = "margin") -> Tensor:
    """Score of a sample, the larger the more unknown; finite for every finite logit.

    ``margin``: P(unknown) - max_k P(k), with P the softmax over the K logits and a zero (published
    score). ``kplusone``: P(unknown) = sigmoid(-logsumexp(logits)). ``msp``: minus the largest
    softmax probability over K. ``mls``: minus the largest logit. ``energy``: -logsumexp(logits).

    Args:
        logits: [B, K], raw, never probabilities; half precision is scored in float32.
        kind: one of the above.

    Returns:
        Tensor [B].

    Raises:
        ValueError: ``kind`` is unknown.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    match kind:
        case "margin":
            probabilities = augment_logits(logits).softmax(1)
            return probabilities[:, -1] - probabilities[:, :-1].amax(1)
        case "kplusone":
            return torch.sigmoid(-logits.logsumexp(1))
        case "msp":
            return -logits.softmax(1).amax(1)
        case "mls":
            return -logits.amax(1)
        case "energy":
            return -logits.logsumexp(1)
    raise ValueError(f"unknown kind={kind!r}; choose one of {', '.join(get_args(ScoreKind))}")


def reconstruction_score(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Squared error of the auto-encoder per sample (released code, not in the paper).

    Args:
        images: [B, C, H, W].
        reconstructions: of the same shape.

    Returns:
        Tensor [B], larger = more unknown.
    """
    return (images - reconstructions).flatten(1).square().sum(1)
