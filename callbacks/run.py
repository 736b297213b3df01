"""One directory per run: how it is named, and what is recorded in it."""

import errno
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from callbacks.checkpoint import is_debug_run, load_checkpoint
from lightning_modules.files import demand_file_name, file_name, free_space, whole_file
from lightning_modules.randomness import global_seed

# Processes that Lightning launches inherit the directory that the first one chose.
_CHOSEN = "ADVERSARIA_RUN_DIRECTORY"
_JOB_IDS = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")


@dataclass
class RunOptions:
    """Where a run lives: ``root/experiment/name``.

    Args:
        root: folder of all runs.
        experiment: what is run, PAPER-DATASET by convention; a plain name, no folders.
        name: of this run, plain too; an existing one is refused. None takes the id that the agent of a wandb sweep
            gave, or that of a cluster job (ARRAY_TASK for a task of a job array), else the next free number.
        resume: continue the run ``name`` from its last checkpoint; start it where there is none.
        test: after ``fit``, run the test protocol.
    """

    root: str = "runs"
    experiment: str = "run"
    name: str | None = None
    resume: bool = False
    test: bool = True


def chosen_directory() -> Path | None:
    """The run directory of this process, None before it is chosen."""
    chosen = os.environ.get(_CHOSEN)
    return Path(chosen) if chosen else None


def open_run_directory(options: RunOptions, command: str) -> Path:
    """Chooses the directory of a run, creates it and checks that it can be written.

    All processes of a run get the same answer: those launched by the first process inherit it, those started
    by a scheduler need a name that they agree on.

    Args:
        options: the ``run`` section of the configuration.
        command: fit, validate, test or predict; the last three get a numbered directory of their own.

    Raises:
        ValueError: if the name is taken or no plain name, several processes have no common name, or a link leads out
            of the directory.
        PermissionError: if the directory cannot be written.
    """
    inherited = chosen_directory()
    if inherited is not None:
        return inherited
    experiment = Path(options.root) / demand_file_name(options.experiment, "--run.experiment")
    job = _job_name()
    processes = max(
        int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("SLURM_NTASKS", "1"))
    )
    name = job if options.name is None else demand_file_name(options.name, "--run.name")
    if name is None and (processes > 1 or options.resume):
        raise ValueError(
            f"{'resuming' if options.resume else f'a run of {processes} processes'} needs a name: give --run.name NAME"
        )
    if name is not None and command != "fit":
        name = f"{command}-{name}"
    directory = experiment / (
        name or _next_number(experiment, "run" if command == "fit" else command)
    )
    if not getattr(rank_zero_only, "rank", 0):
        if directory.exists() and any(directory.iterdir()) and not options.resume:
            raise ValueError(
                f"run {directory} exists; choose another --run.name, or continue it with --run.resume true"
            )
        _refuse_links(Path(options.root), directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe = directory / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise PermissionError(
                f"cannot write to the run directory {directory} ({error.strerror}); give --run.root DIR"
            ) from error
    if processes == 1:
        os.environ[_CHOSEN] = str(directory)
    return directory


def _refuse_links(root: Path, directory: Path) -> None:
    """What a run writes stays in its directory: that may not be a link to elsewhere, nor what is in it."""
    inside = directory.iterdir() if directory.is_dir() else []
    for path, home in [(directory, root), *((entry, directory) for entry in inside)]:
        if not path.resolve().is_relative_to(home.resolve()):
            raise ValueError(
                f"{path} is a link to {path.resolve()}, outside {home}; remove it, or give --run.root the folder "
                "in which the runs shall be"
            )


def _job_name() -> str | None:
    """What an agent or a scheduler calls this run, the same in all of its processes and when it starts it again."""
    found = os.environ
    if found.get("WANDB_SWEEP_ID") and found.get("WANDB_RUN_ID"):
        # One of several runs of the job in which the agent is.
        return file_name(f"wandb-{found['WANDB_RUN_ID']}")
    if "SLURM_ARRAY_JOB_ID" in found:
        return f"job-{found['SLURM_ARRAY_JOB_ID']}_{found['SLURM_ARRAY_TASK_ID']}"
    job = next((found[key] for key in _JOB_IDS if found.get(key, "none") != "none"), None)
    return job and file_name(f"job-{job}")


def _next_number(experiment: Path, prefix: str) -> str:
    try:
        taken = {path.name for path in experiment.iterdir() if any(path.iterdir())}
    except OSError:
        taken = set()
    return next(name for i in range(10**6) if (name := f"{prefix}-{i:03d}") not in taken)


class RunRecorder(Callback):
    """Writes ``config.yaml`` and ``results.json`` to the run directory and the configuration into checkpoints.

    ``results.json`` has a flat ``metrics`` object with keys ``stage/score/metric`` and, beside it, what is
    needed to judge them: command, data, seed, versions, hardware, wall time and git revision.

    Args:
        config: the complete configuration as YAML text.
        experiment: name shown in ``results.json``.
        command: fit, validate, test or predict.
    """

    def __init__(self, config: str = "", experiment: str = "run", command: str = "fit") -> None:
        self.config = config
        self.experiment = experiment
        self.command = command
        self.metrics: dict[str, float] = {}
        self.wall_time = 0.0
        self._started = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The wall time so far, so that it adds up over interruptions."""
        return {"wall_time": self.wall_time + time.monotonic() - self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the wall time of the interrupted run."""
        self.wall_time = state_dict["wall_time"] if self.command == "fit" else 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the configuration; that of a resumed run gets a number instead of replacing the first."""
        if is_debug_run(trainer):
            return
        results = Path(trainer.default_root_dir) / "results.json"
        if results.exists():  # a run resumed in its test has no validation any more
            self.metrics = {**json.loads(results.read_text())["metrics"], **self.metrics}
        if not self.config or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": yaml.safe_load(self.config), **provenance()})
        directory = Path(trainer.default_root_dir)
        paths = [directory / "config.yaml"]
        paths += [directory / f"config-resumed-{i}.yaml" for i in range(1, 1000)]
        for path in paths:
            if not path.exists():
                path.write_text(self.config)
                return
            if path.read_text() == self.config:
                return

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stores the configuration, so that a checkpoint alone can be tested."""
        checkpoint["config"] = self.config

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the last metrics of the training."""
        self._record(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records a validation on its own."""
        if trainer.state.fn == "validate":
            self._record(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records the test metrics."""
        self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        for key, value in trainer.callback_metrics.items():
            if key.startswith(("val/", "test/")):  # what came before is in metrics.csv
                self.metrics[key] = float(value)
        if not trainer.is_global_zero or is_debug_run(trainer):
            return
        data = getattr(trainer, "datamodule", None)
        results = {
            "metrics": dict(sorted(self.metrics.items())),
            "experiment": self.experiment,
            "command": self.command,
            "module": type(trainer.lightning_module).__name__,
            "data": getattr(data, "split_info", {}),
            "seed": global_seed(),
            "epochs": trainer.current_epoch,
            "processes": trainer.world_size,
            "wall_time_s": round(self.wall_time + time.monotonic() - self._started, 1),
            **provenance(),
        }
        path = Path(trainer.default_root_dir) / "results.json"
        with whole_file(path) as file:
            file.write((json.dumps(results, indent=2) + "\n").encode())
        rank_zero_info(f"wrote {path}")


def provenance() -> dict[str, Any]:
    """What made the numbers, beside the configuration."""
    return {"git_revision": git_revision(), "versions": versions(), "hardware": hardware()}


def git_revision() -> str | None:
    """Revision of the code, with ``+`` for uncommitted changes, None outside a checkout."""
    here = Path(__file__).parent
    try:
        revision = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        changes = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if revision.returncode:
        return None
    return revision.stdout.strip() + ("+" if changes.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "lightning", "torchmetrics", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the run had."""
    return {
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def with_checkpoint_config(arguments: list[str]) -> list[str]:
    """Puts the configuration stored in ``--ckpt_path`` before the files and arguments given."""
    path = None
    for position, argument in enumerate(arguments):
        if argument == "--ckpt_path":
            path = arguments[position + 1] if position + 1 < len(arguments) else None
        elif argument.startswith("--ckpt_path="):
            path = argument.split("=", 1)[1]
    if path is None:
        return arguments
    stored = yaml.safe_load(load_checkpoint(path).get("config") or "{}")
    wanted = ["model", "data", "seed_everything"]
    if arguments[0] == "fit":
        wanted += ["trainer", "checkpoint"]
    kept = {key: stored[key] for key in wanted if key in stored}
    if "trainer" not in kept and "trainer" in stored:
        # The recipe's tables and figures, not its machine.
        kept["trainer"] = {"callbacks": stored["trainer"]["callbacks"]}
    if "run" in stored:
        kept["run"] = {key: stored["run"][key] for key in ("root", "experiment")}
    text = yaml.safe_dump(kept, default_flow_style=True, width=10**9)
    return [arguments[0], "-c", text, *arguments[1:]] if kept else arguments


def readable_message(error: BaseException) -> str:
    """The message of our own code where an error was wrapped, else the parser's without its talk of types."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        # Only a checkpoint and rows of metrics.csv can be made up for later; another file would be missing.
        directory = chosen_directory() or Path()
        return f"{error} ({free_space(directory)}); free some space, then continue with --run.resume true"
    cause: BaseException | None = error
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        raised_in = frames[-1].filename if frames else ""
        ours = raised_in.startswith(str(Path(__file__).parents[1]))
        if ours and "site-packages" not in raised_in:
            # Alone, the message of such an error is a word or nothing.
            named = isinstance(cause, KeyError | AssertionError)
            name = type(cause).__name__
            return f"{name}: {cause}" if named and str(cause) else str(cause) or name
        cause = cause.__cause__
    noise = (
        "Subtypes:",
        "Given value",
        "Errors:",
        "Does not validate",
        "- Expected a <class 'NoneType'>",
    )
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if not line.startswith(noise))


def keep_traceback(directory: Path | None = None) -> None:
    """Where a run directory exists, the traceback goes there, out of the way of the message.

    Args:
        directory: of a run of several processes, each of which has a file of its own.
    """
    rank = 0 if directory is None else getattr(rank_zero_only, "rank", 0)
    directory = directory or chosen_directory()
    if directory is None or not directory.is_dir():
        return
    path = directory / (f"error-rank-{rank}.log" if rank else "error.log")
    with path.open("a") as file:
        traceback.print_exc(file=file)
    if not rank:
        print(f"(traceback in {path})", file=sys.stderr)
