"""What the data sets of objects share: scenes that are drawn or pictures of files, with classes that have names."""

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from datamodules.base import AdversariaDataModule, parts_of
from datamodules.datasets import BatchDataset
from datamodules.shapes_options import SceneOptions
from lightning_modules.arguments import demand_at_least


class DrawnOrFilesDataModule(AdversariaDataModule):
    """Scenes (``shapes``) or picture files, whose classes go into checkpoints.

    Subclasses set ``class_names``, which may be empty until the files are open.

    Args:
        dataset: ``shapes``, or the name of a set of files.
        root: folder of the files.
        image_size: side of the images, of scenes too.
        cache_limit: a part that takes at most so many GiB stays drawn or decoded in memory.
        shapes: what scenes show.
        scenes: number of scenes of each part.
        shapes_seed: of the scenes.
        predict_folder: ``predict`` runs on the pictures below this folder; null: on the test images.
        **loading: arguments of :class:`~datamodules.base.AdversariaDataModule`.

    Raises:
        ValueError: a size or a number below 1, or a negative limit.
    """

    class_names: list[str]

    def __init__(
        self,
        dataset: str,
        root: str,
        image_size: int,
        cache_limit: float,
        shapes: SceneOptions,
        scenes: dict[str, int],
        shapes_seed: int,
        predict_folder: str | None,
        **loading: Any,
    ) -> None:
        demand_at_least(1, most=10**9, image_size=image_size)
        counts: dict[str, Any] = {f"shapes_{part}": count for part, count in scenes.items()}
        demand_at_least(1, most=10**9, **counts)
        demand_at_least(0, cache_limit=cache_limit)
        super().__init__(**loading)
        self.dataset = dataset
        self.root = root
        self.image_size = image_size
        self.cache_limit = cache_limit
        self.shapes = shapes
        self.shapes_seed = shapes_seed
        self.predict_folder = predict_folder
        self.train: BatchDataset | None = None
        self.val: BatchDataset | None = None
        self.test: BatchDataset | None = None
        self.pictures: BatchDataset | None = None
        self._scenes = dict(scenes)

    @property
    def num_classes(self) -> int:
        """K, without a background; 0 before the classes are known."""
        return len(self.class_names)

    def check_files(self, stage: TrainerFn | None) -> None:
        """Makes sure that the files are there before anything starts."""
        if self.dataset != "shapes":
            for part in self.parts_to_read(stage):
                self.check_part(part)

    def open_parts(self, stage: str | None) -> None:
        """Opens what the stage needs; what was opened before is kept."""
        for part in self.parts_to_read(stage):
            if getattr(self, part) is None:
                opened = self.draw_part(part) if self.dataset == "shapes" else self.open_part(part)
                setattr(self, part, opened)

    def parts_to_read(self, stage: TrainerFn | str | None) -> tuple[str, ...]:
        """What a stage needs; without training images the test set alone."""
        return parts_of(stage) if self.training_images else ("test",)

    def check_part(self, part: str) -> None:
        """Looks for the files of a part.

        Raises:
            FileNotFoundError: some are missing.
        """
        raise NotImplementedError

    def draw_part(self, part: str) -> BatchDataset:
        """The scenes of a part."""
        raise NotImplementedError

    def open_part(self, part: str) -> BatchDataset:
        """The pictures of a part."""
        raise NotImplementedError

    def fits(self, count: int, side: int) -> bool:
        """Whether so many images of that side stay in memory."""
        return count * 3 * side**2 <= self.cache_limit * 2**30

    def state_dict(self) -> dict[str, Any]:
        """The classes, for the checkpoint."""
        return {"class_names": list(self.class_names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint of other classes; takes its classes when a folder is predicted.

        Raises:
            ValueError: other classes, or in another order.
        """
        if not state_dict:
            return
        then, now = list(state_dict["class_names"]), self.class_names
        if self.predicts_folder:
            self.class_names = then
        elif now and then != now:
            both = set(then) & set(now)
            listed = [
                f"{place}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"
                for place, names in (
                    ("only in the checkpoint", [name for name in then if name not in both]),
                    (f"only in {self.dataset}", [name for name in now if name not in both]),
                )
                if names
            ]
            raise ValueError(
                f"the checkpoint was trained on {len(then)} classes, the data have {len(now)} "
                f"({'; '.join(listed) or 'the same in another order'}); set --data.dataset and "
                "--data.root, or --data.shapes, to data of the same classes"
            )
