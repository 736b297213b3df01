from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn import SyncBatchNorm

from callbacks.sync_batch_norm import SynchronizedBatchNorm, convert
from lightning_modules.osrci import OSRCIModule


def synchronized(module: OSRCIModule) -> set[str]:
    return {
        name
        for name, network in module.named_children()
        if any(isinstance(part, SyncBatchNorm) for part in network.modules())
    }


def test_everything_but_the_critic_is_converted_and_loads_as_before() -> None:
    module = OSRCIModule(width=4, latent_size=4, gopenmax=False)
    state = module.state_dict()
    convert(module)
    assert synchronized(module) == {"encoder", "generator", "classifier", "kplusone_classifier"}
    module.load_state_dict(state)


def test_a_converted_critic_is_refused(tmp_path: Path) -> None:
    module = OSRCIModule(width=4, latent_size=4, gopenmax=False)
    module.discriminator = SyncBatchNorm.convert_sync_batchnorm(module.discriminator)
    module._trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm\.yaml"):
        module.on_fit_start()


def test_a_search_in_train_mode_is_refused_before_training(tmp_path: Path) -> None:
    """Each rank searches its own chunks: synchronised statistics would wait for ever, hours into the run."""
    for mode in ("eval", "train"):
        module = OSRCIModule(width=4, latent_size=4, gopenmax=False, search_mode=mode)
        convert(module)
        module._trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
        if mode == "eval":
            module.on_fit_start()
        else:
            with pytest.raises(MisconfigurationException, match="search_mode eval"):
                module.on_fit_start()


def test_cpu_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_find_unused_parameters_true",
        logger=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(MisconfigurationException, match="needs GPUs"):
        SynchronizedBatchNorm().setup(trainer, OSRCIModule(width=4, latent_size=4), "fit")
