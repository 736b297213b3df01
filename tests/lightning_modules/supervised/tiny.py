"""The smallest detector that learns, and scenes for it."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.ops import Conv2dNormActivation

from datamodules.detection import ObjectScenes
from datamodules.shapes import SceneOptions
from lightning_modules.supervised import Detector
from lightning_modules.supervised.ssd import SSDNetwork

SCENES = SceneOptions(
    image_size=32, shapes=("square", "ring"), max_objects=2, sizes=("medium", "large"), clutter=0
)


class TinyFeatures(nn.Module):
    out_channels = (24, 32)

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 12, 16, 24, 32)
        self.stages = nn.ModuleList(
            Conv2dNormActivation(before, after, 3, 2) for before, after in pairwise(sizes)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = {}
        for place, stage in enumerate(self.stages):
            x = stage(x)
            if place >= 2:
                maps[str(place)] = x
        return maps


def tiny_ssd(num_classes: int = 2) -> SSDNetwork:
    anchors = DefaultBoxGenerator([[], []], scales=[0.35, 0.55, 0.75])
    return SSDNetwork(TinyFeatures(), anchors, (1, 1), num_classes + 1)


def tiny_detector(seed: int = 0, **options: Any) -> Detector:
    torch.manual_seed(seed)
    return Detector(2, network=tiny_ssd(), **options)


def scenes(count: int, start: int = 0) -> dict[str, Any]:
    return ObjectScenes(SCENES, 0, count, start).batch(range(count))


def trained_detector(steps: int = 200) -> Detector:
    """Has learned some scenes."""
    detector = tiny_detector().train()
    optimizer = Adam(detector.parameters(), lr=0.01)
    data = scenes(256)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        places = torch.arange(32) + 32 * (step % 8)
        batch = {name: values[places] for name, values in data.items()}
        optimizer.zero_grad()
        detector.loss(batch).backward()
        optimizer.step()
    return detector.eval()
