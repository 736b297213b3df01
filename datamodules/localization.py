"""Weakly supervised localization: image-level labels to train on, boxes to validate and test on."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from datamodules.boxes import Framing, framed_boxes
from datamodules.datasets import (
    BatchDataset,
    ImageArrayDataset,
    PictureFileDataset,
    pictures_to_predict,
)
from datamodules.drawn_or_files import DrawnOrFilesDataModule
from datamodules.localization_sources import Birds, ClassFolders, ImageNet, PictureSource
from datamodules.pictures import picture_sizes
from datamodules.shapes import FIRST_SCENE, Scenes
from datamodules.shapes_options import SceneOptions, scenes_and_side
from datamodules.sources import unknown_name

IMAGE_SIZE = 224
RESIZE = 256
DATASETS = ("shapes", "image_folder", "cub200", "imagenet")
CREATURES = SceneOptions(mode="parts")


class LocalizationDataModule(DrawnOrFilesDataModule):
    """Images with labels for training; with labels and boxes for validation and test.

    The threshold that turns a map into a box is chosen on validation boxes, so these are never
    test boxes, unless an ``image_folder`` has no ``test`` folder.

    A batch has ``image`` [B, 3, S, S] in [0, 1] (no normalisation: that is the module's business),
    ``label`` and ``index`` int64 [B], and ``path`` where there are files. Batches of validation and
    test also have ``boxes`` int64 [B, M, 4]: x0, y0, x1, y1 in pixels of that image, M the same in
    the whole set, rows that are no box -1. Boxes of files are scaled and truncated to whole pixels;
    those of ``shapes`` are the first and the last column and row of the object. An image without a
    box has only rows of -1 and plays no part in localization metrics; a set without any has no
    ``boxes``. Those of ``shapes`` have ``mask`` uint8 [B, S, S] as well. Pictures of
    ``predict_folder`` have label -1 and, unless ``eval_crop`` cuts them, ``original_size`` int64
    [B, 2], height and width of the file, by which boxes can be scaled back.

    Training pictures are resized to ``resize``, then cut at random places and mirrored, which is
    done on the device as a function of (seed, epoch, batch) alone.

    Args:
        dataset: ``shapes`` (drawn, nothing to provide), ``image_folder``, ``cub200`` or
            ``imagenet``; :mod:`datamodules.localization_sources` says which files these are.
        root: folder of the files.
        boxes: of ``image_folder``: a file of lines ``PICTURE,x0,y0,x1,y1`` in pixels of the files;
            without it there is classification alone.
        image_size: side of the images of files; null for 224. Scenes have ``shapes.image_size``.
        resize: side to which training pictures are squeezed before the cut; ``image_size`` for no
            cut.
        keep_aspect: resize the short side to ``resize`` instead, as the authors' code does.
        eval_crop: images to evaluate are cut out of the middle of the resized picture. Default:
            the whole picture is squeezed to ``image_size``, as in wsolevaluation.
        horizontal_flip: mirror training images with probability 1/2; null: all but ``shapes``,
            where the direction of stripes tells the class.
        batch_size: training batch over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction.
        num_workers: loader processes; use some where pictures are decoded batch by batch.
        cache_limit: a part that takes at most so many GiB stays decoded in memory (of every
            process); a larger one is decoded batch by batch.
        shapes: what scenes show; by default creatures with a telling head and a striped body.
        shapes_train: number of scenes to train on.
        shapes_val: number of scenes to validate on.
        shapes_test: number of scenes to test on.
        shapes_seed: of the scenes; the run's seed plays no part.
        predict_folder: ``predict`` runs on the pictures below this folder; null: on the test
            images.

    Attributes:
        class_names: name of each label; empty until it is known, for files in ``setup``. When a
            folder is predicted, the checkpoint's.
        train: the set to train on, after ``setup``; also ``val`` and ``test``.
        shapes: what scenes show.

    Raises:
        ValueError: arguments that cannot be met or contradict the data.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        root: str = "data",
        boxes: str | None = None,
        image_size: int | None = None,
        resize: int = RESIZE,
        keep_aspect: bool = False,
        eval_crop: bool = False,
        horizontal_flip: bool | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        cache_limit: float = 2.0,
        shapes: SceneOptions = CREATURES,
        shapes_train: int = 1500,
        shapes_val: int = 300,
        shapes_test: int = 600,
        shapes_seed: int = 0,
        predict_folder: str | None = None,
    ) -> None:
        if dataset not in DATASETS:
            raise unknown_name("dataset", dataset, DATASETS)
        drawn = dataset == "shapes"
        given: dict[str, tuple[Any, Any]] = {
            "boxes": (boxes, None),
            "resize": (resize, RESIZE),
            "keep_aspect": (keep_aspect, False),
            "eval_crop": (eval_crop, False),
        }
        for name, (value, default) in given.items():
            if value != default and (drawn or (name == "boxes" and dataset != "image_folder")):
                raise ValueError(
                    f"{name}={value} does not apply to {dataset}; leave out --data.{name}"
                )
        shapes, side = scenes_and_side(drawn, shapes, image_size, IMAGE_SIZE)
        if not drawn and resize < side:
            raise ValueError(
                f"resize={resize} is smaller than the image_size={side} that is cut out of it; use "
                f"--data.resize {side} or more"
            )
        super().__init__(
            dataset,
            root,
            side,
            cache_limit,
            shapes,
            {"train": shapes_train, "val": shapes_val, "test": shapes_test},
            shapes_seed,
            predict_folder,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            horizontal_flip=not drawn if horizontal_flip is None else horizontal_flip,
            random_crop=side if not drawn and (keep_aspect or resize > side) else None,
        )
        # As a dict, since a checkpoint with an object of ours would not load with weights_only.
        self.save_hyperparameters(ignore=["shapes"])
        self.save_hyperparameters({"shapes": asdict(shapes)})
        self.boxes = boxes
        self.resize = resize
        self.keep_aspect = keep_aspect
        self.eval_crop = eval_crop
        self.class_names = list(shapes.values(shapes.label)) if drawn else []
        if drawn:
            self._demand_two_classes()
        self._counts: dict[str, int] = {}
        self._origins: dict[str, str] = {}

    @property
    def split_info(self) -> dict[str, Any]:
        """What was evaluated, in plain values for results and checkpoints."""
        of_set: dict[str, Any] = {
            "resize": self.resize,
            "keep_aspect": self.keep_aspect,
            "eval_crop": self.eval_crop,
        }
        if self.dataset == "shapes":
            of_set = {"shapes": self.shapes.plain(), "shapes_seed": self.shapes_seed}
        return {
            "dataset": self.dataset,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            **of_set,
            "parts": dict(self._origins),
            "counts": dict(self._counts),
        }

    def _source(self) -> PictureSource:
        if self.dataset == "image_folder":
            return ClassFolders(None if self.boxes is None else Path(self.boxes).expanduser())
        return Birds() if self.dataset == "cub200" else ImageNet()

    def check_part(self, part: str) -> None:
        """Looks for the files of a part."""
        self._source().check(Path(self.root).expanduser(), part)

    def draw_part(self, part: str) -> BatchDataset:
        """The scenes of a part, kept in memory if they fit."""
        scenes = LocalizedScenes(
            self.shapes,
            self.shapes_seed,
            self._scenes[part],
            FIRST_SCENE[part],
            ground_truth=part != "train",
        )
        self._counts[part] = len(scenes)
        if part != "train":
            self._counts[f"{part}_with_boxes"] = len(scenes)
        self._origins[part] = f"scenes from {FIRST_SCENE[part]}"
        if not self.fits(len(scenes), self.image_size):
            return scenes
        pieces = [scenes.__getitems__(piece) for piece in scenes.pieces()]
        truth = {
            name: torch.cat([piece[name] for piece in pieces]) if name in pieces[0] else None
            for name in ("boxes", "mask")
        }
        return ImageArrayDataset(
            torch.cat([piece["image"] for piece in pieces]),
            torch.cat([piece["label"] for piece in pieces]),
            self.class_names,
            boxes=truth["boxes"],
            masks=truth["mask"],
        )

    def open_part(self, part: str) -> BatchDataset:
        """The pictures of a part, kept in memory if they fit."""
        root, source = Path(self.root).expanduser(), self._source()
        source.check(root, part)
        self.class_names = source.class_names(root)
        self._demand_two_classes()
        found = source.open(root, part)
        self._origins[part] = found.origin
        self._counts[part] = len(found.paths)
        framing = self._eval_framing
        if part == "train":
            framing = Framing(self.resize, self.keep_aspect)
        boxes = None
        if found.boxes is not None and found.sizes is not None:
            boxes = self._framed(part, found.paths, found.boxes, found.sizes)
        if part == "test" and isinstance(source, ClassFolders) and source.test_is_validation(root):
            rank_zero_warn(
                f"{root / 'test'} is missing, so the validation pictures are tested on too: a "
                "threshold that is chosen there is not tested on others"
            )
        various = self.keep_aspect and part == "train"
        dataset = PictureFileDataset(
            found.paths,
            None if various else framing.crop or framing.resize,
            found.labels,
            boxes,
            decode=framing.decode,
        )
        # Twice the short side is a guess that holds for nearly every photograph.
        if self.fits(len(dataset) * (2 if various else 1), framing.crop or framing.resize):
            dataset.keep(f"{self.dataset} {part}")
        return dataset

    def _framed(
        self,
        part: str,
        paths: Sequence[str],
        boxes: list[list[tuple[int, int, int, int]]],
        sizes: list[tuple[int, int]],
    ) -> Tensor | None:
        without = [path for path, of_picture in zip(paths, boxes, strict=True) if not of_picture]
        self._counts[f"{part}_with_boxes"] = len(paths) - len(without)
        if without:
            rank_zero_warn(
                f"{len(without)} of {len(paths)} {part} pictures have no box, e.g. {without[0]}; "
                "they are left out of localization metrics"
            )
        return (
            None if len(without) == len(paths) else framed_boxes(boxes, sizes, self._eval_framing)
        )

    def open_folder(self, folder: str) -> PictureFileDataset:
        """The pictures of a folder, framed as images to evaluate."""
        files, framing = pictures_to_predict(folder), self._eval_framing
        sizes = picture_sizes(files, folder, "checking pictures")
        return PictureFileDataset(
            files,
            self.image_size,
            torch.full((len(files),), -1),
            original_sizes=None if self.eval_crop else torch.tensor(sizes),
            decode=framing.decode,
        )

    @property
    def _eval_framing(self) -> Framing:
        if self.eval_crop:
            return Framing(self.resize, self.keep_aspect, self.image_size)
        return Framing(self.image_size)

    def _demand_two_classes(self) -> None:
        if len(self.class_names) < 2:
            raise ValueError(
                f"{self.dataset} has the class{'es' * (not self.class_names)} "
                f"{self.class_names}, but a classifier needs at least two"
            )


class LocalizedScenes(Scenes):
    """Scenes whose ground truth are the boxes and pixels of those objects that are of the scene's class."""

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The batch of these scenes: ``image`` uint8 [B, 3, S, S], ``label`` and ``index`` [B].

        With ground truth also ``boxes`` int64 [B, M, 4]; rows that are no box are -1 and last; and ``mask`` uint8
        [B, S, S], 1 where such an object is visible.
        """
        batch = super().__getitems__(indices)
        if not self.ground_truth:
            return batch
        others = batch["object_labels"] != batch["label"][:, None]
        mask = (batch["object_masks"] & ~others[..., None, None]).any(1).byte()
        boxes = batch["boxes"].masked_fill(others[..., None], -1)
        order = (boxes[..., 0] < 0).int().argsort(dim=1, stable=True)
        boxes = boxes.gather(1, order[..., None].expand_as(boxes))
        kept = {name: batch[name] for name in ("image", "label", "index")}
        return {**kept, "boxes": boxes, "mask": mask}
