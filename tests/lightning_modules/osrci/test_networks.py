from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_modules.osrci.losses import gradient_penalty
from lightning_modules.osrci.networks import (
    SCALES,
    Classifier32,
    Discriminator32,
    Encoder32,
    Generator32,
    fold_batch_norm,
)
from tests.processes import from_ranks, rank_file, run_ranks


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_lazy_branches_have_the_counts_of_the_parts_in_use() -> None:
    assert count(Encoder32(64)) == 1_072_832
    assert count(Generator32(64)) == 2_661_123
    assert count(Encoder32(64, scales=SCALES)) == 1_400_832
    assert count(Generator32(64, scales=SCALES)) == 7_037_699
    assert count(Encoder32(64, scales=(8,))) < count(Encoder32(64))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_every_parameter_of_a_single_scale_is_used(scale: int, norm: Any) -> None:
    encoder = Encoder32(4, scales=(scale,), width=3, norm=norm)
    generator = Generator32(4, scales=(scale,), width=3, norm=norm)
    z = encoder(torch.rand(2, 3, 32, 32))
    images = generator(z)
    images.sum().backward()
    assert z.shape == (2, 4 * scale**2)
    assert images.shape == (2, 3, 32, 32)
    assert 0 < images.min() <= images.max() < 1
    for network in (encoder, generator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name


@pytest.mark.parametrize("scale", SCALES)
def test_all_scales_in_one_network(scale: int) -> None:
    torch.manual_seed(0)
    encoder = Encoder32(8, scales=SCALES, width=2).eval()
    generator = Generator32(8, scales=SCALES, width=2).eval()
    z = encoder(torch.rand(2, 3, 32, 32), scale=scale)
    torch.testing.assert_close(z.norm(dim=1), torch.full((2,), float(scale)))
    assert generator(z, scale=scale).shape == (2, 3, 32, 32)


def test_encoder_normalises_as_told() -> None:
    torch.manual_seed(0)
    encoder = Encoder32(8, width=2, normalize="position").eval()
    code = encoder(torch.rand(2, 3, 32, 32)).view(2, 8, 16)
    torch.testing.assert_close(code.norm(dim=1), torch.ones(2, 16))
    encoder.normalize = "channel_group"
    code = encoder(torch.rand(2, 3, 32, 32)).view(2, 16, 8)
    torch.testing.assert_close(code.norm(dim=2), torch.ones(2, 16))


def test_initialisation() -> None:
    torch.manual_seed(0)
    network = Generator32(64, scales=SCALES)
    for layer in network.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            assert layer.weight.std().item() == pytest.approx(0.05, rel=0.05)
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25)
            assert not layer.bias.any()
        elif isinstance(layer, nn.Linear):  # PyTorch's uniform in +-1/sqrt(in)
            assert layer.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    assert network.to_image.bias is not None
    assert network.to_image.bias.abs().max() > 0


def test_dropout_sits_in_front_of_convolutions_1_4_and_7() -> None:
    order = [
        type(layer).__name__
        for layer in Classifier32(4, width=1).trunk.modules()
        if isinstance(layer, nn.Conv2d | nn.Dropout2d)
    ]
    assert order == ["Dropout2d", "Conv2d", "Conv2d", "Conv2d"] * 3
    network = Classifier32(4, width=2, dropout=1.0).train()
    # All colour channels dropped: the image cannot matter.
    with torch.no_grad():
        first, second = (network(torch.rand(2, 3, 32, 32)) for _ in range(2))
    assert torch.equal(first, second)


def test_classifier_pools() -> None:
    flat, averaged = Classifier32(5, width=4), Classifier32(5, width=4, pool="avg")
    logits, features = flat(torch.rand(2, 3, 28, 28), return_features=True)
    assert logits.shape == (2, 5)
    assert features.shape == (2, 32 * 4)
    logits, features = averaged(torch.rand(2, 3, 64, 64), return_features=True)
    assert features.shape == (2, 8)
    assert averaged.head.bias is None
    torch.testing.assert_close(logits, features @ averaged.head.weight.T)


def test_discriminator_appends_the_exponential_of_minus_the_batch_mean() -> None:
    torch.manual_seed(0)
    network = Discriminator32(3, width=2, norm="group").eval().double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    logits, features = network(images, return_features=True)
    mean = sum(features) / 4
    for b in range(4):
        row = torch.cat([features[b], torch.exp(-mean)])
        torch.testing.assert_close(logits[b], network.head.weight @ row + network.head.bias)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_per_sample_norms_make_samples_independent(norm: Any) -> None:
    torch.manual_seed(0)
    network = Classifier32(3, width=4, dropout=0.0, norm=norm).train()
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(network(images)[:1], network(images[:1]))


def test_discriminator_penalty_is_differentiable_with_group_norm() -> None:
    torch.manual_seed(0)
    network = Discriminator32(3, width=1, norm="group", dropout=0.0)
    images = torch.rand(2, 3, 32, 32)
    gradient_penalty(network, images, images.flip(0)).backward()
    last = network.head.weight.grad
    assert last is not None
    assert torch.isfinite(last).all()
    assert (last != 0).any()


@pytest.mark.parametrize("build", [Encoder32, Classifier32, Discriminator32])
def test_folding_changes_nothing_but_the_speed(build: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network = build(8, width=4)
    images = torch.rand(4, 3, 32, 32)
    for _ in range(3):
        network(images)  # moves the running statistics
    folded = fold_batch_norm(network)
    assert network.training
    assert not folded.training
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert any(isinstance(layer, nn.BatchNorm2d) for layer in network.modules())
    torch.testing.assert_close(folded(images), network.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Encoder32(8, scales=(3,)), "scales"),
        (lambda: Encoder32(8, scales=()), "scales"),
        (lambda: Generator32(8, scales=(4, 4)), "scales"),
        (lambda: Encoder32(8, width=0), "width"),
        (lambda: Generator32(8, width=0), "width"),
        (lambda: Generator32(0), "latent_size"),
        (lambda: Encoder32(0), "latent_size"),
        (lambda: Classifier32(0), "num_classes"),
        (lambda: Discriminator32(0), "num_classes"),
        (lambda: Classifier32(3, in_channels=0), "in_channels"),
        (lambda: Classifier32(3, norm="layer"), "norm"),  # type: ignore[arg-type]
        (lambda: Generator32(8, norm="layer"), "norm"),  # type: ignore[arg-type]
        (lambda: Classifier32(3, pool="max"), "pool"),  # type: ignore[arg-type]
        (lambda: Encoder32(8, normalize="row"), "normalize"),  # type: ignore[arg-type]
        (lambda: Encoder32(8, width=1)(torch.rand(1, 3, 32, 32), scale=8), "scale=8"),
        (lambda: Encoder32(8, scales=(2, 4), width=1)(torch.rand(1, 3, 32, 32)), "scale=None"),
        (lambda: Encoder32(8, width=1)(torch.rand(1, 3, 64, 64)), "64x64"),
        (lambda: Classifier32(3, width=1)(torch.rand(1, 3, 24, 32)), "24x32"),
        (lambda: Generator32(8, width=1)(torch.rand(1, 100)), "latents"),
        (lambda: Encoder32(3, width=1)(torch.rand(1, 3, 32, 32)), None),
    ],
)
def test_bad_arguments(make: Any, message: str | None) -> None:
    if message is None:  # 3 * 16 entries do have 16 chunks
        make()
        return
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ batch feature over processes
def penalised_gradients(network: Discriminator32, images: Tensor) -> Tensor:
    """Gradient of the losses of one discriminator step with respect to all weights."""
    alpha = torch.full((len(images),), 0.3, dtype=torch.float64)
    loss = network(images)[:, 0].mean()
    loss = loss + gradient_penalty(network, images, images.flip(3), alpha)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*network.parameters()])])


def small_discriminator(gather: bool) -> Discriminator32:
    torch.manual_seed(0)
    return Discriminator32(2, width=1, dropout=0.0, norm="group", gather_minibatch=gather).double()


def four_images() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()


def gathered_gradients(folder: Path) -> None:
    rank = dist.get_rank()
    mine = penalised_gradients(small_discriminator(True), four_images()[2 * rank : 2 * rank + 2])
    dist.all_reduce(mine)
    torch.save(mine / 2, rank_file(folder))


def test_gathered_batch_feature_equals_one_process(tmp_path: Path) -> None:
    whole = penalised_gradients(small_discriminator(True), four_images())
    halves = [
        penalised_gradients(small_discriminator(False), four_images()[i : i + 2]) for i in (0, 2)
    ]
    mean = torch.stack(halves).mean(0)
    assert not torch.allclose(whole, mean, rtol=1e-6)  # the test can tell

    run_ranks(gathered_gradients, tmp_path)
    for gathered in from_ranks(tmp_path):
        torch.testing.assert_close(gathered, whole, rtol=1e-9, atol=1e-12)
