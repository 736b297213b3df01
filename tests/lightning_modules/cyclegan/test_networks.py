from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.cyclegan.networks import (
    PatchDiscriminator,
    PixelDiscriminator,
    ResnetGenerator,
    build_generator,
    init_weights,
    pad_to_multiple,
    translate_any_size,
)

NORMS = ["batch", "group", "instance", "none"]


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# ------------------------------------------------------------------ architecture
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["resnet_1blocks", "resnet_3blocks", "unet_4", "unet_32"])
def test_generators_keep_the_size(name: str, norm: Any) -> None:
    network = build_generator(name, 2, 3, 4, norm, dropout=True)
    translated = network(torch.rand(2, 2, 32, 64) * 2 - 1)
    assert translated.shape == (2, 3, 32, 64)
    assert translated.abs().max() <= 1


def test_sizes_of_the_released_networks() -> None:
    # unet_128 with batch norm, discriminators by depth and norm.
    assert count(build_generator("unet_128", norm="batch")) == 41_828_995
    assert count(build_generator("resnet_6blocks", norm="batch")) == 7_841_411
    depths = {n: count(PatchDiscriminator(n_layers=n)) for n in (2, 4, 5)}
    assert depths == {2: 662_977, 4: 6_959_553, 5: 11_154_369}
    assert count(PixelDiscriminator(norm="batch")) == 8_832


def test_where_unets_drop() -> None:
    def dropouts(name: str) -> int:
        network = build_generator(name, ngf=1, dropout=True)
        return sum(isinstance(layer, nn.Dropout) for layer in network.modules())

    assert [dropouts(f"unet_{size}") for size in (32, 128, 256)] == [0, 2, 3]


@pytest.mark.parametrize(("n_layers", "side"), [(1, 16), (2, 34), (3, 70), (4, 142), (5, 286)])
def test_receptive_field(n_layers: int, side: int) -> None:
    assert PatchDiscriminator(ndf=1, n_layers=n_layers).receptive_field == side


def test_receptive_field_is_what_a_judgement_depends_on() -> None:
    network = PatchDiscriminator(1, 2, 2, norm="none").double()
    image = torch.rand(1, 1, 80, 80, dtype=torch.float64, requires_grad=True)
    judgements = network(image)
    centre = judgements.shape[-1] // 2
    (gradient,) = torch.autograd.grad(judgements[0, 0, centre, centre], image)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == network.receptive_field == 34


@pytest.mark.parametrize("norm", NORMS)
def test_convolutions_have_a_bias_unless_an_affine_norm_follows(norm: Any) -> None:
    for network in (
        build_generator("resnet_1blocks", ngf=2, norm=norm),
        PatchDiscriminator(norm=norm),
    ):
        biased = [m.bias is not None for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert biased[-1]
        assert all(biased) == (norm in ("instance", "none"))


def test_no_norm_keeps_the_numbers_of_the_layers() -> None:
    keys = [list(PatchDiscriminator(norm=norm).state_dict()) for norm in ("none", "instance")]
    assert keys[0] == keys[1]


def test_instance_norm_has_no_state_and_keeps_images_apart() -> None:
    network = build_generator("resnet_1blocks", ngf=4)
    assert not list(network.buffers())
    x = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(network(x)[:1], network(x[:1]))
    assert torch.equal(network.eval()(x), network.train()(x))


def test_resize_conv_has_the_released_layout_but_for_the_two_layers() -> None:
    plain, resized = (
        build_generator("resnet_2blocks", ngf=4, upsample=upsample)
        for upsample in ("deconv", "resize_conv")
    )
    assert resized(torch.zeros(1, 3, 16, 24)).shape == (1, 3, 16, 24)
    assert not [m for m in resized.modules() if isinstance(m, nn.ConvTranspose2d)]
    own = {key for key in resized.state_dict() if key not in plain.state_dict()}
    assert own == {f"model.{i}.2.{name}" for i in (12, 15) for name in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet_0blocks", {}, "unknown generator 'resnet_0blocks'; choose resnet_Nblocks"),
        ("resnet_9block", {}, "unknown generator"),
        ("unet_100", {}, "power of two"),
        ("unet_2", {}, "power of two"),
        ("unet_32", {"upsample": "resize_conv"}, "choices of resnet_Nblocks"),
        ("unet_32", {"checkpoint_blocks": True}, "choices of resnet_Nblocks"),
        ("resnet_1blocks", {"upsample": "nearest"}, "choose one of deconv, resize_conv"),
        ("resnet_1blocks", {"norm": "layer"}, "unknown norm='layer'"),
        ("resnet_1blocks", {"ngf": 0}, "ngf=0 must be at least 1"),
        ("unet_32", {"in_channels": 0}, "in_channels=0 must be at least 1"),
    ],
)
def test_impossible_generators(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_generator(name, **options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_smallest_image_of_a_discriminator(norm: Any, n_layers: int) -> None:
    network = PatchDiscriminator(3, 2, n_layers, norm)
    side = network.smallest_image
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(ValueError, match=rf"at least {side}; take fewer layers"):
        network(torch.zeros(1, 3, side, side - 1))
    # The layers themselves could not take it either.
    with pytest.raises((RuntimeError, ValueError)):
        network.model(torch.zeros(1, 3, side, side - 1))


def test_smallest_images_of_the_generators() -> None:
    network = build_generator("resnet_1blocks", ngf=2)
    assert network(torch.zeros(1, 3, 5, 6)).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="4x9 are too small, both sides must be at least 5"):
        network(torch.zeros(1, 3, 4, 9))
    with pytest.raises(ValueError, match="33x32 do not fit unet_32"):
        build_generator("unet_32", ngf=2)(torch.zeros(1, 3, 33, 32))


# ------------------------------------------------------------------ checkpointing of blocks
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_recomputed_blocks_give_the_same_step(norm: Any, training: bool) -> None:
    torch.manual_seed(0)
    plain = build_generator("resnet_2blocks", ngf=4, norm=norm, dropout=True).train(training)
    thrifty = deepcopy(plain)
    assert isinstance(thrifty, ResnetGenerator)
    thrifty.checkpoint_blocks = True
    runs = []
    hook = thrifty.model[10].register_forward_pre_hook(lambda *args: runs.append(1))
    x = torch.rand(2, 3, 16, 16)
    for network in (plain, thrifty):
        torch.manual_seed(1)  # of dropout
        network(x).square().mean().backward()
    hook.remove()
    assert len(runs) == 2, "nothing was computed again"
    for ours, theirs in zip(thrifty.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    for name, value in plain.state_dict().items():
        assert torch.equal(thrifty.state_dict()[name], value), name
    with torch.no_grad():
        assert not thrifty(x).requires_grad


# ------------------------------------------------------------------ any size
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 7), (8, 8), (13, 33), (40, 3)])
@pytest.mark.parametrize("name", ["resnet_1blocks", "unet_8", "unet_32"])
def test_translations_have_the_size_of_the_image(name: str, size: tuple[int, int]) -> None:
    network = build_generator(name, 3, 1, 2)
    x = torch.rand(2, 3, *size, requires_grad=True)
    translated = translate_any_size(network, x)
    assert translated.shape == (2, 1, *size)
    translated.sum().backward()
    assert x.grad is not None
    if min(size) > 1:
        assert x.grad.abs().sum() > 0


def test_fitting_sizes_are_not_touched_and_wrappers_are_seen_through() -> None:
    network = build_generator("unet_16", ngf=2)
    x = torch.rand(1, 3, 16, 32)
    assert torch.equal(translate_any_size(nn.Sequential(network), x), network(x))
    assert pad_to_multiple(x, 16)[0] is x


def test_a_foreign_generator_names_its_sizes() -> None:
    seen = []
    network = nn.Identity()
    network.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2:]))
    x = torch.rand(1, 3, 5, 7)
    with pytest.raises(ValueError, match="Identity does not say"):
        translate_any_size(network, x)
    assert torch.equal(translate_any_size(network, x, multiple=6), x)
    assert seen == [(6, 12)]


@pytest.mark.parametrize("size", [(5, 9), (7, 10)])
def test_padding_is_reflection(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size)
    padded, original = pad_to_multiple(x, 8)
    height, width = (-(-side // 8) * 8 for side in size)
    pads = (0, width - size[1], 0, height - size[0])
    torch.testing.assert_close(padded, nn.functional.pad(x, pads, mode="reflect"))
    assert torch.equal(padded[(..., *original)], x)


def test_padding_mirrors_small_images_again() -> None:
    padded, _ = pad_to_multiple(torch.tensor([[0.0, 1.0, 2.0]]), 8)
    assert padded[0].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert torch.equal(padded, padded[:1].expand(8, 8))
    assert pad_to_multiple(torch.zeros(1, 4, 4), 4, at_least=5)[0].shape == (1, 8, 8)


# ------------------------------------------------------------------ initial weights
@pytest.mark.parametrize(
    ("init", "std"),
    [
        ("normal", 0.1),
        ("xavier", 0.1 * (2 / (2 * 64 * 9)) ** 0.5),
        ("kaiming", (2 / (64 * 9)) ** 0.5),
        ("orthogonal", 0.1 / (64 * 9) ** 0.5),
    ],
)
def test_initial_weights(init: Any, std: float) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.InstanceNorm2d(64))
    init_weights(layers, init, 0.1)
    weight, scale = layers[0].weight, layers[1].weight
    assert isinstance(weight, Tensor)
    assert isinstance(scale, Tensor)
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert scale.mean().item() == pytest.approx(1, abs=0.05)
    assert scale.std().item() == pytest.approx(0.1, rel=0.25)
    assert not layers[0].bias.any()  # type: ignore[operator]
    assert not layers[1].bias.any()  # type: ignore[operator]


def test_unknown_init() -> None:
    with pytest.raises(ValueError, match="choose one of normal, xavier, kaiming, orthogonal"):
        init_weights(nn.Linear(1, 1), "uniform")  # type: ignore[arg-type]
