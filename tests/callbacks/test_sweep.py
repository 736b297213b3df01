import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import callbacks.sweep
from callbacks.checkpoint import Preempted
from callbacks.sweep import combinations, start_run, sweep
from tests.suites.launch import run
from tests.suites.members import ANALYSES, MEMBERS, Member

ROOT = Path(__file__).parents[2]
SPLITS = ["--over", "data.split=0,1,2", "--lr", "0.1"]


@pytest.fixture(autouse=True)
def no_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)


class Stage:
    """A folder of runs in which every run is a file, and none is started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: dict[str, int] = {}
        self.started: list[str] = []
        self.checked: list[str] = []

    def rehearse(self, arguments: list[str], build: bool) -> dict[str, Any]:
        given = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        if build:
            self.checked.append(given["--data.split"])
            if given["--data.split"] == "bad":
                raise ValueError("split bad does not exist")
        return {
            "run": {"root": str(self.folder), "experiment": "paper", "test": True},
            "model": {"class_path": "lightning_modules.osrci.OSRCIModule", "lr": given["--lr"]},
            "data": {"split": given["--data.split"]},
            "seed_everything": 0,
        }

    def start(self, arguments: list[str]) -> tuple[int, bool]:
        config = self.rehearse(arguments, False)
        name = arguments[arguments.index("--run.name") + 1]
        self.started.append(name)
        code = self.codes.get(name, 0)
        if not code:
            self.finish(name, config)
        return code, False

    def finish(self, name: str, config: dict[str, Any]) -> None:
        directory = self.folder / "paper" / name
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        split = float(config["data"]["split"])
        results = {"metrics": {"test/margin/auroc": split / 10}, "experiment": "paper", "seed": 0}
        (directory / "results.json").write_text(json.dumps({**results, "data": {}}))

    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "paper" / "sweep-summary.json").read_text())


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage(tmp_path)
    monkeypatch.setattr(callbacks.sweep, "start_run", made.start)
    return made


def test_every_combination_has_a_safe_name() -> None:
    over = ['data.normal=["0"],["1","2"]', "data.labelled=1%,20%", "seed_everything=0"]
    tasks = combinations(over, "mine")
    assert [task.name for task in tasks] == [
        "mine-normal0-labelled1pct-seed_everything0",
        "mine-normal0-labelled20pct-seed_everything0",
        "mine-normal1_2-labelled1pct-seed_everything0",
        "mine-normal1_2-labelled20pct-seed_everything0",
    ]
    assert tasks[2].options == [
        *("--data.normal", '["1","2"]'),
        *("--data.labelled", "1%"),
        *("--seed_everything", "0"),
    ]
    assert [task.number for task in tasks] == [0, 1, 2, 3]


def test_names_that_would_be_equal_or_long_get_a_checksum() -> None:
    names = [task.name for task in combinations(["a.b=[x],{x: y},'x y',../x"], "s")]
    assert len(set(names)) == 4
    long = combinations([f"a.b={'x' * 300}"], "s")[0].name
    assert len(long) < 150
    for name in [*names, long]:
        assert name == Path(name).name
        assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789._-")


def test_quotes_around_a_value_keep_its_commas() -> None:
    assert [t.values["k"] for t in combinations(["k='a,b',c"], "s")] == ["a,b", "c"]


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ([], "needs at least one --over"),
        (["data.split"], "must look like"),
        (["=1"], "must look like"),
        (["k=1,1"], "'1' is given twice"),
        (["k=1", "k=2"], "k is given twice"),
        (["k=[1,2"], "lists written as in YAML"),
        (["k=''"], "a value is empty"),
    ],
)
def test_malformed_axes(over: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combinations(over, "s")
    with pytest.raises(ValueError, match="names of directories"):
        combinations(["k=1"], "../elsewhere")


def test_finished_runs_are_kept_when_one_fails(stage: Stage) -> None:
    stage.codes["sweep-split1"] = 1
    with pytest.raises(RuntimeError, match=r"1 of 3 runs failed: sweep-split1 \(exit code 1\)"):
        sweep(SPLITS, stage.rehearse)
    assert stage.started == ["sweep-split0", "sweep-split1", "sweep-split2"]
    assert stage.summary()["metrics"]["test/margin/auroc"]["n"] == 2
    stage.codes.clear()
    sweep(SPLITS, stage.rehearse)
    assert stage.started[3:] == ["sweep-split1"], "finished runs are not repeated"
    assert stage.summary()["metrics"]["test/margin/auroc"]["mean"] == pytest.approx(0.1)


def test_a_bad_value_is_refused_before_the_first_run(stage: Stage) -> None:
    with pytest.raises(ValueError, match="split bad does not exist"):
        sweep(["--over", "data.split=0,bad", "--lr", "0.1"], stage.rehearse)
    assert stage.checked == ["0", "bad"]
    assert not stage.started


def test_a_signal_ends_the_sweep(stage: Stage) -> None:
    stage.codes["sweep-split1"] = 75
    with pytest.raises(Preempted, match="sweep-split1"):
        sweep(SPLITS, stage.rehearse)
    assert stage.started == ["sweep-split0", "sweep-split1"]


def test_a_finished_run_of_another_configuration_is_refused(stage: Stage) -> None:
    sweep(SPLITS, stage.rehearse)
    with pytest.raises(ValueError, match=r"model\.lr: '0\.1' there, '0\.2' asked for"):
        sweep([*SPLITS[:-1], "0.2"], stage.rehearse)


def test_a_task_is_one_run(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = ["fit", "--lr", "0.1", "--data.split", "2"]
    expected += ["--run.name", "sweep-split2", "--run.resume", "true"]
    assert sweep([*SPLITS, "--task", "2"], stage.rehearse) == expected
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert sweep(SPLITS, stage.rehearse) == expected
    assert sweep([*SPLITS, "--task", "0"], stage.rehearse) != expected, "the option wins"
    stage.start(expected)
    assert sweep(SPLITS, stage.rehearse) is None, "it has finished"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(ValueError, match="SLURM_ARRAY_TASK_ID 3: the sweep has 3 comb"):
        sweep(SPLITS, stage.rehearse)
    assert sweep([*SPLITS, "--list"], stage.rehearse) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "0  sweep-split0  missing",
        "1  sweep-split1  missing",
        "2  sweep-split2  finished",
        "tasks: 3 (--array=0-2)",
    ]


def test_collecting_names_what_is_missing(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="none of the 3 runs has finished"):
        sweep([*SPLITS, "--collect"], stage.rehearse)
    for number in "02":
        task = sweep([*SPLITS, "--task", number], stage.rehearse)
        assert task is not None
        stage.start(task)
    sweep([*SPLITS, "--collect"], stage.rehearse)
    assert stage.summary()["runs"] == 2
    assert "missing: 1 of 3 runs: 1 (sweep-split1)" in capsys.readouterr().out
    assert len(stage.started) == 2, "nothing runs"


def test_signals_are_passed_on_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import signal, sys, pathlib, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(callbacks.sweep, "RUN_SCRIPT", script)

    def notify() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=notify)
    thread.start()
    before = signal.getsignal(signal.SIGUSR1)
    assert start_run([]) == (75, True)
    assert signal.getsignal(signal.SIGUSR1) == before
    thread.join()


def test_an_analysis_is_swept_as_tasks(tmp_path: Path) -> None:
    prdc = next(member for member in ANALYSES if member.name == "prdc")
    command = ["sweep", "-c", prdc.config, "--over", "data.limit=60,70"]
    command += ["--run.root", str(tmp_path)]
    run([*command, "--task", "1"], tmp_path / "task.txt")
    assert (tmp_path / "prdc-digits" / "test-sweep-limit70" / "results.json").exists()
    text = run([*command, "--collect"], tmp_path / "collect.txt")
    assert "missing: 1 of 2 runs: 0 (sweep-limit60)" in text


@pytest.mark.parametrize(
    ("over", "code", "message"),
    [
        ("data.splot=0,1", 2, "'splot' is not accepted"),
        ("data.split=0,7", 1, "split 7 does not exist"),
    ],
)
def test_errors_come_before_the_first_run(
    over: str, code: int, message: str, tmp_path: Path
) -> None:
    osrci: Member = MEMBERS[0]
    command = ["sweep", *osrci.arguments(), "--over", over, "--run.root", str(tmp_path / "runs")]
    text = run(command, tmp_path / "log.txt", expect=code)
    assert message in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_sweep_over_splits_can_be_repeated(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "sweep", *MEMBERS[0].arguments()]
    command += ["--over", "data.split=0,1", "--run.root", str(tmp_path)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "mean ± std of 2 runs" in first.stdout
    summary = json.loads((tmp_path / "osrci-digits" / "sweep-summary.json").read_text())
    assert summary["metrics"]["test/margin/auroc"]["n"] == 2
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Seed set" not in again.stderr, "finished runs are not repeated"
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
