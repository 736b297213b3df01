"""PRDC as a program: folders, feature files and generators in, results and pictures out."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from datamodules.real_fake import RealFakeDataModule
from lightning_modules.generated import generated_batches, generated_count, load_generator
from lightning_modules.metrics.prdc import NAMES, prdc
from lightning_modules.osrci import KPlusOneClassifierModule, OSRCIModule
from lightning_modules.prdc import PRDCModule
from tests.suites.launch import run


def pictures(folder: Path, count: int, seed: int, size: int = 8) -> Tensor:
    folder.mkdir(parents=True)
    images = torch.randint(0, 256, (count, 3, size, size), generator=generator(seed)).byte()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03d}.png")
    return images


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def evaluated(module: PRDCModule, data: RealFakeDataModule, folder: Path) -> dict[str, float]:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.test(module, data, verbose=False)
    values = trainer.callback_metrics
    return {name.removeprefix("test/"): float(value) for name, value in values.items()}


def small_osrci(folder: Path, images: int = 12) -> Path:
    """A checkpoint of an untrained OSRCI with some generated images."""
    torch.manual_seed(0)
    module = OSRCIModule(width=4, latent_size=4, gopenmax=False)
    made = torch.randint(0, 256, (images, 3, 32, 32), generator=generator(1)).byte()
    records = {name: torch.zeros(images) for name in ("start", "confidence", "distance", "steps")}
    module.open_set.append({"images": made, **records})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    path = folder / "osrci.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_two_folders(tmp_path: Path) -> None:
    real, fake = (pictures(tmp_path / name, n, n) for name, n in (("a", 30), ("b", 20)))
    run(
        [
            *("test", "-c", "configs/prdc/folders.yaml", "--run.root", str(tmp_path / "runs")),
            *("--data.real", str(tmp_path / "a"), "--data.fake", str(tmp_path / "b")),
            *("--model.features", "pixels", "--model.nearest_k", "3", "--data.num_workers", "0"),
        ],
        tmp_path / "log.txt",
    )
    (directory,) = (tmp_path / "runs").glob("*/*")
    results = json.loads((directory / "results.json").read_text())
    expected = prdc(real.flatten(1) / 255, fake.flatten(1) / 255, 3, standard_errors=True)
    for name, value in expected.items():
        assert results["metrics"][f"test/{name}"] == pytest.approx(float(value), rel=1e-6)
    assert results["data"]["counts"] == {"real": 30, "fake": 20}
    table = (directory / "prdc_table.txt").read_text()
    assert "N = 30" in table
    assert "M = 20" in table
    assert "pixels" in table
    assert f"density{'':<13}{float(expected['density']):8.4f}" in table
    names = {path.stem for path in (directory / "images").glob("*.png")}
    assert {"prdc-sweep-0", "prdc-least_faithful-0", "prdc-uncovered-0"} <= names
    with (directory / "tables" / "prdc-fakes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 20
    with (directory / "tables" / "prdc-sweep.csv").open() as file:
        assert [row["k"] for row in csv.DictReader(file)] == [str(k) for k in range(1, 11)]


def test_features_in_files_and_everything_beside(tmp_path: Path) -> None:
    real, fake = (torch.randn(n, 5, generator=generator(n)) for n in (40, 30))
    np.save(tmp_path / "a.npy", real.numpy())
    torch.save({"features": fake}, tmp_path / "b.pt")
    also = ["fid", "kid", "improved", "probabilistic", "authenticity"]
    module = PRDCModule(nearest_k=None, features="pixels", also=also)  # type: ignore[arg-type]
    data = RealFakeDataModule(str(tmp_path / "a.npy"), str(tmp_path / "b.pt"))
    values = evaluated(module, data, tmp_path)
    assert module.metric.nearest_k == 6
    assert module.description == "features as given"
    expected = prdc(real, fake, 6)
    assert {name: values[name] for name in NAMES} == pytest.approx(
        {name: float(expected[name]) for name in NAMES}
    )
    identity: Any = nn.Identity()
    identity.num_features = 5
    metric = FrechetInceptionDistance(identity)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    assert values["fid"] == pytest.approx(float(metric.compute()), rel=1e-5)
    assert {"kid", "kid_std", "improved_precision", "p_recall", "authenticity"} <= values.keys()
    again = evaluated(PRDCModule(nearest_k=6, features="pixels", also=also), data, tmp_path)  # type: ignore[arg-type]
    assert again["kid"] == values["kid"], "its subsets are drawn by the seed"


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    real, fake = (pictures(tmp_path / name, n, n) for name, n in (("a", 12), ("b", 11)))
    network = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(192, 4))
    data = RealFakeDataModule(str(tmp_path / "a"), str(tmp_path / "b"))
    values = evaluated(PRDCModule(nearest_k=2, features=network, also=[]), data, tmp_path)
    with torch.no_grad():
        expected = prdc(network.eval()(real / 255), network(fake / 255), 2)
    assert values["density"] == pytest.approx(float(expected["density"]))


def test_a_generator_from_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = small_osrci(tmp_path)
    run(
        [
            *("test", "-c", "configs/prdc/generator.yaml", "--run.root", str(tmp_path / "runs")),
            *("--model.generator", str(checkpoint), "--data.limit", "40"),
            *("--model.features", "pixels", "--model.nearest_k", "3"),
        ],
        tmp_path / "log.txt",
    )
    (directory,) = (tmp_path / "runs").glob("*/*")
    table = (directory / "prdc_table.txt").read_text()
    assert "counterfactuals of" in table
    assert "M = 12" in table
    module = PRDCModule(nearest_k=3, features="pixels", generator=str(checkpoint), kind="samples")
    evaluated(module, RealFakeDataModule("digits:test", limit=40), tmp_path)
    assert module.num_generated == 40
    assert module.metric.features is not None
    torch.testing.assert_close(
        module.metric.features[1][7], module.fake_images(torch.tensor([7])).flatten()
    )


def test_generated_images_are_functions_of_their_numbers(tmp_path: Path) -> None:
    module: Any = load_generator(small_osrci(tmp_path))
    assert module.generated_kinds() == {"counterfactuals": 12, "samples": None}
    assert not module.training
    together = module.generate("samples", torch.tensor([3, 8]))
    alone = module.generate("samples", torch.tensor([8]))
    torch.testing.assert_close(together[1], alone[0])
    assert (together[0] - together[1]).abs().max() > 1e-4
    batches = list(generated_batches(module, "counterfactuals", torch.arange(12), 5))
    assert [len(numbers) for numbers, _ in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([i for _, i in batches]), module.open_set.images.float() / 255)


def test_how_many_images_there_are() -> None:
    module = OSRCIModule(width=4, latent_size=4, gopenmax=False)
    with pytest.raises(ValueError, match="has no counterfactuals yet"):
        generated_count(module, "counterfactuals", 5)
    with pytest.raises(ValueError, match="generates no 'faces'; it has counterfactuals, samples"):
        generated_count(module, "faces", 5)
    with pytest.raises(ValueError, match="samples of OSRCIModule have no end"):
        generated_count(module, "samples", None)
    assert generated_count(module, "samples", 7) == 7


def test_what_is_no_generator(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--model\.generator"):
        PRDCModule(generator=str(tmp_path / "no.ckpt"))
    (tmp_path / "text.ckpt").write_text("x")
    with pytest.raises(RuntimeError, match=r"text\.ckpt is not a readable checkpoint"):
        load_generator(tmp_path / "text.ckpt")
    for name, message in (
        (None, "something else than this collection"),
        ("Gone", "written by Gone"),
        (KPlusOneClassifierModule.__name__, "which generates no images"),
    ):
        torch.save({"module_class": name}, tmp_path / "other.ckpt")
        with pytest.raises(RuntimeError, match=message):
            load_generator(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nearest_k": 0}, "nearest_k=0"),
        ({"sweep": [0]}, "sweep has k=0"),
        ({"also": ["fit"]}, "fit.*fid, kid"),
        ({"num_generated": 0}, "num_generated=0"),
        ({"features": "vgg"}, "vgg"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRDCModule(**options)
