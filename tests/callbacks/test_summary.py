from typing import Any

import pytest

from callbacks.summary import format_summary, summarize


def result(auroc: float, known: list[int], seed: int = 0, **data: Any) -> dict[str, Any]:
    return {
        "experiment": "osrci-digits",
        "seed": seed,
        "data": {"dataset": "digits", "protocol": "neal", "known": known, **data},
        "metrics": {"test/margin/auroc": auroc, "val/x": 1.0},
    }


def test_mean_and_standard_deviation() -> None:
    summary = summarize([result(0.8, [1]), result(0.9, [2]), result(1.0, [3])])
    assert summary["metrics"]["test/margin/auroc"]["mean"] == pytest.approx(0.9)
    assert summary["metrics"]["test/margin/auroc"]["std"] == pytest.approx(0.1)
    assert "metrics_without_duplicates" not in summary
    text = format_summary(summary)
    assert "margin" in text
    assert "90.0±10.0" in text
    assert "val" not in text


def test_duplicate_splits_are_also_left_out() -> None:
    summary = summarize([result(0.8, [1]), result(0.8, [1]), result(1.0, [3])])
    assert summary["metrics"]["test/margin/auroc"]["mean"] == pytest.approx(2.6 / 3)
    assert summary["metrics_without_duplicates"]["test/margin/auroc"]["mean"] == pytest.approx(0.9)
    assert "metrics_without_duplicates" not in summarize(
        [result(0.8, [1]), result(0.9, [1], seed=1)]
    )


@pytest.mark.parametrize("what", ["dataset", "protocol"])
def test_protocols_are_never_mixed(what: str) -> None:
    with pytest.raises(ValueError, match=f"different {what}s .* never share a table"):
        summarize([result(0.8, [1]), result(0.9, [2], **{what: "other"})])
