"""Frechet distance and inception score from statistics that were computed elsewhere."""

import torch
from torch import Tensor


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """Squared Frechet distance between two Gaussians (Heusel et al., NeurIPS 2017), in float64.

    Takes the root of the product by the eigenvalues of a symmetric matrix, so that singular covariances need no offset.

    Args:
        mu1: mean [D].
        sigma1: covariance [D, D].
        mu2: mean [D].
        sigma2: covariance [D, D].

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    d = len(mu1)
    if not (mu1.shape == mu2.shape == (d,) and sigma1.shape == sigma2.shape == (d, d)):
        shapes = ", ".join(str(tuple(value.shape)) for value in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"means [D] and covariances [D, D] of one D are needed, got {shapes}")
    mu1, sigma1, mu2, sigma2 = (value.double() for value in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ sigma2 @ root).clamp_min(0).sqrt().sum()
    spread = sigma1.trace() + sigma2.trace() - 2 * overlap
    return ((mu1 - mu2).square().sum() + spread).clamp_min(0)


def inception_score_from_probs(probs: Tensor, splits: int = 10) -> tuple[Tensor, Tensor]:
    """Inception score (Salimans et al., NeurIPS 2016) of class probabilities in the order in which they are given.

    torchmetrics shuffles the images and takes the standard deviation of a sample; this is what the usual PyTorch port
    and with it MatchGAN's evaluation computes.

    Args:
        probs: [N, K], rows that sum to 1.
        splits: contiguous parts of ``N // splits`` rows; the remainder is dropped.

    Returns:
        Mean and population standard deviation over the parts of ``exp(mean KL(row || mean row))``, float64.

    Raises:
        ValueError: ``splits`` is not in 1..N.
    """
    if not 1 <= splits <= len(probs):
        raise ValueError(f"splits={splits} must be in 1..{len(probs)}, the number of images")
    size = len(probs) // splits
    parts = probs.double()[: size * splits].unflatten(0, (splits, size))
    marginal = parts.mean(1, keepdim=True)
    divergence = (torch.xlogy(parts, parts) - torch.xlogy(parts, marginal)).sum(2)
    scores = divergence.mean(1).exp()
    return scores.mean(), scores.std(correction=0)
