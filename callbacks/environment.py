"""Looks at the start whether the processes of a run can work together, and says in one line what is wrong."""

import hashlib
import os
import secrets
import socket
import time
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import distributed

from callbacks.checkpoint import Preempted, ResumableCheckpoint
from callbacks.lifeline import EXIT_ERROR, Lifeline, disarm_launcher, is_collective_error
from callbacks.run import readable_message, versions
from lightning_modules.randomness import global_seed

ROOT = Path(__file__).parents[1]
# Processes start within some seconds of each other, and have already met once when this time begins.
ANSWER_WITHIN = 60.0
# A network file system may show a new file late.
SHARED_WITHIN = 15.0
# Errors whose messages speak for themselves.
_EXPECTED = (
    Preempted,
    ArithmeticError,
    ValueError,
    OSError,
    RuntimeError,
    MisconfigurationException,
)
# Step ids of SLURM that are not those of srun: of the batch script, and of an interactive shell.
_NO_STEP = {"", "4294967291", "4294967290", "batch", "interactive"}


class ClusterError(RuntimeError):
    """The processes cannot work together. All ranks raise it with the same message; one of them says it."""


# ---------------------------------------------------------------------- before the processes meet
def refuse_wrong_process_count(trainer: Trainer) -> None:
    """Compares what a launcher started with what the trainer was told; needs no other process.

    Raises:
        ClusterError: if the numbers differ, or if ``srun`` is missing.
        ValueError: if this process takes itself for the first one although it is not.
    """
    found, devices, nodes = os.environ, trainer.num_devices, trainer.num_nodes
    meant = devices * nodes
    given = f"--trainer.devices {devices} x --trainer.num_nodes {nodes} makes {meant}"
    launches = _launches_itself(trainer)
    if distributed.is_torchelastic_launched():
        started, launcher = int(found["WORLD_SIZE"]), "torchrun"
        per_node = int(found["LOCAL_WORLD_SIZE"])
        mend = "they are --nproc-per-node and --nnodes of torchrun"
    elif "SLURM_NTASKS" in found and not launches:
        started, launcher = int(found["SLURM_NTASKS"]), "srun"
        per_node = started // max(int(found.get("SLURM_NNODES", nodes)), 1)
        mend = "they are --ntasks-per-node and --nodes of the job"
        if started > 1 and found.get("SLURM_STEP_ID", "") in _NO_STEP:
            raise ClusterError(
                f"the job has {started} tasks, but this process was not started by srun, so the others would never "
                "come; put srun before the command, as configs/trainer/slurm.sbatch does"
            )
    else:
        rank = next(
            (int(found[key]) for key in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK") if key in found), 0
        )
        if rank > 0 and launches and "LOCAL_RANK" not in found:
            raise ValueError(  # each of them says so: none knows of the others
                f"this is process {rank} of its launcher, but it takes itself for the first of a run of its own; "
                "start with torchrun, or with srun in a job whose name is neither bash nor interactive"
            )
        return
    if started != meant:
        raise ClusterError(
            f"{launcher} started {started} process{'es' * (started != 1)}, but {given}; {mend}: give "
            f"--trainer.devices {per_node} --trainer.num_nodes {max(started // max(per_node, 1), 1)}, or start {meant}"
        )


def _launches_itself(trainer: Trainer) -> bool:
    """Whether Lightning takes this process for one that no scheduler started."""
    environment = trainer._accelerator_connector.cluster_environment
    return environment is None or type(environment).__name__ == "LightningEnvironment"


# ---------------------------------------------------------------------- when they have met
def check_environment(trainer: Trainer, configuration: str) -> Lifeline:
    """Compares what the processes are and what they see; a collective call, after the process group was made.

    Args:
        trainer: of this process.
        configuration: the complete configuration as YAML text.

    Returns:
        The connection by which the processes will miss one of them that dies.

    Raises:
        ClusterError: on all ranks, naming the ranks that differ from rank 0 and how to mend it.
    """
    rank, world = trainer.global_rank, trainer.world_size
    directory = Path(trainer.default_root_dir)
    # Over gloo, whatever the backend of the training: it answers or fails, and does not hang.
    group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=ANSWER_WITHIN))
    own = _facts(trainer, configuration)
    facts = _gather(own, group)
    lifeline = Lifeline(
        rank, world, [fact["host"] for fact in facts], lambda: _next_step(directory)
    )
    token = directory / f".shared-{secrets.token_hex(8)}"
    offer: dict[str, Any] = {}
    if rank == 0:
        disarm_launcher(trainer)
        token.touch()
        offer = {**lifeline.listen(), "token": token.name}
    offer = _gather(offer, group)[0]
    reached = True
    try:
        if rank > 0:
            try:
                lifeline.connect(os.environ["MASTER_ADDR"], offer)
            except OSError:
                reached = False
        answers = _gather((_sees(directory, offer["token"]), reached), group)
    finally:
        token.unlink(missing_ok=True)
    problems = _differences(facts)
    blind = [position for position, (sees, _) in enumerate(answers) if not sees]
    if blind:
        problems.append(
            f"{_names(facts, blind)} does not see the run directory {facts[0]['directory']} of rank 0"
            f" ({facts[blind[0]]['directory']} there): give --run.root DIR on a file system that all machines share"
        )
    cut_off = [position for position, (_, reached) in enumerate(answers) if not reached]
    if cut_off:
        problems.append(
            f"{_names(facts, cut_off)} cannot connect to port {offer['port']} of {os.environ['MASTER_ADDR']}: "
            "let the machines of a job reach each other's ports"
        )
    # The backend of the training is asked last: it may be the one that hangs.
    if not problems:
        unanswered = [
            i
            for i, answered in enumerate(_gather(_backend_answers(trainer), group))
            if not answered
        ]
        if unanswered:
            problems.append(
                f"{distributed.get_backend()} did not finish an all_reduce within {ANSWER_WITHIN:.0f} s on"
                f" {_names(facts, unanswered)}: try NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME "
                "for the network between the machines"
            )
    distributed.destroy_process_group(group)
    if problems:
        lifeline.leave()
        raise ClusterError("the processes of this run do not fit together: " + "; ".join(problems))
    nodes = len({fact["node"] for fact in facts})
    rank_zero_info(
        f"{world} processes on {nodes} node{'s' * (nodes > 1)}, {distributed.get_backend()}: same code, packages, "
        "configuration and seed, run directory shared"
    )
    if nodes > 1 and getattr(trainer.datamodule, "download", False):  # type: ignore[attr-defined]
        rank_zero_warn(
            "data.download with several nodes: each downloads for itself; where data.root is shared, "
            "download once with one process before"
        )
    return lifeline


def _facts(trainer: Trainer, configuration: str) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "node": trainer.node_rank,
        "code": _fingerprint(),
        "packages": versions(),
        "configuration": hashlib.blake2b(configuration.encode()).hexdigest(),
        "text": configuration,
        "seed": global_seed(),
        "directory": str(Path(trainer.default_root_dir).absolute()),
    }


def _fingerprint() -> str:
    """Hash of the code that is running; tells more than a revision, which says nothing of uncommitted changes."""
    digest = hashlib.blake2b(digest_size=8)
    for package in ("train.py", "callbacks", "datamodules", "lightning_modules"):
        path = ROOT / package
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()


def _differences(facts: list[dict[str, Any]]) -> list[str]:
    """Where ranks differ from rank 0."""
    problems: list[str] = []
    for name, mend in (
        ("code", "bring all machines to the same revision, or share one checkout"),
        ("packages", "install the same versions everywhere (constraints.txt)"),
        ("seed", "give --seed_everything NUMBER"),
        ("configuration", "give every process the same arguments and files"),
    ):
        others = [rank for rank, fact in enumerate(facts) if fact[name] != facts[0][name]]
        if not others:
            continue
        # The configuration is compared by a hash and named key by key.
        key = "text" if name == "configuration" else name
        a, b = (_flat(yaml.safe_load(str(facts[rank][key]))) for rank in (0, others[0]))
        different = [k for k in {**a, **b} if a.get(k) != b.get(k) and k != "seed_everything"]
        if different:  # the seed is part of the configuration, but named apart
            what = ", ".join(f"{k} {a.get(k)} and {b.get(k)}".strip() for k in different)
            problems.append(
                f"the {name} of {_names(facts, others)} differs from rank 0's ({what}): {mend}"
            )
    return problems


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, part in tree.items()
        for k, v in _flat(part, f"{prefix}.{key}".lstrip(".")).items()
    }


def _names(facts: list[dict[str, Any]], ranks: list[int]) -> str:
    """``rank 1 on a`` or ``ranks 4, 5, 6, 7 on b and rank 9 on c``."""
    named = []
    for host, found in groupby(ranks, lambda rank: facts[rank]["host"]):
        members = [str(rank) for rank in found]
        named.append(f"rank{'s' * (len(members) > 1)} {', '.join(members)} on {host}")
    return " and ".join(named)


def _sees(directory: Path, name: str) -> bool:
    """Whether a file of rank 0 is there; listing the folder makes a network file system ask its server."""
    give_up = time.monotonic() + SHARED_WITHIN
    while True:
        if directory.is_dir() and name in os.listdir(directory):
            return True
        if time.monotonic() > give_up:
            return False
        time.sleep(0.2)


def _backend_answers(trainer: Trainer) -> bool:
    """Whether an ``all_reduce`` over the backend of the training comes back; polled, since waiting could hang."""
    ones = torch.ones(1, device=trainer.strategy.root_device)
    work = distributed.all_reduce(ones, async_op=True)
    assert work is not None
    give_up = time.monotonic() + ANSWER_WITHIN / 2
    while not work.is_completed():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.005)
    return int(ones) == trainer.world_size


def _gather(own: Any, group: Any) -> list[Any]:
    gathered: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(gathered, own, group=group)
    return gathered


def _next_step(directory: Path) -> str:
    path = ResumableCheckpoint.path_in(directory)
    if path.exists():
        return f"continue from {path} with --run.resume true"
    return "no checkpoint was written yet"


class ClusterGuard(Callback):
    """Checks the environment of a run of several processes when it starts, and says once why it ends.

    With one process it does nothing. Processes that Lightning forks are left alone, too: they share everything, and
    their parent watches them.

    Attributes:
        configuration: the complete configuration as YAML text, to be the same everywhere.
        directory: of a run of several processes.
    """

    def __init__(self) -> None:
        self.configuration = ""
        self.directory: Path | None = None
        self.lifeline: Lifeline | None = None

    def attach(self, trainer: Trainer) -> None:
        """Lets the trainer's processes check each other as soon as they are connected, before data are touched.

        Raises:
            ClusterError: if the number of processes is wrong.
            ValueError: if this process takes itself for the first one although it is not.
        """
        refuse_wrong_process_count(trainer)
        strategy = trainer.strategy
        if trainer.world_size == 1 or isinstance(strategy.launcher, _MultiProcessingLauncher):
            return
        self.directory = Path(trainer.default_root_dir)
        connect = strategy.setup_environment

        def connect_and_check() -> None:
            connect()
            if self.lifeline is None:
                self.lifeline = check_environment(trainer, self.configuration)

        # Lightning has no hook between its connection of the processes and the preparation of the data.
        strategy.setup_environment = connect_and_check  # type: ignore[method-assign]

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tells the other processes at once; loggers may take their time to close."""
        self._last_words(exception, EXIT_ERROR)

    def _last_words(self, error: BaseException, code: int) -> None:
        if self.lifeline is not None:
            message = readable_message(error) if isinstance(error, Exception) else ""
            self.lifeline.last_words(
                message or type(error).__name__, is_collective_error(error), code
            )

    def conclude(self, error: Exception, code: int) -> tuple[str | None, int]:
        """What this process says about the exception that ends it, and its exit code.

        Returns:
            The message, None where another process says it; and the code.
        """
        own = readable_message(error)
        if self.lifeline is None:
            silent = isinstance(error, ClusterError) and getattr(rank_zero_only, "rank", 0) > 0
            return (None if silent else own), code
        self._last_words(error, code)
        ending = self.lifeline.verdict()
        if ending is None:
            return own, code
        if not is_collective_error(error):
            return (own if ending.speaker else None), code
        return (ending.message if ending.speaker else None), ending.code

    def leave(self) -> None:
        """Ends the watch; at the end of the process."""
        if self.lifeline is not None:
            self.lifeline.leave()
        self.lifeline = self.directory = None
