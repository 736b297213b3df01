import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from callbacks.summary import _panels, format_summary, formatted, summarize, write_summary


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
    assert "auroc %" in text
    assert "90.0 ± 10.0" in text
    assert "val" not in text
    assert summary["metrics"]["test/margin/auroc"]["values"] == [0.8, 0.9, 1.0]


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


def test_shares_are_percentages_and_other_numbers_are_not() -> None:
    assert formatted("test/margin/auroc", 0.96, 0.022) == "96.0 ± 2.2"
    assert formatted("test/zaq/W2A2", 0.852) == "85.2"
    assert formatted("test/translation/AtoB/object_miou", 79.41, 3.2) == "79.4 ± 3.2"
    assert formatted("test/coverage", 0.23414, 0.0061) == "0.2341 ± 0.0061"
    assert formatted("test/a/fid", 12.3456) == "12.35"


def fractions() -> dict[str, Any]:
    values = [
        {"data.labelled": share, "seed_everything": seed}
        for share in ("1%", "20%")
        for seed in ("0", "1", "2")
    ]
    results = [result(0.1 * i, [1], seed=i % 3) for i in range(6)]
    results[5]["metrics"]["test/margin/eer_threshold"] = math.inf
    results[4]["metrics"]["test/margin/extra"] = 7.0
    return summarize(results, values)


def test_what_is_not_a_repetition_has_a_mean_of_its_own(tmp_path: Path) -> None:
    summary = fractions()
    assert summary["by"] == ["data.labelled"]
    means = [g["metrics"]["test/margin/auroc"]["mean"] for g in summary["groups"]]
    assert means == pytest.approx([0.1, 0.4])
    assert summary["metrics"]["test/margin/auroc"]["mean"] == pytest.approx(0.25)
    assert summary["metrics"]["test/margin/extra"]["n"] == 1
    assert "test/margin/eer_threshold" not in summary["metrics"], "nothing finite"
    text = format_summary(summary)
    assert "data.labelled 20%, mean ± std of 3 runs" in text
    assert "7 (n=1)" in text
    paths = write_summary(summary, tmp_path / "sweep", ["auroc"])
    assert [path.name for path in paths] == [
        f"sweep-summary.{e}" for e in ("json", "txt", "csv", "png")
    ]
    assert json.loads(paths[0].read_text()) == summary
    rows = list(csv.DictReader(paths[2].open()))
    row = next(
        r for r in rows if r["data.labelled"] == "20%" and r["metric"] == "test/margin/auroc"
    )
    assert (float(row["mean"]), row["n"]) == (pytest.approx(0.4), "3")
    assert paths[3].stat().st_size > 5000


def test_other_values_alone_have_no_groups() -> None:
    results = [result(0.1, [1]), result(0.3, [1])]
    summary = summarize(results, [{"model.lr": "1"}, {"model.lr": "2"}])
    assert summary["by"] == []
    assert "metrics_without_duplicates" not in summary, "another rate is no duplicate"
    grouped = summarize(results, [{"model.lr": "1"}, {"model.lr": "2"}], by=["model.lr"])
    assert [g["runs"] for g in grouped["groups"]] == [1, 1]
    with pytest.raises(ValueError, match=r"--by model\.x is not swept; swept are model\.lr"):
        summarize(results, [{"model.lr": "1"}, {"model.lr": "2"}], by=["model.x"])


def test_groups_may_differ_in_their_data(tmp_path: Path) -> None:
    values = [{"data.dataset": d, "seed_everything": s} for d in ("digits", "mnist") for s in "01"]
    results = [
        result(0.5, [1], seed=int(v["seed_everything"]), dataset=v["data.dataset"]) for v in values
    ]
    summary = summarize(results, values)
    assert len(summary["groups"]) == 2
    assert summary["metrics"] == {}, "no mean over both"
    assert "all, mean" not in format_summary(summary)
    write_summary(summary, tmp_path / "sweep")


def test_the_panels_of_the_plot() -> None:
    summary = fractions()
    assert _panels(summary, ["test/margin/*"]).keys() == {"auroc", "extra"}
    assert _panels(summary, ["auroc"]) == {"auroc": ["test/margin/auroc"]}
    with pytest.raises(ValueError, match="--metric nothing is in no run; the metrics are auroc"):
        _panels(summary, ["nothing"])
