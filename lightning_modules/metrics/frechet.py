"""Frechet distance of two sets of features, by torchmetrics; FID where they are those of FID's InceptionV3."""

from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


class GivenFeatures(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """The features [B, D] themselves."""
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Squared Frechet distance of the normal distributions with the sets' means and covariances, a float64 scalar.

    Args:
        real: features [N, D], N > 1.
        fake: features [M, D], M > 1.
    """
    given = GivenFeatures(real.shape[1])
    # The sets are complete: every process has all of them.
    metric = FrechetInceptionDistance(given, sync_on_compute=False).to(real.device)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute()
