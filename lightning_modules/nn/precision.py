"""Full floats where a reduced precision would not do."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The values as float32, or as float64 where they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
