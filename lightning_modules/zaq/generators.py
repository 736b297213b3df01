"""Generators of ZAQ and GDFQ: a linear layer, then doublings of the resolution by convolutions.

Their last layer standardises each channel over the batch: images come out in the space of normalised images, and P
takes them as they are.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least, demand_choice

Conditioning = Literal["embed-multiply", "conditional-bn"]


class CategoricalConditionalBatchNorm2d(nn.Module):
    """Batch norm whose scale and shift depend on the class of the sample (released code of GDFQ).

    Args:
        num_classes: K.
        num_features: channels C.
        eps: added to the variance.

    The parameters ``weight`` and ``bias`` are [K, C], 1 and 0 at first.
    """

    def __init__(self, num_classes: int, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_features, eps, affine=False)
        self.weight = nn.Parameter(torch.ones(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes, num_features))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Maps [B, C, H, W], normalised and scaled as the classes ``labels`` [B] in 0..K-1 ask for."""
        scale, shift = self.weight[labels], self.bias[labels]
        return scale[:, :, None, None] * self.norm(x) + shift[:, :, None, None]


class _UpBlock(nn.Module):
    """Nearest doubling, 3x3 convolution, norm, leaky ReLU."""

    def __init__(self, inner: int, outer: int, norm: nn.Module) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2)
        self.conv = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm = norm
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.activation(_normalize(self.norm, self.conv(self.up(x)), labels))


def _normalize(norm: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    return norm(x, labels) if isinstance(norm, CategoricalConditionalBatchNorm2d) else norm(x)


class _UpsamplingGenerator(nn.Module):
    """The network that both generators share, with ``norm(channels, eps)`` as its norms."""

    def __init__(
        self,
        latent_dim: int,
        ngf: int,
        channels: int,
        img_size: int,
        up_blocks: int,
        block_eps: float,
        norm: Callable[[int, float], nn.Module],
    ) -> None:
        super().__init__()
        demand_at_least(1, latent_dim=latent_dim, ngf=ngf, channels=channels, up_blocks=up_blocks)
        if img_size < 2**up_blocks or img_size % 2**up_blocks:
            raise ValueError(
                f"{up_blocks} doublings cannot end at {img_size} pixels; img_size must be a multiple of {2**up_blocks}"
            )
        self.latent_dim, self.img_size = latent_dim, img_size
        self.start = (2 * ngf, img_size // 2**up_blocks, img_size // 2**up_blocks)
        self.project = nn.Linear(latent_dim, self.start[0] * self.start[1] ** 2)
        self.norm = norm(2 * ngf, 1e-5)
        widths = [2 * ngf] * up_blocks + [ngf]
        self.blocks = nn.ModuleList(
            _UpBlock(inner, outer, norm(outer, block_eps)) for inner, outer in pairwise(widths)
        )
        self.to_image = nn.Sequential(
            nn.Conv2d(ngf, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def _generate(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.project(z).view(-1, *self.start)
        x = _normalize(self.norm, x, labels)
        for block in self.blocks:
            x = block(x, labels)
        return self.to_image(x)


class ZAQGenerator(_UpsamplingGenerator):
    """Images of latents (released code).

    Args:
        latent_dim: width of a latent.
        ngf: channels at full resolution; twice as many before (64 in the released code).
        channels: of an image.
        img_size: its side.
        up_blocks: doublings of the resolution. The released code has 2, and a linear layer that grows with the image;
            5 begin a 224 pixel image at 7 pixels (ours).

    Raises:
        ValueError: a size below 1, or a side that the doublings cannot reach.
    """

    def __init__(
        self,
        latent_dim: int = 256,
        ngf: int = 64,
        channels: int = 3,
        img_size: int = 32,
        up_blocks: int = 2,
    ) -> None:
        super().__init__(latent_dim, ngf, channels, img_size, up_blocks, 1e-5, nn.BatchNorm2d)

    def forward(self, z: Tensor) -> Tensor:
        """Images [B, channels, img_size, img_size], already normalised, of latents [B, latent_dim]."""
        return self._generate(z)


class GDFQGenerator(_UpsamplingGenerator):
    """Images of latents and classes (released code of GDFQ).

    Args:
        num_classes: K.
        latent_dim: width of a latent.
        img_size: side of an image.
        conditioning: ``embed-multiply`` multiplies the latent with an embedding of the class (CIFAR);
            ``conditional-bn`` has class-conditional norms instead (ImageNet).
        ngf: channels at full resolution.
        channels: of an image.
        up_blocks: doublings of the resolution, 2 in the released code.
        block_eps: added to the variance in the doublings' norms. The released code gives 0.8 where the norm takes its
            eps, perhaps meant as another argument; for ``conditional-bn`` the value is recalled, not verified.

    Raises:
        ValueError: unknown conditioning, a size below 1, or a side that the doublings cannot reach.
    """

    def __init__(
        self,
        num_classes: int,
        latent_dim: int = 100,
        img_size: int = 32,
        conditioning: Conditioning = "embed-multiply",
        ngf: int = 64,
        channels: int = 3,
        up_blocks: int = 2,
        block_eps: float = 0.8,
    ) -> None:
        demand_choice(Conditioning, conditioning=conditioning)
        demand_at_least(1, num_classes=num_classes)
        embeds = conditioning == "embed-multiply"

        def norm(features: int, eps: float) -> nn.Module:
            if embeds:
                return nn.BatchNorm2d(features, eps)
            return CategoricalConditionalBatchNorm2d(num_classes, features, eps)

        super().__init__(latent_dim, ngf, channels, img_size, up_blocks, block_eps, norm)
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes, latent_dim) if embeds else None

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Images [B, channels, img_size, img_size], already normalised, of latents and classes [B]."""
        if self.embedding is not None:
            z = self.embedding(labels) * z
        return self._generate(z, labels)
