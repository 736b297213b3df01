"""Frechet distance of normal distributions; FID where the features are those of FID's InceptionV3."""

import torch
from torch import Tensor, nn


class GivenFeatures(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features [B, D] themselves."""
        return features


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


def frechet_distance_of_features(real: Tensor, fake: Tensor) -> Tensor:
    """:func:`frechet_distance` of the normal distributions with the sets' means and covariances.

    Args:
        real: features [N, D], N > 1.
        fake: features [M, D], M > 1.

    Returns:
        Scalar, float64.
    """
    centred = [x.double() - x.double().mean(0) for x in (real, fake)]
    if max(len(real), len(fake)) >= real.shape[1]:
        moments = [
            (x.double().mean(0), c.T.cov()) for x, c in zip((real, fake), centred, strict=True)
        ]
        return frechet_distance(*moments[0], *moments[1])
    # Fewer images than features: the same from their inner products, whose matrix is the smaller one.
    scale = [(len(c) - 1) ** -0.5 for c in centred]
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() * scale[0] * scale[1]
    spread = sum(c.square().sum() * s**2 for c, s in zip(centred, scale, strict=True)) - 2 * overlap
    shift = (real.double().mean(0) - fake.double().mean(0)).square().sum()
    return (shift + spread).clamp_min(0)
