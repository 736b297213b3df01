"""SSD quantized: the game of ZAQ on a detector, its baselines, and the integer file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.quantization import IntegerExport
from datamodules.classification import ClassificationDataModule
from datamodules.detection import DetectionDataModule
from lightning_modules.supervised import Classifier, Detector
from lightning_modules.supervised.ssd import small_ssd
from lightning_modules.zaq import ZAQ, ZAQDetection
from lightning_modules.zaq.attach import (
    activation_quantizers,
    calibrate,
    forward_with_features,
    quantize_model,
)
from lightning_modules.zaq.deploy import deploy
from lightning_modules.zaq.export import demand_integer_kernels, export_onnx, verify_onnx
from lightning_modules.zaq.losses import output_discrepancy
from lightning_modules.zaq.quantizers import QuantSpec
from tests.callbacks.boring import boring_trainer
from tests.datamodules.test_detection import voc_root  # noqa: F401 (a fixture)
from tests.lightning_modules.supervised.tiny import SCENES, scenes, tiny_ssd
from tests.suites.launch import run


def noise(count: int = 16, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def seasoned() -> torch.nn.Module:
    """With running statistics that are those of noise."""
    torch.manual_seed(0)
    network = small_ssd(6, 8).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(8, 3, 64, 64))
    return network.eval()


@pytest.mark.parametrize("placement", ["relu", "full"])
def test_ssd_on_mobilenet_is_quantized_with_outputs_near(placement: str) -> None:
    network, images = seasoned(), noise()
    errors = {}
    for bits in (8, 6):
        quantized = quantize_model(network, bits, bits, placement=placement)  # type: ignore[arg-type]
        calibrate(quantized, [images])
        with torch.no_grad():
            ours, theirs = network(images), quantized.eval()(images)
        assert list(theirs) == ["cls_logits", "bbox_regression"]
        errors[bits] = [float((ours[k] - theirs[k]).std() / ours[k].std()) for k in ours]
    assert max(errors[8]) < 0.03
    assert max(errors[6]) < 0.1
    assert min(errors[6]) > max(errors[8]), "it was rounded"


def test_every_convolution_and_activation_of_ssd_is_quantized() -> None:
    network = small_ssd(6, 8)
    quantized = quantize_model(network, 6, 6)
    layers = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)]
    left = [n for n in layers if type(quantized.get_submodule(n)) is torch.nn.Conv2d]
    assert len(layers) > 60
    assert not left
    activations = [m for m in network.modules() if isinstance(m, torch.nn.ReLU6)]
    assert len(activation_quantizers(quantized)) == len(activations)
    assert quantized.state_dict().keys() >= network.state_dict().keys()


SMALL: dict[str, Any] = {
    "num_classes": 2,
    "image_size": 32,
    "taps": [f"backbone.stages.{stage}" for stage in range(4)],
    "teacher_steps": 40,
    "teacher_lr": 0.01,
    "widths": ["W8A8"],
    "epochs": 1,
    "iterations": 3,
    "q_steps": 2,
    "latent_dim": 4,
    "ngf": 2,
    "lr_q": 1e-3,
    "ft_epochs": 1,
    "ft_lr": 1e-3,
    "placement": "full",
    "ste": "clipped",
    "zeroq_images": 4,
    "zeroq_steps": 2,
}


def module(**options: Any) -> ZAQDetection:
    torch.manual_seed(0)
    return ZAQDetection(**{"network": tiny_ssd(), **SMALL, **options})


def data(**options: Any) -> DetectionDataModule:
    small: dict[str, Any] = {"shapes_train": 256, "shapes_val": 4, "shapes_test": 16}
    return DetectionDataModule(shapes=SCENES, batch_size=8, **{**small, **options})


class Spy(Callback):
    """Notes the keys of the batches and the losses."""

    def __init__(self) -> None:
        self.keys: list[tuple[str, set[str]]] = []
        self.losses: list[set[str]] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        zaq: Any = pl_module
        self.keys.append((zaq.stage.method, set(batch)))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.losses.append(set(pl_module.losses))


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> tuple[ZAQDetection, Spy, dict[str, Any]]:
    zaq = module(baselines=["rq", "dfq", "aciq", "zeroq", "ft"])
    folder, spy = tmp_path_factory.mktemp("game"), Spy()
    boring_trainer(folder, callbacks=[spy], max_epochs=zaq.total_epochs).fit(zaq, datamodule=data())
    trainer = boring_trainer(folder)
    trainer.test(zaq, datamodule=data(), verbose=False)
    return zaq, spy, dict(trainer.callback_metrics)


def test_every_method_finds_at_8_bits_what_the_float_detector_finds(game: Any) -> None:
    zaq, _, metrics = game
    found = {row: float(metrics[f"test/{row}/W8A8"]) for row in zaq.rows}
    assert list(found) == ["float", "rq", "dfq", "aciq", "zeroq", "zaq", "zaq_best", "ft"]
    assert found["float"] > 0.5
    assert all(abs(value - found["float"]) < 0.1 for value in found.values()), found


def test_classes_and_boxes_are_compared_and_only_fine_tuning_sees_images(game: Any) -> None:
    zaq, spy, _ = game
    assert [method for method, _ in spy.keys] == ["zaq"] * 3 + ["ft"] * 3
    for (method, keys), losses in zip(spy.keys, spy.losses, strict=True):
        assert ("image" in keys) == ("boxes" in keys) == (method == "ft")
        assert ({"q_classification", "q_boxes"} == losses) == (method == "ft")
    images = zaq.to_network(scenes(2)["image"])
    ours, theirs = (zaq.compared(n(images)) for n in (zaq.float_network, zaq.first_student))
    expected = [float((p - q).detach().abs().mean()) for p, q in zip(ours, theirs, strict=True)]
    assert [tuple(output.shape[2:]) for output in ours] == [(3,), (4,)]
    assert float(output_discrepancy(ours, theirs).detach()) == pytest.approx(sum(expected) / 2)


def test_the_game_brings_a_rounded_detector_nearer_to_the_float_one(
    game: Any, tmp_path: Path
) -> None:
    source, _, _ = game
    zaq = module(widths=["W3A3"], iterations=12, q_steps=4, lr_q=3e-3, observer="aciq")
    zaq._get_teacher = lambda data: zaq.float_network.load_state_dict(  # type: ignore[method-assign]
        source.float_network.state_dict()
    )
    found: list[float] = []

    class Distance(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            found.append(float(zaq.losses["q_output"]))

    boring_trainer(tmp_path, callbacks=[Distance()], max_epochs=1).fit(zaq, datamodule=data())
    assert sum(found[-4:]) < 0.9 * sum(found[:4]), found


def test_predictions_of_both_networks(game: Any) -> None:
    zaq, _, _ = game
    batch = scenes(4)
    columns = zaq.predict_step(batch, 0)
    assert list(columns) == ["count", "objects", "float_count", "float_objects"]
    expected = zaq.teacher.detect(batch["image"], zaq.first_student)
    assert columns["count"].tolist() == [int((f["scores"] >= 0.5).sum()) for f in expected]
    assert columns["float_objects"] == zaq.teacher.predict_step(batch, 0)["objects"]


def test_evaluation_may_not_move_a_range(game: Any, tmp_path: Path) -> None:
    zaq, _, _ = game

    class Leak(Callback):
        def on_test_batch_start(self, *args: Any) -> None:
            next(iter(activation_quantizers(zaq.first_student).values())).hi.add_(1)

    with pytest.raises(RuntimeError, match="would not be zero-shot"):
        boring_trainer(tmp_path, callbacks=[Leak()]).test(zaq, datamodule=data(), verbose=False)


def test_stages_of_the_backbone_are_tapped() -> None:
    zaq = ZAQDetection(2, network="small", width=4, image_size=32, up_blocks=1, ngf=2)
    sizes = [16, 8, 4, 2, 1]
    _, features = forward_with_features(zaq.float_network, noise(2, 32), zaq.taps)
    assert [feature.shape[-1] for feature in features] == sizes


def test_export_through_the_callback(game: Any, tmp_path: Path) -> None:
    for library in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    zaq, _, _ = game
    callback = IntegerExport(min_integer_kernels=8, latency_runs=2)
    trainer = boring_trainer(tmp_path, callbacks=[callback])
    trainer.test(zaq, datamodule=data(), verbose=False)
    text = (tmp_path / "export_table.txt").read_text()
    cells = {line.split()[0]: line.split()[1:] for line in text.splitlines()[2:4]}
    _, _, integer, floating, agreement, difference, score = map(float, cells["W8A8"])
    assert (integer >= 8, floating, agreement) == (True, 0, 100), text
    assert difference <= 10
    assert abs(score - 100 * float(trainer.callback_metrics["test/zaq/W8A8"])) < 5


def test_checkpoints_of_the_other_task_are_refused(tmp_path: Path) -> None:
    """A classifier for a detector's teacher, and the other way round."""
    shape: dict[str, Any] = {"network": "small", "width": 4}
    pairs: list[tuple[Any, Any, str]] = [
        (Classifier(2, **shape), ZAQDetection, "holds a Classifier.*checkpoint of a Detector"),
        (Detector(2, **shape), ZAQ, "holds a Detector.*checkpoint of a Classifier"),
    ]
    for source, kind, message in pairs:
        path = tmp_path / f"{kind.__name__}.ckpt"
        trainer = boring_trainer(tmp_path)
        trainer.strategy.connect(source)
        trainer.save_checkpoint(path)
        zaq = kind(2, image_size=32, ngf=2, up_blocks=1, teacher=str(path), **shape)
        zaq._demand_truth = lambda data: None
        with pytest.raises(ValueError, match=message):
            boring_trainer(tmp_path).fit(zaq, datamodule=data(shapes_train=8))


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no gdfq here: GDFQ draws a class.*--model.baselines"):
        module(baselines=["rq", "gdfq"])
    digits = ClassificationDataModule("digits", image_size=32, batch_size=8, train_limit=2)
    with pytest.raises(
        ValueError, match=r"needs boxes and object_labels.*ClassificationDataModule"
    ):
        boring_trainer(tmp_path).fit(module(), datamodule=digits)
    zaq = ZAQ(2, network="small", image_size=32, width=4, ngf=2)
    with pytest.raises(ValueError, match="ZAQ needs label of every image"):
        boring_trainer(tmp_path).fit(zaq, datamodule=data(shapes_train=8))


def exported(network: torch.nn.Module, side: int, path: Path) -> tuple[Any, Any]:
    """Parity and kernels of the integer network in onnxruntime."""
    for library in ("onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    images = noise(8, side)
    spec = QuantSpec(include_zero=True)
    quantized = quantize_model(network, 8, 8, placement="full", weight_spec=spec)
    calibrate(quantized, [images])
    integer = deploy(quantized.eval())
    export_onnx(integer, path, images)
    return verify_onnx(path, integer, [images], class_axis=2), demand_integer_kernels(path)


@pytest.mark.slow
def test_ssd_on_mobilenet_runs_as_integers(tmp_path: Path) -> None:
    parity, kernels = exported(seasoned(), 64, tmp_path / "ssd.onnx")
    assert parity.max_difference <= 1e-5
    assert parity.agreement == 1
    assert kernels.floating == 0
    assert kernels.integer > 60


@pytest.mark.slow
def test_the_recipe_for_voc_runs_two_batches(
    voc_root: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    small = ["--model.image_size", "64", "--data.image_size", "64", "--model.up_blocks", "3"]
    small += ["--model.ngf", "2", "--model.teacher_steps", "1", "--model.q_steps", "1"]
    small += ["--model.zeroq_images", "2", "--model.zeroq_steps", "1", "--data.num_workers", "0"]
    small += ["--data.batch_size", "2", "--data.root", str(voc_root)]
    recipe = ["-c", "configs/zaq/voc2012.yaml", "-c", "configs/trainer/debug.yaml", *small]
    run(["fit", *recipe, "--run.root", str(tmp_path / "runs")], tmp_path / "log.txt")
