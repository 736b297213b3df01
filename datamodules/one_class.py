"""One-class data: training on normal images, testing on normal ones and outliers."""

from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.base import AdversariaDataModule
from datamodules.datasets import (
    ImageArrayDataset,
    read_pictures_to_predict,
)
from datamodules.ped2 import list_clips, read_patches
from datamodules.sources import (
    WITHOUT_TEST_HALF,
    OpenSource,
    class_names_of,
    draw_per_class,
    open_source,
    open_whole_source,
    prepare_source,
    unknown_name,
)
from lightning_modules.arguments import demand_at_least
from lightning_modules.randomness import mix

CLASS_NAMES = ["normal", "outlier"]
PATCH_SIZE = 45
MOTION_THRESHOLD = 5.0


class OneClassDataModule(AdversariaDataModule):
    """Some classes of an image set are normal; whatever else it has are outliers.

    - Training: training images of the normal classes, without a held-out part.
    - Validation: that held-out part; thresholds may be chosen on it.
    - Test: test images, ``label`` 0 if normal and 1 for outliers. Normal images come first.

    No outlier is in any part but the test. Nothing here depends on the run's seed. With ``ped2``
    the images are moving patches of a video (:mod:`datamodules.ped2`), the held-out part is whole
    training clips, and batches have ``group`` (int64 [B]): the number of the frame.

    Protocols: the released demo of OGNet is ``normal: ["0"], outliers_per_class: 100`` of MNIST. For
    Caltech-256, as recalled from the papers (not verified): ``normal_count`` 1, 3 or 5,
    ``outlier_classes: [clutter]``, ``outlier_proportion: 0.5``, ``train_limit: 150``, and
    ``holdout_inliers: false`` to compare with published numbers.

    Args:
        dataset: ``digits``, ``mnist``, ``fashion_mnist``, ``cifar10``, ``caltech256``, ``ped2``,
            ``image_folder`` or another name of :mod:`datamodules.sources`.
        root: folder of the data; :mod:`datamodules.sources` and :mod:`datamodules.ped2` say what it
            holds. ``digits`` needs none.
        normal: names of the normal classes; null: ``normal_count`` of them are drawn.
        normal_count: how many classes to draw, from all but ``outlier_classes``.
        split: number of that draw.
        image_size: side of the images in pixels.
        batch_size: training batch over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction.
        num_workers: loader processes.
        val_fraction: fraction of each normal class (of the clips of ``ped2``) held out for validation.
        outlier_proportion: share of outliers in the test set; they are spread evenly over the
            classes as far as these have enough.
        outliers_per_class: so many outliers of each class. null for both: all of them.
        outlier_classes: only these classes are outliers; null: all that are not normal.
        holdout_inliers: false: the normal test images are the very ones trained on, and outliers
            come from the whole set, as in the work before OGNet on Caltech-256. Only for sets
            without a test half of their own (``caltech256``, ``digits``), where true tests on 30 %
            of each class.
        train_limit: use at most so many training images per normal class (of ``ped2``: patches).
        test_limit: use at most so many test images per class, before outliers are chosen.
        patch_size: side of a patch of ``ped2`` in its frame.
        motion_threshold: of ``ped2``: a patch is kept if it changes by more grey levels per pixel.
        download: fetch what is missing into ``root``.
        predict_folder: ``predict`` runs on the pictures below this folder; null: on the test
            images.

    Attributes:
        class_names: ``normal``, ``outlier``.
        normal: the normal classes; where they are drawn from names that only the files tell, None
            until ``setup``. Always None for ``ped2``.
        train: images to train on, after ``setup``; also ``val`` and ``test``. Their ``class_ids``
            are the original classes.
        frame_labels: int64 [number of test frames] of ``ped2``, 1 where anomalous; else None.

    Raises:
        ValueError: arguments that cannot be met, or contradict the data or each other.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data.
    """

    def __init__(
        self,
        dataset: str = "digits",
        root: str = "data",
        normal: list[str | int] | None = ["0"],  # noqa: B006 (never changed; jsonargparse shows it)
        normal_count: int | None = None,
        split: int = 0,
        image_size: int = 45,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        outlier_proportion: float | None = None,
        outliers_per_class: int | None = None,
        outlier_classes: list[str | int] | None = None,
        holdout_inliers: bool = True,
        train_limit: int | None = None,
        test_limit: int | None = None,
        patch_size: int = PATCH_SIZE,
        motion_threshold: float = MOTION_THRESHOLD,
        download: bool = False,
        predict_folder: str | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers)
        demand_at_least(
            1,
            normal_count=normal_count,
            image_size=image_size,
            outliers_per_class=outliers_per_class,
            train_limit=train_limit,
            test_limit=test_limit,
            patch_size=patch_size,
        )
        for name, share in (
            ("val_fraction", val_fraction),
            ("outlier_proportion", outlier_proportion),
        ):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name}={share} is a fraction between 0 and 1; use e.g. 0.1")
        if not 0 <= motion_threshold < 255:
            raise ValueError(f"motion_threshold={motion_threshold} must be in [0, 255)")
        self.save_hyperparameters()
        self.dataset = dataset
        self.root = root
        self.normal_count = normal_count
        self.split = split
        self.image_size = image_size
        self.val_fraction = val_fraction
        self.outlier_proportion = outlier_proportion
        self.outliers_per_class = outliers_per_class
        self.outlier_classes = (
            None if outlier_classes is None else [str(n) for n in outlier_classes]
        )
        self.holdout_inliers = holdout_inliers
        self.train_limit = train_limit
        self.test_limit = test_limit
        self.patch_size = patch_size
        self.motion_threshold = motion_threshold
        self.download = download
        self.predict_folder = predict_folder
        self.class_names = list(CLASS_NAMES)
        self.normal: list[str] | None = None
        self.train: ImageArrayDataset | None = None
        self.val: ImageArrayDataset | None = None
        self.test: ImageArrayDataset | None = None
        self.pictures: ImageArrayDataset | None = None
        self.frame_labels: Tensor | None = None
        # A digit in YAML is a number unless it is quoted.
        self._wanted = None if normal is None else [str(name) for name in normal]
        self._counts: dict[str, int] = {}
        if dataset == "ped2":
            self._demand_defaults(
                {
                    "normal": (normal, (None, ["0"])),
                    "holdout_inliers": (holdout_inliers, (True,)),
                    # Patches taken out of a frame would change the score of the frame.
                    "test_limit": (test_limit, (None,)),
                    "download": (download, (False,)),
                    **{name: (value, (None, 0)) for name, value in self._protocol().items()},
                }
            )
            return
        self._demand_defaults(
            {
                "patch_size": (patch_size, (PATCH_SIZE,)),
                "motion_threshold": (motion_threshold, (MOTION_THRESHOLD,)),
            }
        )
        if outlier_proportion is not None and outliers_per_class is not None:
            raise ValueError(
                f"outlier_proportion={outlier_proportion} and outliers_per_class="
                f"{outliers_per_class} both say how many outliers to test on; set one to null"
            )
        if (normal is None) == (normal_count is None):
            raise ValueError(
                f"normal={normal} and normal_count={normal_count}: give the names of the normal "
                "classes, or set --data.normal null and --data.normal_count to how many to draw"
            )
        if split and normal is not None:
            raise ValueError(
                f"split={split} is the number of a draw of normal classes, but they are given as "
                f"{normal}; use --data.normal null --data.normal_count N"
            )
        names = class_names_of(dataset)  # refuses an unknown dataset
        if not holdout_inliers and dataset not in WITHOUT_TEST_HALF:
            raise ValueError(
                f"holdout_inliers=False is for sets without a test half of their own "
                f"({', '.join(WITHOUT_TEST_HALF)}), but {dataset} has one; use "
                "--data.holdout_inliers true"
            )
        if not holdout_inliers:
            rank_zero_warn(
                f"holdout_inliers=False: {dataset} is tested on the very inliers that are trained "
                "on; compare such results only with those of the same protocol"
            )
        if names is not None:
            self._choose_classes(names)
        elif normal is not None:
            self.normal = self._wanted

    @property
    def split_info(self) -> dict[str, Any]:
        """What was evaluated, in plain values for results and checkpoints."""
        if self.dataset == "ped2":
            of_set: dict[str, Any] = {
                "patch_size": self.patch_size,
                "motion_threshold": self.motion_threshold,
            }
        else:
            of_set = {"normal": self.normal, **self._protocol(), "test_limit": self.test_limit}
        return {
            "dataset": self.dataset,
            **of_set,
            "val_fraction": self.val_fraction,
            "holdout_inliers": self.holdout_inliers,
            "train_limit": self.train_limit,
            "counts": dict(self._counts),
        }

    def check_files(self, stage: TrainerFn | None) -> None:
        """Downloads if asked to, and makes sure that all files are there before anything starts."""
        for train in (True, False):
            unused = (TrainerFn.TESTING, TrainerFn.PREDICTING) if train else (TrainerFn.VALIDATING,)
            if stage in unused and self.holdout_inliers:
                continue
            if self.dataset == "ped2":
                list_clips(self.root, train)
            else:
                prepare_source(self.dataset, self.root, train, self.download)

    def open_folder(self, folder: str) -> Any:
        """The pictures of a folder, squeezed to the size of the images."""
        return read_pictures_to_predict(folder, self.image_size, self.class_names)

    def open_parts(self, stage: str | None) -> None:
        """Reads what the stage needs; what was read before is kept."""
        ped2 = self.dataset == "ped2"
        if stage in ("fit", "validate", None) and self.train is None:
            self._read_training_clips() if ped2 else self._read_training_half()
        if stage in ("test", "predict", None) and self.test is None:
            self._read_test_clips() if ped2 else self._read_test_half()

    def state_dict(self) -> dict[str, Any]:
        """What was trained on, for the checkpoint."""
        return {
            "dataset": self.dataset,
            "normal": self.normal,
            "holdout_inliers": self.holdout_inliers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint that was trained on other normal images.

        Raises:
            ValueError: other data or normal classes, or inliers held out in one case only.
        """
        if not state_dict or self.predicts_folder:
            return
        if state_dict != self.state_dict():
            then, now = (
                f"{state['dataset']}, normal classes {state['normal']}, holdout_inliers="
                f"{state['holdout_inliers']}"
                for state in (state_dict, self.state_dict())
            )
            raise ValueError(
                f"the checkpoint was trained on {then}, but the data are {now}; set --data.dataset, "
                "--data.normal (or normal_count and split) and --data.holdout_inliers to the "
                "checkpoint's"
            )

    def _protocol(self) -> dict[str, Any]:
        return {
            "normal_count": self.normal_count,
            "split": self.split,
            "outlier_proportion": self.outlier_proportion,
            "outliers_per_class": self.outliers_per_class,
            "outlier_classes": self.outlier_classes,
        }

    def _demand_defaults(self, given: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
        """Raises ValueError for an argument that has no meaning with this dataset."""
        for name, (value, defaults) in given.items():
            if value not in defaults:
                raise ValueError(
                    f"{name}={value} does not apply to {self.dataset}; leave out --data.{name}"
                )

    def _choose_classes(self, names: list[str]) -> None:
        """Resolves the normal classes and checks both lists against the classes that there are."""
        outliers = self.outlier_classes or []
        for option, wanted in (
            ("normal", self._wanted),
            ("outlier_classes", self.outlier_classes),
        ):
            for name in wanted or []:
                if name not in names:
                    raise unknown_name(f"class in --data.{option} of {self.dataset}", name, names)
            if wanted is not None and (not wanted or len(set(wanted)) < len(wanted)):
                raise ValueError(f"{option}={wanted} must name at least one class, each once")
        if self._wanted is not None:
            self.normal = sorted(self._wanted, key=names.index)
        else:
            count = self.normal_count
            assert count is not None
            choices = [name for name in names if name not in outliers]
            if count > len(choices):
                raise ValueError(
                    f"normal_count={count} exceeds the {len(choices)} classes of {self.dataset} "
                    "that may be normal; use a smaller --data.normal_count"
                )
            seed = mix("normal classes", self.dataset, self.split)
            order = torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed))
            self.normal = [choices[i] for i in sorted(order[:count].tolist())]
        both = [name for name in self.normal if name in outliers]
        if both:
            raise ValueError(
                f"class {', '.join(both)} cannot be normal and an outlier; remove it from "
                "--data.normal or --data.outlier_classes"
            )
        if len(self.normal) == len(names):
            raise ValueError(
                f"all {len(names)} classes of {self.dataset} are normal, so none is left for "
                "outliers; leave some out of --data.normal"
            )

    def _open(self, train: bool) -> OpenSource:
        if self.holdout_inliers:
            source = open_source(self.dataset, self.root, train)
        else:
            source = open_whole_source(self.dataset, self.root)
        self._choose_classes(source.class_names)
        return source

    def _members(self, source: OpenSource, names: list[str]) -> Tensor:
        classes = torch.tensor([source.class_names.index(name) for name in names])
        return torch.isin(source.labels, classes).nonzero().flatten()

    def _normal_members(self, source: OpenSource) -> Tensor:
        assert self.normal is not None
        return self._members(source, self.normal)

    def _training_positions(self, source: OpenSource) -> tuple[Tensor, Tensor]:
        """Which images to train on, and which are held out."""
        normal = self._normal_members(source)
        rest, drawn = draw_per_class(
            source.labels[normal], self.val_fraction, f"{self.dataset} one-class holdout"
        )
        train, val = normal[rest], normal[drawn]
        if self.train_limit is not None:
            purpose = f"{self.dataset} one-class train limit"
            train = train[draw_per_class(source.labels[train], self.train_limit, purpose)[1]]
        self._demand_every_class(source, train, "training")
        return train, val

    def _read_training_half(self) -> None:
        source = self._open(train=True)
        train, val = self._training_positions(source)
        # Together, so that one error names every damaged file.
        images = source.read(torch.cat([train, val]), self.image_size)
        parts = images.split([len(train), len(val)])
        self.train, self.val = (
            ImageArrayDataset(
                part, torch.zeros(len(part)).long(), self.class_names, source.labels[chosen]
            )
            for part, chosen in zip(parts, (train, val), strict=True)
        )
        self._counts |= {"train": len(train), "val": len(val)}

    def _read_test_half(self) -> None:
        source = self._open(train=False)
        normal = (
            self._normal_members(source)
            if self.holdout_inliers
            else self._training_positions(source)[0]
        )
        normal = self._limited(source, normal)
        self._demand_every_class(source, normal, "test")
        outliers = self._outliers(source, len(normal))
        chosen = torch.cat([normal, outliers])
        labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(outliers))]).long()
        self.test = ImageArrayDataset(
            source.read(chosen, self.image_size), labels, self.class_names, source.labels[chosen]
        )
        self._counts |= {"test_normal": len(normal), "test_outlier": len(outliers)}

    def _limited(self, source: OpenSource, positions: Tensor) -> Tensor:
        if self.test_limit is None:
            return positions
        labels = source.labels[positions]
        return positions[draw_per_class(labels, self.test_limit, "one-class test limit")[1]]

    def _outliers(self, source: OpenSource, normal_count: int) -> Tensor:
        """Positions of the outliers to test on, ascending."""
        assert self.normal is not None
        names = self.outlier_classes
        if names is None:
            names = [name for name in source.class_names if name not in self.normal]
        positions = self._limited(source, self._members(source, names))
        labels = source.labels[positions]
        classes, there = (found.tolist() for found in labels.unique(return_counts=True))
        if not classes:
            raise ValueError(
                f"{self.root} has no test image of the outlier classes {', '.join(names[:5])} of "
                f"{self.dataset}; one-class scores need some"
            )
        per_class, proportion = self.outliers_per_class, self.outlier_proportion
        if proportion is not None:
            total = max(1, round(normal_count * proportion / (1 - proportion)))
            option, enough = f"outlier_proportion={proportion}", total <= sum(there)
            wanted = f"{total} outliers to {normal_count} normal images"
            amounts = _spread(total, there)
        elif per_class is not None:
            option, enough = f"outliers_per_class={per_class}", per_class <= min(there)
            wanted = f"{per_class} outliers of each class"
            amounts = [per_class] * len(classes)
        else:
            return positions
        if not enough:
            listed = [
                f"{n} of {source.class_names[c]}" for c, n in zip(classes, there, strict=True)
            ]
            listed = listed[:10] + ["..."] * (len(listed) > 10)
            raise ValueError(
                f"{option} takes {wanted}, but {self.dataset} has {sum(there)} to test on "
                f"({', '.join(listed)}); use a smaller --data.{option.partition('=')[0]}"
            )
        drawn = [
            members[draw_per_class(source.labels[members], amount, "outliers")[1]]
            for members, amount in zip(
                (positions[labels == label] for label in classes), amounts, strict=True
            )
        ]
        return torch.cat(drawn).sort().values

    def _demand_every_class(self, source: OpenSource, chosen: Tensor, half: str) -> None:
        assert self.normal is not None
        found = {source.class_names[label] for label in source.labels[chosen].unique().tolist()}
        empty = [name for name in self.normal if name not in found]
        if empty:
            raise ValueError(
                f"no {half} images are left for the normal class {', '.join(empty[:5])} of "
                f"{self.dataset} in {self.root}; every normal class needs some"
            )

    def _read_clips(self, train: bool, chosen: Tensor | None) -> tuple[ImageArrayDataset, Tensor]:
        clips = list_clips(self.root, train)
        if chosen is not None:
            clips = [clips[i] for i in chosen.tolist()]
        return read_patches(clips, self.image_size, self.patch_size, self.motion_threshold)

    def _read_training_clips(self) -> None:
        # Whole clips, since the same people walk through all frames of one.
        clips = torch.zeros(len(list_clips(self.root, train=True)))
        rest, drawn = draw_per_class(clips, self.val_fraction, "ped2 one-class holdout")
        if not len(rest):
            raise ValueError(
                f"val_fraction={self.val_fraction} leaves none of the {len(clips)} training clips in "
                f"{self.root} to train on; use more clips or a smaller --data.val_fraction"
            )
        train, self.val = (self._read_clips(True, chosen)[0] for chosen in (rest, drawn))
        if self.train_limit is not None:
            purpose = "ped2 one-class train limit"
            train = train.subset(draw_per_class(train.labels, self.train_limit, purpose)[1])
        self.train = train
        self._counts |= {"train": len(self.train), "val": len(self.val)}

    def _read_test_clips(self) -> None:
        test, frame_labels = self._read_clips(False, None)
        normal, outliers = torch.bincount(test.labels, minlength=2).tolist()
        if not normal or not outliers:
            raise ValueError(
                f"of the moving patches of the test clips in {self.root}, {normal} are normal and "
                f"{outliers} anomalous; the test needs both, so give more clips or another "
                "--data.motion_threshold"
            )
        self.test, self.frame_labels = test, frame_labels
        self._counts |= {
            "test_normal": normal,
            "test_outlier": outliers,
            "test_frames": len(frame_labels),
            "test_anomalous_frames": int(frame_labels.sum()),
        }


def _spread(total: int, there: list[int]) -> list[int]:
    """How many to take of each, evenly as far as there are as many; sums to ``total`` if it can."""
    amounts = [0] * len(there)
    left = total
    # The smallest first: what it lacks is shared by the others.
    order = sorted(range(len(there)), key=there.__getitem__)
    for rank, place in enumerate(order):
        amounts[place] = min(there[place], left // (len(there) - rank))
        left -= amounts[place]
    return amounts
