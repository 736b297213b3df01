"""PRDC: from golden cases to lightning_modules.metrics.prdc."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.metrics.prdc import (
    PrecisionRecallDensityCoverage,
    authenticity,
    choose_nearest_k,
    expected_coverage,
    expected_density,
    knn_radii,
    prdc,
    probabilistic_precision_recall,
    realism_score,
)

Case = dict[str, Any]
Values = dict[str, Any]


def _sets(inputs: Case) -> tuple[Tensor, Tensor]:
    real, fake = (
        torch.tensor(inputs[f"{side}_features"], dtype=torch.float64) for side in ("real", "fake")
    )
    return real, fake


def _one_precision(dtype: torch.dtype, inputs: Case) -> Values:
    real, fake = (part.to(dtype) for part in _sets(inputs))
    k = inputs["nearest_k"]
    values = prdc(real, fake, k, inclusive=inputs.get("inclusive", False))
    return values | {"real_radii": knn_radii(real, k), "fake_radii": knn_radii(fake, k)}


def four_metrics(case: Case) -> Values:
    double = _one_precision(torch.float64, case["inputs"])
    single = _one_precision(torch.float32, case["inputs"])
    for name, value in double.items():
        assert torch.allclose(value, single[name], rtol=1e-5, atol=1e-6), (name, value, single)
    return double


def radii(case: Case) -> Values:
    inputs = case["inputs"]
    features = torch.tensor(inputs["features"], dtype=torch.float64)
    return {"radii": knn_radii(features, inputs["nearest_k"])}


def analytic(case: Case) -> Values:
    sizes = [case["inputs"][name] for name in ("num_real", "num_fake", "nearest_k")]
    return {
        "expected_coverage": expected_coverage(*sizes),
        "expected_density": expected_density(*sizes),
    }


def choice_of_k(case: Case) -> Values:
    return {"nearest_k": choose_nearest_k(**case["inputs"])}


def probabilistic(case: Case) -> Values:
    inputs = case["inputs"]
    options = {name: inputs[name] for name in ("nearest_k", "scale") if name in inputs}
    precision, recall = probabilistic_precision_recall(*_sets(inputs), **options)
    return {"p_precision": precision, "p_recall": recall}


def realism(case: Case) -> Values:
    inputs = case["inputs"]
    options = {name: inputs[name] for name in ("nearest_k", "percentile") if name in inputs}
    return {
        "realism": realism_score(*_sets(inputs), **options),
        "realism_reference_squared": realism_score(*_sets(inputs), **options, variant="reference"),
    }


def authentic(case: Case) -> Values:
    authentic = authenticity(*_sets(case["inputs"]))
    return {"authentic": authentic, "authenticity": authentic.double().mean()}


def streaming(case: Case) -> Values:
    inputs = case["inputs"]
    real, fake = _sets(inputs)
    batches = [(batch, True) for batch in real.split(inputs["real_chunks"])]
    batches += [(batch, False) for batch in fake.split(inputs["fake_chunks"])]
    results = []
    for order in (batches, batches[::-1]):
        metric = PrecisionRecallDensityCoverage(nearest_k=inputs["nearest_k"])
        for batch, is_real in order:
            metric.update(batch, real=is_real)
        results.append(metric.compute())
    assert results[0] == results[1], "the order of the batches must not matter"
    return dict(results[0])


ADAPTERS: dict[str, Callable[[Case], Values]] = {
    **dict.fromkeys(
        (
            "gaussian",
            "real_outlier_attracts_fakes",
            "fake_outliers",
            "mode_drop",
            "disjoint_supports",
            "integer_grid_ties",
            "integer_lattice_duplicates",
            "every_real_twice",
            "fake_is_copy_of_real",
            "all_points_identical",
            "one_dimensional",
            "min_size_N_eq_k_plus",
            "far_from_origin_exact_integers",
            "small_variation_large_mean",
            "inclusive_le_integer_grid",
            "inclusive_le_identical",
            "inclusive_le_lattice",
        ),
        four_metrics,
    ),
    "radii_N_eq_k_plus": radii,
    "expected_coverage": analytic,
    "choose_k": choice_of_k,
    "p_precision_recall": probabilistic,
    "realism": realism,
    "authenticity": authentic,
    "streaming_update_order_invariance": streaming,
}
