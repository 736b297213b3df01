"""Networks of OGNet with the parameter shapes and names of the released code, at any size and width."""

import math

from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least
from lightning_modules.nn.norm import Norm, norm_layer

SMALLEST_IMAGE = 17


class OGNetGenerator(nn.Module):
    """Auto-encoder of four 5x5 convolutions and their transposes, without stride or padding (``g_net``).

    It has no bottleneck. The third and fourth convolution are followed by ReLU and *then* the norm, as in the released
    code.

    Args:
        in_channels: of an image.
        base_channels: of the first convolution, doubled by each further one (64 in the released code).
        norm: normalisation; ``group`` keeps the images of a batch independent of each other.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, in_channels: int = 1, base_channels: int = 64, norm: Norm = "batch") -> None:
        super().__init__()
        demand_at_least(1, in_channels=in_channels, base_channels=base_channels)
        widths = [base_channels * 2**i for i in range(4)]
        encoder: list[nn.Module] = []
        for stage, (inner, outer) in enumerate(
            zip([in_channels, *widths[:3]], widths, strict=True)
        ):
            after = [*_keep_place(norm_layer(norm, outer)), nn.ReLU()]
            encoder += [nn.Conv2d(inner, outer, 5), *(after if stage < 2 else reversed(after))]
        decoder: list[nn.Module] = []
        for inner, outer in zip(widths[:0:-1], widths[2::-1], strict=True):
            decoder += [
                nn.ConvTranspose2d(inner, outer, 5),
                *_keep_place(norm_layer(norm, outer)),
                nn.ReLU(),
            ]
        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(
            *decoder, nn.ConvTranspose2d(widths[0], in_channels, 5), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions [B, C, H, W] in [-1, 1] of images [B, C, H, W] with H, W >= 17."""
        return self.decoder(self.encoder(x))


class OGNetDiscriminator(nn.Module):
    """Four 5x5 convolutions of stride 2 and a linear layer (``d_net``), which gives logits.

    Args:
        in_channels: of an image.
        image_size: side of an image.
        base_channels: of the first convolution, doubled by each further one.
        norm: normalisation after the first three convolutions.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 45,
        base_channels: int = 64,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        demand_at_least(
            1, in_channels=in_channels, image_size=image_size, base_channels=base_channels
        )
        widths = [base_channels * 2**i for i in range(4)]
        layers: list[nn.Module] = []
        side = image_size
        for stage, (inner, outer) in enumerate(
            zip([in_channels, *widths[:3]], widths, strict=True)
        ):
            layers.append(nn.Conv2d(inner, outer, 5, stride=2, padding=2))
            if stage < 3:
                layers += _keep_place(norm_layer(norm, outer))
            layers.append(nn.ReLU())
            side = math.ceil(side / 2)
        layers += [nn.Flatten(), nn.Linear(widths[3] * side**2, 1)]
        self.discriminator = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B] of images [B, C, H, W] in [-1, 1]; large = anomalous."""
        return self.discriminator(x).squeeze(1)

    def score(self, x: Tensor) -> Tensor:
        """Probabilities [B] in (0, 1) of being anomalous; of half precision take the logits to rank by."""
        return self(x).sigmoid()


def _keep_place(layers: list[nn.Module]) -> list[nn.Module]:
    """An empty layer where there is no norm, so that the layers after it keep their numbers."""
    return layers or [nn.Identity()]
