"""Classifiers for 32-pixel images with the layouts and parameter counts of the released ZAQ code.

Each network has ``taps``, the names of the modules whose outputs are its feature maps from the finest to the coarsest.
Images come in normalised.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (option B).

    One ReLU module is called twice, as in the released code.
    """

    expansion = 1

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(inner, width, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, width, H / stride, W / stride] of maps [B, inner, H, W]."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution, the last with four times the width, and a shortcut as in :class:`BasicBlock`."""

    expansion = 4

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(inner, 4 * width, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, 4 * width, H / stride, W / stride] of maps [B, inner, H, W]."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def _shortcut(inner: int, outer: int, stride: int) -> nn.Sequential:
    if stride == 1 and inner == outer:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))


class CifarResNet(nn.Module):
    """Residual network whose first layer keeps the resolution; every later stage halves it and doubles the width.

    Args:
        block: of the stages.
        blocks: number of blocks per stage.
        width: channels of the first stage's convolutions.
        num_classes: K.
        in_channels: of an image.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        width: int,
        num_classes: int = 10,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        demand_at_least(1, width=width, num_classes=num_classes, in_channels=in_channels)
        self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        inner = width
        for stage, number in enumerate(blocks):
            layers = []
            for position in range(number):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(block(inner, width * 2**stage, stride))
                inner = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.taps = tuple(f"layer{stage + 1}" for stage in range(len(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inner, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of normalised images [B, in_channels, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        for tap in self.taps:
            x = self.get_submodule(tap)(x)
        return self.linear(self.pool(x).flatten(1))


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 of the CIFAR experiments, 272,474 parameters for 10 classes."""
    return CifarResNet(BasicBlock, (3, 3, 3), width, num_classes, in_channels)


def resnet18_cifar(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> CifarResNet:
    """ResNet-18 without the first layer's stride and pool, 11,173,962 parameters for 10 classes."""
    return CifarResNet(BasicBlock, (2, 2, 2, 2), width, num_classes, in_channels)


def resnet50_cifar(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> CifarResNet:
    """ResNet-50 without the first layer's stride and pool, 23,520,842 parameters for 10 classes."""
    return CifarResNet(Bottleneck, (3, 4, 6, 3), width, num_classes, in_channels)


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3 and linear 1x1 convolution; a shortcut where the resolution stays."""

    def __init__(self, inner: int, outer: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * inner
        self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.shortcut = _shortcut(inner, outer, 1) if stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, outer, H / stride, W / stride] of maps [B, inner, H, W]."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y if self.shortcut is None else y + self.shortcut(x)


class MobileNetV2Cifar(nn.Module):
    """MobileNetV2 with ReLU, whose stem and second stage keep the resolution; 2,296,922 parameters for 10 classes.

    Args:
        num_classes: K.
        in_channels: of an image.

    Raises:
        ValueError: a size below 1.
    """

    # expansion, channels, blocks, stride of the first one
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    taps = ("layers.2", "layers.5", "layers.12", "layers.16")
    """The last block at each resolution; the released network returns no feature maps."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        demand_at_least(1, num_classes=num_classes, in_channels=in_channels)
        self.conv1 = nn.Conv2d(in_channels, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        layers, inner = [], 32
        for expansion, outer, number, stride in self.STAGES:
            for position in range(number):
                first_stride = stride if position == 0 else 1
                layers.append(InvertedResidual(inner, outer, expansion, first_stride))
                inner = outer
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(inner, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(1280, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of normalised images [B, in_channels, H, W]."""
        x = self.layers(self.relu1(self.bn1(self.conv1(x))))
        x = self.relu2(self.bn2(self.conv2(x)))
        return self.linear(self.pool(x).flatten(1))


def mobilenetv2_cifar(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2Cifar:
    """See :class:`MobileNetV2Cifar`."""
    return MobileNetV2Cifar(num_classes, in_channels)


class VGG19Cifar(nn.Module):
    """VGG-19 with batch norm and a head of 512, 4096, 4096 and K; 38,958,922 parameters for 10 classes.

    Args:
        num_classes: K.
        in_channels: of an image.

    Raises:
        ValueError: a size below 1.
    """

    # width and number of convolutions before each pool
    STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        demand_at_least(1, num_classes=num_classes, in_channels=in_channels)
        layers: list[nn.Module] = []
        taps, inner = [], in_channels
        for width, number in self.STAGES:
            for _ in range(number):
                layers += [nn.Conv2d(inner, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
                inner = width
            taps.append(f"features.{len(layers) - 1}")
            layers.append(nn.MaxPool2d(2))
        self.taps = tuple(taps)
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            *(nn.Linear(inner, 4096), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
            nn.Linear(4096, num_classes),
        )
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, K] of normalised images [B, in_channels, H, W], H and W at least 32."""
        return self.classifier(self.pool(self.features(x)).flatten(1))


def vgg19_cifar(num_classes: int = 10, in_channels: int = 3) -> VGG19Cifar:
    """See :class:`VGG19Cifar`."""
    return VGG19Cifar(num_classes, in_channels)


CIFAR_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet18_cifar": resnet18_cifar,
    "resnet50_cifar": resnet50_cifar,
    "mobilenetv2_cifar": mobilenetv2_cifar,
    "vgg19_cifar": vgg19_cifar,
}
"""The networks by name; each takes ``num_classes`` and ``in_channels``."""


def _initialize(network: nn.Module) -> None:
    """Kaiming-normal weights: ResNet-20's in the released code, taken for the others too."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
