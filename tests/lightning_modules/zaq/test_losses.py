from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lightning_modules.zaq import losses
from lightning_modules.zaq.layer_weights import LayerWeightEMA
from lightning_modules.zaq.losses import (
    channel_relation,
    channel_relation_map,
    crm_distance,
    feature_discrepancy,
    layer_distances,
    output_discrepancy,
    spatial_relation,
    zaq_generator_loss,
    zaq_student_loss,
)


def features(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_relation_map_ignores_the_scale_of_a_channel(mode: Any) -> None:
    (feat,) = features((4, 3, 5, 5))
    found = channel_relation_map(feat, mode)
    assert found.shape == ((3, 3) if mode == "batch" else (4, 3, 3))
    torch.testing.assert_close(found, found.mT)
    assert found.abs().max() <= 1 + 1e-6
    scaled = feat * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
    torch.testing.assert_close(channel_relation_map(scaled, mode), found, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_dead_channels_have_no_relation_and_no_gradient(mode: Any) -> None:
    feat_p, feat_q = features((2, 3, 4, 4), (2, 3, 4, 4))
    feat_q[:, 1] = 0
    feat_q.requires_grad_()
    crm_distance(feat_p, feat_q, mode).backward()
    assert feat_q.grad is not None
    assert torch.isfinite(feat_q.grad).all()
    assert not feat_q.grad[:, 1].any()
    assert feat_q.grad[:, 0].any()
    assert not channel_relation_map(torch.zeros(2, 3, 4, 4), mode).any()


def test_half_precision_is_compared_in_float32() -> None:
    (feat,) = features((2, 3, 4, 4))
    half = feat.mul(1e-3).half()
    found = channel_relation_map(half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, channel_relation_map(feat), atol=2e-3, rtol=0)


def test_synchronised_map_is_that_of_the_global_batch() -> None:
    (feat,) = features((6, 3, 4, 4))
    other = feat[2:].transpose(0, 1).flatten(1)
    with (
        patch.object(losses.distributed, "is_initialized", return_value=True),
        patch.object(losses, "all_reduce", lambda gram: gram + other @ other.T),
    ):
        found = channel_relation_map(feat[:2], sync=True)
        alone = channel_relation_map(feat[:2])
    torch.testing.assert_close(found, channel_relation_map(feat))
    assert not torch.allclose(found, alone, atol=1e-2)


def test_spatial_relation_attends_from_every_position_to_all() -> None:
    (feat,) = features((2, 3, 2, 4))
    unit = torch.nn.functional.normalize(feat, dim=1).flatten(2)
    attention = (unit.mT @ unit).softmax(-1)
    expected = unit + 0.3 * unit @ attention.mT
    torch.testing.assert_close(spatial_relation(feat, 0.3).flatten(2), expected)


def test_channel_relation_prefers_what_is_least_similar() -> None:
    feat = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 4.0]]]).unsqueeze(-1)
    change = channel_relation(feat, 1.0) - channel_relation(feat, 0.0)
    assert change[0, 0, 1] > change[0, 0, 0], "the third channel is orthogonal to the first"


@pytest.mark.parametrize("kind", ["crm", "scrm", "gram"])
def test_distance_is_zero_for_equal_features_alone(kind: Any) -> None:
    feats = features((2, 3, 4, 4), (2, 5, 2, 2))
    others = features((2, 3, 4, 4), (2, 5, 2, 2), seed=1)
    assert not layer_distances(feats, feats, kind).any()
    assert (layer_distances(feats, others, kind) > 0.01).all()


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_gram_distance_is_a_mean_over_positions(mode: Any) -> None:
    feats_p, feats_q = features((2, 3, 4, 4)), features((2, 3, 4, 4), seed=1)
    found = layer_distances(feats_p, feats_q, "gram", mode)
    repeated = [[feat.repeat(3, 1, 2, 1) for feat in feats] for feats in (feats_p, feats_q)]
    torch.testing.assert_close(layer_distances(*repeated, "gram", mode), found)


def test_without_feature_loss_outputs_alone_count() -> None:
    feats_p, feats_q = features((2, 3, 4, 4)), features((2, 3, 4, 4), seed=1)
    logits = torch.zeros(2, 4), torch.ones(2, 4)
    assert zaq_student_loss(*logits, feats_p, feats_q, kind="none")["total"] == 1


def test_weights_are_uniform_for_crm_and_one_for_scrm() -> None:
    feats_p = features((2, 3, 4, 4), (2, 5, 2, 2))
    feats_q = features((2, 3, 4, 4), (2, 5, 2, 2), seed=1)
    first, second = layer_distances(feats_p, feats_q)
    torch.testing.assert_close(feature_discrepancy(feats_p, feats_q), (first + second) / 2)
    weights = torch.tensor([0.0, 1.0], requires_grad=True)
    weighted = feature_discrepancy(feats_p, feats_q, weights)
    torch.testing.assert_close(weighted, second)
    assert not weighted.requires_grad
    relations = layer_distances(feats_p, feats_q, "scrm")
    found = feature_discrepancy(feats_p, feats_q, kind="scrm")
    torch.testing.assert_close(found, relations.sum())


def test_several_outputs_count_equally() -> None:
    classes, boxes = torch.zeros(2, 7, 5), torch.zeros(2, 7, 4)
    found = output_discrepancy((classes, boxes), (classes + 1, boxes - 3))
    assert found == 2


def test_generator_raises_what_the_student_lowers() -> None:
    p, q = torch.randn(2, 4), torch.randn(2, 4)
    feats_p, feats_q = features((2, 3, 4, 4)), features((2, 3, 4, 4), seed=1)
    feats_q[0].requires_grad_()
    student = zaq_student_loss(p, q, feats_p, feats_q, alpha=0.5)
    generator = zaq_generator_loss(p, q, feats_p, feats_q, alpha=0.5, beta=0.2)
    expected = -student["total"] - 0.2 * feats_p[-1].abs().mean()
    torch.testing.assert_close(generator["total"], expected)
    assert not student["distances"].requires_grad
    assert student["distances"].shape == (1,)


def test_gradient_of_the_generator_passes_through_both_networks() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    through_p = zaq_generator_loss(x.sum((2, 3)), torch.zeros(2, 3), [x], [x.detach() + 1])
    (gradient_p,) = torch.autograd.grad(through_p["output"], x)
    through_q = zaq_generator_loss(torch.zeros(2, 3), x.sum((2, 3)), [x.detach()], [x + 1])
    (gradient_q,) = torch.autograd.grad(through_q["feature"], x)
    assert gradient_p.any()
    assert gradient_q.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: channel_relation_map(f[0], "image"), "unknown mode='image'"),
        (lambda f: layer_distances(f, f, "cosine"), "unknown kind='cosine'"),
        (lambda f: layer_distances(f, f[:1]), "2 feature maps of P and 1 of Q"),
        (lambda f: layer_distances([], []), "0 feature maps"),
        (lambda f: layer_distances(f, f[::-1]), "differ in their channels"),
        (lambda f: feature_discrepancy(f, f, torch.ones(3)), "3 layer weights for 2"),
        (lambda f: output_discrepancy(f[0], f), "they must agree"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(features((2, 3, 4, 4), (2, 5, 2, 2)))


# ------------------------------------------------------------------ layer weights
def test_weights_move_to_the_layer_that_differs_most() -> None:
    weights = LayerWeightEMA(3, momentum=0.5, temperature=0.1)
    for _ in range(20):
        found = weights.update(torch.tensor([0.1, 0.9, 0.2]))
    assert found.argmax() == 1
    assert found[1] > 0.99
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))


def test_mean_distances_of_an_epoch_are_in_the_state() -> None:
    weights = LayerWeightEMA(2)
    assert weights.mean_distances().tolist() == [0, 0]
    weights.accumulate(torch.tensor([1.0, 2.0], requires_grad=True))
    weights.accumulate(torch.tensor([3.0, 4.0]))
    copy = LayerWeightEMA(2)
    copy.load_state_dict(weights.state_dict())
    assert copy.mean_distances().tolist() == [2, 3]
    copy.reset()
    assert copy.mean_distances().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"num_layers": 2, "momentum": 1.5}, "momentum=1.5"),
        ({"num_layers": 2, "temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_weights(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerWeightEMA(**options)


def test_one_distance_per_layer() -> None:
    with pytest.raises(ValueError, match="for 2 feature layers"):
        LayerWeightEMA(2).update(torch.zeros(3))
