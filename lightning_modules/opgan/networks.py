"""The Siamese network of OP-GAN, and its losses on an image and the translation of it.

The sources give the 11x11x512 content and domain features of an 85x85 patch, the 1x1 content head and the concatenation
before the domain head; the layers in between are inferred.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least
from lightning_modules.cyclegan.networks import init_weights
from lightning_modules.nn.norm import norm_layer
from lightning_modules.opgan.losses import (
    AttentionNorm,
    affine_warp,
    attention_std,
    content_attention_map,
    content_consistency_loss,
    content_negative_loss,
    domain_accuracy,
    domain_classification_loss,
)
from lightning_modules.opgan.pairs import CROSS, content_pairs, pair_labels, patch_grid

SiameseNorm = Literal["instance", "none"]
ContentPositions = Literal["drawn", "all"]

SMALLEST_PATCH = 9
"""The third stride leaves 2x2 of 9x9 pixels; instance norm needs more than one."""


class SiameseNetwork(nn.Module):
    """One encoder for both patches of a pair, a content map for each patch and a domain class for the pair.

    Args:
        in_channels: of an image.
        width: channels of the first convolution; 64 gives the 512 + 512 features of the paper.
        norm: of the encoder's inner convolutions; ``none`` takes patches of any size. The domain head has none:
            before the global average it would erase brightness, which tells the domains apart.
        attention_norm: see :func:`lightning_modules.opgan.losses.content_attention_map`.
        num_classes: classes of a pair.

    Raises:
        ValueError: an unknown option, or a size below 1.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        norm: SiameseNorm = "instance",
        attention_norm: AttentionNorm = "none",
        num_classes: int = 3,
    ) -> None:
        super().__init__()
        demand_at_least(1, in_channels=in_channels)
        demand_at_least(1, option="--model.", siamese_width=width)
        if norm not in get_args(SiameseNorm):
            raise ValueError(
                f"unknown --model.siamese_norm={norm!r}; choose one of {', '.join(get_args(SiameseNorm))}"
            )
        if attention_norm not in get_args(AttentionNorm):
            raise ValueError(
                f"unknown --model.attention_norm={attention_norm!r}; "
                f"choose one of {', '.join(get_args(AttentionNorm))}"
            )
        self.norm = norm
        self.attention_norm: AttentionNorm = attention_norm
        encoder: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, 2, 1), nn.LeakyReLU(0.2)]
        for inner, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            encoder += [
                nn.Conv2d(inner, 2 * inner, 3, stride, 1),
                *norm_layer(norm, 2 * inner),
                nn.LeakyReLU(0.2),
            ]
        self.encoder = nn.Sequential(*encoder, nn.Conv2d(8 * width, 16 * width, 3, 1, 1))
        self.content_head = nn.Conv2d(8 * width, 1, 1)
        self.domain_head = nn.Sequential(
            nn.Conv2d(16 * width, 4 * width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 4 * width, 3, 2, 1),
            nn.LeakyReLU(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
        init_weights(self)

    def encode(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Content and domain features (paper, eq. 4), the two halves of one output.

        Args:
            patches: [N, C, H, W] in [-1, 1].

        Returns:
            Two tensors [N, 8*width, ceil(H/8), ceil(W/8)].

        Raises:
            ValueError: the patches are too small for instance norm.
        """
        height, width = patches.shape[-2:]
        if self.norm == "instance" and min(height, width) < SMALLEST_PATCH:
            raise ValueError(
                f"patches of {height}x{width} pixels are too small for instance norm, which needs "
                f"{SMALLEST_PATCH}x{SMALLEST_PATCH}; use larger images (--data.crop_size) or a smaller --model.grid"
            )
        content, domain = self.encoder(patches).chunk(2, 1)
        return content, domain

    def content_map(self, c: Tensor, size: tuple[int, int]) -> Tensor:
        """Content maps [N, 1, *size] of content features [N, 8*width, h, w], in float32 at least (paper, eq. 5)."""
        weight, bias = self.content_head.weight, self.content_head.bias
        return content_attention_map(c, weight, bias, size, self.attention_norm)

    def classify(self, d_p: Tensor, d_q: Tensor) -> Tensor:
        """Logits [N, num_classes] of pairs with domain features [N, 8*width, h, w] each."""
        return self.domain_head(torch.cat((d_p, d_q), 1))

    def forward(self, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The content maps [N, 1, H, W] and the logits [N, num_classes] of pairs of patches [N, C, H, W]."""
        size = (p.shape[-2], p.shape[-1])
        (c_p, d_p), (c_q, d_q) = self.encode(p), self.encode(q)
        return self.content_map(c_p, size), self.content_map(c_q, size), self.classify(d_p, d_q)


def siamese_terms(
    network: SiameseNetwork,
    image_a: Tensor,
    image_b: Tensor,
    pairs: Tensor,
    grid: int = 3,
    content_positions: ContentPositions = "drawn",
    margin: float = 1.0,
) -> dict[str, Tensor]:
    """Losses of the Siamese network on images of domain A and of domain B, of which one are translations of the other.

    A patch is encoded once, however many pairs it is in, and only if it is in one. Real images need no gradient, so
    that nothing is propagated back through the encoding of their patches while the network is frozen.

    Args:
        network: shared by both images.
        image_a: [B, C, H, W] in [-1, 1].
        image_b: same shape.
        pairs: int64 [N, 3], see :func:`lightning_modules.opgan.pairs.sample_patch_pairs`.
        grid: patches along each side of an image.
        content_positions: ``drawn`` takes the content loss over the C1 pairs among ``pairs``, ``all`` over all
            positions of every image instead (our own). The other terms are those of ``pairs`` either way, so that the
            classes stay balanced.
        margin: of the hinge, see :func:`lightning_modules.opgan.losses.content_negative_loss`.

    Returns:
        Scalars ``content``, ``domain`` and ``negative`` (over the C2 pairs), and without gradient ``accuracy`` (of the
        domain classes) and ``attention_std``.

    Raises:
        ValueError: images of different shapes, no pairs, or an unknown ``content_positions``.
    """
    if image_a.shape != image_b.shape:
        raise ValueError(
            f"the images of domain A {tuple(image_a.shape)} and of domain B {tuple(image_b.shape)} differ in shape; "
            "patches can only be compared if the generators keep the size of an image"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 3 or not len(pairs):
        raise ValueError(
            f"pairs of shape {tuple(pairs.shape)} must be [N, 3] (image, p, q) with at least one pair"
        )
    if content_positions not in get_args(ContentPositions):
        raise ValueError(
            f"unknown --model.content_positions={content_positions!r}; choose one of "
            f"{', '.join(get_args(ContentPositions))}"
        )
    pairs = pairs.to(image_a.device)
    batch, positions, drawn = len(image_a), grid**2, len(pairs)
    labels, same_position = pair_labels(pairs[:, 1:], positions)
    different = (labels == CROSS) & ~same_position
    if content_positions == "all":
        pairs = torch.cat((pairs, content_pairs(batch, grid, pairs.device)))
        same_position = torch.arange(len(pairs), device=pairs.device) >= drawn

    # Patches of A come before those of B, so that the two domains are encoded apart.
    image, patch = pairs[:, :1], pairs[:, 1:]
    rows = (patch // positions * batch + image) * positions + patch % positions
    used, inverse = rows.unique(return_inverse=True)
    of_a = used < batch * positions
    encoded = [
        network.encode(patch_grid(images, grid).flatten(0, 1)[index])
        for images, index in ((image_a, used[of_a]), (image_b, used[~of_a] - batch * positions))
        if len(index)
    ]
    content, domain = (torch.cat(halves) for halves in zip(*encoded, strict=True))
    maps = network.content_map(content, (image_a.shape[-2] // grid, image_a.shape[-1] // grid))
    p, q = inverse.unbind(1)
    logits = network.classify(domain[p[:drawn]], domain[q[:drawn]])
    return {
        "content": content_consistency_loss(maps[p], maps[q], same_position),
        "domain": domain_classification_loss(logits, labels),
        "negative": content_negative_loss(
            maps[p[:drawn][different]], maps[q[:drawn][different]], margin
        ),
        "accuracy": domain_accuracy(logits, labels),
        "attention_std": attention_std(maps),
    }


@torch.no_grad()
def content_ratio(
    network: SiameseNetwork, source: Tensor, translated: Tensor, grid: int = 3
) -> Tensor:
    """How much the content loss grows when the translation is distorted: about 1 if it does not see that.

    Args:
        network: Siamese network.
        source: images [B, C, H, W] in [-1, 1] of either domain.
        translated: their translations, same shape.
        grid: patches along each side of an image.

    Returns:
        Scalar, content loss over all positions with :func:`lightning_modules.opgan.losses.affine_warp` of the
        translations, divided by that without; 1 for a constant map.
    """
    size = (source.shape[-2] // grid, source.shape[-1] // grid)
    maps = [
        network.content_map(network.encode(patch_grid(images, grid).flatten(0, 1))[0], size)
        for images in (source, translated, affine_warp(translated))
    ]
    every = torch.ones(len(maps[0]), dtype=torch.bool, device=source.device)
    plain, warped = (content_consistency_loss(maps[0], other, every) for other in maps[1:])
    smallest = torch.finfo(plain.dtype).tiny
    return (warped + smallest) / (plain + smallest)
