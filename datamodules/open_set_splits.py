"""Which classes are known: the class lists of the open-set literature, with where each comes from.

Two families of lists are in use and their results must not be compared with each other:

- ``neal``: Neal et al., Open Set Learning with Counterfactual Images, ECCV 2018.
- ``arpl``: Chen et al., Adversarial Reciprocal Points Learning, TPAMI 2021, and most work since.

A list may also come from a YAML or JSON file::

    splits:
      - known: [cat, dog]      # class names or indices
        unknown: [truck, 9]    # may be left out: all other classes
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from datamodules.sources import SOURCES, class_names_of, unknown_name

PROTOCOLS = ("neal", "arpl")

# Known classes of "cifar+10" and "cifar+50" are CIFAR-10 classes, unknown ones CIFAR-100 classes
# (fine labels).
MIXED_SOURCES = {"cifar+10": ("cifar10", "cifar100"), "cifar+50": ("cifar10", "cifar100")}

DATASETS = [*SOURCES, *MIXED_SOURCES]

NEAL_TEN_UNKNOWN = [[3, 6, 7, 8], [1, 2, 4, 6], [2, 3, 4, 9], [0, 1, 2, 6], [4, 5, 6, 9]]

NEAL_CIFAR_PLUS_KNOWN = [0, 1, 8, 9]

NEAL_CIFAR_PLUS_50_UNKNOWN = [
    *(1, 2, 3, 4, 6, 7, 11, 14, 15, 18, 19, 21, 24, 26, 27, 29, 30, 31, 32, 34, 35, 36, 38, 42, 43),
    *(44, 45, 46, 50, 55, 63, 64, 65, 66, 67, 72, 73, 74, 75, 77, 78, 79, 80, 88, 91, 93, 95, 97),
    *(98, 99),
]

NEAL_CIFAR_PLUS_10_UNKNOWN = [
    [26, 31, 34, 44, 45, 63, 65, 77, 93, 98],
    [7, 11, 66, 75, 77, 93, 95, 97, 98, 99],
    [2, 11, 15, 24, 32, 34, 63, 88, 93, 95],
    [1, 11, 38, 42, 44, 45, 63, 64, 66, 67],
    [3, 15, 19, 21, 42, 46, 66, 72, 78, 98],
]

NEAL_TINY_IMAGENET_KNOWN = [
    [192, 112, 145, 107, 91, 180, 144, 193, 10, 125, 186, 28, 72, 124, 54, 77, 157, 169, 104, 166],
    [156, 157, 167, 175, 153, 11, 147, 0, 199, 171, 132, 60, 87, 190, 101, 111, 193, 71, 131, 192],
    [28, 15, 103, 33, 90, 167, 61, 13, 124, 159, 49, 12, 54, 78, 82, 107, 80, 25, 140, 46],
    [128, 132, 123, 72, 154, 35, 86, 10, 188, 28, 85, 89, 91, 82, 116, 65, 96, 41, 134, 25],
    [102, 79, 47, 106, 59, 93, 145, 10, 62, 175, 76, 183, 48, 130, 38, 186, 44, 8, 29, 26],
]

ARPL_MNIST_KNOWN = [
    [2, 4, 5, 9, 8, 3],
    [3, 2, 6, 9, 4, 0],
    [5, 8, 3, 2, 4, 6],
    [3, 7, 8, 4, 0, 5],
    [6, 3, 4, 9, 8, 2],
]

ARPL_SVHN_KNOWN = [
    [5, 3, 7, 2, 8, 6],
    [3, 8, 7, 6, 2, 5],
    [8, 9, 4, 7, 2, 1],
    [3, 8, 2, 5, 0, 6],
    [4, 9, 2, 7, 1, 0],
]

ARPL_CIFAR10_KNOWN = [
    [0, 6, 4, 9, 1, 7],
    [7, 6, 4, 9, 0, 1],
    [1, 5, 7, 3, 9, 4],
    [8, 6, 1, 9, 0, 7],
    [2, 4, 1, 7, 9, 6],
]

ARPL_CIFAR_PLUS_KNOWN = [[4, 7, 9, 1], [6, 7, 1, 9], [9, 6, 1, 7], [6, 4, 9, 1], [1, 0, 9, 8]]

ARPL_CIFAR_PLUS_10_UNKNOWN = [
    [30, 25, 1, 9, 8, 0, 46, 52, 49, 71],
    [41, 9, 49, 40, 73, 60, 48, 30, 95, 71],
    [8, 9, 49, 40, 73, 60, 48, 95, 30, 71],
    [95, 60, 30, 73, 46, 49, 68, 99, 8, 71],
    [33, 2, 3, 97, 46, 21, 64, 63, 88, 43],
]

ARPL_TINY_IMAGENET_KNOWN = [
    [108, 147, 17, 58, 193, 123, 72, 144, 75, 167, 134, 14, 81, 171, 44, 197, 152, 66, 1, 133],
    [198, 161, 91, 59, 57, 134, 61, 184, 90, 35, 29, 23, 199, 38, 133, 19, 186, 18, 85, 67],
    [177, 0, 119, 26, 78, 80, 191, 46, 134, 92, 31, 152, 27, 60, 114, 50, 51, 133, 162, 93],
    [98, 36, 158, 177, 189, 157, 170, 191, 82, 196, 138, 166, 43, 13, 152, 11, 75, 174, 193, 190],
    [95, 6, 145, 153, 0, 143, 31, 23, 189, 81, 20, 21, 89, 26, 36, 170, 102, 177, 108, 169],
]


@dataclass(frozen=True)
class OSRSplit:
    """One open-set problem.

    Attributes:
        dataset: name of the data.
        protocol: ``neal``, ``arpl`` or the path of a file.
        index: number of the split in its protocol.
        known: sorted class indices; the network label of a class is its rank in this list.
        unknown: sorted class indices that occur in the test only (of CIFAR-100 for ``cifar+10`` and
            ``cifar+50``).
        provenance: where the lists come from.
    """

    dataset: str
    protocol: str
    index: int
    known: list[int]
    unknown: list[int]
    provenance: str


_NEAL = "Neal et al. 2018, class lists of the generator scripts of the released code"
_ARPL = "Chen et al. 2021 (ARPL), class lists of the released code"


def _rest(size: int, lists: list[list[int]]) -> list[list[int]]:
    return [[i for i in range(size) if i not in chosen] for chosen in lists]


_NEAL_TEN_KNOWN = _rest(10, NEAL_TEN_UNKNOWN)

# (protocol, dataset) -> known lists, unknown lists, provenance
_PUBLISHED: dict[tuple[str, str], tuple[list[list[int]], list[list[int]], str]] = {
    **{
        ("neal", dataset): (_NEAL_TEN_KNOWN, NEAL_TEN_UNKNOWN, _NEAL)
        for dataset in ("mnist", "svhn", "cifar10")
    },
    **{
        ("neal", dataset): (
            _NEAL_TEN_KNOWN,
            NEAL_TEN_UNKNOWN,
            f"not published for {dataset}; the lists for MNIST of: {_NEAL}",
        )
        for dataset in ("digits", "fashion_mnist")
    },
    ("neal", "cifar+10"): (
        [NEAL_CIFAR_PLUS_KNOWN] * 5,
        NEAL_CIFAR_PLUS_10_UNKNOWN,
        "Neal et al. 2018, published archive of the splits as transcribed alike by two later "
        "repositories (the generator script itself would draw one other, fixed set)",
    ),
    ("neal", "cifar+50"): (
        [NEAL_CIFAR_PLUS_KNOWN] * 5,
        [NEAL_CIFAR_PLUS_50_UNKNOWN] * 5,
        f"{_NEAL}; all five splits are the same",
    ),
    ("neal", "tiny_imagenet"): (
        NEAL_TINY_IMAGENET_KNOWN,
        _rest(200, NEAL_TINY_IMAGENET_KNOWN),
        "transcribed from one source only (the CAC repository, which says that they match "
        "Neal's); the original script is not reproducible, and a third repository lists other "
        "sets for the same protocol",
    ),
    ("arpl", "mnist"): (ARPL_MNIST_KNOWN, _rest(10, ARPL_MNIST_KNOWN), _ARPL),
    **{
        ("arpl", dataset): (
            ARPL_MNIST_KNOWN,
            _rest(10, ARPL_MNIST_KNOWN),
            f"not published for {dataset}; the lists for MNIST of: {_ARPL}",
        )
        for dataset in ("digits", "fashion_mnist")
    },
    ("arpl", "svhn"): (ARPL_SVHN_KNOWN, _rest(10, ARPL_SVHN_KNOWN), _ARPL),
    ("arpl", "cifar10"): (
        ARPL_CIFAR10_KNOWN,
        _rest(10, ARPL_CIFAR10_KNOWN),
        f"{_ARPL}; splits 0 and 1 are the same set, an inherited error that its authors "
        "acknowledge",
    ),
    ("arpl", "cifar+10"): (
        ARPL_CIFAR_PLUS_KNOWN,
        ARPL_CIFAR_PLUS_10_UNKNOWN,
        f"{_ARPL}; the known classes contain animals, most unknown ones are none",
    ),
    ("arpl", "tiny_imagenet"): (
        ARPL_TINY_IMAGENET_KNOWN,
        _rest(200, ARPL_TINY_IMAGENET_KNOWN),
        _ARPL,
    ),
}


def osr_split(
    dataset: str,
    index: int,
    protocol: str = "neal",
    class_names: Sequence[str] | None = None,
) -> OSRSplit:
    """The known and unknown classes of one split.

    Args:
        dataset: a name of :data:`DATASETS`.
        index: number of the split.
        protocol: ``neal``, ``arpl`` or the path of a YAML or JSON file.
        class_names: names of the classes of ``tiny_imagenet`` or ``image_folder``, which only the
            files tell; needed for a protocol file.

    Raises:
        ValueError: unknown dataset or protocol, a combination that was not published, a split that
            does not exist, or class lists that contradict each other or the dataset.
        FileNotFoundError: there is no such protocol file.
    """
    if protocol in PROTOCOLS:
        known_lists, unknown_lists, provenance = _published(dataset, protocol)
        _check_index(dataset, index, protocol, len(known_lists))
        known, unknown = known_lists[index], unknown_lists[index]
        return OSRSplit(dataset, protocol, index, sorted(known), sorted(unknown), provenance)

    entry = read_protocol_entry(dataset, index, protocol)
    known_source, unknown_source = MIXED_SOURCES.get(dataset, (dataset, dataset))
    known_names = class_names_of(known_source) or class_names
    unknown_names = class_names_of(unknown_source) or class_names
    if known_names is None or unknown_names is None:
        raise ValueError(f"a protocol file for {dataset} needs the class names of the data")
    where = f"{protocol}, split {index}"
    if len(entry["known"]) > len(known_names):
        raise ValueError(
            f"{where}: {len(entry['known'])} known classes, but {known_source} has only "
            f"{len(known_names)}"
        )
    known = [_class_index(c, known_names, f"{where}, known") for c in entry["known"]]
    if entry.get("unknown") is None:
        taken = set(known) if known_source == unknown_source else set()
        unknown = [i for i in range(len(unknown_names)) if i not in taken]
    else:
        unknown = [_class_index(c, unknown_names, f"{where}, unknown") for c in entry["unknown"]]
    for kind, classes, names in (
        ("known", known, known_names),
        ("unknown", unknown, unknown_names),
    ):
        twice = sorted({c for c in classes if classes.count(c) > 1})
        if twice:
            raise ValueError(f"{where}: {kind} lists {_listed(twice, names)} more than once")
        if not classes:
            raise ValueError(f"{where}: no {kind} class is left; every split needs at least one")
    both = sorted(set(known) & set(unknown)) if known_source == unknown_source else []
    if both:
        raise ValueError(
            f"{where}: {_listed(both, known_names)} cannot be both known and unknown; remove it "
            "from one list"
        )
    return OSRSplit(dataset, protocol, index, sorted(known), sorted(unknown), f"file {protocol}")


def num_splits(dataset: str, protocol: str = "neal") -> int:
    """How many splits a protocol has for a dataset.

    Raises:
        ValueError: the combination does not exist.
        FileNotFoundError: there is no such protocol file.
    """
    if protocol in PROTOCOLS:
        return len(_published(dataset, protocol)[0])
    return len(_read_protocol(dataset, protocol))


def duplicate_splits(
    dataset: str, protocol: str = "neal", class_names: Sequence[str] | None = None
) -> list[tuple[int, int]]:
    """Pairs of splits with the same known classes: their runs are not independent of each other.

    Args:
        dataset: as for :func:`osr_split`.
        protocol: as for :func:`osr_split`.
        class_names: as for :func:`osr_split`.
    """
    splits = [
        osr_split(dataset, index, protocol, class_names)
        for index in range(num_splits(dataset, protocol))
    ]
    return [(a.index, b.index) for a, b in combinations(splits, 2) if a.known == b.known]


def read_protocol_entry(dataset: str, index: int, path: str) -> dict[str, Any]:
    """Reads one split of a protocol file; its classes may still be names.

    Raises:
        ValueError: ``path`` is neither a protocol nor a file, the file is no protocol, or the split
            does not exist.
        FileNotFoundError: there is no such file.
    """
    splits = _read_protocol(dataset, path)
    _check_index(dataset, index, path, len(splits))
    entry = splits[index]
    lists = [entry.get("known"), entry.get("unknown") or []] if isinstance(entry, dict) else [None]
    if not all(
        isinstance(classes, list) and all(type(c) in (int, str) for c in classes)
        for classes in lists
    ):
        raise ValueError(
            f"{path}, split {index}: expected {{known: [...], unknown: [...]}} with class names or "
            f"indices, got {entry!r}"
        )
    return entry


def _published(dataset: str, protocol: str) -> tuple[list[list[int]], list[list[int]], str]:
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    if (protocol, dataset) not in _PUBLISHED:
        published = [name for kind, name in _PUBLISHED if kind == protocol]
        raise ValueError(
            f"protocol {protocol!r} has no class lists for {dataset} (only for "
            f"{', '.join(published)}); give a file with your own by --data.protocol FILE"
        )
    return _PUBLISHED[protocol, dataset]


def _read_protocol(dataset: str, path: str) -> list[Any]:
    if dataset not in DATASETS:
        raise unknown_name("dataset", dataset, DATASETS)
    file = Path(path).expanduser()
    if not file.is_file():
        if file.suffix.lower() in (".yaml", ".yml", ".json"):
            raise FileNotFoundError(
                f"protocol file {path} does not exist; expected {{splits: [{{known: [...], "
                "unknown: [...]}]}"
            )
        raise ValueError(
            f"unknown protocol {path!r}: choose {' or '.join(PROTOCOLS)}, or give the path of a "
            "YAML or JSON file"
        )
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"protocol file {path} is neither YAML nor JSON: {error}") from error
    splits = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(splits, list) or not splits:
        raise ValueError(
            f"protocol file {path} must be {{splits: [{{known: [...], unknown: [...]}}]}} with at "
            "least one split"
        )
    return splits


def _check_index(dataset: str, index: int, protocol: str, count: int) -> None:
    if not 0 <= index < count:
        exists = f"splits 0 to {count - 1}" if count > 1 else "split 0 only"
        raise ValueError(
            f"split {index} does not exist: {dataset} with protocol {protocol!r} has {exists}; "
            "choose with --data.split"
        )


def _class_index(given: int | str, names: Sequence[str], where: str) -> int:
    if isinstance(given, int):
        if not 0 <= given < len(names):
            raise ValueError(
                f"{where}: class {given} does not exist; indices go to {len(names) - 1}"
            )
        return given
    if given not in names:
        raise ValueError(f"{where}: {unknown_name('class', given, names)}")
    return names.index(given)


def _listed(classes: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(f"{c} ({names[c]})" if names[c] != str(c) else names[c] for c in classes)
