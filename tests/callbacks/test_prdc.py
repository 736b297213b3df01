"""Generated images judged after a test and during training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.prdc import GenerativeMetrics, PRDCReport
from lightning_modules.metrics.features import PixelFeatures
from lightning_modules.metrics.prdc import NAMES, prdc
from tests.callbacks.boring import BoringGAN, boring_trainer, loader

COUNTS = {"decoded": None, "kept": 9, "missing": 0}


class Generates(BoringGAN):
    def generated_kinds(self) -> dict[str, int | None]:
        return COUNTS

    def generate(self, kind: str, indices: Tensor) -> Tensor:
        values = indices.double().add(len(kind)).mul(0.37).frac().float()
        return values.view(-1, 1, 1, 1) * torch.linspace(0, 1, 64).view(1, 8, 8)


class RealImages:
    def __len__(self) -> int:
        return 30

    def batch(self, indices: Tensor, device: Any = None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"image": torch.rand(30, 1, 8, 8, generator=generator)[indices]}


class Data(LightningDataModule):
    test = RealImages()

    def train_dataloader(self) -> DataLoader:
        return loader()

    val_dataloader = test_dataloader = train_dataloader


def metrics(**options: Any) -> GenerativeMetrics:
    return GenerativeMetrics(features="pixels", nearest_k=3, **options)


def test_a_test_judges_every_kind_that_has_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = Generates()
    (values,) = boring_trainer(tmp_path, callbacks=[metrics(num_images=20)]).test(
        module, datamodule=Data(), verbose=False
    )
    assert {name.split("/")[2] for name in values if "prdc" in name} == {"decoded", "kept"}
    # The numbers of the real images that take part are drawn by a seed; here all but 20 are left out.
    assert "20" in capsys.readouterr().out
    (values,) = boring_trainer(tmp_path, callbacks=[metrics(kinds=["kept"])]).test(
        module, datamodule=Data(), verbose=False
    )
    real = Data.test.batch(torch.arange(30))["image"]
    fake = module.generate("kept", torch.arange(9)).mul(255).round() / 255
    expected = prdc(PixelFeatures()(real), PixelFeatures()(fake), 3)
    for name in NAMES:
        assert values[f"test/prdc/kept/test/{name}"] == pytest.approx(float(expected[name]))
    table = (tmp_path / "prdc_table.txt").read_text()
    assert "pixels in [0, 1]" in table
    assert f"{expected['density']:.3f} ± " in table


def test_during_training(tmp_path: Path) -> None:
    callback = metrics(kinds=["kept"], every_n_epochs=2)
    trainer = boring_trainer(tmp_path, callbacks=[callback], max_epochs=3)
    seen: list[int] = []
    original = callback._evaluate

    def noted(*arguments: Any) -> None:
        seen.append(trainer.current_epoch)
        original(*arguments)

    callback._evaluate = noted  # type: ignore[method-assign]
    trainer.fit(Generates(), datamodule=Data())
    assert seen == [1]
    assert "val/prdc/kept/test/coverage" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (metrics(), BoringGAN(), "BoringGAN does not"),
        (metrics(kinds=["faces"]), Generates(), "generates no faces; kinds are some of decoded"),
        (metrics(references=["train"]), Generates(), "Data has no set 'train'"),
        (PRDCReport(), BoringGAN(), "needs PRDCModule, not BoringGAN"),
    ],
)
def test_what_does_not_fit_is_said(
    callback: Any, module: BoringGAN, message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        boring_trainer(tmp_path, callbacks=[callback]).test(module, datamodule=Data())


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="num_images=3"):
        metrics(num_images=3)
    with pytest.raises(ValueError, match="every_n_epochs=0"):
        metrics(every_n_epochs=0)
    with pytest.raises(ValueError, match="-1"):
        PRDCReport(-1)
