"""Dissection: what the units of a layer respond to, as formulas over concepts; run with ``train.py test``.

Two passes over a probing set: the exact threshold of every unit, then on how many positions of each signature it
fires. What follows, the search, needs no image any more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchvision.models import get_model_weights

from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.checkpoints import load_frozen
from lightning_modules.dissection.analysis import (
    accuracy_when_firing,
    iou_accuracy_correlation,
    unit_type,
)
from lightning_modules.dissection.bounds import LARGEST_LENGTH, certified_search, iou_ceiling
from lightning_modules.dissection.collection import (
    Collected,
    Collector,
    find_layer,
    fingerprint_of,
    layer_activations,
    merge_parts,
)
from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.contributions import contributing_units, feature_correlation
from lightning_modules.dissection.edits import Edit, try_edits
from lightning_modules.dissection.formulas import Formula, formula_from_json
from lightning_modules.dissection.masks import Upsampling, unit_masks
from lightning_modules.dissection.quantiles import Interpolation, TopKQuantile
from lightning_modules.dissection.records import Record, explain_units
from lightning_modules.dissection.scores import Scope, best_concepts, iou_from_counts
from lightning_modules.dissection.search import Explanation, Mode, beam_search
from lightning_modules.files import read_cached, whole_file
from lightning_modules.nn.statistics import gather_over_ranks
from lightning_modules.paper import PaperModule
from lightning_modules.supervised import Classifier, fit_judge

NEEDED = ("probing", "concepts", "mask_size", "fingerprint", "class_names")


class Dissection(PaperModule):
    """Explains the units of a layer of any network by the concepts of a probing set.

    The network is one of

    - ``checkpoint``: a module of this collection;
    - ``network`` by torchvision's name with ``pretrained``: its published weights;
    - ``network``: any module of your own from images [B, 3, H, W] in [0, 1] to anything;
    - ``network`` by name with ``train_steps``: a classifier trained here on the labelled images that the data offer.

    The data are a DataModule with ``concepts`` (number -> name and category), ``mask_size``, ``class_names``,
    ``fingerprint``, ``probing`` and the two loaders of :class:`ProbingDataModule`. The answer is the same for any
    number of processes: they share the images, then the units, which are dealt out one by one.

    Every unit's result is appended to ``units/rank-R.jsonl`` in the run directory as soon as it is known; a run that is
    continued (``--run.resume true``) computes only what is missing. Thresholds and counts are kept in ``cache`` under a
    hash of everything they depend on: weights, layer, data, quantile, upsampling.

    Args:
        layer: dotted name of the layer whose units are explained. Maps [B, U, h, w], tokens [B, T, D] (a class token is
            dropped) and vectors [B, U] will do.
        checkpoint: see above.
        network: see above.
        pretrained: torchvision's weights.
        weights_path: their file; without it the one in torch.hub's folder.
        download: let torchvision fetch a missing file.
        width: of a ``small`` network that is trained here.
        train_steps: batches that a network is trained with here.
        train_batch_size: images of such a batch.
        train_lr: learning rate at the start.
        train_seed: of all that is random in it; not the run's seed.
        quantile: share of a unit's activations above its threshold (0.005 in both papers).
        level: read the threshold at this level instead of ``1 - quantile``.
        interpolation: of the threshold between two activations.
        upsample: see :func:`~lightning_modules.dissection.masks.upsample_activations`.
        field_scale: input pixels between two units of the layer, for ``receptive_field``.
        field_offset: input pixel of the first one.
        scope: images in which a unit's area counts for Network Dissection's answer; formulas always count all.
        beam_size: formulas kept by the search (5; the released NLI code 10).
        max_length: concepts in a formula (3).
        length_penalty: see :func:`~lightning_modules.dissection.search.beam_search`.
        candidate_limit: extend by so many best concepts only.
        mode: ``distinct``, or ``reference``, which is the released code.
        certify: seconds per unit to prove that no formula of up to three concepts is better; null for no proof. A
            better formula that turns up replaces the beam's, unless the mode is ``reference`` or length is penalised.
        units: numbers of the units to explain; null for all.
        top_images: images noted for each unit, those with the largest activations.
        alpha: share of the weights that count as outstanding, see
            :func:`~lightning_modules.dissection.contributions.contributing_units`.
        edits: copy-paste edits to try.
        cache: folder of thresholds, counts and the trained network; null for ``cache`` in the run directory.

    Attributes:
        units: one record per unit, after the test, on every process.
        concepts: the concepts with their signatures, after the test.
        images: of every image the maxima and means of all units, logits and label, after the test.
        edits: the copy-paste edits, after the test.
        classes: names of the network's classes.

    Raises:
        ValueError: impossible arguments, or no such layer.
        FileNotFoundError: weights or the checkpoint are missing.
        RuntimeError: the checkpoint cannot be read.
    """

    def __init__(
        self,
        layer: str,
        checkpoint: str | None = None,
        network: str | nn.Module | None = None,
        pretrained: bool = False,
        weights_path: str | None = None,
        download: bool = False,
        width: int = 16,
        train_steps: int | None = None,
        train_batch_size: int = 32,
        train_lr: float = 3e-3,
        train_seed: int = 0,
        quantile: float = 0.005,
        level: float | None = None,
        interpolation: Interpolation = "linear",
        upsample: Upsampling = "bilinear",
        field_scale: float | None = None,
        field_offset: float | None = None,
        scope: Scope = "all",
        beam_size: int = 5,
        max_length: int = 3,
        length_penalty: float = 1.0,
        candidate_limit: int | None = None,
        mode: Mode = "distinct",
        certify: float | None = 10.0,
        units: Sequence[int] | None = None,
        top_images: int = 8,
        alpha: float = 0.01,
        edits: int = 6,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else [])
        self._check_arguments(network)
        self.network: nn.Module | None = None
        self.classes: list[str] = []
        if checkpoint is not None:
            found = load_frozen(checkpoint, "--model.checkpoint")
            if type(found).forward is PaperModule.forward and not hasattr(found, "classify"):
                raise RuntimeError(
                    f"{checkpoint} holds a {type(found).__name__}, which classifies no images"
                )
            self.network = found
        elif isinstance(network, nn.Module):
            self.network = network.eval().requires_grad_(False)
        elif pretrained:
            categories = get_model_weights(network)["DEFAULT"].meta["categories"]
            classifier = Classifier(
                len(categories),
                network=network,
                pretrained=True,
                weights_path=weights_path,
                download=download,
            )
            classifier.require_weights()
            classifier.class_names = list(categories)
            self.network = classifier.eval().requires_grad_(False)
        if self.network is not None:
            find_layer(self.network, layer)
        self.passes_done = 0
        self.units: list[Record] = []
        self.images: dict[str, Tensor] = {}
        self.edits: list[Edit] = []
        self._thresholds: Tensor | None = None
        self._collected: Collected | None = None
        self._collector: Collector | None = None
        self._rows: list[dict[str, Tensor]] = []

    def _check_arguments(self, network: str | nn.Module | None) -> None:
        hp = self.hp
        if (hp.checkpoint is None) == (network is None):
            raise ValueError(
                "a dissection needs one network: either --model.checkpoint FILE or --model.network NAME"
            )
        if isinstance(network, str) and hp.pretrained == (hp.train_steps is not None):
            raise ValueError(
                f"network={network!r} needs weights: either --model.pretrained true or --model.train_steps N"
            )
        for name, value in (
            ("quantile", hp.quantile),
            ("level", hp.level),
            ("length_penalty", hp.length_penalty),
        ):
            if value is not None and not 0 < value <= 1 - (name != "length_penalty") * 1e-12:
                raise ValueError(f"{name}={value} must be a share in (0, 1) (--model.{name})")
        if not 0 < hp.alpha < 0.5:
            raise ValueError(f"alpha={hp.alpha} must be in (0, 0.5) (--model.alpha)")
        demand_at_least(
            1,
            option="--model.",
            width=hp.width,
            train_steps=hp.train_steps,
            train_batch_size=hp.train_batch_size,
            beam_size=hp.beam_size,
            max_length=hp.max_length,
            candidate_limit=hp.candidate_limit,
        )
        demand_at_least(
            0, option="--model.", certify=hp.certify, top_images=hp.top_images, edits=hp.edits
        )
        demand_choice(Scope, option="--model.", scope=hp.scope)
        demand_choice(Mode, option="--model.", mode=hp.mode)
        demand_choice(Upsampling, option="--model.", upsample=hp.upsample)
        demand_choice(Interpolation, option="--model.", interpolation=hp.interpolation)
        if (hp.upsample == "receptive_field") != (
            hp.field_scale is not None and hp.field_offset is not None
        ):
            raise ValueError(
                "upsample='receptive_field' goes with --model.field_scale and --model.field_offset"
            )

    # ------------------------------------------------------------------ before anything is collected
    def setup(self, stage: str) -> None:
        """Reads or trains the network, looks at its layer, and finds out what is known already.

        Raises:
            MisconfigurationException: the data are no probing set.
            ValueError: no such layer, or units that it does not have.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        missing = [
            name for name in NEEDED if not hasattr(type(data), name) and not hasattr(data, name)
        ]
        if missing:
            raise MisconfigurationException(
                f"Dissection needs a probing set, {type(data).__name__} has no {', '.join(missing)}; use "
                "--data ProbingDataModule"
            )
        self.data: Any = data
        if self.network is None:
            self.network = self._trained()
        find_layer(self.network, self.hp.layer)
        self._name_classes()
        first = data.probing.batch([0])["image"].to(self._precision())
        activations, _ = self._run(first)
        self.n_units, *map_size = activations.shape[1:]
        self._chosen = list(range(self.n_units)) if self.hp.units is None else list(self.hp.units)
        unknown = [unit for unit in self._chosen if not 0 <= unit < self.n_units]
        if unknown or not self._chosen:
            raise ValueError(
                f"units={unknown or self._chosen} must be some of the {self.n_units} units of layer "
                f"{self.hp.layer}, from 0 on"
            )
        hp = self.hp
        # All that activations depend on; the precision is that of the trainer.
        of_activations = fingerprint_of(
            self.network,
            *(hp.layer, data.fingerprint, hp.quantile, hp.level, hp.interpolation),
            *(str(self.trainer.precision), self.trainer.strategy.root_device.type),
        )
        concepts = [(k, c.name, c.category) for k, c in data.concepts.items()]
        of_masks = fingerprint_of(
            of_activations, concepts, data.mask_size, hp.upsample, hp.field_scale, hp.field_offset
        )
        search = (hp.beam_size, hp.max_length, hp.length_penalty, hp.candidate_limit, hp.mode)
        self._search_key = fingerprint_of(of_masks, *search, hp.certify, hp.scope)
        self._keys = {"thresholds": of_activations, "counts": of_masks}
        self.quantile = TopKQuantile(
            self.n_units,
            len(data.probing) * map_size[0] * map_size[1],
            hp.quantile,
            hp.level,
            hp.interpolation,
        )
        self._thresholds = self._collected = None
        known = self._load("thresholds")
        if known is not None:
            self._thresholds, self.images = known["thresholds"], known["images"]
            collected = self._load("counts")
            if collected is not None:
                self._collected = Collected.from_state_dict(collected)
        self.passes_done = (self._thresholds is not None) + (self._collected is not None)
        self._rows, self._collector, self.units, self.edits = [], None, [], []

    def _trained(self) -> nn.Module:
        training = self.data.training
        if training is None:
            raise MisconfigurationException(
                "these data have no labelled images to train a network on; give --model.checkpoint FILE"
            )
        hp, names = self.hp, self.data.class_names

        def build() -> Classifier:
            return Classifier(len(names), network=hp.network, width=hp.width)

        options = (hp.train_steps, hp.train_batch_size, hp.train_lr, hp.train_seed)
        content = (training.images, training.labels)
        self._keys = {"network": fingerprint_of(*content, names, hp.network, hp.width, *options)}
        state = self._load("network")
        if state is None:
            trained = fit_judge(
                build,
                training,
                hp.train_steps,
                hp.train_batch_size,
                hp.train_lr,
                hp.train_seed,
                ("dissection",),
                self.trainer.strategy.root_device,
                description="network to dissect",
            )
            # Every process has trained it; on machines that differ, they may differ in the last bits.
            state = self.trainer.strategy.broadcast(trained.cpu().state_dict())
            self._save("network", state)
        network = build().eval().requires_grad_(False)
        network.load_state_dict(state)
        network.class_names = list(names)
        return network

    def _name_classes(self) -> None:
        """The network's own names, or those of the data where it has none but numbers."""
        names = list(getattr(self.network, "class_names", []))
        if not names or names == [str(k) for k in range(len(names))]:
            known = list(self.data.class_names)
            names = known if not names or len(known) == len(names) else names
        self.classes = names

    def _cache_file(self, kind: str) -> Path:
        folder = Path(self.hp.cache or Path(self.trainer.default_root_dir, "cache")).expanduser()
        return folder / f"{kind}-{self._keys[kind]}.pt"

    def _load(self, kind: str) -> Any:
        """What an earlier run has kept, the same on every process; None if there is nothing."""
        found = read_cached(self._cache_file(kind)) if self.trainer.is_global_zero else None
        return self.trainer.strategy.broadcast(found)

    def _save(self, kind: str, state: Any) -> None:
        if not self.trainer.is_global_zero:
            return
        with whole_file(self._cache_file(kind)) as file:
            torch.save(state, file)

    # ------------------------------------------------------------------ two passes
    def _run(self, images: Tensor) -> tuple[Tensor, Any]:
        """Activations [B, U, h, w] and what the network returns, in full precision."""
        network = cast(nn.Module, self.network)
        # Batches of one size: another one may have kernels that round differently, and a process's last batch has.
        size = max(len(images), int(getattr(self.data, "eval_batch_size", 1)))
        padded = torch.cat([images, images[:1].expand(size - len(images), *images.shape[1:])])
        with (
            torch.no_grad(),
            torch.autocast(images.device.type, enabled=False),
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            ),
        ):
            layer = find_layer(network, self.hp.layer)
            activations, output = layer_activations(
                network, layer, lambda: _classified(network, padded)
            )
        if isinstance(output, Tensor) and output.ndim > 0 and len(output) == size:
            output = output[: len(images)]
        return activations[: len(images)], output

    def classify(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, 3, H, W] in [0, 1], in batches of the data's size, on the CPU."""
        size = int(getattr(self.data, "eval_batch_size", len(images)))
        parts = [
            self._run(part.to(self.device, self._precision()))[1] for part in images.split(size)
        ]
        return torch.cat(parts).float().cpu()

    def _precision(self) -> torch.dtype:
        network = cast(nn.Module, self.network)
        return next((p.dtype for p in network.parameters()), torch.float32)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the thresholds (loader 0) or to the counts (loader 1)."""
        if dataloader_idx == 0:
            self._add_to_thresholds(batch)
        else:
            if self._collector is None:
                self._finish_thresholds()
                assert self._thresholds is not None
                found = self.data.concepts
                self._collector = Collector(
                    list(found),
                    [concept.category for concept in found.values()],
                    self._thresholds.to(self.device),
                    self._upsampling(tuple(batch["image"].shape[-2:])),
                )
            activations, _ = self._run(batch["image"])
            self._collector.add(activations, batch["layers"], batch["index"])

    def _upsampling(self, image_size: tuple[int, ...]) -> dict[str, Any]:
        options: dict[str, Any] = {"size": tuple(self.data.mask_size), "mode": self.hp.upsample}
        if self.hp.upsample == "receptive_field":
            options |= {
                "image_size": image_size,
                "scale": self.hp.field_scale,
                "offset": self.hp.field_offset,
            }
        return options

    def _add_to_thresholds(self, batch: dict[str, Tensor]) -> None:
        activations, output = self._run(batch["image"])
        self.quantile.update(activations)
        row = {
            "index": batch["index"],
            "maxima": activations.flatten(2).amax(2),
            "means": activations.flatten(2).mean(2),
        }
        if isinstance(output, Tensor) and output.ndim == 2:
            row["logits"] = output
        if "label" in batch:
            row["label"] = batch["label"]
        self._rows.append({name: column.cpu() for name, column in row.items()})

    def _finish_thresholds(self) -> None:
        if self._thresholds is not None:
            return
        self._thresholds = self.quantile.compute().cpu()
        columns = self.gather_columns(self._rows)
        order = columns["index"].argsort()
        self.images = {name: column[order] for name, column in columns.items()}
        self._rows = []
        self._save("thresholds", {"thresholds": self._thresholds, "images": self.images})

    # ------------------------------------------------------------------ search
    def on_test_epoch_end(self) -> None:
        """Joins the counts, explains every unit and analyses what came out."""
        if self._collected is None:
            assert self._collector is not None
            parts = gather_over_ranks(self.trainer, self._collector.part())
            self._collected = merge_parts(list(self.data.concepts), parts)
            self._collector = None
            self._save("counts", self._collected.state_dict())
        found = self.data.concepts
        self.concepts = ConceptMasks(
            list(found),
            self._collected.signatures,
            {number: concept.name for number, concept in found.items()},
            [concept.category for concept in found.values()],
            self._collected.presence,
        )
        self.units = self._explain_all(self._collected)
        self._analyse()
        self._log_everything()

    def _explain_all(self, collected: Collected) -> list[Record]:
        size = len(collected.signatures)

        def counts(unit: int) -> Tensor:
            return collected.counts.unit(unit, size)

        areas = {unit: int(counts(unit).sum()) for unit in self._chosen}
        return explain_units(
            self.trainer,
            self._chosen,
            areas,
            self._search_key,
            lambda unit: self._explain(unit, counts(unit)),
        )

    def _explain(self, unit: int, counts: Tensor) -> Record:
        """All that is known about a unit from its counts alone, in plain values."""
        hp, concepts = self.hp, self.concepts
        steps = [
            beam_search(
                counts,
                concepts,
                hp.beam_size,
                length,
                hp.length_penalty,
                hp.candidate_limit,
                hp.mode,
            )
            for length in range(1, hp.max_length + 1)
        ]
        best, optimum = steps[-1], None
        length = min(hp.max_length, LARGEST_LENGTH)
        of_beam = steps[length - 1]
        if hp.certify is not None:
            plain = hp.length_penalty == 1
            start = of_beam if plain else None
            optimum = certified_search(counts, concepts, length, hp.certify, start)
            if plain and hp.mode == "distinct":
                steps[length - 1 :] = [max(step, optimum, key=_iou) for step in steps[length - 1 :]]
                best = steps[-1]
        formula = best.formula
        return {
            "unit": unit,
            "threshold": float(cast(Tensor, self._thresholds)[unit]),
            "area": best.unit_area,
            "formula": None if formula is None else formula.to_json(),
            "text": self._text(formula),
            "iou": best.iou,
            "intersection": best.intersection,
            "formula_area": best.area,
            "n_leaves": 0 if formula is None else formula.n_leaves,
            "length_reference": 0 if formula is None else formula.length_reference,
            "by_length": [
                {"length": i, "iou": step.iou, "text": self._text(step.formula)}
                for i, step in enumerate(steps, 1)
            ],
            "beam_iou": of_beam.iou,
            "optimum_iou": None if optimum is None else optimum.iou,
            "optimum_text": None if optimum is None else self._text(optimum.formula),
            "certified": optimum is not None and optimum.certified,
            "ceiling": iou_ceiling(counts, concepts),
            "kind": unit_type(formula, self._same_category),
            "netdissect": self._best_concepts(unit, counts),
        }

    def _text(self, formula: Formula | None) -> str:
        return "" if formula is None else formula.to_str(self.concepts.name)

    def _same_category(self, a: int, b: int) -> float:
        """Whether two concepts are of one category: what stands for similar words where there are no vectors."""
        found = self.data.concepts
        return float(found[a].category == found[b].category)

    def _best_concepts(self, unit: int, counts: Tensor) -> Record:
        """Network Dissection's answer: the best concept of every category, and of all."""
        concepts, collected = self.concepts, cast(Collected, self._collected)
        categories = cast(list[str], concepts.categories)
        inside = (concepts.incidence @ counts.double()[:, None])[:, 0]
        area: Tensor | float = float(counts.sum())
        if self.hp.scope != "all":
            kinds = list(dict.fromkeys(categories))
            of = torch.tensor([kinds.index(name) for name in categories])
            area = collected.unit_area[self.hp.scope][unit][of]
        iou = iou_from_counts(inside, concepts.areas, area)
        names = [concept.name for concept in self.data.concepts.values()]
        return best_concepts(iou, categories, names)

    # ------------------------------------------------------------------ what it says about the network
    def formula_of(self, record: Record) -> Formula | None:
        """The formula of a unit's record."""
        return None if record["formula"] is None else formula_from_json(record["formula"])

    def firing_masks(self, images: Tensor, units: Sequence[int]) -> Tensor:
        """Where units fire on images [B, 3, H, W] in [0, 1]: bool [len(units), B, *mask_size], on the CPU."""
        thresholds = cast(Tensor, self._thresholds)
        size = int(getattr(self.data, "eval_batch_size", len(images)))
        parts = []
        for part in images.split(size):
            activations, _ = self._run(part.to(self.device, self._precision()))
            chosen = activations[:, list(units)].cpu()
            options = self._upsampling(tuple(images.shape[-2:]))
            parts.append(unit_masks(chosen, thresholds[list(units)], **options))
        return torch.cat(parts, 1)

    def _labels(self) -> Tensor | None:
        """Of every image the place of its class among the network's, -1 if it has none; None if nothing is known."""
        if "label" not in self.images or "logits" not in self.images:
            return None
        places = {name: k for k, name in enumerate(self.classes)}
        names = list(self.data.class_names)
        if len(self.classes) != self.images["logits"].shape[1] or not places.keys() & set(names):
            return None
        own = torch.tensor([*(places.get(name, -1) for name in names), -1])
        return own[self.images["label"]]

    def _analyse(self) -> None:
        maxima = self.images["maxima"]
        firing = maxima > cast(Tensor, self._thresholds)
        order = maxima.sort(dim=0, descending=True, stable=True).indices[: self.hp.top_images]
        for record in self.units:
            unit = record["unit"]
            fires = firing[:, unit]
            record["fires_on"] = int(fires.sum())
            record["top_images"] = [i for i in order[:, unit].tolist() if bool(fires[i])]
        self.accuracy: float | None = None
        labels = self._labels()
        if labels is not None:
            known = labels >= 0
            correct = (self.images["logits"].argmax(1) == labels)[known]
            self.accuracy = float(correct.double().mean())
            values = accuracy_when_firing(firing[known], correct)
            for record in self.units:
                value = float(values[record["unit"]])
                record["accuracy"] = None if value != value else value
        weight = self._weights()
        if weight is None:
            return
        tables = contributing_units(weight, self.hp.alpha)
        for name, table in zip(("feeds", "inhibits"), tables, strict=True):
            for record in self.units:
                classes = table[:, record["unit"]].nonzero()[:, 0].tolist()
                record[name] = [self._class(k) for k in classes]
        if labels is not None and self.hp.edits:
            self._try_edits(weight, labels)

    def _class(self, k: int) -> str:
        return self.classes[k] if k < len(self.classes) else str(k)

    def _weights(self) -> Tensor | None:
        """What units say about classes [K, U]: the last layer's weights if it sees their means, else correlations."""
        if "logits" not in self.images:
            return None
        n_classes = self.images["logits"].shape[1]
        network = cast(nn.Module, self.network)
        linear = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        self.weight_source: Literal["weights", "correlation"] = "weights"
        if linear and linear[-1].weight.shape == (n_classes, self.n_units):
            return linear[-1].weight.detach().float().cpu()
        self.weight_source = "correlation"
        return feature_correlation(self.images["means"], self.images["logits"]).float()

    def _try_edits(self, weight: Tensor, labels: Tensor) -> None:
        formulas = {}
        for record in self.units:
            formula = self.formula_of(record)
            if formula is not None:
                formulas[record["unit"]] = formula

        def sample(place: int) -> tuple[Tensor, Tensor]:
            batch = self.data.probing.batch([place])
            return batch["image"][0], batch["layers"][0]

        firing = self.images["maxima"] > cast(Tensor, self._thresholds)
        self.edits = try_edits(
            self.classify,
            sample,
            weight,
            formulas,
            labels,
            self.images["logits"].argmax(1),
            self.images["maxima"],
            firing,
            self.hp.edits,
        )

    def _log_everything(self) -> None:
        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        records = self.units
        values: dict[str, float] = {
            "units": len(records),
            "silent_units": sum(record["formula"] is None for record in records),
            "iou": mean([record["iou"] for record in records]),
            "ceiling": mean([record["ceiling"] for record in records]),
            "signatures": len(self.concepts.signatures),
            "distinct_formulas": len({r["text"] for r in records if r["formula"] is not None}),
        }
        for i in range(self.hp.max_length):
            values[f"iou_length_{i + 1}"] = mean([r["by_length"][i]["iou"] for r in records])
        if self.hp.certify is not None:
            values["certified"] = mean([record["certified"] for record in records])
            beaten = [record["optimum_iou"] > record["beam_iou"] for record in records]
            values["beam_suboptimal"] = mean(beaten)
        detectors = [r["netdissect"] for r in records if r["netdissect"]["detector"]]
        values["detectors"] = len(detectors)
        values["unique_detectors"] = len({found["label"] for found in detectors})
        for category in dict.fromkeys(cast(list[str], self.concepts.categories)):
            mine = {found["label"] for found in detectors if found["category"] == category}
            values[f"unique_detectors_{category}"] = len(mine)
        if self.accuracy is not None:
            values["accuracy"] = self.accuracy
            accuracy = [record["accuracy"] for record in records]
            when = torch.tensor([float("nan") if a is None else a for a in accuracy])
            for i in range(self.hp.max_length):
                iou = torch.tensor([record["by_length"][i]["iou"] for record in records])
                r, p = iou_accuracy_correlation(iou, when)
                if r == r:
                    values |= {f"iou_accuracy_r_{i + 1}": r, f"iou_accuracy_p_{i + 1}": p}
        if self.edits:
            values["edits"] = len(self.edits)
            values["edits_that_work"] = sum(edit.outcomes["success"] > 0 for edit in self.edits)
            values["edit_success"] = mean([edit.outcomes["success"] for edit in self.edits])
        # Every process has the same values, from all images and units.
        self.log_dict(
            {f"test/{name}": float(value) for name, value in values.items()}, rank_zero_only=False
        )


def _classified(network: nn.Module, images: Tensor) -> Any:
    """What a network returns; of a module that only has ``classify``, the logarithm of its probabilities."""
    if type(network).forward is PaperModule.forward:
        classify: Any = network.classify
        return classify(images).clamp_min(torch.finfo(torch.float32).tiny).log()
    return network(images)


def _iou(found: Explanation) -> float:
    return found.iou
