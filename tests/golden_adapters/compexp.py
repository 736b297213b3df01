"""Network Dissection and Compositional Explanations: from golden cases to lightning_modules.dissection."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_modules.dissection.analysis import accuracy_when_firing, iou_accuracy_correlation
from lightning_modules.dissection.bounds import (
    exhaustive_search,
    iou_ceiling,
    number_of_formulas,
)
from lightning_modules.dissection.concepts import ConceptMasks
from lightning_modules.dissection.contributions import (
    activation_iou,
    contributing_units,
    copy_paste_outcomes,
    copy_paste_units,
    feature_correlation,
    logit_margin_change,
    unit_margins,
)
from lightning_modules.dissection.formulas import minor_negate, parse_formula
from lightning_modules.dissection.masks import (
    netdissect_normalize,
    rasterize_concepts,
    unit_masks,
    upsample_activations,
)
from lightning_modules.dissection.networks import PAD, BowmanEntailmentClassifier
from lightning_modules.dissection.nli import (
    nearest_neighbors,
    neighbor_mask,
    pmi,
    sentence_concepts,
    sentence_features,
    sentence_search,
)
from lightning_modules.dissection.quantiles import REFERENCE_LEVEL, quantile_threshold
from lightning_modules.dissection.scores import (
    best_category,
    best_labels,
    formula_score,
    netdissect_counts,
    netdissect_scores,
)
from lightning_modules.dissection.search import beam_search, expansion_counts

Case = dict[str, Any]
Values = dict[str, Any]


def _mask(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def _concepts(inputs: Case) -> ConceptMasks:
    return ConceptMasks.from_masks(_mask(inputs["concept_masks"]), inputs["labels"])


# ------------------------------------------------------------------ masks
def thresholds(case: Case) -> Values:
    inputs = case["inputs"]
    activations = torch.tensor(inputs["activations"], dtype=torch.float64)
    return {
        "thresholds": [quantile_threshold(activations, q) for q in inputs["quantiles"]],
        "thresholds_level_994_999_hazen": quantile_threshold(
            activations, level=REFERENCE_LEVEL, interpolation="hazen"
        ),
    }


def masks_of_units(case: Case) -> Values:
    inputs = case["inputs"]
    activations = torch.tensor(inputs["activations"])
    size = tuple(inputs["size"])
    masks = unit_masks(activations, torch.tensor(inputs["thresholds"]), size)
    return {
        "areas": masks.flatten(1).sum(1),
        "firing_images": [mask.flatten(1).any(1).nonzero()[:, 0] for mask in masks],
        "masks_unit_first": masks.int(),
        "row_sums_unit0": masks[0].sum(2),
        "upsampled_image0_unit0": upsample_activations(activations, size)[0, 0],
    }


def concept_masks(case: Case) -> Values:
    inputs = case["inputs"]
    labels, masks = rasterize_concepts(inputs["records"], tuple(inputs["size"]))
    values = {
        f"mask_of_label_{label}": mask.int() for label, mask in zip(labels, masks, strict=True)
    }
    return {
        **values,
        "labels": labels,
        "areas": ConceptMasks.from_masks(masks, labels).areas,
        "image_has_label": masks.flatten(2).any(2).T.int(),
    }


def normalized(case: Case) -> Values:
    return {"output": netdissect_normalize(torch.tensor(case["inputs"]["image"]))}


def tally(case: Case) -> Values:
    inputs = case["inputs"]
    size = tuple(inputs["size"])
    units = unit_masks(
        torch.tensor(inputs["activations"]), torch.tensor(inputs["thresholds"]), size
    )
    labels, masks = rasterize_concepts(inputs["records"], size)
    names, categories = (
        [inputs[column][label] for label in labels] for column in ("label_names", "label_category")
    )
    counts = netdissect_counts(units, masks, categories, "active")
    lite = []
    for unit, best in enumerate(best_labels(counts.iou, categories, names)):
        category = best_category(best)
        row: Values = {"unit": unit + 1, "category": category}
        row["label"], row["score"] = best[category]
        for key, (label, iou) in best.items():
            place = names.index(label)
            row[f"{key}-label"], row[f"{key}-iou"] = label, iou
            row[f"{key}-truth"] = counts.area[unit, place]
            row[f"{key}-activation"] = counts.unit_area[unit, place]
            row[f"{key}-intersect"] = counts.intersection[unit, place]
        lite.append(row)
    return {
        "lite_by_unit": lite,
        "iou_paper_category_images": netdissect_scores(units, masks, categories, "category"),
        "iou_all_images": netdissect_scores(units, masks),
    }


# ------------------------------------------------------------------ formulas and search
def formula_algebra(case: Case) -> Values:
    inputs = case["inputs"]
    masks, names = _mask(inputs["concept_masks"]), inputs["names"]
    results = []
    for text in inputs["formulas"]:
        formula = parse_formula(text)
        mask = formula.evaluate(masks)
        named = formula.to_str(names.__getitem__)
        if parse_formula(named, {name: i for i, name in enumerate(names)}) != formula:
            raise AssertionError(f"{named} is read as another formula")
        results.append(
            {
                "str": str(formula),
                "named": named,
                "named_sorted": formula.to_str(names.__getitem__, sort=True),
                "length_reference": formula.length_reference,
                "leaves": formula.leaves(),
                "n_leaves": formula.n_leaves,
                "area": mask.sum(),
                "mask": mask.int(),
                "hard_minor_negation": str(minor_negate(formula)),
            }
        )
    return {"results": results}


def search(case: Case) -> Values:
    inputs = case["inputs"]
    concepts = _concepts(inputs)
    unit = _mask(inputs["unit_mask"])
    found = beam_search(
        unit,
        concepts,
        inputs["beam_size"],
        inputs["max_length"],
        inputs["length_penalty"],
        inputs.get("candidate_limit"),
        mode="distinct" if case["family"] == "beam_search_distinct" else "reference",
    )
    counts = concepts.unit_counts(unit)[None].double()
    intersections = (concepts.incidence @ counts.T)[:, 0]
    return {
        "best_formula": str(found.formula),
        "best_score": found.score,
        "best_length_reference": found.formula.length_reference if found.formula else None,
        "best_leaf": str(found.best_leaf),
        "best_leaf_score": found.best_leaf_score,
        "final_beam_formulas": [str(formula) for formula, _ in found.beam],
        "final_beam_scores": [score for _, score in found.beam],
        "atom_area": concepts.areas,
        "atom_intersection": intersections,
        "atom_iou": formula_score(intersections, concepts.areas, int(unit.sum())),
    }


def expansions(case: Case) -> Values:
    inputs = case["inputs"]
    concepts = _concepts(inputs)
    areas, intersections = expansion_counts(
        parse_formula(inputs["formula"]), _mask(inputs["unit_mask"]), concepts
    )
    return {
        "pair_intersections": concepts.pair_intersections(),
        "areas": areas,
        "intersections": intersections,
    }


def exhaustive(case: Case) -> Values:
    inputs = case["inputs"]
    concepts, unit = _concepts(inputs), _mask(inputs["unit_mask"])
    length = inputs["max_length"]
    best, ties = exhaustive_search(unit, concepts, length)
    beam = beam_search(unit, concepts, 2, length, mode="reference")
    return {
        "best_score": best.score,
        "n_formulas_scored": number_of_formulas(len(concepts), length),
        "first_best_formula": str(best.formula),
        "n_best": ties,
        "beam2_reference_score": beam.score,
        "iou_ceiling": iou_ceiling(unit, concepts),
        "n_signatures": len(concepts.signatures),
    }


# ------------------------------------------------------------------ analysis
def contributions(case: Case) -> Values:
    inputs = case["inputs"]
    weight = torch.tensor(inputs["weight"])
    high, low = contributing_units(weight, inputs["alpha_global"])
    high_unit, low_unit = contributing_units(weight, inputs["alpha_unit"], "unit")
    layers = [torch.tensor(inputs[name]) for name in ("prev", "curr")]
    levels = [torch.tensor(inputs[f"{name}_thresholds"]) for name in ("prev", "curr")]
    return {
        "contributors": high.int(),
        "inhibitors": low.int(),
        "contributors_unit": high_unit.int(),
        "inhibitors_unit": low_unit.int(),
        "feature_correlation": feature_correlation(*layers),
        "activation_iou": activation_iou(*layers, *levels),
    }


def copy_paste(case: Case) -> Values:
    inputs = case["inputs"]
    weight, classes = torch.tensor(inputs["weight"]), (inputs["source"], inputs["target"])
    before, after = (torch.tensor(inputs[f"features_{when}"]) for when in ("before", "after"))
    change = logit_margin_change(weight, before, after, *classes)
    names = (inputs[f"{role}_name"] for role in ("source", "target", "patch"))
    return {
        "top_units": copy_paste_units(weight, *classes, inputs["k"]),
        "unit_margin_weights": unit_margins(weight, *classes),
        "unit_margin_change": change,
        "total_margin_change": change.sum(),
        **copy_paste_outcomes(inputs["predictions"], *names),
    }


def accuracy(case: Case) -> Values:
    inputs = case["inputs"]
    values = accuracy_when_firing(_mask(inputs["firing"]), _mask(inputs["correct"]))
    r, _ = iou_accuracy_correlation(torch.tensor(inputs["iou"], dtype=torch.float64), values)
    return {
        "accuracy": [None if value != value else value for value in values.tolist()],
        "pearson_r": r,
    }


# ------------------------------------------------------------------ sentences
def neighbors(case: Case) -> Values:
    inputs = case["inputs"]
    near = [nearest_neighbors(word, inputs["vectors"], inputs["k"]) for word in inputs["queries"]]
    return {"neighbors": near}


def neighbor_masks(case: Case) -> Values:
    inputs = case["inputs"]
    rest = (_mask(inputs["features"]), inputs["feature_names"], inputs["vectors"], inputs["k"])
    return {"masks": [neighbor_mask(query, *rest).int() for query in inputs["queries"]]}


def sentences(case: Case) -> Values:
    inputs = case["inputs"]
    names = inputs["feature_names"]
    features = _mask(inputs["features"])
    concepts = sentence_concepts(features, names, inputs["vectors"], mode="reference")
    found = sentence_search(
        torch.tensor(inputs["activations"]),
        concepts,
        inputs["beam_size"],
        inputs["max_length"],
        min_activations=0,
    )
    if found.formula is None or found.best_leaf is None:
        return {"best_formula": "None", "best_score": found.score}
    return {
        "best_formula": found.formula.to_str(names.__getitem__),
        "best_formula_sorted": found.formula.to_str(names.__getitem__, sort=True),
        "best_score": found.score,
        "length_reference": found.formula.length_reference,
        "best_leaf": found.best_leaf.to_str(names.__getitem__),
        "best_leaf_score": found.best_leaf_score,
    }


def rare_unit(case: Case) -> Values:
    active = torch.arange(2000) < case["inputs"]["n_positive"]
    concepts = sentence_concepts(active[:, None], ["pre:tok:dog"])
    return {"score": sentence_search(active.float(), concepts, min_activations=1000).score}


def metrics(case: Case) -> Values:
    mask, unit = (_mask(case["inputs"][name]) for name in ("mask", "activations"))
    counts = (mask & unit).sum(), mask.sum(), unit.sum()
    values = {name: formula_score(*counts, name) for name in ("iou", "precision", "recall")}
    nothing = torch.zeros((), dtype=torch.long)
    return {**values, "iou_empty": formula_score(nothing, nothing, nothing)}


def features_of_pairs(case: Case) -> Values:
    inputs = case["inputs"]
    found = sentence_features(
        inputs["pairs"], inputs["tags"], inputs["n_tokens"], include_pad=True, skip=inputs["skip"]
    )
    return {
        "features_on": [
            sorted(name for name, value in zip(found.names, row, strict=True) if value)
            for row in found.values.tolist()
        ],
        "overlap_ratio_with_pad": found.overlap,
    }


def information(case: Case) -> Values:
    inputs = case["inputs"]
    features, labels = _mask(inputs["features"]), torch.tensor(inputs["labels"])
    smoothings = [key.removeprefix("smoothing_") for key in case["expected"]]
    return {
        f"smoothing_{s}": pmi(features, labels, inputs["n_classes"], float(s)).clamp_min(-1e9)
        for s in smoothings
    }


@torch.no_grad()
def bowman_forward(case: Case) -> Values:
    inputs = case["inputs"]
    network = BowmanEntailmentClassifier(
        inputs["vocab_size"], inputs["embedding_dim"], inputs["hidden_dim"]
    ).eval()
    parameters = dict(network.named_parameters())
    for k, name in enumerate(inputs["parameter_order"]):
        i = torch.arange(parameters[name].numel(), dtype=torch.float64)
        scale = 1.2 if name.startswith("encoder") else 0.3
        parameters[name].copy_(
            (scale * torch.sin(2.4 * i + 1.3 * k + 0.2)).view_as(parameters[name])
        )
    i = torch.arange(network.bn.num_features, dtype=torch.float64)
    network.bn.running_mean.copy_(0.05 * torch.cos(i))
    network.bn.running_var.copy_(1 + 0.5 * torch.sin(i) ** 2)
    arguments = []
    for name in ("premises", "hypotheses"):
        sentences = [torch.tensor(words) for words in inputs[name]]
        lengths = torch.tensor([len(words) for words in sentences])
        arguments += [pad_sequence(sentences, padding_value=PAD), lengths]
    representation = network.representation(*arguments)
    return {
        "logits": network(*arguments),
        "repr_first_12": representation[:, :12],
        "repr_sum": representation.double().sum(1),
        "n_active": (representation > 0).sum(1),
    }


def bowman_sizes(case: Case) -> Values:
    bowman = BowmanEntailmentClassifier(**case["inputs"])
    minimal = BowmanEntailmentClassifier(**case["inputs"], head="minimal")
    total, small = (sum(p.numel() for p in network.parameters()) for network in (bowman, minimal))
    return {
        "bowman": total,
        "minimal": small,
        "bowman_without_embedding": total - bowman.encoder.emb.weight.numel(),
        "state_dict_keys": sorted(bowman.state_dict()),
    }


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    "quantile_threshold": thresholds,
    "unit_masks": masks_of_units,
    "concept_masks": concept_masks,
    "beam_search_random": search,
    "beam_search_disjoint": search,
    "beam_search_distinct": search,
    "beam_search_no_overlap": search,
    "expansion_counts": expansions,
    "exhaustive": exhaustive,
    "formula_algebra": formula_algebra,
    "netdissect_tally": tally,
    "contributions": contributions,
    "copy_paste": copy_paste,
    "accuracy_correlation": accuracy,
    "preprocess": normalized,
    "nli_neighbors": neighbors,
    "nli_neighbor_mask": neighbor_masks,
    "nli_search_reference": sentences,
    "nli_min_acts": rare_unit,
    "nli_metrics": metrics,
    "nli_sentence_features": features_of_pairs,
    "pmi": information,
    "bowman_forward": bowman_forward,
    "bowman_params": bowman_sizes,
}
