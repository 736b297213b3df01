"""No installation gets a release that is known to be malicious or broken."""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
BAD = {
    # Malicious uploads that stole credentials when imported (GHSA-w37p-236h-pfx3); both names are one project.
    # Those before 2.6.6 let load_from_checkpoint execute code.
    "lightning": ["2.5.0", "2.6.0", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.6.5"],
    "pytorch-lightning": ["2.6.0", "2.6.1", "2.6.2", "2.6.3", "2.6.4", "2.6.5"],
    # Without what LightningCLI calls.
    "jsonargparse": ["5.0.0", "5.1.0", "4.38.0"],
}


def requirements() -> list[Requirement]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    lines = parser["options"]["install_requires"].splitlines()
    for extra in parser["options.extras_require"].values():
        lines += extra.splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    return [Requirement(line) for line in lines if not line.startswith("adversaria[")]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in line for line in lines), "a constraint is one version"
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


@pytest.mark.parametrize("package", BAD)
def test_bad_releases_are_out_of_range_and_not_pinned(package: str) -> None:
    ranges = [r.specifier for r in requirements() if canonicalize_name(r.name) == package]
    if package != "pytorch-lightning":  # comes with lightning, of the same version
        assert ranges, f"setup.cfg does not name {package}"
    for version in BAD[package]:
        assert not any(version in allowed for allowed in ranges), version
        assert pins()[package] != version
    assert pins()["lightning"] == pins()["pytorch-lightning"]


def test_the_pins_are_within_the_ranges() -> None:
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if name in pins():
            assert pins()[name] in requirement.specifier, requirement
    direct = {canonicalize_name(r.name) for r in requirements()}
    assert {"lightning", "jsonargparse", "torch", "torchvision", "wandb"} <= direct & pins().keys()
