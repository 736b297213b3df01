import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from callbacks.sweep import format_summary, summarize, sweep

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("arguments", [[], ["--over", "data.split"], ["--over", "=1"]])
def test_malformed_axes(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="--over"):
        sweep(arguments)


@pytest.mark.slow
def test_a_sweep_over_splits_can_be_repeated(tmp_path: Path) -> None:
    from tests.suites.members import MEMBERS

    command = [sys.executable, "train.py", "sweep", *MEMBERS[0].arguments()]
    command += ["--over", "data.split=0,1", "--run.root", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "mean±std over 2 runs" in first.stdout
    summary = json.loads((tmp_path / "osrci-digits" / "sweep-summary.json").read_text())
    assert summary["metrics"]["test/margin/auroc"]["n"] == 2
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Seed set" not in again.stderr, "finished runs are not repeated"
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
