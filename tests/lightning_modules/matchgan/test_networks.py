import pytest
import torch

from lightning_modules.matchgan.networks import MatchGANDiscriminator
from lightning_modules.stargan.networks import StarGANDiscriminator


@pytest.mark.parametrize(
    ("sizes", "count", "match"),
    [
        ({"image_size": 256}, 45_016_000, (2, 4096, 4, 4)),
        ({"conv_dim": 32}, 11_223_520, (2, 2048, 2, 2)),
        ({"image_size": 64, "c_dim": 8, "repeat_num": 5}, None, (2, 2048, 2, 2)),
    ],
)
def test_parameters(sizes: dict[str, int], count: int | None, match: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network, plain = MatchGANDiscriminator(**sizes), StarGANDiscriminator(**sizes)
    parameters = sum(p.numel() for p in network.parameters())
    assert network.match_head.weight.shape == match
    assert (
        parameters == sum(p.numel() for p in plain.parameters()) + network.match_head.weight.numel()
    )
    assert count in (None, parameters)


def test_parameter_order_and_head_without_symmetry() -> None:
    torch.manual_seed(0)
    network = MatchGANDiscriminator(8, 2, 3, 2, in_channels=1)
    names = [name for name, _ in network.named_parameters()]
    assert names[-3:] == ["source_head.weight", "class_head.weight", "match_head.weight"]
    first, second = torch.randn(2, 3, 1, 8, 8)
    logits = network.match(first, second)
    assert logits.shape == (3, 2)
    assert not torch.allclose(logits, network.match(second, first))
    assert torch.equal(
        logits, network.match_features(network.features(first), network.features(second))
    )
    assert network(first)[1].shape == (3, 3)
    with torch.no_grad():
        network.match_head.weight[:, :4] = 0  # what is left looks at the other image alone
    assert torch.equal(network.match(first, second), network.match(first + 1, second))
    assert not torch.equal(network.match(first, second), network.match(first, second + 1))


def test_errors_are_those_of_stargan() -> None:
    with pytest.raises(ValueError, match="halvings"):
        MatchGANDiscriminator(32)
