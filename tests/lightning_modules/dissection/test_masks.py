import pytest
import torch

from lightning_modules.dissection.masks import (
    label_layers,
    netdissect_normalize,
    rasterize_concepts,
    unit_masks,
    upsample_activations,
)

RECORDS = [
    {"object": [[[1, 1], [0, 2]]], "part": [[[3, 0], [0, 0]], [[0, 3], [1, 0]]], "scene": [9, 0]},
    {"object": [[[2, 2], [2, 2]]], "scene": [2]},
    {},
]


def test_channels_and_categories_are_one_concept() -> None:
    labels, masks = rasterize_concepts(RECORDS, (2, 2))
    assert labels == [1, 2, 3, 9]
    assert masks[0].int().tolist() == [[[1, 1], [1, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]]
    assert masks[2, 0].int().tolist() == [[1, 1], [0, 0]]
    assert masks[3].flatten(1).sum(1).tolist() == [4, 0, 0]
    assert masks[1].flatten(1).sum(1).tolist() == [1, 4, 0]


def test_layers_are_padded_with_nothing() -> None:
    layers = label_layers(RECORDS, (2, 2))
    assert layers.shape == (3, 5, 2, 2)
    assert not layers[2].any()
    assert label_layers([], (2, 2)).shape == (0, 0, 2, 2)


def test_map_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"the object map of image 0 has size \(2, 2\)"):
        rasterize_concepts(RECORDS, (4, 4))


def test_units_fire_strictly_above_their_threshold() -> None:
    activations = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])
    masks = unit_masks(activations, torch.tensor([1.0, 0.0]), (1, 2))
    assert masks.shape == (2, 1, 1, 2)
    assert masks.flatten(1).tolist() == [[False, True], [False, False]]


def test_upsampled_before_the_threshold() -> None:
    activations = torch.tensor([[[[0.0, 4.0]]]])
    # Half-pixel centres: 0, 1, 3, 4.
    assert unit_masks(activations, torch.tensor([0.5]), (1, 4)).flatten().tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_size_is_height_and_width() -> None:
    assert upsample_activations(torch.zeros(2, 3, 4, 5), (7, 9)).shape == (2, 3, 7, 9)


def test_receptive_field_puts_activations_on_their_centres() -> None:
    activations = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    # A mask as large as the input: pixel 31 + 32 i is the centre of activation i.
    field = {"image_size": (63, 96), "scale": 32, "offset": 31}
    mapped = upsample_activations(activations, (63, 96), "receptive_field", **field)[0, 0, 31]
    assert mapped[[31, 63, 95]].tolist() == pytest.approx([1, 2, 3], abs=1e-5)
    assert mapped[47] == pytest.approx(1.5, abs=1e-5)
    assert mapped[0] == pytest.approx(1 / 32, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "nearest"}, "mode='nearest' must be"),
        ({"mode": "receptive_field"}, "needs image_size, scale and offset"),
    ],
)
def test_bad_upsampling(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upsample_activations(torch.zeros(1, 1, 2, 2), (4, 4), **options)


def test_one_threshold_per_unit() -> None:
    with pytest.raises(ValueError, match=r"U thresholds, not \(2,\)"):
        unit_masks(torch.zeros(1, 3, 2, 2), torch.zeros(2), (4, 4))


def test_normalisation_is_of_the_channel() -> None:
    image = torch.tensor([124.6901, 118.6897, 109.5388 + 57.12]).expand(2, 3, 3)
    out = netdissect_normalize(image)
    assert out.shape == (3, 2, 3)
    assert out[:, 0, 0].tolist() == pytest.approx([0, 0, 1], abs=1e-5)
    with pytest.raises(ValueError, match="must end in"):
        netdissect_normalize(torch.zeros(3, 2, 2))
