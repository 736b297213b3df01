"""Keyed randomness: every draw is a function of (seed, purpose, position), never of what was drawn before.

No generator state is stored anywhere. A run that is interrupted and resumed at any batch therefore draws the same
numbers as one that was not.
"""

import hashlib
import os

import torch


def global_seed() -> int:
    """The seed of the run, as ``seed_everything`` recorded it (``PL_GLOBAL_SEED``), 0 without one."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def mix(*keys: int | str) -> int:
    """Hashes an ordered sequence of integers and strings to a seed in [0, 2**63)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keyed_generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator whose stream depends on the global seed and ``keys`` alone."""
    return torch.Generator(device=device).manual_seed(mix(global_seed(), *keys))
