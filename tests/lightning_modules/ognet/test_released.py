from pathlib import Path

import pytest
import torch

from lightning_modules.ognet import load_reference_checkpoint
from lightning_modules.ognet.networks import OGNetDiscriminator, OGNetGenerator


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
    with pytest.raises(RuntimeError, match="network under d_model_state_dict"):
        load_reference_checkpoint(g_path)
    with pytest.raises(RuntimeError, match="images of 28 pixels"):
        load_reference_checkpoint(g_path, d_path, image_size=28)
    stored = torch.load(g_path, weights_only=True)
    stored["g_model_state_dict"].pop("encoder.3.weight")
    torch.save(stored, g_path)
    with pytest.raises(RuntimeError, match=r"encoder\.3\.weight"):
        load_reference_checkpoint(g_path, d_path)
    (tmp_path / "text.tar").write_text("x")
    with pytest.raises(RuntimeError, match="is not a readable checkpoint"):
        load_reference_checkpoint(tmp_path / "text.tar")
