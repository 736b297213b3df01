"""The house: imports run one way, and every module has its methods in the same order."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAPERS = {path.parent.name for path in (ROOT / "lightning_modules").glob("*/module.py")}
PAPERS |= {"supervised"}
BUILDS_ON = {"opgan": {"cyclegan"}, "matchgan": {"stargan"}}
"""What a paper says of itself; teachers, judges and networks to look into are ``supervised`` for any."""

ORDER = (
    *("__init__", "_check_arguments", "total_epochs", "phase_at", "phase", "batches_in_epoch"),
    *("build_optimizers", "build_schedulers", "configure_optimizers", "on_fit_start"),
    *("on_train_batch_start", "training_step", "validation_step", "on_validation_epoch_end"),
    *("on_test_start", "test_step", "on_test_epoch_end", "predict_step", "image_grid"),
)


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Names of the modules that a file imports, in their parts, those in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield tuple(node.module.split("."))
        elif isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def allowed(path: Path) -> tuple[set[str], set[str]]:
    """Top-level packages of ours, and papers, that a file may import."""
    top, *rest = path.relative_to(ROOT).parts
    if top == "datamodules":
        return {"datamodules", "lightning_modules"}, set()
    if top == "callbacks":
        return {"callbacks", "lightning_modules"}, PAPERS
    if top != "lightning_modules":
        return {"callbacks", "datamodules", "lightning_modules", "benchmarks", "train"}, PAPERS
    room = rest[0]
    papers = {room, "supervised"} | BUILDS_ON.get(room, set()) if room in PAPERS else set()
    return {"lightning_modules"}, papers


@pytest.mark.parametrize("folder", ["lightning_modules", "datamodules", "callbacks", "benchmarks"])
def test_imports_run_one_way(folder: str) -> None:
    ours = {"lightning_modules", "datamodules", "callbacks", "benchmarks", "tests", "train", "docs"}
    wrong = []
    for path in files(folder):
        packages, papers = allowed(path)
        for name in imports(path):
            if name[0] in ours - packages:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(name)}")
            if name[:1] == ("lightning_modules",) and set(name[1:2]) & (PAPERS - papers):
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(name)}")
    assert not wrong, "\n".join(wrong)


def modules() -> Iterator[tuple[Path, ast.ClassDef, list[str]]]:
    for path in files("lightning_modules"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                if {"_check_arguments", "training_step", "test_step"} & set(methods):
                    yield path, node, methods


def test_methods_are_in_the_same_order() -> None:
    seen = 0
    for path, node, methods in modules():
        known = [name for name in methods if name in ORDER]
        assert known == sorted(known, key=ORDER.index), f"{path.relative_to(ROOT)}: {node.name}"
        seen += 1
    assert seen >= len(PAPERS)
