from typing import Any

import pytest
import torch

from lightning_modules.matchgan.networks import MatchGANDiscriminator
from lightning_modules.stargan.networks import StarGANDiscriminator, StarGANGenerator
from lightning_modules.stargan.released import (
    export_reference_state_dict,
    load_reference_state_dict,
)


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("layout", ["stargan", "matchgan"])
@pytest.mark.parametrize("repeat_num", [0, 2, 6])
def test_generator_round_trip(layout: Any, repeat_num: int) -> None:
    torch.manual_seed(0)
    first, second = (StarGANGenerator(2, 3, repeat_num) for _ in range(2))
    state = export_reference_state_dict(first, layout)
    assert not equal(first, second)
    load_reference_state_dict(second, {f"module.{name}": value for name, value in state.items()})
    assert equal(first, second)
    state["main.0.weight" if layout == "stargan" else "encoder.0.weight"].zero_()
    assert equal(first, second)


def test_names_of_the_generators() -> None:
    generator = StarGANGenerator(2, 3, 6)
    stargan = export_reference_state_dict(generator)
    assert {
        "main.9.main.0.weight",
        "main.14.main.4.bias",
        "main.15.weight",
        "main.18.weight",
    } <= set(stargan)
    assert stargan["main.21.weight"].shape == (3, 2, 7, 7)
    assert stargan["main.1.running_mean"].tolist() == [0, 0]
    assert stargan["main.10.main.1.running_var"].tolist() == [1] * 8
    assert stargan["main.1.num_batches_tracked"].item() == 0
    assert len(stargan) == 52 + 3 * 17
    matchgan = export_reference_state_dict(generator, "matchgan")
    encoder = sum(
        value.numel()
        for name, value in matchgan.items()
        if name.startswith("encoder") and "run" not in name
    )
    assert matchgan["decoder.0.main.0.weight"].equal(stargan["main.12.main.0.weight"])
    assert matchgan["decoder.3.weight"].equal(stargan["main.15.weight"])
    assert "encoder.11.main.0.weight" in matchgan
    assert "encoder.12.main.0.weight" not in matchgan
    assert encoder > 0


@pytest.mark.parametrize("kind", [StarGANDiscriminator, MatchGANDiscriminator])
def test_discriminator_round_trip(kind: Any) -> None:
    torch.manual_seed(0)
    first, second = (kind(8, 2, 3, 2) for _ in range(2))
    state = export_reference_state_dict(first)
    heads = {"conv1.weight", "conv2.weight", "conv3.weight"}
    trunk = {"main.0.weight", "main.0.bias", "main.2.weight", "main.2.bias"}
    assert set(state) == trunk | (
        heads if kind is MatchGANDiscriminator else heads - {"conv3.weight"}
    )
    load_reference_state_dict(second, state)
    assert equal(first, second)


def test_weights_of_another_network_are_an_error() -> None:
    state = export_reference_state_dict(StarGANGenerator(2, 3, 1))
    for other in (
        StarGANGenerator(2, 4, 1),
        StarGANGenerator(2, 3, 2),
        StarGANDiscriminator(8, 2, 3, 2),
    ):
        with pytest.raises(
            RuntimeError, match=f"not those of a {type(other).__name__} of this size"
        ):
            load_reference_state_dict(other, state)
    discriminator = export_reference_state_dict(MatchGANDiscriminator(8, 2, 3, 2))
    with pytest.raises(RuntimeError, match=r"conv3\.weight"):
        load_reference_state_dict(StarGANDiscriminator(8, 2, 3, 2), discriminator)


def test_export_errors() -> None:
    with pytest.raises(ValueError, match="unknown layout='cyclegan'"):
        export_reference_state_dict(StarGANGenerator(2, 3, 2), "cyclegan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this generator has 3"):
        export_reference_state_dict(StarGANGenerator(2, 3, 3), "matchgan")
