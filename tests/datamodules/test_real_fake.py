import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import Tensor

from datamodules import datasets
from datamodules.base import AdversariaDataModule
from datamodules.datasets import BatchDataset, ImageArrayDataset
from datamodules.real_fake import RealFakeDataModule
from tests.datamodules.conftest import save_picture


def ready(*args: Any, **kwargs: Any) -> RealFakeDataModule:
    data = RealFakeDataModule(*args, **kwargs)
    data.prepare_data()
    data.setup("test")
    return data


def part(dataset: BatchDataset | None) -> BatchDataset:
    assert dataset is not None
    return dataset


def array_part(dataset: BatchDataset | None) -> ImageArrayDataset:
    assert isinstance(dataset, ImageArrayDataset)
    return dataset


def joined(data: RealFakeDataModule, loader: int, key: str) -> Tensor:
    return torch.cat([batch[key] for batch in data.test_dataloader()[loader]])


def random_features(rows: int, dimensions: int = 4) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, dimensions)).astype(np.float32)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """11 pictures, some in a folder of a folder, and 7; the value of a picture is its number."""
    for i in range(11):
        save_picture(tmp_path / "A" / ("deep" if i % 2 else "") / f"{i:02}.png", i)
    for i in range(7):
        save_picture(tmp_path / "B" / f"{i}.png", 100 + i)
    (tmp_path / "A" / "notes.txt").write_text("no picture")
    return str(tmp_path / "A"), str(tmp_path / "B")


@pytest.fixture
def feature_files(tmp_path: Path) -> tuple[str, str]:
    np.save(tmp_path / "a.npy", random_features(11))
    torch.save(torch.from_numpy(random_features(7)), tmp_path / "b.pt")
    return str(tmp_path / "a.npy"), str(tmp_path / "b.pt")


def test_folders_are_decoded_by_the_batch(folders: tuple[str, str]) -> None:
    data = ready(*folders, eval_batch_size=4)
    loaders = data.test_dataloader()
    assert [len(loader.dataset) for loader in loaders] == [11, 7]  # type: ignore[arg-type]
    for loader, folder, first in zip(loaders, folders, (0, 100), strict=True):
        batches = list(loader)
        assert torch.cat([b["index"] for b in batches]).tolist() == list(range(len(loader.dataset)))  # type: ignore[arg-type]
        paths = [path for batch in batches for path in batch["path"]]
        assert paths == sorted(str(path) for path in Path(folder).rglob("*.png"))
        images = torch.cat([batch["image"] for batch in batches])
        assert images.dtype == torch.uint8
        assert images.shape == (len(paths), 3, 20, 20)
        values = [first + int(Path(path).stem) for path in paths]
        assert images[:, 0, 0, 0].tolist() == values
    single = part(data.fake_set).batch([6, 2], dtype=torch.float64)
    assert torch.equal(single["image"][:, 1, 3, 4], torch.tensor([106.0, 102.0]).double() / 255)
    assert [Path(path).name for path in single["path"]] == ["6.png", "2.png"]
    assert data.split_info == {
        "real": folders[0],
        "fake": folders[1],
        "counts": {"real": 11, "fake": 7},
        "image_size": 20,
        "dimensions": None,
    }


def test_only_the_pictures_of_a_batch_are_decoded(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ready(*folders, eval_batch_size=4)
    decoded: list[Path] = []
    original = datasets.decode_picture
    lock = threading.Lock()

    def record(path: Path, image_size: int | None) -> Tensor:
        with lock:
            decoded.append(path)
        return original(path, image_size)

    monkeypatch.setattr(datasets, "decode_picture", record)
    batches = iter(data.test_dataloader()[0])
    assert not decoded
    batch = next(batches)
    assert sorted(map(str, decoded)) == sorted(batch["path"])


def test_no_progress_bar_for_a_batch(
    folders: tuple[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    data = RealFakeDataModule(*folders)
    data.prepare_data()
    assert "checking pictures" in capfd.readouterr().err
    data.setup("test")
    capfd.readouterr()
    list(data.test_dataloader()[0])
    assert capfd.readouterr().err == ""


def test_workers_decode_the_same(folders: tuple[str, str]) -> None:
    plain, workers = (ready(*folders, image_size=8, num_workers=n) for n in (0, 1))
    assert torch.equal(joined(plain, 0, "image"), joined(workers, 0, "image"))
    assert joined(plain, 0, "image").shape == (11, 3, 8, 8)


def test_pictures_that_are_no_squares_keep_their_size_or_are_squeezed(tmp_path: Path) -> None:
    for name in ("A", "B"):
        (tmp_path / name).mkdir()
        Image.new("L", (9, 5), 7).save(tmp_path / name / "a.png")
    folders = str(tmp_path / "A"), str(tmp_path / "B")
    data = ready(*folders)
    assert joined(data, 1, "image").shape == (1, 3, 5, 9)
    assert data.split_info["image_size"] == [5, 9]
    Image.new("RGB", (16, 3), (7, 7, 7)).save(tmp_path / "B" / "b.png")
    data = ready(*folders, image_size=6)
    assert joined(data, 1, "image").shape == (2, 3, 6, 6)
    assert (joined(data, 1, "image") == 7).all()
    assert data.split_info["image_size"] == 6


@pytest.mark.parametrize("across", [True, False])
def test_pictures_of_several_sizes_are_an_error(folders: tuple[str, str], across: bool) -> None:
    odd = Path(folders[1 if across else 0]) / "0.png"
    save_picture(odd, 0, side=24)
    with pytest.raises(ValueError, match="size") as error:
        RealFakeDataModule(*folders).prepare_data()
    message = str(error.value)
    assert f"{odd} is 24x24" in message
    assert ".png is 20x20" in message
    assert "--data.image_size N" in message
    ready(*folders, image_size=8)


def test_the_sizes_of_two_folders_or_a_source_must_agree(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    Image.new("RGB", (24, 18)).save(tmp_path / "wide.png")
    (tmp_path / "C").mkdir()
    (tmp_path / "wide.png").rename(tmp_path / "C" / "wide.png")
    both = f"{folders[0]} is 20x20 and {tmp_path / 'C'} is 24x18 .width x height"
    data = RealFakeDataModule(folders[0], str(tmp_path / "C"))
    with pytest.raises(ValueError, match=r"00.png is 20x20 and .*wide.png is 24x18"):
        data.prepare_data()
    with pytest.raises(ValueError, match=both):
        data.setup("test")
    mixed = RealFakeDataModule("digits:test", folders[0])
    with pytest.raises(ValueError, match=r"digits:test is 32x32 and .*00.png is 20x20"):
        mixed.prepare_data()
    assert joined(ready("digits:test", folders[0], image_size=20), 1, "image").shape[-1] == 20


def test_unreadable_pictures_are_named_before_the_start(folders: tuple[str, str]) -> None:
    broken = [Path(folders[0]) / f"{i:02}.png" for i in (0, 2, 4, 6)]
    broken += [Path(folders[1]) / f"{i}.png" for i in range(3)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(
        RuntimeError, match=r"7 of 18 images of .*A and .*B cannot be read"
    ) as error:
        RealFakeDataModule(*folders).prepare_data()
    assert sum(str(path) in str(error.value) for path in broken) == 5


def test_pictures_of_16_bits_are_refused_rather_than_clipped(folders: tuple[str, str]) -> None:
    deep = np.full((20, 20), 700, np.uint16)
    Image.fromarray(deep).save(Path(folders[1]) / "deep.png")
    with pytest.raises(RuntimeError, match=r"deep.png \(I;16 pixels; save it with 8 bits"):
        RealFakeDataModule(*folders).prepare_data()


def test_a_file_that_only_decoding_finds_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for name in "ab":
        Image.fromarray(noise).save(tmp_path / "A" / f"{name}.jpg")
    cut = tmp_path / "A" / "b.jpg"
    cut.write_bytes(cut.read_bytes()[:-500])
    data = ready(str(tmp_path / "A"))
    with pytest.raises(RuntimeError, match=r"(?s)1 of 2 images of a batch cannot.*b.jpg"):
        list(data.test_dataloader()[0])


@pytest.mark.parametrize("dtype", ["float16", ">f4", "float64", "uint8", "int64", "uint16"])
def test_numpy_features(dtype: str, tmp_path: Path) -> None:
    features = (10 * np.abs(random_features(11))).astype(dtype)
    np.save(tmp_path / "a.npy", features)
    data = ready(str(tmp_path / "a.npy"), eval_batch_size=4)
    expected = features.astype(np.float64 if dtype == "float64" else np.float32)
    got = joined(data, 0, "features")
    assert got.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    np.testing.assert_array_equal(got.numpy(), expected)
    assert joined(data, 0, "index").tolist() == list(range(11))
    single = part(data.real_set).batch(torch.tensor([8, 1]))
    assert torch.equal(single["features"], got[[8, 1]])
    assert single["index"].tolist() == [8, 1]
    assert data.split_info["dimensions"] == 4
    assert data.split_info["image_size"] is None


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".PT"])
@pytest.mark.parametrize("in_dict", [True, False])
def test_torch_features(suffix: str, in_dict: bool, tmp_path: Path) -> None:
    features = torch.from_numpy(random_features(5)).half().requires_grad_()
    path = tmp_path / f"a{suffix}"
    torch.save({"features": features, "epoch": 3} if in_dict else features, path)
    data = ready(str(path))
    assert torch.equal(joined(data, 0, "features"), features.detach().float())


def test_two_files_of_features(feature_files: tuple[str, str]) -> None:
    data = ready(*feature_files)
    assert data.split_info["counts"] == {"real": 11, "fake": 7}
    assert len(data.test_dataloader()) == 2
    assert torch.equal(joined(data, 1, "features"), torch.load(feature_files[1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(5), r"shape \[5\], expected \[N, D\]"),
        (np.zeros((5, 2, 2)), r"shape \[5, 2, 2\]"),
        (np.zeros((0, 3)), r"shape \[0, 3\]"),
        (np.zeros((3, 0)), r"shape \[3, 0\]"),
        (np.zeros((3, 2), complex), "complex128, expected floating point or integers"),
        (np.zeros((3, 2), bool), "bool, expected"),
        (np.zeros((3, 2), "U3"), "<U3, expected"),
        (torch.zeros(3, 2, dtype=torch.bool), "torch.bool, expected"),
        (torch.eye(3).to_sparse(), "expected floating point or integers"),
        ({"weights": torch.zeros(3, 2)}, r"without 'features'; it has \['weights'\]"),
        ({"features": [1.0]}, "holds list, expected"),
        ([torch.zeros(3, 2)], "holds list, expected"),
        (np.array([[0, 1], [np.nan, 1], [2, 3], [np.inf, np.nan]]), "2 of 4 rows .* row 1;"),
        (torch.tensor([[0.0, 1.0], [2.0, -torch.inf]]), "1 of 2 rows .* row 1;"),
    ],
)
def test_files_that_hold_no_features(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.npy" if isinstance(content, np.ndarray) else "a.pt")
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as error:
        RealFakeDataModule(str(path)).prepare_data()
    assert f"--data.real {path}" in str(error.value)
    with pytest.raises(ValueError, match=message):
        RealFakeDataModule(str(path)).setup("test")


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object))
    torch.save(SimpleNamespace(a=1), tmp_path / "a.pt")
    (tmp_path / "a.pth").write_bytes(b"nothing")
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps(random_features(3)))
    for name, reason in (
        ("a.npy", "it holds Python objects"),
        ("pickled.npy", "it holds Python objects"),
        ("a.pt", "it is a pickle that would have Python run types.SimpleNamespace"),
        ("a.pth", "it is damaged"),
    ):
        refused = rf"{name} is not a readable file of features: {reason}.*; save one array"
        with pytest.raises(RuntimeError, match=refused):
            RealFakeDataModule(str(tmp_path / name)).prepare_data()


def test_sets_of_different_kinds_are_refused_before_a_picture_is_read(
    folders: tuple[str, str], feature_files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail("read a picture"))
    for pictures in (folders[1], "digits:test"):
        data = RealFakeDataModule(feature_files[0], pictures)
        for step in (data.prepare_data, data.setup):
            with pytest.raises(ValueError, match=r"real .*npy holds features but --data.fake") as e:
                step()
            assert f"{pictures} holds pictures" in str(e.value)


def test_features_of_different_dimensions_are_refused(
    feature_files: tuple[str, str], tmp_path: Path
) -> None:
    np.save(tmp_path / "wide.npy", random_features(7, 6))
    # An image size means nothing here, and must not switch the check off.
    data = RealFakeDataModule(feature_files[0], str(tmp_path / "wide.npy"), image_size=8)
    for step in (data.prepare_data, data.setup):
        with pytest.raises(ValueError, match=r"a.npy have 4 dimensions, .*wide.npy 6; both must"):
            step()


def test_sources_and_their_default_size() -> None:
    data = ready("digits:train", "digits:test")
    assert joined(data, 0, "image").shape[1:] == (3, 32, 32)
    assert sum(data.split_info["counts"].values()) == 1797
    assert data.split_info["counts"]["real"] > data.split_info["counts"]["fake"]
    assert (data.split_info["image_size"], data.split_info["real"]) == (32, "digits:train")
    assert ready("digits:test", image_size=8).split_info["image_size"] == 8
    single = part(data.fake_set).batch([3])
    assert single["image"].dtype == torch.float32
    assert single["image"].max() <= 1


@pytest.mark.parametrize(
    ("classes", "expected"),
    [("0,1,2", [0, 1, 2]), ("-3", [0, 1, 2, 4, 5, 6, 7, 8, 9]), ("-0, 9", list(range(1, 9)))],
)
def test_classes_by_name(classes: str, expected: list[int], mnist_root: Path) -> None:
    data = ready("mnist:train", f"mnist:test:{classes}", root=str(mnist_root))
    fake = array_part(data.fake_set)
    assert fake.labels.unique().tolist() == expected
    assert len(fake) == 4 * len(expected)
    # The pixels of the fakes tell the class, so this does not rely on any bookkeeping.
    assert fake.images.unique().tolist() == [20 * c + 1 for c in expected]
    assert len(part(data.real_set)) == 100


def test_classes_of_a_source_that_only_its_files_name(
    make_tree: Callable[..., Path], tmp_path: Path
) -> None:
    root = str(make_tree(["ant", "bee", "cow"]))
    data = ready("image_folder:train:-bee", "image_folder:test:cow", root=root)
    assert array_part(data.real_set).labels.unique().tolist() == [0, 2]
    assert data.split_info["counts"] == {"real": 20, "fake": 4}
    with pytest.raises(ValueError, match="unknown class of image_folder 'bea': did you mean bee"):
        ready("image_folder:test:bea", root=root)
    for path in (tmp_path / "test" / "bee").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"--data.real image_folder:test:bee leaves no picture"):
        ready("image_folder:test:bee", root=root)


def test_a_limit_draws_the_same_samples_in_every_run(
    folders: tuple[str, str], feature_files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> list[Tensor]:
        pictures, features = ready(*folders, limit=5), ready(*feature_files, limit=5)
        digits = ready("digits:train", "digits:test", image_size=8, limit=5)
        assert features.split_info["counts"] == {"real": 5, "fake": 5}
        assert joined(pictures, 0, "index").tolist() == list(range(5))
        return [
            *(joined(pictures, i, "image") for i in range(2)),
            *(joined(features, i, "features") for i in range(2)),
            *(joined(digits, i, "image") for i in range(2)),
        ]

    first = drawn()
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(), strict=True))
    values = first[0][:, 0, 0, 0].tolist()
    assert len(set(values)) == 5
    rows = {tuple(row) for row in random_features(11).tolist()}
    assert all(tuple(row) in rows for row in first[2].tolist())
    assert len(first[2].unique(dim=0)) == 5
    labels = array_part(ready("digits:train", image_size=8, limit=200).real_set).labels
    assert labels.bincount().min() > 5  # not the first ones, and none of the classes is favoured
    alone = ready(folders[0], limit=5)
    assert torch.equal(joined(alone, 0, "image"), first[0])


def test_a_limit_above_the_size_is_no_limit(folders: tuple[str, str]) -> None:
    data = ready(*folders, limit=9)
    assert data.split_info["counts"] == {"real": 9, "fake": 7}


def test_pictures_beyond_the_limit_are_not_read(folders: tuple[str, str]) -> None:
    used = part(ready(*folders, limit=5).real_set).batch(range(5))["path"]
    assert used == sorted(used)
    for path in set(map(str, Path(folders[0]).rglob("*.png"))) - set(used):
        Path(path).write_bytes(b"broken, but beyond the limit")
    data = ready(*folders, limit=5)
    assert part(data.real_set).batch(range(5))["path"] == used


class Rank:
    """As much of a trainer as the loaders read, for one of two processes."""

    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    state = SimpleNamespace(fn="test")
    world_size = 2

    def __init__(self, rank: int) -> None:
        self.global_rank = rank


def test_two_processes_share_each_set_without_repeats(
    folders: tuple[str, str], feature_files: tuple[str, str]
) -> None:
    for sets in (folders, feature_files, ("digits:test", "digits:train")):
        whole = ready(*sets, image_size=8)
        for loader in range(2):
            size = len(part(whole.real_set if loader == 0 else whole.fake_set))
            shares = []
            for rank in range(2):
                data = RealFakeDataModule(*sets, image_size=8, eval_batch_size=3)
                data.trainer = Rank(rank)  # type: ignore[assignment]
                data.setup("test")
                shares.append(joined(data, loader, "index").tolist())
            assert sorted(shares[0] + shares[1]) == list(range(size))
            assert abs(len(shares[0]) - len(shares[1])) <= 1


def test_fewer_samples_than_processes(folders: tuple[str, str]) -> None:
    data = RealFakeDataModule(*folders, limit=1)
    data.trainer = Rank(1)  # type: ignore[assignment]
    data.setup("test")
    with pytest.raises(ValueError, match="cannot be spread over 2 processes"):
        data.test_dataloader()


class Collector(LightningModule):
    def __init__(self, image_size: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.batches: list[tuple[int, dict[str, Any]]] = []

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.batches.append((dataloader_idx, batch))

    training_step = validation_step = predict_step = test_step

    def configure_optimizers(self) -> None:
        return None


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )


def test_a_test_run_sees_both_sets(
    folders: tuple[str, str], feature_files: tuple[str, str], trainer: Trainer
) -> None:
    module = Collector()
    trainer.test(module, datamodule=RealFakeDataModule(*folders, eval_batch_size=4))
    assert [(i, len(batch["index"])) for i, batch in module.batches] == [
        *((0, 4), (0, 4), (0, 3)),
        *((1, 4), (1, 3)),
    ]
    image = module.batches[3][1]["image"]
    assert image.dtype == torch.float32
    assert torch.allclose(image[2], torch.tensor(102 / 255))
    module = Collector()
    trainer.test(module, datamodule=RealFakeDataModule(*feature_files))
    assert [batch["features"].shape for _, batch in module.batches] == [(11, 4), (7, 4)]


def test_a_module_may_have_hyper_parameters_of_the_same_name(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(Collector(image_size=8), datamodule=RealFakeDataModule("digits:test", limit=3))


def test_without_fakes_there_is_one_loader(folders: tuple[str, str], trainer: Trainer) -> None:
    module, data = Collector(), RealFakeDataModule(folders[0])
    trainer.test(module, datamodule=data)
    assert [i for i, _ in module.batches] == [0]
    assert data.fake_set is None
    assert data.split_info["fake"] is None
    assert data.split_info["counts"] == {"real": 11}


@pytest.mark.parametrize("command", ["fit", "validate", "predict"])
def test_only_test_applies(command: str, folders: tuple[str, str], trainer: Trainer) -> None:
    data: AdversariaDataModule = RealFakeDataModule(*folders)
    with pytest.raises(ValueError, match=r"two sets to compare.*use train.py test"):
        getattr(trainer, command)(Collector(), datamodule=data)
    with pytest.raises(ValueError, match=r"use train.py test"):
        data.setup(command)
    for loader in (data.train_dataloader, data.val_dataloader, data.predict_dataloader):
        with pytest.raises(ValueError, match=r"use train.py test"):
            loader()


def test_split_info_before_anything_is_read() -> None:
    assert RealFakeDataModule("mnist:test:0,1", "mnist:train").split_info == {
        "real": "mnist:test:0,1",
        "fake": "mnist:train",
        "counts": {},
        "image_size": None,
        "dimensions": None,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"real": "mnist"}, "real mnist: which half. use mnist:train or mnist:test"),
        ({"real": "minst:test"}, "real minst:test: unknown source 'minst': did you mean mnist"),
        ({"real": "mnist:val"}, "'val' is no half of mnist; use mnist:train or mnist:test"),
        ({"real": "mnist:"}, "'' is no half of mnist"),
        ({"real": "mnist:test:"}, "a class name is missing"),
        ({"real": "mnist:test:1,,2"}, "a class name is missing; use mnist:test:CLASS,CLASS"),
        ({"real": "mnist:test:10"}, "unknown class of mnist '10': did you mean"),
        ({"real": "cifar10:train:-frogg"}, "unknown class of cifar10 'frogg': did you mean frog"),
        ({"real": "digits:test", "fake": "mnist:tset"}, "--data.fake mnist:tset: 'tset' is no"),
        ({"real": ""}, "--data.real is empty; expected a folder"),
        ({"real": "digits:test", "image_size": 0}, "image_size=0 must be at least 1"),
        ({"real": "digits:test", "limit": 0}, "limit=0 must be at least 1"),
        ({"real": "digits:test", "eval_batch_size": 0}, "eval_batch_size=0 must be at least 1"),
        ({"real": "digits:test", "num_workers": -1}, "num_workers=-1 must be at least 0"),
    ],
)
def test_bad_arguments_are_errors_before_any_data_are_read(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RealFakeDataModule(**arguments)


def test_paths_that_hold_no_set(tmp_path: Path) -> None:
    def attempt(path: Path) -> None:
        RealFakeDataModule("digits:test", str(path)).prepare_data()

    for name in ("none", "none.npy", "a/b:c"):
        with pytest.raises(FileNotFoundError, match=f"--data.fake .*{name} does not exist; expe"):
            attempt(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no pictures \(looked for .jpg"):
        attempt(tmp_path / "empty")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"a.csv has the suffix '.csv'; expected a folder"):
        attempt(tmp_path / "a.csv")
    save_picture(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match=r"'.png'; give the folder of a picture; expected"):
        attempt(tmp_path / "a.png")


def test_missing_sources_are_downloaded_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"none does not exist: .*--data.download true"):
        RealFakeDataModule("mnist:test", "digits:test", root=root).prepare_data()
    asked: list[tuple[str, str, bool, bool]] = []

    def record(name: str, root: str, train: bool, download: bool) -> None:
        asked.append((name, root, train, download))

    monkeypatch.setattr("datamodules.real_fake.prepare_source", record)
    RealFakeDataModule("mnist:test", "digits:train", root=root, download=True).prepare_data()
    assert asked == [("mnist", root, False, True), ("digits", root, True, True)]
