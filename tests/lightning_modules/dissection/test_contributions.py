import pytest
import torch

from lightning_modules.dissection.contributions import (
    REFERENCE_SIZES,
    activation_iou,
    contributing_units,
    copy_paste_outcomes,
    copy_paste_units,
    feature_correlation,
    logit_margin_change,
    paste,
    paste_grid,
)

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(4, 10, generator=GENERATOR)


@pytest.mark.parametrize("alpha", [0.05, 0.21])
def test_outstanding_weights(alpha: float) -> None:
    high, low = contributing_units(WEIGHT, alpha)
    assert torch.equal(high, WEIGHT.double() > torch.quantile(WEIGHT.double(), 1 - alpha))
    assert torch.equal(low, WEIGHT.double() < torch.quantile(WEIGHT.double(), alpha))
    high, low = contributing_units(WEIGHT, alpha, "unit")
    limits = torch.quantile(WEIGHT.double(), torch.tensor([alpha, 1 - alpha]).double(), dim=1)
    assert torch.equal(high, limits[1][:, None] < WEIGHT)
    assert torch.equal(low, limits[0][:, None] > WEIGHT)


def test_kernels_are_averaged() -> None:
    kernels = WEIGHT[:, :, None, None] + torch.tensor([-1.0, 1.0])
    for ours, expected in zip(
        contributing_units(kernels, 0.2), contributing_units(WEIGHT, 0.2), strict=True
    ):
        assert torch.equal(ours, expected)


def test_correlation_with_logits() -> None:
    features = torch.randn(30, 5, generator=GENERATOR)
    features[:, 2] = 1
    logits = features @ torch.randn(5, 3, generator=GENERATOR)
    found = feature_correlation(features, logits)
    expected = torch.corrcoef(torch.cat([features, logits], 1).T)[5:, :5].double()
    assert found.shape == (3, 5)
    assert (found[:, 2] == 0).all()
    keep = [0, 1, 3, 4]
    torch.testing.assert_close(found[:, keep], expected[:, keep], atol=1e-5, rtol=0)


def test_larger_maps_are_averaged() -> None:
    small = torch.rand(3, 2, 2, 2, generator=GENERATOR)
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert feature_correlation(large, small).diag().tolist() == pytest.approx([1, 1])
    levels = torch.tensor([0.5, 0.5])
    found = activation_iou(large, small, levels, levels)
    assert found.diag().tolist() == pytest.approx([1, 1])
    one, two = (small > 0.5).transpose(0, 1).flatten(1)
    assert found[0, 1] == pytest.approx((one & two).sum().item() / (one | two).sum().item())
    assert activation_iou(large, small, levels + 9, levels + 9).tolist() == [[0, 0], [0, 0]]


def test_margin_change_sums_to_that_of_the_logits() -> None:
    before, after = torch.rand(2, 10, generator=GENERATOR)
    change = logit_margin_change(WEIGHT, before, after, 1, 3)
    margins = [WEIGHT @ x for x in (before, after)]
    expected = (margins[1][3] - margins[1][1]) - (margins[0][3] - margins[0][1])
    assert change.sum().item() == pytest.approx(expected.item(), abs=1e-5)
    units = copy_paste_units(WEIGHT, 1, 3, 4)
    assert units == (WEIGHT[3] - WEIGHT[1]).argsort(descending=True)[:4].tolist()
    with pytest.raises(ValueError, match="target=4 is none of the 4 classes"):
        copy_paste_units(WEIGHT, 1, 4, 2)


def test_outcomes() -> None:
    found = copy_paste_outcomes(["t", "s", "p", "x"], "s", "t", "p")
    assert found == {"success": 0.25, "failure": 0.5, "partial_success": 0.25}
    assert copy_paste_outcomes([2, 0], 0, 2, 2)["success"] == 0.5
    with pytest.raises(ValueError, match="no predictions"):
        copy_paste_outcomes([], "s", "t", None)


def test_paste_cuts_what_hangs_over() -> None:
    image = torch.zeros(3, 4, 5)
    patch = torch.ones(4, 3, 2)
    assert paste(image, patch, 4, -1)[0].int().tolist() == [
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert torch.equal(paste(image, patch, -2, 0), image)
    numbered = torch.ones(4, 3, 2)
    numbered[:3] = torch.arange(1.0, 7).view(3, 2) / 10
    assert paste(image, numbered, 4, -1)[0, :2, 4].tolist() == pytest.approx([0.3, 0.5])
    assert paste(image, numbered, -1, 2)[0, 2:, 0].tolist() == pytest.approx([0.2, 0.4])
    assert torch.equal(paste(image, patch, 0, 4), image)
    patch[3] = 0.25
    assert paste(image, patch, 0, 0)[1, 0, 0] == 0.25
    assert not image.any()


def test_grid() -> None:
    assert REFERENCE_SIZES == (73, 112, 168, 224, 336, 448)
    grid = paste_grid(torch.zeros(3, 8, 8), torch.ones(4, 5, 5), (-2, 3), (2, 4))
    assert grid.shape == (8, 3, 8, 8)
    # By size, then x, then y.
    assert grid[:, 0].flatten(1).sum(1).round().tolist() == [0, 0, 0, 4, 4, 8, 8, 16]
    assert grid[6, 0, 0, 3] > 0
    with pytest.raises(ValueError, match=r"\[4, h, w\]"):
        paste_grid(torch.zeros(3, 8, 8), torch.ones(3, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((WEIGHT, 0.5), "alpha=0.5"),
        ((WEIGHT, 0.1, "class"), "scope='class'"),
        ((WEIGHT[0],), r"must be \[K, U\]"),
    ],
)
def test_impossible_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contributing_units(*arguments)


def test_other_images() -> None:
    with pytest.raises(ValueError, match="3 and 2 images"):
        feature_correlation(torch.zeros(3, 1), torch.zeros(2, 1))
