"""Fills in the parts of the Markdown pages that are made from code and results, so that they cannot disagree with them.

python docs/generate.py               # rewrites README.md and docs/**/*.md
python docs/generate.py --check       # names what is out of date, for the tests
python docs/generate.py --runs RUNS   # collects docs/results/*.json and the pictures of the gallery from runs first

A part stands between two comments, the first of which says how it is made::

    <!-- begin source lightning_modules/ognet/module.py OGNet.training_step -->
    ...
    <!-- end -->

``source FILE NAME``
    a class, function or method as it stands
``results``
    the table of the collection, from ``docs/papers.yaml`` and ``docs/results/``
``gallery``
    a picture of each paper
``result EXPERIMENT METRICS SCORES``
    mean ± std over the runs: ``result osrci-digits auroc:AUROC,openauc:OSCR msp:softmax_threshold,margin``
``runs EXPERIMENT METRIC SCORES``
    every single run: ``runs ognet-digits auc phase_one,ognet:OGNet``
``conditions EXPERIMENT``
    the command, seeds, machine and versions of these numbers

METRICS and SCORES are ``name[:title],...`` of keys ``test/SCORE/METRIC``; underscores in titles are shown as spaces.
After the name of a metric of ``result`` a form may stand, as ``error|1:error_x100`` for one decimal.
"""

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # a script finds only what lies beside it

from docs import gallery, results  # noqa: E402

PART = re.compile(
    r"(?P<begin><!-- begin (?P<kind>\S+)(?P<arguments>[^\n]*?) -->\n)(?P<body>.*?)(?P<end><!-- end -->)",
    re.DOTALL,
)


def source(path: str, name: str) -> str:
    """A class, function or method as it stands in a file, without its docstring.

    Args:
        path: of the file, from the root of the repository.
        name: ``function``, ``Class`` or ``Class.method``.

    Returns:
        A fenced block of Python.

    Raises:
        ValueError: the file has nothing of that name.
    """
    text = (ROOT / path).read_text()
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        children = getattr(node, "body", [])
        found = [child for child in children if getattr(child, "name", None) == part]
        if not found:
            raise ValueError(f"{path} has no {name}")
        node = found[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        del lines[docstring.lineno - node.lineno : docstring.end_lineno - node.lineno + 1]
    return "\n".join(["```python", textwrap.dedent("\n".join(lines)), "```"])


KINDS: dict[str, Callable[..., str]] = {
    "source": source,
    "results": results.table,
    "gallery": gallery.gallery,
    "result": results.result,
    "runs": results.runs,
    "conditions": results.conditions,
}
"""What makes a part, by the word after ``begin``; takes the words that follow it."""


def filled_in(text: str, page: Path) -> str:
    """A page with all of its parts made anew.

    Raises:
        ValueError: a part of unknown kind, or one that cannot be made; names the page.
    """

    def make(match: re.Match[str]) -> str:
        kind, arguments = match["kind"], match["arguments"].split()
        if kind not in KINDS:
            raise ValueError(f"{page}: unknown part {kind!r}; known are {', '.join(KINDS)}")
        try:
            made = KINDS[kind](*arguments)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{page}: {kind} {' '.join(arguments)}: {error}") from error
        return f"{match['begin']}{made}\n{match['end']}"

    return PART.sub(make, text)


def pages() -> list[Path]:
    """The pages that may have such parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> None:
    """Rewrites the pages, or with ``--check`` ends with an error that names those that are out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--runs", type=Path, metavar="RUNS", help="folder of finished runs")
    arguments = parser.parse_args()
    check = arguments.check
    if arguments.runs is not None:
        from train import rehearse  # everything; only for this

        for path in [*results.collect(arguments.runs, rehearse), *gallery.collect(arguments.runs)]:
            print(f"wrote {path.relative_to(ROOT)}")
    stale = []
    for page in pages():
        text = page.read_text()
        made = filled_in(text, page.relative_to(ROOT))
        if made != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(made)
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run python docs/generate.py")
    print(f"{'checked' if check else 'rewrote'} {', '.join(stale) or 'nothing to change'}")


if __name__ == "__main__":
    main()
