"""Inception score of class probabilities that were computed elsewhere."""

import torch
from torch import Tensor


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
