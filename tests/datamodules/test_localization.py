import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from datamodules import datasets
from datamodules.boxes import Framing, framed_boxes, read_boxes
from datamodules.datasets import BatchDataset, ImageArrayDataset, PictureFileDataset
from datamodules.localization import LocalizationDataModule, LocalizedScenes
from datamodules.shapes import Scenes
from datamodules.shapes_options import SceneOptions
from tests.datamodules.conftest import save_picture
from tests.datamodules.test_base import (
    KilledError,
    Recorder,
    SaveAt,
    TwoRanks,
    make_trainer,  # noqa: F401 (a fixture)
)
from tests.datamodules.test_open_set import Collector, trainer  # noqa: F401 (a fixture)

SMALL: Any = {
    "shapes": SceneOptions(mode="parts", image_size=32),
    **{"shapes_train": 40, "shapes_val": 10, "shapes_test": 12, "batch_size": 8},
}


def ready(stage: str | None = None, **arguments: Any) -> LocalizationDataModule:
    data = LocalizationDataModule(**arguments)
    data.prepare_data()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*validation pictures are tested on too")
        data.setup(stage)
    return data


def part(dataset: BatchDataset | None) -> Any:
    assert dataset is not None
    return dataset


def everything(dataset: BatchDataset | None) -> dict[str, Any]:
    return part(dataset).__getitems__(range(len(part(dataset))))


def save_object(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    """A black picture of this (height, width) with a white box, its last row and column excluded."""
    pixels = np.zeros((*size, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def white_box(image: Tensor) -> list[int]:
    rows, columns = (image[0] > 127).any(1), (image[0] > 127).any(0)
    y, x = rows.nonzero().flatten(), columns.nonzero().flatten()
    return [int(x[0]), int(y[0]), int(x[-1]) + 1, int(y[-1]) + 1]


# ---------------------------------------------------------------------- scenes
def test_scenes_come_with_the_box_of_their_creature() -> None:
    data = ready(**SMALL)
    assert set(everything(data.train)) == {"image", "label", "index"}
    for name, start, count in (("val", 10**9, 10), ("test", 2 * 10**9, 12)):
        batch = everything(getattr(data, name))
        scenes = Scenes(SMALL["shapes"], 0, count, start)
        assert torch.equal(batch["image"], scenes.render(range(count)))
        assert torch.equal(batch["boxes"], scenes.truth(range(count))["boxes"])
        assert torch.equal(batch["label"], scenes.labels)
        assert batch["boxes"].shape == (count, 1, 4)
    assert data.class_names == ["circle", "square", "triangle", "cross", "ring", "star"]
    assert data.num_classes == 6
    assert data.split_info["counts"] == {
        **{"train": 40, "val": 10, "val_with_boxes": 10, "test": 12, "test_with_boxes": 12}
    }
    assert not data.horizontal_flip  # it would turn the stripes of one class into another's


def test_parts_share_no_scene_and_do_not_depend_on_each_other() -> None:
    data, other = ready(**SMALL), ready(**{**SMALL, "shapes_train": 50, "shapes_val": 4})
    images = [
        image.numpy().tobytes()
        for p in ("train", "val", "test")
        for image in getattr(data, p).images
    ]
    assert len(set(images)) == 62
    assert torch.equal(part(other.test).images, part(data.test).images)
    assert torch.equal(part(other.val).images, part(data.val).images[:4])
    assert not torch.equal(part(ready(**SMALL, shapes_seed=1).test).images, part(data.test).images)


def test_scenes_beyond_the_limit_are_drawn_when_asked_for() -> None:
    data, kept = ready(**SMALL, cache_limit=0.0), ready(**SMALL)
    assert isinstance(data.val, LocalizedScenes)
    assert isinstance(kept.val, ImageArrayDataset)
    drawn, expected = everything(data.val), everything(kept.val)
    assert drawn.keys() == expected.keys()
    assert all(torch.equal(drawn[name], expected[name]) for name in drawn)


def test_boxes_are_those_of_the_objects_of_the_class() -> None:
    options = SceneOptions(
        image_size=64, max_objects=4, shapes=("circle", "square"), sizes=("small",)
    )
    scenes = LocalizedScenes(options, count=40, ground_truth=True)
    batch, truth = scenes.__getitems__(range(40)), scenes.truth(range(40))
    several = 0
    for i in range(40):
        wanted = [
            box
            for box, label in zip(
                truth["boxes"][i].tolist(), truth["object_labels"][i], strict=True
            )
            if label == batch["label"][i] and box[0] >= 0
        ]
        several += len(wanted) > 1
        assert batch["boxes"][i].tolist() == wanted + [[-1] * 4] * (4 - len(wanted))
        rows, columns = batch["mask"][i].nonzero(as_tuple=True)
        corners = [columns.min(), rows.min(), columns.max(), rows.max()]
        around = torch.tensor(wanted)
        assert [int(c) for c in corners] == [
            *around[:, :2].amin(0).tolist(),
            *around[:, 2:].amax(0).tolist(),
        ], "the pixels of those objects, and no others"
    assert several > 5


# ---------------------------------------------------------------------- boxes
def test_boxes_follow_the_resize_truncated() -> None:
    boxes = [[(60, 27, 385, 331)], [(14, 112, 402, 298), (1, 2, 499, 333)], []]
    framed = framed_boxes(boxes, [(335, 500), (347, 500), (0, 0)], Framing(224))
    assert framed[0].tolist() == [[26, 18, 172, 221], [-1] * 4]
    assert framed[1].tolist() == [[6, 72, 180, 192], [0, 1, 223, 214]]
    assert framed[2].tolist() == [[-1] * 4] * 2


@pytest.mark.parametrize(
    "framing",
    [Framing(60), Framing(50, True), Framing(60, False, 40), Framing(60, True, 44)],
)
def test_boxes_lie_where_the_object_is(framing: Framing, tmp_path: Path) -> None:
    for size, box in (((100, 150), (40, 30, 111, 70)), ((90, 60), (11, 20, 40, 80))):
        save_object(tmp_path / "a.png", size, box)
        image = framing.decode(tmp_path / "a.png")
        if framing.crop is not None:
            assert image.shape == (3, framing.crop, framing.crop)
        found = np.array(framing.box(box, size))
        assert np.abs(found - white_box(image)).max() <= 1, (size, found, white_box(image))


def test_a_box_outside_of_the_cut_is_a_line_on_its_border() -> None:
    assert Framing(100, True, 100).box((0, 10, 40, 50), (100, 300)) == (0, 10, 0, 50)
    assert Framing(100, True, 100).box((210, 0, 300, 99), (100, 300)) == (100, 0, 100, 99)


def test_boxes_files(tmp_path: Path) -> None:
    path = tmp_path / "boxes.csv"
    path.write_text(
        "image,x0,y0,x1,y1\na, b.jpg,1,2,3.9,4\n\nc.jpg, 5, 6, 7, 8\na, b.jpg,0,0,1,1\n"
    )
    lines = read_boxes(path)
    assert [(line.picture, line.box) for line in lines] == [
        ("a, b.jpg", (1, 2, 3, 4)),
        ("c.jpg", (5, 6, 7, 8)),
        ("a, b.jpg", (0, 0, 1, 1)),
    ]
    assert lines[1].place.endswith("line 4")
    path.write_text("c.jpg,5,6,7,8")
    assert len(read_boxes(path)) == 1
    for text, message in (
        ("a,1,2,3,4\nb,1,2,3", "line 2: expected PICTURE,x0,y0,x1,y1 .* got 'b,1,2,3'"),
        ("a,1,2,3,x", "line 1: expected"),
        ("a,1,2,3,nan", "line 1: expected"),
        ("a,mask,ignore\nb,m,i", "line 2: expected"),
        ("a,5,2,3,4", r"line 1: the box \(5, 2, 3, 4\) is inverted"),
        ("a,x0,y0,x1,y1", "has no line PICTURE"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_boxes(path)


# ---------------------------------------------------------------------- own folders
@pytest.fixture
def footballers(tmp_path: Path) -> Path:
    """Pictures of 60x40 with a box; in validation 1 of the second class there is another."""
    for half, count in (("train", 6), ("validation", 3), ("test", 2)):
        for place, name in enumerate(("messi", "son")):
            for i in range(count):
                save_object(
                    tmp_path / half / name / f"{i}.png", (40, 60), (10 + i, 5, 40 + place, 25)
                )
    rows = ["image,x0,y0,x1,y1", "validation/son/1.png,0,0,30,20"]
    for half, count in (("validation", 3), ("test", 2)):
        for place, name in enumerate(("messi", "son")):
            rows += [f"{half}/{name}/{i}.png,{10 + i},5,{40 + place},25" for i in range(count)]
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    return tmp_path


def own(
    root: Path, stage: str | None = None, boxes: bool = True, **more: Any
) -> LocalizationDataModule:
    arguments: Any = {"image_size": 20, "resize": 24, "batch_size": 4, **more}
    if boxes:
        arguments["boxes"] = str(root / "boxes.csv")
    return ready(stage, dataset="image_folder", root=str(root), **arguments)


def test_own_folders_with_boxes(footballers: Path) -> None:
    data = own(footballers)
    assert data.class_names == ["messi", "son"]
    train = everything(data.train)
    assert train["image"].shape == (12, 3, 24, 24)
    assert "boxes" not in train
    val = next(iter(data.val_dataloader()))
    assert val["image"].shape == (6, 3, 20, 20)
    assert val["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert val["path"][4] == str(footballers / "validation" / "son" / "1.png")
    assert val["boxes"].dtype == torch.int64
    assert val["boxes"][4].tolist() == [[0, 0, 10, 10], [3, 2, 13, 12]]
    assert val["boxes"][0].tolist() == [[3, 2, 13, 12], [-1] * 4]
    for image, boxes in zip(val["image"], val["boxes"], strict=True):
        box = boxes[-1] if boxes[-1, 0] >= 0 else boxes[0]
        assert (box - torch.tensor(white_box(image))).abs().max() <= 1
    assert data.split_info["parts"] == {"train": "train", "val": "validation", "test": "test"}
    assert data.split_info["counts"] == {
        **{"train": 12, "val": 6, "val_with_boxes": 6, "test": 4, "test_with_boxes": 4}
    }
    assert data.horizontal_flip


def test_without_boxes_there_is_classification_alone(footballers: Path) -> None:
    (footballers / "validation").rename(footballers / "val")
    data = own(footballers, boxes=False)
    assert set(everything(data.val)) == {"image", "label", "index", "path"}
    assert len(part(data.val)) == 6


def test_validation_pictures_are_tested_on_without_a_test_folder(footballers: Path) -> None:
    (footballers / "test").rename(footballers / "elsewhere")
    (footballers / "boxes.csv").write_text("validation/son/1.png,0,0,30,20")
    data = LocalizationDataModule(
        "image_folder", str(footballers), str(footballers / "boxes.csv"), image_size=8
    )
    with pytest.warns(UserWarning, match="so the validation pictures are tested on too"):
        data.setup("test")
    assert part(data.test).paths[0].startswith(str(footballers / "validation"))
    assert data.train is data.val is None


@pytest.mark.parametrize("name", ["son/0", "./son/0.png", "test/son/0.png", "0"])
def test_a_picture_has_several_names(name: str, footballers: Path) -> None:
    for half in ("train", "validation"):
        (footballers / half / "son" / "0.png").unlink()
        (footballers / half / "messi" / "0.png").unlink()
    (footballers / "test" / "messi" / "0.png").unlink()
    (footballers / "boxes.csv").write_text(f"{name},0,0,30,20")
    with pytest.warns(UserWarning, match="2 of 3 test pictures have no box, e.g. .*left out"):
        data = own(footballers, "test")
    batch = everything(data.test)
    assert batch["boxes"][:, 0].tolist() == [[-1] * 4, [0, 0, 10, 10], [-1] * 4]
    assert data.split_info["counts"] == {"test": 3, "test_with_boxes": 1}
    with pytest.warns(UserWarning, match="4 of 4 val pictures have no box"):
        assert "boxes" not in everything(own(footballers, "validate").val)


def test_bad_boxes(footballers: Path) -> None:
    path = footballers / "boxes.csv"
    for text, message in (
        (
            "a.png,1,2,3,4\nb/c.png,1,2,3,4",
            "names 2 pictures that .* does not have: a.png, b/c.png;",
        ),
        ("son/0.png,1,2,3,4", "son/0.png may be any of several pictures .*/test/son/0.png or "),
        ("test/son/0.png,1,2,61,4", r"line 1: the box .* is not inside .*60x40 \(width x height\)"),
        ("test/son/0.png,-1,2,3,4", "is not inside"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            own(footballers, "test")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"give one with --data.boxes FILE"):
        own(footballers)


def test_bad_folders(footballers: Path) -> None:
    (footballers / "validation" / "neymar").mkdir()
    with pytest.raises(ValueError, match=r"has pictures of neymar, which .*train has not"):
        own(footballers)
    (footballers / "train" / "neymar").mkdir()
    with pytest.raises(ValueError, match=r"train/neymar holds no pictures"):
        own(footballers)
    (footballers / "train" / "neymar").rmdir()
    (footballers / "train" / "son").rename(footballers / "son")
    with pytest.raises(ValueError, match="train has 1 class folder: messi; a classifier needs"):
        own(footballers)
    (footballers / "validation").rename(footballers / "valid")
    with pytest.raises(FileNotFoundError, match=r"validation/CLASS \(or val/CLASS\)"):
        own(footballers, "validate")
    with pytest.raises(FileNotFoundError, match=r"--data.root DIR"):
        own(footballers / "nowhere", boxes=False)
    (footballers / "test" / "son" / "1.png").write_bytes(b"damaged")
    (footballers / "son").rename(footballers / "train" / "son")
    (footballers / "validation").mkdir()
    with pytest.raises(RuntimeError, match=r"son/1.png"):
        own(footballers, "test", boxes=False)


def test_kept_pictures_are_those_decoded_later(
    footballers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = own(footballers)
    lazy = own(footballers, cache_limit=0.0)
    expected = [everything(getattr(kept, name)) for name in ("train", "val")]

    def refuse(path: Path) -> Tensor:
        raise OSError("decoded")

    for name, batch in zip(("train", "val"), expected, strict=True):
        again = everything(getattr(lazy, name))
        assert torch.equal(again["image"], batch["image"])
        assert again["path"] == batch["path"]
    monkeypatch.setattr("datamodules.boxes.decode_picture", refuse)
    everything(kept.train)
    with pytest.raises(RuntimeError, match=r"12 of 12 images of a batch .*cannot be read"):
        everything(lazy.train)


# ---------------------------------------------------------------------- crops
def gradients(root: Path) -> Path:
    """Pictures of several sizes in which the place of every pixel can be told."""
    for half, count in (("train", 8), ("validation", 2)):
        for place, name in enumerate(("messi", "son")):
            for i in range(count):
                y, x = np.mgrid[: 30 + 3 * i, : 40 - 2 * place]
                path = root / half / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.stack([3 * x, 3 * y, np.full_like(x, 10 * i + 100 * place)], -1)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_training_crops_lie_within_their_pictures(
    keep_aspect: bool,
    tmp_path: Path,
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    data = own(gradients(tmp_path), "fit", False, keep_aspect=keep_aspect, horizontal_flip=False)
    module = Recorder()
    make_trainer(max_epochs=4).fit(module, datamodule=data)
    assert len(module.images) == 16
    corners = set()
    framing = Framing(24, keep_aspect)
    for (_, _, indices), images in zip(module.seen, module.images, strict=True):
        assert images.shape == (4, 3, 20, 20)
        for i, image in zip(indices, images, strict=True):
            whole = framing.decode(Path(part(data.train).paths[i]))
            height, width = whole.shape[1:]
            assert (
                (min(height, width) == 24 < max(height, width)) or not keep_aspect or i in (3, 11)
            )
            found = [
                (top, left)
                for top in range(height - 19)
                for left in range(width - 19)
                if torch.equal(whole[:, top : top + 20, left : left + 20] / 255, image)
            ]
            assert len(found) == 1
            corners |= set(found)
    tops, lefts = ({corner[axis] for corner in corners} for axis in (0, 1))
    assert {0, 4} <= tops & lefts  # both ends
    assert len(corners) > 20
    assert (max(lefts) > 6) == keep_aspect  # beyond the middle square
    for batch in module.validation:
        assert batch["image"].shape[2:] == (20, 20)
        assert "size" not in batch


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_a_resumed_run_sees_the_same_crops_and_flips(
    keep_aspect: bool,
    tmp_path: Path,
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    gradients(tmp_path)

    def data() -> LocalizationDataModule:
        return own(tmp_path, "fit", False, keep_aspect=keep_aspect)

    whole, first, second = Recorder(), Recorder(), Recorder()
    make_trainer().fit(whole, datamodule=data())
    path = str(tmp_path / "killed.ckpt")
    with pytest.raises(KilledError):
        make_trainer(SaveAt(1, 1, path)).fit(first, datamodule=data())
    make_trainer().fit(second, datamodule=data(), ckpt_path=path)
    assert len(first.images) == 6
    assert all(
        torch.equal(a, b) for a, b in zip(first.images + second.images, whole.images, strict=True)
    )


@pytest.mark.parametrize("keep_aspect", [False, True])
def test_two_processes_see_the_halves_of_what_one_sees(
    keep_aspect: bool,
    tmp_path: Path,
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    gradients(tmp_path)
    one = Recorder()
    make_trainer(max_epochs=1).fit(
        one, datamodule=own(tmp_path, "fit", False, keep_aspect=keep_aspect)
    )
    fresh = make_trainer()
    halves = []
    for rank in range(2):
        data = own(tmp_path, "fit", False, keep_aspect=keep_aspect)
        data.trainer = TwoRanks(fresh, rank)  # type: ignore[assignment]
        halves.append(data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0))
    assert torch.equal(torch.cat([half["image"] for half in halves]), one.images[0])
    assert torch.cat([half["index"] for half in halves]).tolist() == one.seen[0][2]


# ---------------------------------------------------------------------- CUB-200-2011, ImageNet
def cub(root: Path, per_class: int = 8) -> Path:
    """Three classes; picture i of a class is 30x(20 + i) (width x height); every fourth is for the test."""
    base = root / "CUB_200_2011"
    rows: dict[str, list[str]] = {name: [] for name in ("images", "labels", "split", "boxes")}
    names = ["001.Black_footed_Albatross", "002.Laysan", "003.Sooty"]
    for label, name in enumerate(names):
        for i in range(per_class):
            number = len(rows["images"]) + 1
            save_object(base / "images" / name / f"{i}.jpg", (20 + i, 30), (2 + i, 3, 20, 17))
            rows["images"].append(f"{number} {name}/{i}.jpg")
            rows["labels"].append(f"{number} {label + 1}")
            rows["split"].append(f"{number} {int(i % 4 > 0)}")
            rows["boxes"].append(f"{number} {2 + i}.0 3.6 {18 - i}.0 13.7")
    for name, file in (
        ("images", "images"),
        ("labels", "image_class_labels"),
        ("split", "train_test_split"),
        ("boxes", "bounding_boxes"),
    ):
        (base / f"{file}.txt").write_text("\n".join(rows[name]) + "\n")
    return root


def metadata(folder: Path, rows: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def birds(root: Path, stage: str | None = None) -> LocalizationDataModule:
    return ready(stage, dataset="cub200", root=str(root), image_size=10, resize=10, batch_size=3)


def test_cub200_with_validation_boxes_carved_out_of_training(tmp_path: Path) -> None:
    data = birds(cub(tmp_path))
    assert data.class_names == ["Black_footed_Albatross", "Laysan", "Sooty"]
    assert [len(part(getattr(data, p))) for p in ("train", "val", "test")] == [3, 15, 6]
    paths = {p: set(part(getattr(data, p)).paths) for p in ("train", "val", "test")}
    assert len(paths["train"] | paths["val"] | paths["test"]) == 24
    assert {Path(path).stem for path in paths["test"]} == {"0", "4"}
    test = everything(data.test)
    assert test["label"].tolist() == [0, 0, 1, 1, 2, 2]
    # Picture 4 of a class is 30x24 and has the box (6, 3, 20, 17).
    assert test["boxes"][1].tolist() == [[2, 1, 6, 7]]
    assert data.split_info["parts"]["val"] == "training half of 5 per class"
    assert data.split_info["parts"]["train"] == "training half without 5 per class"
    again = birds(tmp_path, "validate")
    assert part(again.val).paths == part(data.val).paths


def test_cub200_with_the_validation_pictures_of_wsolevaluation(tmp_path: Path) -> None:
    cub(tmp_path)
    ids = ["001.Black_footed_Albatross/7.jpg", "003.Sooty/9.jpg"]
    for name in ids:
        save_picture(tmp_path / "CUBV2" / name, 9)
    metadata(
        tmp_path / "CUBV2",
        {
            "image_ids": ids,
            "class_labels": [f"{ids[0]},0", f"{ids[1]},2"],
            "image_sizes": [f"{name},20,20" for name in ids],
            "localization": [f"{ids[0]},2,4,19,13", f"{ids[1]},0,0,5,5"],
        },
    )
    data = birds(tmp_path)
    assert (len(part(data.train)), len(part(data.test))) == (18, 6)
    val = everything(data.val)
    assert (val["label"].tolist(), val["boxes"][0].tolist()) == ([0, 2], [[1, 2, 9, 6]])
    assert data.split_info["parts"]["val"] == "CUBV2"


def test_damaged_cub200(tmp_path: Path) -> None:
    base = cub(tmp_path, per_class=6) / "CUB_200_2011"
    with pytest.raises(ValueError, match=r"leaves none of some class .*put CUBV2 into"):
        birds(tmp_path, "fit")
    boxes = base / "bounding_boxes.txt"
    text = boxes.read_text()
    boxes.write_text(text.replace("1 2.0 3.6 18.0 13.7", "1 20 3 18 13", 1))
    with pytest.raises(ValueError, match=r"picture 1: the box .*30x20"):
        birds(tmp_path, "test")
    boxes.write_text(text.replace("1 2.0 3.6 18.0 13.7", "1 2.0 3.6", 1))
    with pytest.raises(RuntimeError, match="damaged at picture 1"):
        birds(tmp_path, "test")
    boxes.write_text("1 2 3 4 5")
    with pytest.raises(RuntimeError, match=r"bounding_boxes.txt is about 1 pictures"):
        birds(tmp_path, "test")
    boxes.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"bounding_boxes.txt is missing: expected the unpacked"
    ):
        birds(tmp_path, "test")


@pytest.fixture
def imagenet_root(tmp_path: Path) -> Path:
    names = ["n02", "n01"]
    for name in names:
        for i in range(4):
            save_picture(tmp_path / "train" / name / f"{name}_{i}.JPEG", 30 * i, 20)
    for half, ids in (("val", ["val2/0/0.jpeg", "val2/1/0.jpeg"]), ("test", ["val/a.JPEG"])):
        for name in ids:
            save_picture(tmp_path / name, 80, 20)
        metadata(
            tmp_path / "metadata" / half,
            {
                "image_ids": ids,
                "class_labels": [f"{name},{len(ids) - 1 - i}" for i, name in enumerate(ids)],
                "image_sizes": [f"{name},20,20" for name in ids],
                "localization": [f"{name},{i},2,19,19" for name in ids for i in range(2)],
            },
        )
    return tmp_path


def imagenet(root: Path, stage: str | None = None) -> LocalizationDataModule:
    arguments: Any = {"image_size": 10, "resize": 12, "batch_size": 4, "cache_limit": 0.0}
    return ready(stage, dataset="imagenet", root=str(root), **arguments)


def test_imagenet_is_never_read_as_a_whole(
    imagenet_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    original = datasets.decode_picture

    def record(path: Path) -> Tensor:
        decoded.append(path)
        return original(path)

    monkeypatch.setattr("datamodules.boxes.decode_picture", record)
    data = imagenet(imagenet_root)
    loader = data.train_dataloader()
    assert not decoded
    batch = next(iter(loader))
    assert len(decoded) == len(batch["index"]) == 4
    assert data.class_names == ["n01", "n02"]
    assert part(data.train).labels.tolist() == [0] * 4 + [1] * 4
    val = everything(data.val)
    assert val["label"].tolist() == [1, 0]
    assert val["boxes"].tolist() == [[[0, 1, 9, 9], [0, 1, 9, 9]]] * 2
    assert len(part(data.test)) == 1


def test_imagenet_with_metadata_of_the_training_pictures(imagenet_root: Path) -> None:
    ids = ["train/n02/n02_1.JPEG", "train/n01/n01_3.JPEG"]
    folder = imagenet_root / "metadata" / "train"
    metadata(folder, {"image_ids": ids, "class_labels": [f"{ids[0]},1", f"{ids[1]},0"]})
    train = part(imagenet(imagenet_root).train)
    assert train.paths == [str(imagenet_root / name) for name in ids]
    assert train.labels.tolist() == [1, 0]


def test_damaged_metadata(imagenet_root: Path) -> None:
    folder = imagenet_root / "metadata" / "test"
    for file, text, message in (
        ("class_labels", "val/a.JPEG,2", "has labels 2 to 2, but there are 2 classes"),
        ("class_labels", "val/a.JPEG,x", "line 1: expected an id and 1 numbers"),
        ("class_labels", "val/b.JPEG,1", "lacks 1 of the 1 pictures of image_ids.txt: val/a.JPEG"),
        ("image_sizes", "val/a.JPEG,20", "line 1: expected an id and 2 numbers"),
        ("localization", "val/b.JPEG,1,1,2,2", "boxes of 1 pictures that are not in .*val/b.JPEG"),
    ):
        kept = (folder / f"{file}.txt").read_text()
        (folder / f"{file}.txt").write_text(text)
        with pytest.raises(RuntimeError, match=message):
            imagenet(imagenet_root, "test")
        (folder / f"{file}.txt").write_text(kept)
    (imagenet_root / "val" / "a.JPEG").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"val/a.JPEG is missing: expected the first picture"
    ):
        imagenet(imagenet_root, "test")
    (folder / "image_sizes.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"image_sizes.txt is missing: expected the metadata"
    ):
        imagenet(imagenet_root, "test")


# ---------------------------------------------------------------------- the rest
def test_predict_on_a_folder(trainer: Trainer, tmp_path: Path) -> None:  # noqa: F811
    for i, name in enumerate(["b.png", "a.png", "deep/c.jpg"]):
        save_object(tmp_path / "pictures" / name, (30, 50 + i), (1, 2, 20, 20))
    arguments: Any = {"image_size": 16, "eval_batch_size": 2}
    data = LocalizationDataModule(
        "imagenet",
        str(tmp_path / "nowhere"),
        predict_folder=str(tmp_path / "pictures"),
        **arguments,
    )
    batches: Any = trainer.predict(Collector(), datamodule=data)
    assert [path for b in batches for path in b["path"]] == [
        str(tmp_path / "pictures" / name) for name in ("a.png", "b.png", "deep/c.jpg")
    ]
    assert batches[0]["image"].shape == (2, 3, 16, 16)
    assert batches[0]["image"].dtype == torch.float32
    assert batches[0]["original_size"].tolist() == [[30, 51], [30, 50]]
    assert batches[1]["label"].tolist() == [-1]
    cut = LocalizationDataModule(
        "imagenet", eval_crop=True, predict_folder=str(tmp_path / "pictures"), **arguments
    )
    cut.setup("predict")
    assert "original_size" not in everything(cut.pictures)
    data.load_state_dict({"class_names": ["x", "y"]})
    assert (data.class_names, data.num_classes) == (["x", "y"], 2)


def test_a_checkpoint_of_other_classes_is_refused(footballers: Path) -> None:
    data = own(footballers, "validate")
    data.load_state_dict(data.state_dict())
    data.load_state_dict({})
    with pytest.raises(
        ValueError, match=r"only in the checkpoint: neymar; only in image_folder: son"
    ):
        data.load_state_dict({"class_names": ["messi", "neymar"]})
    with pytest.raises(ValueError, match="the same in another order"):
        data.load_state_dict({"class_names": ["son", "messi"]})


def test_a_checkpoint_holds_plain_values(trainer: Trainer, tmp_path: Path) -> None:  # noqa: F811
    trainer.fit(Collector(), datamodule=LocalizationDataModule(**SMALL))
    path = tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    assert "datamodule_hyper_parameters" in torch.load(path, weights_only=True)
    again = LocalizationDataModule.load_from_checkpoint(path, weights_only=True)
    assert again.shapes == SMALL["shapes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cub"}, "did you mean cub200"),
        ({"boxes": "b.csv"}, "boxes=b.csv does not apply to shapes; leave out --data.boxes"),
        ({"dataset": "cub200", "boxes": "b.csv"}, "boxes=b.csv does not apply to cub200"),
        ({"resize": 64}, "resize=64 does not apply to shapes"),
        ({"image_size": 32}, "use --data.shapes.image_size 32"),
        ({"dataset": "cub200", "resize": 200}, "resize=200 is smaller than the image_size=224"),
        ({"dataset": "cub200", "image_size": 0}, "image_size=0 must be at least 1"),
        ({"shapes_val": 0}, "shapes_val=0 must be at least 1"),
        ({"cache_limit": -1.0}, "cache_limit=-1.0 must be at least 0"),
        ({"shapes": SceneOptions(shapes=("star",))}, "needs at least two"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalizationDataModule(**arguments)


def test_pictures_and_what_belongs_to_them_agree_in_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 pictures but 2 of label"):
        PictureFileDataset([tmp_path], 8, torch.zeros(2).long())
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    boxes = torch.arange(8).view(2, 1, 4)
    with pytest.raises(ValueError, match="2 images but boxes for 1"):
        ImageArrayDataset(images, torch.zeros(2).long(), ["a"], boxes=boxes[:1])
    dataset = ImageArrayDataset(images, torch.zeros(2).long(), ["a"], boxes=boxes)
    assert dataset.subset([1]).batch([0])["boxes"].tolist() == [[[4, 5, 6, 7]]]
