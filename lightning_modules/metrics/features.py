"""Image embeddings that PRDC, FID and KID share.

Values of different embeddings cannot be compared, so each says in ``description`` what it is; print
it beside the results. :func:`feature_extractor` gives one by name.
"""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3
from torchvision.models import get_model, get_model_weights
from torchvision.transforms.functional import normalize

from lightning_modules.nn.pretrained import (
    local_path,
    missing_weights,
    read_weights,
    weights_file,
    wrong_weights,
)

Init = Literal["orthogonal", "kaiming"]
VGG16Layer = Literal["fc2_relu", "fc2", "fc1_relu"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
OWN_NAMES = ("pixels", "random_vgg16", "vgg16", "inception")


class FeatureExtractor(nn.Module):
    """A network that maps images to feature vectors and stays as it is.

    Always in evaluation mode, without gradients, in float32 whatever autocast or the precision of
    the module around it asks for. Derived classes turn images into the network's input in
    :meth:`prepare`.

    Args:
        network: maps the prepared images to [B, num_features].
        num_features: length of a feature vector; None if it depends on the images.
        description: network, layer, input size, resize filter, normalisation, seed.
    """

    def __init__(self, network: nn.Module, num_features: int | None, description: str) -> None:
        super().__init__()
        self.network = network.float().requires_grad_(False)
        self.num_features = num_features
        self.description = description
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A half-precision module converts everything inside it; only the device is taken over.
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)

    def prepare(self, images: Tensor) -> Tensor:
        """The network's input for float32 images in [0, 1], [B, 3, H, W] or [B, 1, H, W]."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of images.

        Args:
            images: float, [B, 3, H, W] or [B, 1, H, W] in [0, 1]. Grey ones are repeated to three
                channels where the network wants three.

        Returns:
            float32 tensor [B, num_features].

        Raises:
            ValueError: another shape, no floating type, or values outside [0, 1].
        """
        if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.is_floating_point():
            raise ValueError(
                "expected float images [B, 3, H, W] or [B, 1, H, W] in [0, 1], "
                f"got {images.dtype} {list(images.shape)}"
            )
        if images.numel():
            low, high = (value.item() for value in images.aminmax())
            if not (low >= -1e-3 and high <= 1 + 1e-3):  # nan fails too
                raise ValueError(
                    f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}; "
                    "(images + 1) / 2 converts images in [-1, 1]"
                )
        with torch.autocast(images.device.type, enabled=False):
            features: Tensor = self.network(self.prepare(images.float()))
        return features


def _three_channels(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)


def _resize(images: Tensor, height: int, width: int, mode: str = "bilinear") -> Tensor:
    """Resizes with antialiasing; the result stays in [0, 1] also where bicubic overshoots."""
    if images.shape[-2:] == (height, width):
        return images
    resized = F.interpolate(images, (height, width), mode=mode, align_corners=False, antialias=True)
    return resized.clamp(0, 1)


class PixelFeatures(FeatureExtractor):
    """The pixels themselves, [B, C*H*W]; for small images, and to see what an embedding adds."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), None, "pixels in [0, 1], flattened, size unchanged")

    def prepare(self, images: Tensor) -> Tensor:
        """A copy, so that stored features do not follow changes of the images."""
        return images.clone()


class RandomVGG16Features(FeatureExtractor):
    """VGG16 with random weights, for images far from ImageNet ("R64" of Naeem et al., ICML 2020).

    How the original network was initialised is not published. Here the weights are drawn on the CPU
    from a generator of their own, so they are the same for the same seed on all ranks, in all runs
    and on all machines (orthogonal ones up to rounding, by the linear algebra library). They keep
    the size of the signal through the ReLU layers; biases are zero.

    Args:
        dim: length of a feature vector.
        seed: of the weights; not the seed of the run.
        init: ``"orthogonal"`` or ``"kaiming"`` (normal).
        full: keep the two layers of 4096 (100 M parameters; about half a minute of construction
            with ``"orthogonal"``) and resize images to 224, instead of averaging the last feature
            map over its positions.
        image_size: side to which images are resized; without it they keep their size, but sides
            below 32, the smallest for the network, are enlarged to 32.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        dim: int = 64,
        seed: int = 0,
        init: Init = "orthogonal",
        full: bool = False,
        image_size: int | None = None,
    ) -> None:
        if dim < 1:
            raise ValueError(f"dim={dim} must be at least 1")
        if init not in get_args(Init):
            raise ValueError(f"unknown init={init!r}; choose one of {get_args(Init)}")
        if image_size is not None and image_size < 32:
            raise ValueError(f"image_size={image_size} is too small for VGG16; use 32 or more")
        image_size = 224 if full and image_size is None else image_size
        # On the meta device nothing is drawn from the global generator.
        with torch.device("meta"):
            layers: list[nn.Module] = [
                torchvision.models.vgg16(weights=None, init_weights=False).features,
                nn.AdaptiveAvgPool2d(7 if full else 1),
                nn.Flatten(),
            ]
            if full:
                layers += [
                    nn.Linear(512 * 7 * 7, 4096),
                    nn.ReLU(),
                    nn.Linear(4096, 4096),
                    nn.ReLU(),
                ]
            layers.append(nn.Linear(4096 if full else 512, dim))
        network = nn.Sequential(*layers).float().to_empty(device="cpu")
        _draw_weights(network, init, torch.Generator("cpu").manual_seed(seed))
        size = (
            f"{image_size}x{image_size}, squeezed"
            if image_size
            else "their own size, sides below 32 enlarged to 32"
        )
        layer = "fc1, fc2" if full else "global average pooling"
        super().__init__(
            network,
            dim,
            f"VGG16 with random weights ({init}, seed {seed}), {layer}, linear layer to {dim}; "
            f"images at {size} (bilinear, antialiased); ImageNet mean and std",
        )
        self.image_size = image_size

    def prepare(self, images: Tensor) -> Tensor:
        """Three channels, resized, normalised."""
        height, width = (self.image_size or max(side, 32) for side in images.shape[-2:])
        images = _resize(_three_channels(images), height, width)
        return normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD))


def _draw_weights(network: nn.Sequential, init: Init, generator: torch.Generator) -> None:
    for layer in network.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        follows: Literal["linear", "relu"] = "linear" if layer is network[-1] else "relu"
        if init == "orthogonal":
            gain = nn.init.calculate_gain(follows)
            nn.init.orthogonal_(layer.weight, gain, generator=generator)
        else:
            nn.init.kaiming_normal_(layer.weight, nonlinearity=follows, generator=generator)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class TorchvisionFeatures(FeatureExtractor):
    """Penultimate features of a torchvision ImageNet classifier: the input of its last linear layer.

    Resize filter, input size, mean and std are those of the default weights; images are resized
    directly to the input size, without the central crop of ImageNet evaluation.

    Args:
        name: in ``torchvision.models.list_models(module=torchvision.models)``.
        weights_path: file with the state dict; without it the file in torch.hub's folder.
        download: lets torchvision fetch a missing file into that folder.

    Raises:
        ValueError: no such classifier, or it has no linear layer.
        FileNotFoundError: the weights are not on this machine.
        RuntimeError: the file does not hold this network's weights, or the download failed.
    """

    def __init__(self, name: str, weights_path: str | None = None, download: bool = False) -> None:
        if name not in _classifiers():
            raise ValueError(_unknown(name, _classifiers()))
        weights = get_model_weights(name).DEFAULT
        preset = weights.transforms()
        (size,) = preset.crop_size
        network = _architecture(name, size)
        linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError(f"{name} has no linear layer, whose input would be the features")
        file = weights_file(name, weights, weights_path, download)
        _load(network, name, file)
        parent, _, child = linear[-1].rpartition(".")
        num_features = int(network.get_submodule(linear[-1]).in_features)  # type: ignore[arg-type]
        setattr(network.get_submodule(parent), child, nn.Identity())
        super().__init__(network, num_features, "")
        self.name, self.file, self.size = name, file.name, size
        self.mode, self.mean, self.std = preset.interpolation.value, preset.mean, preset.std
        self.description = self._describe("input of the last linear layer")

    def _describe(self, layer: str) -> str:
        return (
            f"torchvision {self.name} with {self.file}, {layer}; images squeezed to "
            f"{self.size}x{self.size} ({self.mode}, antialiased), no crop; "
            f"mean {tuple(self.mean)}, std {tuple(self.std)}"
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Three channels, resized, normalised."""
        images = _resize(_three_channels(images), self.size, self.size, self.mode)
        return normalize(images, self.mean, self.std)


class VGG16Features(TorchvisionFeatures):
    """VGG16's 4096 features ("T4096" of Naeem et al., ICML 2020, and of improved precision and recall).

    With torchvision's weights and preprocessing, not those of Kynkäänniemi et al., NeurIPS 2019.

    Args:
        layer: ``"fc2_relu"`` or ``"fc1_relu"``, after the ReLU, or ``"fc2"``, before it.
        weights_path: see :class:`TorchvisionFeatures`.
        download: see :class:`TorchvisionFeatures`.

    Raises:
        ValueError: ``layer`` is unknown.
        FileNotFoundError: the weights are not on this machine.
        RuntimeError: the file does not hold VGG16's weights, or the download failed.
    """

    def __init__(
        self,
        layer: VGG16Layer = "fc2_relu",
        weights_path: str | None = None,
        download: bool = False,
    ) -> None:
        if layer not in get_args(VGG16Layer):
            raise ValueError(f"unknown layer={layer!r}; choose one of {get_args(VGG16Layer)}")
        super().__init__("vgg16", weights_path, download)
        classifier = list(self.network.get_submodule("classifier").children())
        end = {"fc1_relu": 2, "fc2": 4, "fc2_relu": 5}[layer]
        self.network.classifier = nn.Sequential(*classifier[:end])
        self.description = self._describe(f"layer {layer}")


class InceptionFeatures(FeatureExtractor):
    """The 2048 pooled features of FID's InceptionV3, as torchmetrics computes them.

    Needs the package torch-fidelity. Nothing is downloaded. Images are rounded to 8 bits, as the
    network was used on image files, and resized by torchmetrics with antialiasing, where the
    original FID resizes as TensorFlow 1 did.

    Args:
        weights_path: the weights file; without it the one in torch.hub's folder.

    Raises:
        RuntimeError: torch-fidelity is not installed, or the file holds other weights.
        FileNotFoundError: the weights are not on this machine.
    """

    def __init__(self, weights_path: str | None = None) -> None:
        if find_spec("torch_fidelity") is None:
            raise RuntimeError(
                "inception features need the package torch-fidelity: pip install torch-fidelity"
            )
        file = local_path(INCEPTION_URL, weights_path)
        if not file.is_file():
            raise FileNotFoundError(missing_weights("inception", INCEPTION_URL, file))
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
        except Exception as error:
            raise RuntimeError(wrong_weights("inception", file, error)) from error
        super().__init__(
            network,
            2048,
            f"FID InceptionV3 with {file.name}, pooled 2048 features; images rounded to 8 bits and "
            "squeezed to 299x299 (bilinear, antialiased); (x - 128) / 128",
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Three channels in 8 bits."""
        return (_three_channels(images) * 255).round().to(torch.uint8)


def feature_extractor(
    name: str, weights_path: str | None = None, download: bool = False, seed: int = 0
) -> FeatureExtractor:
    """The embedding of that name.

    Args:
        name: ``pixels``, ``random_vgg16`` (R64), ``vgg16`` (T4096), ``inception``, or a torchvision
            classifier.
        weights_path: weights file of a pretrained network; without it the one in torch.hub's
            folder.
        download: lets torchvision fetch missing weights.
        seed: of the random network.

    Raises:
        ValueError: no such name, or weights for an embedding that has none.
        FileNotFoundError: the weights are not on this machine.
        RuntimeError: the file holds other weights, the download failed, or a package is missing.
    """
    if name in ("pixels", "random_vgg16") and weights_path is not None:
        raise ValueError(
            f"{name} features have no weights file: drop --model.weights_path {weights_path}"
        )
    match name:
        case "pixels":
            return PixelFeatures()
        case "random_vgg16":
            return RandomVGG16Features(seed=seed)
        case "vgg16":
            return VGG16Features(weights_path=weights_path, download=download)
        case "inception":
            return InceptionFeatures(weights_path)
    if name not in _classifiers():
        raise ValueError(_unknown(name, {*OWN_NAMES, *_classifiers()}))
    return TorchvisionFeatures(name, weights_path, download)


def _classifiers() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _unknown(name: str, names: Iterable[str]) -> str:
    close = get_close_matches(name.lower(), sorted(names), n=4, cutoff=0.5)
    return f"unknown features {name!r}; " + (
        f"closest: {', '.join(close)}"
        if close
        else f"choose {', '.join(OWN_NAMES)} or one of torchvision.models.list_models()"
    )


def _architecture(name: str, size: int) -> nn.Module:
    """The network as torchvision builds it for its default weights."""
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # Their weights want another normalisation than the preset's, which the network applies.
        options = {"transform_input": True, "init_weights": False}
    elif name.startswith("vit_"):
        options = {"image_size": size}
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return get_model(name, **options)


def _load(network: nn.Module, name: str, file: Path) -> None:
    state = read_weights(name, file)
    try:
        # Assigned, not copied: a half-precision default type must not round the weights.
        network.load_state_dict(state, assign=True)
    except Exception as error:
        raise RuntimeError(wrong_weights(name, file, error)) from error
