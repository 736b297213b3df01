import itertools
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.datasets import CelebA

from datamodules.attribute_pools import GroupedPool, PoolDataset, PoolSampler, ShuffledPool
from datamodules.attribute_sources import AttributeScenes, CenterCrop
from datamodules.attributes import AttributeDataModule, JointAttributeDataModule
from datamodules.datasets import ImageArrayDataset
from datamodules.shapes import Scenes
from datamodules.shapes_options import SceneOptions
from lightning_modules.attributes import HAIR_COLOURS
from tests.datamodules.conftest import save_picture
from tests.datamodules.test_base import (
    KilledError,
    SaveAt,
    TwoRanks,
    make_trainer,  # noqa: F401 (a fixture)
)

OPTIONS = SceneOptions(
    image_size=16,
    shapes=("circle", "star"),
    colours=("red", "green", "blue"),
    textures=("plain",),
    sizes=("medium", "large"),
    borders=("borderless", "bordered"),
)
# 12 classes of about 25 training scenes.
SCENES: Any = {
    "shapes": OPTIONS,
    "attributes": ["colour", "shape", "border"],
    **{"shapes_train": 300, "shapes_val": 6, "shapes_test": 10},
}
SEMI: Any = {**SCENES, "labelled": "20.0%", "unlabelled": True, "balanced": True}


def ready(stage: str | None = None, **arguments: Any) -> AttributeDataModule:
    data = AttributeDataModule(**arguments)
    data.prepare_data()
    data.setup(stage)
    return data


def part(value: Any) -> Any:
    assert value is not None
    return value


def everything(dataset: Any) -> dict[str, Any]:
    return part(dataset).batch(range(len(part(dataset))))


class PoolRecorder(LightningModule):
    """Remembers the places and the images of every pool of its training batches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, dict[str, list[int]]]] = []
        self.images: list[dict[str, Tensor]] = []
        self.evaluated: list[tuple[int, dict[str, Any]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        pools = {"": batch} if "image" in batch else batch
        places = {name: pool["index"].tolist() for name, pool in pools.items()}
        self.seen.append((self.current_epoch, places))
        self.images.append({name: pool["image"] for name, pool in pools.items()})
        return self.weight * 0

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.evaluated.append((dataloader_idx, batch))

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append((dataloader_idx, batch))

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Alternating(PoolRecorder):
    """Asks for the two pools in turn, and for both in every fifth batch."""

    def batch_kind(self, number: int) -> str:
        return "both" if number % 5 == 4 else ("labelled", "unlabelled")[number % 2]


# ---------------------------------------------------------------------- files
def save(path: Path, size: tuple[int, int], value: int = 100, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0]), value, np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


FACES = ["Bald", *HAIR_COLOURS, "Male", "Smiling", "Young"]


@pytest.fixture
def celeba_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64 faces; the value of a picture is its number; every fourth has two hair colours. 10 are for testing."""
    monkeypatch.setattr("datamodules.attribute_splits.REFERENCE_TEST_IMAGES", 10)
    lines, partition = [], []
    for i in range(64):
        name = f"{i + 1:06d}.jpg"
        save(tmp_path / "celeba" / "img_align_celeba" / name, (178, 218), i)
        hair = [int(i % 4 == k) for k in range(3)]
        hair = [1, 1, 0] if i % 4 == 3 else hair
        values = [0, *hair, 0, i // 4 % 2, i % 3 == 0, i // 8 % 2]
        lines.append(name + "".join(f" {2 * int(v) - 1:2d}" for v in values))
        partition.append(f"{name} {0 if i < 40 else 1 if i < 50 else 2}")
    header = f"64\n{' '.join(FACES)} \n"
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text(header + "\n".join(lines) + "\n")
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("\n".join(partition) + "\n")
    return tmp_path


@pytest.fixture
def rafd_root(tmp_path: Path) -> Path:
    """11 people with 8 emotions and 2 gazes each, below a folder with underscores in its name."""
    emotions = (
        "angry contemptuous disgusted fearful happy neutral sad surprised".split()  # noqa: SIM905
    )
    root = tmp_path / "Ra_FD_copy_01_x"
    for person, (k, emotion) in itertools.product(range(1, 12), enumerate(emotions)):
        for gaze in ("frontal", "left"):
            name = f"Rafd090_{person:02d}_Caucasian_female_{emotion}_{gaze}.jpg"
            save(root / emotion / name, (32, 32), 10 * k + person)
    return root


# ---------------------------------------------------------------------- batches
def test_plain_batches() -> None:
    data = ready(**SCENES)
    assert data.attribute_names == ["red", "green", "blue", "star", "bordered"]
    assert data.exclusive_groups == [["red", "green", "blue"]]
    assert data.exclusive_complete
    assert data.attribute_kind == "multi_label"
    assert (data.image_size, data.image_channels) == (16, 3)
    loader = data.train_dataloader()
    assert len(loader) == 300 // 16
    seen = []
    for batch in loader:
        assert batch.keys() == {"image", "attributes", "index"}
        assert batch["attributes"].dtype == torch.float32
        seen += batch["index"].tolist()
    assert len(set(seen)) == len(seen) == 288
    scenes = Scenes(OPTIONS, 0, 300)
    batch = next(iter(loader))
    index = batch["index"]
    assert torch.equal(batch["image"], scenes.render(index))
    assert torch.equal(batch["attributes"][:, :3].argmax(1), scenes.factor("colour")[index])
    assert torch.equal(batch["attributes"][:, 3], scenes.factor("shape")[index].float())
    assert torch.equal(batch["attributes"][:, 4], scenes.factor("border")[index].float())


def test_one_factor_of_several_values_makes_classes() -> None:
    data = ready(**{**SCENES, "attributes": ["colour"]})
    assert data.attribute_kind == "single_label"
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch["attributes"], torch.eye(3)[batch["label"]])
    assert torch.equal(data.label_space, torch.eye(3))


def test_all_varying_factors_are_attributes_by_default() -> None:
    assert AttributeDataModule(shapes=OPTIONS).attribute_names == [
        *("star", "red", "green", "blue"),
        *("large", "bordered"),
    ]


def test_label_spaces() -> None:
    data = ready(**SEMI)
    space = data.label_space
    assert len(space) == 12
    assert (space[:, :3].sum(1) == 1).all(), "a scene has exactly one colour"
    assert torch.equal(space, part(data.train).attributes.unique(dim=0))
    observed = ready(**{**SEMI, "label_source": "observed"})
    assert torch.equal(observed.label_space, space)


def blocks(batch: dict[str, Tensor], data: AttributeDataModule) -> None:
    """Checks that each 16 images are 4 classes of 4, and what their labels are."""
    assert batch["class_id"].dtype == torch.int64
    assert torch.equal(data.label_space[batch["class_id"]], batch["attributes"])
    for block, places in zip(batch["class_id"].split(16), batch["index"].split(16), strict=True):
        classes = block.view(4, 4)
        assert (classes == classes[:, :1]).all()
        assert len(set(classes[:, 0].tolist())) == 4
        assert len(set(places.tolist())) == 16
        assert torch.equal(block, part(data.train).class_ids[places])


def test_semi_supervised_batches() -> None:
    data = ready(**SEMI)
    assert data.has_unlabelled
    labelled = set(part(data.labelled_places).tolist())
    unlabelled = set(part(data.unlabelled_places).tolist())
    assert labelled | unlabelled == set(range(300))
    assert not labelled & unlabelled
    assert 60 <= len(labelled) < 72
    loader = data.train_dataloader()
    assert len(loader) == 300 // 16
    for batch in loader:
        assert batch.keys() == {"labelled", "unlabelled"}
        assert batch["labelled"].keys() == {"image", "attributes", "index", "class_id"}
        assert batch["unlabelled"].keys() == {"image", "index"}, "no labels"
        blocks(batch["labelled"], data)
        assert set(batch["labelled"]["index"].tolist()) <= labelled
        assert set(batch["unlabelled"]["index"].tolist()) <= unlabelled
        for pool in batch.values():
            assert torch.equal(
                pool["image"].float() / 255, part(data.train).batch(pool["index"])["image"]
            )


def test_balanced_batches_alone() -> None:
    data = ready(**{**SCENES, "balanced": True, "batch_size": 32})
    assert not data.has_unlabelled
    assert len(part(data.labelled_places)) == 300
    for batch in data.train_dataloader():
        blocks(batch, data)


def test_labelled_images_alone() -> None:
    data = ready(**{**SCENES, "labelled": "20.0%"})
    places = part(data.labelled_places)
    assert torch.equal(places, part(ready(**SEMI).labelled_places)), "those of MatchGAN"
    assert not data.has_unlabelled
    for batch in data.train_dataloader():
        assert set(batch["index"].tolist()) <= set(places.tolist())
    assert len(data.train_dataloader()) == len(places) // 16


@pytest.mark.parametrize("labelled", ["100%", None])
def test_without_unlabelled_images_there_is_no_such_pool(labelled: float | None) -> None:
    data = ready(**{**SEMI, "labelled": labelled})
    assert not data.has_unlabelled
    batch = next(iter(data.train_dataloader()))
    assert batch.keys() == {"labelled"}
    blocks(batch["labelled"], data)


def test_labelled_subsets_are_nested_and_balanced() -> None:
    found: list[set[int]] = []
    for labelled in (12, "20%", 100, "60%"):
        data = ready(**{**SCENES, "labelled": labelled})
        found.append(set(part(data.labelled_places).tolist()))
        counts = torch.bincount(part(data.train).class_ids[list(found[-1])])
        if labelled != "60%":  # no class is used up
            assert counts.min() == counts.max()
    assert [len(places) for places in found[:3]] == [12, 60, 108]
    assert found[0] < found[1] < found[2] < found[3]


# ---------------------------------------------------------------------- order
def set_of(size: int) -> ImageArrayDataset:
    return ImageArrayDataset(
        torch.zeros(size, 3, 2, 2, dtype=torch.uint8), torch.zeros(size).long(), ["x"]
    )


def test_a_shuffled_pool_gives_each_image_once_before_any_again() -> None:
    places = torch.arange(100, 110)
    pool = ShuffledPool(set_of(200), places)
    drawn = pool.draw("a", 0, 25)
    assert [sorted(d.tolist()) for d in drawn[:20].split(10)] == [places.tolist()] * 2
    assert torch.equal(drawn[:15], pool.draw("a", 0, 15))
    assert not torch.equal(drawn, pool.draw("a", 1, 25))
    assert not torch.equal(drawn, pool.draw("b", 0, 25))
    # With 4 classes for 4 groups, only the order within a class tells the epochs apart.
    grouped = GroupedPool(set_of(40), torch.arange(40), torch.arange(40) % 4, 4, 2)
    first, second = (grouped.draw("a", epoch, 8).view(4, 2) for epoch in (0, 1))
    assert (
        first[(first[:, 0] % 4).argsort()].tolist() != second[(second[:, 0] % 4).argsort()].tolist()
    )


def test_groups_use_all_classes_and_images_equally() -> None:
    classes = torch.arange(60) % 10
    pool = GroupedPool(set_of(60), torch.arange(60), classes, 3, 2)
    drawn = pool.draw("", 0, 90 * 6)
    of_block = classes[drawn].view(90, 3, 2)
    assert (of_block[..., 0] == of_block[..., 1]).all()
    for three in of_block[..., 0].split(3):
        assert len(three.unique()) == 9, "no class again before the others"
    assert Counter(Counter(drawn[:54].tolist()).values()).keys() <= {1, 2}
    # 9 of 10 classes a time, so that the tenth waits at random.
    counts = torch.bincount(classes[drawn], minlength=10)
    assert counts.sum() == 540
    assert counts.min() >= 40
    one_class = drawn[classes[drawn] == 4]
    for three in one_class[: len(one_class) // 6 * 6].split(6):
        assert len(three.unique()) == 6, "no image again before the others of its class"
    with pytest.raises(ValueError, match="10 classes for 11"):
        GroupedPool(set_of(60), torch.arange(60), classes, 11, 2)
    with pytest.raises(ValueError, match="fewer than 7"):
        GroupedPool(set_of(60), torch.arange(60), classes, 3, 7)


def test_blocks_of_a_batch_are_disjoint() -> None:
    """As are those of two processes: there is no overlap of few labelled images."""
    data = ready(**{**SEMI, "batch_size": 48})
    sampler: Any = data.train_dataloader().sampler
    for batch in sampler.order()[:, 0].split(48):
        assert len(set(batch.tolist())) == 48


def test_pools_that_are_not_wanted_stand_still() -> None:
    pools = {"a": ShuffledPool(set_of(12)), "b": ShuffledPool(set_of(8))}
    dataset = PoolDataset(pools, 16)

    def turns(epoch: int, batch: int) -> set[str]:
        return {"ab"[batch % 2]}

    one, both = PoolSampler(dataset, 4, wanted=turns), PoolSampler(dataset, 4)
    rows, full = one.order(), both.order()
    assert rows.shape == full.shape == (16, 2)
    assert rows.view(4, 4, 2)[:, 0].sign().tolist()[0][1] == -1
    for column, first in ((0, 0), (1, 1)):
        used = rows.view(4, 4, 2)[first::2, :, column].flatten()
        assert torch.equal(used, full[:8, column])
        assert (rows.view(4, 4, 2)[1 - first :: 2, :, column] == -1).all()
    assert dataset.__getitems__(rows[:4].tolist()).keys() == {"a"}


@pytest.mark.parametrize("limit", [1.0, 0.5, 7])
def test_the_module_says_which_pools_a_batch_has(
    limit: float,
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    module = Alternating()
    trainer = make_trainer(max_epochs=2, limit_train_batches=limit)
    trainer.fit(module, datamodule=AttributeDataModule(**SEMI))
    per_epoch = {1.0: 18, 0.5: 9, 7: 7}[limit]
    assert len(module.seen) == 2 * per_epoch
    for number, (epoch, places) in enumerate(module.seen):
        kind = module.batch_kind(number)
        assert epoch == number // per_epoch
        assert set(places) == ({"labelled", "unlabelled"} if kind == "both" else {kind})


def test_nothing_is_read_of_a_pool_that_is_not_wanted(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, read = AttributeDataModule(**SEMI), Counter[int]()
    data.setup("fit")
    images = part(data.train).images
    original = type(images).__getitems__

    def counting(self: Any, indices: Any) -> Any:
        if self is images:
            read[len(indices)] += 1
        return original(self, indices)

    monkeypatch.setattr(type(images), "__getitems__", counting)
    make_trainer(max_epochs=1, limit_train_batches=5).fit(Alternating(), datamodule=data)
    assert read == {16: 4 + 2}


def test_an_unknown_kind_of_batch(
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    class Wrong(PoolRecorder):
        def batch_kind(self, number: int) -> str:
            return "labeled"

    with pytest.raises(ValueError, match=r"batch_kind of the module 'labeled': did you mean lab"):
        make_trainer(max_epochs=1).fit(Wrong(), datamodule=AttributeDataModule(**SEMI))


@pytest.mark.parametrize("recorder", [PoolRecorder, Alternating])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 3), (1, 0), (1, 16)])
def test_a_resumed_run_sees_the_same_pools(
    recorder: type[PoolRecorder],
    epoch: int,
    batch: int,
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    arguments = {**SEMI, "horizontal_flip": True}
    whole, first, second = recorder(), recorder(), recorder()
    make_trainer(max_epochs=2).fit(whole, datamodule=AttributeDataModule(**arguments))
    path = str(tmp_path / "killed.ckpt")
    with pytest.raises(KilledError):
        make_trainer(SaveAt(epoch, batch, path), max_epochs=2).fit(
            first, datamodule=AttributeDataModule(**arguments)
        )
    make_trainer(max_epochs=2).fit(
        second, datamodule=AttributeDataModule(**arguments), ckpt_path=path
    )
    assert len(first.seen) == 18 * epoch + batch + 1
    assert first.seen + second.seen == whole.seen
    for resumed, expected in zip(first.images + second.images, whole.images, strict=True):
        for name in expected:
            assert torch.equal(resumed[name], expected[name])


@pytest.mark.parametrize(
    ("changed", "recorder", "worlds"),
    [
        ({"unlabelled": False, "balanced": False}, PoolRecorder, (2, 4)),
        ({"batch_size": 64}, PoolRecorder, (2, 4)),
        ({"batch_size": 64}, Alternating, (2, 4)),
    ],
)
def test_the_number_of_processes_changes_nothing(
    changed: dict[str, Any],
    recorder: type[PoolRecorder],
    worlds: tuple[int, ...],
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    arguments = {**SEMI, **changed, "horizontal_flip": True}
    one = recorder()
    make_trainer(max_epochs=1).fit(one, datamodule=AttributeDataModule(**arguments))
    trainer = make_trainer()  # at the start of its first epoch
    for world in worlds:
        shares = []
        for rank in range(world):
            data = AttributeDataModule(**arguments)
            ranks: Any = TwoRanks(trainer, rank)
            ranks.world_size, ranks.lightning_module = world, recorder()
            data.trainer = ranks
            data.setup("fit")
            batch = next(iter(data.train_dataloader()))
            moved = data.on_after_batch_transfer(batch, 0)
            shares.append({"": moved} if "image" in moved else moved)
        for name, places in one.seen[0][1].items():
            seen = torch.cat([share[name]["index"] for share in shares])
            assert seen.tolist() == places
            images = torch.cat([share[name]["image"] for share in shares])
            assert torch.equal(images, one.images[0][name])
        assert all(share.keys() == one.seen[0][1].keys() for share in shares)


def test_processes_get_whole_blocks(
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    trainer = make_trainer()
    for size, message in ((16, "leaves 8 images for each.*--data.batch_size 32"), (32, None)):
        data = AttributeDataModule(**{**SEMI, "batch_size": size})
        data.trainer = TwoRanks(trainer, 1)  # type: ignore[assignment]
        data.setup("fit")
        if message:
            with pytest.raises(ValueError, match=message):
                data.train_dataloader()
        else:
            blocks(next(iter(data.train_dataloader()))["labelled"], data)


def test_workers_hand_over_the_same_pools() -> None:
    loaders = [ready("fit", **SEMI, num_workers=n).train_dataloader() for n in (0, 1)]
    for one, other in zip(*loaders, strict=True):
        for name in ("labelled", "unlabelled"):
            assert torch.equal(one[name]["image"], other[name]["image"])


def test_evaluation_through_a_trainer(
    make_trainer: Callable[..., Trainer],  # noqa: F811
) -> None:
    module, data = PoolRecorder(), AttributeDataModule(**SEMI, eval_batch_size=4)
    make_trainer().test(module, datamodule=data, verbose=False)
    expected = everything(data.test)
    for name in ("image", "attributes", "index"):
        assert torch.equal(torch.cat([b[name] for _, b in module.evaluated]), expected[name])
    assert expected["image"].max() <= 1
    assert data.train is None, "nothing is drawn that is not needed"


# ---------------------------------------------------------------------- scenes
@pytest.mark.parametrize("cache_limit", [2.0, 0.0])
def test_counterparts(cache_limit: float) -> None:
    data = ready("test", **SCENES, cache_limit=cache_limit)
    test = part(data.test)
    assert isinstance(test, AttributeScenes)
    assert isinstance(test.images, Scenes) == (cache_limit == 0)
    batch = everything(test)
    places = torch.arange(10)
    same = test.counterparts(places, batch["attributes"])
    assert same.dtype == torch.float32
    assert torch.equal(same, batch["image"])
    target = batch["attributes"].clone()
    target[:, :3] = target[:, [2, 0, 1]]  # the next colour
    target[:, 4] = 1 - target[:, 4]
    scenes = Scenes(OPTIONS, 0, 10, 2 * 10**9)
    change = {
        "colour": [OPTIONS.colours[(i + 1) % 3] for i in scenes.factor("colour").tolist()],
        "border": [OPTIONS.borders[1 - i] for i in scenes.factor("border").tolist()],
    }
    expected = scenes.render(range(10), change=change)
    assert torch.equal(test.counterparts(places, target), expected.float() / 255)
    some = test.counterparts([7, 2], target[[7, 2]])
    assert torch.equal(some, expected[[7, 2]].float() / 255)


def test_object_masks_contain_what_changes() -> None:
    data = ready("test", **SCENES)
    test = part(data.test)
    batch, places = everything(test), torch.arange(10)
    target = batch["attributes"].clone()
    target[:, 3] = 1 - target[:, 3]
    before, after = test.object_masks(places), test.object_masks(places, target)
    assert before.shape == (10, 16, 16)
    assert before.dtype == torch.bool
    assert not torch.equal(before, after)
    scenes = Scenes(OPTIONS, 0, 10, 2 * 10**9)
    assert torch.equal(before, scenes.truth(range(10))["object_masks"][:, 0])
    changed = (test.counterparts(places, target) != batch["image"]).any(1)
    grown = torch.nn.functional.max_pool2d((before | after).float()[:, None], 3, 1, 1)[:, 0] > 0
    assert not (changed & ~grown).any()
    assert changed.flatten(1).any(1).all()


def test_impossible_counterparts() -> None:
    test = part(ready("test", **SCENES).test)
    target = test.attributes[:2].clone()
    target[0, :3] = 0
    with pytest.raises(ValueError, match="colour: a scene has exactly one of red, green, blue"):
        test.counterparts([0, 1], target)
    with pytest.raises(ValueError, match=r"attributes \[2, 5\] must be \[3, 5\]"):
        test.counterparts([0, 1, 2], test.attributes[:2])


def test_no_scene_is_in_two_parts() -> None:
    data = ready(**SCENES)
    images = [
        image.numpy().tobytes()
        for images in (data.train, data.val, data.test)
        for image in everything(images)["image"]
    ]
    assert len(images) == len(set(images)) == 316


# ---------------------------------------------------------------------- CelebA
def celeba(root: Path, **changed: Any) -> dict[str, Any]:
    return {"dataset": "celeba", "root": str(root), "image_size": 8, "val_fraction": 0.0, **changed}


def values_of(dataset: Any) -> list[int]:
    """The number of each picture of the fake, from its pixels."""
    return (everything(dataset)["image"].mean((1, 2, 3)) * 255).round().int().tolist()


def test_celeba_by_the_reference_split(celeba_root: Path) -> None:
    data = ready(**celeba(celeba_root))
    assert data.attribute_names == ["Black_Hair", "Blond_Hair", "Brown_Hair", "Male", "Young"]
    assert data.exclusive_groups == [["Black_Hair", "Blond_Hair", "Brown_Hair"]]
    assert not data.exclusive_complete
    train, test = values_of(data.train), values_of(data.test)
    assert sorted(train + test) == list(range(64))
    assert len(test) == 10
    assert train == sorted(train)
    assert values_of(data.val) == train
    batch = everything(data.train)
    assert batch.keys() == {"image", "attributes", "index", "path"}
    for number, attributes in zip(train, batch["attributes"].tolist(), strict=True):
        hair = [1, 1, 0] if number % 4 == 3 else [int(number % 4 == k) for k in range(3)]
        assert attributes == [*hair, number // 4 % 2, number // 8 % 2]
    assert len(part(data.labelled_places)) == 54, "StarGAN keeps those with two hair colours"


def test_celeba_by_the_official_split(celeba_root: Path) -> None:
    data = ready(**{**celeba(celeba_root, split="official"), "val_fraction": 0.05})
    assert values_of(data.train) == list(range(40))
    assert values_of(data.val) == list(range(40, 50))
    assert values_of(data.test) == list(range(50, 64))
    assert ready("test", **{**celeba(celeba_root / "celeba")}).test is not None


def test_validation_images_are_held_out(celeba_root: Path) -> None:
    data = ready(**celeba(celeba_root, val_fraction=0.2))
    parts = [values_of(images) for images in (data.train, data.val, data.test)]
    assert [len(numbers) for numbers in parts] == [43, 11, 10]
    assert sorted(itertools.chain(*parts)) == list(range(64))


def test_pools_of_celeba_leave_out_two_hair_colours(celeba_root: Path) -> None:
    names = ["Blond_Hair", "Black_Hair", "Male"]
    arguments = celeba(celeba_root, split="official", val_fraction=0.05, attributes=names)
    data = ready(**arguments, labelled=24, unlabelled=True)
    # Hair of all but every fourth; 3 hair states with and without Male, round by round in file order.
    assert len(data.label_space) == 6
    sensible = {i for i in range(40) if i % 4 != 3}
    labelled = set(part(data.labelled_places).tolist())
    assert labelled == {i for i in range(32) if i % 4 != 3}
    assert set(part(data.unlabelled_places).tolist()) == sensible - labelled
    assert part(data.train).class_ids[3] == -1


def test_without_exclusive_groups_all_combinations_are_labels(celeba_root: Path) -> None:
    data = ready(**celeba(celeba_root, exclusive=[], labelled="50.0%"))
    assert data.exclusive_groups == []
    assert len(data.label_space) == 32
    observed = ready(**celeba(celeba_root, label_source="observed", labelled="50.0%"))
    assert len(observed.label_space) == 12


def test_faces_are_cut_out_of_the_middle(celeba_root: Path) -> None:
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[20:198] = 200
    path = celeba_root / "celeba" / "img_align_celeba" / "000001.png"
    Image.fromarray(pixels).save(path)
    assert (CenterCrop(8, 178).decode(path) == 200).all()
    assert CenterCrop(8).decode(path)[0, 0].max() < 100
    assert CenterCrop(4, 2).cut(7, 5) == (2, 2, 4, 4)


def test_originals_of_rafd_are_cut_to_the_face() -> None:
    assert CenterCrop(8, rafd=True).cut(681, 1024) == (40, 170, 640, 770)
    assert CenterCrop(8, 400, rafd=True).cut(681, 1024) == (140, 270, 540, 670)
    assert CenterCrop(8, rafd=True).cut(256, 256) == (0, 0, 256, 256)
    assert CenterCrop(8).cut(681, 1024) == (0, 0, 681, 1024)


def test_missing_files_of_celeba(celeba_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = celeba_root / "celeba"
    (folder / "img_align_celeba" / "000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the .*000001.jpg.*completely"):
        ready(**celeba(celeba_root))
    (folder / "list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition.txt is missing.*--data.root"):
        ready(**celeba(celeba_root, split="official", val_fraction=0.05))
    lines = (folder / "list_attr_celeba.txt").read_text().splitlines()
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(RuntimeError, match="announces 64 pictures but lists 63"):
        ready(**celeba(celeba_root))
    (folder / "list_attr_celeba.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"list_attr_celeba.txt is missing.*download true"):
        ready(**celeba(celeba_root))

    def offline(self: CelebA, root: str, download: bool = False) -> None:
        raise RuntimeError("quota exceeded")

    monkeypatch.setattr(CelebA, "__init__", offline)
    with pytest.raises(RuntimeError, match=r"could not download CelebA.*quota exceeded"):
        ready(**celeba(celeba_root, download=True))


# ---------------------------------------------------------------------- tables
@pytest.fixture
def csv_root(tmp_path: Path) -> Path:
    """14 pictures; the value of a picture is its number."""
    lines = ["picture,part,hat,beard,smile"]
    for i in range(14):
        save(tmp_path / "faces" / f"{i}.png", (10, 12), i)
        part = "train" if i < 10 else "test"
        lines.append(f"faces/{i}.png,{part},{i % 2},{-1 if i % 3 else 1},{i // 2 % 2}")
    (tmp_path / "attributes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_table_of_attributes(csv_root: Path) -> None:
    arguments: Any = {"dataset": "csv", "root": str(csv_root), "image_size": 8}
    data = ready(**arguments, val_fraction=0.2)
    assert data.attribute_names == ["hat", "beard", "smile"]
    assert data.exclusive_groups == []
    parts = [values_of(images) for images in (data.train, data.val, data.test)]
    assert [len(numbers) for numbers in parts] == [8, 2, 4]
    assert sorted(itertools.chain(*parts)) == list(range(14))
    expected = [[i % 2, int(i % 3 == 0), i // 2 % 2] for i in parts[0]]
    assert everything(data.train)["attributes"].tolist() == expected
    some = ready(**arguments, attributes=["smile", "hat"], exclusive=[["hat", "smile"]])
    assert some.exclusive_groups == [["smile", "hat"]]
    assert everything(some.test)["attributes"].tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    path = csv_root / "attributes.csv"
    path.write_text(path.read_text().replace("9.png,train", "9.png,val"))
    own = ready(**arguments)
    assert [values_of(own.train), values_of(own.val)] == [list(range(9)), [9]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,hat\n", "begins with 'file,hat'; expected picture,part,NAME"),
        ("", "begins with ''"),
        ("picture,part,hat\nfaces/1.png,train,2\n", "'faces/1.png,train,2' must be a picture"),
        ("picture,part,hat\nfaces/1.png,dev,1\n", "dev,1' must be a picture, one of train"),
        ("picture,part,hat\nfaces/1.png,train\n", "1 times 1 or 0"),
        ("picture,part,hat\nfaces/1.png,train,1\n", "no picture to test on"),
        ("picture,part,hat\nfaces/99.png,train,1\n", "names 1 pictures.*99.png"),
    ],
)
def test_unusable_tables(text: str, message: str, csv_root: Path) -> None:
    (csv_root / "attributes.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ready(dataset="csv", root=str(csv_root), image_size=8, val_fraction=0)
    (csv_root / "attributes.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"attributes.csv is missing"):
        ready(dataset="csv", root=str(csv_root))


# ---------------------------------------------------------------------- RaFD
def test_rafd_by_people(rafd_root: Path) -> None:
    data = ready(dataset="rafd", root=str(rafd_root), image_size=8, val_fraction=0.1, batch_size=8)
    assert data.attribute_names[0] == "angry"
    assert (len(data.attribute_names), data.attribute_kind) == (8, "single_label")
    people = [set(part(images).people) for images in (data.train, data.val, data.test)]
    assert [len(p) for p in people] == [8, 1, 2]
    assert set.union(*people) == {f"{i:02d}" for i in range(1, 12)}
    batch = everything(data.train)
    assert torch.equal(batch["attributes"], torch.eye(8)[batch["label"]])
    for path, label, person in zip(
        batch["path"], batch["label"], part(data.train).people, strict=True
    ):
        assert f"_{person}_" in Path(path).name
        assert f"_{data.attribute_names[label]}_" in Path(path).name
    names = [Path(path).name for path in batch["path"]]
    assert len(names) == 8 * 8 * 2
    assert names == sorted(names), "whatever the folders"
    assert data.split_info["people"]["test"] == sorted(people[2])


def test_pools_of_rafd_are_people(rafd_root: Path) -> None:
    arguments: Any = {"dataset": "rafd", "root": str(rafd_root), "image_size": 8}
    arguments |= {"val_fraction": 0.0, "unlabelled": True, "batch_size": 16, "balanced": True}
    found = []
    for percent in (20.0, 50.0):
        data = ready("fit", **arguments, labelled=f"{percent}%")
        people = np.array(part(data.train).people)
        pools = [
            set(people[part(p).numpy()]) for p in (data.labelled_places, data.unlabelled_places)
        ]
        assert not pools[0] & pools[1]
        assert [len(pool) for pool in pools] == [round(9 * percent / 100 + 0.4), 9 - len(pools[0])]
        found.append(pools[0])
        blocks(next(iter(data.train_dataloader()))["labelled"], data)
    assert found[0] < found[1]
    # One person has two pictures of each emotion.
    with pytest.raises(ValueError, match=r"8 of 8 groups with fewer.*angry \(2\).*") as error:
        ready("fit", **arguments, labelled="10.0%")
    percent = float(str(error.value).split("--data.labelled ")[1].rstrip("%"))
    ready("fit", **arguments, labelled=f"{percent}%")
    with pytest.raises(ValueError, match="fewer than"):
        ready("fit", **arguments, labelled=f"{percent - 0.02}%")
    with pytest.raises(ValueError, match=r"pools of rafd are people.*--data.labelled 20%"):
        AttributeDataModule("rafd", labelled=20)


def test_files_that_are_not_of_rafd(rafd_root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        ready(dataset="rafd", root=str(tmp_path / "none"))
    save(tmp_path / "other" / "x.jpg", (8, 8))
    with pytest.raises(FileNotFoundError, match=r"no picture with a name of RaFD.*image_folder"):
        ready(dataset="rafd", root=str(tmp_path / "other"))
    save(rafd_root / "Rafd090_01_Caucasian_female_angri_frontal.jpg", (32, 32))
    with pytest.raises(ValueError, match=r"'angri': did you mean angry"):
        ready(dataset="rafd", root=str(rafd_root))


def test_chosen_emotions(rafd_root: Path) -> None:
    data = ready(
        "test", dataset="rafd", root=str(rafd_root), image_size=8, attributes=["happy", "angry"]
    )
    assert data.attribute_names == ["happy", "angry"]
    assert everything(data.test)["label"].bincount().tolist() == [4, 4]
    with pytest.raises(ValueError, match=r"'hapy'.*did you mean happy"):
        ready("test", dataset="rafd", root=str(rafd_root), attributes=["hapy", "angry"])


# ---------------------------------------------------------------------- folders
def test_folders(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["dog", "cat", "fox"])
    arguments: Any = {"dataset": "image_folder", "root": str(root), "image_size": 8}
    data = ready(**arguments, val_fraction=0.2)
    assert data.attribute_names == ["cat", "dog", "fox"]
    assert data.exclusive_groups == [["cat", "dog", "fox"]]
    for images, count in ((data.train, 8), (data.val, 2), (data.test, 4)):
        batch = everything(images)
        assert batch["label"].bincount().tolist() == [count] * 3
        values = (batch["image"].mean((1, 2, 3)) * 255).round().long()
        assert torch.equal(values, 20 * batch["label"] + 1)
    save_picture(root / "val" / "cat" / "x.png", 1)
    own = ready(**arguments)
    assert [len(part(own.train)), len(part(own.val))] == [30, 1]
    chosen = ready(**arguments, attributes=["fox", "cat"])
    assert chosen.attribute_names == ["fox", "cat"]
    assert len(part(chosen.test)) == 8


def test_grey_cmyk_and_transparent_pictures_become_rgb(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["a", "b"], train=1, test=1)
    for mode, name in (("L", "grey.png"), ("CMYK", "cmyk.jpg"), ("RGBA", "alpha.png")):
        save(root / "train" / "a" / name, (30, 20), 77, mode)
    data = ready("fit", dataset="image_folder", root=str(root), image_size=8, val_fraction=0)
    batch = everything(data.train)
    for image, path in zip(batch["image"], batch["path"], strict=True):
        expected = 77 if Path(path).stem in ("grey", "cmyk", "alpha") else 1 + 20 * ("/b/" in path)
        assert image.shape == (3, 8, 8)
        assert (image * 255 - expected).abs().max() <= 1


def test_folders_one_level_off(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    root = make_tree(["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"train is missing.*has a, b; give the folder"):
        ready(dataset="image_folder", root=str(root / "train"))
    for half in ("train", "test"):
        (root / "deep" / half).mkdir(parents=True)
        (root / half).rename(root / "deep" / half / "animals")
    message = r"one domain, animals, which holds a, b.*one level deeper"
    with pytest.raises(ValueError, match=message):
        ready(dataset="image_folder", root=str(root / "deep"))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no folders"):
        ready(dataset="image_folder", root=str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="has nothing; give the folder"):
        ready(dataset="image_folder", root=str(tmp_path / "none"))


def test_a_domain_without_pictures(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["a", "b"])
    (root / "train" / "c").mkdir()
    with pytest.raises(FileNotFoundError, match=r"train/c holds no pictures"):
        ready(dataset="image_folder", root=str(root))
    with pytest.raises(ValueError, match="one class, but a translation needs at least two"):
        ready(dataset="image_folder", root=str(root), attributes=["a"])


def test_pictures_smaller_than_the_crop(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["a", "b"])
    with pytest.raises(ValueError, match=r"png: 20x20.*smaller than the crop of 21.*crop_size 20"):
        ready(dataset="image_folder", root=str(root), crop_size=21)
    ready(dataset="image_folder", root=str(root), crop_size=20, image_size=4)


# ---------------------------------------------------------------------- prediction
def test_pictures_to_predict(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    make_tree: Callable[..., Path],
    tmp_path: Path,
) -> None:
    root = make_tree(["dog", "cat"])
    arguments: Any = {"dataset": "image_folder", "root": str(root), "image_size": 8}
    path = tmp_path / "trained.ckpt"
    trainer, module = make_trainer(max_epochs=1), PoolRecorder()
    trainer.fit(module, datamodule=AttributeDataModule(**arguments, batch_size=4))
    trainer.save_checkpoint(path)
    for i, size in enumerate(((30, 20), (5, 50))):
        save(tmp_path / "mine" / f"{i}.png", size, 60 + i)
    # The data need not be there.
    data = AttributeDataModule(
        **{**arguments, "root": "none"}, predict_folder=str(tmp_path / "mine")
    )
    found: Any = make_trainer().predict(PoolRecorder(), datamodule=data, ckpt_path=path)
    assert data.attribute_names == ["cat", "dog"]
    assert data.exclusive_groups == [["cat", "dog"]]
    assert data.attribute_kind == "single_label"
    batch = found[0]
    assert batch.keys() == {"image", "index", "path", "original_size"}
    assert batch["image"].shape == (2, 3, 8, 8)
    assert [Path(path).name for path in batch["path"]] == ["0.png", "1.png"]
    assert batch["original_size"].tolist() == [[20, 30], [50, 5]]
    assert (batch["image"] * 255).round().unique().tolist() == [60, 61]
    found = make_trainer().predict(PoolRecorder(), AttributeDataModule(**arguments))
    assert len(found[0]["label"]) == 8


def test_a_checkpoint_of_other_attributes(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    path, trainer = tmp_path / "trained.ckpt", make_trainer(max_epochs=1)
    trainer.fit(PoolRecorder(), datamodule=AttributeDataModule(**SCENES))
    trainer.save_checkpoint(path)
    other = {**SCENES, "attributes": ["shape", "colour", "border"]}
    with pytest.raises(
        ValueError, match="red, green, blue, star, bordered, but the data have star"
    ):
        make_trainer().test(
            PoolRecorder(), datamodule=AttributeDataModule(**other), ckpt_path=path, verbose=False
        )
    loaded = AttributeDataModule.load_from_checkpoint(path)
    assert loaded.attribute_names == ["red", "green", "blue", "star", "bordered"]


# ---------------------------------------------------------------------- several data sets
RED_GREEN_BLUE = ["red", "green", "blue"]
JOINT: Any = {
    "image_size": 16,
    "batch_size": 8,
    "sources": [
        {
            "shapes": {
                "textures": ["plain"],
                "shapes": ["circle", "star"],
                "colours": RED_GREEN_BLUE,
            },
            "attributes": ["shape", "colour"],
            **{"shapes_train": 20, "shapes_val": 3, "shapes_test": 4},
        },
        {
            "shapes": {"textures": ["plain"], "sizes": ["large"], "domain": "night"},
            "attributes": ["shape"],
            **{"shapes_train": 40, "shapes_val": 5, "shapes_test": 6},
        },
    ],
}


def test_joint_data(make_trainer: Callable[..., Trainer]) -> None:  # noqa: F811
    module, data = PoolRecorder(), JointAttributeDataModule(**JOINT)
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, datamodule=data)
    assert data.dims == [4, 6]
    assert data.kinds == ["multi_label", "single_label"]
    assert data.attribute_names[0][0] == "star"
    assert [len(groups) for groups in data.exclusive_groups] == [1, 1]
    assert len(module.seen) == 40 // 8
    small, large = ([i for _, places in module.seen for i in places[name]] for name in "01")
    assert sorted(large) == list(range(40))
    assert sorted(small) == sorted([*range(20)] * 2), "twice through the smaller set"
    assert [i for i, _ in module.evaluated] == [0, 1]
    assert [len(batch["index"]) for _, batch in module.evaluated] == [3, 5]
    assert "label" in module.evaluated[1][1]
    batch = next(iter(data.train_dataloader()))
    for name, member in zip("01", data.members, strict=True):
        expected = part(member.train).batch(batch[name]["index"])
        assert torch.equal(batch[name]["image"].float() / 255, expected["image"])
        assert torch.equal(batch[name]["attributes"], expected["attributes"])
    module.evaluated.clear()
    trainer.test(module, datamodule=data, verbose=False)
    assert [len(batch["index"]) for _, batch in module.evaluated] == [4, 6]
    assert len(part(trainer.predict(module, data))) == 2
    assert data.split_info["1"]["counts"]["train"] == 40


def test_joint_data_resume(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    arguments = {**JOINT, "horizontal_flip": True}
    whole, first, second = PoolRecorder(), PoolRecorder(), PoolRecorder()
    make_trainer(max_epochs=2).fit(whole, datamodule=JointAttributeDataModule(**arguments))
    path = str(tmp_path / "killed.ckpt")
    with pytest.raises(KilledError):
        make_trainer(SaveAt(1, 2, path), max_epochs=2).fit(
            first, datamodule=JointAttributeDataModule(**arguments)
        )
    make_trainer(max_epochs=2).fit(
        second, datamodule=JointAttributeDataModule(**arguments), ckpt_path=path
    )
    assert first.seen + second.seen == whole.seen
    for resumed, expected in zip(first.images + second.images, whole.images, strict=True):
        assert all(torch.equal(resumed[name], expected[name]) for name in "01")
    swapped = JointAttributeDataModule(**{**arguments, "sources": JOINT["sources"][::-1]})
    with pytest.raises(ValueError, match="trained on the attributes star, red"):
        make_trainer().test(PoolRecorder(), datamodule=swapped, ckpt_path=path, verbose=False)


def test_pictures_to_predict_with_joint_data(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    make_tree: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folders = {"dataset": "image_folder", "root": str(make_tree(["dog", "cat"]))}
    sources = [JOINT["sources"][0], folders]
    path, trainer = tmp_path / "trained.ckpt", make_trainer(max_epochs=1)
    trainer.fit(PoolRecorder(), datamodule=JointAttributeDataModule(sources, 16, batch_size=4))
    trainer.save_checkpoint(path)
    data = JointAttributeDataModule(
        [sources[0], {**folders, "root": "none"}], 16, predict_folder=str(tmp_path / "test" / "cat")
    )
    found: Any = make_trainer().predict(PoolRecorder(), datamodule=data, ckpt_path=path)
    assert found[0]["image"].shape == (4, 3, 16, 16)
    assert data.attribute_names[1] == ["cat", "dog"]
    assert data.exclusive_groups[1] == [["cat", "dog"]]
    assert data.dims == [4, 2]
    with pytest.raises(ValueError, match=r"trained on 2 data sets, but --data.sources has 3"):
        make_trainer().test(
            PoolRecorder(),
            datamodule=JointAttributeDataModule([*sources, folders], 16),
            ckpt_path=path,
            verbose=False,
        )


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{}], "sources has 1 data sets"),
        ([{}, {"atributes": ["shape"]}], "'atributes': did you mean attributes"),
        ([{}, {"batch_size": 4}], "unknown option in --data.sources 'batch_size'"),
        ([{}, {"shapes": {"colour": ["red"]}}], "'colour': did you mean colours"),
        ([{}, {"shapes": {"image_size": 32}}], "image_size=32.*differs from --data.image_size 16"),
    ],
)
def test_unusable_sources(sources: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JointAttributeDataModule(sources, image_size=16)


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "celebs"}, "unknown dataset 'celebs': did you mean celeba"),
        ({"attributes": []}, "attributes=\\[\\] leaves nothing"),
        ({"attributes": ["color"]}, "factor .*'color': did you mean colour"),
        ({"attributes": ["colour", "colour"]}, "'colour' is selected twice"),
        ({"attributes": ["texture"]}, "attribute texture is plain in all scenes"),
        ({"shapes": SceneOptions(max_objects=2)}, "max_objects=2.*one object"),
        ({"image_size": 32}, "--data.shapes.image_size 32"),
        ({"crop_size": 12}, "crop_size=12 does not apply to shapes"),
        ({"dataset": "rafd", "exclusive": []}, "exclusive=\\[\\] does not apply to rafd"),
        ({"dataset": "rafd", "split": "official"}, "split=official does not apply to rafd"),
        (
            {"dataset": "celeba", "split": "official", "val_fraction": 0.1},
            "val_fraction=0.1 does not apply to celeba with split=official",
        ),
        ({"dataset": "rafd", "val_fraction": 1.0}, "fraction below 1"),
        ({"labelled": 0}, "labelled=0 must be a number of images"),
        ({"labelled": "0%"}, "labelled=0% must be"),
        ({"labelled": "101%"}, "labelled=101% must be"),
        ({"labelled": "a few"}, "labelled=a few must be.*such as 5%"),
        ({"balanced": True, "n_groups": 2}, "n_groups=2 must be at least 3"),
        ({"balanced": True, "batch_size": 24}, "multiple of n_groups.*--data.batch_size 16"),
        ({"cache_limit": -1.0}, "cache_limit=-1.0"),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    drawn = SCENES if arguments.get("dataset", "shapes") == "shapes" else {}
    with pytest.raises(ValueError, match=message):
        AttributeDataModule(**{**drawn, **arguments})


def test_attributes_that_do_not_exist(celeba_root: Path) -> None:
    with pytest.raises(ValueError, match=r"'smiling'.*did you mean Smiling\?"):
        ready(**celeba(celeba_root, attributes=["Young", "smiling"]))
    with pytest.raises(ValueError, match=r"'Red_Hair'.*did you mean"):
        ready(**celeba(celeba_root, exclusive=[["Red_Hair", "Black_Hair"]]))


def test_a_constant_attribute(celeba_root: Path) -> None:
    with pytest.raises(ValueError, match="Bald is 0 in all 54 labelled"):
        ready(**celeba(celeba_root, attributes=["Bald", "Male"]))


def test_more_labels_than_images() -> None:
    with pytest.raises(ValueError, match="labelled=301 exceeds the 300 training images"):
        ready(**{**SCENES, "labelled": 301})


def test_too_few_labels_for_a_group() -> None:
    with pytest.raises(ValueError, match=r"labelled=13 leaves 12 of 12 groups.*\(2\)") as error:
        ready(**{**SEMI, "labelled": 13})
    assert "blue (2), blue+bordered (2), blue+star (2)" in str(error.value)
    fewest, percent = re.findall(r"--data.labelled ([\d.]+)", str(error.value))
    assert int(fewest) == 37
    for enough in (int(fewest), f"{percent}%"):
        ready(**{**SEMI, "labelled": enough})
    for short in (int(fewest) - 1, f"{float(percent) - 0.34}%"):
        with pytest.raises(ValueError, match="fewer than group_size=4"):
            ready(**{**SEMI, "labelled": short})


def test_groups_that_no_number_of_labels_fills(celeba_root: Path) -> None:
    arguments = celeba(celeba_root, balanced=True, n_groups=3, batch_size=12)
    message = r"none \(0\).*not enough even with all labels.*label_source observed"
    with pytest.raises(ValueError, match=message):
        ready(**arguments)
    with pytest.raises(ValueError, match="not enough even with all labels") as error:
        ready(**{**arguments, "label_source": "observed", "group_size": 10, "batch_size": 30})
    assert "observed" not in str(error.value)
    ready(**{**arguments, "label_source": "observed", "group_size": 2, "batch_size": 6})


def test_too_few_classes_for_groups() -> None:
    with pytest.raises(ValueError, match=r"star, bordered make 4 different labels.*n_groups=5"):
        ready(
            **{**SCENES, "attributes": ["shape", "border"], "balanced": True},
            n_groups=5,
            batch_size=20,
        )
