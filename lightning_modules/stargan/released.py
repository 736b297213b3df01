"""State dicts in the layouts of the released codes of StarGAN and of MatchGAN, which is a fork of it.

StarGAN's generator is one sequence ``main``; MatchGAN cuts it in the middle of the residual blocks into ``encoder`` and
``decoder``. Heads of the discriminators are ``conv1``, ``conv2`` and, for MatchGAN, ``conv3``. Instance norms come with
running statistics, which the originals never use.
"""

import re
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_modules.stargan.networks import (
    ResidualBlock,
    StarGANDiscriminator,
    StarGANGenerator,
)

Layout = Literal["stargan", "matchgan"]
Network = StarGANGenerator | StarGANDiscriminator

FIRST_BLOCK = 9
"""Number of layers before the residual blocks."""


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
