from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from callbacks.ema import GeneratorEMA
from lightning_modules.nn.ema import AveragedNetwork
from tests.callbacks.boring import BoringGAN, boring_trainer, loader

DECAY = 0.8


class Witness(Callback):
    """Remembers the generator and its average after every batch."""

    def __init__(self) -> None:
        self.networks: list[dict[str, Tensor]] = []
        self.averages: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.networks.append(_copy(pl_module.generator))
        self.averages.append(_copy(pl_module.generator_ema.module))


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _fit(path: Path, epochs: int, start_batch: int = 0, ckpt: str | None = None) -> Any:
    torch.manual_seed(0)
    module, witness = BoringGAN(), Witness()
    callbacks = [GeneratorEMA(decay=DECAY, start_batch=start_batch), witness]
    trainer = boring_trainer(path, max_epochs=epochs, callbacks=callbacks)
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return module, witness, trainer


@pytest.mark.parametrize("start_batch", [0, 3])
def test_average_equals_a_hand_loop_over_batches(tmp_path: Path, start_batch: int) -> None:
    module, witness, _ = _fit(tmp_path, 2, start_batch)
    assert len(witness.networks) == 8
    parameters = dict(module.generator.named_parameters())
    expected: dict[str, Tensor] = {}
    for batch, (network, average) in enumerate(
        zip(witness.networks, witness.averages, strict=True)
    ):
        for name, value in network.items():
            copied = name not in parameters or batch < max(start_batch, 1)
            if copied:
                expected[name] = value
            else:
                expected[name] = DECAY * expected[name] + (1 - DECAY) * value
            torch.testing.assert_close(average[name], expected[name], rtol=1e-5, atol=1e-7)
    name = next(iter(parameters))
    assert not torch.equal(expected[name], witness.networks[-1][name])


def test_buffers_are_copied_and_the_average_stays_frozen_in_eval_mode(tmp_path: Path) -> None:
    module, _, _ = _fit(tmp_path, 1)
    module.train()
    norm, average = module.generator[1], module.generator_ema.module[1]
    assert torch.equal(norm.running_var, average.running_var)
    assert average.num_batches_tracked.dtype == torch.int64
    assert average.num_batches_tracked == norm.num_batches_tracked == 4
    assert not any(part.training for part in module.generator_ema.modules())
    assert not any(p.requires_grad for p in module.generator_ema.parameters())


def test_same_weights_and_state_as_torch() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    network = nn.Sequential(linear, nn.BatchNorm1d(3))
    ours = AveragedNetwork(network, DECAY)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=False)
    for _ in range(4):
        with torch.no_grad():
            linear.weight.add_(torch.randn(3, 3))
        network(torch.randn(5, 3))
        ours.update_parameters(network)
        theirs.update_parameters(network)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())


def test_resumed_average_is_bit_identical(tmp_path: Path) -> None:
    whole, _, _ = _fit(tmp_path / "whole", 3)
    _, _, trainer = _fit(tmp_path / "part", 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _, _ = _fit(tmp_path / "part", 3, ckpt=str(tmp_path / "one.ckpt"))
    expected = whole.state_dict()
    assert expected["generator_ema.n_averaged"] == 12
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())


def test_average_survives_load_from_checkpoint(tmp_path: Path) -> None:
    module, _, trainer = _fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded: Any = BoringGAN.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    latent = torch.randn(3, 4)
    module.eval()
    loaded.eval()
    assert torch.equal(loaded.generator_ema(latent), module.generator_ema(latent))
    assert not torch.equal(loaded.generator_ema(latent), loaded.generator(latent))
    # The next update of a loaded average goes on averaging; only a new one copies.
    assert loaded.generator_ema.updates == 4


def test_average_can_be_pickled() -> None:
    import pickle

    average = AveragedNetwork(nn.Linear(2, 2), DECAY)
    assert pickle.loads(pickle.dumps(average)).decay == DECAY


def test_bad_arguments_and_modules(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"decay=1.5"):
        GeneratorEMA(decay=1.5)
    with pytest.raises(ValueError, match="start_batch=-1"):
        GeneratorEMA(start_batch=-1)
    with pytest.raises(MisconfigurationException, match="register_ema"):
        boring_trainer(tmp_path, callbacks=[GeneratorEMA()]).fit(BoringModel())
    with pytest.raises(ValueError, match="no network 'decoder'"):
        boring_trainer(tmp_path, callbacks=[GeneratorEMA("decoder")]).fit(BoringGAN(), loader())


def test_average_is_the_same_on_both_processes(two_processes: tuple[Path, str]) -> None:
    # Two batches of each process, which sees its own images and its own dropout.
    for batch in range(2):
        first, second = (
            torch.load(two_processes[0] / f"ema-{batch}-{rank}.pt") for rank in range(2)
        )
        assert all(torch.equal(value, second[key]) for key, value in first.items())
