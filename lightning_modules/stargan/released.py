"""Checkpoints in the layouts of the released codes of StarGAN and of MatchGAN, which is a fork of it.

StarGAN's generator is one sequence ``main``; MatchGAN cuts it in the middle of the residual blocks into ``encoder`` and
``decoder``. Heads of the discriminators are ``conv1``, ``conv2`` and, for MatchGAN, ``conv3``. Instance norms come with
running statistics, which the originals never use.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_modules.attributes import LabelKind
from lightning_modules.checkpoints import read_reference_state
from lightning_modules.stargan.labels import name_sets
from lightning_modules.stargan.module import StarGAN
from lightning_modules.stargan.networks import (
    ResidualBlock,
    StarGANDiscriminator,
    StarGANGenerator,
)

Layout = Literal["stargan", "matchgan"]
Network = StarGANGenerator | StarGANDiscriminator

FIRST_BLOCK = 9
"""Number of layers before the residual blocks."""


def load_reference_checkpoint(
    g_path: str | Path,
    d_path: str | Path,
    attributes: list[str] | list[list[str]],
    label_kind: LabelKind | list[LabelKind] = "multi_label",
    module_class: type[StarGAN] = StarGAN,
) -> StarGAN:
    """A module with the networks of the released code, of whatever size they are.

    Args:
        g_path: file ``ITERATION-G.ckpt``.
        d_path: file ``ITERATION-D.ckpt``.
        attributes: names in the order in which they were trained; the files do not have them.
        label_kind: see :class:`StarGAN`.
        module_class: ``MatchGAN`` for its files.

    Raises:
        FileNotFoundError: a file is missing.
        RuntimeError: a file cannot be read or holds something else.
        ValueError: the number of attributes is not that of the files.
    """
    generator, discriminator = read_reference_state(g_path), read_reference_state(d_path)
    try:
        first_g = generator.get("main.0.weight", generator.get("encoder.0.weight"))
        first_d, classes = discriminator["main.0.weight"], discriminator["conv2.weight"]
        assert first_g is not None, "no first layer of a generator"
        halvings = sum(v.dim() == 4 for name, v in discriminator.items() if "main." in name)
        sizes = {
            "image_size": classes.shape[-1] * 2**halvings,
            "in_channels": first_d.shape[1],
            "ngf": first_g.shape[0],
            "n_blocks": sum(name.endswith(".main.0.weight") for name in generator),
            "ndf": first_d.shape[0],
            "n_layers": halvings,
        }
    except (KeyError, AssertionError) as error:
        raise RuntimeError(
            f"{g_path} and {d_path} do not hold the networks of the released code ({error})"
        ) from error
    count = sum(map(len, name_sets(attributes)))
    if count != len(classes):
        raise ValueError(f"{d_path} was trained with {len(classes)} attributes, not {count}")
    module = module_class(attributes=attributes, label_kind=label_kind, **sizes)
    load_reference_state_dict(module.generator, generator)
    load_reference_state_dict(module.discriminator, discriminator)
    return module.eval()


def load_reference_state_dict(module: Network, state_dict: Mapping[str, Tensor]) -> None:
    """Loads a generator or discriminator of the released codes; running statistics are dropped.

    Args:
        module: a network of the same sizes.
        state_dict: in either layout, also as saved from ``DataParallel``.

    Raises:
        RuntimeError: names or shapes are not those of the network.
    """
    stored = {name.removeprefix("module."): value for name, value in state_dict.items()}
    encoder_blocks = {
        match[1] for name in stored if (match := re.match(r"encoder\.(\d+)\.main\.", name))
    }
    decoder_start = FIRST_BLOCK + len(encoder_blocks)
    ours = {}
    for name, value in stored.items():
        part, _, rest = name.partition(".")
        if rest.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        if part == "encoder":
            name = f"main.{rest}"
        elif part == "decoder":
            number, _, leaf = rest.partition(".")
            name = f"main.{int(number) + decoder_start}.{leaf}"
        elif part in module.reference_heads:
            name = f"{module.reference_heads[part]}.{rest}"
        ours[name] = value
    try:
        module.load_state_dict(ours)
    except RuntimeError as error:
        raise RuntimeError(
            f"the weights are not those of a {type(module).__name__} of this size; image_size, conv_dim, c_dim, "
            f"repeat_num and in_channels must be those of the released run ({error})"
        ) from error


def export_reference_state_dict(module: Network, layout: Layout = "stargan") -> dict[str, Tensor]:
    """Weights under the names of the released codes, which load them strictly.

    Args:
        module: a generator or discriminator.
        layout: of a generator; a discriminator has the same in both.

    Returns:
        New tensors; the running statistics that the released codes ask for are those of a new network (mean 0,
        variance 1).

    Raises:
        ValueError: unknown layout, or ``"matchgan"`` for an odd number of residual blocks, which that code cannot hold.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"unknown layout={layout!r}; choose one of {', '.join(get_args(Layout))}")
    theirs = {ours: name for name, ours in module.reference_heads.items()}
    blocks = sum(isinstance(part, ResidualBlock) for part in module.main)
    split = layout == "matchgan" and isinstance(module, StarGANGenerator)
    if split and blocks % 2:
        raise ValueError(
            f"the released MatchGAN has an even number of residual blocks, this generator has {blocks} "
            "(repeat_num)"
        )
    decoder_start = FIRST_BLOCK + blocks // 2

    exported: dict[str, Tensor] = {}
    for prefix, part in module.named_modules():
        state = {
            name: value.detach().clone() for name, value in part.named_parameters(recurse=False)
        }
        if isinstance(part, nn.InstanceNorm2d):
            state["running_mean"] = torch.zeros_like(part.weight)
            state["running_var"] = torch.ones_like(part.weight)
            state["num_batches_tracked"] = torch.tensor(0, device=part.weight.device)
        prefix = theirs.get(prefix, prefix)
        if split and prefix.startswith("main."):
            _, number, *rest = prefix.split(".")
            before = int(number) < decoder_start
            place = number if before else str(int(number) - decoder_start)
            prefix = ".".join(["encoder" if before else "decoder", place, *rest])
        exported |= {f"{prefix}.{name}": value for name, value in state.items()}
    return exported
