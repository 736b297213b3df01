import json
import os
from pathlib import Path
from typing import Any

import pytest

from callbacks.loggers import _run_id
from callbacks.run import RunOptions, RunRecorder, open_run_directory, readable_message
from tests.callbacks.boring import BoringGAN, boring_trainer, loader


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    for key in (
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_NTASKS",
        "TORCHELASTIC_RUN_ID",
        "WORLD_SIZE",
    ):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.delenv("ADVERSARIA_RUN_DIRECTORY", raising=False)
    yield
    os.environ.pop("ADVERSARIA_RUN_DIRECTORY", None)


def open_new(options: RunOptions, command: str = "fit") -> Path:
    os.environ.pop("ADVERSARIA_RUN_DIRECTORY", None)
    return open_run_directory(options, command)


def test_runs_without_a_name_are_numbered(tmp_path: Path) -> None:
    options = RunOptions(str(tmp_path), "paper-data")
    first = open_new(options)
    assert first == tmp_path / "paper-data" / "run-000"
    (first / "config.yaml").touch()
    assert open_new(options).name == "run-001"
    assert open_new(options).name == "run-001", "an empty directory is free"
    assert open_new(options, "test").name == "test-000"


def test_an_existing_name_is_refused_or_continued(tmp_path: Path) -> None:
    options = RunOptions(str(tmp_path), "paper-data", "mine")
    (open_new(options) / "config.yaml").touch()
    with pytest.raises(ValueError, match="mine exists"):
        open_new(options)
    options.resume = True
    assert open_new(options).name == "mine"


def test_launched_processes_inherit_the_directory(tmp_path: Path) -> None:
    options = RunOptions(str(tmp_path), "paper-data")
    chosen = open_new(options)
    (chosen / "config.yaml").touch()
    assert open_run_directory(options, "fit") == chosen


def test_a_scheduled_job_is_named_after_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert open_new(RunOptions(str(tmp_path), "paper-data")).name == "job-4711"


def test_the_tasks_of_an_array_are_named_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM gives each of them a job id of its own."""
    for key, value in {"JOB_ID": "4713", "ARRAY_JOB_ID": "4711", "ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    assert open_new(RunOptions(str(tmp_path), "paper-data")).name == "job-4711_2"


def test_a_run_of_a_wandb_agent_has_a_name_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "SLURM_JOB_ID", "4711"
    )  # the job of the agent, which makes one run after the other
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    for run in ("abc", "def"):
        monkeypatch.setenv("WANDB_RUN_ID", run)
        directory = open_new(RunOptions(str(tmp_path), "paper-data", resume=True))
        assert directory.name == f"wandb-{run}"
        assert _run_id(directory / "wandb-id.txt") == run


def test_processes_without_a_common_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match="a run of 2 processes needs a name"):
        open_new(RunOptions(str(tmp_path), "paper-data"))


def test_the_recorder_keeps_what_judges_a_number(tmp_path: Path) -> None:
    recorder = RunRecorder("model: x\n", "paper-data", "fit")
    trainer = boring_trainer(tmp_path, callbacks=[recorder])
    trainer.fit(BoringGAN(), loader(), loader())
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["metrics"]) == {"val/score/mean"}
    assert all(isinstance(value, float) for value in results["metrics"].values())
    assert results["experiment"] == "paper-data"
    assert results["epochs"] == 2
    assert {"python", "torch", "lightning"} <= results["versions"].keys()
    assert results["hardware"]["cpu_cores"] == os.cpu_count()
    assert (tmp_path / "config.yaml").read_text() == "model: x\n"
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    trainer.test(BoringGAN(), loader(), verbose=False)
    tested = json.loads((tmp_path / "results.json").read_text())
    assert set(tested["metrics"]) == {"val/score/mean", "test/score/mean"}


def test_another_configuration_does_not_replace_the_first(tmp_path: Path) -> None:
    for text in ("a: 1\n", "a: 1\n", "a: 2\n"):
        recorder = RunRecorder(text)
        recorder.setup(boring_trainer(tmp_path), BoringGAN(), "fit")
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"
    assert (tmp_path / "config-resumed-1.yaml").read_text() == "a: 2\n"
    assert not (tmp_path / "config-resumed-2.yaml").exists()


def test_wall_time_adds_up_over_interruptions() -> None:
    first, second = RunRecorder(), RunRecorder()
    first.wall_time = 100.0
    second.load_state_dict(first.state_dict())
    assert second.wall_time >= 100.0


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "", "x" * 300])
def test_names_cannot_lead_out_of_the_root(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--run\.name .*one plain name"):
        open_new(RunOptions(str(tmp_path), "paper-data", name))
    with pytest.raises(ValueError, match=r"--run\.experiment .*one plain name"):
        open_new(RunOptions(str(tmp_path), name, "mine"))
    assert not list(tmp_path.iterdir())


def test_links_cannot_lead_out_of_the_run(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / "paper-data").mkdir(parents=True)
    (root / "paper-data" / "mine").symlink_to(elsewhere)
    options = RunOptions(str(root), "paper-data", "mine", resume=True)
    with pytest.raises(ValueError, match=r"mine is a link to .*elsewhere.*--run\.root"):
        open_new(options)
    (root / "paper-data" / "mine").unlink()
    (open_new(options) / "images").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"images is a link to .*elsewhere"):
        open_new(options)
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert open_new(RunOptions(str(linked), "paper-data", "other")).is_dir(), "the root may be one"


def test_a_job_id_is_made_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../../etc")
    assert open_new(RunOptions(str(tmp_path), "paper-data")).parent == tmp_path / "paper-data"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("bits=9 must be 8 or less"), "bits=9 must be 8 or less"),
        (KeyError("weights"), "KeyError: 'weights'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_an_error_says_what_it_is(error: Exception, message: str) -> None:
    with pytest.raises(type(error)) as raised:
        raise error
    assert readable_message(raised.value) == message
