"""Networks of CycleGAN in the layout of the released code, so that its weight files load.

The released code drops the biases of convolutions that no norm follows when it is asked for no norm; these keep them.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.arguments import demand_at_least
from lightning_modules.nn.norm import Norm, norm_layer

Upsample = Literal["deconv", "resize_conv"]
Init = Literal["normal", "xavier", "kaiming", "orthogonal"]


class ResnetBlock(nn.Module):
    """``x + conv_block(x)`` with two 3x3 convolutions at one width and no activation after the sum.

    Args:
        channels: of input and output.
        norm: normalisation after each convolution.
        dropout: drop half of the activations between the convolutions.
    """

    def __init__(self, channels: int, norm: Norm, dropout: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=_biased(norm)),
            _normalisation(norm, channels),
            nn.ReLU(),
        ]
        if dropout:
            layers.append(nn.Dropout(0.5))
        layers += [
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3, bias=_biased(norm)),
            _normalisation(norm, channels),
        ]
        self.conv_block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """Two strided convolutions, residual blocks, two upsamplings (paper, appendix; released code).

    Args:
        in_channels: of an image.
        out_channels: of a translation.
        ngf: width at full resolution; it doubles with each halving.
        n_blocks: residual blocks, 9 for images of 256 pixels and 6 for 128 in the paper.
        norm: normalisation of all convolutions but the last.
        dropout: see :class:`ResnetBlock`.
        upsample: ``deconv``, transposed convolutions (released code), or ``resize_conv``, bilinear resizing and a
            convolution, against checkerboard patterns.
        checkpoint_blocks: compute the residual blocks again in the backward pass instead of keeping their activations.

    Raises:
        ValueError: a size below 1 or an unknown name.
    """

    multiple = 4
    """Sides of images that come back at their size are multiples of it; others are rounded up."""
    smallest_image = 5

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        n_blocks: int = 9,
        norm: Norm = "instance",
        dropout: bool = False,
        upsample: Upsample = "deconv",
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        demand_at_least(
            1, in_channels=in_channels, out_channels=out_channels, ngf=ngf, n_blocks=n_blocks
        )
        self.checkpoint_blocks = checkpoint_blocks
        layers: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(in_channels, ngf, 7, bias=_biased(norm)),
            _normalisation(norm, ngf),
            nn.ReLU(),
        ]
        for width in (ngf, 2 * ngf):
            layers += [
                nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=_biased(norm)),
                _normalisation(norm, 2 * width),
                nn.ReLU(),
            ]
        layers += [ResnetBlock(4 * ngf, norm, dropout) for _ in range(n_blocks)]
        for width in (2 * ngf, ngf):
            layers += [
                _upsampling(2 * width, width, upsample, _biased(norm)),
                _normalisation(norm, width),
                nn.ReLU(),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, out_channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Translations [B, C', 4 ceil(H/4), 4 ceil(W/4)] in [-1, 1] of images [B, C, H, W] with H, W >= 5.

        Raises:
            ValueError: a smaller image.
        """
        _demand_sides(x, self.smallest_image)
        for layer in self.model:
            again = self.checkpoint_blocks and torch.is_grad_enabled()
            x = _recomputed(layer, x) if again and isinstance(layer, ResnetBlock) else layer(x)
        return x


class UnetBlock(nn.Module):
    """One level of a U-Net: down, the levels inside, up; its input is concatenated to the result.

    Args:
        outer: channels of the input.
        inner: channels between down and up.
        inside: the levels inside; None: this is the innermost one.
        norm: normalisation; the innermost level has none on its way down.
        dropout: drop half of the activations at the end.
    """

    def __init__(
        self, outer: int, inner: int, inside: nn.Module | None, norm: Norm, dropout: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.LeakyReLU(0.2),
            nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=_biased(norm)),
        ]
        if inside is not None:
            layers += [_normalisation(norm, inner), inside]
        entering = inner if inside is None else 2 * inner
        layers += [
            nn.ReLU(),
            nn.ConvTranspose2d(entering, outer, 4, stride=2, padding=1, bias=_biased(norm)),
            _normalisation(norm, outer),
        ]
        if dropout:
            layers.append(nn.Dropout(0.5))
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, 2C, H, W]."""
        return torch.cat([x, self.model(x)], 1)


class UnetGenerator(nn.Module):
    """U-Net that halves the image until one pixel of the smallest size is left (released code).

    Args:
        in_channels: of an image.
        out_channels: of a translation.
        ngf: width of the first level; it doubles with each level up to eight times.
        n_downs: halvings, 7 for ``unet_128`` and 8 for ``unet_256``.
        norm: normalisation between the outermost convolutions.
        dropout: drop half of the activations of the levels of full width, but the innermost.

    Raises:
        ValueError: a size below 1, fewer than two halvings, or an unknown norm.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        ngf: int = 64,
        n_downs: int = 8,
        norm: Norm = "instance",
        dropout: bool = False,
    ) -> None:
        super().__init__()
        demand_at_least(1, in_channels=in_channels, out_channels=out_channels, ngf=ngf)
        if n_downs < 2:
            raise ValueError(f"n_downs={n_downs} must be at least 2")
        self.multiple = self.smallest_image = 2**n_downs
        widths = [ngf * min(2**level, 8) for level in range(n_downs)]
        inside: UnetBlock | None = None
        for level in range(n_downs - 1, 0, -1):
            dropped = dropout and 4 <= level < n_downs - 1
            inside = UnetBlock(widths[level - 1], widths[level], inside, norm, dropped)
        assert inside is not None
        layers = [
            nn.Conv2d(in_channels, ngf, 4, stride=2, padding=1, bias=_biased(norm)),
            inside,
            nn.ReLU(),
            nn.ConvTranspose2d(2 * ngf, out_channels, 4, stride=2, padding=1),
            nn.Tanh(),
        ]
        # The released code names the parameters model.model.N.
        self.model = nn.Sequential(OrderedDict(model=nn.Sequential(*layers)))

    def forward(self, x: Tensor) -> Tensor:
        """Translations [B, C', H, W] in [-1, 1] of images [B, C, H, W] with sides divisible by 2^n_downs.

        Raises:
            ValueError: other sides.
        """
        height, width = x.shape[-2:]
        if height % self.multiple or width % self.multiple:
            raise ValueError(
                f"images of {height}x{width} do not fit unet_{self.multiple}: their sides must be multiples of "
                f"{self.multiple}; translate_any_size pads them"
            )
        return self.model(x)


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches of an image (paper, appendix; ``basic`` in the released code).

    Args:
        in_channels: of an image.
        ndf: width of the first layer; it doubles with each layer up to eight times.
        n_layers: strided layers; 3 gives patches of 70 pixels.
        norm: normalisation of all layers but the first and the last.

    Raises:
        ValueError: a size below 1 or an unknown norm.
    """

    def __init__(
        self, in_channels: int = 3, ndf: int = 64, n_layers: int = 3, norm: Norm = "instance"
    ) -> None:
        super().__init__()
        demand_at_least(1, in_channels=in_channels, ndf=ndf, n_layers=n_layers)
        widths = [ndf * min(2**level, 8) for level in range(n_layers + 1)]
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for level in range(1, n_layers + 1):
            inner, outer = widths[level - 1], widths[level]
            stride = 2 if level < n_layers else 1
            layers += [
                nn.Conv2d(inner, outer, 4, stride=stride, padding=1, bias=_biased(norm)),
                _normalisation(norm, outer),
                nn.LeakyReLU(0.2),
            ]
        self.model = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.smallest_image = 3 * 2**n_layers

    @property
    def receptive_field(self) -> int:
        """Side of the patch that one judgement depends on, in pixels."""
        side = 1
        for layer in reversed(self.model):
            if isinstance(layer, nn.Conv2d):
                side = (side - 1) * layer.stride[0] + layer.kernel_size[0]
        return side

    def forward(self, x: Tensor) -> Tensor:
        """Judgements [B, 1, h, w] of images [B, C, H, W] in [-1, 1], large = real; no sigmoid.

        Raises:
            ValueError: a side below ``3 * 2**n_layers``.
        """
        _demand_sides(x, self.smallest_image, "; take fewer layers with --model.n_layers")
        return self.model(x)


class PixelDiscriminator(nn.Module):
    """1x1 convolutions that judge every pixel by its colour (``pixel`` in the released code).

    Args:
        in_channels: of an image.
        ndf: width of the first layer.
        norm: normalisation of the second layer.

    Raises:
        ValueError: a size below 1 or an unknown norm.
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, norm: Norm = "instance") -> None:
        super().__init__()
        demand_at_least(1, in_channels=in_channels, ndf=ndf)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, ndf, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(ndf, 2 * ndf, 1, bias=_biased(norm)),
            _normalisation(norm, 2 * ndf),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * ndf, 1, 1, bias=_biased(norm)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Judgements [B, 1, H, W] of images [B, C, H, W] in [-1, 1], large = real; no sigmoid."""
        return self.net(x)


def build_generator(
    name: str,
    in_channels: int = 3,
    out_channels: int = 3,
    ngf: int = 64,
    norm: Norm = "instance",
    dropout: bool = False,
    upsample: Upsample = "deconv",
    checkpoint_blocks: bool = False,
) -> ResnetGenerator | UnetGenerator:
    """A generator by its name in the released code.

    Args:
        name: ``resnet_Nblocks`` with N >= 1, or ``unet_SIZE`` with a power of two from 4.
        in_channels: of an image.
        out_channels: of a translation.
        ngf: width of the first layer.
        norm: normalisation.
        dropout: see the networks.
        upsample: see :class:`ResnetGenerator`, which alone has the choice.
        checkpoint_blocks: see :class:`ResnetGenerator`, which alone has the choice.

    Raises:
        ValueError: an unknown name, a size below 1, or a choice that a U-Net does not have.
    """
    if (resnet := re.fullmatch(r"resnet_(\d+)blocks", name)) and int(resnet[1]) >= 1:
        return ResnetGenerator(
            in_channels,
            out_channels,
            ngf,
            int(resnet[1]),
            norm,
            dropout,
            upsample,
            checkpoint_blocks,
        )
    size = int(unet[1]) if (unet := re.fullmatch(r"unet_(\d+)", name)) else 0
    if size < 4 or size & (size - 1):
        raise ValueError(
            f"unknown generator {name!r}; choose resnet_Nblocks (such as resnet_9blocks) or unet_SIZE with a power of "
            "two (such as unet_256)"
        )
    if upsample != "deconv" or checkpoint_blocks:
        raise ValueError(
            f"upsample={upsample!r} and checkpoint_blocks={checkpoint_blocks} are choices of resnet_Nblocks; "
            f"{name} has upsample='deconv' and checkpoint_blocks=False"
        )
    return UnetGenerator(in_channels, out_channels, ngf, size.bit_length() - 1, norm, dropout)


@torch.no_grad()
def init_weights(module: nn.Module, init: Init = "normal", gain: float = 0.02) -> None:
    """Draws all weights anew, from torch's global generator (released code).

    Convolutions and linear layers as asked, their biases 0; affine norms N(1, gain), their biases 0.

    Args:
        module: changed in place.
        init: ``normal`` N(0, gain), ``xavier`` (normal), ``kaiming`` (normal, fan in; without the gain) or
            ``orthogonal``.
        gain: standard deviation, or factor.

    Raises:
        ValueError: an unknown name.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            match init:
                case "normal":
                    nn.init.normal_(layer.weight, 0.0, gain)
                case "xavier":
                    nn.init.xavier_normal_(layer.weight, gain)
                case "kaiming":
                    nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_in")
                case "orthogonal":
                    nn.init.orthogonal_(layer.weight, gain)
                case _:
                    raise ValueError(
                        f"unknown init={init!r}; choose one of {', '.join(get_args(Init))}"
                    )
        elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(layer.weight, 1.0, gain)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def pad_to_multiple(
    x: Tensor, multiple: int, at_least: int = 1
) -> tuple[Tensor, tuple[slice, slice]]:
    """Images mirrored at the right and lower edge, as often as it takes, until their sides are multiples.

    Args:
        x: [..., H, W].
        multiple: of the new sides.
        at_least: lower bound of the new sides.

    Returns:
        Padded images and the slices that cut the original out of them, ``padded[(..., *slices)]``.
    """
    height, width = x.shape[-2:]
    for axis, side in ((-2, height), (-1, width)):
        wanted = -(-max(side, at_least) // multiple) * multiple
        if wanted > side:
            # Mirrored without repeating the edge, as by reflection padding, which needs an image larger than the pad.
            place = torch.arange(wanted, device=x.device) % max(2 * (side - 1), 1)
            x = x.index_select(axis, torch.minimum(place, (2 * (side - 1) - place).abs()))
    return x, (slice(height), slice(width))


def translate_any_size(generator: nn.Module, x: Tensor, multiple: int | None = None) -> Tensor:
    """Translations of the size of the images, whatever that is: padded, translated, cut.

    Args:
        generator: from [B, C, h, w] to [B, C', h, w]; may be wrapped in other modules.
        x: images [B, C, H, W] in [-1, 1].
        multiple: sides the generator takes; None: what the generator of :func:`build_generator` in it demands.

    Returns:
        [B, C', H, W].

    Raises:
        ValueError: ``multiple`` is needed.
    """
    smallest = 1
    if multiple is None:
        for part in generator.modules():
            if isinstance(part, ResnetGenerator | UnetGenerator):
                multiple, smallest = part.multiple, part.smallest_image
        if multiple is None:
            raise ValueError(
                f"{type(generator).__name__} does not say which sizes it takes; give `multiple`"
            )
    padded, original = pad_to_multiple(x, multiple, smallest)
    return generator(padded)[(..., *original)]


def _recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """The block's output, without keeping its activations; batch statistics count once."""
    return checkpoint(
        block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_kept(block))
    )


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    # Not `frozen_statistics`: both passes must save the same tensors, running statistics among them.
    buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _upsampling(inner: int, outer: int, upsample: Upsample, bias: bool) -> nn.Module:
    match upsample:
        case "deconv":
            return nn.ConvTranspose2d(
                inner, outer, 3, stride=2, padding=1, output_padding=1, bias=bias
            )
        case "resize_conv":
            return nn.Sequential(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
                nn.ReflectionPad2d(1),
                nn.Conv2d(inner, outer, 3, bias=bias),
            )
    raise ValueError(
        f"unknown upsample={upsample!r}; choose one of {', '.join(get_args(Upsample))}"
    )


def _biased(norm: Norm) -> bool:
    """Whether convolutions have a bias: not where an affine norm follows (released code)."""
    return norm in ("instance", "none")


def _normalisation(norm: Norm, channels: int) -> nn.Module:
    """An empty layer where there is no norm, so that the layers after it keep their numbers."""
    return next(iter(norm_layer(norm, channels)), nn.Identity())


def _demand_sides(x: Tensor, smallest: int, remedy: str = "") -> None:
    height, width = x.shape[-2:]
    if min(height, width) < smallest:
        raise ValueError(
            f"images of {height}x{width} are too small, both sides must be at least {smallest}{remedy}"
        )
