"""Edits judged: the true one, none, and a wrong one, in a world where an attribute is a brighter channel."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.io import decode_image

from callbacks.attributes import AttributeReport
from lightning_modules.paper import PaperModule
from tests.callbacks.boring import BoringGAN, assert_one_and_two_agree, boring_trainer
from tests.processes import run_fresh

SIZE = 8
CHANGE = 102 / 255
CHANGED_ROWS = 6
NAMES = ["red", "green", "blue"]


def drawn(ground: Tensor, attributes: Tensor) -> Tensor:
    """The scene with these attributes: red and green exclude each other."""
    image = ground.clone()
    image[:, :, :CHANGED_ROWS] += CHANGE * attributes[:, :, None, None]
    return image


class AttributeTranslator(PaperModule):
    """``truth``, ``nothing``, or ``wrong``: blue whatever is asked for."""

    def __init__(self, does: str = "truth") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.weight = nn.Parameter(torch.zeros(1))
        self.places: set[int] = set()

    def translate(self, images: Tensor, attributes: Tensor, place: int) -> Tensor:
        self.places.add(place)
        if self.hp.does == "nothing":
            return images
        ground = torch.where(images >= CHANGE - 1e-6, images - CHANGE, images)
        blue = torch.tensor([0.0, 0.0, 1.0]).expand(len(images), 3)
        return drawn(ground, blue if self.hp.does == "wrong" else attributes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Pictures:
    """Scenes on noise; one of red and green at most."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (count, 3, SIZE, SIZE)
        self.ground = torch.randint(0, 50, shape, generator=generator).float() / 255
        hair = torch.randint(0, 3, (count,), generator=generator)
        blue = torch.randint(0, 2, (count,), generator=generator)
        self.attributes = torch.stack([hair == 0, hair == 1, blue == 1], 1).float()

    def __len__(self) -> int:
        return len(self.ground)

    def batch(self, indices: Tensor, device: Any = None) -> dict[str, Any]:
        own = self.attributes[indices]
        return {"image": drawn(self.ground[indices], own), "attributes": own, "index": indices}


class KnownPictures(Pictures):
    def counterparts(self, indices: Tensor, attributes: Tensor) -> Tensor:
        return drawn(self.ground[indices], attributes)

    def object_masks(self, indices: Tensor, attributes: Tensor | None = None) -> Tensor:
        # Without its edge, which the report has to add.
        rows = torch.arange(SIZE) < CHANGED_ROWS - 1
        return rows[None, :, None].expand(len(indices), SIZE, SIZE)


class Data(LightningDataModule):
    test: Any

    def __init__(self, known: bool = True, kind: str = "multi_label") -> None:
        super().__init__()
        self.attribute_names, self.attribute_kind = NAMES, kind
        self.exclusive_groups = [["red", "green"]]
        build = KnownPictures if known else Pictures
        self.train, self.val, self.test = build(60, 0), build(5, 1), build(13, 2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(2, 1))  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


class Joint(Data):
    def __init__(self) -> None:
        super().__init__()
        self.members = [Data(), Data(known=False)]


def report(**options: Any) -> AttributeReport:
    given: dict[str, Any] = {
        "judge_steps": 80,
        "judge_lr": 0.01,
        "judge_width": 4,
        "features": "pixels",
        "batch_size": 4,
    }
    return AttributeReport(**{**given, **options})


def judged(
    folder: Path, does: str = "truth", data: Data | None = None, **options: Any
) -> dict[str, float]:
    trainer = boring_trainer(folder, callbacks=[report(**options)])
    trainer.test(AttributeTranslator(does), datamodule=data or Data(), verbose=False)
    prefix = "test/attributes/"
    return {k.removeprefix(prefix): float(v) for k, v in trainer.callback_metrics.items()}


def test_the_true_edit(tmp_path: Path) -> None:
    found = judged(tmp_path, gan_train_steps=80)
    for metric in ("target", "kept", "gan_test"):
        assert found[metric] == 100
    for metric in ("reconstruction", "error_object", "error_rest"):
        assert found[metric] == pytest.approx(0, abs=1e-4)
    assert found["blue/label_effect"] == pytest.approx(100 * CHANGE / 3 * CHANGED_ROWS / SIZE)
    assert found["gan_train"] > 95
    assert found["real/target"] == 100


def test_no_edit_is_the_images_as_they_are(tmp_path: Path) -> None:
    found = judged(tmp_path, "nothing")
    data = Data()
    assert found["target"] == 0
    # MatchGAN's protocol counts what was there before.
    assert found["red/gan_test"] == pytest.approx(100 * float(data.test.attributes[:, 0].mean()))
    assert found["blue/gan_test"] == 0
    assert found["kept"] == 100
    assert found["reconstruction"] == found["label_effect"] == 0
    assert found["blue/error_object"] == pytest.approx(100 * CHANGE / 3, abs=1e-3)
    assert found["error_rest"] == 0
    for metric in ("target", "kept", "gan_test", "error_object", "error_rest"):
        assert found[metric] == found[f"source/{metric}"]


def test_a_label_that_is_ignored(tmp_path: Path) -> None:
    found = judged(tmp_path, "wrong")
    truth = judged(tmp_path / "truth")
    assert found["label_effect"] == 0
    assert found["red/target"] == 0
    assert found["red/kept"] < 80
    assert found["error_object"] > 5
    assert found["fid"] > 3 * truth["fid"]
    assert found["inception_score"] < 1.2 < 2 < truth["inception_score"]
    assert truth["fid_mean"] == pytest.approx(
        sum(truth[f"{name}/fid"] for name in NAMES) / len(NAMES)
    )


def test_classes(tmp_path: Path) -> None:
    """One-hot labels: all attributes exclude each other, so nothing is left to be kept."""
    data = Data(known=False, kind="single_label")
    data.exclusive_groups = [NAMES]
    for part in (data.train, data.test):
        part.attributes = torch.eye(3)[torch.arange(len(part)) % 3]
    found = judged(tmp_path, data=data)
    assert found["target"] == found["gan_test"] == 100
    assert "kept" not in found
    assert "error_object" not in found
    assert found["inception_score"] == pytest.approx(3, abs=0.4)


def test_table_picture_and_several_data_sets(tmp_path: Path) -> None:
    found = judged(tmp_path, data=Joint(), pictures=2)
    assert found["0/target"] == found["1/target"] == 100
    assert "0/error_object" in found
    assert "1/error_object" not in found
    with (tmp_path / "tables" / "attributes_0-table.csv").open() as file:
        table = list(csv.reader(file))
    expected = ["to red", "to green", "to blue", "all", "images as they are", "real images"]
    assert [row[0] for row in table[1:]] == expected
    assert float(table[4][table[0].index("as asked %")]) == 100
    text = (tmp_path / "attributes_1_table.txt").read_text()
    assert "right on 100.0 % of the real test images" in text
    known, unknown = (
        decode_image(str(tmp_path / "images" / f"test-attributes-{place}-0.png"))
        for place in range(2)
    )
    # A row of the truth below each of two images; a column for each attribute beside the input.
    assert known.shape[1] - unknown.shape[1] == pytest.approx(2 * 50, abs=4)
    assert 4 * 50 < known.shape[2] < 7 * 50


def test_judges_do_not_depend_on_the_run(tmp_path: Path) -> None:
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        found.append(judged(tmp_path / str(seed), "nothing", judge_steps=5))
    assert found[0] == found[1]
    assert judged(tmp_path, "nothing", judge_steps=5, judge_seed=1) != found[0]


def test_grid_during_the_training(tmp_path: Path) -> None:
    trainer = boring_trainer(tmp_path, max_epochs=4, callbacks=[report(every_n_epochs=2)])
    trainer.fit(AttributeTranslator(), datamodule=Data())
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["val-attributes-1.png", "val-attributes-3.png"]


TWO = """
import sys
from pathlib import Path
from tests.callbacks.boring import boring_trainer
from tests.callbacks.test_attributes import Data, AttributeTranslator, report

for name, options in (("two", {"devices": 2, "strategy": "ddp_fork"}), ("one", {})):
    trainer = boring_trainer(Path(sys.argv[1]) / name, callbacks=[report()], **options)
    trainer.test(AttributeTranslator(), datamodule=Data(), verbose=False)
"""


def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    run_fresh(TWO, str(tmp_path))
    assert_one_and_two_agree(tmp_path, "attributes-table.csv", rows=6)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    def fails(message: str, module: Any = None, data: Any = None) -> None:
        trainer = boring_trainer(tmp_path, callbacks=[report()])
        with pytest.raises(MisconfigurationException, match=message):
            trainer.test(module or AttributeTranslator(), datamodule=data or Data(), verbose=False)

    fails("translate, BoringGAN has no translate", BoringGAN())
    nameless = Data()
    del nameless.attribute_names
    fails("Data has no attribute_names", data=nameless)
    empty = Data()
    empty.test = None
    fails("Data has no set 'test'", data=empty)


@pytest.mark.parametrize(
    "options",
    [{"judge_steps": 0}, {"gan_train_steps": -1}, {"pictures": 0}, {"judge_network": "large"}],
)
def test_impossible_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        report(**options)


def test_missing_inception_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        report(inception_weights=str(tmp_path / "none.pth"))
