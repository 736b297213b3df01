"""Networks of StarGAN with the parameter shapes of the released code, at any size, width and number of domains."""

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm around an identity; no activation after the sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _instance_norm(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            _instance_norm(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return x + self.main(x)


class StarGANGenerator(nn.Module):
    """Two stages down, residual blocks, two stages up; the label is a constant plane per entry beside the image.

    All convolutions pad with zeros, which is what lets the label pass: after reflection a constant plane would be a
    constant shift, which the norm removes. Instance norms keep no running statistics, so that evaluation mode changes
    nothing; the released code has them and never evaluates.

    Args:
        conv_dim: channels of the first convolution (64 in the paper).
        c_dim: entries of a label.
        repeat_num: residual blocks (6 in the paper); MatchGAN's released code drops the last one of an odd number,
            this one does not.
        in_channels: of an image.

    Raises:
        ValueError: a size below 1; for ``repeat_num`` below 0.
    """

    reference_heads: ClassVar[dict[str, str]] = {}

    def __init__(
        self, conv_dim: int = 64, c_dim: int = 5, repeat_num: int = 6, in_channels: int = 3
    ) -> None:
        super().__init__()
        demand_at_least(1, conv_dim=conv_dim, c_dim=c_dim, in_channels=in_channels)
        if repeat_num < 0:
            raise ValueError(f"repeat_num={repeat_num} must not be negative")
        self.c_dim = c_dim
        widths = [conv_dim, 2 * conv_dim, 4 * conv_dim]
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels + c_dim, conv_dim, 7, padding=3, bias=False),
            _instance_norm(conv_dim),
            nn.ReLU(),
        ]
        for inner, outer in pairwise(widths):
            layers += [
                nn.Conv2d(inner, outer, 4, stride=2, padding=1, bias=False),
                _instance_norm(outer),
                nn.ReLU(),
            ]
        layers += [ResidualBlock(widths[-1]) for _ in range(repeat_num)]
        for inner, outer in pairwise(reversed(widths)):
            layers += [
                nn.ConvTranspose2d(inner, outer, 4, stride=2, padding=1, bias=False),
                _instance_norm(outer),
                nn.ReLU(),
            ]
        layers += [nn.Conv2d(conv_dim, in_channels, 7, padding=3, bias=False), nn.Tanh()]
        self.main = nn.Sequential(*layers)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Translates images.

        Args:
            x: [B, C, H, W] in [-1, 1]; H and W are multiples of 4 and at least 8.
            c: target labels [B, c_dim].

        Returns:
            [B, C, H, W] in [-1, 1].

        Raises:
            ValueError: labels of another shape, or a side that does not fit.
        """
        if c.shape != (len(x), self.c_dim):
            raise ValueError(
                f"labels of shape {tuple(c.shape)} for {len(x)} images; the generator was built for "
                f"c_dim={self.c_dim}, so [{len(x)}, {self.c_dim}]"
            )
        height, width = x.shape[-2:]
        if height % 4 or width % 4 or min(height, width) < 8:
            raise ValueError(
                f"images of {height}x{width}; both sides must be multiples of 4 and at least 8 "
                "(--data.image_size)"
            )
        planes = c.to(x.dtype)[:, :, None, None].expand(-1, -1, height, width)
        return self.main(torch.cat([x, planes], 1))


class StarGANDiscriminator(nn.Module):
    """Convolutions of stride 2 with two heads: a map of real/fake scores and class logits.

    Args:
        image_size: side of an image.
        conv_dim: channels of the first convolution, doubled by each further one (64 in the paper).
        c_dim: class logits.
        repeat_num: convolutions of the trunk (6 in the paper).
        in_channels: of an image.

    Raises:
        ValueError: a size below 1, or so many convolutions that nothing is left of the image.
    """

    reference_heads: ClassVar[dict[str, str]] = {"conv1": "source_head", "conv2": "class_head"}
    """Names of the heads in the released code and here."""

    def __init__(
        self,
        image_size: int = 128,
        conv_dim: int = 64,
        c_dim: int = 5,
        repeat_num: int = 6,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        demand_at_least(
            1,
            image_size=image_size,
            conv_dim=conv_dim,
            c_dim=c_dim,
            repeat_num=repeat_num,
            in_channels=in_channels,
        )
        self.image_size = image_size
        self.side = image_size // 2**repeat_num
        if self.side < 1:
            raise ValueError(
                f"{repeat_num} halvings leave nothing of an image of {image_size} pixels; take at most "
                f"{image_size.bit_length() - 1} (repeat_num), or larger images (--data.image_size)"
            )
        widths = [conv_dim * 2**i for i in range(repeat_num)]
        layers: list[nn.Module] = []
        for inner, outer in zip([in_channels, *widths[:-1]], widths, strict=True):
            layers += [nn.Conv2d(inner, outer, 4, stride=2, padding=1), nn.LeakyReLU(0.01)]
        self.main = nn.Sequential(*layers)
        self.width = widths[-1]
        self.source_head = nn.Conv2d(self.width, 1, 3, padding=1, bias=False)
        self.class_head = nn.Conv2d(self.width, c_dim, self.side, bias=False)

    def features(self, x: Tensor) -> Tensor:
        """Output of the trunk.

        Args:
            x: [B, C, image_size, image_size] in [-1, 1].

        Returns:
            [B, conv_dim * 2**(repeat_num - 1), h, h] with ``h = image_size // 2**repeat_num``.

        Raises:
            ValueError: images of another size.
        """
        if x.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {x.shape[-2]}x{x.shape[-1]}; the discriminator was built for "
                f"{self.image_size}x{self.image_size} (--data.image_size)"
            )
        return self.main(x)

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, 1, h, h] and class logits [B, c_dim] of the trunk's output."""
        return self.source_head(features), self.class_head(features).flatten(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, 1, h, h], large = real, and class logits [B, c_dim] of images; see :meth:`features`."""
        return self.heads(self.features(x))


def _instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, affine=True, track_running_stats=False)
