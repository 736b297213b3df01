"""Checkpoints in the layout of the released code of OGNet."""

from pathlib import Path
from typing import Any

from lightning_modules.checkpoints import read_reference_state
from lightning_modules.ognet.module import OGNet
from lightning_modules.ognet.networks import OGNetDiscriminator, OGNetGenerator


def load_reference_checkpoint(
    g_path: str | Path, d_path: str | Path | None = None, image_size: int = 45
) -> OGNet:
    """An OGNet from checkpoints in the layout of the released code, ready to score.

    The discriminator is taken for that of phase two. There is no old generator in it, and no threshold.

    Args:
        g_path: file with ``g_model_state_dict``.
        d_path: file with ``d_model_state_dict``; None: it is in the same file.
        image_size: side of the images they were trained on.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: a file cannot be read or holds something else.
    """
    generator, discriminator = load_reference_networks(g_path, d_path, image_size)
    first: Any = generator.encoder[0]
    module = OGNet(first.in_channels, image_size, first.out_channels)
    module.generator.load_state_dict(generator.state_dict())
    for name in ("discriminator", "tuned_discriminator"):
        getattr(module, name).load_state_dict(discriminator.state_dict())
    module.tuned.fill_(True)
    return module.eval()


def load_reference_networks(
    g_path: str | Path, d_path: str | Path | None = None, image_size: int = 45
) -> tuple[OGNetGenerator, OGNetDiscriminator]:
    """Networks from checkpoints in the layout of the released code, of whatever width they are.

    Args:
        g_path: file with ``g_model_state_dict``.
        d_path: file with ``d_model_state_dict``; None: it is in the same file.
        image_size: side of the images they were trained on.

    Returns:
        Generator and discriminator on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: a file cannot be read or holds something else.
    """
    generator_state = read_reference_state(g_path, "g_model_state_dict")
    discriminator_state = read_reference_state(d_path or g_path, "d_model_state_dict")
    try:
        first = generator_state["encoder.0.weight"]
        generator = OGNetGenerator(first.shape[1], first.shape[0])
        generator.load_state_dict(generator_state)
        first = discriminator_state["discriminator.0.weight"]
        discriminator = OGNetDiscriminator(first.shape[1], image_size, first.shape[0])
        discriminator.load_state_dict(discriminator_state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"{g_path} and {d_path or g_path} do not hold the networks of the released code for images of "
            f"{image_size} pixels ({error})"
        ) from error
    return generator, discriminator
