"""What the reports on translations share: judges trained within the run, distances to real images, a table's cells."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from callbacks.report import evenly
from lightning_modules.arguments import demand_at_least
from lightning_modules.metrics.features import feature_extractor
from lightning_modules.metrics.frechet import frechet_distance_of_features
from lightning_modules.metrics.prdc import PrecisionRecallDensityCoverage
from lightning_modules.supervised import fit_judge
from lightning_modules.supervised.base import SupervisedModule

SMALL_DISTANCES = ("pixels", "random_vgg16")
"""Embeddings in which Frechet distances are below 1; the table has them x100."""

Scores = dict[str, float]
Judge = TypeVar("Judge", bound=SupervisedModule)


class JudgedTranslations(Callback):
    """Base of the reports on translations.

    The judges are trained once in a run, with random numbers of their own: runs on the same data have equal judges,
    whatever their seeds and modules.

    Args:
        judge_steps: batches that the classifier is trained with.
        judge_batch_size: images of such a batch.
        judge_lr: learning rate of the judges.
        judge_width: channels of the first stage of their networks.
        judge_seed: of all that is random in them; not the run's seed.
        judge_flip: mirror their training images with probability 1/2.
        features: embedding, see :func:`feature_extractor`; values in different ones cannot be compared.
        weights_path: weights file of a pretrained embedding.
        nearest_k: k of density and coverage.
        num_images: at most so many test images of a set, evenly spaced; null for all.
        batch_size: images translated at once.
        pictures: images in the picture.
        every_n_epochs: what is also done after the validation of every so many epochs; null for the test only.

    Raises:
        ValueError: for an impossible argument.
        FileNotFoundError: weights are missing.
    """

    columns: ClassVar[dict[str, str]]
    """Metrics, as they are logged, and the heads of their columns."""

    def __init__(
        self,
        judge_steps: int = 300,
        judge_batch_size: int = 16,
        judge_lr: float = 3e-3,
        judge_width: int = 16,
        judge_seed: int = 0,
        judge_flip: bool = False,
        features: str = "random_vgg16",
        weights_path: str | None = None,
        nearest_k: int = 5,
        num_images: int | None = None,
        batch_size: int = 16,
        pictures: int = 8,
        every_n_epochs: int | None = None,
    ) -> None:
        demand_at_least(
            1,
            judge_steps=judge_steps,
            judge_batch_size=judge_batch_size,
            judge_width=judge_width,
            nearest_k=nearest_k,
            num_images=num_images,
            batch_size=batch_size,
            pictures=pictures,
            every_n_epochs=every_n_epochs,
        )
        self.judge_steps = judge_steps
        self.judge_batch_size = judge_batch_size
        self.judge_lr = judge_lr
        self.judge_width = judge_width
        self.judge_seed = judge_seed
        self.judge_flip = judge_flip
        self.extractor = feature_extractor(features, weights_path)
        self.fid_scale = 100 if features in SMALL_DISTANCES else 1
        self.nearest_k = nearest_k
        self.num_images = num_images
        self.batch_size = batch_size
        self.pictures = pictures
        self.every_n_epochs = every_n_epochs

    # ------------------------------------------------------------------ data
    def images_of(self, data: Any, name: str) -> Any:
        """The set of that name of a DataModule, after its ``setup`` if need be.

        Raises:
            MisconfigurationException: there is none.
        """
        if getattr(data, name, None) is None:
            data.setup("test" if name.startswith("test") else "fit")
        images = getattr(data, name, None)
        if not hasattr(images, "batch"):
            raise MisconfigurationException(
                f"{type(self).__name__}: {type(data).__name__} has no set {name!r} with batch(indices)"
            )
        return images

    def places(self, images: Any) -> Tensor:
        """The numbers of the images of a set that are judged."""
        return evenly(images, self.num_images)

    def mine(self, images: Any, rank: int, world: int) -> Iterator[Tensor]:
        """Those of one process, in batches."""
        mine = self.places(images)[rank::world]
        return iter(mine.split(self.batch_size) if len(mine) else ())

    # ------------------------------------------------------------------ judges
    def trained(
        self,
        description: str,
        build: Callable[[], Judge],
        images: Any,
        steps: int,
        keys: Sequence[int | str],
        device: torch.device,
    ) -> Judge:
        """A judge that has learnt from ``images``, see :func:`fit_judge`."""
        return fit_judge(
            build,
            images,
            steps,
            self.judge_batch_size,
            self.judge_lr,
            self.judge_seed,
            tuple(keys),
            device,
            self.judge_flip,
            description,
        )

    def reference(
        self, batches: Iterator[tuple[Tensor, Tensor]], count: int, device: torch.device
    ) -> PrecisionRecallDensityCoverage | None:
        """A metric that has the features of real images; None if there are too few for ``nearest_k``.

        Args:
            batches: numbers and images [B, C, H, W] in [0, 1], those of this process.
            count: images of all processes.
            device: of the metric.
        """
        if count <= self.nearest_k:
            return None
        metric = PrecisionRecallDensityCoverage(
            nearest_k=self.nearest_k,
            metrics=("density", "coverage"),
            standard_errors=False,
            reset_real_features=False,
        ).to(device)
        for indices, images in batches:
            metric.update(self.extractor(images), real=True, indices=indices)
        return metric

    # ------------------------------------------------------------------ table
    def heads(self) -> dict[str, str]:
        """Of the columns; says by how much Frechet distances are multiplied."""
        return (
            self.columns
            if self.fid_scale == 1
            else self.columns | {"fid": f"FID x{self.fid_scale}"}
        )

    def cells(self, scores: Scores) -> list[float | None]:
        """The scores in the order of the columns."""
        cells = {**scores}
        if "fid" in cells:
            cells["fid"] *= self.fid_scale
        return [cells.get(metric) for metric in self.columns]

    def note_on_distances(self) -> str:
        """What to know of density, coverage and FID."""
        return (
            f"density, coverage (k = {self.nearest_k}) and FID: {self.extractor.description}; values of other "
            "features or other numbers of images cannot be compared"
        )


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference x100 of each pair of images, float64 [B]."""
    return 100 * (first.double() - second.double()).abs().flatten(1).mean(1)


def distances(
    reference: PrecisionRecallDensityCoverage | None, groups: int = 1
) -> tuple[Scores, list[float]]:
    """Density and coverage in percent and Frechet distances of what the metric has seen, which it forgets.

    Args:
        reference: of real images; None: nothing is known.
        groups: the images it has seen are numbered so that every ``groups``-th is of one group.

    Returns:
        Scores of all images together, and the Frechet distance of each group.
    """
    if reference is None:
        return {}, []
    values = reference.compute()
    assert reference.features is not None
    real, fake = reference.features
    scores = {name: 100 * float(values[name]) for name in ("density", "coverage")}
    each = []
    if len(fake) > 1:
        scores["fid"] = float(frechet_distance_of_features(real, fake))
        parts = [fake[k::groups] for k in range(groups)] if groups > 1 else []
        each = [float(frechet_distance_of_features(real, part)) for part in parts]
        each = each or [scores["fid"]]
    reference.reset()
    return scores, each
