from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_modules.metrics.open_set import (
    OpenSetMetrics,
    acceptance_threshold,
    macro_f1,
    open_set_metrics,
    openness,
    oscr_curve,
)
from tests.processes import from_ranks, rank_file, run_ranks


def problem(seed: int = 0, knowns: int = 40, unknowns: int = 30) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        # Coarse, so that there are many ties.
        "known_scores": np.round(random.normal(0, 1, knowns) * 2) / 2,
        "unknown_scores": np.round(random.normal(1, 1, unknowns) * 2) / 2,
        "known_predictions": random.integers(0, 3, knowns),
        "target": random.integers(0, 3, knowns) * (random.random(knowns) < 0.8),
    }


@pytest.mark.parametrize("seed", range(3))
def test_all_metrics_by_loops(seed: int) -> None:
    p = problem(seed)
    known, unknown = p["known_scores"].tolist(), p["unknown_scores"].tolist()
    right = (p["known_predictions"] == p["target"]).tolist()
    metrics = open_set_metrics(**p)

    def wins(k: float, u: float) -> float:
        return 1.0 if k < u else 0.5 if k == u else 0.0

    pairs = len(known) * len(unknown)
    assert metrics["auroc"] == pytest.approx(
        sum(wins(k, u) for k in known for u in unknown) / pairs
    )
    slow = sum(wins(k, u) for k, ok in zip(known, right, strict=True) if ok for u in unknown)
    assert metrics["openauc"] == pytest.approx(slow / pairs)
    assert metrics["closed_accuracy"] == pytest.approx(sum(right) / len(known))

    def average_precision(positive: list[float], negative: list[float]) -> float:
        total, recall = 0.0, 0.0
        for t in sorted({*positive, *negative}, reverse=True):
            hits = sum(v >= t for v in positive)
            false = sum(v >= t for v in negative)
            total += (hits / len(positive) - recall) * hits / (hits + false)
            recall = hits / len(positive)
        return total

    assert metrics["aupr_unknown"] == pytest.approx(average_precision(unknown, known))
    assert metrics["aupr_known"] == pytest.approx(
        average_precision([-v for v in known], [-v for v in unknown])
    )
    flagged = [
        sum(k >= t for k in known) / len(known)
        for t in sorted({*known, *unknown})
        if sum(u >= t for u in unknown) / len(unknown) >= 0.95
    ]
    assert metrics["fpr95"] == pytest.approx(min(flagged))


def test_perfect_and_reversed_scores() -> None:
    best = open_set_metrics([0.0, 1.0], [2.0, 3.0])
    assert best == {"auroc": 1.0, "aupr_unknown": 1.0, "aupr_known": 1.0, "fpr95": 0.0}
    worst = open_set_metrics([2.0, 3.0], [0.0, 1.0])
    assert worst["auroc"] == 0.0
    assert worst["fpr95"] == 1.0


def test_logits_give_the_predictions() -> None:
    p = problem()
    logits = torch.nn.functional.one_hot(torch.tensor(p["known_predictions"]), 3).float()
    from_logits = open_set_metrics(
        torch.tensor(p["known_scores"]), torch.tensor(p["unknown_scores"]), logits,
        torch.tensor(p["target"]),
    )  # fmt: skip
    assert from_logits == open_set_metrics(**p)


@pytest.mark.parametrize("seed", range(3))
def test_area_under_the_oscr_curve_is_openauc(seed: int) -> None:
    p = problem(seed)
    ccr, fpr = oscr_curve(**p)
    assert ccr[0] == fpr[0] == 0
    assert fpr[-1] == 1
    metrics = open_set_metrics(**p)
    assert ccr[-1] == pytest.approx(metrics["closed_accuracy"])
    assert np.trapezoid(ccr, fpr) == pytest.approx(metrics["openauc"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1.0]), "known_scores is empty"),
        (([1.0], []), "unknown_scores is empty"),
        (([1.0, float("nan")], [1.0]), "nan"),
        (([1.0], [2.0], None, None, [0]), "target"),
        (([1.0], [2.0], None, [0, 1], [0]), "length"),
    ],
)
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_set_metrics(*arguments)


def test_threshold_accepts_the_asked_share_and_no_more_than_needed() -> None:
    scores = np.random.default_rng(0).normal(size=137)
    for rate in (0.01, 0.5, 0.95, 1.0):
        threshold = acceptance_threshold(scores, rate)
        assert (scores <= threshold).mean() >= rate
        assert (scores < threshold).mean() < rate
    assert acceptance_threshold(list(range(20)), 0.95) == 18
    with pytest.raises(ValueError, match="rate"):
        acceptance_threshold(scores, 0.0)


def test_macro_f1_by_hand() -> None:
    scores, labels = [0.1, 0.9, 0.2, 0.8, 0.3], [0, 0, 1, -1, -1]
    predictions = [0, 0, 1, 1, 1]
    # Decisions at 0.5: 0, unknown, 1, unknown, 1. F1: class 0 2/3, class 1 2/3, unknown 1/2.
    assert macro_f1(scores, labels, predictions, 0.5, 2) == pytest.approx(
        (2 / 3 + 2 / 3 + 1 / 2) / 3
    )
    # A third class that never occurs counts as 0.
    assert macro_f1(scores, labels, predictions, 0.5, 3) == pytest.approx(
        (2 / 3 + 2 / 3 + 1 / 2) / 4
    )


def test_openness_of_the_usual_problems() -> None:
    table = {(6, 4): 0.1339, (4, 10): 0.3333, (4, 50): 0.6286, (20, 180): 0.5736, (10, 0): 0.0}
    for (known, unknown), value in table.items():
        assert openness(known, unknown) == pytest.approx(value, abs=1e-4)
    with pytest.raises(ValueError):
        openness(0, 3)


# ------------------------------------------------------------------ torchmetrics
def rows(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, (60,), generator=generator)
    return {
        "scores": torch.randn(60, generator=generator) - labels.clamp(max=0),
        "labels": labels,
        "predictions": torch.randint(0, 3, (60,), generator=generator),
        "index": torch.randperm(1000, generator=generator)[:60],
    }


def direct(data: dict[str, torch.Tensor]) -> dict[str, float]:
    known = data["labels"] >= 0
    return open_set_metrics(
        data["scores"][known],
        data["scores"][~known],
        target=data["labels"][known],
        known_predictions=data["predictions"][known],
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metric_over_batches_drops_duplicates() -> None:
    data, metric = rows(), OpenSetMetrics()
    for start in range(0, 60, 16):
        metric.update(**{name: column[start : start + 16] for name, column in data.items()})
    metric.update(**{name: column[:7] for name, column in data.items()})
    assert metric.compute() == pytest.approx(direct(data))
    metric.reset()
    with pytest.raises(ValueError, match="none of 0 is known"):
        metric.compute()


@pytest.mark.parametrize(("keep", "missing"), [(True, "unknown"), (False, "known")])
def test_metric_needs_both_sides(keep: bool, missing: str) -> None:
    data, metric = rows(), OpenSetMetrics()
    chosen = (data["labels"] >= 0) == keep
    metric.update(**{name: column[chosen] for name, column in data.items()})
    with pytest.raises(ValueError, match=f"is {missing}"):
        metric.compute()


def gathered_metrics(folder: Path) -> None:
    rank = dist.get_rank()
    data = rows()
    # A padded shard: both ranks have rows 25 to 34.
    part = slice(0, 35) if rank == 0 else slice(25, 60)
    shared = OpenSetMetrics()
    shared.update(**{name: column[part] for name, column in data.items()})
    results = [shared.compute()]
    for empty_rank in (0, 1):
        metric = OpenSetMetrics()
        if rank != empty_rank:
            metric.update(**data)
            metric.update(**data)
        results.append(metric.compute())
    torch.save(results, rank_file(folder))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_metric_over_processes_also_when_one_has_no_batch(tmp_path: Path) -> None:
    run_ranks(gathered_metrics, tmp_path)
    for results in from_ranks(tmp_path):
        for result in results:
            assert result == pytest.approx(direct(rows()))
