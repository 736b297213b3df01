"""Networks of MatchGAN; the generator is :class:`lightning_modules.stargan.networks.StarGANGenerator`."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_modules.stargan.networks import StarGANDiscriminator


class MatchGANDiscriminator(StarGANDiscriminator):
    """StarGAN's discriminator with a third head: do two images have the same label?

    Args:
        image_size: side of an image.
        conv_dim: channels of the first convolution, doubled by each further one.
        c_dim: class logits.
        repeat_num: convolutions of the trunk.
        in_channels: of an image.

    Raises:
        ValueError: as :class:`StarGANDiscriminator`.
    """

    reference_heads: ClassVar[dict[str, str]] = {
        **StarGANDiscriminator.reference_heads,
        "conv3": "match_head",
    }

    def __init__(
        self,
        image_size: int = 128,
        conv_dim: int = 64,
        c_dim: int = 5,
        repeat_num: int = 6,
        in_channels: int = 3,
    ) -> None:
        super().__init__(image_size, conv_dim, c_dim, repeat_num, in_channels)
        self.match_head = nn.Conv2d(2 * self.width, 2, self.side, bias=False)

    def match_features(self, anchor: Tensor, other: Tensor) -> Tensor:
        """Match logits [P, 2] of pairs of trunk outputs [P, C, h, h]; column 1 is "same label".

        The head is not symmetric: anchors come first.
        """
        return self.match_head(torch.cat([anchor, other], 1)).flatten(1)

    def match(self, anchor: Tensor, other: Tensor) -> Tensor:
        """Match logits [P, 2] of pairs of images [P, C, image_size, image_size]."""
        return self.match_features(self.features(anchor), self.features(other))
