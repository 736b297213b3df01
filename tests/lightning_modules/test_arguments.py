from typing import Any, Literal

import pytest

from lightning_modules.arguments import demand_at_least, demand_choice


def test_limits() -> None:
    demand_at_least(1, most=3, first=1, last=3, absent=None)
    with pytest.raises(ValueError, match=r"^width=0 must be at least 1$"):
        demand_at_least(1, depth=1, width=0)
    with pytest.raises(ValueError, match=r"^n=4 must be at least 1 and at most 3 \(--data\.n\)$"):
        demand_at_least(1, most=3, option="--data.", n=4)
    with pytest.raises(ValueError, match="weight=nan"):
        demand_at_least(0, weight=float("nan"))


@pytest.mark.parametrize("choices", [("a", "b"), {"a": 1, "b": 2}, Literal["a", "b"]])
def test_choices(choices: Any) -> None:
    demand_choice(choices, kind="b")
    with pytest.raises(
        ValueError, match=r"^unknown kind='c'; choose one of a, b \(--model\.kind\)$"
    ):
        demand_choice(choices, option="--model.", kind="c")
