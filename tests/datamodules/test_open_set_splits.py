import json
from pathlib import Path

import pytest

from datamodules.open_set_splits import duplicate_splits, num_splits, osr_split
from datamodules.sources import CIFAR100_NAMES

NEAL_TEN = ["3678", "1246", "2349", "0126", "4569"]
ANIMAL_SUPERCLASSES = """
    beaver dolphin otter seal whale  aquarium_fish flatfish ray shark trout
    bee beetle butterfly caterpillar cockroach  bear leopard lion tiger wolf
    camel cattle chimpanzee elephant kangaroo  fox porcupine possum raccoon skunk
    crab lobster snail spider worm  baby boy girl man woman
    crocodile dinosaur lizard snake turtle  hamster mouse rabbit shrew squirrel
"""
PUBLISHED = [
    *[("neal", d) for d in ("digits", "mnist", "fashion_mnist", "svhn", "cifar10")],
    *[("arpl", d) for d in ("digits", "mnist", "fashion_mnist", "svhn", "cifar10")],
    *[("neal", d) for d in ("cifar+10", "cifar+50", "tiny_imagenet")],
    *[("arpl", d) for d in ("cifar+10", "tiny_imagenet")],
]


@pytest.mark.parametrize(("protocol", "dataset"), PUBLISHED)
def test_every_published_split_is_sound(protocol: str, dataset: str) -> None:
    assert num_splits(dataset, protocol) == 5
    sizes = {"cifar+10": (4, 10), "cifar+50": (4, 50), "tiny_imagenet": (20, 180)}
    for index in range(5):
        split = osr_split(dataset, index, protocol)
        assert (split.dataset, split.protocol, split.index) == (dataset, protocol, index)
        assert split.known == sorted(set(split.known))
        assert split.unknown == sorted(set(split.unknown))
        assert (len(split.known), len(split.unknown)) == sizes.get(dataset, (6, 4))
        if not dataset.startswith("cifar+"):
            total = 200 if dataset == "tiny_imagenet" else 10
            assert sorted(split.known + split.unknown) == list(range(total))
        assert split.provenance


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion_mnist", "svhn", "cifar10"])
def test_neal_ten_class_lists(dataset: str) -> None:
    for index, unknown in enumerate(NEAL_TEN):
        assert osr_split(dataset, index).unknown == [int(digit) for digit in unknown]


def test_neal_cifar_plus() -> None:
    for index in range(5):
        assert osr_split("cifar+10", index).known == [0, 1, 8, 9]
        assert osr_split("cifar+50", index).known == [0, 1, 8, 9]
        animals = {CIFAR100_NAMES[i] for i in osr_split("cifar+50", index).unknown}
        assert animals == set(ANIMAL_SUPERCLASSES.split())
        assert {CIFAR100_NAMES[i] for i in osr_split("cifar+10", index).unknown} < animals
    assert osr_split("cifar+10", 0).unknown == [26, 31, 34, 44, 45, 63, 65, 77, 93, 98]
    assert osr_split("cifar+10", 4).unknown == [3, 15, 19, 21, 42, 46, 66, 72, 78, 98]


def test_tiny_imagenet_lists() -> None:
    neal = osr_split("tiny_imagenet", 4)
    assert neal.known == sorted(
        [102, 79, 47, 106, 59, 93, 145, 10, 62, 175, 76, 183, 48, 130, 38, 186, 44, 8, 29, 26]
    )
    assert "one source only" in neal.provenance
    arpl = osr_split("tiny_imagenet", 0, "arpl")
    assert arpl.known == sorted(
        [108, 147, 17, 58, 193, 123, 72, 144, 75, 167, 134, 14, 81, 171, 44, 197, 152, 66, 1, 133]
    )


def test_arpl_lists() -> None:
    assert osr_split("mnist", 0, "arpl").known == [2, 3, 4, 5, 8, 9]
    assert osr_split("svhn", 4, "arpl").known == [0, 1, 2, 4, 7, 9]
    assert osr_split("cifar10", 3, "arpl").known == [0, 1, 6, 7, 8, 9]
    assert osr_split("cifar+10", 4, "arpl").known == [0, 1, 8, 9]
    assert osr_split("cifar+10", 0, "arpl").unknown == [0, 1, 8, 9, 25, 30, 46, 49, 52, 71]


def test_lists_by_analogy_say_so() -> None:
    for dataset in ("digits", "fashion_mnist"):
        for protocol in ("neal", "arpl"):
            assert f"not published for {dataset}" in osr_split(dataset, 0, protocol).provenance
    assert "not published" not in osr_split("mnist", 0).provenance


def test_duplicates_are_found() -> None:
    assert duplicate_splits("cifar10", "arpl") == [(0, 1)]
    assert duplicate_splits("cifar+10", "arpl") == [(1, 2)]
    assert duplicate_splits("cifar10", "neal") == []
    assert duplicate_splits("mnist", "arpl") == []
    assert len(duplicate_splits("cifar+50", "neal")) == 10


@pytest.mark.parametrize("index", [-1, 5, 7])
def test_a_split_that_does_not_exist_names_those_that_do(index: int) -> None:
    with pytest.raises(ValueError, match=rf"split {index} does not exist: mnist .*splits 0 to 4"):
        osr_split("mnist", index)


def test_combinations_that_were_not_published() -> None:
    for dataset in ("cifar+50", "image_folder", "cifar100"):
        with pytest.raises(ValueError, match=r"'arpl' has no class lists for .*--data.protocol"):
            osr_split(dataset, 0, "arpl")
    with pytest.raises(ValueError, match="did you mean mnist"):
        osr_split("mnis", 0)
    with pytest.raises(ValueError, match=r"unknown protocol 'nael'.*neal or arpl"):
        osr_split("mnist", 0, "nael")


def write(folder: Path, *splits: object) -> str:
    path = folder / "protocol.json"
    path.write_text(json.dumps({"splits": splits}))
    return str(path)


def test_protocol_files_take_names_and_indices(tmp_path: Path) -> None:
    path = write(tmp_path, {"known": ["dog", 3, "airplane"], "unknown": [9, "ship"]})
    split = osr_split("cifar10", 0, path)
    assert (split.known, split.unknown) == ([0, 3, 5], [8, 9])
    assert split.protocol == path
    assert path in split.provenance
    yaml_path = tmp_path / "protocol.yaml"
    yaml_path.write_text("splits:\n- known: [0, 1]\n- known: [2]\n  unknown: [4]\n")
    assert osr_split("digits", 0, str(yaml_path)).unknown == list(range(2, 10))
    assert osr_split("digits", 1, str(yaml_path)).unknown == [4]
    assert num_splits("digits", str(yaml_path)) == 2


def test_protocol_file_for_two_sources(tmp_path: Path) -> None:
    path = write(tmp_path, {"known": ["truck"], "unknown": ["tiger", 9]})
    split = osr_split("cifar+10", 0, path)
    assert (split.known, split.unknown) == ([9], [9, 88])


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"known": ["dog", "cat"], "unknown": ["dog"]}, r"5 \(dog\) cannot be both"),
        ({"known": ["dgo"], "unknown": [1]}, "unknown class 'dgo': did you mean dog"),
        ({"known": [1], "unknown": [10]}, "class 10 does not exist; indices go to 9"),
        ({"known": list(range(11)), "unknown": []}, "11 known classes, but cifar10 has only 10"),
        ({"known": [1, "automobile"]}, "more than once"),
        ({"known": []}, "no known class"),
        ({"known": list(range(10))}, "no unknown class"),
        ({"unknown": [1]}, "expected"),
        ([1, 2], "expected"),
        ({"known": [True]}, "expected"),
    ],
)
def test_contradictory_protocol_files(tmp_path: Path, split: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        osr_split("cifar10", 0, write(tmp_path, split))


def test_missing_or_shapeless_protocol_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        osr_split("cifar10", 0, str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"split 3 does not exist: .* split 0 only"):
        osr_split("cifar10", 3, write(tmp_path, {"known": [1]}))
    for content in ("[1, 2]", "splits: []", "{", "just text"):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(ValueError, match="protocol file"):
            osr_split("cifar10", 0, str(path))
