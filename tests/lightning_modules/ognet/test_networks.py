from pathlib import Path

import pytest
import torch

from lightning_modules.ognet.module import load_reference_checkpoint
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


def released(folder: Path, prefix: str = "") -> tuple[Path, Path]:
    torch.manual_seed(0)
    networks = {"g": OGNetGenerator(1, 2), "d": OGNetDiscriminator(1, 45, 2)}
    paths = []
    for name, network in networks.items():
        state = {prefix + key: value for key, value in network.state_dict().items()}
        paths.append(folder / f"{name}.tar")
        torch.save({"epoch": 3, f"{name}_model_state_dict": state}, paths[-1])
    return paths[0], paths[1]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_released_checkpoints_load(prefix: str, tmp_path: Path) -> None:
    g_path, d_path = released(tmp_path, prefix)
    module = load_reference_checkpoint(g_path, d_path)
    stored = torch.load(d_path, weights_only=True)["d_model_state_dict"]
    for name in ("discriminator", "tuned_discriminator"):
        state = getattr(module, name).state_dict()
        assert all(
            torch.equal(state[key.removeprefix(prefix)], value) for key, value in stored.items()
        )
    images = torch.rand(2, 1, 45, 45)
    scores = module.anomaly_scores(images)
    recon = module.generator(images * 2 - 1)
    torch.testing.assert_close(scores["ognet"], module.tuned_discriminator(recon).detach())


def test_what_is_no_released_checkpoint(tmp_path: Path) -> None:
    g_path, d_path = released(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no\.tar"):
        load_reference_checkpoint(tmp_path / "no.tar")
    with pytest.raises(RuntimeError, match="no d_model_state_dict"):
        load_reference_checkpoint(g_path)
    with pytest.raises(RuntimeError, match="images of 28 pixels"):
        load_reference_checkpoint(g_path, d_path, image_size=28)
    stored = torch.load(g_path, weights_only=True)
    stored["g_model_state_dict"].pop("encoder.3.weight")
    torch.save(stored, g_path)
    with pytest.raises(RuntimeError, match=r"encoder\.3\.weight"):
        load_reference_checkpoint(g_path, d_path)
    (tmp_path / "text.tar").write_text("x")
    with pytest.raises(RuntimeError, match="cannot be read"):
        load_reference_checkpoint(tmp_path / "text.tar")


@pytest.mark.parametrize("sizes", [(0, 4), (1, 0)])
def test_impossible_sizes(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="=0 must be at least 1"):
        OGNetGenerator(*sizes)
