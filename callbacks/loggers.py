"""Loggers that write into the run directory and go on where an interrupted run stopped."""

import csv
import errno
import os
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from io import StringIO
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import (
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
)
from torch import Tensor

from callbacks.wandb_records import history
from lightning_modules.files import free_space, whole_file

AXIS = "trainer/global_step"  # Lightning's name for the number of the batch


class ResumableCSVLogger(CSVLogger):
    """``metrics.csv`` in the run directory, the same whether a run was interrupted or not.

    Lightning's own logger deletes the file of the run that is resumed. This one keeps it: the first row logged
    by the resumed ``fit`` is looked up among the old rows (same step, same columns), and what was written from there
    on, after the checkpoint the run resumed from, is dropped to be written again; so is the row of a test that a
    resumed run repeats after it. ``test`` and ``validate`` on their own only append.

    Every row has a ``step``, the number of the batch, and holds what was logged together. A new metric adds a column.
    Rows that cannot be written, as on a full disk, wait until they can.

    Args:
        save_dir: the run directory.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name="", version="")
        self._trainer: Trainer | None = None

    @property
    def log_dir(self) -> str:
        """The run directory itself, without folders for name and version."""
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsFile":
        """The file, on rank 0."""
        if self._experiment is None:
            self._experiment = MetricsFile(Path(self.save_dir))  # type: ignore[assignment]
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def log_graph(self, model: LightningModule, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Lightning calls this when a run starts, which is where a logger meets its trainer."""
        self._trainer = model._trainer

    @rank_zero_only
    def log_metrics(  # type: ignore[override]
        self, metrics: dict[str, Tensor | float], step: int | None = None
    ) -> None:
        """Adds a row."""
        trainer = self._trainer
        replaying = trainer is None or trainer.state.fn == "fit"
        if trainer is not None:  # the test of a run that was resumed after its training
            replaying |= trainer.fit_loop.epoch_progress.current.ready > 0
        self.experiment.log_metrics(metrics, step, replaying)
        self.save()


class MetricsFile:
    """The rows of ``metrics.csv``; what is on disk is always a whole table.

    Args:
        directory: where it lies.

    Raises:
        ValueError: if there is another kind of table in its place.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.path = directory / "metrics.csv"
        self.hparams: dict[str, Any] = {}
        self.columns: list[str] = []
        self.metrics: list[dict[str, Any]] = []
        self._old_rows: list[dict[str, str]] = []
        self._warned = False
        self._joined = not self.path.exists()
        if self._joined:
            return
        with self.path.open(newline="") as file:
            text = file.read()
        # A kill may leave half a row at the end.
        reader = csv.DictReader(StringIO(text[: text.rfind("\n") + 1], newline=""))
        self._old_rows = [{k: v for k, v in row.items() if v != ""} for row in reader]
        self.columns = list(reader.fieldnames or [])
        if self._old_rows and "step" not in self.columns:
            raise ValueError(
                f"{self.path} has no column 'step', so it is not a table of this logger; move it away"
            )

    def log_hparams(self, params: dict[str, Any]) -> None:
        """Writes ``hparams.yaml``."""
        self.hparams.update(params)
        save_hparams_to_yaml(str(self.directory / "hparams.yaml"), self.hparams)

    def log_metrics(
        self,
        metrics: dict[str, Tensor | float],
        step: int | None = None,
        replaying: bool = True,
    ) -> None:
        """Adds a row; the first one is joined to the rows of an earlier run, see :class:`ResumableCSVLogger`."""
        row: dict[str, Any] = {
            key: value.item() if isinstance(value, Tensor) else value
            for key, value in metrics.items()
        }
        row["step"] = 0 if step is None else step
        if not self._joined:
            self._join(row, replaying)
        self.metrics.append(row)

    def _join(self, first: dict[str, Any], replaying: bool) -> None:
        rows = self._old_rows
        if replaying:
            same = (
                position
                for position, row in enumerate(rows)
                if int(row["step"]) == first["step"] and row.keys() == first.keys()
            )
            end = next(same, len(rows))
            rows = [row for row in rows[:end] if int(row["step"]) <= first["step"]]
        self._rewrite(rows, self.columns)
        self._joined = True

    def save(self) -> None:
        """Writes the new rows, or keeps them for the next time if the disk is full."""
        if not self.metrics:
            return
        try:
            self._append()
        except OSError as error:
            if not self._warned:
                rank_zero_warn(
                    f"{self.path} cannot be written ({error.strerror or error}), {free_space(self.path)}; rows "
                    "are kept until they can be"
                )
            self._warned = True
        else:
            self.metrics, self._warned = [], False

    def _append(self) -> None:
        new = {key for row in self.metrics for key in row} - set(self.columns)
        if new:
            rows: list[dict[str, Any]] = []
            if self.path.exists():
                with self.path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            columns = sorted({*self.columns, *new})
            self._rewrite(rows, columns)
            self.columns = columns
        text = StringIO(newline="")
        csv.DictWriter(text, self.columns).writerows(self.metrics)
        added = text.getvalue().encode()
        with self.path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                if (file.write(added) or 0) < len(added):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            except OSError:
                file.truncate(whole)  # half a row would spoil the next
                raise

    def _rewrite(self, rows: list[dict[str, Any]], columns: list[str]) -> None:
        text = StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        with whole_file(self.path) as file:
            file.write(text.getvalue().encode())


class RunWandbLogger(WandbLogger):
    """A wandb run that belongs to the run directory: resuming the one resumes the other.

    The id of the wandb run is kept in ``wandb-id.txt``. Where nobody is logged in, the run is recorded offline, below
    the run directory; nothing ever asks for a key, and the console gets one line.

    What was recorded before an interruption is not logged again by the batches that are done once more; the wandb
    files of the run directory tell what that is. Rows are numbered through all parts of the run, so that the parts can
    be uploaded one after the other. A kill loses what wandb did not write yet, a second at most, and only
    the rows of batches that are not done again are lost for good.

    Args:
        project: wandb project; the environment variable ``WANDB_PROJECT`` by default, else ``adversaria``.
        name: of the run as wandb shows it; EXPERIMENT/NAME by default.
        save_dir: the run directory.
        offline: True or False to insist; None asks the environment variable ``WANDB_MODE`` and wandb's settings first
            and goes offline when there is no login.
        tags: of the wandb run, beside those of the paper and the data set.
        group: of the wandb run; the experiment by default.
        job_type: of the wandb run; the command (fit, test ...) by default.
        notes: a description of the wandb run.
        entity: user or team; the default one of the login if None.
    """

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        save_dir: str = ".",
        offline: bool | None = None,
        tags: list[str] | None = None,
        group: str | None = None,
        job_type: str | None = None,
        notes: str | None = None,
        entity: str | None = None,
    ) -> None:
        super().__init__(
            name=name,
            save_dir=save_dir,
            project=project or os.environ.get("WANDB_PROJECT") or "adversaria",
            tags=tags,
            group=group,
            job_type=job_type,
            notes=notes,
            entity=entity,
        )
        # Lightning passes it along even unset, and wandb warns about it.
        self._wandb_init.pop("anonymous", None)
        self.offline = offline
        self._configured = False
        self._recorded: set[tuple[Any, frozenset[str]]] = set()
        self._next_row = 0

    def label(self, experiment: str, name: str, command: str, tags: Sequence[str] = ()) -> None:
        """Names the run as its directory, where neither the configuration nor a ``WANDB_*`` variable does.

        Args:
            experiment: becomes the group, so that seeds, splits and sweeps of a recipe stand together.
            name: of the run directory.
            command: becomes the job type.
            tags: beside those of the configuration.
        """
        for key, variable, value in (
            ("name", "WANDB_NAME", f"{experiment}/{name}"),
            ("group", "WANDB_RUN_GROUP", experiment),
            ("job_type", "WANDB_JOB_TYPE", command),
        ):
            if self._wandb_init.get(key) is None and not os.environ.get(variable):
                self._wandb_init[key] = value
        given = self._wandb_init.get("tags") or os.environ.get("WANDB_TAGS", "").split(",")
        self._wandb_init["tags"] = list(dict.fromkeys(tag for tag in [*tags, *given] if tag))

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run on rank 0, begun or continued at its first use."""
        if self._experiment is not None:
            return self._experiment
        directory = Path(self.save_dir or ".")
        directory.mkdir(parents=True, exist_ok=True)
        self._id = self._wandb_init["id"] = _run_id(directory / "wandb-id.txt")
        # Tables are prepared here; the default is in the home directory, which an upload from elsewhere does not have.
        os.environ.setdefault("WANDB_DATA_DIR", str(directory.absolute() / "wandb"))
        mode = self._wandb_init["mode"] = self._mode()
        silent = mode == "offline" or (mode is None and _wandb_settings().mode != "online")
        self._wandb_init["settings"] = {
            "silent": silent,
            "quiet": True,
            "x_transaction_log_flush_interval": 1.0,
        }
        rows = _recorded_rows(directory / "wandb", self._id)
        run = super().experiment
        # Processes that multiprocessing starts do not come to what wandb does at the end of a program.
        Finalize(None, run.finish, exitpriority=0)
        if not run.offline:  # what the server has, which may be less than what was recorded here
            rows = [row for row in rows if row["_step"] < run.starting_step]
        self._recorded = {_columns(row.get(AXIS), row) for row in rows}
        self._next_row = max((row["_step"] + 1 for row in rows), default=0)
        if run.offline:
            rank_zero_info(
                f"wandb: run {self._id} is recorded offline; upload it with "
                f"`wandb sync {directory / 'wandb'}`"
            )
        return run

    def _mode(self) -> str | None:
        """What to tell ``wandb.init``: None leaves it to wandb's own settings."""
        import wandb

        if self.offline is not None:
            return "offline" if self.offline else "online"
        if os.environ.get("WANDB_MODE") or _wandb_settings().mode != "online":
            return None
        return None if wandb.login(prompt=False, verify=False) else "offline"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Adds to the config; where that is the whole configuration of a run, Lightning's extract of it is left out."""
        if isinstance(params, dict) and "config" in params:
            self._configured = True
            params = {**params["config"], **{k: v for k, v in params.items() if k != "config"}}
        elif self._configured:
            return
        super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Adds a row to the history, unless it was there before the run was interrupted."""
        run = self.experiment
        if _columns(step, metrics) in self._recorded:
            return
        if step is not None:
            metrics = {**metrics, AXIS: step}
        self._next_row = max(self._next_row, run.step)
        run.log(metrics, step=self._next_row, commit=True)


def _columns(step: Any, row: Mapping[str, Any]) -> tuple[Any, frozenset[str]]:
    """By what a row is recognised: where it stands on the batch axis, and what it holds."""
    return step, frozenset(key for key in row if key != AXIS and not key.startswith("_"))


def _wandb_settings() -> Any:
    import wandb

    return wandb.setup().settings


def _recorded_rows(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """The history of a run as all processes that had it recorded it."""
    files = sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"))
    return [row for file in files for row in history(file)]


def _run_id(path: Path) -> str:
    """The id kept in ``path``; if there is none, that of the agent of a sweep, else a new one."""
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        beside = path.with_suffix(".part")
        beside.write_text(kept + "\n")
        os.replace(beside, path)
    return kept
