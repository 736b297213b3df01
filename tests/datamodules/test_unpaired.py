import warnings
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

from datamodules.datasets import ImageArrayDataset
from datamodules.shapes import Scenes
from datamodules.shapes_options import SceneOptions
from datamodules.unpaired import (
    PairSampler,
    UnpairedDataModule,
    UnpairedImageDataset,
    serial_indices,
)
from datamodules.unpaired_sizes import multiple_of_four, scale_width_size
from datamodules.unpaired_sources import edges
from tests.datamodules.test_base import (
    KilledError,
    SaveAt,
    TwoRanks,
    make_trainer,  # noqa: F401 (a fixture)
)

SCENES: Any = {
    "shapes": SceneOptions(image_size=32),
    **{"shapes_train": 12, "shapes_val": 5, "shapes_test": 6},
}
FILES: Any = {"dataset": "folder", "load_size": 12, "crop_size": 8, "val_fraction": 0}


def ready(stage: str | None = None, **arguments: Any) -> UnpairedDataModule:
    data = UnpairedDataModule(**arguments)
    data.setup(stage)
    return data


def part(dataset: Any) -> Any:
    assert dataset is not None
    return dataset


def everything(dataset: Any) -> dict[str, Any]:
    return part(dataset).batch(range(len(part(dataset))))


def save(path: Path, size: tuple[int, int], value: int, mode: str = "RGB") -> None:
    """A picture of this (width, height), brighter from left to right."""
    pixels = np.linspace(value, value + 40, size[0])[None].repeat(size[1], 0).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """5 pictures in trainA and 8 in trainB, 3 and 2 in testA and testB, of various sizes."""
    for folder, count in (("trainA", 5), ("trainB", 8), ("testA", 3), ("testB", 2)):
        for i in range(count):
            base = 100 * folder.endswith("B") + 10 * i
            save(tmp_path / folder / f"{i}.png", (20 + 4 * i, 16 + i), base)
    return tmp_path


class PairRecorder(LightningModule):
    """Remembers the training batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int], list[int]]] = []
        self.images: list[dict[str, Tensor]] = []
        self.evaluated: list[tuple[int, dict[str, Any]]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert batch.keys() == {"a", "b"}
        assert batch["a"].keys() == batch["b"].keys() == {"image", "index"}
        places = (batch[side]["index"].tolist() for side in "ab")
        self.seen.append((self.current_epoch, *places))
        self.images.append({side: batch[side]["image"] for side in "ab"})
        return self.weight * batch["a"]["image"].mean()

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.evaluated.append((dataloader_idx, batch))

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluated.append((dataloader_idx, batch))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


# ---------------------------------------------------------------------- sizes and pairs
def test_sizes() -> None:
    assert scale_width_size(500, 333, 1024, 360) == (1024, 681)
    assert scale_width_size(500, 100, 64, 48) == (64, 48)
    assert multiple_of_four(30, 34) == (32, 32)
    assert multiple_of_four(254, 101) == (256, 100)


def sets(n_a: int, n_b: int) -> UnpairedImageDataset:
    images = [torch.zeros(n, 3, 2, 2, dtype=torch.uint8) for n in (n_a, n_b)]
    return UnpairedImageDataset(
        *(ImageArrayDataset(i, torch.zeros(len(i)).long(), ["x"]) for i in images)
    )


@pytest.mark.parametrize(("n_a", "n_b"), [(4, 10), (10, 4), (5, 5)])
def test_an_epoch_covers_the_larger_domain(n_a: int, n_b: int) -> None:
    for pairing in ("random", "permute", "serial"):
        sampler = PairSampler(sets(n_a, n_b), pairing, 1)
        first = sampler.order()
        assert len(sampler) == len(first) == max(n_a, n_b)
        taken = Counter(first[:, 0].tolist())
        assert taken == Counter(i % n_a for i in range(max(n_a, n_b)))
        assert torch.equal(first, sampler.order())
        sampler.set_epoch(1)
        assert not torch.equal(first, sampler.order())
        assert first[:, 0].tolist() != [i % n_a for i in range(len(first))], "shuffled"


def test_pairings() -> None:
    data = sets(300, 100)
    serial = PairSampler(data, "serial", 1).order().tolist()
    assert sorted(map(tuple, serial)) == sorted(serial_indices(300, 100))
    permuted = PairSampler(data, "permute", 1).order()[:, 1]
    for block in permuted.split(100):
        assert sorted(block.tolist()) == list(range(100)), "each once before any again"
    drawn = []
    for epoch in range(50):
        sampler = PairSampler(data, "random", 1)
        sampler.set_epoch(epoch)
        drawn.append(sampler.order()[:, 1])
    counts = torch.cat(drawn).bincount(minlength=100).double()
    assert abs(counts - 150).max() < 5 * 150**0.5
    assert 100 < ((counts - 150) ** 2 / 150).sum() * 1.0 + 50 < 200, "as random as a die"
    assert len(set(drawn[0].tolist())) < 100, "with replacement"


def test_an_epoch_of_any_number_of_batches() -> None:
    sampler = PairSampler(sets(3, 5), "permute", 4, batches=5)
    order = sampler.order()
    assert len(order) == len(sampler) == 20
    assert [sorted(b.tolist()) for b in order[:, 1].split(5)] == [list(range(5))] * 4


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("pairing", ["random", "permute"])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 1), (1, 0), (1, 2)])
def test_a_resumed_run_sees_the_same_pairs_crops_and_flips(
    pairing: str,
    epoch: int,
    batch: int,
    make_trainer: Callable[..., Trainer],  # noqa: F811
    root: Path,
) -> None:
    arguments = {**FILES, "root": str(root), "pairing": pairing, "batch_size": 2}
    whole = PairRecorder()
    make_trainer(max_epochs=2).fit(whole, datamodule=UnpairedDataModule(**arguments))
    path = str(root / "killed.ckpt")
    first, second = PairRecorder(), PairRecorder()
    with pytest.raises(KilledError):
        make_trainer(SaveAt(epoch, batch, path), max_epochs=2).fit(
            first, datamodule=UnpairedDataModule(**arguments)
        )
    make_trainer(max_epochs=2).fit(
        second, datamodule=UnpairedDataModule(**arguments), ckpt_path=path
    )
    assert len(whole.seen) == 8
    assert first.seen + second.seen == whole.seen
    for resumed, expected in zip(first.images + second.images, whole.images, strict=True):
        for side in "ab":
            assert torch.equal(resumed[side], expected[side])


@pytest.mark.parametrize("preprocess", ["crop", "resize_and_crop"])
def test_the_number_of_processes_changes_nothing(
    preprocess: str,
    make_trainer: Callable[..., Trainer],  # noqa: F811
    root: Path,
) -> None:
    arguments = {**FILES, "root": str(root), "preprocess": preprocess, "batch_size": 4}
    trainer = make_trainer(max_epochs=1)
    one = PairRecorder()
    trainer.fit(one, datamodule=UnpairedDataModule(**arguments))
    trainer = make_trainer()  # at the start of its first epoch
    for world in (2, 4):
        shares = []
        for rank in range(world):
            data = UnpairedDataModule(**arguments)
            ranks: Any = TwoRanks(trainer, rank)
            ranks.world_size = world
            data.trainer = ranks
            data.setup("fit")
            assert len(data.train_dataloader()) == 2
            batch = next(iter(data.train_dataloader()))
            shares.append(data.on_after_batch_transfer(batch, 0))
        for number, side in ((1, "a"), (2, "b")):
            seen = torch.cat([share[side]["index"] for share in shares])
            assert seen.tolist() == one.seen[0][number]
            images = torch.cat([share[side]["image"] for share in shares])
            assert torch.equal(images, one.images[0][side])


def test_the_sides_are_augmented_independently(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The same pictures on both sides, paired with themselves."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    for folder in ("trainA", "trainB"):
        (tmp_path / folder).mkdir()
        for i in range(64):
            Image.fromarray(pixels).save(tmp_path / folder / f"{i:02}.png")
    module = PairRecorder()
    arguments = {**FILES, "root": str(tmp_path), "pairing": "serial", "batch_size": 64}
    make_trainer(max_epochs=1).fit(module, datamodule=UnpairedDataModule(**arguments))
    places: dict[str, list[tuple[int, int, bool]]] = {"a": [], "b": []}
    whole = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    cuts = {
        (top, left, flipped): piece.flip(-1) if flipped else piece
        for top in range(5)
        for left in range(5)
        for flipped in (False, True)
        for piece in [whole[:, top : top + 8, left : left + 8]]
    }
    for side, found in places.items():
        for image in module.images[0][side]:
            found += [place for place, cut in cuts.items() if torch.equal(cut, image)]
        assert len(found) == 64
        assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(5))
        assert 16 < sum(flipped for _, _, flipped in found) < 48
    same = [first[2] == second[2] for first, second in zip(*places.values(), strict=True)]
    assert 16 < sum(same) < 48
    assert sum(a[:2] == b[:2] for a, b in zip(*places.values(), strict=True)) < 16


def test_loaders_through_a_trainer(make_trainer: Callable[..., Trainer]) -> None:  # noqa: F811
    module, data = PairRecorder(), UnpairedDataModule(**SCENES, batch_size=4)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(module, datamodule=data)
    seen = module.evaluated[2:]  # after those of the sanity check
    batches = [batch for _, batch in seen]
    assert [loader for loader, _ in seen] == [0, 1]
    assert [batch["domain"] for batch in batches] == ["a", "b"]
    for batch, images in zip(batches, (data.val_a, data.val_b), strict=True):
        expected = everything(images)
        assert batch.keys() == expected.keys()
        for name in ("image", "counterpart", "mask"):
            assert torch.equal(batch[name], expected[name])
        assert batch["image"].dtype == batch["counterpart"].dtype == torch.float32
        assert batch["image"].max() <= 1
    module.evaluated.clear()
    trainer.test(module, datamodule=data, verbose=False)
    assert [(i, len(batch["image"])) for i, batch in module.evaluated] == [(0, 6), (1, 6)]


def test_workers_hand_over_the_same_pairs(root: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork.*")
        loaders = [
            ready("fit", **FILES, root=str(root), batch_size=3, num_workers=n).train_dataloader()
            for n in (0, 1)
        ]
        for one, other in zip(*loaders, strict=True):
            for side in "ab":
                assert torch.equal(one[side]["image"], other[side]["image"])
                assert torch.equal(one[side]["index"], other[side]["index"])


# ---------------------------------------------------------------------- scenes
def test_no_scene_is_in_two_parts_or_in_both_domains() -> None:
    data = ready(**SCENES)
    images = [
        image.numpy().tobytes()
        for name in ("train", "val", "test")
        for side, domain in (("a", "day"), ("b", "night"))
        # All of them by day, to see whether it is the same scene.
        for image in everything(getattr(data, f"{name}_{side}"))[
            "image" if domain == "day" else "counterpart"
        ]
    ]
    assert len(images) == len(set(images)) == 46
    other = ready(**{**SCENES, "shapes_train": 20, "shapes_val": 7})
    assert torch.equal(everything(other.test_a)["image"], everything(data.test_a)["image"])


def test_counterparts_and_masks_of_scenes() -> None:
    options = SceneOptions(image_size=48, max_objects=3, shapes=("circle", "star"))
    data = ready("test", shapes=options, shapes_b={"domain": "sketch"}, shapes_test=20)
    assert data.domain_names == {"a": "day", "b": "sketch"}
    assert data.mask_classes == ["background", "circle", "star"]
    scenes = Scenes(options, 0, 20, 2 * 10**9)
    batch = everything(data.test_a)
    assert torch.equal(batch["image"] * 255, scenes.render(range(20)).float())
    assert torch.equal(batch["counterpart"] * 255, scenes.render(range(20), "sketch").float())
    truth = scenes.truth(range(20))
    expected = torch.zeros(20, 48, 48, dtype=torch.uint8)
    for i in range(20):
        for mask, label in zip(truth["object_masks"][i], truth["object_labels"][i], strict=True):
            expected[i][mask] = int(label) + 1
    assert torch.equal(batch["mask"], expected)
    assert set(expected.unique().tolist()) == {0, 1, 2}
    back = everything(data.test_b)
    assert torch.equal(
        back["counterpart"] * 255, Scenes(options, 0, 20, 5 * 10**9).render(range(20)).float()
    )


def test_domains_of_other_objects() -> None:
    """Those of A, drawn in the domain of B, are what a translation should give."""
    first = SceneOptions(image_size=32, shapes=("circle", "star"))
    data = ready(
        **{**SCENES, "shapes": first}, shapes_b={"shapes": ["star", "ring"], "domain": "night"}
    )
    assert data.mask_classes == ["background", "circle", "star", "ring"]
    batches = [everything(images) for images in (data.test_a, data.test_b)]
    assert set(batches[0]["mask"].unique().tolist()) == {0, 1, 2}
    assert set(batches[1]["mask"].unique().tolist()) == {0, 2, 3}
    expected = Scenes(first, 0, 6, 2 * 10**9).render(range(6), "night")
    assert torch.equal(batches[0]["counterpart"] * 255, expected.float())
    same = ready(**{**SCENES, "shapes": first}, shapes_b={"shapes": ["ring"]})
    assert same.domain_names == {"a": "A", "b": "B"}
    assert "counterpart" not in everything(same.test_a), "there is no other way to draw a circle"


def test_scenes_beyond_the_limit_are_drawn_when_asked_for() -> None:
    drawn, kept = ready(**SCENES, cache_limit=0.0), ready(**SCENES)
    assert isinstance(part(drawn.test_a).images, Scenes)
    assert isinstance(part(kept.test_a).images, ImageArrayDataset)
    for name in ("train_a", "val_b", "test_a"):
        one, other = (everything(getattr(data, name)) for data in (drawn, kept))
        assert one.keys() == other.keys() == {"image", "index", "domain", "mask", "counterpart"}
        assert all(torch.equal(one[k], other[k]) for k in ("image", "mask", "counterpart"))


def test_swapped_domains() -> None:
    data, swapped = ready(**SCENES), ready(**SCENES, swap_domains=True)
    assert swapped.domain_names == {"a": "night", "b": "day"}
    one, other = everything(data.test_b), everything(swapped.test_a)
    assert torch.equal(one["image"], other["image"])
    assert (one["domain"], other["domain"]) == ("b", "a")
    batch = next(iter(swapped.train_dataloader()))
    trained = part(data.train_b).batch(batch["a"]["index"])["image"] * 255
    assert torch.equal(batch["a"]["image"].float(), trained)


# ---------------------------------------------------------------------- digits
@pytest.mark.parametrize("kind", ["inverted", "edges"])
def test_digits_and_their_translation(kind: str) -> None:
    data = ready(dataset="digits", mnist_b=kind, load_size=16, channels=1)
    assert data.image_channels == 1
    assert data.domain_names == {"a": "digits", "b": f"{kind} digits"}
    first, second = everything(data.test_a), everything(data.test_b)
    translate = edges if kind == "edges" else lambda images: 255 - images
    for digit, other in (
        (first["image"], first["counterpart"]),
        (second["counterpart"], second["image"]),
    ):
        assert digit.shape[1:] == (1, 16, 16)
        pixels = (digit * 255).round().byte()
        assert torch.equal((other * 255).round().byte(), translate(pixels))
    sizes = [len(getattr(data, f"{p}_{s}")) for p in ("train", "val", "test") for s in "ab"]
    assert sum(sizes) == 1797
    digits = [
        image.numpy().tobytes()
        for p in ("train", "val", "test")
        for s in "ab"
        for image in everything(getattr(data, f"{p}_{s}"))["image" if s == "a" else "counterpart"]
    ]
    assert len(set(digits)) == 1797, "no digit twice"


def test_edges() -> None:
    images = torch.zeros(1, 1, 4, 6, dtype=torch.uint8)
    images[..., 3:] = 100
    assert edges(images)[0, 0].tolist() == [[0, 0, 100, 100, 0, 0]] * 4
    assert edges(images.transpose(2, 3))[0, 0, :, 0].tolist() == [0, 0, 100, 100, 0, 0]


# ---------------------------------------------------------------------- folders
@pytest.mark.parametrize(
    ("preprocess", "trained", "evaluated"),
    [
        ("resize_and_crop", (8, 8), (8, 8)),
        ("crop", (8, 8), (20, 24)),
        ("scale_width", (9, 12), (9, 12)),
        ("scale_width_and_crop", (8, 8), (9, 12)),
        ("none", (20, 24), (20, 24)),
    ],
)
def test_sizes_of_pictures(
    preprocess: str,
    trained: tuple[int, int],
    evaluated: tuple[int, int],
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    for folder in ("trainA", "trainB", "testA", "testB"):
        save(tmp_path / folder / "x.png", (25, 19), 80)
    data = ready(**FILES, root=str(tmp_path), preprocess=preprocess)
    module = PairRecorder()
    make_trainer(max_epochs=1).fit(module, datamodule=data)
    assert module.images[0]["a"].shape[2:] == module.images[0]["b"].shape[2:] == trained
    assert everything(data.test_a)["image"].shape[2:] == evaluated
    assert everything(data.train_b)["image"].shape[2:] == evaluated
    with Image.open(tmp_path / "testA" / "x.png") as picture:
        resized = np.array(picture.resize(evaluated[::-1], Image.Resampling.BICUBIC))
    batch = next(iter(data.test_dataloader()[0]))
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), resized)


def test_folders(root: Path) -> None:
    data = ready(**FILES, root=str(root))
    assert data.image_channels == 3
    assert data.mask_classes is None
    assert data.split_info["counts"] == {
        **{"train_a": 5, "train_b": 8, "val_a": 5, "val_b": 8, "test_a": 3, "test_b": 2}
    }
    batch = everything(data.test_b)
    assert batch["path"] == [str(root / "testB" / f"{i}.png") for i in range(2)]
    assert batch.keys() == {"image", "index", "path", "domain"}
    held_out = ready(**{**FILES, "val_fraction": 0.25}, root=str(root))
    counts = held_out.split_info["counts"]
    assert [counts[name] for name in ("train_a", "val_a", "train_b", "val_b")] == [4, 1, 6, 2]
    paths = [everything(getattr(held_out, name))["path"] for name in ("train_b", "val_b")]
    assert len({*paths[0], *paths[1]}) == 8
    for side in "AB":
        save(root / f"val{side}" / "deep" / "v.png", (20, 20), 3)
    own = ready(**{**FILES, "val_fraction": 0.25}, root=str(root))
    assert own.split_info["counts"]["train_b"] == 8
    assert everything(own.val_a)["path"] == [str(root / "valA" / "deep" / "v.png")]


def test_pictures_of_various_sizes_come_one_by_one(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    root: Path,
) -> None:
    data = ready(**FILES, root=str(root), preprocess="none", horizontal_flip=False)
    module = PairRecorder()
    make_trainer(max_epochs=1).fit(module, datamodule=data)
    for (_, (place,), _), images in zip(module.seen, module.images, strict=True):
        assert torch.equal(images["a"], part(data.train_a).batch([place])["image"])
    assert len({images["b"].shape for images in module.images}) > 3
    shapes = [batch["image"].shape[2:] for batch in data.test_dataloader()[0]]
    assert shapes == [(16, 20), (16, 24), (16, 28)]
    batch = next(iter(ready(**FILES, root=str(root)).test_dataloader()[0]))
    assert len(batch["image"]) == 3


def test_kept_pictures_are_those_decoded_later(root: Path) -> None:
    kept, decoded = (
        ready(**FILES, root=str(root), preprocess="crop", cache_limit=limit) for limit in (2.0, 0.0)
    )
    for one, other in zip(kept.train_dataloader(), decoded.train_dataloader(), strict=True):
        assert torch.equal(one["b"]["image"], other["b"]["image"])
    (root / "trainB" / "3.png").unlink()
    assert len(list(kept.train_dataloader())) == 8
    with pytest.raises(RuntimeError, match=r"trainB/3\.png"):
        list(decoded.train_dataloader())


def test_training_pictures_that_are_evaluated_are_decoded_once(root: Path) -> None:
    data = ready("fit", **FILES, root=str(root))
    first = part(data.train_b).batch([6, 1, 6])
    for path in (root / "trainB").iterdir():
        path.unlink()
    again = part(data.train_b).batch([1, 6])
    assert torch.equal(again["image"], first["image"][1:])
    assert again["index"].tolist() == [1, 6]
    with pytest.raises(RuntimeError, match=r"trainB/2\.png"):
        part(data.train_b).batch([2])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grey_beside_colour_pictures_are_converted_on_demand(
    channels: int, mode: str, root: Path
) -> None:
    save(root / "testA" / "0.png", (20, 16), 7, "L")
    data = ready("test", **FILES, root=str(root), channels=channels)
    for i in range(2):
        with Image.open(root / "testA" / f"{i}.png") as picture:
            expected = picture.convert(mode).resize((8, 8), Image.Resampling.BICUBIC)
        image = (part(data.test_a).batch([i])["image"][0] * 255).round().byte()
        assert np.array_equal(image.permute(1, 2, 0).squeeze(-1).numpy(), np.array(expected))


def test_grey_pictures_alone_have_one_channel(tmp_path: Path) -> None:
    for folder in ("trainA", "trainB"):
        save(tmp_path / folder / "x.png", (20, 16), 7, "L")
    data = ready("fit", **FILES, root=str(tmp_path))
    assert data.image_channels == 1
    assert next(iter(data.train_dataloader()))["a"]["image"].shape == (1, 1, 12, 12)


# ---------------------------------------------------------------------- prediction
def test_predicted_pictures_keep_names_and_sizes(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    sizes = {"b.png": (21, 13), "deep/a.png": (30, 7)}
    for name, size in sizes.items():
        save(tmp_path / name, size, 50)
    data = UnpairedDataModule("folder", "nowhere", predict_folder=str(tmp_path), predict_domain="b")
    batches: Any = make_trainer().predict(PairRecorder(), datamodule=data)
    found = {
        str(Path(batch["path"][0]).relative_to(tmp_path)): tuple(batch["image"].shape)
        for batch in batches
    }
    assert found == {name: (1, 3, h, w) for name, (w, h) in sizes.items()}
    assert [batch["domain"] for batch in batches] == ["b", "b"]
    assert batches[0]["image"].max() <= 1


def test_a_checkpoint_of_grey_pictures_predicts_in_grey(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    for folder in ("trainA", "trainB"):
        save(tmp_path / "grey" / folder / "x.png", (20, 16), 7, "L")
    trainer = make_trainer(max_epochs=1)
    trainer.fit(PairRecorder(), datamodule=ready("fit", **FILES, root=str(tmp_path / "grey")))
    trainer.save_checkpoint(tmp_path / "grey.ckpt")
    save(tmp_path / "new" / "x.png", (20, 16), 7)
    data = UnpairedDataModule("folder", "nowhere", predict_folder=str(tmp_path / "new"))
    batches: Any = make_trainer().predict(
        PairRecorder(), datamodule=data, ckpt_path=str(tmp_path / "grey.ckpt")
    )
    assert batches[0]["image"].shape == (1, 1, 16, 20)


def test_without_a_folder_the_test_pictures_are_predicted(root: Path) -> None:
    data = ready("predict", **FILES, root=str(root), predict_domain="b")
    batch = next(iter(data.predict_dataloader()))
    assert batch["domain"] == "b"
    assert torch.equal(batch["image"].float() / 255, everything(data.test_b)["image"])


def test_a_checkpoint_of_other_images_is_refused(root: Path) -> None:
    colour = ready("fit", **FILES, root=str(root))
    state = colour.state_dict()
    colour.load_state_dict(state)
    grey = ready("fit", **FILES, root=str(root), channels=1)
    with pytest.raises(ValueError, match=r"images of 3 channels.*have 1.*--data.channels 3"):
        grey.load_state_dict(state)
    swapped = ready("fit", **FILES, root=str(root), swap_domains=True)
    with pytest.raises(ValueError, match=r"swap_domains=False.*--data.swap_domains false"):
        swapped.load_state_dict(state)


def test_hyperparameters_are_plain_values(
    make_trainer: Callable[..., Trainer],  # noqa: F811
    tmp_path: Path,
) -> None:
    data = UnpairedDataModule(**SCENES)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(PairRecorder(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert UnpairedDataModule(**kept).split_info["shapes_a"] == data.split_info["shapes_a"]


# ---------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "horses"}, "unknown dataset 'horses'"),
        ({"dataset": "folder", "preprocess": "crops"}, "unknown preprocess 'crops': did you mean crop"),
        ({"pairing": "rondom"}, "unknown pairing 'rondom': did you mean random"),
        ({"dataset": "digits", "mnist_b": "edge"}, "unknown mnist_b 'edge': did you mean edges"),
        ({"predict_domain": "c"}, "unknown predict_domain 'c'"),
        ({"load_size": 64}, "load_size=64 does not apply to shapes; leave out --data.load_size"),
        ({"dataset": "digits", "preprocess": "crop"}, "preprocess=crop does not apply to digits"),
        ({"dataset": "folder", "domain_a": ["x"]}, r"domain_a=\['x'\] does not apply to folder"),
        ({"dataset": "folder", "channels": 4}, "channels=4 must be 1"),
        ({"dataset": "folder", "crop_size": 300}, r"crop_size=300 is larger than load_size=286.*--data.load_size 300"),
        ({"dataset": "folder", "crop_size": 0}, "crop_size=0 must be at least 1"),
        ({"dataset": "folder", "load_size": 0}, "load_size=0 must be at least 1"),
        ({"dataset": "folder", "val_fraction": 1.0}, "val_fraction=1.0 is a fraction below 1"),
        ({"shapes_test": 0}, "shapes_test=0 must be at least 1"),
        ({"cache_limit": -1.0}, "cache_limit=-1.0 must be at least 0"),
        ({"shapes_b": {"domian": "night"}}, "unknown option in --data.shapes_b 'domian': did you mean domain"),
        ({"shapes_b": {"domain": "day"}}, "changes nothing, so both domains are the same"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnpairedDataModule(**arguments)


def test_bad_folders(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: .*--data.root DIR"):
        UnpairedDataModule(**FILES, root=str(root / "nowhere")).prepare_data()
    (root / "testB").rename(root / "test_B")
    data = UnpairedDataModule(**FILES, root=str(root))
    message = r"testB is missing: expected .* but .* has testA, test_B, trainA, trainB"
    with pytest.raises(FileNotFoundError, match=message):
        data.prepare_data()
    (root / "valA").mkdir()
    save(root / "valA" / "x.png", (20, 20), 0)
    with pytest.raises(FileNotFoundError, match="valB is missing"):
        data.setup("fit")
    (root / "testB").mkdir()
    with pytest.raises(FileNotFoundError, match="testB holds no pictures, so domain B is empty"):
        data.setup("test")


def test_bad_pictures(root: Path) -> None:
    arguments = {**FILES, "root": str(root)}
    with pytest.raises(ValueError, match=r"0\.png is 20x16.*smaller than the crop.*crop_size 16"):
        ready("fit", **{**arguments, "preprocess": "crop", "crop_size": 17})
    ready("test", **{**arguments, "preprocess": "crop", "crop_size": 17})  # nothing is cropped
    save(root / "trainB" / "9.png", (20, 16), 7, "L")
    message = r"trainB/9\.png is grey but .*trainA/0\.png has colours; use --data.channels 1 or 3"
    with pytest.raises(ValueError, match=message):
        ready("fit", **arguments)
    ready("test", **arguments)
    save(root / "trainB" / "9.png", (20, 2), 7)
    with pytest.raises(ValueError, match=r"9\.png is 20x2 .*no multiple of 4"):
        ready("fit", **{**arguments, "preprocess": "none"})
    deep = np.full((16, 20), 40000, np.uint16)
    Image.fromarray(deep).save(root / "trainB" / "9.png")
    with pytest.raises(RuntimeError, match=r"9\.png \(I;16 pixels; save it with 8 bits"):
        ready("fit", **arguments, channels=1)
    (root / "trainB" / "9.png").write_text("no picture")
    with pytest.raises(RuntimeError, match=r"1 of 9 images of domain B, train .*\n.*trainB/9\.png"):
        ready("fit", **arguments)


def test_batches_that_cannot_be(root: Path) -> None:
    arguments = {**FILES, "root": str(root)}
    message = r"domain A differ in size with preprocess=none, so that 2.*--data.batch_size 1"
    with pytest.raises(ValueError, match=message):
        ready("fit", **arguments, preprocess="none", batch_size=2)
    ready("fit", **arguments, preprocess="crop", batch_size=2)
    with pytest.raises(ValueError, match="batch_size=9 exceeds the 8 training images"):
        ready("fit", **arguments, batch_size=9).train_dataloader()
    for i in range(1, 5):
        (root / "trainA" / f"{i}.png").unlink()
    with pytest.raises(ValueError, match=r"trainA has 1 picture, .*--data.val_fraction 0"):
        ready("fit", **{**arguments, "val_fraction": 0.1})
