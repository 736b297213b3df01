"""Backbones cut at their last feature map, heads that are maps, and the chain of erasing classifiers."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.inception import InceptionB
from torchvision.models.resnet import Bottleneck
from torchvision.transforms.functional import normalize

from lightning_modules.acol.losses import class_attention, erase_mask, select_class_maps
from lightning_modules.nn.maps import fuse_maps, normalize_map
from lightning_modules.nn.norm import Norm, norm_layer
from lightning_modules.nn.pretrained import read_weights, weights_file, wrong_weights

Pool = Literal["acol", "torchvision"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""What the weights of torchvision's GoogLeNet and Inception were trained with."""

STRIDES = {
    "small": (4, 8, 16),
    "vgg16": (8, 16, 32),
    "resnet18": (16, 8, 32),
    "resnet34": (16, 8, 32),
    "resnet50": (16, 8, 32),
    "resnet101": (16, 8, 32),
    "resnet152": (16, 8, 32),
    "googlenet": (16, 32),
    "inception_v3": (16, 8),
}
"""Backbones and the strides of their last feature map, the default first."""


class Backbone(nn.Module):
    """Convolutional part of a classifier; images in [0, 1] become its last feature map.

    Args:
        name: key of :data:`STRIDES`.
        layers: the network; torchvision's names for its parts, so that its weights fit.
        num_channels: of the last feature map.
        stride: of the last feature map.
        statistics: mean and standard deviation its input is normalised with.
    """

    def __init__(
        self,
        name: str,
        layers: nn.Module,
        num_channels: int,
        stride: int,
        statistics: tuple[Sequence[float], Sequence[float]] = IMAGENET,
    ) -> None:
        super().__init__()
        self.name, self.num_channels, self.stride = name, num_channels, stride
        self.layers = layers
        self.statistics = statistics

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, C, h, w] of images [B, 3 or 1, H, W] in [0, 1]; grey ones are repeated."""
        images = images.expand(-1, 3, -1, -1)
        return self.layers(normalize(images, *map(list, self.statistics)))

    def load_pretrained(self, weights_path: str | None = None, download: bool = False) -> Path:
        """Loads torchvision's ImageNet weights.

        Args:
            weights_path: file with the state dict of the whole classifier; without it the one in torch.hub's folder.
            download: lets torchvision fetch a missing file into that folder.

        Returns:
            The file.

        Raises:
            ValueError: there are no weights for this backbone.
            FileNotFoundError: the weights are not on this machine.
            RuntimeError: the file holds something else, or the download failed.
        """
        if self.name == "small":
            raise ValueError(
                "there are no pretrained weights for backbone 'small': set --model.pretrained false or choose one of "
                + ", ".join(name for name in STRIDES if name != "small")
            )
        # The weights of 2014 to 2016's recipes, for which learning rates of the WSOL literature are.
        weights = get_model_weights(self.name)["IMAGENET1K_V1"]
        file = weights_file(self.name, weights, weights_path, download)
        state = read_weights(self.name, file)
        if self.name == "vgg16":
            state = {key.removeprefix("features."): value for key, value in state.items()}
        own = {child for child, _ in self.layers.named_children()}
        # Without the classifier behind; a file that lacks something of ours is refused below.
        parts = {key: value for key, value in state.items() if key.partition(".")[0] in own}
        try:
            self.layers.load_state_dict(parts)
        except Exception as error:
            raise RuntimeError(wrong_weights(self.name, file, error)) from error
        return file


def build_backbone(
    name: str,
    stride: int | None = None,
    pool: Pool = "acol",
    width: int = 32,
    norm: Norm = "batch",
    pretrained: bool = False,
    weights_path: str | None = None,
    download: bool = False,
) -> Backbone:
    """The backbone of that name.

    Args:
        name: key of :data:`STRIDES`.
        stride: of the last feature map, None for the default. Layers that no longer reduce it keep their dilation of 1
            (released code, wsolevaluation).
        pool: of ``vgg16``: max pools 3x3 (released code of ACoL) or torchvision's 2x2. Pools that do not reduce are
            3x3 in both.
        width: channels of ``small``'s first stage; they double with every further one.
        norm: of ``small``.
        pretrained: load torchvision's weights, see :meth:`Backbone.load_pretrained`.
        weights_path: see there.
        download: see there.

    Raises:
        ValueError: unknown name or pool, or a stride the backbone cannot have.
        FileNotFoundError: the weights are not on this machine.
        RuntimeError: the file holds something else, or the download failed.
    """
    if name not in STRIDES:
        raise ValueError(
            f"unknown backbone={name!r} (--model.backbone); choose one of {', '.join(STRIDES)}"
        )
    stride = STRIDES[name][0] if stride is None else stride
    if stride not in STRIDES[name]:
        choices = ", ".join(map(str, sorted(STRIDES[name])))
        raise ValueError(
            f"backbone {name} has no stride={stride} (--model.stride); choose {choices}"
        )
    if pool not in get_args(Pool):
        raise ValueError(f"unknown pool={pool!r}; choose one of {', '.join(get_args(Pool))}")
    match name:
        case "small":
            backbone = _small(stride, width, norm)
        case "vgg16":
            backbone = _vgg16(stride, pool)
        case "googlenet":
            backbone = _googlenet(stride)
        case "inception_v3":
            backbone = _inception_v3(stride)
        case _:
            backbone = _resnet(name, stride)
    if pretrained:
        backbone.load_pretrained(weights_path, download)
    return backbone


def _small(stride: int, width: int, norm: Norm) -> Backbone:
    """Two convolutions a stage, the first of which halves the size."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in range(int(math.log2(stride))):
        wider = width * 2**stage
        for before, step in ((channels, 2), (wider, 1)):
            conv = nn.Conv2d(before, wider, 3, step, 1, bias=norm == "none")
            layers += [conv, *norm_layer(norm, wider), nn.ReLU(inplace=True)]
        channels = wider
    network = nn.Sequential(*layers)
    initialize_he(network)
    return Backbone("small", network, channels, stride)


def _vgg16(stride: int, pool: Pool) -> Backbone:
    layers: list[nn.Module] = []
    channels, halvings = 3, int(math.log2(stride))
    for block, (wider, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.ReLU(inplace=True)]
            channels = wider
        halves = block < halvings
        small_window = halves and pool == "torchvision"
        layers.append(nn.MaxPool2d(2) if small_window else nn.MaxPool2d(3, 2 if halves else 1, 1))
    network = nn.Sequential(*layers)
    initialize_xavier(network)
    return Backbone("vgg16", network, channels, stride)


def _resnet(name: str, stride: int) -> Backbone:
    network: Any = get_model(name)
    for layer in {32: [], 16: ["layer4"], 8: ["layer3", "layer4"]}[stride]:
        first = getattr(network, layer)[0]
        conv = first.conv2 if isinstance(first, Bottleneck) else first.conv1
        conv.stride = first.downsample[0].stride = (1, 1)
    return Backbone(name, _up_to(network, "layer4"), network.fc.in_features, stride)


def _googlenet(stride: int) -> Backbone:
    """torchvision's, with batch norm, not the Caffe network of 2014; stride 16 ends as GoogLeNet-GAP does (CAM)."""
    network = get_model("googlenet", aux_logits=False, transform_input=False, init_weights=False)
    end, channels = {16: ("inception4e", 832), 32: ("inception5b", 1024)}[stride]
    layers = _up_to(network, end)
    initialize_xavier(layers)
    return Backbone("googlenet", layers, channels, stride, HALF)


def _inception_v3(stride: int) -> Backbone:
    """Up to Mixed_6e; padded, so that sizes are fractions of the image's (wsolevaluation)."""
    network: Any = get_model(
        "inception_v3", aux_logits=False, transform_input=False, init_weights=False
    )
    network.Conv2d_1a_3x3.conv.padding = (1, 1)
    network.maxpool1 = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    network.maxpool2 = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    reduce = nn.MaxPool2d(3, 2, ceil_mode=True) if stride == 16 else nn.Identity()
    network.Mixed_6a = _SameSizeInceptionB(reduce)
    layers = _up_to(network, "Mixed_6e")
    initialize_xavier(layers)
    return Backbone("inception_v3", layers, 768, stride, HALF)


class _SameSizeInceptionB(InceptionB):
    """Mixed_6a with stride 1, behind a pool of its own; torchvision's parameters and names."""

    def __init__(self, reduce: nn.Module) -> None:
        super().__init__(288)
        self.reduce = reduce
        for branch in (self.branch3x3, self.branch3x3dbl_3):
            branch.conv.stride, branch.conv.padding = (1, 1), (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 1, 1)], 1)


def _up_to(network: nn.Module, last: str) -> nn.Sequential:
    """The children up to ``last``, in their order, under their names."""
    layers = nn.Sequential()
    for name, child in network.named_children():
        layers.add_module(name, child)
        if name == last:
            break
    return layers


def initialize_xavier(network: nn.Module) -> None:
    """Xavier-uniform convolutions with zero biases (released code of ACoL)."""
    _initialize(network, nn.init.xavier_uniform_)


def initialize_he(network: nn.Module) -> None:
    """He-normal convolutions by fan-out with zero biases."""
    _initialize(network, lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"))


def _initialize(network: nn.Module, draw: Callable[[Tensor], Tensor]) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            draw(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class MapHead(nn.Sequential):
    """A classifier whose logits are the global averages of its class maps.

    ``depth`` 3x3 convolutions with ReLU and a 1x1 convolution to the classes; depth 2 is ACoL's, depth 0 the variant's
    and, up to the bias, CAM's. The maps are computed in float32 or better also under autocast: bfloat16's 8 bits would
    move locations across the erasing threshold.

    Args:
        in_channels: of the features.
        num_classes: K.
        width: of the hidden convolutions.
        depth: their number.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 1024, depth: int = 2):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            in_channels = width
        super().__init__(*layers, nn.Conv2d(in_channels, num_classes, 1))
        initialize_xavier(self)

    def forward(self, features: Tensor) -> Tensor:
        """Class maps [B, K, H, W] of features [B, C, H, W]."""
        layers: list[Any] = list(self)
        *hidden, last = layers
        for layer in hidden:
            features = layer(features)
        dtype = torch.promote_types(features.dtype, torch.float32)
        with torch.autocast(features.device.type, enabled=False):
            return F.conv2d(features.to(dtype), last.weight.to(dtype), last.bias.to(dtype))


class Stage(NamedTuple):
    """What one classifier of the chain made of what it saw."""

    logits: Tensor
    """[B, K]."""
    maps: Tensor
    """Class maps [B, K, H, W]."""
    attention: Tensor
    """Normalised map [B, H, W] of the class that is erased for the next stage, without gradient."""
    visible: Tensor
    """Bool [B, H, W], False where the features had been erased."""


class ErasingNetwork(nn.Module):
    """A backbone and a chain of classifiers, each of which sees what the attention of those before left.

    Stage s + 1 sees the features of stage s with zeros where the attention of stage s reaches ``deltas[s]``. Two ``p``
    stages with hidden convolutions are ACoL, one is CAM.

    Args:
        backbone: the features; shared by all stages.
        num_classes: K.
        recipe: a letter a stage: ``p`` learns the labelled class, ``n`` the others.
        deltas: thresholds in (0, 1), one less than stages (further ones are not used).
        head_width: see :class:`MapHead`.
        head_depth: see :class:`MapHead`.
        inclusive: erase where the attention equals the threshold, too.
        smooth: 3x3 average of the features (zeros beyond the border count) before all stages.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        recipe: str = "pp",
        deltas: Sequence[float] = (0.6,),
        head_width: int = 1024,
        head_depth: int = 2,
        inclusive: bool = True,
        smooth: bool = False,
    ) -> None:
        super().__init__()
        self.recipe, self.deltas = recipe, tuple(deltas)
        self.inclusive, self.smooth = inclusive, smooth
        self.backbone = backbone
        self.heads: Any = nn.ModuleList(
            MapHead(backbone.num_channels, num_classes, head_width, head_depth) for _ in recipe
        )

    def features(self, images: Tensor) -> Tensor:
        """Features [B, C, h, w] of images [B, 3 or 1, H, W] in [0, 1]."""
        return self.pooled(self.backbone(images))

    def pooled(self, features: Tensor) -> Tensor:
        """The features as the stages see them."""
        return F.avg_pool2d(features, 3, 1, 1) if self.smooth else features

    def forward(
        self,
        features: Tensor,
        erased_classes: Tensor | None = None,
        first_maps: Tensor | None = None,
    ) -> list[Stage]:
        """All stages on features [B, C, H, W].

        Args:
            features: of :meth:`features`.
            erased_classes: [B] whose attention is erased; None for what the first stage predicts.
            first_maps: maps of the first stage, if they are already known.
        """
        maps = self.heads[0](features) if first_maps is None else first_maps
        if erased_classes is None:
            erased_classes = maps.mean((-2, -1)).argmax(1)
        visible = torch.ones_like(maps[:, 0], dtype=torch.bool)
        stages: list[Stage] = []
        for number, head in enumerate(self.heads):
            if number:
                keep = erase_mask(stages[-1].attention, self.deltas[number - 1], self.inclusive)
                visible = visible & keep
                features = features.masked_fill(~keep[:, None], 0)
                maps = head(features)
            attention = class_attention(maps, erased_classes)
            stages.append(Stage(maps.mean((-2, -1)), maps, attention, visible))
        return stages

    def class_maps(
        self,
        features: Tensor,
        classes: Tensor,
        erased_classes: Tensor | None = None,
        first_maps: Tensor | None = None,
    ) -> list[Tensor]:
        """Normalised maps of some classes in every stage.

        Args:
            features: [B, C, H, W].
            classes: [B, T].
            erased_classes: [B] whose attention is erased, None: for the map of a class that class is erased, which
                takes a pass of the later stages for each of the T.
            first_maps: see :meth:`forward`.

        Returns:
            For every stage [B, T, H, W] in [0, 1].
        """
        first = self.heads[0](features) if first_maps is None else first_maps
        if len(self.heads) == 1:
            erased_classes = classes[:, 0]  # for nobody
        if erased_classes is not None:
            stages = self(features, erased_classes, first)
            return [normalize_map(select_class_maps(stage.maps, classes)) for stage in stages]
        passes = [self(features, column, first) for column in classes.unbind(1)]
        return [torch.stack([s.attention for s in row], 1) for row in zip(*passes, strict=True)]

    def fuse(self, maps: Sequence[Tensor]) -> Tensor:
        """Largest of the normalised maps of the ``p`` stages, one entry of ``maps`` a stage, all of one shape."""
        kept = [each for each, kind in zip(maps, self.recipe, strict=True) if kind == "p"]
        return fuse_maps(kept, method="max")
