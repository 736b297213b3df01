"""Classifier and segmenter as modules: training, scores, columns, checkpoints, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_modules.supervised import Classifier, Segmenter
from tests.callbacks.boring import boring_trainer

NAMES = ["dark", "bright"]


def batch(count: int = 16, seed: int = 0) -> dict[str, Any]:
    """Dark and bright images; a bright square in each is what the mask is of."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.1 * torch.rand(count, 3, 12, 12, generator=generator)
    images += 0.3 * labels.view(-1, 1, 1, 1)
    mask = torch.zeros(count, 12, 12, dtype=torch.uint8)
    for i, place in enumerate(torch.randint(1, 6, (count, 2), generator=generator).tolist()):
        y, x = place
        images[i, :, y : y + 5, x : x + 5] += 0.5
        mask[i, y : y + 5, x : x + 5] = 1
    mask[:, -1] = 255
    return {"image": images, "label": labels, "mask": mask, "index": torch.arange(count)}


class Data(LightningDataModule):
    class_names = mask_classes = NAMES

    def train_dataloader(self) -> DataLoader:
        return DataLoader([batch(seed=i) for i in range(20)], batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader([batch(seed=99)], batch_size=None)  # type: ignore[arg-type]

    test_dataloader = predict_dataloader = val_dataloader


def classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**{"num_classes": 2, "width": 4, "norm": "group", "lr": 0.01, **options})


def segmenter(**options: Any) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(**{"num_classes": 2, "width": 4, "norm": "group", "lr": 0.01, **options})


def test_a_classifier_learns_and_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    module = classifier(epochs=2)
    trainer = boring_trainer(tmp_path, max_epochs=module.total_epochs)
    trainer.fit(module, datamodule=Data())
    assert trainer.callback_metrics["val/accuracy"] > 0.9
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    data = batch(seed=5)
    loss = trainer.callback_metrics["val/loss"]
    logits = module(batch(seed=99)["image"])
    torch.testing.assert_close(loss, F.cross_entropy(logits, data["label"]).detach())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).eval()
    torch.testing.assert_close(again(data["image"]), module.eval()(data["image"]))
    columns = again.predict_step(data, 0)
    assert columns["label"] == [NAMES[k] for k in module(data["image"]).argmax(1)]
    assert (columns["confidence"] >= 0.5).all()


def test_images_of_no_class_do_not_count(tmp_path: Path) -> None:
    module, data = classifier(), batch(8)
    with torch.no_grad():
        data["label"] = module.eval()(data["image"]).argmax(1)
    loss = module.loss(data)
    data["label"][4:] = -1
    first = {name: values[:4] for name, values in data.items()}
    torch.testing.assert_close(module.loss(data), module.loss(first))
    assert not torch.equal(module.loss(data), loss)
    trainer = boring_trainer(tmp_path)
    loader: DataLoader = DataLoader([data], batch_size=None)  # type: ignore[arg-type]
    (values,) = trainer.test(module, loader, verbose=False)
    assert values["test/accuracy"] == 1
    (values,) = trainer.validate(module, loader, verbose=False)
    assert values["val/loss"] == pytest.approx(float(module.loss(first)))


def test_a_segmenter_learns_and_is_scored(tmp_path: Path) -> None:
    module = segmenter(epochs=2)
    trainer = boring_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, datamodule=Data())
    validated = float(trainer.callback_metrics["val/miou"])
    assert validated > 0.8
    (values,) = trainer.test(module, datamodule=Data(), verbose=False)
    assert values["test/miou"] == pytest.approx(validated)
    data = batch(seed=99)
    classes = module.eval().classes(data["image"])
    counted = data["mask"] != 255
    ious = []
    for k in range(2):
        found, true = (classes == k) & counted, (data["mask"] == k)
        ious.append(float((found & true).sum() / (found | true).sum()))
    assert values["test/miou"] == pytest.approx(sum(ious) / 2)
    columns = module.predict_step(data, 0)
    torch.testing.assert_close(columns["share_dark"] + columns["share_bright"], torch.ones(16))
    torch.testing.assert_close(columns["share_bright"], classes.float().mean((1, 2)))


def test_a_network_of_ones_own_sees_images_as_they_are(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 4, 4)

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return self.layer(images)

    module = Segmenter(2, network=Own())
    images = torch.rand(2, 3, 16, 16)
    assert module(images).shape == (2, 2, 16, 16), "coarse logits are enlarged"
    assert torch.equal(seen[0], images)
    trainer = boring_trainer(tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = Segmenter.load_from_checkpoint(tmp_path / "x.ckpt", network=Own(), weights_only=True)
    torch.testing.assert_close(again(images), module(images))


def test_channels() -> None:
    grey = torch.rand(2, 1, 8, 8)
    three, one = classifier().eval(), classifier(in_channels=1).eval()
    torch.testing.assert_close(three(grey), three(grey.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(one(grey), one(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match="in_channels=3, the images have 4 channels"):
        three(torch.rand(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be at least 2"),
        ({"epochs": 0}, "epochs=0"),
        ({"optimizer": "lion"}, "unknown optimizer='lion'.*adam, sgd"),
        ({"lr_schedule": "wave"}, "unknown lr_schedule='wave'"),
        ({"network": "smal"}, "closest: small"),
        ({"pretrained": True}, "no pretrained weights for network 'small'"),
    ],
)
def test_impossible_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier(**options)


def test_data_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 classes \(dark, bright\); set --model.num_classes 2"):
        boring_trainer(tmp_path).fit(classifier(num_classes=3), datamodule=Data())
    data = batch(2)
    data["mask"][0, 0, 0] = 7
    with pytest.raises(ValueError, match="class 7, expected 0 to 1 or 255"):
        segmenter().loss(data)


def test_missing_weights_stop_a_training_but_not_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"network": "squeezenet1_1", "weights_path": str(tmp_path / "no.pth")}
    module = classifier(**options, pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        boring_trainer(tmp_path).fit(module, datamodule=Data())
    trainer = boring_trainer(tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    Classifier.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True).require_weights()


def test_optimizers() -> None:
    optimizer = classifier(
        optimizer="sgd", lr_schedule="constant", weight_decay=0.5
    ).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["weight_decay"], group["nesterov"], group["lr"]) == (0.5, True, 0.01)
