from typing import Any

import pytest
import torch

from lightning_modules.nn.pixels import to_uint8


def test_bytes_survive() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels)


@pytest.mark.parametrize(("rounding", "byte"), [("truncate", 127), ("round", 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_between_bytes(rounding: Any, byte: int, dtype: torch.dtype) -> None:
    assert to_uint8(torch.tensor([[0.001]], dtype=dtype), rounding).item() == byte


def test_outside_the_range() -> None:
    assert to_uint8(torch.tensor([-3.0, 1.01])).tolist() == [0, 255]


def test_unknown_rounding() -> None:
    with pytest.raises(ValueError, match="rounding='floor'"):
        to_uint8(torch.zeros(1), "floor")  # type: ignore[arg-type]
