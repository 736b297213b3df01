"""What PRDC says, in a table, pictures and curves; and PRDC of any generator during its own training."""

from typing import Any

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from callbacks.media import labelled_grid, log_images, log_table, run_directory, save_figure
from callbacks.report import due
from lightning_modules.arguments import demand_at_least
from lightning_modules.generated import generated_batches, generated_count
from lightning_modules.metrics.features import feature_extractor
from lightning_modules.metrics.prdc import (
    NAMES,
    PrecisionRecallDensityCoverage,
    expected_coverage,
)


class PRDCReport(Callback):
    """Prints and stores the result of a test, and shows the samples that it is about.

    Works with :class:`PRDCModule`. Writes ``prdc_table.txt``; ``images/``: the least faithful fakes, each above its
    nearest real, the uncovered reals, each above its nearest fake, and the metrics over k; ``tables/``: every fake
    and every real with its counts, neighbours and distances.

    Args:
        pictures: samples shown in each picture, 0 for none.
    """

    def __init__(self, pictures: int = 16) -> None:
        demand_at_least(0, pictures=pictures)
        self.pictures = pictures

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module has no such metric.
        """
        if not isinstance(getattr(pl_module, "metric", None), PrecisionRecallDensityCoverage):
            raise MisconfigurationException(
                f"PRDCReport needs PRDCModule, not {type(pl_module).__name__}; for a module that generates images "
                "use GenerativeMetrics"
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes everything, prints the table and where things are."""
        module: Any = pl_module
        if not trainer.is_global_zero:
            return
        samples = module.metric.samples
        balls, inside = samples.balls_around_fake, samples.fakes_in_ball
        worst = samples.nearest_real_distance / samples.real_radius[samples.nearest_real]
        worst = worst.argsort(descending=True)
        worst = worst[balls[worst] == 0]
        missed = (samples.nearest_fake_distance / samples.real_radius).argsort(descending=True)
        missed = missed[inside[missed] == 0]
        table = self._table(trainer, module)
        path = run_directory(trainer) / "prdc_table.txt"
        path.write_text(table + "\n")
        written = [
            path,
            self._curves(trainer, module),
            *self._tables(trainer, samples),
            self._pictures(
                trainer, module, "least_faithful", worst, samples.nearest_real, fakes_first=True
            ),
            self._pictures(
                trainer, module, "uncovered", missed, samples.nearest_fake, fakes_first=False
            ),
        ]
        print("\n" + table + "\n")
        for file in filter(None, written):
            print(f"wrote {file}")

    def _table(self, trainer: Trainer, module: Any) -> str:
        values = {key: float(value) for key, value in trainer.callback_metrics.items()}
        data = getattr(getattr(trainer, "datamodule", None), "split_info", {})
        real, fake = (len(features) for features in module.metric.features)
        of_generator = module.generator and f"{module.kind} of {module.hp.generator}"
        k, kind = module.metric.nearest_k, "closed" if module.metric.inclusive else "open"
        lines = [
            f"real: {data.get('real', '?')}, N = {real}",
            f"fake: {of_generator or data.get('fake', '?')}, M = {fake}",
            f"features: {module.description}",
            f"k = {k}, {kind} balls; the values depend on all of this: compare like with like",
            "",
        ]
        notes = {"density": "1 for equal distributions"}
        if "test/expected_coverage" in values:
            expected = values["test/expected_coverage"]
            notes["coverage"] = f"{expected:.4f} for equal distributions"
        for name in module.metric.metrics:
            error = f" ± {values[f'test/{name}_se']:.4f}"
            note = f"   ({notes[name]})" if name in notes else ""
            lines.append(f"{name:<20}{values[f'test/{name}']:8.4f}{error}{note}")
        hidden = {f"test/{name}{end}" for name in NAMES for end in ("", "_se")}
        hidden |= {"test/expected_coverage", "test/normalized_coverage"}
        for key, value in values.items():
            if key.startswith("test/") and key not in hidden:
                lines.append(f"{key.removeprefix('test/'):<20}{value:8.4f}")
        lines.append("± is the delete-one jackknife over both sets")
        return "\n".join(lines)

    def _curves(self, trainer: Trainer, module: Any) -> Any:
        metric = module.metric
        if not metric.sweep:
            return None
        columns = {name: value.tolist() for name, value in metric.curve.items()}
        log_table(
            trainer,
            "prdc/sweep",
            ["k", *columns],
            [list(row) for row in zip(metric.sweep, *columns.values(), strict=True)],
        )
        figure, axis = plt.subplots(figsize=(6, 4))
        real, fake = (len(features) for features in metric.features)
        for name in metric.metrics:
            (line,) = axis.plot(metric.sweep, columns[name], marker="o", ms=3, label=name)
            low, high = (
                [v + sign * s for v, s in zip(columns[name], columns[f"{name}_se"], strict=True)]
                for sign in (-1, 1)
            )
            axis.fill_between(metric.sweep, low, high, color=line.get_color(), alpha=0.15, lw=0)
        expected = [expected_coverage(real, fake, k) for k in metric.sweep]
        axis.plot(metric.sweep, expected, "k:", lw=1, label="coverage of equal distributions")
        axis.axvline(metric.nearest_k, color="grey", lw=0.5)
        axis.set(xlabel="k", title=f"N = {real}, M = {fake}", ylim=(0, None))
        axis.legend(fontsize=8)
        path = save_figure(trainer, "prdc/sweep", figure)
        plt.close(figure)
        return path

    def _tables(self, trainer: Trainer, samples: Any) -> list[Any]:
        fakes = (
            samples.balls_around_fake,
            samples.nearest_real,
            samples.nearest_real_distance,
        )
        reals = (
            samples.fakes_in_ball,
            samples.real_radius,
            samples.nearest_fake,
            samples.nearest_fake_distance,
        )
        names = {
            "fakes": ["fake", "real_balls_around_it", "nearest_real", "distance"],
            "reals": ["real", "fakes_in_its_ball", "radius", "nearest_fake", "distance"],
        }
        return [
            log_table(
                trainer,
                f"prdc/{side}",
                names[side],
                [
                    [i, *row]
                    for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True))
                ],
            )
            for side, columns in (("fakes", fakes), ("reals", reals))
        ]

    def _pictures(
        self,
        trainer: Trainer,
        module: Any,
        name: str,
        chosen: Tensor,
        nearest: Tensor,
        fakes_first: bool,
    ) -> Any:
        chosen = chosen[: self.pictures]
        if not len(chosen) or module.description == "features as given":
            return None
        first, second = (self._fakes, self._reals) if fakes_first else (self._reals, self._fakes)
        titles = (
            ("fake in no ball", "nearest real")
            if fakes_first
            else ("uncovered real", "nearest fake")
        )
        rows = {
            titles[0]: first(trainer, module, chosen),
            titles[1]: second(trainer, module, nearest[chosen]),
        }
        return log_images(trainer, f"prdc/{name}", labelled_grid(rows, self.pictures))

    def _reals(self, trainer: Trainer, module: Any, indices: Tensor) -> Tensor:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return data.real_set.batch(indices.cpu())["image"]

    def _fakes(self, trainer: Trainer, module: Any, indices: Tensor) -> Tensor:
        if module.generator is not None:
            return module.fake_images(indices.cpu()).cpu()
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return data.fake_set.batch(indices.cpu())["image"]


class GenerativeMetrics(Callback):
    """PRDC of what a module generates against real images of its data, after a test and during the training.

    Works with any module that is an :class:`ImageGenerator` and any DataModule that has the sets named in
    ``references`` as attributes with ``batch(indices)``. Logs ``test/prdc/KIND/REFERENCE/METRIC`` (``val/...``).
    Features of the real images are computed once. The images are shared among the processes; the values do not depend
    on their number.

    Args:
        kinds: kinds of images; None for all that the module has. A kind without images is left out.
        references: sets of the DataModule to compare with.
        features: embedding, see :func:`feature_extractor`; values in different ones cannot be compared.
        weights_path: weights file of a pretrained embedding.
        nearest_k: k.
        num_images: at most so many of each side, the first ones of a kind and a seeded part of a reference.
        every_n_epochs: also after every so many epochs' validation; None for the test only.
        batch_size: images embedded at once.
    """

    def __init__(
        self,
        kinds: list[str] | None = None,
        references: list[str] | None = None,
        features: str = "random_vgg16",
        weights_path: str | None = None,
        nearest_k: int = 5,
        num_images: int = 10_000,
        every_n_epochs: int | None = None,
        batch_size: int = 64,
    ) -> None:
        if num_images <= nearest_k:
            raise ValueError(f"num_images={num_images} must exceed nearest_k={nearest_k}")
        demand_at_least(1, every_n_epochs=every_n_epochs)
        self.kinds = kinds
        self.references = ["test"] if references is None else references
        self.extractor = feature_extractor(features, weights_path)
        self.nearest_k = nearest_k
        self.num_images = num_images
        self.every_n_epochs = every_n_epochs
        self.batch_size = batch_size
        self._metrics: dict[str, PrecisionRecallDensityCoverage] = {}
        self._rows: list[list[Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module generates nothing, or not what is asked for.
        """
        module: Any = pl_module
        if not hasattr(module, "generated_kinds"):
            raise MisconfigurationException(
                f"GenerativeMetrics needs a module that generates images, {type(module).__name__} does not; "
                "remove the callback"
            )
        unknown = sorted(set(self.kinds or []) - set(module.generated_kinds()))
        if unknown:
            raise MisconfigurationException(
                f"{type(module).__name__} generates no {', '.join(unknown)}; kinds are some of "
                f"{', '.join(module.generated_kinds())}"
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every ``every_n_epochs`` epochs of a training."""
        if due(trainer, self.every_n_epochs):
            self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares."""
        self._evaluate(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table and writes ``prdc_table.txt``."""
        if not trainer.is_global_zero or not self._rows:
            return
        columns = ["images", "real images", "M", "N", *NAMES, "coverage of equals"]
        log_table(trainer, "prdc/generated", columns, self._rows)
        width = [max(len(str(row[i])) for row in [columns, *self._rows]) + 2 for i in range(4)]
        lines = [
            f"Generated images, k = {self.nearest_k}, features: {self.extractor.description}",
            "".join(f"{name:<{w}}" for name, w in zip(columns, width, strict=False))
            + "".join(f"{name:>20}" for name in columns[4:]),
        ]
        lines += [
            "".join(f"{cell!s:<{w}}" for cell, w in zip(row, width, strict=False))
            + "".join(f"{cell:>20}" for cell in row[4:])
            for row in self._rows
        ]
        path = run_directory(trainer) / "prdc_table.txt"
        path.write_text("\n".join(lines) + "\n")
        print("\n" + "\n".join(lines) + "\n")
        print(f"wrote {path}")

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        module: Any = pl_module
        self.extractor.to(module.device)
        self._rows = []
        for reference in self.references:
            metric = self._reference(trainer, module, reference)
            for kind, available in module.generated_kinds().items():
                if available == 0 or (self.kinds is not None and kind not in self.kinds):
                    continue
                count = generated_count(module, kind, self.num_images)
                mine = torch.arange(trainer.global_rank, count, trainer.world_size)
                for indices, images in generated_batches(module, kind, mine, self.batch_size):
                    metric.update(self.extractor(images), real=False, indices=indices)
                values = metric.compute()
                assert metric.features is not None
                sizes = [len(features) for features in metric.features]
                metric.reset()
                logged = {
                    f"{stage}/prdc/{kind}/{reference}/{n}": v.float() for n, v in values.items()
                }
                pl_module.log_dict(logged, rank_zero_only=False)
                cells = [f"{values[n]:.3f} ± {values[f'{n}_se']:.3f}" for n in NAMES]
                expected = f"{values['expected_coverage']:.3f}"
                self._rows.append([kind, reference, sizes[1], sizes[0], *cells, expected])

    def _reference(
        self, trainer: Trainer, module: Any, reference: str
    ) -> PrecisionRecallDensityCoverage:
        """The metric that has the features of a set of real images already.

        Raises:
            MisconfigurationException: the data have no such set.
        """
        if reference in self._metrics:
            return self._metrics[reference]
        data: Any = getattr(trainer, "datamodule", None)
        images: Any = getattr(data, reference, None)
        if not hasattr(images, "batch"):
            raise MisconfigurationException(
                f"GenerativeMetrics: {type(data).__name__} has no set {reference!r} to compare with at this stage"
            )
        metric = PrecisionRecallDensityCoverage(
            nearest_k=self.nearest_k,
            reset_real_features=False,
            max_samples=self.num_images,
        ).to(module.device)
        mine = torch.arange(trainer.global_rank, len(images), trainer.world_size)
        for indices in mine.split(self.batch_size):
            batch = images.batch(indices, module.device)
            metric.update(self.extractor(batch["image"]), real=True, indices=indices)
        self._metrics[reference] = metric
        return metric
