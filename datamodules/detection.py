"""Object detection: drawn scenes and PASCAL VOC, with a box and a class for every object."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor
from torchvision.datasets import VOCDetection

from datamodules.datasets import BatchDataset, PictureFileDataset, pictures_to_predict
from datamodules.drawn_or_files import DrawnOrFilesDataModule
from datamodules.pictures import picture_sizes, visit_files
from datamodules.shapes import FIRST_SCENE, Scenes
from datamodules.shapes_options import SceneOptions, scenes_and_side
from datamodules.sources import unknown_name

DATASETS = ("shapes", "voc2012")
SEVERAL = SceneOptions(max_objects=3)
IMAGE_SIZE = 320

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
# Of the training pictures of VOC, so many are one for validation.
VOC_VALIDATION = 10


class DetectionDataModule(DrawnOrFilesDataModule):
    """Images with a box and a class for every object.

    A batch has ``image`` [B, 3, S, S] in [0, 1] (no normalisation: that is the module's business), ``boxes`` [B, M, 4],
    x0, y0, x1, y1 in pixels of that image, the last column and row included, ``object_labels`` int64 [B, M], and
    ``index`` int64 [B]; M is the same in the whole set. Rows that are no object have label -1, those without a box -1
    in ``boxes``. Scenes have int64 boxes of what is visible. Pictures of files have float32 boxes, since squeezing
    moves their edges between pixels, ``path``, and ``difficult`` bool [B, M], objects that an evaluation leaves out.
    Pictures of ``predict_folder`` have no objects but ``original_size`` int64 [B, 2], height and width of the file.

    Args:
        dataset: ``shapes`` (drawn, nothing to provide) or ``voc2012``: trained on VOC's ``train`` without every tenth
            picture, validated on these, tested on ``val``.
        root: folder of the files, with ``VOCdevkit/VOC2012`` in it.
        image_size: side to which pictures of files are squeezed; null for 320. Scenes have ``shapes.image_size``.
        horizontal_flip: mirror training images and boxes with probability 1/2; null: files only.
        batch_size: training batch over all processes together.
        eval_batch_size: batch of one process in validation, test and prediction.
        num_workers: loader processes; use some where pictures are decoded batch by batch.
        training_images: read more than the test set; without them there is no training set and no validation, and a
            module that trains must need no image.
        cache_limit: a part that takes at most so many GiB stays drawn or decoded in memory (of every process).
        shapes: what scenes show; by default up to three objects. Those whose class is ``shapes.label`` are found.
        shapes_train: number of scenes to train on.
        shapes_val: number of scenes to validate on.
        shapes_test: number of scenes to test on.
        shapes_seed: of the scenes; the run's seed plays no part.
        predict_folder: ``predict`` runs on the pictures below this folder; null: on the test images.

    Attributes:
        class_names: name of each label.
        train: the set to train on, after ``setup``; also ``val`` and ``test``.

    Raises:
        ValueError: arguments that cannot be met or contradict the data.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        root: str = "data",
        image_size: int | None = None,
        horizontal_flip: bool | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        training_images: bool = True,
        cache_limit: float = 2.0,
        shapes: SceneOptions = SEVERAL,
        shapes_train: int = 2000,
        shapes_val: int = 200,
        shapes_test: int = 500,
        shapes_seed: int = 0,
        predict_folder: str | None = None,
    ) -> None:
        if dataset not in DATASETS:
            raise unknown_name("dataset", dataset, DATASETS)
        drawn = dataset == "shapes"
        shapes, side = scenes_and_side(drawn, shapes, image_size, IMAGE_SIZE)
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
        )
        # As a dict, since a checkpoint with an object of ours would not load with weights_only.
        self.save_hyperparameters(ignore=["shapes", "image_size"])
        # The size it comes to, or it would contradict a module's.
        self.save_hyperparameters({"shapes": asdict(shapes), "image_size": side})
        self.training_images = training_images
        self.class_names = list(shapes.values(shapes.label) if drawn else VOC_CLASSES)

    @property
    def split_info(self) -> dict[str, Any]:
        """What was evaluated, in plain values for results and checkpoints."""
        of_set: dict[str, Any] = {}
        if self.dataset == "shapes":
            of_set = {"shapes": self.shapes.plain(), "shapes_seed": self.shapes_seed}
        parts = {name: getattr(self, name) for name in FIRST_SCENE}
        return {
            "dataset": self.dataset,
            "num_classes": self.num_classes,
            "image_size": self.image_size,
            **of_set,
            "counts": {name: len(part) for name, part in parts.items() if part is not None},
        }

    def open_folder(self, folder: str) -> PictureFileDataset:
        """The pictures of a folder, squeezed to squares."""
        files = pictures_to_predict(folder)
        sizes = torch.tensor(picture_sizes(files, folder, "checking pictures"))
        return PictureFileDataset(files, self.image_size, original_sizes=sizes)

    def check_part(self, part: str) -> None:
        """Looks for pictures and annotations of a part."""
        self._voc(part)

    def draw_part(self, part: str) -> BatchDataset:
        """The scenes of a part, kept in memory if they fit."""
        options, count = self.shapes, self._scenes[part]
        scenes = ObjectScenes(options, self.shapes_seed, count, FIRST_SCENE[part])
        if not self.fits(count, self.image_size):
            return scenes
        return ObjectArrayDataset([scenes.__getitems__(piece) for piece in scenes.pieces()])

    def open_part(self, part: str) -> BatchDataset:
        """The pictures of a part, kept in memory if they fit."""
        pictures, annotations = self._voc(part)
        objects = read_voc_objects(annotations, f"annotations of {self.dataset} {part}")
        if all(difficult for found in objects for difficult in found.difficult):
            raise ValueError(
                f"{len(pictures)} pictures of {self.dataset} {part} have no object that is not marked as difficult; "
                f"look at {annotations[0].parent}"
            )
        dataset = ObjectPictureDataset(pictures, self.image_size, objects)
        if self.fits(len(dataset), self.image_size):
            dataset.keep(f"{self.dataset} {part}")
        return dataset

    def _voc(self, part: str) -> tuple[list[Path], list[Path]]:
        """Pictures and annotations of a part."""
        root = Path(self.root).expanduser()
        split = "val" if part == "test" else "train"
        try:
            found = VOCDetection(root, "2012", split)
        except (RuntimeError, FileNotFoundError) as error:
            folder = root / "VOCdevkit" / "VOC2012"
            raise FileNotFoundError(
                f"{folder} with ImageSets/Main/{split}.txt, JPEGImages and Annotations is missing ({error}): unpack "
                "VOCtrainval_11-May-2012.tar and give its folder with --data.root DIR"
            ) from error
        pairs = zip(found.images, found.annotations, strict=True)
        kept = [
            pair
            for place, pair in enumerate(pairs)
            if part == "test" or (place % VOC_VALIDATION == VOC_VALIDATION - 1) == (part == "val")
        ]
        missing = [file for pair in kept for file in pair if not Path(file).is_file()]
        if missing or not kept:
            what = (
                f"{len(missing)} files are missing, e.g. {missing[0]}" if missing else "no picture"
            )
            raise FileNotFoundError(f"VOC {part} (ImageSets/Main/{split}.txt): {what}")
        return [Path(picture) for picture, _ in kept], [Path(text) for _, text in kept]

    def _floats(self, batch: dict[str, Any], key: str) -> dict[str, Any]:
        as_bytes = batch["image"].dtype == torch.uint8
        batch = super()._floats(batch, key)
        trainer = self.trainer
        if not (as_bytes and self.horizontal_flip and trainer is not None and trainer.training):
            return batch
        # The same draw as that of the images.
        mirrored = self._uniform(f"horizontal flip{key}", len(batch["image"])) < 0.5
        return {**batch, "boxes": _mirror(batch["boxes"], mirrored, batch["image"].shape[-1])}


class ObjectScenes(Scenes):
    """Scenes with the boxes and classes of their objects."""

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """``image`` uint8 [B, 3, S, S], ``boxes`` int64 [B, M, 4], ``object_labels`` [B, M] and ``index`` [B]."""
        truth = self.truth(indices)
        return {
            "image": self.render(indices),
            "boxes": truth["boxes"],
            "object_labels": truth["object_labels"],
            "index": torch.as_tensor(indices, dtype=torch.int64),
        }


class ObjectArrayDataset(BatchDataset):
    """Images and their objects in memory.

    Args:
        batches: of which the set is made, with ``image`` uint8 and whatever else has a row for each image.
    """

    def __init__(self, batches: Sequence[dict[str, Tensor]]) -> None:
        self.columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        self.sample_shape = tuple(self.columns["image"].shape[1:])

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """The columns of these images, and ``index`` int64 [B]."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        batch = {name: column.index_select(0, index) for name, column in self.columns.items()}
        return {**batch, "index": index}


class PictureObjects(NamedTuple):
    """The objects in a picture file.

    Attributes:
        size: height and width of the file.
        boxes: x0, y0, x1, y1 in pixels from 0 on, the last column and row included.
        labels: their classes.
        difficult: whether an evaluation leaves them out.
    """

    size: tuple[int, int]
    boxes: list[tuple[float, ...]]
    labels: list[int]
    difficult: list[bool]


class ObjectPictureDataset(PictureFileDataset):
    """Picture files, squeezed to squares, and their objects.

    Args:
        paths: the files.
        size: side of the squares.
        objects: of each picture.
    """

    def __init__(self, paths: Sequence[Path], size: int, objects: Sequence[PictureObjects]) -> None:
        super().__init__(paths, size, boxes=squeezed_boxes(objects, size))
        most = max((len(found.labels) for found in objects), default=0)
        self.object_labels = torch.full((len(objects), most), -1)
        self.difficult = torch.zeros(len(objects), most, dtype=torch.bool)
        for row, found in enumerate(objects):
            self.object_labels[row, : len(found.labels)] = torch.tensor(found.labels).long()
            self.difficult[row, : len(found.labels)] = torch.tensor(found.difficult).bool()

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Any]:
        """What pictures have, with ``boxes`` float32 [B, M, 4], ``object_labels`` and ``difficult`` [B, M]."""
        batch = super().__getitems__(indices)
        batch["object_labels"] = self.object_labels.index_select(0, batch["index"])
        batch["difficult"] = self.difficult.index_select(0, batch["index"])
        return batch


def squeezed_boxes(objects: Sequence[PictureObjects], size: int) -> Tensor:
    """The boxes of each picture once it is a square of ``size`` pixels.

    The edges are scaled, so the IoU of two boxes stays what it was in the file.

    Returns:
        float32 [N, M, 4] with M the largest number of boxes; rows that are no box are -1.
    """
    most = max((len(found.boxes) for found in objects), default=0)
    squeezed = torch.full((len(objects), most, 4), -1.0)
    edges = torch.tensor([0.0, 0.0, 1.0, 1.0])
    for row, found in enumerate(objects):
        if found.boxes:
            height, width = found.size
            scale = size / torch.tensor([width, height, width, height])
            corners = (torch.tensor(found.boxes) + edges) * scale - edges
            squeezed[row, : len(corners)] = corners
    return squeezed


def read_voc_objects(annotations: Sequence[Path], name: str) -> list[PictureObjects]:
    """The objects in annotation files of PASCAL VOC, whose boxes begin at pixel 1.

    Args:
        annotations: the files.
        name: what an error and the progress bar call them.

    Raises:
        RuntimeError: a file is no annotation, or has a class that is none of VOC's; names up to five.
    """
    found: dict[Path, PictureObjects] = {}

    def read(place: int) -> None:
        found[annotations[place]] = _voc_objects(annotations[place])

    visit_files(read, annotations, name, f"reading {name}")
    return [found[path] for path in annotations]


def _voc_objects(path: Path) -> PictureObjects:
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"no XML ({error})") from error
    annotation = VOCDetection.parse_voc_xml(tree)["annotation"]
    try:
        boxes, labels, difficult = [], [], []
        for entry in annotation["object"]:
            if entry["name"] not in VOC_CLASSES:
                raise ValueError(f"class {entry['name']!r} is none of VOC's")
            corners = [float(entry["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append(tuple(corner - 1 for corner in corners))
            labels.append(VOC_CLASSES.index(entry["name"]))
            difficult.append(entry.get("difficult", "0") == "1")
        size = annotation["size"]
        shape = int(size["height"]), int(size["width"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no annotation of VOC: {error} is missing") from error
    return PictureObjects(shape, boxes, labels, difficult)


def _mirror(boxes: Tensor, mirrored: Tensor, width: int) -> Tensor:
    """Boxes [B, M, 4] of images of this width, some of which [B] are mirrored; rows of -1 stay."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    turned = torch.stack([width - 1 - x1, y0, width - 1 - x0, y1], -1)
    chosen = mirrored.to(boxes.device)[:, None] & (x0 >= 0)
    return torch.where(chosen[..., None], turned, boxes)
