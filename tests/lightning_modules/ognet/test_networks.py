import pytest
import torch

from lightning_modules.ognet.networks import OGNetDiscriminator, OGNetGenerator


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("size", [17, 20, 45])
def test_any_size_and_norm(norm: str, size: int) -> None:
    x = torch.rand(2, 3, size, size) * 2 - 1
    recon = OGNetGenerator(3, 2, norm)(x)  # type: ignore[arg-type]
    logits = OGNetDiscriminator(3, size, 2, norm)(recon)  # type: ignore[arg-type]
    assert recon.shape == x.shape
    assert recon.abs().max() <= 1
    assert logits.shape == (2,)


def test_group_norm_keeps_images_apart() -> None:
    x = torch.rand(3, 1, 20, 20)
    generator = OGNetGenerator(1, 4, "group")
    torch.testing.assert_close(generator(x)[:1], generator(x[:1]))


def test_names_are_those_of_the_released_code() -> None:
    generator, discriminator = OGNetGenerator(1, 2), OGNetDiscriminator(1, 20, 2)
    convolutions = {f"encoder.{i}.weight" for i in (0, 3, 6, 9)}
    norms = {f"encoder.{i}.running_mean" for i in (1, 4, 8, 11)}
    up = {f"decoder.{i}.weight" for i in (0, 3, 6, 9)}
    up |= {f"decoder.{i}.running_mean" for i in (1, 4, 7)}
    assert convolutions | norms | up <= generator.state_dict().keys()
    assert isinstance(generator.encoder[7], torch.nn.ReLU), "order swapped in layers 3 and 4"
    assert {
        f"discriminator.{i}.weight" for i in (0, 3, 6, 9, 12)
    } <= discriminator.state_dict().keys()
    assert {k for k in discriminator.state_dict() if "running_mean" in k} == {
        f"discriminator.{i}.running_mean" for i in (1, 4, 7)
    }


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0)])
def test_impossible_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        OGNetGenerator(*sizes)
