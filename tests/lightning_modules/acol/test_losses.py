"""Losses and erasing beyond the golden cases."""

import pytest
import torch

from lightning_modules.acol.losses import (
    erase_features,
    erase_mask,
    rest_cross_entropy,
    select_class_maps,
)


def test_complement_is_the_logarithm_of_the_rest() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64) * 3
    target = torch.tensor([0, 1, 2, 3, 0])
    probability = logits.softmax(1)[range(5), target]
    loss = rest_cross_entropy(logits, target, "none", "complement")
    torch.testing.assert_close(loss, -(1 - probability).log())
    certain = torch.tensor([[100.0, 0.0, 0.0]])
    assert rest_cross_entropy(certain, torch.tensor([0]), kind="complement") == pytest.approx(
        100 - torch.tensor(2.0).log().item()
    )


def test_half_precision_logits_do_not_overflow() -> None:
    logits = torch.tensor([[60.0, -60.0, 3.0]], dtype=torch.float16)
    loss = rest_cross_entropy(logits, torch.tensor([0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(60 + 57 / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rests"}, "unknown kind='rests'; choose one of rest, complement"),
        ({"reduction": "avg"}, "unknown reduction='avg'; choose one of mean, sum, none"),
    ],
)
def test_unknown_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rest_cross_entropy(torch.zeros(1, 3), torch.tensor([0]), **options)  # type: ignore[arg-type]


def test_one_class_has_no_rest() -> None:
    with pytest.raises(ValueError, match="at least 2 classes"):
        rest_cross_entropy(torch.zeros(1, 1), torch.tensor([0]))


def test_threshold_is_compared_in_single_precision() -> None:
    # 0.6 is no bfloat16: compared in that type, 0.6016 would equal it.
    above = torch.tensor([[[0.6016]]]).bfloat16()
    assert not erase_mask(above, 0.6, inclusive=False).item()


def test_erasing_leaves_no_trace_of_what_was_there() -> None:
    features = torch.full((1, 2, 1, 2), torch.inf)
    erased = erase_features(features, torch.tensor([[[0.9, 0.1]]]), 0.6)
    assert erased.tolist() == [[[[0.0, torch.inf]], [[0.0, torch.inf]]]]


def test_maps_of_several_classes() -> None:
    maps = torch.randn(2, 3, 4, 5)
    classes = torch.tensor([[2, 0], [1, 1]])
    several = select_class_maps(maps, classes)
    assert several.shape == (2, 2, 4, 5)
    for column in (0, 1):
        assert torch.equal(several[:, column], select_class_maps(maps, classes[:, column]))
    assert torch.equal(several[1, 0], maps[1, 1])
