"""Normalising, resizing and fusing maps."""

import math

import cv2
import pytest
import torch

from lightning_modules.nn.maps import fuse_maps, normalize_map, upsample_map


def test_every_map_is_scaled_on_its_own() -> None:
    maps = torch.randn(2, 3, 4, 5) * torch.tensor([1.0, 100.0])[:, None, None, None]
    scaled = normalize_map(maps)
    assert (scaled.amin((-2, -1)) == 0).all()
    assert (scaled.amax((-2, -1)) == 1).all()
    assert torch.equal(scaled[1, 2], normalize_map(maps[1, 2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["minmax", "max"])
def test_maps_without_a_scale_are_zero(bad: float, method: str) -> None:
    maps = torch.rand(2, 4, 4)
    maps[0, 1, 2] = bad
    scaled = normalize_map(maps, method)  # type: ignore[arg-type]
    if method == "minmax" or bad > 0 or math.isnan(bad):
        assert (scaled[0] == 0).all()
    assert scaled[1].max() == 1
    assert (normalize_map(torch.full((3, 3), -2.0), method) == 0).all()  # type: ignore[arg-type]


def test_constant_map_gives_no_nan_gradient() -> None:
    maps = torch.ones(1, 3, 3, requires_grad=True)
    normalize_map(maps).sum().backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_max_ignores_negative_values() -> None:
    maps = torch.tensor([[-4.0, 1.0], [2.0, 4.0]])
    assert normalize_map(maps, "max").tolist() == [[0, 0.25], [0.5, 1]]


def test_precision_is_at_least_float32() -> None:
    maps = torch.linspace(0, 1, 400).reshape(20, 20)
    assert normalize_map(maps.bfloat16()).dtype == torch.float32
    assert normalize_map(maps.double()).dtype == torch.float64
    assert normalize_map(torch.arange(4).reshape(2, 2))[0, 1] == torch.tensor(1 / 3)


@pytest.mark.parametrize(
    ("mode", "opencv"), [("bicubic", cv2.INTER_CUBIC), ("bilinear", cv2.INTER_LINEAR)]
)
def test_resizing_equals_opencv(mode: str, opencv: int) -> None:
    maps = torch.rand(2, 14, 9, generator=torch.Generator().manual_seed(0))
    resized = upsample_map(maps, (56, 64), mode)  # type: ignore[arg-type]
    for ours, values in zip(resized, maps, strict=True):
        theirs = torch.from_numpy(cv2.resize(values.numpy(), (64, 56), interpolation=opencv))
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=0)


def test_any_number_of_leading_dimensions() -> None:
    maps = torch.rand(2, 3, 4, 4)
    assert upsample_map(maps, 8).shape == (2, 3, 8, 8)
    assert torch.equal(upsample_map(maps, (8, 6))[1, 2], upsample_map(maps[1, 2], (8, 6)))


def test_fusing() -> None:
    a, b = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
    assert fuse_maps([a, b]).tolist() == [[0.5, 1.0]]
    assert fuse_maps([a, b], "mean").tolist() == [[0.25, 0.75]]
    with pytest.raises(ValueError, match="one shape"):
        fuse_maps([a, b.T])
    with pytest.raises(ValueError, match="one or more"):
        fuse_maps([])
