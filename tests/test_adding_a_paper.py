"""The page on adding a paper, followed to the letter: its files are taken out of it and run."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import lightning_modules
from tests import golden_adapters, test_golden
from tests.following import blocks
from tests.processes import begin, finish
from tests.suites import launch, test_ddp, test_resume
from tests.suites.members import Member

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_paper.md").read_text()
MEMBERS = "tests/suites/members.py"
FILES = {path: content for path, content in blocks(PAGE).items() if path != MEMBERS}
TOY: Member = eval(blocks(PAGE)[MEMBERS], {"Member": Member})


def write_files(tree: Path) -> None:
    for path, content in FILES.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(content)


# ------------------------------------------------------------------ on top of the collection that is loaded already
def _train(tree: str, arguments: list[str]) -> None:
    lightning_modules.__path__.append(f"{tree}/lightning_modules")
    importlib.import_module("lightning_modules.toy")  # as train.py does with every folder
    launch.train_here(arguments)


def run(tree: Path, arguments: list[str], log: Path, expect: int = 0) -> str:
    return finish(begin(_train, str(tree), arguments, log=log, folder=tree), log, expect)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    write_files(folder)
    return folder


@pytest.fixture
def suites(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suite in (test_ddp, test_resume):
        monkeypatch.setattr(suite, "run", partial(run, tree))


@pytest.fixture
def adapters(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(
        lightning_modules, "__path__", [*lightning_modules.__path__, f"{tree}/lightning_modules"]
    )
    monkeypatch.setattr(
        golden_adapters, "__path__", [*golden_adapters.__path__, f"{tree}/tests/golden_adapters"]
    )
    toy = importlib.import_module("tests.golden_adapters.toy")
    monkeypatch.setattr(
        golden_adapters, "ADAPTERS", {family: {"toy": f} for family, f in toy.ADAPTERS.items()}
    )
    yield
    for name in [name for name in sys.modules if re.search(r"\.toy(\.|$)", name)]:
        del sys.modules[name]


def test_the_golden_numbers(tree: Path, adapters: None) -> None:
    cases = test_golden.load_cases(tree / "tests" / "golden")
    assert cases
    for paper, case in cases:
        test_golden.test_case(paper, case)


def test_two_processes_follow_one(suites: None, tmp_path: Path) -> None:
    test_ddp.test_two_processes_follow_one(TOY, tmp_path)


def test_a_killed_run_is_resumed_and_predicts(tree: Path, suites: None, tmp_path: Path) -> None:
    test_resume.train(TOY, tmp_path / "whole")
    recorded: Any = SimpleNamespace(member=TOY, root=tmp_path / "whole")
    test_resume.test_sigkill(recorded, "last phase", tmp_path / "killed")
    (checkpoint,) = (tmp_path / "killed").glob("*/run/checkpoints/last.ckpt")
    arguments = ["predict", "--ckpt_path", str(checkpoint), "--run.root", str(tmp_path)]
    run(tree, arguments, tmp_path / "log.txt")
    (table,) = tmp_path.glob("toy-digits/predict-000/predictions.csv")
    assert table.read_text().startswith("index,score")


# ------------------------------------------------------------------ in a copy of the collection, as a reader does it
def page_commands() -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for language, block in fenced if not language for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for part in ("callbacks", "configs", "datamodules", "docs", "lightning_modules", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("train.py", "pyproject.toml", "mkdocs.yml"):
        shutil.copy(ROOT / file, folder)
    write_files(folder)
    members = folder / MEMBERS
    before, end, after = members.read_text().partition("\n]\nMEMBERS = ")
    assert end
    members.write_text(before + "\n" + blocks(PAGE)[MEMBERS] + "," + end + after)
    return folder


@pytest.mark.slow
def test_the_commands_of_the_page(copy: Path) -> None:
    assert len(page_commands()) == 5
    for command in page_commands():
        line = command.replace("python", sys.executable, 1)
        done = subprocess.run(line, shell=True, cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    metrics = json.loads((copy / "runs/toy-digits/first/results.json").read_text())["metrics"]
    assert metrics["test/prdc/samples/test/coverage"] > 0.3
    assert (copy / "runs/toy-digits/predict-000/predictions.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "old", "new", "test"),
    [
        (
            "losses.py",
            "F.softplus(fake_logits).mean()}",
            "F.softplus(fake_logits).sum()}",
            "golden",
        ),
        (
            "module.py",
            'self.draw("latent", "normal", len(images), self.hp.latent_size)',
            "torch.randn(len(images), self.hp.latent_size, dtype=images.dtype)",
            "follow_one",
        ),
        (
            "module.py",
            "        images = self.to_network(batch[",
            "        self.seen = getattr(self, 'seen', 0) + 1\n"
            "        images = (1 + self.seen) * self.to_network(batch[",
            "sigkill",
        ),
    ],
)
def test_what_the_page_says_to_break_breaks(
    path: str, old: str, new: str, test: str, copy: Path
) -> None:
    file = copy / "lightning_modules" / "toy" / path
    whole = file.read_text()
    assert whole.count(old) == 1
    file.write_text(whole.replace(old, new))
    line = [sys.executable, "-m", "pytest", "-q", "tests/test_golden.py", "tests/suites"]
    try:
        done = subprocess.run(
            [*line, "-k", f"toy and {test}"], cwd=copy, capture_output=True, text=True
        )
    finally:
        file.write_text(whole)
    assert done.returncode == 1, done.stdout[-3000:]
    assert "failed" in done.stdout
