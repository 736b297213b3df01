"""Compositional Explanations of a sentence-pair classifier as a program; run with ``train.py test``."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from tqdm import tqdm

from lightning_modules.arguments import demand_at_least
from lightning_modules.dissection.analysis import (
    accuracy_when_firing,
    iou_accuracy_correlation,
    unit_type,
    word_similarity,
)
from lightning_modules.dissection.bounds import LARGEST_LENGTH, certified_search, iou_ceiling
from lightning_modules.dissection.collection import fingerprint_of
from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.contributions import contributing_units, unit_margins
from lightning_modules.dissection.formulas import Formula, Leaf, formula_from_json
from lightning_modules.dissection.networks import LABELS
from lightning_modules.dissection.nli import (
    SentenceConcepts,
    SentenceFeatures,
    pmi,
    sentence_concepts,
    sentence_features,
    sentence_search,
)
from lightning_modules.dissection.nli_classifier import NLIClassifier, load_nli_classifier
from lightning_modules.dissection.nli_edits import (
    PARTS,
    Network,
    TaggedPair,
    WordUse,
    edit_pairs,
    editable,
    evaluate,
    wanted_words,
)
from lightning_modules.dissection.quantiles import quantile_threshold
from lightning_modules.dissection.records import Record, explain_units
from lightning_modules.dissection.scores import Metric, best_concepts, iou_from_counts
from lightning_modules.dissection.search import Explanation, Mode
from lightning_modules.files import read_cached, read_tensors, whole_file
from lightning_modules.nn.statistics import gather_over_ranks
from lightning_modules.paper import PaperModule
from lightning_modules.randomness import global_seed, mix
from lightning_modules.supervised.judge import fit_judge

PROBED_AT_ONCE = 128
"""Pairs that the network sees together; always the same ones, whatever the number of processes."""
RELEASED_BATCH = 16
"""Of the released code, whose batch norm sees these pairs only."""
SHOWN_PMI = 20
LIKELY = 10
"""Units that are looked at for each one whose words are tried."""


class NLIDissection(PaperModule):
    """Explains every unit of a sentence-pair classifier by a formula over words, parts of speech and overlap.

    Batches have ``premise``, ``hypothesis``, ``premise_tags``, ``hypothesis_tags`` (lists of words), ``label`` (-1 for
    none) and ``index``. The answer is the same for any number of processes: they share the pairs, then the units, which
    are dealt out one by one.

    Every unit's result is appended to ``units/rank-R.jsonl`` in the run directory as soon as it is known; a run that is
    continued (``--run.resume true``) computes only what is missing, if network, pairs and settings are the same.

    Args:
        classifier: checkpoint of :class:`NLIClassifier`, or one in the released format. None trains a small one here,
            on the DataModule's ``training_set()``, and leaves it in the run directory as ``classifier.pt``.
        embedding_dim: of the classifier trained here.
        hidden_dim: of the same.
        train_steps: batches of its training, with Adam and a learning rate that falls linearly to zero.
        train_batch_size: pairs of a batch.
        train_lr: learning rate at the start.
        n_tokens: most frequent words that are features.
        include_pad: count padding in the overlap, as the released code does by accident.
        vectors: file of word vectors for NEIGHBORS: text with a word and its numbers in each line (GloVe), or a ``.pt``
            file with a dictionary. None takes the classifier's own.
        neighbors: nearest words in NEIGHBORS; 0 does without.
        released_neighbors: look neighbours up as the released code does, so that there are none.
        beam_size: formulas kept in the search.
        max_length: operands of a formula.
        length_penalty: factor in (0, 1] per operand beyond the first.
        mode: ``distinct``, or the released code's ``reference``.
        metric: what the search maximises.
        quantile: a unit fires above its quantile ``1 - quantile``; above 0 by default.
        min_activations: a unit that is positive on fewer pairs gets no formula.
        certify: seconds per unit to prove that no formula of up to three operands is better; null for no proof. A
            better formula that turns up replaces the beam's.
            For ``metric: iou``, ``mode: distinct`` and no penalty only.
        train_mode_features: take activations in training mode, with dropout and the statistics of batches of 16 pairs,
            as the released code does by accident.
        units: which ones; None for all.
        smoothing: added to the counts behind the pointwise mutual information (Gururangan et al. 2018: 100).
        alpha: share of the weights that count as outstanding, see
            :func:`~lightning_modules.dissection.contributions.contributing_units`.
        edit_units: for every change of one label into another, so many units whose words are put in or taken out, those
            that fire and speak most for it; 0: no edits.
        edit_examples: pairs that are edited for each of them.
        examples: pairs kept with every unit, those that activate it most.

    Attributes:
        units: one record per unit, after the test, on every process.
        edits: one record per change of a label and unit, after the test, on every process.
        feature_pmi: of every label, the features with the highest pointwise mutual information.

    Raises:
        ValueError: impossible arguments.
        FileNotFoundError: the classifier or the vectors are missing.
        RuntimeError: the classifier's file holds something else.
    """

    def __init__(
        self,
        classifier: str | None = None,
        embedding_dim: int = 32,
        hidden_dim: int = 64,
        train_steps: int = 600,
        train_batch_size: int = 100,
        train_lr: float = 3e-3,
        n_tokens: int = 2000,
        include_pad: bool = False,
        vectors: str | None = None,
        neighbors: int = 5,
        released_neighbors: bool = False,
        beam_size: int = 10,
        max_length: int = 5,
        length_penalty: float = 1.0,
        mode: Mode = "distinct",
        metric: Metric = "iou",
        quantile: float | None = None,
        min_activations: int = 500,
        certify: float | None = None,
        train_mode_features: bool = False,
        units: Sequence[int] | None = None,
        smoothing: float = 100.0,
        alpha: float = 0.01,
        edit_units: int = 3,
        edit_examples: int = 50,
        examples: int = 4,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        least = {"train_batch_size": 2}
        least |= dict.fromkeys(("neighbors", "edit_units", "examples", "smoothing", "certify"), 0)
        least |= dict.fromkeys(("train_steps", "n_tokens", "beam_size", "max_length"), 1)
        least |= dict.fromkeys(("edit_examples", "embedding_dim", "hidden_dim"), 1)
        for name, value in least.items():
            demand_at_least(value, option="--model.", **{name: self.hp[name]})
        if quantile is not None and not 0 < quantile < 1:
            raise ValueError(f"quantile={quantile} must be a share in (0, 1) (--model.quantile)")
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha={alpha} must be in (0, 0.5) (--model.alpha)")
        if not 0 < length_penalty <= 1:
            raise ValueError(
                f"length_penalty={length_penalty} must be in (0, 1] (--model.length_penalty)"
            )
        for name, allowed in (("mode", Mode), ("metric", Metric)):
            if self.hp[name] not in get_args(allowed):
                raise ValueError(
                    f"{name}={self.hp[name]!r} must be one of {', '.join(get_args(allowed))} (--model.{name})"
                )
        if certify is not None and (metric, mode, length_penalty) != ("iou", "distinct", 1):
            raise ValueError(
                f"--model.certify {certify} needs metric=iou, mode=distinct and length_penalty=1, not {metric}, {mode} "
                f"and {length_penalty}"
            )
        self.classifier = None if classifier is None else load_nli_classifier(classifier)
        self._vectors = None if vectors is None else read_vectors(vectors)
        self._rows: list[dict[str, Any]] = []
        self.units: list[Record] = []
        self.edits: list[Record] = []
        self.feature_pmi: dict[str, list[tuple[str, float]]] = {}

    # ------------------------------------------------------------------ the classifier
    def setup(self, stage: str) -> None:
        """Trains the classifier, if none was given.

        Raises:
            MisconfigurationException: the data cannot train one.
            ValueError: a unit that the classifier has not got.
        """
        if self.classifier is None:
            data = getattr(self.trainer, "datamodule", None)
            if not hasattr(data, "training_set"):
                raise MisconfigurationException(
                    "there is nothing to train a classifier on: give one by --model.classifier FILE"
                )
            self.classifier = self._trained(data)
        width = self.classifier.network.classifier.in_features
        unknown = [unit for unit in self.hp.units or [] if not 0 <= unit < width]
        if unknown:
            raise ValueError(
                f"units {unknown} are none of the classifier's 0 to {width - 1} (--model.units)"
            )

    def _trained(self, data: Any) -> NLIClassifier:
        """The same classifier on all ranks; an interrupted run finds its own again."""
        kept: Any = None
        if self.trainer.is_global_zero:
            names = ("embedding_dim", "hidden_dim", "train_steps", "train_batch_size", "train_lr")
            pairs = data.training_set()
            settings = [global_seed(), *(self.hp[name] for name in names), data.vocabulary]
            key = fingerprint_of(settings, pairs.labels.tolist(), pairs.pairs)
            path = Path(self.trainer.default_root_dir) / "classifier.pt"
            found = read_cached(path)
            if found is not None and found.get("trained_as") == key:
                kept = found
            if kept is None:
                kept = {
                    **self._train(pairs, data.vocabulary).reference_checkpoint(),
                    "trained_as": key,
                }
                with whole_file(path) as file:
                    torch.save(kept, file)
        module = NLIClassifier.from_reference(self.trainer.strategy.broadcast(kept))
        return module.eval().requires_grad_(False)

    def _train(self, pairs: Any, vocabulary: Sequence[str]) -> NLIClassifier:
        def build() -> Any:
            module = NLIClassifier(self.hp.embedding_dim, self.hp.hidden_dim)
            return module.use_vocabulary(vocabulary)

        threads = torch.get_num_threads()
        # Rounding depends on the number of threads, and Lightning sets it by the number of processes.
        torch.set_num_threads(1)
        try:
            trained: NLIClassifier = fit_judge(
                build,
                pairs,
                self.hp.train_steps,
                self.hp.train_batch_size,
                self.hp.train_lr,
                seed=global_seed(),
                keys=("sentence pairs",),
                device=self.trainer.strategy.root_device,
                description="sentence-pair classifier",
            )
        finally:
            torch.set_num_threads(threads)
        return trained

    # ------------------------------------------------------------------ the probing set
    def on_test_start(self) -> None:
        """Forgets an earlier test."""
        self._rows = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keeps the pairs; the network sees them when all are there, in batches that no number of processes changes.

        Raises:
            MisconfigurationException: batches of another kind.
        """
        columns = ("premise", "hypothesis", "premise_tags", "hypothesis_tags")
        missing = [name for name in (*columns, "label", "index") if name not in batch]
        if missing:
            raise MisconfigurationException(
                f"NLIDissection needs pairs of tagged sentences, a batch lacks {', '.join(missing)}; use NLIDataModule"
            )
        values = [batch[name] for name in columns]
        numbers = batch["index"].tolist(), batch["label"].tolist()
        for index, label, *sentences in zip(*numbers, *values, strict=True):
            premise, hypothesis, *tags = map(tuple, sentences)
            pair = TaggedPair((premise, hypothesis), (tags[0], tags[1]))
            self._rows.append({"index": index, "label": label, "pair": pair})

    def on_test_epoch_end(self) -> None:
        """Explains the units, and edits sentences."""
        hp = self.hp
        rows = [row for part in gather_over_ranks(self.trainer, self._rows) for row in part]
        rows.sort(key=lambda row: row["index"])
        self._rows = []
        pairs: list[TaggedPair] = [row["pair"] for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        features = sentence_features(
            [pair.words for pair in pairs],
            [pair.tags for pair in pairs],
            hp.n_tokens,
            hp.include_pad,
        )
        with self._probed() as classifier:
            network = evaluate(
                classifier.representation, classifier.network.classify, PROBED_AT_ONCE
            )
            activations, logits = self._activations(pairs, classifier)
            vectors = self._word_vectors(pairs)
            concepts = sentence_concepts(
                features.values,
                features.names,
                vectors,
                hp.neighbors,
                hp.mode,
                hp.released_neighbors,
            )
            predictions = logits.argmax(1)
            self.units = self._explain(pairs, labels, concepts, activations, predictions, vectors)
            self.edits = []
            if hp.edit_units:
                self.edits = self._edit(
                    pairs, labels, features.names, activations, predictions, network
                )
        self._summarise(features, labels, logits)

    @contextmanager
    def _probed(self) -> Iterator[NLIClassifier]:
        """The classifier in float64, in which the order of a sum does not decide whether a unit fires."""
        assert self.classifier is not None
        before = self.classifier.training, self.classifier.dtype
        try:
            yield self.classifier.double().train(self.hp.train_mode_features)
        finally:
            self.classifier.to(before[1]).train(before[0])

    def _activations(
        self, pairs: Sequence[TaggedPair], classifier: NLIClassifier
    ) -> tuple[Tensor, Tensor]:
        """Units [n, U] and logits [n, K] of all pairs; every rank runs its part of the batches."""
        size = RELEASED_BATCH if self.hp.train_mode_features else PROBED_AT_ONCE
        network = evaluate(classifier.representation, classifier.network.classify, size)
        starts = range(0, len(pairs), size)
        mine = starts[self.global_rank :: self.trainer.world_size]
        found = {}
        for start in self._bar(mine, "activations"):
            batch = [pair.with_words("pre", pair.words[0]) for pair in pairs[start : start + size]]
            with torch.random.fork_rng(devices=self._devices()):
                torch.manual_seed(mix(global_seed(), "dropout of the probed network", start))
                if self.hp.train_mode_features and len(batch) == 1:
                    classifier.eval()  # one pair has no batch statistics
                found[start] = network(batch)
        merged: dict[int, tuple[Tensor, Tensor]] = {}
        for part in gather_over_ranks(self.trainer, found):
            merged |= part
        units, logits = zip(*(merged[start] for start in starts), strict=True)
        return torch.cat(units), torch.cat(logits)

    def _devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _bar(self, work: Any, what: str) -> Any:
        return tqdm(work, desc=what, leave=False, disable=not self.trainer.is_global_zero)

    def _word_vectors(self, pairs: Sequence[TaggedPair]) -> dict[str, Tensor]:
        """Vectors of the words that occur."""
        if not self.hp.neighbors:
            return {}
        assert self.classifier is not None
        known = self.classifier.word_vectors() if self._vectors is None else self._vectors
        words = dict.fromkeys(word for pair in pairs for part in pair.words for word in part)
        return {word: known[word].double() for word in words if word in known}

    # ------------------------------------------------------------------ units
    def _fires(self, activations: Tensor) -> Tensor:
        """Bool [n, U], as :func:`sentence_search` sees it."""
        if self.hp.quantile is None:
            return activations > 0
        return activations > quantile_threshold(activations.float(), self.hp.quantile)

    def _explain(
        self,
        pairs: Sequence[TaggedPair],
        labels: Tensor,
        concepts: SentenceConcepts,
        activations: Tensor,
        predictions: Tensor,
        vectors: dict[str, Tensor],
    ) -> list[Record]:
        names = concepts.concepts.names
        words = {label: name.split(":", 2)[2] for label, name in names.items()}
        similarity = word_similarity(words, vectors)
        fires, gold = self._fires(activations), labels >= 0
        accuracy = accuracy_when_firing(fires[gold], (predictions == labels)[gold])
        weight = self._weight()
        outstanding = contributing_units(weight, self.hp.alpha)

        def record(unit: int) -> Record:
            strongest = activations[:, unit].sort(descending=True, stable=True).indices
            shown = [i for i in strongest[: self.hp.examples].tolist() if fires[i, unit]]
            feeds, inhibits = (
                [LABELS[k] for k in table[:, unit].nonzero()[:, 0].tolist()]
                for table in outstanding
            )
            found = self._search(activations[:, unit], fires[:, unit], concepts)
            tree = found["formula"]
            when = float(accuracy[unit])
            return {
                "unit": unit,
                **found,
                "fires_on": int(fires[:, unit].sum()),
                "kind": unit_type(tree and formula_from_json(tree), similarity),
                "accuracy": when if math.isfinite(when) else None,
                "weights": dict(zip(LABELS, weight[:, unit].tolist(), strict=True)),
                "feeds": feeds,
                "inhibits": inhibits,
                "examples": [
                    {
                        "index": i,
                        "premise": pairs[i].texts[0],
                        "hypothesis": pairs[i].texts[1],
                        "activation": float(activations[i, unit]),
                        "label": LABELS[labels[i]] if gold[i] else None,
                        "predicted": LABELS[predictions[i]],
                    }
                    for i in shown
                ],
            }

        wanted = range(activations.shape[1]) if self.hp.units is None else sorted({*self.hp.units})
        areas = dict(enumerate(fires.sum(0).tolist()))
        key = self._key(pairs, labels, vectors)
        return explain_units(self.trainer, list(wanted), areas, key, record)

    def _weight(self) -> Tensor:
        """What units say about labels, [K, U]."""
        assert self.classifier is not None
        return self.classifier.network.classifier.weight.detach().double().cpu()

    def _search(self, activations: Tensor, fires: Tensor, concepts: SentenceConcepts) -> Record:
        """The best explanation, and those of up to 1, 2, ... operands."""
        hp = self.hp
        steps: list[Explanation] = []
        for length in range(1, hp.max_length + 1):
            options = (hp.length_penalty, hp.quantile, hp.min_activations, hp.metric)
            steps.append(sentence_search(activations, concepts, hp.beam_size, length, *options))
        best, searched, optimum = steps[-1], steps[-1].iou, None
        if hp.certify is not None and best.formula is not None:
            proved = min(hp.max_length, LARGEST_LENGTH)
            start = steps[proved - 1]
            optimum = certified_search(fires, concepts.concepts, proved, hp.certify, start)
            steps[proved - 1 :] = [
                step if step.iou > optimum.iou else optimum for step in steps[proved - 1 :]
            ]
            best = steps[-1]

        def text(formula: Formula | None) -> str:
            return "" if formula is None else formula.to_str(concepts.concepts.name)

        formula = best.formula
        return {
            "area": best.unit_area,
            "formula": None if formula is None else formula.to_json(),
            "text": text(formula),
            "iou": best.iou,
            "score": best.score,
            "intersection": best.intersection,
            "formula_area": best.area,
            "n_leaves": 0 if formula is None else formula.n_leaves,
            "length_reference": 0 if formula is None else formula.length_reference,
            "by_length": [
                {"length": i, "iou": step.iou, "text": text(step.formula)}
                for i, step in enumerate(steps, 1)
            ],
            "beam_iou": searched,
            "optimum_iou": None if optimum is None else optimum.iou,
            "optimum_text": None if optimum is None else text(optimum.formula),
            "certified": optimum is not None and optimum.certified,
            "ceiling": iou_ceiling(fires, concepts.concepts),
            "netdissect": self._best_features(fires, concepts.concepts),
        }

    def _best_features(self, fires: Tensor, concepts: ConceptMasks) -> Record:
        """Network Dissection's answer: the best feature of every kind (``hyp:tok``), and of all."""
        counts = concepts.unit_counts(fires)
        inside = (concepts.incidence @ counts.double()[:, None])[:, 0]
        iou = iou_from_counts(inside, concepts.areas, float(counts.sum()))
        leaves = [i for i, atom in enumerate(concepts.atoms) if isinstance(atom, Leaf)]
        names = [concepts.name(concepts.atoms[i].leaves()[0]) for i in leaves]
        kinds = [name.rsplit(":", 1)[0] if name[:3] == "oth" else name[:7] for name in names]
        return best_concepts(iou[leaves], kinds, names)

    def _key(self, pairs: Any, labels: Tensor, vectors: dict[str, Tensor]) -> str:
        """Of everything that a record depends on."""
        assert self.classifier is not None
        free = ("classifier", "vectors", "units", "edit_units", "edit_examples", "smoothing")
        settings = {name: value for name, value in self.hp.items() if name not in free}
        return fingerprint_of(
            self.classifier.network,
            self.classifier.vocabulary,
            *(list(pairs), labels.tolist(), {w: v.tolist() for w, v in vectors.items()}),
            *(settings, global_seed() if self.hp.train_mode_features else None),
        )

    # ------------------------------------------------------------------ edits
    def _edit(
        self,
        pairs: Sequence[TaggedPair],
        labels: Tensor,
        names: Sequence[str],
        activations: Tensor,
        predictions: Tensor,
        network: Network,
    ) -> list[Record]:
        """Every change of one label into another, with the units that speak most for it.

        What a unit may add to the margin is its weight times its spread; units whose words fit few sentences have less.
        """
        weight, spread = self._weight(), activations.double().std(0)
        uses = {part: WordUse.of(pairs, part) for part in PARTS}
        words, texts = {}, {}
        for record in self.units:
            tree = record["formula"]
            found = wanted_words(tree and formula_from_json(tree), names)
            if found:
                words[record["unit"]], texts[record["unit"]] = found, record["text"]
        right = predictions == labels
        tasks = []
        for source, target in permutations(range(len(LABELS)), 2):
            chosen = (right & (labels == source)).nonzero()[: self.hp.edit_examples, 0]
            given = [pairs[i] for i in chosen.tolist()]
            gain = unit_margins(weight, source, target) * spread
            likely = sorted(words, key=lambda unit: (-float(gain[unit]), unit))
            use = {
                unit: float(gain[unit]) * editable(given, words[unit], uses)
                for unit in likely[: LIKELY * self.hp.edit_units]
            }
            order = sorted(use, key=lambda unit: (-use[unit], unit))
            tasks += [
                (source, target, unit, given)
                for unit in order[: self.hp.edit_units]
                if use[unit] > 0
            ]
        done = {}
        for number in self._bar(
            range(self.global_rank, len(tasks), self.trainer.world_size), "edits"
        ):
            source, target, unit, given = tasks[number]
            done[number] = {
                "unit": unit,
                "text": texts[unit],
                "source": LABELS[source],
                "target": LABELS[target],
                "margin": float(weight[target, unit] - weight[source, unit]),
                **edit_pairs(given, words[unit], uses, network, unit, source, target),
            }
        for part in gather_over_ranks(self.trainer, done):
            done |= part
        return [done[number] for number in sorted(done)]

    # ------------------------------------------------------------------ summary
    def _summarise(self, features: SentenceFeatures, labels: Tensor, logits: Tensor) -> None:
        gold = labels >= 0
        right = (logits.argmax(1) == labels)[gold]
        records = [record for record in self.units if record["formula"] is not None]
        values: dict[str, float] = {
            "pairs": len(labels),
            "features": len(features.names),
            "accuracy": _mean(right.tolist()),
            "units": len(self.units),
            "silent_units": len(self.units) - len(records),
            "iou": _mean([record["iou"] for record in records]),
            "ceiling": _mean([record["ceiling"] for record in records]),
            "distinct_formulas": len({record["text"] for record in records}),
        }
        when = [math.nan if r["accuracy"] is None else r["accuracy"] for r in records]
        for i in range(self.hp.max_length):
            iou = [record["by_length"][i]["iou"] for record in records]
            r, p = iou_accuracy_correlation(torch.tensor(iou), torch.tensor(when))
            values[f"iou_length_{i + 1}"] = _mean(iou)
            values |= {f"iou_accuracy_r_{i + 1}": r, f"iou_accuracy_p_{i + 1}": p}
        if self.hp.certify is not None:
            values["certified"] = _mean([record["certified"] for record in records])
            if self.hp.max_length <= LARGEST_LENGTH:
                beaten = [record["optimum_iou"] > record["beam_iou"] for record in records]
                values["beam_suboptimal"] = _mean(beaten)
        values["edits"] = len(self.edits)
        values["edits_that_work"] = sum(edit["success"] > 0 for edit in self.edits)
        for name, count in (("", "tried"), ("control_", "control_tried")):
            whole = sum(edit[count] for edit in self.edits)
            share = [edit[count] * edit.get(f"{name}success", 0) for edit in self.edits]
            values[f"{name}edit_success"] = sum(share) / whole if whole else math.nan
        table = pmi(features.values, labels, len(LABELS), self.hp.smoothing)
        for k, label in enumerate(LABELS):
            scores = table[:, k].nan_to_num(-math.inf, neginf=-math.inf)
            top = scores.sort(descending=True, stable=True).indices[:SHOWN_PMI].tolist()
            self.feature_pmi[label] = [
                (features.names[i], float(scores[i])) for i in top if scores[i] > 0
            ]
        # Every process has the same values, from all pairs and units.
        logged = {f"test/{k}": float(v) for k, v in values.items() if math.isfinite(v)}
        self.log_dict(logged, rank_zero_only=False)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def read_vectors(path: str | Path) -> dict[str, Tensor]:
    """Word vectors from a text file (a word and its numbers in each line) or a ``.pt`` file with a dictionary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line, or the file, holds something else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no word vectors at {path}; give a file by --model.vectors FILE, or null for the classifier's own"
        )
    vectors: dict[str, Tensor] = {}
    if path.suffix == ".pt":
        table = read_tensors(path, "file of word vectors (--model.vectors)")
        if not isinstance(table, dict):
            raise ValueError(f"{path} holds a {type(table).__name__}, not vectors by word")
        return {str(word): torch.as_tensor(vector) for word, vector in table.items()}
    size = 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *values = line.rstrip().split(" ")
            if number == 1 and len(values) == 1:
                continue  # word2vec's count and size
            try:
                vectors[word] = torch.tensor([float(value) for value in values])
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no word with numbers") from error
            size = size or len(values)
            if len(values) != size or not values:
                raise ValueError(
                    f"{path}, line {number} has {len(values)} numbers instead of {size}"
                )
    return vectors
