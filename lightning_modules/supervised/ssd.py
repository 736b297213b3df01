"""SSD on MobileNetV2 (Liu et al., ECCV 2016; Sandler et al., CVPR 2018), of torchvision's parts.

Which SSD the quantization papers put on MobileNetV2 is not known; these are the light heads of MobileNetV2's paper.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import Conv2dNormActivation

from lightning_modules.nn.modes import eval_mode
from lightning_modules.nn.norm import Norm, norm_layer

STEM = 32
"""Channels of MobileNetV2's first layer at its full width."""
LAST_CHANNELS = 1280
EXTRA_CHANNELS = (512, 256, 256, 128)


class SSDNetwork(SSD):
    """torchvision's SSD whose forward pass stops before boxes are decoded, so that torch.fx can trace it.

    Arguments are those of ``torchvision.models.detection.ssd.SSD``, with K + 1 classes, of which class 0 is the
    background. Its ``compute_loss`` and ``postprocess_detections`` take what :meth:`forward` gives.

    Attributes:
        taps: names of the modules whose outputs are its feature maps, where the backbone knows them.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.taps = [f"backbone.{name}" for name in getattr(self.backbone, "taps", ())]
        self._grids: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """What the heads say about every default box.

        Args:
            images: normalised [B, C, H, W].

        Returns:
            ``cls_logits`` [B, A, K + 1] and ``bbox_regression`` [B, A, 4].
        """
        outputs = self.head(list(self.backbone(images).values()))
        return {name: outputs[name] for name in ("cls_logits", "bbox_regression")}

    @torch.no_grad()
    def default_boxes(self, images: Tensor) -> Tensor:
        """The default boxes (anchors) for images [B, C, H, W]: edges x0, y0, x1, y1 in pixels [A, 4]."""
        height, width = images.shape[-2:]
        if (height, width) not in self._grids:
            with eval_mode(self.backbone):
                maps = self.backbone(images[:1]).values()
            self._grids[height, width] = [(m.shape[-2], m.shape[-1]) for m in maps]
        shapes = [images.new_empty(1, 0, *grid) for grid in self._grids[height, width]]
        return self.anchor_generator(ImageList(images[:1], [(height, width)]), shapes)[0]


class MobileNetFeatures(nn.Module):
    """MobileNetV2 without its classifier, and convolutions that go on halving its last map.

    ``features`` has the parameter names of torchvision's MobileNetV2, so that its weights fit. As in MobileNetV2's
    paper, a map of some stride is what the expansion of the first block with the next stride gives.

    Args:
        width_mult: factor on the channels.
        first_stride: of the finest map, 8 or 16.
        extras: number of maps after stride 32.
        norm: after each convolution.

    Attributes:
        out_channels: of each map.
        taps: names of the modules that end a stage: the last one of each stride, from 2 to 32.
    """

    def __init__(
        self,
        width_mult: float = 1.0,
        first_stride: int = 16,
        extras: int = 4,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        layer = _layer_of(norm)
        self.features = mobilenet_v2(width_mult=width_mult, norm_layer=layer).features
        if (
            width_mult < 1
        ):  # MobileNetV2 keeps the full width of its last layer, for the classifier's sake
            before = self.features[-1][0].in_channels
            channels = max(16, int(LAST_CHANNELS * width_mult))
            self.features[-1] = _convolution(before, channels, layer)
        self.out_channels, self.tapped = [], []
        self.taps: list[str] = []
        stride = 2
        for place, block in enumerate(self.features):
            if place and getattr(block, "stride", 1) == 2:
                self.taps.append(f"features.{place - 1}")
                if stride >= first_stride:
                    self.tapped.append(place)
                    self.out_channels.append(block.conv[0].out_channels)
                stride *= 2
        self.taps.append(f"features.{len(self.features) - 1}")
        self.out_channels.append(self.features[-1].out_channels)
        self.extra = nn.ModuleList()
        for channels in EXTRA_CHANNELS[:extras]:
            channels = max(16, int(channels * width_mult))
            self.extra.append(_extra_block(self.out_channels[-1], channels, layer))
            self.out_channels.append(channels)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps from fine to coarse, of images [B, C, H, W]."""
        maps = []
        for place, block in enumerate(self.features):
            if place in self.tapped:
                for step, layer in enumerate(block.conv):
                    x = layer(x)
                    if step == 0:
                        maps.append(x)
            else:
                x = block(x)
        maps.append(x)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return {str(level): values for level, values in enumerate(maps)}


def mobilenet_ssd(num_classes: int, norm: Norm = "batch") -> SSDNetwork:
    """SSD on MobileNetV2 with six maps from stride 16 on, as torchvision's SSDlite, for images from 300 pixels on.

    Args:
        num_classes: K, without the background.
        norm: after each convolution.
    """
    return _assemble(MobileNetFeatures(norm=norm), num_classes, [2, 3], 0.2, 0.95, norm)


def small_ssd(num_classes: int, width: int = 16, norm: Norm = "batch") -> SSDNetwork:
    """SSD on a narrow MobileNetV2 with four maps from stride 8 on, for small images: 8, 4, 2 and 1 places at 64 pixels.

    Args:
        num_classes: K, without the background.
        width: channels of the first layer; 32 is MobileNetV2's own width.
        norm: after each convolution.
    """
    features = MobileNetFeatures(width / STEM, first_stride=8, extras=1, norm=norm)
    return _assemble(features, num_classes, [2], 0.2, 0.8, norm)


def _assemble(
    features: MobileNetFeatures,
    num_classes: int,
    aspect_ratios: list[int],
    min_ratio: float,
    max_ratio: float,
    norm: Norm,
) -> SSDNetwork:
    levels = features.out_channels
    anchors = DefaultBoxGenerator([aspect_ratios] * len(levels), min_ratio, max_ratio)
    per_place = anchors.num_anchors_per_location()
    head = SSDLiteHead(levels, per_place, num_classes + 1, _layer_of(norm))
    # Images have their size already, and the transform that would change it is not used.
    return SSDNetwork(features, anchors, (1, 1), num_classes + 1, head=head)


def _layer_of(norm: Norm) -> Callable[[int], nn.Module]:
    return partial(_norm, norm)


def _norm(norm: Norm, channels: int) -> nn.Module:
    return next(iter(norm_layer(norm, channels)), nn.Identity())


def _extra_block(before: int, after: int, norm: Callable[[int], nn.Module]) -> nn.Sequential:
    middle = after // 2
    halving: nn.Module = Conv2dNormActivation(
        middle, middle, 3, 2, groups=middle, norm_layer=norm, activation_layer=nn.ReLU6
    )
    return nn.Sequential(
        _convolution(before, middle, norm), halving, _convolution(middle, after, norm)
    )


def _convolution(before: int, after: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    return Conv2dNormActivation(before, after, 1, norm_layer=norm, activation_layer=nn.ReLU6)
