"""Runs every case of the golden files against our code: ``pytest tests/test_golden.py``.

``--golden-dir DIR`` runs the files of another folder. A case passes if our value ``a`` of every
expected value ``b`` has ``|a - b| <= tol * (1 + |b|)``. Nothing is skipped: a case without an
adapter fails, and so does a folder without cases.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden_adapters import adapter_for


def load_cases(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """All cases of a folder with the stem of their file."""
    return [
        (path.stem, case)
        for path in sorted(folder.glob("*.json"))
        for case in json.loads(path.read_text())["cases"]
    ]


def plain(value: Any) -> Any:
    """Tensors, arrays and tuples as nested lists of Python numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple | torch.Size):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    return value


def differences(actual: Any, expected: Any, tol: float, where: str = "") -> list[str]:
    """One line for every place in which ``actual``, made plain, is not ``expected``."""
    here = where or "value"
    if isinstance(expected, dict):
        if not isinstance(actual, dict):
            return [f"{here}: got {type(actual).__name__}, expected a dict"]
        lines = []
        for key, value in expected.items():
            if key in actual:
                lines += differences(actual[key], value, tol, f"{where}.{key}".lstrip("."))
            else:
                lines.append(f"{where}.{key}".lstrip(".") + ": missing")
        return lines
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            size = len(actual) if isinstance(actual, list) else "no list"
            return [f"{here}: got length {size}, expected {len(expected)}"]
        pairs = enumerate(zip(actual, expected, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, tol, f"{where}[{i}]")]
    number = isinstance(expected, int | float) and not isinstance(expected, bool)
    if number and isinstance(actual, int | float) and not isinstance(actual, bool):
        if math.isnan(expected) or math.isinf(expected):
            same = actual == expected or (math.isnan(actual) and math.isnan(expected))
        else:
            same = abs(actual - expected) <= tol * (1 + abs(expected))
    else:
        same = type(actual) is type(expected) and actual == expected
    return [] if same else [f"{here}: got {actual!r}, expected {expected!r}"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "paper" in metafunc.fixturenames:
        cases = load_cases(metafunc.config.getoption("golden_dir"))
        ids = [f"{paper}:{case['name']}" for paper, case in cases]
        metafunc.parametrize(("paper", "case"), cases, ids=ids)


def test_folder_has_cases(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("golden_dir")
    assert load_cases(folder), f"no golden case in {folder}"


def test_case(paper: str, case: dict[str, Any]) -> None:
    actual = adapter_for(paper, case["family"])(case)
    lines = differences(plain(actual), case["expected"], case["tol"])
    assert not lines, f"{len(lines)} differences:\n" + "\n".join(lines[:20])


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        (1.0, 1.1, False),
        (1.0, 1.0 + 1e-7, True),
        (3, 3.0, True),
        ([1.0], [1.0, 2.0], False),
        ([[1.0]], [1.0], False),
        (1.0, [1.0], False),
        ({}, {"a": 1}, False),
        ({"a": 1, "b": 2}, {"a": 1}, True),
        (True, 1, False),
        (1, True, False),
        (True, True, True),
        (None, None, True),
        (None, 0.0, False),
        ("a", "a", True),
        ("a", "b", False),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.nan, math.nan, True),
        (math.inf, 1.0, False),
        (1e308, math.inf, False),
    ],
)
def test_comparison(actual: Any, expected: Any, same: bool) -> None:
    assert (not differences(actual, expected, 1e-6)) == same


def test_unknown_family_fails() -> None:
    with pytest.raises(KeyError, match="no adapter"):
        adapter_for("osrci", "no_such_family")
