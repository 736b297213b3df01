"""The classifier of MatchGAN's evaluation: trained on real images (GAN-test) or on translations (GAN-train)."""

from typing import Any

from torch import Tensor, nn

from lightning_modules.arguments import demand_at_least

STAGES = 5


class AttributeClassifier(nn.Module):
    """Five stages of two 3x3 convolutions and a max-pooling, then two linear layers.

    As the released TensorFlow code, whose flattening has channels last: its first linear layer would need its columns
    in another order. Batch norms average with decay 0.9; weights are initialised as by Glorot (Xavier).

    Args:
        n_outputs: attributes or classes.
        dim: channels of the second stage, half of it in the first, doubled by each further one.
        image_size: side of an image.
        in_channels: of an image.

    Raises:
        ValueError: images below 32 pixels, ``dim`` below 2 or odd, or no output.
    """

    def __init__(
        self, n_outputs: int, dim: int = 32, image_size: int = 128, in_channels: int = 3
    ) -> None:
        super().__init__()
        demand_at_least(1, n_outputs=n_outputs)
        if dim < 2 or dim % 2:
            raise ValueError(f"dim={dim} must be even, the first stage has half of it")
        if image_size < 2**STAGES:
            raise ValueError(
                f"image_size={image_size}: after {STAGES} poolings nothing is left below "
                f"{2**STAGES} pixels"
            )
        widths = [dim // 2 * 2**i for i in range(STAGES)]
        layers: list[nn.Module] = []
        for inner, outer in zip([in_channels, *widths[:-1]], widths, strict=True):
            for channels in (inner, outer):
                layers += [
                    nn.Conv2d(channels, outer, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outer),
                    nn.ReLU(),
                ]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.Flatten())
        side = image_size // 2**STAGES
        self.hidden = nn.Linear(widths[-1] * side**2, 512)
        self.output = nn.Linear(512, n_outputs)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, n_outputs] of images [B, C, image_size, image_size] in [-1, 1]."""
        return self.output(self.hidden(self.features(x)).relu())

    def parameter_groups(self, weight_decay: float = 1e-4) -> list[dict[str, Any]]:
        """Groups for Adam, whose weight decay is then the released code's ``weight_decay / 2 * ||w||**2``.

        It holds for weights of convolutions and linear layers, not for biases and norms.
        """
        weights = [
            layer.weight for layer in self.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
        ]
        chosen = set(map(id, weights))
        rest = [parameter for parameter in self.parameters() if id(parameter) not in chosen]
        return [
            {"params": weights, "weight_decay": weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ]


def classifier_lr(epoch: int, base: float = 2e-4, epochs: int = 200) -> float:
    """Learning rate of the classifier, ``base * (1 - max(epoch - 8, 0) / epochs)**0.75`` (released code).

    Args:
        epoch: counted from 0; from ``epochs + 8`` on the rate is 0.
        base: of the first epochs.
        epochs: in all.

    Raises:
        ValueError: ``epochs`` below 1.
    """
    demand_at_least(1, epochs=epochs)
    return base * max(0.0, 1 - max(epoch - 8, 0) / epochs) ** 0.75
