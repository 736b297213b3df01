"""The four OSRCI networks for 32x32 images in [0, 1], with the parameter shapes of the released
code.

The trunk of encoder, discriminator and classifier is nine 3x3 convolutions in three stages that
halve the side, each followed by a norm and LeakyReLU(0.2), with channel dropout in front of each
stage. Only the branches of the latent scales that are asked for are built, so that every parameter
of a network takes part in its forward.
"""

import copy
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.fusion import fuse_conv_bn_eval

from lightning_modules.arguments import demand_at_least
from lightning_modules.nn.norm import Norm, norm_layer
from lightning_modules.osrci.losses import Normalize, normalize_latent

SCALES = (1, 2, 4, 8)


def _stage(channels: list[int], strides: list[int], dropout: float, norm: Norm) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Dropout2d(dropout)]
    for inner, outer, stride in zip(channels[:-1], channels[1:], strides, strict=True):
        conv = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=norm == "none")
        layers += [conv, *norm_layer(norm, outer), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers)


def _trunk(in_channels: int, width: int, dropout: float, norm: Norm) -> list[nn.Sequential]:
    """Three stages 32 -> 16 -> 8 -> 4 of three convolutions each; 2*width channels come out."""
    demand_at_least(1, width=width, in_channels=in_channels)
    wide = 2 * width
    return [
        _stage([in_channels, width, width, wide], [1, 1, 2], dropout, norm),
        _stage([wide, wide, wide, wide], [1, 1, 2], dropout, norm),
        _stage([wide, wide, wide, wide], [1, 1, 2], dropout, norm),
    ]


def _initialise(module: nn.Module) -> None:
    """Convolutions N(0, 0.05), norm gains N(1, 0.02), all else as in PyTorch (released code)."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.05)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _checked_scales(scales: tuple[int, ...]) -> tuple[int, ...]:
    scales = tuple(scales)
    if not scales or not set(scales) <= set(SCALES) or len(set(scales)) != len(scales):
        raise ValueError(f"scales={scales} must be distinct members of {SCALES}")
    return scales


def _chosen_scale(scale: int | None, built: tuple[int, ...]) -> int:
    if scale is None and len(built) == 1:
        return built[0]
    if scale not in built:
        raise ValueError(
            f"scale={scale} is not built; this network has scales={built}, add it to `scales`"
        )
    return scale


def _check_sides(images: Tensor) -> None:
    height, width = images.shape[-2:]
    # Three strided convolutions take exactly these sides to 4.
    if not (25 <= height <= 32 and 25 <= width <= 32):
        raise ValueError(
            f"images of {height}x{width} do not fit a 32x32 network (sides of 25 to 32 do); "
            "resize them to 32"
        )


class Encoder32(nn.Module):
    """Images to latents of unit-norm chunks.

    Args:
        latent_size: channels L of the latent map.
        in_channels: channels of the images.
        scales: sides of the latent maps whose branches are built, of 1, 2, 4 and 8.
        width: channels of the first convolution; all others are multiples.
        dropout: probability that ``Dropout2d`` drops a channel, of the input image too.
        norm: ``"batch"``, ``"group"`` (per sample) or ``"none"``.
        normalize: see :func:`~lightning_modules.osrci.losses.normalize_latent`.

    Raises:
        ValueError: a size below 1, an unknown scale, norm or normalize, or an L*s*s that has no s*s
            equal chunks.
    """

    def __init__(
        self,
        latent_size: int,
        in_channels: int = 3,
        scales: tuple[int, ...] = (4,),
        width: int = 64,
        dropout: float = 0.2,
        norm: Norm = "batch",
        normalize: Normalize = "channel_group",
    ) -> None:
        super().__init__()
        demand_at_least(1, latent_size=latent_size)
        if normalize not in get_args(Normalize):
            raise ValueError(
                f"unknown normalize={normalize!r}; choose one of {get_args(Normalize)}"
            )
        self.latent_size = latent_size
        self.normalize = normalize
        self.scales = _checked_scales(scales)
        self.depth = {8: 2, 4: 3, 2: 4, 1: 4}
        wide = 2 * width
        stages = [
            *_trunk(in_channels, width, dropout, norm),
            _stage([wide, wide], [2], dropout, norm),
        ]
        self.stages = nn.ModuleList(stages[: max(self.depth[scale] for scale in self.scales)])
        self.heads = nn.ModuleDict()
        for scale in self.scales:
            self.heads[str(scale)] = (
                nn.Sequential(nn.Flatten(), nn.Linear(4 * wide, latent_size))
                if scale == 1
                else nn.Conv2d(wide, latent_size, 3, padding=1, bias=False)
            )
        self.apply(_initialise)

    def forward(self, images: Tensor, scale: int | None = None) -> Tensor:
        """Encodes images [B, C, 32, 32] to [B, L*s*s], channel-major, s*s unit chunks.

        Args:
            images: values in [0, 1].
            scale: side s; may be left out when one scale is built.

        Raises:
            ValueError: the scale is not built or the image side is not between 25 and 32.
        """
        scale = _chosen_scale(scale, self.scales)
        _check_sides(images)
        features = images
        for stage in self.stages[: self.depth[scale]]:
            features = stage(features)
        return normalize_latent(self.heads[str(scale)](features).flatten(1), scale, self.normalize)


class Generator32(nn.Module):
    """Latents to images; a block is transposed convolution, LeakyReLU(0.01), norm.

    Built with all four scales and batch norm it holds the one ``BatchNorm2d`` that the released
    network owns without using it, so that the parameter counts agree.

    Args:
        latent_size: channels L of the latent map.
        in_channels: channels of the images.
        scales: sides of the latent maps whose branches are built, of 1, 2, 4 and 8.
        width: a quarter of the channels that scale 8 enters with; all others are multiples.
        norm: ``"batch"``, ``"group"`` (per sample) or ``"none"``.

    Raises:
        ValueError: a size below 1, an unknown scale or norm.
    """

    def __init__(
        self,
        latent_size: int,
        in_channels: int = 3,
        scales: tuple[int, ...] = (4,),
        width: int = 64,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        demand_at_least(1, latent_size=latent_size, in_channels=in_channels, width=width)
        self.latent_size = latent_size
        self.scales = _checked_scales(scales)
        self.entry_side = {1: 2, 2: 2, 4: 4, 8: 8}
        side_channels = {2: 8 * width, 4: 8 * width, 8: 4 * width, 16: 2 * width}
        self.entries = nn.ModuleDict()
        for scale in self.scales:
            channels = side_channels[self.entry_side[scale]]
            self.entries[str(scale)] = (
                nn.Sequential(
                    nn.Linear(latent_size, 4 * channels, bias=False),
                    nn.Unflatten(1, (channels, 2, 2)),
                )
                if scale == 1
                else nn.ConvTranspose2d(latent_size, channels, 1, bias=False)
            )
        self.ups = nn.ModuleDict()
        for side in (2, 4, 8):
            if side >= min(self.entry_side[scale] for scale in self.scales):
                outer = side_channels[2 * side]
                conv = nn.ConvTranspose2d(side_channels[side], outer, 4, 2, 1, bias=norm == "none")
                self.ups[str(side)] = nn.Sequential(
                    conv, nn.LeakyReLU(0.01), *norm_layer(norm, outer)
                )
        self.to_image = nn.ConvTranspose2d(side_channels[16], in_channels, 4, 2, 1)
        if set(self.scales) == set(SCALES) and norm == "batch":
            self.unused_norm = nn.BatchNorm2d(8 * width)
        self.apply(_initialise)

    def forward(self, z: Tensor, scale: int | None = None) -> Tensor:
        """Decodes latents [B, L*s*s], channel-major, to images [B, C, 32, 32] in (0, 1).

        Args:
            z: latents.
            scale: side s; may be left out when one scale is built.

        Raises:
            ValueError: the scale is not built or z does not have L*s*s entries per row.
        """
        scale = _chosen_scale(scale, self.scales)
        if z.dim() != 2 or z.shape[1] != self.latent_size * scale**2:
            raise ValueError(
                f"latents of shape {tuple(z.shape)} do not fit: latent_size={self.latent_size} "
                f"at scale={scale} needs [B, {self.latent_size * scale**2}]"
            )
        latent_map = z if scale == 1 else z.view(len(z), self.latent_size, scale, scale)
        features = self.entries[str(scale)](latent_map)
        for side, up in self.ups.items():
            if int(side) >= self.entry_side[scale]:
                features = up(features)
        return torch.sigmoid(self.to_image(features))


class _AllReduceSum(Function):
    """Sum over the processes that can be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return _AllReduceSum.apply(grad_outputs[0])


class Discriminator32(nn.Module):
    """Images to K logits, of which column 0 is the real/fake logit.

    The other columns are touched by the gradient penalty alone (released code). Half of the input
    of the last layer is ``exp(-mean over the batch of the features)``, the same for every sample.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        width: channels of the first convolution; all others are multiples.
        dropout: probability that ``Dropout2d`` drops a channel, of the input image too.
        norm: ``"batch"``, ``"group"`` (per sample, as gradient-penalised critics need for a
            per-sample penalty) or ``"none"``.
        gather_minibatch: take the batch mean over all processes, with gradient, so that several
            processes see what one process with the whole batch sees. All of them must then call
            forward and backward in step.

    Raises:
        ValueError: a size below 1 or an unknown norm.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.2,
        norm: Norm = "batch",
        gather_minibatch: bool = False,
    ) -> None:
        super().__init__()
        demand_at_least(1, num_classes=num_classes)
        self.gather_minibatch = gather_minibatch
        self.trunk = nn.Sequential(*_trunk(in_channels, width, dropout, norm))
        self.head = nn.Linear(2 * 32 * width, num_classes)
        self.apply(_initialise)

    def forward(
        self, images: Tensor, return_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, K] of images [B, C, 32, 32], with ``return_features`` also the features [B,
        32*width].

        Raises:
            ValueError: the image side is not between 25 and 32.
        """
        _check_sides(images)
        features = self.trunk(images).flatten(1)
        mean = features.mean(0, keepdim=True)
        if self.gather_minibatch and dist.is_available() and dist.is_initialized():
            mean = _AllReduceSum.apply(mean) / dist.get_world_size()
        logits = self.head(torch.cat([features, torch.exp(-mean).expand_as(features)], 1))
        return (logits, features) if return_features else logits


class Classifier32(nn.Module):
    """Images to K logits.

    Args:
        num_classes: K.
        in_channels: channels of the images.
        width: channels of the first convolution; all others are multiples.
        dropout: probability that ``Dropout2d`` drops a channel, of the input image too.
        norm: ``"batch"``, ``"group"`` (per sample) or ``"none"``.
        pool: ``"flatten"`` (OSRCI) or ``"avg"``: global average pooling and a linear layer without
            bias, the "classifier32" of ARPL and of Vaze et al., which takes images of any size.

    Raises:
        ValueError: a size below 1, an unknown norm or pool.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        width: int = 64,
        dropout: float = 0.2,
        norm: Norm = "batch",
        pool: Literal["flatten", "avg"] = "flatten",
    ) -> None:
        super().__init__()
        demand_at_least(1, num_classes=num_classes)
        if pool not in ("flatten", "avg"):
            raise ValueError(f"unknown pool={pool!r}; choose 'flatten' or 'avg'")
        self.pool = pool
        self.trunk = nn.Sequential(*_trunk(in_channels, width, dropout, norm))
        self.head = (
            nn.Linear(32 * width, num_classes)
            if pool == "flatten"
            else nn.Linear(2 * width, num_classes, bias=False)
        )
        self.apply(_initialise)

    def forward(
        self, images: Tensor, return_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, K] of images [B, C, 32, 32], with ``return_features`` also what the last layer
        sees.

        Raises:
            ValueError: with ``pool="flatten"``, the image side is not between 25 and 32.
        """
        if self.pool == "flatten":
            _check_sides(images)
            features = self.trunk(images).flatten(1)
        else:
            features = self.trunk(images).mean((2, 3))
        logits = self.head(features)
        return (logits, features) if return_features else logits


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """An evaluation-mode copy whose batch norms behind convolutions are folded into those.

    Outputs agree up to rounding. Meant for many passes through a frozen network, such as the latent
    search. The generator's norms follow the activation and stay.

    Args:
        network: not changed.

    Returns:
        The copy, in evaluation mode.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if not isinstance(module, nn.Sequential):
            continue
        for position in range(len(module) - 1):
            conv, norm = module[position], module[position + 1]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module[position] = fuse_conv_bn_eval(conv, norm)
                module[position + 1] = nn.Identity()
    return folded
