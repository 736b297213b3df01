import pytest
import torch
from torch import nn

from lightning_modules.matchgan.classifier import AttributeClassifier, classifier_lr


def test_logits_of_small_images() -> None:
    torch.manual_seed(0)
    network = AttributeClassifier(3, dim=4, image_size=37, in_channels=1)
    assert network(torch.randn(2, 1, 37, 37)).shape == (2, 3)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [2, 2, 4, 4, 8, 8, 16, 16, 32, 32]
    assert network.hidden.in_features == 32
    assert all(
        layer.momentum == 0.1 for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)
    )
    assert (network.output.bias == 0).all()
    bound = (6 / (512 + 3)) ** 0.5
    assert 0.9 * bound < network.output.weight.abs().max() <= bound


def test_weight_decay_is_the_gradient_of_the_penalty_on_weights() -> None:
    network = AttributeClassifier(2, dim=2, image_size=32)
    decayed, rest = network.parameter_groups(1e-4)
    assert (decayed["weight_decay"], rest["weight_decay"]) == (1e-4, 0.0)
    assert len(decayed["params"]) == 12
    assert len(rest["params"]) == 2 * 10 + 2
    together = {id(p) for p in [*decayed["params"], *rest["params"]]}
    assert together == {id(p) for p in network.parameters()}
    assert all(p.dim() > 1 for p in decayed["params"])


def test_rate_ends_at_zero() -> None:
    assert classifier_lr(8, 1.0, 4) == 1.0
    assert classifier_lr(10, 1.0, 4) == pytest.approx(0.5**0.75)
    assert classifier_lr(12, 1.0, 4) == classifier_lr(100, 1.0, 4) == 0
    with pytest.raises(ValueError, match="epochs=0"):
        classifier_lr(0, 1.0, 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"n_outputs": 0}, "n_outputs=0"),
        ({"n_outputs": 1, "dim": 3}, "dim=3 must be even"),
        ({"n_outputs": 1, "dim": 0}, "dim=0"),
        ({"n_outputs": 1, "image_size": 31}, "image_size=31"),
    ],
)
def test_errors(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttributeClassifier(**sizes)
