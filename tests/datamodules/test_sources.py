import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, Caltech256

from datamodules import sources
from datamodules.pictures import decode_images
from datamodules.sources import (
    CIFAR10_NAMES,
    CIFAR100_NAMES,
    SOURCES,
    ImageSource,
    draw_per_class,
    load_source,
    open_source,
    open_whole_source,
    prepare_source,
)


def check_values(source: ImageSource, size: int, tolerance: int = 0) -> None:
    """Each image of the fakes has the one value that tells its label."""
    assert source.images.dtype == torch.uint8
    assert source.images.shape == (len(source.labels), 3, size, size)
    expected = (20 * source.labels + 1).view(-1, 1, 1, 1).expand_as(source.images)
    assert (source.images.int() - expected % 256).abs().max() <= tolerance


def tree(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_digits_are_real_and_split_once_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = (load_source("digits", "nowhere", half, 8) for half in (True, False))
    assert len(train.labels) + len(test.labels) == 1797
    assert set(train.images.unique().tolist()) <= {round(v * 255 / 16) for v in range(17)}
    assert train.images.max() == 255
    for label in range(10):
        share = (test.labels == label).sum() / (
            (test.labels == label).sum() + (train.labels == label).sum()
        )
        assert share == pytest.approx(0.3, abs=0.01)
    seen = {image.numpy().tobytes() for image in train.images}
    shared = [image for image in test.images if image.numpy().tobytes() in seen]
    assert not shared
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert torch.equal(load_source("digits", "nowhere", False, 8).images, test.images)


def test_digits_are_enlarged_smoothly() -> None:
    small, large = (load_source("digits", "nowhere", True, size) for size in (8, 32))
    assert large.images.shape[-1] == 32
    back = torch.nn.functional.avg_pool2d(large.images.float(), 4)
    assert (back - small.images.float()).abs().mean() < 20
    assert torch.equal(large.images[:, 0], large.images[:, 2])


def test_mnist_from_packed_files_leaves_the_folder_alone(mnist_root: Path) -> None:
    before = tree(mnist_root)
    source = load_source("mnist", mnist_root, True, 28)
    check_values(source, 28)
    assert len(source.labels) == 100
    check_values(load_source("mnist", mnist_root, False, 32), 32)
    assert tree(mnist_root) == before


def test_mnist_from_unpacked_files_and_fashion_mnist(mnist_root: Path) -> None:
    raw = mnist_root / "MNIST" / "raw"
    for path in list(raw.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    check_values(load_source("mnist", mnist_root, False, 28), 28)
    with pytest.raises(FileNotFoundError, match="FashionMNIST/raw/train-images"):
        load_source("fashion_mnist", mnist_root, True, 28)
    (mnist_root / "MNIST").rename(mnist_root / "FashionMNIST")
    assert load_source("fashion_mnist", mnist_root, True, 28).class_names[9] == "Ankle boot"


def test_damaged_mnist_names_the_file(mnist_root: Path) -> None:
    path = mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(RuntimeError, match=r"train-images-idx3-ubyte.gz is damaged"):
        load_source("mnist", mnist_root, True, 28)
    path.write_bytes(gzip.compress(b"\0" * 100))
    with pytest.raises(RuntimeError, match=r"train-images-idx3-ubyte is damaged"):
        load_source("mnist", mnist_root, True, 28)


def test_svhn(svhn_root: Path) -> None:
    source = load_source("svhn", svhn_root, True, 32)
    check_values(source, 32)
    assert (source.labels == 0).sum() == 10
    assert len(load_source("svhn", svhn_root, False, 16).labels) == 40
    (svhn_root / "test_32x32.mat").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match=r"test_32x32.mat is damaged"):
        load_source("svhn", svhn_root, False, 32)


def test_a_wrong_checksum_is_an_error(svhn_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SVHN, "split_list", {k: [u, n, "0" * 32] for k, (u, n, _) in SVHN.split_list.items()}
    )
    with pytest.raises(RuntimeError, match=r"train_32x32.mat is damaged"):
        load_source("svhn", svhn_root, True, 32)


def test_cifar_pickles(cifar_root: Path) -> None:
    source = load_source("cifar10", cifar_root, True, 32)
    check_values(source, 32)
    assert (len(source.labels), source.class_names) == (100, CIFAR10_NAMES)
    source = load_source("cifar100", cifar_root, False, 32)
    check_values(source, 32)
    assert source.labels.max() == 99
    (cifar_root / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        load_source("cifar10", cifar_root, True, 32)


def test_cifar_as_a_folder_tree(make_tree: Callable[..., Path]) -> None:
    root = make_tree(CIFAR10_NAMES, 3, 2)
    source = load_source("cifar10", root, True, 20)
    check_values(source, 20)
    assert source.class_names == CIFAR10_NAMES
    (root / "train" / "unicorn").mkdir()
    with pytest.raises(RuntimeError, match="unicorn"):
        load_source("cifar10", root, True, 20)


def test_the_names_of_cifar_are_in_the_official_order() -> None:
    assert sorted(CIFAR100_NAMES) == CIFAR100_NAMES
    assert len(set(CIFAR100_NAMES)) == 100
    assert (CIFAR100_NAMES[14], CIFAR100_NAMES[88]) == ("butterfly", "tiger")
    assert sorted(CIFAR10_NAMES) == CIFAR10_NAMES


def test_tiny_imagenet(tiny_imagenet_root: Path) -> None:
    train = load_source("tiny_imagenet", tiny_imagenet_root, True, 64)
    check_values(train, 64, tolerance=2)
    assert train.class_names == ["n01", "n02", "n03", "n04"]
    assert train.labels.bincount().tolist() == [5, 5, 5, 5]
    test = load_source("tiny_imagenet", tiny_imagenet_root / "tiny-imagenet-200", False, 32)
    check_values(test, 32, tolerance=2)
    assert test.labels.bincount().tolist() == [3, 3, 3, 3]


def test_caltech256_draws_its_test_half(
    caltech_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = (load_source("caltech256", caltech_root, half, 8) for half in (True, False))
    for half, counts in ((train, [14, 14, 14, 14, 28]), (test, [6, 6, 6, 6, 12])):
        check_values(half, 8, tolerance=2)
        assert half.labels.bincount().tolist() == counts
        assert half.class_names == ["ak47", "bat", "cat-101", "dog", "clutter"]
    decoded: list[list[str]] = []
    monkeypatch.setattr(
        sources, "decode_images", lambda paths, *_: decoded.append([path.name for path in paths])
    )

    def read(root: Path) -> None:
        for half in (True, False):
            source = open_source("caltech256", root, half)
            source.read(torch.arange(len(source.labels)), 8)

    read(caltech_root)
    assert len(set(decoded[0] + decoded[1])) == len(decoded[0] + decoded[1]) == 120
    # As torchvision lays it out, and with another seed.
    base = caltech_root / "256_ObjectCategories"
    (caltech_root / "caltech256").mkdir()
    base.rename(caltech_root / "caltech256" / base.name)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    read(caltech_root)
    assert decoded[2:] == decoded[:2]
    (caltech_root / "empty" / "256_ObjectCategories").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no category folders; expected .*001.ak47"):
        open_source("caltech256", caltech_root / "empty", True)


def test_both_halves_as_one_source(caltech_root: Path) -> None:
    whole = open_whole_source("caltech256", caltech_root)
    assert whole.labels.bincount().tolist() == [20, 20, 20, 20, 40]
    train = open_source("caltech256", caltech_root, True)
    assert torch.equal(whole.labels[: len(train.labels)], train.labels)
    for chosen in (torch.tensor([100, 3, 119, 60, 0]), torch.tensor([1, 2]), torch.tensor([110])):
        images = whole.read(chosen, 8)
        expected = (20 * whole.labels[chosen] + 1).view(-1, 1, 1, 1).expand_as(images)
        assert (images.int() - expected).abs().max() <= 2


def test_only_the_chosen_pictures_are_decoded(
    tiny_imagenet_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    original = Image.open

    def record(path: Path) -> Image.Image:
        decoded.append(str(path))
        return original(path)

    monkeypatch.setattr(Image, "open", record)
    source = open_source("tiny_imagenet", tiny_imagenet_root, True)
    source.read((source.labels == 2).nonzero().flatten(), 32)
    assert len(decoded) == 5
    assert all("n03" in path for path in decoded)


def test_image_folder_numbers_the_classes_of_both_halves(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["ant", "bee", "cow"])
    (root / "train" / "bee").rename(root / "elsewhere")
    source = load_source("image_folder", root, True, 20)
    check_values(source, 20)
    assert source.class_names == ["ant", "bee", "cow"]
    assert source.labels.unique().tolist() == [0, 2]
    check_values(load_source("image_folder", root, False, 5), 5)


def test_image_folder_without_a_half(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["ant"])
    (root / "test").rename(root / "elsewhere")
    prepare_source("image_folder", root, True)
    with pytest.raises(FileNotFoundError, match=r"test is missing.*--data.root"):
        prepare_source("image_folder", root, False)
    (root / "test").mkdir()
    with pytest.raises(FileNotFoundError, match="no class folders"):
        prepare_source("image_folder", root, False)
    (root / "test" / "ant").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        open_source("image_folder", root, False)


def test_unreadable_pictures_are_named_all_at_once(make_tree: Callable[..., Path]) -> None:
    root = make_tree(["ant", "bee"])
    broken = [root / "train" / "ant" / f"{i}.png" for i in range(7)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(RuntimeError) as error:
        load_source("image_folder", root, True, 8)
    assert "7 of 20 images" in str(error.value)
    assert sum(str(path) in str(error.value) for path in broken) == 5


def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path: Path) -> None:
    paths = []
    for mode in ("L", "P", "RGBA", "1"):
        paths.append(tmp_path / f"{mode}.png")
        Image.new(mode, (9, 5), 1 if mode == "1" else None).save(paths[-1])
    images = decode_images(paths, 6, "modes")
    assert images.shape == (4, 3, 6, 6)
    assert images[3].min() == 255


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"digits"}))
def test_a_missing_root_says_what_was_expected_and_the_mend(name: str, tmp_path: Path) -> None:
    for train in (True, False):
        with pytest.raises(FileNotFoundError) as error:
            load_source(name, tmp_path / "nowhere", train, 32)
        message = str(error.value)
        assert f"{tmp_path / 'nowhere'} does not exist: expected" in message
        assert "--data.root DIR" in message
        assert ("--data.download true" in message) == (name != "image_folder")
        with pytest.raises(FileNotFoundError, match="is missing: expected"):
            load_source(name, tmp_path, train, 32)
    assert list(tmp_path.iterdir()) == []


def test_unknown_source() -> None:
    with pytest.raises(ValueError, match="did you mean cifar10"):
        load_source("cifr10", ".", True, 32)


@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("mnist", MNIST),
        ("svhn", SVHN),
        ("cifar10", CIFAR10),
        ("cifar100", CIFAR100),
        ("caltech256", Caltech256),
    ],
)
def test_download_reaches_torchvision(
    name: str, dataset: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def record(self: object, root: str, *args: Any, **kwargs: Any) -> None:
        calls.append({"root": root, **kwargs})

    monkeypatch.setattr(dataset, "__init__", record)
    with pytest.raises(FileNotFoundError):
        prepare_source(name, tmp_path / "new", True, download=True)
    assert calls
    assert all(call == {"root": str(tmp_path / "new"), "download": True} for call in calls)
    calls.clear()
    with pytest.raises(FileNotFoundError):
        prepare_source(name, tmp_path / "other", True, download=False)
    assert calls == []
    assert not (tmp_path / "other").exists()


def test_tiny_imagenet_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []
    monkeypatch.setattr(
        sources, "download_and_extract_archive", lambda url, root, md5: urls.append(url)
    )
    with pytest.raises(FileNotFoundError):
        prepare_source("tiny_imagenet", tmp_path, True, download=True)
    assert urls == ["http://cs231n.stanford.edu/tiny-imagenet-200.zip"]


def test_a_failing_download_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MNIST) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(RuntimeError, match=r"could not download mnist .*no route.*--data.root"):
        prepare_source("mnist", tmp_path, True, download=True)
    with pytest.raises(RuntimeError, match="your own data"):
        prepare_source("image_folder", tmp_path, True, download=True)


def test_nothing_is_downloaded_where_all_is_there(
    mnist_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MNIST, "__init__", lambda *_, **__: pytest.fail("downloaded"))
    prepare_source("mnist", mnist_root, True, download=True)


def test_draws_per_class_depend_on_nothing_but_their_purpose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = torch.tensor([0] * 30 + [1] * 20 + [2] * 3)
    rest, drawn = draw_per_class(labels, 0.1, "a")
    assert labels[drawn].bincount().tolist() == [3, 2, 1]
    assert torch.equal(torch.cat([rest, drawn]).sort().values, torch.arange(53))
    monkeypatch.setenv("PL_GLOBAL_SEED", "9")
    assert torch.equal(draw_per_class(labels, 0.1, "a")[1], drawn)
    assert not torch.equal(draw_per_class(labels, 0.1, "b")[1], drawn)
    alone = draw_per_class(labels[:30], 0.1, "a")[1]
    assert torch.equal(alone, drawn[:3])
    assert labels[draw_per_class(labels, 5, "a")[1]].bincount().tolist() == [5, 5, 3]
    pairs = draw_per_class(torch.tensor([0] * 30 + [1] * 30), 5, "a")[1]
    assert not torch.equal(pairs[:5] + 30, pairs[5:])
