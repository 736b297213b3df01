"""One entry point for every paper: ``python train.py fit|validate|test|predict -c configs/PAPER/DATASET.yaml``."""

import importlib
import logging
import os
import pkgutil
import sys
import warnings
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import callbacks
import datamodules
import lightning_modules
from callbacks.checkpoint import (
    EXIT_PREEMPTED,
    AtomicCheckpointIO,
    Preempted,
    ResumableCheckpoint,
    newest_readable,
    refuse_other_hyperparameters,
    signals_stop_at_once,
)
from callbacks.environment import ClusterError, ClusterGuard
from callbacks.finite import FiniteGuard
from callbacks.lifeline import EXIT_ERROR
from callbacks.loggers import ResumableCSVLogger, RunWandbLogger
from callbacks.predictions import PredictionWriter
from callbacks.run import (
    RunOptions,
    RunRecorder,
    chosen_directory,
    keep_traceback,
    open_run_directory,
    readable_message,
    with_checkpoint_config,
)
from callbacks.sweep import sweep

DESCRIPTION = (
    "Adversaria: train.py fit -c configs/PAPER/DATASET.yaml [-c configs/trainer/OVERLAY.yaml] [--KEY VALUE ...]; "
    "train.py test|validate|predict --ckpt_path FILE; train.py sweep --help for several runs and their mean"
)

# A class that was imported can be named in a configuration without its module.
for package in (lightning_modules, datamodules, callbacks):
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)


class AdversariaCLI(LightningCLI):
    """LightningCLI with run directories, a test after fit, and configuration that wins over checkpoints."""

    def __init__(self, guard: ClusterGuard, arguments: list[str]) -> None:
        self.guard = guard
        self.asked = arguments[0] if arguments else ""
        quiet: dict[str, Any] = {"exit_on_error": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults={"devices": 1},
            parser_kwargs=dict.fromkeys(self.subcommands(), quiet)
            | {**quiet, "description": DESCRIPTION},
            args=arguments,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for; a parser takes long to build."""
        known = LightningCLI.subcommands()
        return {self.asked: known[self.asked]} if self.asked in known else known

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the sections ``run`` and ``checkpoint``."""
        parser.add_class_arguments(RunOptions, "run")
        parser.add_lightning_class_args(ResumableCheckpoint, "checkpoint")

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # the papers' own tables say it better
        if subcommand == "predict":
            parser.set_defaults(return_predictions=False)  # they are written batch by batch
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the arguments on top of the configuration that ``--ckpt_path`` remembers."""
        assert isinstance(args, list)
        self.config = parser.parse_args(with_checkpoint_config(args))

    def _parse_ckpt_path(self) -> None:
        """Not wanted: Lightning would let the checkpoint's arguments override the configuration."""

    def before_instantiate_classes(self) -> None:
        """Opens the run directory and points loggers and ``resume`` to it."""
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        self.directory = open_run_directory(RunOptions(**config.run.as_dict()), self.subcommand)
        rank_zero_info(f"run directory: {self.directory}")
        for logger in config.trainer.logger if isinstance(config.trainer.logger, list) else []:
            if "save_dir" in logger.init_args:
                logger.init_args.save_dir = str(self.directory)
        if self.subcommand == "fit" and config.run.resume:
            found = newest_readable(self.directory)
            config.ckpt_path = str(found) if found else config.ckpt_path

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of this run, with the callbacks that every run has."""
        assert self.subcommand is not None
        config = self._get(self.config_init, "trainer")
        plugins = config["plugins"] or []
        kwargs["plugins"] = [
            *(plugins if isinstance(plugins, list) else [plugins]),
            AtomicCheckpointIO(),
        ]
        kwargs["default_root_dir"] = str(self.directory)
        if config["max_epochs"] is None and config["max_steps"] == -1:
            kwargs["max_epochs"] = getattr(self.model, "total_epochs", None)
        if config["logger"] is None or config["logger"] is True:
            kwargs["logger"] = ResumableCSVLogger(str(self.directory))
        self._dump_config()
        text = yaml.safe_dump(self.config_dump, sort_keys=False)
        experiment = self.config[self.subcommand].run.experiment
        recorder = RunRecorder(text, experiment, self.subcommand)
        self.guard.configuration = text
        self.trainer_defaults["callbacks"] = [
            FiniteGuard(),
            PredictionWriter(),
            recorder,
            self.guard,
        ]
        trainer = super().instantiate_trainer(**kwargs)
        self.guard.attach(trainer)
        paper = type(self.model).__module__.removeprefix("lightning_modules.").split(".")[0]
        dataset = getattr(self.datamodule, "hparams", {}).get("dataset")
        for logger in trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                tags = [paper, dataset] if dataset else [paper]
                logger.label(experiment, self.directory.name, self.subcommand, tags)
        return trainer

    def before_fit(self) -> None:
        """Refuses to continue a checkpoint under other hyper-parameters.

        Raises:
            ValueError: naming each argument with both values.
        """
        path = self.config.fit.ckpt_path
        if not path:
            return
        refuse_other_hyperparameters(path, dict(self.model.hparams))

    def after_fit(self) -> None:
        """Runs the test protocol."""
        fit = self.config.fit
        if fit.run.test and not fit.trainer.fast_dev_run:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


class ParsedCommand(AdversariaCLI):
    """A command that is parsed but not run: no seed, no run directory, no trainer."""

    def _set_seed(self) -> None:
        """Nothing random follows."""

    def before_instantiate_classes(self) -> None:
        """Opens no directory."""

    def instantiate_classes(self) -> None:
        """Only what was parsed."""
        self._dump_config()

    def _run_subcommand(self, subcommand: str) -> None:
        """Not wanted."""


class RehearsedCommand(ParsedCommand):
    """The same, after building model, data and callbacks, whose constructors check their arguments."""

    def instantiate_classes(self) -> None:
        """Builds them and lets them go."""
        super().instantiate_classes()
        self.parser.instantiate_classes(self.config)


def rehearse(arguments: list[str], build: bool) -> dict[str, Any]:
    """The whole configuration of a command, without running it; with ``build`` its classes are built as well."""
    kind = RehearsedCommand if build else ParsedCommand
    return kind(ClusterGuard(), arguments).config_dump


def main(args: list[str] | None = None) -> AdversariaCLI | None:
    """Runs one command.

    Args:
        args: the command line, None for that of the process.

    Returns:
        The finished CLI with its ``trainer``, ``model`` and ``datamodule``.
    """
    arguments = sys.argv[1:] if args is None else args
    # Deprecated names that Lightning uses, and its advertisement, tell a user nothing.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*``instantiate_classes`` was deprecated.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
    inherited = chosen_directory()
    guard = ClusterGuard()
    try:
        if arguments[:1] == ["sweep"]:
            chosen = sweep(arguments[1:], rehearse)
            if chosen is None:
                return None
            arguments = chosen
        with signals_stop_at_once():
            return AdversariaCLI(guard, arguments)
    except Preempted as stop:
        message, code = guard.conclude(stop, EXIT_PREEMPTED)
        if message is not None:
            print(message, file=sys.stderr)
        sys.exit(code)
    except ArgumentError as error:
        print(
            f"error: {readable_message(error)}\n(a recipe is given with -c configs/PAPER/DATASET.yaml; "
            "python train.py fit --help lists all arguments)",
            file=sys.stderr,
        )
        sys.exit(2)
    except (ArithmeticError, ValueError, OSError, RuntimeError, MisconfigurationException) as error:
        message, code = guard.conclude(error, EXIT_ERROR)
        if message is not None:
            print(f"error: {message}", file=sys.stderr)
        if not isinstance(error, ClusterError):
            keep_traceback(guard.directory)
        sys.exit(code)
    finally:
        guard.leave()
        if inherited is None:
            os.environ.pop("ADVERSARIA_RUN_DIRECTORY", None)


if __name__ == "__main__":
    main()
