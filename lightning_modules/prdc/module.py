"""PRDC of two sets: embed both, gather once, compare; run with ``train.py test``.

The metrics are in :mod:`lightning_modules.metrics.prdc`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from lightning_modules.arguments import demand_at_least
from lightning_modules.generated import (
    ImageGenerator,
    generated_batches,
    generated_count,
    load_generator,
)
from lightning_modules.metrics.features import feature_extractor
from lightning_modules.metrics.frechet import GivenFeatures, frechet_distance_of_features
from lightning_modules.metrics.prdc import (
    NAMES,
    Name,
    PrecisionRecallDensityCoverage,
    authenticity,
    choose_nearest_k,
    improved_precision_recall,
    probabilistic_precision_recall,
)
from lightning_modules.paper import PaperModule
from lightning_modules.randomness import mix

Also = Literal["fid", "kid", "improved", "probabilistic", "authenticity"]
KID_SUBSET = 1000


class PRDCModule(PaperModule):
    """Fidelity and diversity of a fake set, or of a generator, against a real set.

    The data are [real, fake], or [real] with a ``generator``; batches have ``image`` [B, 3, H, W] in [0, 1] or
    ``features`` [B, D], and ``index`` [B]. The result is the same for any number of processes.

    Args:
        nearest_k: k; None takes the smallest with an expected coverage above 0.95.
        features: embedding of images: ``pixels``, ``random_vgg16`` (R64), ``vgg16`` (T4096), ``inception``, a
            torchvision classifier, or a network of your own from images to [B, D].
        weights_path: weights file of a pretrained embedding.
        download: let torchvision fetch missing weights.
        features_seed: seed of the random network.
        inclusive: count the surface of the balls.
        metrics: which of precision, recall, density, coverage; without recall a third of the work is saved.
        sweep: further k's for the curves; those that the sets are too small for are left out.
        also: what else to compute from the same features: ``fid`` and ``kid`` (torchmetrics; in the embedding
            chosen, comparable with published values for ``inception`` only), ``improved`` precision and recall
            (k = 3, closed balls), ``probabilistic`` precision and recall, ``authenticity``.
        generator: checkpoint of a module of this collection whose images are the fakes.
        kind: which of its images; None takes the module's first kind.
        num_generated: how many images; None: all there are, or as many as reals.
        generate_batch_size: images made at once.

    Raises:
        ValueError: impossible arguments.
        FileNotFoundError: weights or the checkpoint are missing.
        RuntimeError: the checkpoint cannot be read or generates no images.
    """

    def __init__(
        self,
        nearest_k: int | None = 5,
        features: str | nn.Module = "random_vgg16",
        weights_path: str | None = None,
        download: bool = False,
        features_seed: int = 0,
        inclusive: bool = False,
        metrics: Sequence[Name] = NAMES,
        sweep: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
        also: Sequence[Also] = ("fid", "kid"),
        generator: str | None = None,
        kind: str | None = None,
        num_generated: int | None = None,
        generate_batch_size: int = 64,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["features"])
        if isinstance(features, nn.Module):
            self.embedding = features.eval().requires_grad_(False)
        else:
            self.embedding = feature_extractor(features, weights_path, download, features_seed)
        self.metric = PrecisionRecallDensityCoverage(
            nearest_k=1 if nearest_k is None else nearest_k,
            inclusive=inclusive,
            metrics=metrics,
            per_sample=True,
        )
        for k in sweep:
            if k < 1:
                raise ValueError(f"sweep has k={k}; every k must be at least 1")
        unknown = sorted(set(also) - set(get_args(Also)))
        if unknown:
            raise ValueError(f"also={unknown} must be some of {', '.join(get_args(Also))}")
        demand_at_least(1, num_generated=num_generated)
        self.generator: PaperModule | None = None
        if generator is not None:
            self.generator = load_generator(generator)
            kinds = list(cast(ImageGenerator, self.generator).generated_kinds())
            self.kind = kind or kinds[0]
            generated_count(cast(ImageGenerator, self.generator), self.kind, num_generated or 1)
        self.num_generated = 0
        self._embedded = True

    @property
    def description(self) -> str:
        """The embedding, in words; what makes values comparable."""
        if not self._embedded:
            return "features as given"
        name = type(self.embedding).__name__
        return str(getattr(self.embedding, "description", name))

    def on_test_start(self) -> None:
        """Checks the sizes before anything is embedded.

        Raises:
            MisconfigurationException: no fakes, or two sources of them.
            ValueError: too few samples for k.
        """
        trainer: Any = self.trainer
        loaders = trainer.test_dataloaders
        sizes = [len(loader.dataset) for loader in loaders]
        if len(sizes) > 2 or (len(sizes) == 2) == (self.generator is not None):
            raise MisconfigurationException(
                "one set of fakes is needed: either --data.fake, or --model.generator CHECKPOINT"
            )
        if self.generator is not None:
            generator = cast(ImageGenerator, self.generator)
            known = generator.generated_kinds()[self.kind]
            wanted = self.hp.num_generated or (sizes[0] if known is None else None)
            self.num_generated = generated_count(generator, self.kind, wanted)
            sizes.append(self.num_generated)
        real, fake = sizes
        fewest = min(sizes) if "recall" in self.hp.metrics else real
        nearest_k = self.hp.nearest_k
        if nearest_k is None:
            nearest_k = choose_nearest_k(real, fake)
        if fewest <= nearest_k:
            raise ValueError(
                f"--model.nearest_k {nearest_k} needs at least {nearest_k + 1} samples, there are {real} real and "
                f"{fake} fake; use more samples or a smaller nearest_k"
            )
        self.metric.nearest_k = nearest_k
        self.metric.sweep = [k for k in self.hp.sweep if k < fewest]

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Embeds a batch of the real set (loader 0) or of the fake set (loader 1)."""
        self._embedded = "features" not in batch
        features = self.embedding(batch["image"]) if self._embedded else batch["features"]
        self.metric.update(features, real=dataloader_idx == 0, indices=batch["index"])

    def fake_images(self, indices: Tensor) -> Tensor:
        """Images of the generator [B, C, H, W] in [0, 1], by number [B]."""
        generator = cast(ImageGenerator, self.generator)
        parts = generated_batches(generator, self.kind, indices, self.hp.generate_batch_size)
        return torch.cat([images for _, images in parts])

    def on_test_epoch_end(self) -> None:
        """Makes the fakes if they are generated, and computes everything."""
        if self.generator is not None:
            mine = torch.arange(self.global_rank, self.num_generated, self.trainer.world_size)
            generator = cast(ImageGenerator, self.generator)
            for indices, images in generated_batches(
                generator, self.kind, mine, self.hp.generate_batch_size
            ):
                features = self.embedding(images.to(self.device))
                self.metric.update(features, real=False, indices=indices)
        values = dict(self.metric.compute())
        assert self.metric.features is not None
        for name in self.hp.also:
            values |= _ALSO[name](*self.metric.features)
        logged = {f"test/{name}": value.float() for name, value in values.items()}
        # Every rank has the same values, from all samples.
        self.log_dict(logged, rank_zero_only=False)


def _fid(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    return {"fid": frechet_distance_of_features(real, fake)}


def _kid(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    subset = min(KID_SUBSET, len(real), len(fake))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all extracted features")
        metric = KernelInceptionDistance(
            GivenFeatures(real.shape[1]), subset_size=subset, sync_on_compute=False
        ).to(real.device)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix("kid subsets"))  # torchmetrics draws them from the global stream
        mean, std = metric.compute()
    return {"kid": mean, "kid_std": std}


def _improved(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    precision, recall = improved_precision_recall(real, fake)
    return {"improved_precision": precision, "improved_recall": recall}


def _probabilistic(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    precision, recall = probabilistic_precision_recall(real, fake)
    return {"p_precision": precision, "p_recall": recall}


def _authenticity(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    return {"authenticity": authenticity(real, fake).double().mean()}


_ALSO: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "fid": _fid,
    "kid": _kid,
    "improved": _improved,
    "probabilistic": _probabilistic,
    "authenticity": _authenticity,
}
