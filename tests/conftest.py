"""What holds for every test: one thread, no network, no display, no wandb upload."""

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for child processes
os.environ["MPLBACKEND"] = "Agg"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden *.json files that tests/test_golden.py runs",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share an expensive preparation run in one worker: those of a file, in the suites those of a run."""
    for item in items:
        group = item.path.stem
        parameters = getattr(item, "callspec", None)
        if item.path.parent.name == "suites" and parameters is not None:
            member = parameters.params.get("recorded")
            group = member.label if member else item.nodeid
        item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{group}"))


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a Unix socket
        return True
    host = address[0]
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return host == socket.gethostname()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails instead of hanging or downloading."""
    for name in ("connect", "connect_ex"):
        original = getattr(socket.socket, name)

        def guarded(self: socket.socket, address: Any, original: Any = original) -> Any:
            if not _is_local(address):
                raise OSError(f"tests must not use the network: connection to {address!r}")
            return original(self, address)

        monkeypatch.setattr(socket.socket, name, guarded)
