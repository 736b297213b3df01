"""Probing sets for the dissection of a network: images whose concepts are known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from datamodules.base import EvaluationDataModule
from datamodules.camvid import list_frames
from datamodules.datasets import ImageArrayDataset
from datamodules.probing_sources import (
    CATEGORIES,
    BrodenProbing,
    Concept,
    ProbingDataset,
    SceneProbing,
    read_camvid_patches,
)
from datamodules.shapes import Scenes
from datamodules.shapes_options import SceneOptions
from datamodules.sources import unknown_name
from lightning_modules.arguments import demand_at_least

DATASETS = ("shapes", "camvid", "broden")
SCENES = SceneOptions()
PATCH_SIZE, FRAME_SCALE = 64, 0.5
# So far apart that the number of scenes to train on changes none that are probed.
FIRST_PROBED = 2 * 10**9


class ProbingDataModule(EvaluationDataModule):
    """Images with the masks of concepts; for ``train.py test`` only.

    The test loaders are the images alone, then the same images with their concepts: a threshold needs all activations
    before a unit can be said to fire. Batches have ``image`` [B, 3, H, W] in [0, 1], ``label`` int64 [B] (-1: of none
    of ``class_names``) and ``index``; those of the second loader also ``layers`` int64 [B, K, h, w], numbers of
    ``concepts``, 0 for none, h x w being ``mask_size``. Each loader gives each image once, whatever the number of
    processes.

    A module may offer ``passes_done``, the number of loaders whose result it already has; these give out nothing.

    - ``shapes``: procedural scenes; shape, colour and texture of objects and the kind of background are the concepts,
      known exactly. Drawn, nothing to provide.
    - ``camvid``: patches of the published test frames; classes, and colours named by their pixels, are the concepts.
      Labels are the classes of most pixels.
    - ``broden``: a folder in the layout of Broden or its ADE20k subset, see
      :class:`~datamodules.probing_sources.BrodenProbing`.

    Args:
        dataset: see above.
        root: folder of the files of ``camvid`` and ``broden``.
        image_size: side of the patches of ``camvid``; null for 64.
        frame_scale: by which frames of ``camvid`` are resized before patches are cut; null for 0.5.
        split: rows of ``broden`` with this ``split``; null for all.
        categories: of ``broden``; null for all but materials.
        limit: at most so many images (``broden``) or frames (``camvid``), evenly spaced.
        shapes: what scenes show.
        shapes_train: number of scenes for a network that is trained here.
        shapes_test: number of scenes that are probed.
        shapes_seed: of the scenes; the run's seed plays no part.
        eval_batch_size: batch of one process.
        num_workers: loader processes; use some for ``broden``.

    Attributes:
        probing: the set, after ``setup``.
        training: a labelled set to train a network on, none of whose images is probed; None for ``broden``.

    Raises:
        ValueError: arguments that cannot be met or contradict the data.
        FileNotFoundError: data are missing.
        RuntimeError: damaged data.
    """

    holds = "a set to look into a network with"

    def __init__(
        self,
        dataset: str = "shapes",
        root: str = "data",
        image_size: int | None = None,
        frame_scale: float | None = None,
        split: str | None = None,
        categories: Sequence[str] | None = None,
        limit: int | None = None,
        shapes: SceneOptions = SCENES,
        shapes_train: int = 3000,
        shapes_test: int = 1000,
        shapes_seed: int = 0,
        eval_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        if dataset not in DATASETS:
            raise unknown_name("dataset", dataset, DATASETS)
        super().__init__(eval_batch_size=eval_batch_size, num_workers=num_workers)
        only = {
            "image_size": (image_size, "camvid"),
            "frame_scale": (frame_scale, "camvid"),
            "split": (split, "broden"),
            "categories": (categories, "broden"),
        }
        for name, (given, where) in only.items():
            if given is not None and dataset != where:
                raise ValueError(
                    f"{name}={given} does not apply to {dataset}; leave out --data.{name}"
                )
        if limit is not None and dataset == "shapes":
            raise ValueError(f"limit={limit} does not apply to shapes; use --data.shapes_test")
        demand_at_least(1, most=10**9, image_size=image_size, limit=limit)
        demand_at_least(1, most=10**9, shapes_train=shapes_train, shapes_test=shapes_test)
        if frame_scale is not None and not 0 < frame_scale <= 1:
            raise ValueError(f"frame_scale={frame_scale} must be in (0, 1]")
        self.dataset = dataset
        self.root = root
        self.image_size = PATCH_SIZE if image_size is None else image_size
        self.frame_scale = FRAME_SCALE if frame_scale is None else frame_scale
        self.split = split
        self.categories = CATEGORIES if categories is None else tuple(categories)
        self.limit = limit
        self.shapes = shapes
        self.shapes_train = shapes_train
        self.shapes_test = shapes_test
        self.shapes_seed = shapes_seed
        self.probing: ProbingDataset | None = None
        self._training: ImageArrayDataset | None = None

    @property
    def _set(self) -> ProbingDataset:
        assert self.probing is not None, "setup('test') comes first"
        return self.probing

    @property
    def concepts(self) -> dict[int, Concept]:
        """Number -> name and category, ascending; after ``setup``."""
        return self._set.concepts

    @property
    def class_names(self) -> list[str]:
        """Name of each label; empty without labels, and before ``setup``."""
        return [] if self.probing is None else self.probing.class_names

    @property
    def mask_size(self) -> tuple[int, int]:
        """(height, width) of the concept masks; after ``setup``."""
        return self._set.mask_size

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes a batch; after ``setup``."""
        return self._set.fingerprint()

    @property
    def split_info(self) -> dict[str, Any]:
        """What was probed, in plain values for the results."""
        of_set: dict[str, Any] = {"limit": self.limit}
        if self.dataset == "shapes":
            options = self.shapes.plain()
            of_set = {"shapes": options, "shapes_seed": self.shapes_seed}
        elif self.dataset == "camvid":
            of_set |= {"image_size": self.image_size, "frame_scale": self.frame_scale}
        else:
            of_set |= {"split": self.split, "categories": list(self.categories)}
        found = self.probing
        counts = {} if found is None else {"probed": len(found), "concepts": len(found.concepts)}
        return {"dataset": self.dataset, **of_set, "counts": counts}

    def prepare_data(self) -> None:
        """Makes sure that the files are there before anything starts."""
        if self.trainer is not None and self.trainer.state.fn not in (TrainerFn.TESTING, None):
            self._refuse()
        if self.dataset == "camvid":
            list_frames(Path(self.root).expanduser())
        elif self.dataset == "broden":
            self._broden()

    def setup(self, stage: str | None = None) -> None:
        """Opens the probing set."""
        if stage not in ("test", None):
            self._refuse()
        if self.probing is None:
            if self.dataset == "shapes":
                self.probing = SceneProbing(self._scenes(FIRST_PROBED, self.shapes_test))
            elif self.dataset == "camvid":
                self.probing = self._patches(["test"])
            else:
                self.probing = self._broden()

    @property
    def training(self) -> ImageArrayDataset | None:
        """A labelled set, opened when it is asked for."""
        if self._training is None and self.dataset == "shapes":
            self._training = self._scenes(0, self.shapes_train).drawn()
        elif self._training is None and self.dataset == "camvid":
            found = self._patches(["train", "val"])
            self._training = ImageArrayDataset(found.pixels, found.labels, found.class_names)
        return self._training

    def test_dataloader(self) -> list[DataLoader]:
        """[images, images with concepts]."""
        loaders = [self.eval_loader(self._set.without_layers()), self.eval_loader(self._set)]
        module = None if self.trainer is None else self.trainer.lightning_module
        for loader in loaders[: getattr(module, "passes_done", 0)]:
            sampler: Any = loader.sampler
            sampler.skip = len(sampler)
        return loaders

    def _scenes(self, start: int, count: int) -> Scenes:
        return Scenes(self.shapes, self.shapes_seed, count, start)

    def _patches(self, parts: list[str]) -> Any:
        return read_camvid_patches(
            Path(self.root).expanduser(), parts, self.image_size, self.frame_scale, self.limit
        )

    def _broden(self) -> BrodenProbing:
        return BrodenProbing(Path(self.root).expanduser(), self.split, self.categories, self.limit)
