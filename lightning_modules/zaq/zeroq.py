"""ZeroQ: images distilled from batch-norm statistics, sensitivity of each layer, bits for each layer.

Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020. Sensitivity and mixed precision are of the
paper alone; the released code does not have them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from lightning_modules.arguments import demand_at_least, demand_choice
from lightning_modules.nn.modes import eval_mode, frozen
from lightning_modules.randomness import keyed_generator

StatisticsKind = Literal["zeroq", "gdfq"]
Init = Literal["gaussian", "released"]


class NormInput(NamedTuple):
    """What a batch norm got in a forward pass."""

    norm: _BatchNorm
    feat: Tensor


@contextmanager
def record_norm_inputs(model: nn.Module) -> Iterator[list[NormInput]]:
    """Yields a list to which every forward pass adds the inputs of the batch norms, in their order, with their graph.

    Raises:
        ValueError: the network has no batch norm with running statistics.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no batch norm with running statistics, from which this method learns about "
            "the data; use zaq, or a network with batch norms that are not folded"
        )
    found: list[NormInput] = []

    def record(norm: nn.Module, args: tuple[Tensor]) -> None:
        assert isinstance(norm, _BatchNorm)
        found.append(NormInput(norm, args[0]))

    handles = [norm.register_forward_pre_hook(record) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def bn_statistics_loss(
    feat: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    kind: StatisticsKind = "zeroq",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """How far the statistics of a batch norm's input are from those of the data it was trained on.

    ``zeroq``: spatial mean and unbiased standard deviation of every image; squared L2 distance over channels, averaged
    over the batch (released code of ZeroQ). ``gdfq``: mean and biased variance over batch and space; squared distance
    averaged over channels (released code of GDFQ).

    Args:
        feat: [B, C, ...]. At a single position the standard deviation of an image is taken to be 0.
        running_mean: [C].
        running_var: [C].
        kind: see above.
        eps: added to variances under a root.

    Returns:
        Two scalars, of the mean and of the deviation or variance.

    Raises:
        ValueError: unknown kind.
    """
    demand_choice(StatisticsKind, kind=kind)
    positions = feat.flatten(2) if feat.dim() > 2 else feat.unsqueeze(2)
    if kind == "gdfq":
        var, mean = torch.var_mean(positions, (0, 2), correction=0)
        return F.mse_loss(mean, running_mean), F.mse_loss(var, running_var)
    var, mean = torch.var_mean(positions, 2, correction=min(1, positions.shape[2] - 1))
    std, running_std = (var + eps).sqrt(), (running_var + eps).sqrt()
    return tuple(
        (own - stored).square().sum(1).mean()
        for own, stored in ((mean, running_mean), (std, running_std))
    )  # type: ignore[return-value]


def network_statistics_loss(
    norm_inputs: Sequence[NormInput], kind: StatisticsKind = "zeroq"
) -> Tensor:
    """:func:`bn_statistics_loss` of all batch norms: their sum for ``zeroq``, their mean for ``gdfq``.

    Args:
        norm_inputs: of one forward pass, by :func:`record_norm_inputs`.
        kind: see there.

    Returns:
        Scalar.

    Raises:
        ValueError: no batch norm was recorded, or unknown kind.
    """
    if not norm_inputs:
        raise ValueError("no batch norm was recorded; run the network inside record_norm_inputs")
    losses = []
    for norm, feat in norm_inputs:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, spread = bn_statistics_loss(feat, norm.running_mean, norm.running_var, kind)
        losses.append(mean + spread)
    total = torch.stack(losses)
    return total.sum() if kind == "zeroq" else total.mean()


def zeroq_input_loss(x: Tensor) -> Tensor:
    """The ``zeroq`` statistics loss of the images themselves, which should have mean 0 and standard deviation 1.

    Args:
        x: images [B, C, H, W] in the space of normalised images.

    Returns:
        Scalar.
    """
    channels = x.new_zeros(x.shape[1])
    return torch.stack(bn_statistics_loss(x, channels, channels + 1)).sum()


def distill_data(
    model: nn.Module,
    count: int,
    shape: Sequence[int] = (3, 32, 32),
    steps: int = 500,
    lr: float = 0.5,
    batch_size: int = 32,
    init: Init = "gaussian",
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Tensor:
    """Images whose statistics in the network are those of its batch norms: ZeroQ's distilled data.

    Adam on the pixels; the rate falls by 10 when the loss has not for 100 steps, down to 1e-4 (released code). Image i
    begins with noise that depends on the seed of the run and i alone. The network is run in evaluation mode and left as
    it was; also works inside ``torch.inference_mode()``.

    Args:
        model: float network on ``device`` that takes normalised images.
        count: number of images.
        shape: of an image.
        steps: of Adam per batch.
        lr: initial rate.
        batch_size: images that are optimised together.
        init: ``gaussian``, N(0, 1) (paper); ``released``, uniform and 73 times smaller: the released code divides by
            the variance of a byte instead of its deviation.
        device: of the images.
        progress: shows a bar.

    Returns:
        Normalised images [count, *shape].

    Raises:
        ValueError: no batch norm with running statistics, a number below 1, or an unknown init.
        RuntimeError: the loss is not finite.
    """
    demand_at_least(1, count=count, steps=steps, batch_size=batch_size)
    demand_choice(Init, init=init)
    batches = torch.arange(count).split(batch_size)
    with tqdm(total=len(batches) * steps, desc="distil", disable=not progress, leave=False) as bar:
        parts = [
            _distill(model, _noise(indices, shape, init).to(device), steps, lr, bar)
            for indices in batches
        ]
    return torch.cat(parts)


def _noise(indices: Tensor, shape: Sequence[int], init: Init) -> Tensor:
    images = []
    for index in indices.tolist():
        generator = keyed_generator("zeroq", "image", index)
        if init == "gaussian":
            images.append(torch.randn(*shape, generator=generator))
        else:
            pixels = torch.randint(256, tuple(shape), generator=generator)
            images.append((pixels - 127.5) / 5418.75)
    return torch.stack(images)


def _distill(model: nn.Module, images: Tensor, steps: int, lr: float, bar: tqdm) -> Tensor:
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        eval_mode(model),
        frozen(model),
        record_norm_inputs(model) as norm_inputs,
    ):
        images = images.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=100, min_lr=1e-4)
        for step in range(steps):
            norm_inputs.clear()
            model(images)
            loss = network_statistics_loss(norm_inputs) + zeroq_input_loss(images)
            if not torch.isfinite(loss):
                raise RuntimeError(
                    f"the loss of the distillation is {loss.item()} at step {step}; lower its rate {lr}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(loss.detach())
            bar.update()
        return images.detach()


def layer_sensitivity(logits_fp: Tensor, logits_q: Tensor) -> Tensor:
    """Omega: mean divergence of a quantized network's predictions from the float network's (paper, eq. 3 and 4).

    Args:
        logits_fp: [N, K].
        logits_q: [..., N, K], such as [L, N, K] of L networks, each with one layer quantized.

    Returns:
        ``mean_j KL(softmax(logits_fp_j) || softmax(logits_q_j))``, [...], not negative.
    """
    log_p, log_q = logits_fp.log_softmax(-1), logits_q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(-1)


@torch.no_grad()
def measure_sensitivities(
    model: nn.Module,
    quantized: nn.Module,
    layers: Sequence[str],
    bits: Sequence[int],
    set_bits: Callable[[str, int | None], object],
    images: Tensor,
) -> Tensor:
    """:func:`layer_sensitivity` of every layer at every width, all other layers at full precision.

    Args:
        model: the float network.
        quantized: its copy, whose layers ``set_bits`` quantizes; run in evaluation mode.
        layers: names of its L layers.
        bits: K widths.
        set_bits: ``set_bits(layer, width)`` quantizes one layer, ``set_bits(layer, None)`` puts it at full precision,
            where all layers are at the end.
        images: normalised images [N, C, H, W], such as distilled ones.

    Returns:
        [L, K] on the CPU.

    Raises:
        ValueError: no layer or no width.
    """
    if not layers or not bits:
        raise ValueError("the sensitivity needs at least one layer and one width in bits")
    for layer in layers:
        set_bits(layer, None)
    found = torch.zeros(len(layers), len(bits))
    with eval_mode(model, quantized):
        logits = model(images)
        for row, layer in enumerate(layers):
            try:
                for column, width in enumerate(bits):
                    set_bits(layer, width)
                    found[row, column] = layer_sensitivity(logits, quantized(images))
            finally:
                set_bits(layer, None)
    return found


class MixedPrecision(NamedTuple):
    """Bits of every layer and the sum of their sensitivities."""

    bits: list[int]
    total: float


def allocate_mixed_precision(
    sensitivity: Tensor | Sequence[Sequence[float]],
    sizes: Sequence[int],
    bits: Sequence[int],
    budget_bits: float,
) -> MixedPrecision:
    """The widths with the smallest total sensitivity that fit a budget (paper, eq. 5 and 6), exactly.

    Layer by layer, all allocations on the Pareto frontier of memory and sensitivity are kept. Of equal optima the one
    with less memory wins.

    Args:
        sensitivity: [L, K] of L layers at K widths; assumed to add up.
        sizes: weights of each layer [L].
        bits: the K widths.
        budget_bits: largest ``sum(size * bits)``.

    Returns:
        One width per layer, and the total sensitivity.

    Raises:
        ValueError: shapes that do not fit, a sensitivity that is not finite, or a budget below the smallest widths.
    """
    omega = np.asarray(sensitivity, dtype=np.float64)
    if omega.shape != (len(sizes), len(bits)) or not omega.size:
        raise ValueError(
            f"sensitivities of shape {omega.shape} for {len(sizes)} layers and {len(bits)} widths"
        )
    if not np.isfinite(omega).all():
        layer = int(np.argwhere(~np.isfinite(omega))[0, 0])
        raise ValueError(f"the sensitivity of layer {layer} is not finite: {omega[layer].tolist()}")
    memory = np.outer(np.asarray(sizes, dtype=np.int64), np.asarray(bits, dtype=np.int64))
    # What the layers after this one take at least.
    rest = memory.min(1)[::-1].cumsum()[::-1]
    if rest[0] > budget_bits:
        raise ValueError(
            f"a budget of {budget_bits} bits is below the {rest[0]} that all layers take at {min(bits)} bits; raise it "
            "or allow smaller widths"
        )
    rest = np.append(rest[1:], 0)
    used, total = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for row, reserve in enumerate(rest):
        costs = (used[:, None] + memory[row]).ravel()
        sums = (total[:, None] + omega[row]).ravel()
        order = np.lexsort((sums, costs))
        order = order[costs[order] + reserve <= budget_bits]
        best = np.minimum.accumulate(sums[order])
        order = order[np.append(True, best[1:] < best[:-1])]
        used, total = costs[order], sums[order]
        previous, choice = np.divmod(order, len(bits))
        steps.append((previous.astype(np.int32), choice.astype(np.int8)))
    state = len(used) - 1
    chosen = []
    for previous, choice in reversed(steps):
        chosen.append(bits[choice[state]])
        state = previous[state]
    return MixedPrecision(chosen[::-1], float(total[-1]))
