"""Classifiers, segmenters and detectors by name: small ones of our own, and torchvision's."""

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model, get_model_weights, list_models

from lightning_modules.nn.norm import Norm, norm_layer
from lightning_modules.nn.pretrained import read_weights, weights_file, wrong_weights
from lightning_modules.supervised.cifar import CIFAR_NETWORKS
from lightning_modules.supervised.ssd import mobilenet_ssd, small_ssd

Task = Literal["classification", "segmentation", "detection"]
Statistics = tuple[Sequence[float], Sequence[float]]

HALF: Statistics = ((0.5,), (0.5,))
"""For networks that are trained from scratch here; and what torchvision's Inceptions were trained with."""

CIFAR: Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""Of CIFAR-10's training images; the released ZAQ code takes them for CIFAR-100 as well."""

DOWNS = 3


def network_names(task: Task) -> list[str]:
    """The names that :func:`build_network` knows for a task; those of detection are what SSD stands on."""
    if task == "detection":
        return ["small", "mobilenet_v2"]
    zoo = torchvision.models if task == "classification" else torchvision.models.segmentation
    own = ["small", *(CIFAR_NETWORKS if task == "classification" else ())]
    return [*own, *list_models(module=zoo)]


def build_network(
    task: Task,
    name: str,
    num_classes: int,
    in_channels: int = 3,
    width: int = 32,
    norm: Norm = "batch",
) -> nn.Module:
    """A network without pretrained weights.

    Args:
        task: what it is for.
        name: one of :func:`network_names`.
        num_classes: channels of its result.
        in_channels: channels of the images; torchvision's first convolution is replaced where these are not 3.
        width: of ``small``'s first stage; it doubles with every further one.
        norm: of ``small``.

    Returns:
        Maps normalised images [B, C, H, W] to logits, [B, K] or [B, K, H, W]; torchvision's segmenters put these into
        a dict under ``out``. For detection an :class:`~lightning_modules.supervised.ssd.SSDNetwork`.

    Raises:
        ValueError: unknown name.
    """
    names = network_names(task)
    if name not in names:
        close = get_close_matches(name.lower(), names, n=4, cutoff=0.5)
        raise ValueError(
            f"unknown network={name!r} for {task} (--model.network); "
            + (f"closest: {', '.join(close)}" if close else f"some are {', '.join(names[:8])}")
        )
    if task == "detection":
        small = name == "small"
        ssd = small_ssd(num_classes, width, norm) if small else mobilenet_ssd(num_classes)
        if in_channels != 3:
            replace_first_convolution(ssd, in_channels)
        return ssd
    if name == "small":
        own = SmallClassifier if task == "classification" else SmallUNet
        return own(num_classes, in_channels, width, norm)
    if name in CIFAR_NETWORKS:
        return CIFAR_NETWORKS[name](num_classes, in_channels)
    options: dict[str, Any] = {"num_classes": num_classes}
    if task == "segmentation":
        options["weights_backbone"] = None
    elif name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "transform_input": False, "init_weights": True}
    network = get_model(name, weights=None, **options)
    if in_channels != 3:
        replace_first_convolution(network, in_channels)
    return network


def statistics_of(name: str, in_channels: int) -> Statistics:
    """Mean and standard deviation that a network's images are normalised with, in its training and after it."""
    if name in ("small", "googlenet", "inception_v3"):
        return HALF
    mean, std = CIFAR
    if name not in CIFAR_NETWORKS:
        preset = get_model_weights(name)["DEFAULT"].transforms()
        mean, std = preset.mean, preset.std
    if in_channels == 3:
        return mean, std
    return (sum(mean) / 3,), (sum(std) / 3,)


def replace_first_convolution(network: nn.Module, in_channels: int) -> None:
    """Lets a network for three channels take another number of them, in place.

    Its response to an image of equal channels stays what it was, so pretrained weights keep their worth.

    Raises:
        ValueError: if the network has no convolution.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            parent, _, child = name.rpartition(".")
            changed = nn.Conv2d(
                in_channels,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                bias=layer.bias is not None,
            )
            with torch.no_grad():
                whole = layer.weight.sum(1, keepdim=True) / in_channels
                changed.weight.copy_(whole.expand_as(changed.weight))
                if layer.bias is not None and changed.bias is not None:
                    changed.bias.copy_(layer.bias)
            setattr(network.get_submodule(parent), child, changed)
            return
    raise ValueError(f"{type(network).__name__} has no convolution whose channels could be changed")


def load_pretrained(
    network: nn.Module, name: str, weights_path: str | None = None, download: bool = False
) -> Path:
    """Loads torchvision's weights into a network for three channels; a head for other classes stays as drawn.

    Args:
        network: of :func:`build_network`.
        name: by which it was built.
        weights_path: file with the state dict; without it the one in torch.hub's folder.
        download: lets torchvision fetch a missing file into that folder.

    Returns:
        The file.

    Raises:
        ValueError: there are no weights for this network.
        FileNotFoundError: the weights are not on this machine.
        RuntimeError: the file holds something else, or the download failed.
    """
    if name == "small" or name in CIFAR_NETWORKS:
        raise ValueError(
            f"there are no pretrained weights for network {name!r}: set --model.pretrained false or choose one of "
            "torchvision's networks"
        )
    file = weights_file(name, get_model_weights(name)["DEFAULT"], weights_path, download)
    state, own = read_weights(name, file), network.state_dict()
    kept = {}
    for key, drawn in own.items():
        if key in state:
            # Only the number of classes may differ: such a layer is the head.
            fits = state[key].shape == drawn.shape or state[key].shape[1:] != drawn.shape[1:]
            kept[key] = state[key] if fits else drawn
    try:
        network.load_state_dict(kept)
    except Exception as error:
        raise RuntimeError(wrong_weights(name, file, error)) from error
    return file


def _stage(in_channels: int, channels: int, norm: Norm, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, step in ((in_channels, stride), (channels, 1)):
        conv = nn.Conv2d(before, channels, 3, step, 1, bias=norm == "none")
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, *norm_layer(norm, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class SmallClassifier(nn.Sequential):
    """Three stages of two convolutions, each of which halves the size, the mean over all places, a linear layer.

    Images [B, C, H, W] of any size to logits [B, K].

    Args:
        num_classes: K.
        in_channels: C.
        width: channels of the first stage.
        norm: after each convolution.

    ``taps`` are the names of its stages, as of :mod:`~lightning_modules.supervised.cifar`.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, width: int = 32, norm: Norm = "batch"
    ) -> None:
        widths = [in_channels, *(width * 2**stage for stage in range(DOWNS))]
        stages = [_stage(before, after, norm, 2) for before, after in pairwise(widths)]
        super().__init__(
            *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)
        )
        self.taps = tuple(str(stage) for stage in range(len(stages)))


class SmallUNet(nn.Module):
    """A U-Net (Ronneberger et al., MICCAI 2015) of four scales with two convolutions each.

    Images [B, C, H, W] of any size from 8 to logits [B, K, H, W]. Scales are halved by strides, rounding up, and
    enlarged by repeating pixels.

    Args:
        num_classes: K.
        in_channels: C.
        width: channels at full resolution; they double with each scale.
        norm: after each convolution.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, width: int = 16, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        widths = [width * 2**scale for scale in range(DOWNS + 1)]
        pairs = list(pairwise(widths))
        self.first = _stage(in_channels, width, norm)
        self.down = nn.ModuleList(_stage(fine, coarse, norm, 2) for fine, coarse in pairs)
        self.up = nn.ModuleList(_stage(coarse + fine, fine, norm) for fine, coarse in pairs[::-1])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every pixel."""
        scales = [self.first(images)]
        for stage in self.down:
            scales.append(stage(scales[-1]))
        x = scales.pop()
        for stage in self.up:
            fine = scales.pop()
            # Not bilinear: its backward pass adds up in no fixed order on CUDA.
            x = stage(torch.cat([F.interpolate(x, fine.shape[-2:]), fine], 1))
        return self.head(x)
