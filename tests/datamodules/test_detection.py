"""Scenes and PASCAL VOC with boxes: where the boxes are, which pictures are whose, what is missing or damaged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from datamodules.datasets import BatchDataset
from datamodules.detection import VOC_CLASSES, DetectionDataModule, ObjectScenes
from datamodules.shapes import Scenes
from datamodules.shapes_options import SceneOptions
from lightning_modules.metrics.boxes import box_iou_inclusive
from tests.datamodules.conftest import save_picture
from tests.datamodules.test_base import (
    Recorder,
    make_trainer,  # noqa: F401 (a fixture)
)

OPTIONS = SceneOptions(image_size=32, max_objects=2)
SMALL: Any = {
    "shapes": OPTIONS,
    **{"shapes_train": 24, "shapes_val": 10, "shapes_test": 12, "batch_size": 8},
}


def ready(stage: str | None = None, **arguments: Any) -> DetectionDataModule:
    data = DetectionDataModule(**arguments)
    data.prepare_data()
    data.setup(stage)
    return data


def everything(dataset: BatchDataset | None) -> dict[str, Any]:
    assert dataset is not None
    return dataset.__getitems__(range(len(dataset)))


class Keeper(Recorder):
    """Remembers whole batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


# ---------------------------------------------------------------------- scenes
@pytest.mark.parametrize("cache_limit", [2.0, 0.0])
def test_scenes_come_with_the_boxes_and_classes_of_their_objects(cache_limit: float) -> None:
    data = ready(**SMALL, cache_limit=cache_limit)
    for name, start, count in (("train", 0, 24), ("val", 10**9, 10), ("test", 2 * 10**9, 12)):
        batch = everything(getattr(data, name))
        scenes = Scenes(OPTIONS, 0, count, start)
        truth = scenes.truth(range(count))
        assert set(batch) == {"image", "boxes", "object_labels", "index"}
        assert torch.equal(batch["image"], scenes.render(range(count)))
        assert torch.equal(batch["boxes"], truth["boxes"])
        assert torch.equal(batch["object_labels"], truth["object_labels"])
        assert batch["boxes"].shape == (count, 2, 4)
    assert data.class_names == list(OPTIONS.shapes)
    assert data.split_info["counts"] == {"train": 24, "val": 10, "test": 12}
    assert isinstance(data.train, ObjectScenes) == (cache_limit == 0)


def test_boxes_are_mirrored_with_their_images(
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    data, keeper = DetectionDataModule(**SMALL, horizontal_flip=True), Keeper()
    trainer = make_trainer(max_epochs=1, limit_val_batches=1)
    trainer.fit(keeper, datamodule=data)
    originals = everything(data.train)
    mirrored = 0
    for batch in keeper.batches:
        for row, index in enumerate(batch["index"].tolist()):
            image = originals["image"][index].float() / 255
            x0, y0, x1, y1 = originals["boxes"][index].T
            real = originals["object_labels"][index] >= 0
            if torch.equal(batch["image"][row], image):
                assert torch.equal(batch["boxes"][row], originals["boxes"][index])
            else:
                assert torch.equal(batch["image"][row], image.flip(-1))
                turned = torch.stack([31 - x1, y0, 31 - x0, y1], 1)
                assert torch.equal(batch["boxes"][row][real], turned[real])
                assert (batch["boxes"][row][~real] == -1).all()
                mirrored += 1
    assert 4 <= mirrored <= 20
    (validated,) = keeper.validation[-1:]
    val = everything(data.val)
    assert torch.equal(validated["boxes"], val["boxes"]), "validation is not augmented"


def test_scenes_are_not_mirrored_unless_asked_for() -> None:
    assert not DetectionDataModule(**SMALL).horizontal_flip
    assert DetectionDataModule("voc2012").horizontal_flip


# ---------------------------------------------------------------------- PASCAL VOC
ANNOTATION = """<annotation><filename>{name}.jpg</filename>
<size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"""
OBJECT = """<object><name>{label}</name><pose>Left</pose><truncated>0</truncated>{difficult}
<bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def save_voc(
    base: Path, name: str, size: tuple[int, int], objects: list[tuple[str, list[int], bool]]
) -> None:
    """A black picture with a white box for every object; boxes from pixel 0 on."""
    pixels = np.zeros((*size, 3), np.uint8)
    texts = []
    for label, (x0, y0, x1, y1), difficult in objects:
        pixels[y0 : y1 + 1, x0 : x1 + 1] = 255
        corners = {"x0": x0 + 1, "y0": y0 + 1, "x1": x1 + 1, "y1": y1 + 1}
        flag = "<difficult>1</difficult>" if difficult else ""
        texts.append(OBJECT.format(label=label, difficult=flag, **corners))
    for folder in ("JPEGImages", "Annotations"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(base / "JPEGImages" / f"{name}.jpg", quality=100)
    text = ANNOTATION.format(name=name, height=size[0], width=size[1], objects="".join(texts))
    (base / "Annotations" / f"{name}.xml").write_text(text)


@pytest.fixture
def voc_root(tmp_path: Path) -> Path:
    """20 training and 3 test pictures of 60x40 pixels; the last test picture has no object."""
    base = tmp_path / "VOCdevkit" / "VOC2012"
    lists = base / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    names = {"train": [f"a{i:02d}" for i in range(20)], "val": ["b0", "b1", "b2"]}
    for part, listed in names.items():
        (lists / f"{part}.txt").write_text("\n".join(listed) + "\n")
    for name in names["train"]:
        save_voc(base, name, (40, 60), [("cat", [6, 8, 29, 23], False)])
    hard = ("person", [33, 30, 44, 37], True)
    save_voc(base, "b0", (40, 60), [("tvmonitor", [0, 0, 29, 19], False), hard])
    save_voc(base, "b1", (60, 40), [("dog", [10, 20, 39, 59], False)])
    save_voc(base, "b2", (40, 60), [])
    return tmp_path


def test_voc_has_its_boxes_classes_and_difficult_objects(voc_root: Path) -> None:
    data = ready(dataset="voc2012", root=str(voc_root), image_size=120, batch_size=4)
    assert data.num_classes == 20
    assert data.split_info["counts"] == {"train": 18, "val": 2, "test": 3}
    assert [Path(p).stem for p in everything(data.val)["path"]] == ["a09", "a19"]
    batch = everything(data.test)
    none = [-1.0] * 4
    # Twice as wide, three times as high, then the other way round; edges are scaled.
    expected = [
        [[0.0, 0.0, 59.0, 59.0], [66.0, 90.0, 89.0, 113.0]],
        [[30.0, 40.0, 119.0, 119.0], none],
        [none, none],
    ]
    assert batch["boxes"].tolist() == expected
    tv, person, dog = map(VOC_CLASSES.index, ("tvmonitor", "person", "dog"))
    assert batch["object_labels"].tolist() == [[tv, person], [dog, -1], [-1, -1]]
    assert batch["difficult"].tolist() == [[False, True], [False, False], [False, False]]
    for row in (0, 1):
        bright = (batch["image"][row, 0] > 127).nonzero()
        x0, y0, x1, y1 = batch["boxes"][row, 0].int().tolist()
        inside = batch["image"][row, 0, y0 + 3 : y1 - 2, x0 + 3 : x1 - 2]
        assert (inside > 127).all()
        assert bright.amin(0).tolist() == pytest.approx([y0, x0], abs=1)


def test_pictures_without_any_object_are_refused(voc_root: Path) -> None:
    base = voc_root / "VOCdevkit" / "VOC2012"
    hard = ("person", [3, 3, 14, 17], True)
    for name in ("b0", "b1"):
        save_voc(base, name, (40, 60), [hard])
    with pytest.raises(ValueError, match=r"3 pictures of voc2012 test have no object that is not"):
        ready("test", dataset="voc2012", root=str(voc_root))


def test_without_training_images_nothing_but_the_test_set_is_read(voc_root: Path) -> None:
    data = ready("fit", dataset="voc2012", root=str(voc_root), training_images=False)
    assert (data.train, data.val, data.val_dataloader()) == (None, None, [])
    assert len(everything(data.test)["path"]) == 3


def test_squeezing_keeps_every_iou(voc_root: Path) -> None:
    base = voc_root / "VOCdevkit" / "VOC2012"
    boxes = [[3, 5, 40, 33], [10, 2, 51, 30]]
    save_voc(base, "b0", (37, 53), [("cat", box, False) for box in boxes])
    batch = everything(ready("test", dataset="voc2012", root=str(voc_root), image_size=64).test)
    squeezed = batch["boxes"][0]
    assert float(box_iou_inclusive(squeezed[:1], squeezed[1:])) == pytest.approx(
        float(box_iou_inclusive(boxes[:1], boxes[1:])), rel=1e-5
    )


def test_missing_and_damaged_files_of_voc(voc_root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"VOCtrainval_11-May-2012.tar.*--data.root"):
        ready(dataset="voc2012", root=str(tmp_path / "nowhere"))
    base = voc_root / "VOCdevkit" / "VOC2012"
    (base / "JPEGImages" / "a03.jpg").rename(tmp_path / "a03.jpg")
    with pytest.raises(FileNotFoundError, match=r"VOC train .*1 files are missing, e.g. .*a03.jpg"):
        ready("fit", dataset="voc2012", root=str(voc_root))
    (tmp_path / "a03.jpg").rename(base / "JPEGImages" / "a03.jpg")
    annotation = base / "Annotations" / "a04.xml"
    whole = annotation.read_text()
    for damaged, message in (
        (whole[:40], "no XML"),
        (whole.replace("cat", "unicorn"), "class 'unicorn' is none of VOC's"),
        (whole.replace("xmin", "left"), "no annotation of VOC: 'xmin' is missing"),
    ):
        annotation.write_text(damaged)
        with pytest.raises(RuntimeError, match=f"a04.xml .*{message}"):
            ready("fit", dataset="voc2012", root=str(voc_root))


# ---------------------------------------------------------------------- prediction, checkpoints, errors
def test_pictures_to_predict_keep_their_size_in_mind(tmp_path: Path) -> None:
    save_picture(tmp_path / "x.png", 9, 50)
    data = ready("predict", **SMALL, predict_folder=str(tmp_path))
    batch = everything(data.pictures)
    assert batch["image"].shape == (1, 3, 32, 32)
    assert batch["original_size"].tolist() == [[50, 50]]
    (tmp_path / "x.png").unlink()
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        ready("predict", **SMALL, predict_folder=str(tmp_path))


def test_a_checkpoint_of_other_classes_is_refused() -> None:
    data = DetectionDataModule(**SMALL)
    data.load_state_dict(data.state_dict())
    other = DetectionDataModule(**{**SMALL, "shapes": SceneOptions(label="colour")})
    with pytest.raises(ValueError, match=r"only in the checkpoint: circle.*only in shapes: red"):
        other.load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "voc"}, "unknown dataset 'voc': did you mean voc2012"),
        ({"image_size": 128}, "use --data.shapes.image_size 128"),
        ({"shapes_train": 0}, "shapes_train=0 must be at least 1"),
        ({"cache_limit": -1}, "cache_limit=-1"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionDataModule(**arguments)
