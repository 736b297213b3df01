"""SSD as a module: default boxes, loss, detections, scores, columns, checkpoints, errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models import mobilenet_v2
from torchvision.ops import box_iou

from lightning_modules.supervised import Detector, detector
from lightning_modules.supervised.ssd import mobilenet_ssd, small_ssd
from lightning_modules.zaq.attach import trace
from tests.callbacks.boring import boring_trainer
from tests.lightning_modules.supervised.tiny import (
    scenes,
    tiny_detector,
    tiny_ssd,
    trained_detector,
)

NAMES = ["square", "ring"]


class Data(LightningDataModule):
    class_names = NAMES

    def train_dataloader(self) -> DataLoader:
        return DataLoader([scenes(16)] * 4, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader([scenes(4, 100), scenes(8, 200)], batch_size=None)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


@pytest.fixture(scope="module")
def trained() -> Detector:
    module = trained_detector(80)
    module.class_names = NAMES
    return module


# ---------------------------------------------------------------------- network
def test_default_boxes_are_where_the_maps_look() -> None:
    network = small_ssd(6, 8).eval()
    images = torch.rand(2, 3, 64, 64)
    boxes = network.default_boxes(images)
    outputs = network(images)
    assert outputs["cls_logits"].shape == (2, len(boxes), 7)
    assert outputs["bbox_regression"].shape == (2, len(boxes), 4)
    assert len(boxes) == 4 * (8**2 + 4**2 + 2**2 + 1)
    # The first place of the finest map, 8 pixels wide, and the only one of the coarsest; scales 0.2 and 0.8.
    torch.testing.assert_close(boxes[0], torch.tensor([4 - 6.4, 4 - 6.4, 4 + 6.4, 4 + 6.4]))
    torch.testing.assert_close(
        boxes[-4], torch.tensor([32 - 25.6, 32 - 25.6, 32 + 25.6, 32 + 25.6])
    )
    wide = network.default_boxes(torch.rand(1, 3, 64, 96))  # its coarsest map has two places
    torch.testing.assert_close(wide[-4], torch.tensor([72 - 38.4, 32 - 25.6, 72 + 38.4, 32 + 25.6]))


def test_the_standard_network_has_the_maps_of_ssdlite_and_takes_the_weights_of_mobilenet() -> None:
    network = mobilenet_ssd(20).eval()
    boxes = network.default_boxes(torch.rand(1, 3, 320, 320))
    assert len(boxes) == 6 * (20**2 + 10**2 + 5**2 + 3**2 + 2**2 + 1)
    assert network.backbone.out_channels == [576, 1280, 512, 256, 256, 128]
    torch.manual_seed(1)
    source = mobilenet_v2().eval()
    network.backbone.features.load_state_dict(source.features.state_dict())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.backbone(images)["1"], source.features(images))


def test_pretrained_weights_are_those_of_mobilenet(tmp_path: Path) -> None:
    source, file = mobilenet_v2(), tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    module = Detector(3, pretrained=True, weights_path=str(file))
    assert torch.equal(
        module.network.backbone.features[3].conv[0][0].weight, source.features[3].conv[0][0].weight
    )
    missing = Detector(3, pretrained=True, weights_path=str(tmp_path / "no.pth"))
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        missing.require_weights()


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_the_raw_forward_pass_can_be_traced(norm: Any) -> None:
    network, images = small_ssd(3, 8, norm).eval(), torch.rand(2, 3, 64, 64)
    graph, _ = trace(network)
    for name, values in network(images).items():
        assert torch.equal(graph(images)[name], values)


# ---------------------------------------------------------------------- loss
def test_the_loss_is_that_of_ssd() -> None:
    """Matching, hard negatives and both terms, written out."""
    module, batch = tiny_detector().eval(), scenes(3)
    batch["object_labels"][0], batch["boxes"][0] = -1, -1  # an image without an object
    outputs, inputs = module(batch["image"]), module.to_network(batch["image"])
    anchors = module.network.default_boxes(inputs)
    classification, regression, matched = torch.zeros(()), torch.zeros(()), 0
    for row in range(3):
        real = batch["object_labels"][row] >= 0
        true = batch["boxes"][row][real].float() + torch.tensor([0.0, 0, 1, 1])
        if not len(true):
            continue
        overlap = box_iou(true, anchors)
        best, of = overlap.max(0)
        of[best < 0.5] = -1
        of[overlap.argmax(1)] = torch.arange(len(true))
        target = torch.where(of >= 0, batch["object_labels"][row][real][of] + 1, 0)
        losses = F.cross_entropy(outputs["cls_logits"][row], target, reduction="none")
        positive = of >= 0
        hard = losses[~positive].sort(descending=True).values[: 3 * int(positive.sum())]
        classification = classification + losses[positive].sum() + hard.sum()
        centre, size = (true[:, :2] + true[:, 2:]) / 2, true[:, 2:] - true[:, :2]
        middle, span = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
        offset = 10 * (centre[of] - middle) / span
        scale = 5 * (size[of] / span).log()
        wanted = torch.cat([offset, scale], 1)[positive]
        found = outputs["bbox_regression"][row][positive]
        regression = regression + F.smooth_l1_loss(found, wanted, reduction="sum")
        matched += int(positive.sum())
    terms = module.loss_terms(batch)
    torch.testing.assert_close(terms["classification"], classification / matched)
    torch.testing.assert_close(terms["boxes"], regression / matched)
    torch.testing.assert_close(module.loss(batch), (classification + regression) / matched)


def test_parts_of_the_loss_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over processes of what each minimises is the loss of the whole batch."""
    module, batch = tiny_detector().eval(), scenes(6)
    batch["object_labels"][:2, 1:] = -1
    whole = module.loss(batch)
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 2), slice(2, 6))]
    counts: list[float] = []

    class Pretended:
        training, world_size = True, 2

    monkeypatch.setattr(Detector, "trainer", Pretended())
    module._trainer = Pretended()  # type: ignore[assignment]
    monkeypatch.setattr(detector, "average_over_ranks", lambda _, ts: counts.append(ts[0].item()))
    for half in halves:
        module.loss(half)
    assert counts[0] != counts[1]
    mean = sum(counts) / 2
    monkeypatch.setattr(detector, "average_over_ranks", lambda _, ts: ts[0].fill_(mean))
    torch.testing.assert_close(sum(module.loss(half) for half in halves) / 2, whole)


def test_no_object_at_all() -> None:
    module, batch = tiny_detector(), scenes(4)
    batch["object_labels"][:], batch["boxes"][:] = -1, -1
    assert module.loss(batch) == 0


# ---------------------------------------------------------------------- detections
def test_objects_are_found(trained: Detector) -> None:
    batch = scenes(48, 5000)
    values = trained.average_precision([batch])
    assert values["map"] > 0.6
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(0, 20), slice(20, 48))]
    torch.testing.assert_close(trained.average_precision(halves)["map"], values["map"])
    other = tiny_ssd().eval()
    assert trained.average_precision([batch], other)["map"] < 0.2, "the other network is asked"


def test_boxes_are_in_pixels_with_the_last_ones_included(trained: Detector) -> None:
    """Best detections of pictures that were learned differ from the truth by little, on neither side."""
    batch = scenes(64)
    differences = []
    for found, boxes in zip(trained.detect(batch["image"]), batch["boxes"], strict=True):
        overlap = box_iou(found["boxes"][:1] + 0.5, boxes[boxes[:, 0] >= 0].float() + 0.5)
        if overlap.max() > 0.7:
            differences.append(found["boxes"][0] - boxes[boxes[:, 0] >= 0][overlap.argmax()])
    assert len(differences) > 40
    bias = torch.stack(differences).mean(0)
    assert bias.abs().max() < 0.4, bias


def test_fit_test_checkpoint_and_prediction(tmp_path: Path) -> None:
    module = tiny_detector(epochs=2, lr=0.01)
    trainer = boring_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, datamodule=Data())
    logged = trainer.callback_metrics
    assert 0 <= logged["val/map"] <= 1
    expected = [module.eval().loss(b).item() for b in Data().val_dataloader()]
    assert logged["val/loss"] == pytest.approx((4 * expected[0] + 8 * expected[1]) / 12, rel=1e-4)
    (values,) = trainer.test(module, datamodule=Data(), verbose=False)
    assert values["test/map"] == pytest.approx(
        (values["test/ap_square"] + values["test/ap_ring"]) / 2
    )
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = Detector.load_from_checkpoint(
        tmp_path / "x.ckpt", network=tiny_ssd(), weights_only=True
    )
    images = scenes(2)["image"]
    for name, outputs in again.eval()(images).items():
        assert torch.equal(outputs, module.eval()(images)[name])
    assert again.class_names == NAMES


def test_columns_of_a_prediction(trained: Detector) -> None:
    batch: dict[str, Any] = scenes(4)
    columns = trained.predict_step(batch, 0)
    found = trained.detect(batch["image"])
    assert columns["count"].tolist() == [int((f["scores"] >= 0.5).sum()) for f in found]
    objects = [json.loads(text) for text in columns["objects"]]
    assert [len(row) for row in objects] == columns["count"].tolist()
    first = next(row[0] for row in objects if row)
    assert first["label"] in NAMES
    assert 0.5 <= first["confidence"] <= 1
    # A file twice as high and three times as wide: edges are scaled, and then the last pixel is inside.
    batch["original_size"] = torch.tensor([[64, 96]]).expand(4, 2)
    place = next(i for i, row in enumerate(objects) if row)
    larger = json.loads(trained.predict_step(batch, 0)["objects"][place])[0]["box"]
    x0, y0, x1, y1 = found[place]["boxes"][0].tolist()
    wanted = [3 * x0, 2 * y0, 3 * (x1 + 1) - 1, 2 * (y1 + 1) - 1]
    assert larger == pytest.approx(wanted, abs=0.06)


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "mobilenet"}, "unknown network='mobilenet' for detection.*mobilenet_v2"),
        ({"network": nn.Conv2d(3, 3, 1)}, "network=Conv2d is no detector: give an SSDNetwork"),
        ({"network": "small", "score_threshold": 2.0}, "score_threshold=2.0 must be in"),
        ({"network": "small", "pretrained": True}, "no pretrained weights for network 'small'"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(2, **options)


def test_data_that_do_not_fit(tmp_path: Path) -> None:
    batch = scenes(2)
    batch["object_labels"][1, 0] = 5
    with pytest.raises(
        ValueError, match=r"class 5, expected 0 to 1 or -1; set --model.num_classes"
    ):
        tiny_detector().loss(batch)
    with pytest.raises(ValueError, match=r"2 classes \(square, ring\); set --model.num_classes 2"):
        boring_trainer(tmp_path).fit(Detector(3, network="small", width=4), datamodule=Data())


def test_grey_images() -> None:
    module = Detector(2, network="small", width=4, in_channels=1).eval()
    grey = torch.rand(2, 1, 64, 64)
    for name, outputs in module(grey).items():
        torch.testing.assert_close(outputs, module(grey.expand(-1, 3, -1, -1))[name])
    assert module.detect(grey)
