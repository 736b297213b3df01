"""The pages say what is so: generated parts, links, files and commands that they name, and the site made of them."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.generate import ROOT, filled_in, pages, source
from tests.following import blocks
from tests.processes import begin, finish

FENCE = re.compile(r"^( *)```.*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
PAPER_NAMES = [name for part in NAV for paper in part.get("Papers", []) for name in paper.values()]
HEADINGS = [
    *("Idea", "Algorithm", "How to run", "What is implemented", "Results", "Deviations"),
    *("Several processes", "Known limits"),
]
PLACES = "benchmarks|callbacks|configs|datamodules|docs|lightning_modules|tests"
NAMED = re.compile(rf"(?<![\w/.])(?:{PLACES})/[\w./{{}},*-]*\w(?:::\w+)?")
IDS: Any = {"ids": lambda page: str(page.relative_to(ROOT))}
PAGES = [*pages(), ROOT / "CONTRIBUTING.md"]


# ------------------------------------------------------------------ parts made from code
@pytest.mark.parametrize("page", pages(), **IDS)
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


# ------------------------------------------------------------------ headings and links
def headings(text: str, levels: str = "##") -> list[str]:
    prose = FENCE.sub("", text)
    return re.findall(rf"^{levels} (.+)$", prose, re.MULTILINE)


def anchors(text: str) -> set[str]:
    """As the site makes them from headings, and code hosts from headings as plain as ours."""
    return {
        re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())
        for heading in headings(text, "#+")
    }


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        content = text if file == page else file.read_text() if file.suffix == ".md" else ""
        if not file.exists() or (anchor and anchor not in anchors(content)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("paper", PAPER_NAMES)
def test_pages_of_papers_have_one_order(paper: str) -> None:
    assert headings((ROOT / "docs" / paper).read_text()) == HEADINGS


@pytest.mark.parametrize("page", PAGES, **IDS)
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page, page.read_text())


def test_a_broken_link_is_seen() -> None:
    page = ROOT / "docs" / "osrci.md"
    text = "# A b\n[x](#a-b) [x](#b) [y](prdc.md#results) [y](prdc.md#none) ![z](images/none.png)"
    assert broken_links(page, text) == ["#b", "prdc.md#none", "images/none.png"]


# ------------------------------------------------------------------ files
def missing_files(text: str) -> list[str]:
    """Paths that a page names and the repository lacks; words in capitals and files that it makes are none."""
    made = set(blocks(text))
    missing = []
    for found in sorted(set(NAMED.findall(text))):
        path, _, test = found.partition("::")
        if re.search(r"\b[A-Z]{2,}\b", path) or path in made or "/toy" in path:
            continue
        braces = re.fullmatch(r"(.*){(.*)}(.*)", path)
        options = braces[2].split(",") if braces else [""]
        every = [f"{braces[1]}{o}{braces[3]}" for o in options] if braces else [path]
        exists = all([*ROOT.glob(one)] for one in every)
        if exists and test:
            nodes = ast.parse((ROOT / path).read_text()).body
            exists = test in [getattr(node, "name", None) for node in nodes]
        if not exists:
            missing.append(found)
    return missing


@pytest.mark.parametrize("page", PAGES, **IDS)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    assert not missing_files(page.read_text())


def test_a_missing_file_is_seen() -> None:
    text = "`configs/osrci/{digits,none}.yaml` configs/PAPER/x.yaml (tests/test_pages.py::test_none) `docs/*.md`"
    assert missing_files(text) == [
        "configs/osrci/{digits,none}.yaml",
        "tests/test_pages.py::test_none",
    ]


# ------------------------------------------------------------------ commands
def commands(text: str) -> list[list[str]]:
    """The arguments of ``train.py`` in the fenced blocks of a page."""
    found = []
    for _, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(
                r"(?:(?:[\w./-]*python|torchrun|sbatch) .*?)(?:train\.py|\.sbatch) (.*)", line
            )
            if match:
                arguments = shlex.split(match[1], comments=True)
                script = re.search(r"(\w+)\.sbatch ", line)
                what = {"slurm": ["fit"], "slurm_array": ["sweep"]}
                found.append([*what[script[1]], *arguments] if script else arguments)
    return found


def parsable(arguments: list[str], page: Path) -> list[str]:
    """With values in place of placeholders, and the recipe in place of a checkpoint."""
    recipe = ROOT / "configs" / page.stem
    default = next(
        (p for p in (recipe / "shapes.yaml", recipe / "digits.yaml") if p.exists()), None
    )
    made: list[str] = []
    while arguments:
        word, *arguments = arguments
        if word == "--ckpt_path":
            run = re.match(r"runs/(\w+?)-(\w+)/", arguments.pop(0))
            named = ROOT / "configs" / run[1] / f"{run[2]}.yaml" if run else default
            made[1:1] = ["-c", str(named)]
        elif word == "RECIPE":
            made.append("configs/osrci/digits.yaml")
        else:
            made.append("0" if re.fullmatch(r"[A-Z]", word) else word)
    if made[0] == "sweep":
        from callbacks.sweep import _parser

        options, rest = _parser().parse_known_args(made[1:])
        chosen = (one.split("=", 1) for one in options.over)
        made = ["fit", *rest]
        for key, values in chosen:
            made += [f"--{key}", values.split(",")[0]]
    return made


def parse_all(groups: list[dict[str, tuple[list[str], list[str]]]], log: str) -> None:
    """Parses commands with one parser, and together where nothing is wrong; writes what was. Runs in its own process.

    Args:
        groups: by title, files and arguments of commands on the same classes.
        log: file for the errors.
    """
    import train

    def problem(parser: Any, arguments: list[str]) -> Exception | None:
        try:
            with redirect_stdout(StringIO()):
                parser.parse_args(["fit", *arguments])
        except Exception as error:
            return error
        return None

    def parse(cli: Any, parser: Any, args: Any) -> None:
        wrong = []
        for group in groups:
            files = next(iter(group.values()))[0]
            together = [word for _, words in group.values() for word in words]
            if problem(parser, files + together) is not None:
                every = ((title, problem(parser, f + w)) for title, (f, w) in group.items())
                wrong += [f"{title}: {error}" for title, error in every if error is not None]
        Path(log).write_text("\n".join(wrong))
        raise SystemExit

    train.AdversariaCLI.parse_arguments = parse  # type: ignore[method-assign]
    train.main(["fit"])


def wrong_commands(found: list[tuple[str, list[str]]], log: Path) -> str:
    """What is wrong with titled commands; those without a value of their own are recipes, which the suites parse."""
    groups: dict[tuple[str, ...], dict[str, tuple[list[str], list[str]]]] = {}
    for title, (_, *words) in found:
        files: list[str] = []
        while "-c" in words:
            place = words.index("-c")
            if "configs/trainer/" not in words[place + 1]:
                files += words[place : place + 2]
            del words[place : place + 2]
        if words:
            recipe = yaml.safe_load((ROOT / files[1]).read_text())
            classes = tuple(str(recipe[part].get("class_path")) for part in ("model", "data"))
            groups.setdefault(classes, {})[title] = (files, words)
    printed = log.with_suffix(".printed")
    finish(begin(parse_all, [*groups.values()], str(log), log=printed), printed)
    return log.read_text()


def test_commands_of_all_pages_parse(tmp_path: Path) -> None:
    found = [
        (f"{page.name}: {shlex.join(arguments)}", parsable(arguments, page))
        for page in PAGES
        for arguments in commands(page.read_text())
        # Those are run where the page is followed.
        if not any("toy" in word for word in arguments) and arguments[-1:] != ["--help"]
    ]
    assert len(found) > 50
    assert not wrong_commands(found, tmp_path / "wrong.txt")


def test_a_wrong_command_is_seen(tmp_path: Path) -> None:
    page = ROOT / "docs" / "osrci.md"
    text = "```\npython train.py fit -c configs/osrci/digits.yaml --model.witdh 3  # x\n```\n"
    found = [("title", parsable(arguments, page)) for arguments in commands(text)]
    wrong = wrong_commands(found, tmp_path / "wrong.txt")
    assert wrong.startswith("title: ")
    assert "witdh" in wrong


# ------------------------------------------------------------------ the site
def test_all_pages_are_in_the_navigation() -> None:
    named = {name for part in NAV for name in part.values() if isinstance(name, str)}
    assert named | set(PAPER_NAMES) == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_site_builds_strictly_and_needs_nobody_else(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    made = [*(tmp_path / "site").glob("*.html")]
    assert {page.stem for page in made} >= {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert not [*(tmp_path / "site").rglob("*.py")]
    for page in made:
        text = page.read_text()
        assert not re.findall(
            r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//[^\s>]*", text
        )
        assert not re.findall(r"<link[^>]*\shref=\"?(?:https?:)?//[^\s>]*", text)
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()[\"' ]*(?:https?:)?//", style.read_text()), style
