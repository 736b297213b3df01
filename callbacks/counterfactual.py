"""Synthesis of counterfactual images at the phase boundary, and the picture that explains them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tqdm.auto import tqdm

from callbacks.checkpoint import find_checkpoint_callback
from callbacks.media import labelled_grid, log_images, log_table, run_directory
from lightning_modules.files import read_cached, whole_file
from lightning_modules.nn.statistics import gather_over_ranks

Pools = dict[str, dict[str, torch.Tensor]]


class CounterfactualSynthesis(Callback):
    """Generates an open set before the epochs that need one.

    Works with any module that offers

    * ``synthesis_request(epoch) -> range | None``: global indices of the samples missing before an epoch,
    * ``synthesis_chunks(request) -> list[range]``: the indices that are made together,
    * ``synthesis_fingerprint() -> str``: changes with everything a sample depends on,
    * ``training_bank()``: the images to start from,
    * ``synthesize(bank, samples) -> {pool: {name: Tensor [N, ...]}}``, a function of the indices alone,
    * ``store_synthesis(pools)``.

    Whole chunks are shared among the ranks, so the set is the same for any number of ranks. A finished chunk is written
    to the run directory at once; after a kill only unfinished ones are made again. What the module records of each
    sample (probability of the target, distance, steps ...) goes to ``tables/synthesis-*.csv`` and the loggers.

    A dict ``pool_titles`` (pool to title) makes the picture easier to read.

    Args:
        preview: generated images shown beside the images they started from, 0 for no picture.
    """

    def __init__(self, preview: int = 12) -> None:
        if preview < 0:
            raise ValueError(f"preview is a number of images, not {preview}")
        self.preview = preview

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks the protocol.

        Raises:
            MisconfigurationException: if the module cannot synthesise.
        """
        if not hasattr(pl_module, "synthesis_request"):
            raise MisconfigurationException(
                "CounterfactualSynthesis needs a module with synthesis_request(), which "
                f"{type(pl_module).__name__} lacks; remove the callback or use OSRCIModule"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the missing samples, if any."""
        module: Any = pl_module
        request = module.synthesis_request(trainer.current_epoch)
        if request is None:
            return
        chunks = module.synthesis_chunks(request)
        mine = chunks[trainer.global_rank :: trainer.world_size]
        directory = run_directory(trainer) / "synthesis"
        fingerprint = module.synthesis_fingerprint()
        checkpoint = find_checkpoint_callback(trainer)
        bank = module.training_bank()
        made: list[tuple[int, Pools]] = []
        bar = tqdm(
            total=len(request),
            desc=f"synthesis {request.start}-{request.stop}",
            unit="image",
            disable=not trainer.is_global_zero or trainer.progress_bar_callback is None,
        )
        # The same number of turns on every rank: the decision to stop is taken together.
        for turn in range(-(-len(chunks) // trainer.world_size)):
            if checkpoint is not None and checkpoint.stop_requested(trainer):
                bar.close()
                checkpoint.raise_preempted()
            if turn < len(mine):
                chunk = mine[turn]
                made.append((chunk.start, self._chunk(module, bank, chunk, directory, fingerprint)))
            done = chunks[turn * trainer.world_size : (turn + 1) * trainer.world_size]
            bar.update(sum(len(chunk) for chunk in done))
        bar.close()
        made = [item for part in gather_over_ranks(trainer, made) for item in part]
        ordered = [pools for _, pools in sorted(made, key=lambda item: item[0])]
        pools = {
            pool: {
                name: torch.cat([part[pool][name] for part in ordered]) for name in ordered[0][pool]
            }
            for pool in ordered[0]
        }
        module.store_synthesis(pools)
        self._record(trainer, request, pools)
        if self.preview:
            self._show(trainer, module, pools)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the chunk files: the images are in the last checkpoint."""
        if trainer.is_global_zero:
            shutil.rmtree(run_directory(trainer) / "synthesis", ignore_errors=True)

    def _chunk(
        self, module: Any, bank: Any, chunk: range, directory: Path, fingerprint: str
    ) -> Pools:
        path = directory / f"{chunk.start:07d}-{chunk.stop:07d}.pt"
        stored = read_cached(path)
        if stored is not None and stored["fingerprint"] == fingerprint:
            return stored["pools"]
        pools = module.synthesize(bank, chunk)
        with whole_file(path) as file:
            torch.save({"fingerprint": fingerprint, "pools": pools}, file)
        return pools

    def _record(self, trainer: Trainer, request: range, pools: Pools) -> None:
        """One row for each sample, whatever the pool keeps of it beside the image."""
        for pool, content in pools.items():
            columns = {name: values for name, values in content.items() if values.ndim == 1}
            rows = zip(request, *(values.tolist() for values in columns.values()), strict=True)
            log_table(
                trainer,
                f"synthesis/{pool}",
                ["sample", *columns],
                [list(row) for row in rows],
                part=f"{request.start:06d}",
            )

    def _show(self, trainer: Trainer, module: Any, pools: Pools) -> None:
        if not trainer.is_global_zero:
            return
        bank = module.training_bank()
        rows = {}
        for pool, content in pools.items():
            title = getattr(module, "pool_titles", {}).get(pool, pool)
            rows[f"{title}: start"] = bank.batch(content["start"][: self.preview])["image"]
            rows[f"{title}: result"] = content["images"][: self.preview].float() / 255
        log_images(trainer, "counterfactuals/generated", labelled_grid(rows, self.preview))


class CounterfactualGridCallback(Callback):
    """Draws, once the search is possible, what each class would look like from the same start (K+2 columns).

    Works with any module that offers ``phase_at(epoch)``, ``training_bank()`` and
    ``counterfactual_columns(images) -> {title: Tensor [N, C, H, W]}``.

    Args:
        rows: known images to start from, of different classes while there are enough.
    """

    def __init__(self, rows: int = 8) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, not {rows}")
        self.rows = rows

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws at the first epoch of the second phase."""
        module: Any = pl_module
        epoch = trainer.current_epoch
        if epoch == 0 or module.phase_at(epoch) == module.phase_at(epoch - 1):
            return
        if not trainer.is_global_zero:
            return
        bank = module.training_bank()
        labels = bank.batch(torch.arange(min(len(bank), 1000)))["label"]
        rank_in_class = torch.zeros_like(labels)
        for label in labels.unique():
            members = (labels == label).nonzero().squeeze(1)
            rank_in_class[members] = torch.arange(len(members))
        chosen = (rank_in_class * (labels.max() + 1) + labels).argsort()[: self.rows]
        images = bank.batch(chosen, module.device, module.dtype)["image"]
        rank_zero_info(f"drawing the counterfactual grid of {len(images)} images")
        columns = module.counterfactual_columns(images)
        rows = {
            module.class_names[int(label)]: torch.stack(
                [column[row].cpu() for column in columns.values()]
            )
            for row, label in enumerate(labels[chosen])
        }
        grid = labelled_grid(rows, len(columns), list(columns))
        log_images(trainer, "counterfactuals/grid", grid)
