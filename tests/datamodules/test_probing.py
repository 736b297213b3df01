"""Probing sets: concepts where they are, errors that say what is wrong."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.camvid import CLASS_NAMES
from datamodules.colour_names import COLOUR_TERMS, name_colours
from datamodules.probing import FIRST_PROBED, ProbingDataModule
from datamodules.probing_sources import Concept
from datamodules.shapes import Scenes
from datamodules.shapes_options import SceneOptions

TERMS = list(COLOUR_TERMS)


def ready(**arguments: Any) -> ProbingDataModule:
    data = ProbingDataModule(**arguments)
    data.prepare_data()
    data.setup("test")
    return data


def numbers(data: ProbingDataModule) -> dict[str, int]:
    return {concept.name: number for number, concept in data.concepts.items()}


# ------------------------------------------------------------------------------- shapes
@pytest.mark.parametrize(
    "options",
    [SceneOptions(image_size=48, max_objects=3), SceneOptions(mode="parts")],
    ids=["objects", "parts"],
)
def test_scenes_have_exactly_the_concepts_that_are_drawn(options: SceneOptions) -> None:
    data = ready(shapes=options, shapes_test=5)
    batch = data._set.batch([0, 3, 4])
    scenes = Scenes(options, 0, 5, FIRST_PROBED)
    truth = scenes.truth([0, 3, 4])["concept_masks"]
    found = torch.stack([(batch["layers"] == number).any(1) for number in data.concepts], 1)
    assert torch.equal(found, truth)
    assert [concept.name for concept in data.concepts.values()] == scenes.concept_names
    assert data.mask_size == (options.image_size,) * 2
    assert torch.equal(batch["label"], scenes.labels[[0, 3, 4]])
    third = "part" if options.mode == "parts" else "texture"
    kinds = list(dict.fromkeys(concept.category for concept in data.concepts.values()))
    assert kinds == ["shape", "colour", third, "background"]


def test_scenes_to_train_on_are_others() -> None:
    data = ready(shapes_test=3, shapes_train=4)
    assert data.training is not None
    assert len(data.training) == 4
    assert "layers" not in data._set.without_layers().batch([1])
    assert torch.equal(
        data._set.without_layers().batch([1])["image"], data._set.batch([1])["image"]
    )
    assert not torch.equal(data.training.batch([0])["image"], data._set.batch([0])["image"])


def test_the_fingerprint_changes_with_the_data() -> None:
    prints = [
        ready(**options).fingerprint
        for options in (
            {},
            {"shapes_test": 9},
            {"shapes_seed": 1},
            {"shapes": SceneOptions(noise=0)},
        )
    ]
    assert len(set(prints)) == 4
    assert ready().fingerprint == prints[0]


def test_passes_that_are_done_give_nothing_out() -> None:
    class Module:
        passes_done = 1

    class OneProcess:
        world_size, global_rank = 1, 0
        lightning_module = Module()
        state = type("State", (), {"fn": None})
        strategy = type("Strategy", (), {"root_device": torch.device("cpu")})

    data = ready(shapes_test=3, eval_batch_size=2)
    data.trainer = OneProcess()  # type: ignore[assignment]
    first, second = data.test_dataloader()
    assert list(first) == []
    assert [len(batch["index"]) for batch in second] == [2, 1]
    with pytest.raises(ValueError, match=r"train\.py test"):
        data.setup("fit")


# ------------------------------------------------------------------------------- colours
def test_colours_have_their_names() -> None:
    values = torch.tensor(list(COLOUR_TERMS.values()), dtype=torch.uint8)
    assert name_colours(values.T[:, :, None])[:, 0].tolist() == list(range(11))
    shades = {
        "grey": (100, 102, 99),
        "blue": (20, 40, 160),
        "red": (150, 20, 20),
        "white": (235, 238, 240),
    }
    for name, shade in shades.items():
        pixel = torch.tensor(shade, dtype=torch.uint8).view(3, 1, 1)
        assert TERMS[int(name_colours(pixel))] == name
    with pytest.raises(ValueError, match="float32"):
        name_colours(torch.zeros(3, 2, 2))


# ------------------------------------------------------------------------------- camvid
@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """Two frames of 32x16 pixels a part: a red half of sky, a blue half of cars, a void corner in the second frame."""
    for part in ("train", "val", "test"):
        for folder in (part, f"{part}annot"):
            (tmp_path / folder).mkdir()
        for i in range(2):
            pixels = np.zeros((16, 32, 3), np.uint8)
            pixels[:, :16], pixels[:, 16:] = COLOUR_TERMS["red"], COLOUR_TERMS["blue"]
            ids = np.zeros((16, 32), np.uint8)
            ids[:, 16:] = CLASS_NAMES.index("car")
            ids[:4, :4] = 11 if i else 0
            ids[8:, 8:16] = 11 if i else 0
            Image.fromarray(pixels).save(tmp_path / part / f"0001TP_{i}.png")
            Image.fromarray(ids).save(tmp_path / f"{part}annot" / f"0001TP_{i}.png")
    return tmp_path


def test_patches_of_frames(camvid: Path) -> None:
    data = ready(dataset="camvid", root=str(camvid), image_size=8, frame_scale=1.0)
    number = numbers(data)
    # A patch that is all void is left out.
    assert len(data._set) == 2 * 8 - 1
    batch = data._set.batch(range(15))
    assert batch["image"].shape == (15, 3, 8, 8)
    assert [data.class_names[k] for k in batch["label"][:4].tolist()] == [
        "sky",
        "sky",
        "car",
        "car",
    ]
    classes, colours = batch["layers"].unbind(1)
    assert (classes[0] == number["sky"]).all()
    assert (colours[0] == number["red"]).all()
    assert (colours[2] == number["blue"]).all()
    corner = classes[8]
    assert (corner[:4, :4] == 0).all()
    assert (corner[4:] == number["sky"]).all()
    assert data.concepts[number["car"]] == Concept("car", "object")
    assert data.concepts[number["brown"]].category == "colour"
    assert data.training is not None
    assert len(data.training) == 4 * 8 - 2
    assert (
        data.fingerprint
        != ready(
            dataset="camvid", root=str(camvid), image_size=8, frame_scale=1.0, limit=1
        ).fingerprint
    )


def test_frames_that_cannot_be_used(camvid: Path) -> None:
    with pytest.raises(ValueError, match=r"64x64.*--data\.image_size"):
        ready(dataset="camvid", root=str(camvid), frame_scale=1.0)
    mask = camvid / "testannot" / "0001TP_1.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(mask)
    with pytest.raises(RuntimeError, match=r"0001TP_1\.png is 8x8, the frame 32x16"):
        ready(dataset="camvid", root=str(camvid), image_size=8, frame_scale=1.0)
    with pytest.raises(FileNotFoundError, match=r"--data\.root"):
        ready(dataset="camvid", root=str(camvid / "no"))


# ------------------------------------------------------------------------------- broden
SIZES = {"ih": "8", "iw": "8", "sh": "4", "sw": "4"}


@pytest.fixture
def broden(tmp_path: Path) -> Path:
    """Three images in Broden's layout: a map of objects, two channels of parts, scenes of whole images."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    labels = [
        ("1", "tree", "object(5)"),
        ("2", "leaf", "part(3);object(1)"),
        ("3", "forest-s", "scene(2)"),
        ("4", "street-s", "scene(1)"),
        ("5", "wood", "material(9)"),
        ("300", "car", "object(2);part(2)"),
    ]
    with (tmp_path / "label.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "name", "category", "frequency", "coverage", "syns"])
        writer.writerows([*label, "1", "1", ""] for label in labels)
    maps = {
        "objects": [[1, 300], [0, 1]],
        "parts_1": [[2, 0], [0, 0]],
        "parts_2": [[300, 0], [0, 2]],
    }
    for name, values in maps.items():
        save_map(tmp_path, name, np.kron(np.array(values), np.ones((2, 2), int)))
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "images" / "a" / f"{i}.jpg")
    columns = ["image", "split", *SIZES, "color", "object", "part", "material", "scene", "texture"]
    rows = [
        {"image": "a/0.jpg", "split": "train", "object": "a/objects.png", "scene": "3"},
        {"image": "a/1.jpg", "split": "val", "part": "a/parts_1.png;a/parts_2.png", "scene": "0"},
        {"image": "a/2.jpg", "split": "train", "material": "a/objects.png", "scene": "4"},
    ]
    with (tmp_path / "index.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows({**SIZES, **row} for row in rows)
    return tmp_path


def save_map(root: Path, name: str, values: np.ndarray) -> None:
    pixels = np.stack([values % 256, values // 256, values * 0], -1).astype(np.uint8)
    Image.fromarray(pixels).save(root / "images" / "a" / f"{name}.png")


def test_maps_channels_and_labels_of_whole_images(broden: Path) -> None:
    data = ready(dataset="broden", root=str(broden))
    assert {n: c.category for n, c in data.concepts.items()} == {
        1: "object", 2: "part", 3: "scene", 4: "scene", 300: "part",
    }  # fmt: skip
    assert data.mask_size == (4, 4)
    assert data.class_names == ["forest", "street"]
    batch = data._set.batch([0, 1, 2])
    assert batch["image"].shape == (3, 3, 8, 8)
    assert batch["label"].tolist() == [0, -1, 1], "scene 0 is none"
    layers = batch["layers"]
    assert (layers[0] == 3).flatten(1).all(1).any(), "a label of the whole image fills a layer"
    assert (layers[0] == 300).any(0).tolist() == [[False, False, True, True]] * 2 + [
        [False] * 4
    ] * 2
    assert (layers[1] == 300).sum() == 4
    assert (layers[1] == 2).sum() == 8
    assert set(layers[2].unique().tolist()) == {0, 4}, "materials are left out"
    only = ready(dataset="broden", root=str(broden), categories=["scene"], split="train")
    assert len(only._set) == 2
    assert set(only.concepts) == {3, 4}
    assert data.training is None


def test_masks_of_another_size_and_unknown_numbers(broden: Path) -> None:
    save_map(broden, "parts_2", np.full((4, 4), 77))
    with pytest.raises(ValueError, match=r"a/1\.jpg has the label 77.*label\.csv"):
        ready(dataset="broden", root=str(broden))._set.batch([0, 1])
    save_map(broden, "parts_2", np.zeros((3, 5), int))
    with pytest.raises(RuntimeError, match=r"parts_2\.png.*5x3 pixels, index\.csv says 4x4"):
        ready(dataset="broden", root=str(broden))._set.batch([1])
    Image.new("RGB", (9, 8)).save(broden / "images" / "a" / "2.jpg")
    with pytest.raises(RuntimeError, match=r"2\.jpg.*9x8 pixels"):
        ready(dataset="broden", root=str(broden))._set.batch([2])


def test_the_fingerprint_sees_other_masks(broden: Path) -> None:
    before = ready(dataset="broden", root=str(broden)).fingerprint
    save_map(broden, "objects", np.ones((4, 4), int))
    assert ready(dataset="broden", root=str(broden)).fingerprint != before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"dataset": "brodn"}, "broden"),
        ({"limit": 3}, "shapes_test"),
        ({"split": "train"}, "--data.split"),
        ({"shapes_test": 0}, "shapes_test=0"),
        ({"dataset": "camvid", "frame_scale": 2.0}, "frame_scale=2.0"),
        ({"dataset": "broden", "split": "tset"}, "split='tset'.*train, val"),
        ({"dataset": "broden", "categories": ["objects"]}, "objects.*object, part"),
    ],
    ids=str,
)
def test_impossible_arguments(broden: Path, arguments: dict[str, Any], expected: str) -> None:
    if arguments.get("dataset") == "broden":
        arguments = {**arguments, "root": str(broden)}
    with pytest.raises(ValueError, match=expected):
        ready(**arguments)


def test_a_folder_that_is_not_brodens(broden: Path) -> None:
    (broden / "label.csv").write_text("number,name\n1,tree\n")
    with pytest.raises(RuntimeError, match="lacks the columns category"):
        ready(dataset="broden", root=str(broden))
    with pytest.raises(FileNotFoundError, match=r"--data\.root"):
        ready(dataset="broden", root=str(broden / "no"))
