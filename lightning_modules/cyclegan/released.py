"""Weights in the layout of the released code of CycleGAN."""

from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_modules.checkpoints import read_reference_state
from lightning_modules.cyclegan.networks import (
    PatchDiscriminator,
    PixelDiscriminator,
    ResnetGenerator,
    UnetGenerator,
    build_generator,
)


def load_reference_generator(
    path: str | Path, name: str = "resnet_9blocks", **arch: Any
) -> ResnetGenerator | UnetGenerator:
    """A generator with weights of the released code (``latest_net_G_A.pth``).

    Args:
        path: of the weights. The prefix of DataParallel and the running statistics of instance norms, which files of
            2018 have, are dropped.
        name: see :func:`build_generator`.
        **arch: further arguments of :func:`build_generator`, as they were in training.

    Returns:
        The generator, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file cannot be read, or its weights are those of another network.
        ValueError: see :func:`build_generator`.
    """
    generator = build_generator(name, **arch)
    _load_reference(generator, path, {"name": name, **arch})
    return generator


def load_reference_discriminator(
    path: str | Path, kind: Literal["patch", "pixel"] = "patch", **arch: Any
) -> PatchDiscriminator | PixelDiscriminator:
    """A discriminator with weights of the released code, see :func:`load_reference_generator`.

    The file of the released ``D_A`` judges domain B.

    Args:
        path: of the weights.
        kind: ``patch`` (``basic`` and ``n_layers`` in the released code) or ``pixel``.
        **arch: arguments of :class:`PatchDiscriminator` or :class:`PixelDiscriminator`, as they were in training.

    Returns:
        The discriminator, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: the file cannot be read, or its weights are those of another network.
        ValueError: an unknown kind.
    """
    if kind not in ("patch", "pixel"):
        raise ValueError(f"kind={kind!r} must be 'patch' or 'pixel'")
    discriminator = PatchDiscriminator(**arch) if kind == "patch" else PixelDiscriminator(**arch)
    _load_reference(discriminator, path, {"kind": kind, **arch})
    return discriminator


def _load_reference(network: nn.Module, path: str | Path, arch: dict[str, Any]) -> None:
    weights = read_reference_state(path)
    if any(isinstance(layer, nn.InstanceNorm2d) for layer in network.modules()):
        statistics = ("running_mean", "running_var", "num_batches_tracked")
        weights = {key: weights[key] for key in weights if not key.endswith(statistics)}
    wanted = network.state_dict()
    both = wanted.keys() & weights.keys()
    problems = {
        "missing": [key for key in wanted if key not in weights],
        "unexpected": [key for key in weights if key not in wanted],
        "of another shape": [
            f"{key} {list(weights[key].shape)} instead of {list(wanted[key].shape)}"
            for key in wanted
            if key in both and weights[key].shape != wanted[key].shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(
            f"{kind}: {', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}"
            for kind, keys in problems.items()
            if keys
        )
        chosen = ", ".join(f"{key}={value!r}" for key, value in arch.items())
        raise RuntimeError(
            f"{path} does not hold the weights of a {type(network).__name__} with {chosen} and else the defaults "
            f"({found}); give the arguments that it was trained with (name, ngf, norm, dropout, n_layers, ...)"
        )
    network.load_state_dict(weights)
