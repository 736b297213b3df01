"""Complete runs that several suites look at, each made once: as someone makes them who wants everything recorded."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.suites.launch import probe, run
from tests.suites.members import Member
from tests.wandb_file import WandbFile

CHECKPOINTS = ["--checkpoint.every_n_batches", "3"]


def record(
    member: Member,
    root: Path,
    *arguments: str,
    overrides: dict[str, Any] | None = None,
    log: str = "log.txt",
    expect: int = 0,
) -> str:
    """A run ``root/EXPERIMENT/run`` as someone sees it who never heard of wandb but for the overlay."""
    home = root / "home"
    home.mkdir(parents=True, exist_ok=True)
    command = ["fit" if member.trains else "test", *member.arguments(overrides or {})]
    command += ["-c", "configs/trainer/wandb.yaml"]
    command += ["--run.root", str(root), "--run.name", "run", *arguments]
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0.0)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        outside: dict[str, str | None] = dict.fromkeys(
            ("WANDB_MODE", "WANDB_SILENT", "WANDB_API_KEY", "NO_PROXY", "no_proxy")
        )
        outside |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "https_proxy"), address)
        outside |= {"HOME": str(home), "NETRC": str(home / "none")}
        text = run(command, root / log, expect, outside)
        with pytest.raises(BlockingIOError):  # nobody connected
            proxy.accept()
    return text


def parts(root: Path) -> list[WandbFile]:
    """What each process recorded, in order."""
    folders = sorted(
        root.glob("*/*/wandb/offline-run-*"), key=lambda folder: folder.stat().st_mtime
    )
    return [WandbFile(folder) for folder in folders]


class Recorded:
    """The run of a member and what it left.

    Attributes:
        root: holds the run and ``dump/rank0.pt``.
        directory: of the run.
        file: what wandb has of it.
        printed: by it.
        results: its ``results.json``.
    """

    def __init__(self, member: Member, root: Path) -> None:
        self.member, self.root = member, root
        options = [*CHECKPOINTS, *probe("StateDump", folder=root / "dump")]
        self.printed = record(member, root, *(options if member.trains else []))
        (self.directory,) = root.glob("*/run" if member.trains else "*/test-run")
        (self.file,) = parts(root)
        self.results = json.loads((self.directory / "results.json").read_text())
