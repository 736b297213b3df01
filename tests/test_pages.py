"""What the pages show of code and results is what code and results are."""

from pathlib import Path

import pytest

from docs.generate import ROOT, filled_in, pages, source


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert filled_in(text, page) == text, "run python docs/generate.py"


def test_a_part_is_made_anew() -> None:
    page = "before\n<!-- begin source docs/generate.py pages -->\nstale\n<!-- end -->\nafter\n"
    made = filled_in(page, Path("page.md"))
    assert made.startswith(
        "before\n<!-- begin source docs/generate.py pages -->\n```python\ndef pages"
    )
    assert made.endswith("\n```\n<!-- end -->\nafter\n")
    assert "stale" not in made
    assert "The pages that may" not in made, "docstrings are left out"
    assert filled_in(made, Path("page.md")) == made


def test_what_cannot_be_made_names_the_page() -> None:
    page = "<!-- begin picture x -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match=r"page\.md: unknown part 'picture'"):
        filled_in(page, Path("page.md"))
    with pytest.raises(ValueError, match="has no Missing"):
        source("docs/generate.py", "Missing")
