"""The table of all methods, and networks that leave as integer files."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks.layer_weights import EMALayerWeights
from callbacks.quantization import IntegerExport, QuantizationReport
from datamodules.classification import ClassificationDataModule
from lightning_modules.zaq import ZAQ
from lightning_modules.zaq.deploy import deploy
from lightning_modules.zaq.layer_weights import LayerWeightEMA
from tests.callbacks.boring import BoringGAN, boring_trainer


def data() -> ClassificationDataModule:
    return ClassificationDataModule("digits", image_size=16, batch_size=8, train_limit=6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ZAQ:
    torch.manual_seed(0)
    zaq = ZAQ(
        network="small",
        in_channels=1,
        image_size=16,
        width=4,
        teacher_steps=40,
        widths=["W4A4"],
        baselines=["rq"],
        epochs=1,
        iterations=1,
        q_steps=1,
        latent_dim=4,
        ngf=2,
        placement="full",
    )
    folder = tmp_path_factory.mktemp("fit")
    boring_trainer(folder, max_epochs=zaq.total_epochs).fit(zaq, datamodule=data())
    return zaq


def test_table(trained: ZAQ, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boring_trainer(tmp_path, callbacks=[QuantizationReport()]).test(
        trained, datamodule=data(), verbose=False
    )
    text = (tmp_path / "quantization_table.txt").read_text()
    assert text in capsys.readouterr().out
    assert [line.split("  ")[0] for line in text.splitlines()[2:6]] == [
        "float",
        "RQ, rounded only",
        "ZAQ, last epoch",
        "ZAQ, best epoch on validation images",
    ]
    assert "not zero-shot" in text
    with (tmp_path / "tables" / "quantization-table.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["method", "W4A4"]
    assert all(0 <= float(cell) <= 100 for row in rows[1:] for cell in row[1:])


def test_export(trained: ZAQ, tmp_path: Path) -> None:
    """onnxruntime agrees on every test image, in integers; the module is as it was."""
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    callback = IntegerExport(min_integer_kernels=7, latency_runs=2)
    trainer = boring_trainer(tmp_path, callbacks=[callback])
    trainer.test(trained, datamodule=data(), verbose=False)
    text = (tmp_path / "export_table.txt").read_text()
    cells = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:4]}
    size, _, integer, floating, agreement, difference, accuracy = map(float, cells["W4A4"])
    assert (integer, floating, agreement) == (7, 0, 100)
    assert difference <= 10
    assert size * 1000 == pytest.approx((tmp_path / "W4A4.onnx").stat().st_size, abs=51)
    assert abs(accuracy - 100 * float(trainer.callback_metrics["test/zaq/W4A4"])) < 3
    assert float(cells["float"][3]) == 7
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_a_file_that_differs_is_an_error(
    trained: ZAQ, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    monkeypatch.setattr("callbacks.quantization.deploy", _shifted)
    trainer = boring_trainer(tmp_path, callbacks=[IntegerExport()])
    with pytest.raises(RuntimeError, match="not the network it was written from"):
        trainer.test(trained, datamodule=data(), verbose=False)


class _Moody(torch.nn.Module):
    """Computes something else in torch than in a file."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift = 0.0 if torch.compiler.is_exporting() else 1e-3
        return self.network(x) + shift


def _shifted(quantized: Any) -> torch.nn.Module:
    return _Moody(deploy(quantized))


@pytest.mark.parametrize("callback", [QuantizationReport(), IntegerExport(), EMALayerWeights()])
def test_other_modules_are_refused(callback: Callback, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=type(callback).__name__):
        callback.setup(Trainer(logger=False, accelerator="cpu"), BoringGAN(), "test")


class _Weighing(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer_weight_ema = LayerWeightEMA(2)
        self.layer_distances: Any = None

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Not of interest here."""


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_layer_weights(interval: Any) -> None:
    module, trainer = _Weighing(), Trainer(logger=False, accelerator="cpu")
    callback = EMALayerWeights(momentum=0.5, temperature=0.1, interval=interval)
    steps = [torch.tensor([0.1, 0.3]), torch.tensor([0.3, 0.5])]
    for distances in steps:
        module.layer_distances = distances
        callback.on_train_batch_end(trainer, module, None, None, 0)
    callback.on_train_epoch_end(trainer, module)
    expected = LayerWeightEMA(2, 0.5, 0.1)
    for distances in steps if interval == "step" else [torch.stack(steps).mean(0)]:
        expected.update(distances)
    assert torch.allclose(module.layer_weight_ema.weights, expected.weights)
    assert module.layer_weight_ema.distance_count == 0
