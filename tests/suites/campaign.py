"""Breaks training runs in every way that a cluster does, and compares what comes out with runs that were left alone.

python -m tests.suites.campaign                        # every member of the suites; what `make faults` runs
python -m tests.suites.campaign --member ognet --kills 5 --seed 1

Faults: SIGKILL at random moments of wall time, again and again; the newest checkpoint cut short, emptied and with one
byte changed; a disk that is full while checkpoints are written; a NaN in a batch. A fault is survived if the run says
what a user needs to know and, continued with ``--run.resume true``, ends with the same weights, optimizers, metrics,
tables and pictures, bit for bit.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from tests.processes import TIME_LIMIT
from tests.suites.launch import probe, run, start
from tests.suites.members import MEMBERS, Member
from tests.suites.test_resume import SIGKILL, arguments, assert_equal, outcome, train

FAULTS = ("SIGKILL", "damaged checkpoint", "full disk", "NaN in a batch")


@dataclass
class Count:
    """Faults of one kind: how many were tried, and what was lost by which."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)

    def attempt(self, number: int, work: Callable[[], None]) -> None:
        """Counts ``number`` faults, lost together if ``work`` does not come out right."""
        self.tried += number
        try:
            work()
        except AssertionError as error:
            self.lost.append(str(error).strip()[-600:] or "different outcome")

    def __str__(self) -> str:
        return f"{self.tried - len(self.lost)} of {self.tried}"


def damage(path: Path, how: str, chance: random.Random) -> None:
    """Spoils a checkpoint file."""
    whole = path.read_bytes()
    if how == "cut short":
        path.write_bytes(whole[: chance.randrange(1, len(whole))])
    elif how == "emptied":
        path.write_bytes(b"")
    else:  # one byte of a tensor, which torch would not notice
        with ZipFile(path) as archive:
            tensors = [e for e in archive.infolist() if "/data/" in e.filename]
            entry = max(tensors, key=lambda e: e.file_size)
        middle = entry.header_offset + entry.file_size // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :])


def kills(
    member: Member, expected: Any, folder: Path, number: int, seconds: float, seed: int
) -> None:
    """Kills runs at random moments until so many kills have struck; every run that ends must be right."""
    chance = random.Random(f"{seed}/{member.name}")
    done, attempt = 0, 0
    while done < number:
        root = folder / str(attempt)
        for life in range(1000):
            moment = chance.uniform(0, seconds) if done < number else TIME_LIMIT
            log = root / f"{life}.txt"
            process = start(arguments(member, root), log)
            process.join(moment)
            if process.exitcode is None:
                process.kill()
            process.join()
            if process.exitcode == SIGKILL and moment < TIME_LIMIT:
                done += 1
                continue
            text = log.read_text()
            assert process.exitcode == 0, f"exit code {process.exitcode}:\n{text[-2000:]}"
            break
        assert_equal(outcome(root), expected)
        attempt += 1


def damaged(member: Member, expected: Any, killed: Path, folder: Path, how: str, seed: int) -> None:
    shutil.copytree(killed, folder)
    (newest,) = folder.glob("*/run/checkpoints/last.ckpt")
    assert newest.with_name("previous.ckpt").exists()
    damage(newest, how, random.Random(f"{seed}/{member.name}/{how}"))
    text = train(member, folder)
    assert "continues from the one before" in text, text[-1000:]
    assert_equal(outcome(folder), expected)


def full_disk(member: Member, expected: Any, folder: Path) -> None:
    """Full for as long as the second checkpoint is due and until some batches later."""
    fault = probe("FullDisk", first=4, last=member.batches[1])
    process = start(arguments(member, folder, *fault), folder / "full.txt")
    process.join(TIME_LIMIT)
    text = (folder / "full.txt").read_text()
    assert "could not be written (No space left on device)" in text, text[-1000:]
    assert "everything is saved" not in text
    assert not list(folder.glob("*/run/**/*.partial"))
    if process.exitcode != 0:
        assert process.exitcode == 1, f"exit code {process.exitcode}:\n{text[-2000:]}"
        train(member, folder)
    assert_equal(outcome(folder), expected)


def poisoned(member: Member, expected: Any, folder: Path) -> None:
    # ZAQ looks at no data.
    draws = str(member.name == "zaq").lower()
    fault = probe("Poison", batch=member.batches[1], draws=draws)
    text = train(member, folder, *fault, expect=1, log="poisoned.txt")
    for part in ("nan", "batch", "last good checkpoint is"):
        assert part in text, f"{part!r} is not in: {text[-1000:]}"
    train(member, folder)
    assert_equal(outcome(folder), expected)


def campaign(member: Member, number: int, seed: int, folder: Path) -> dict[str, Count]:
    """All faults of one member."""
    counts = {fault: Count() for fault in FAULTS}
    began = time.monotonic()
    train(member, folder / "whole")
    seconds = time.monotonic() - began
    expected = outcome(folder / "whole")

    def attempt(fault: str, faults: int, work: Callable[..., None], *arguments: Any) -> None:
        counts[fault].attempt(faults, lambda: work(member, expected, *arguments))
        print(f"{member.label}, {fault}: {counts[fault]}", file=sys.stderr, flush=True)

    attempt("SIGKILL", number, kills, folder / "kills", number, seconds, seed)
    kill = probe("SignalAt", name="SIGKILL", batch=member.batches[1])
    train(member, folder / "killed", *kill, expect=SIGKILL)
    for how in ("cut short", "emptied", "one byte changed"):
        attempt("damaged checkpoint", 1, damaged, folder / "killed", folder / how, how, seed)
    attempt("full disk", 1, full_disk, folder / "full")
    attempt("NaN in a batch", 1, poisoned, folder / "poison")
    return counts


def main() -> int:
    """Prints the table, a row for each member as it ends; the exit code is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--member", action="append", choices=[m.name for m in MEMBERS])
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each member")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damaged bytes")
    known = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:  # the imports, which are not to be timed
        run(["--help"], Path(scratch, "log.txt"))
    lost = []
    print(f"| member | {' | '.join(FAULTS)} | lost |", "|---" * (len(FAULTS) + 2) + "|", sep="\n")
    for member in MEMBERS:
        if known.member and member.name not in known.member:
            continue
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        counts = campaign(member, known.kills, known.seed, folder)
        mine = [f"{fault}: {text}" for fault, count in counts.items() for text in count.lost]
        shutil.rmtree(folder)
        cells = " | ".join(str(count) for count in counts.values())
        print(f"| {member.label} | {cells} | {len(mine) or 'nothing'} |", flush=True)
        lost += [f"{member.label}, {text}" for text in mine]
    print("", *lost, sep="\n", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
