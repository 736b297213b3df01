"""Activation quantizers: fake quantization over a range that is observed, then frozen."""

from typing import Literal, cast

import torch
from torch import Tensor, distributed, nn

from lightning_modules.arguments import demand_choice
from lightning_modules.zaq.aciq import Distribution, aciq_alpha
from lightning_modules.zaq.quantizers import (
    STE,
    affine_qparams,
    check_bits,
    extremes,
    fake_quantize,
    full_precision,
    integer_range,
)

Observer = Literal["minmax", "ema", "ema_gdfq", "percentile", "mse", "aciq"]
"""How a range follows the batches that are observed, see :class:`ActivationQuantizer`."""


class ActivationQuantizer(nn.Module):
    """Rounds an activation, per tensor, to codes from 0 to ``2^bits - 1``; 0 is always on the grid.

    The range moves only while the module observes *and* is in training mode: whatever the data of an evaluation are,
    they cannot move it (the released code calibrates on the test images that way). It moves by the observer:

    - ``minmax``: smallest and largest value ever seen, from 0 on (released code);
    - ``ema``: mean of the batch extremes, older ones weighted by powers of the momentum;
    - ``ema_gdfq``: the same with the released GDFQ code's mistake, for comparison only: the corrected value is
      corrected again in every step, so that ranges grow a thousandfold before they settle;
    - ``percentile``: mean over the batches of the values that a given share of the batch does not exceed;
    - ``mse``: mean over the batches of the fraction of the extremes with the least squared error of rounding;
    - ``aciq``: mean over the batches of the clipping range that is optimal for a Laplace or normal distribution;
      one-sided where nothing is negative.

    Under several processes every batch statistic is that of the global batch, ``percentile`` apart, which is the mean
    of the processes. Range, number of observed batches and both flags are in the state dict.

    Args:
        bits: 2 to 8.
        observer: see above.
        momentum: of ``ema`` and ``ema_gdfq``.
        percentile: of ``percentile``, in percent; the lower end is its mirror image.
        distribution: of ``aciq``.
        ste: see :func:`fake_quantize`.

    Raises:
        ValueError: impossible bits, unknown observer or distribution, momentum or percentile out of range.
    """

    lo: Tensor
    hi: Tensor
    steps: Tensor

    def __init__(
        self,
        bits: int,
        observer: Observer = "minmax",
        momentum: float = 0.9,
        percentile: float = 99.99,
        distribution: Distribution = "laplace",
        ste: STE = "identity",
    ) -> None:
        super().__init__()
        check_bits("bits", bits)
        demand_choice(Observer, observer=observer)
        demand_choice(Distribution, distribution=distribution)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1)")
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile={percentile} must be in (50, 100]")
        self.bits = bits
        self.observer = observer
        self.momentum = momentum
        self.percentile = percentile
        self.distribution = distribution
        self.ste = ste
        self.name = ""
        self.observing = True
        self.has_range = False
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def observe(self, enabled: bool = True) -> None:
        """Lets the range move in training mode, or not."""
        self.observing = enabled

    def freeze(self) -> None:
        """Keeps the range from now on, in training mode too."""
        self.observe(False)

    def set_range(self, lo: float | Tensor, hi: float | Tensor) -> None:
        """Gives the range, for instance from batch-norm statistics, and freezes it.

        Raises:
            ValueError: not two finite numbers in ascending order.
        """
        low, high = float(lo), float(hi)
        if not -float("inf") < low <= high < float("inf"):
            raise ValueError(
                f"[{low}, {high}] is no range of {self.name or 'an activation'}: "
                "two finite numbers, the smaller first, are"
            )
        self.lo.fill_(low)
        self.hi.fill_(high)
        self.has_range = True
        self.freeze()

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, scalars; the zero point is one of the codes."""
        return affine_qparams(self.lo, self.hi, self.bits, signed=False, include_zero=True)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; half precision comes back as float32.

        Raises:
            RuntimeError: no batch has been observed yet and no range been set.
        """
        x = full_precision(x)
        if self.observing and self.training:
            self._follow(x.detach())
        elif not self.has_range:
            raise RuntimeError(
                f"the activation quantizer {self.name or '(without a name)'} has no range yet: observe data in "
                "training mode (calibrate), or set_range"
            )
        return fake_quantize(
            x, *self.qparams(), *integer_range(self.bits, signed=False), ste=self.ste
        )

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        self.steps += 1
        self.has_range = True
        lo, hi = self._batch_range(x)
        count = self.steps.to(lo)
        match self.observer:
            case "minmax":
                lo, hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
            case "ema":
                # The corrected mean follows the batch by this weight; correcting at the end gives the same numbers.
                weight = (1 - self.momentum) / (1 - self.momentum**count)
                lo, hi = torch.lerp(self.lo, lo, weight), torch.lerp(self.hi, hi, weight)
            case "ema_gdfq":
                correction = 1 - self.momentum**count
                lo = torch.lerp(lo, self.lo, self.momentum) / correction
                hi = torch.lerp(hi, self.hi, self.momentum) / correction
            case _:
                lo, hi = torch.lerp(self.lo, lo, 1 / count), torch.lerp(self.hi, hi, 1 / count)
        self.lo.copy_(lo)
        self.hi.copy_(hi)

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lo, hi = _extremes_over_ranks(x)
        lo, hi = lo.to(self.lo.dtype), hi.to(self.hi.dtype)
        match self.observer:
            case "percentile":
                flat = x.flatten()
                rank = max(1, round(flat.numel() * self.percentile / 100))
                low = flat.kthvalue(flat.numel() + 1 - rank).values
                found = _mean_over_ranks(torch.stack([low, flat.kthvalue(rank).values]))
                return found[0].to(lo), found[1].to(hi)
            case "mse":
                fraction = self._best_fraction(x, lo, hi)
                return lo * fraction, hi * fraction
            case "aciq":
                return self._clipping_range(x, lo, hi)
        return lo, hi

    def _best_fraction(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        fractions = torch.linspace(0.1, 1, 46, device=x.device, dtype=lo.dtype)
        qmin, qmax = integer_range(self.bits, signed=False)
        errors = []
        for fraction in fractions:
            scale, zero_point = affine_qparams(
                lo * fraction, hi * fraction, self.bits, signed=False, include_zero=True
            )
            rounded = fake_quantize(x, scale, zero_point, qmin, qmax)
            errors.append((rounded - x).square().mean())
        best = _mean_over_ranks(torch.stack(errors)).argmin()
        return fractions[best]

    def _clipping_range(self, x: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        center = _mean_over_ranks(x.mean())
        if self.distribution == "laplace":
            spread = _mean_over_ranks((x - center).abs().mean())
        else:
            spread = _mean_over_ranks((x - center).square().mean()).sqrt()
        two_sided = aciq_alpha(self.bits, self.distribution) * spread
        one_sided = aciq_alpha(self.bits, self.distribution, positive=True) * spread
        start = torch.maximum(lo, center - two_sided)
        positive = lo >= 0
        clipped_lo = torch.where(positive, torch.zeros_like(lo), start)
        clipped_hi = torch.where(positive, center.clamp_min(0) + one_sided, start + 2 * two_sided)
        return clipped_lo.to(lo), clipped_hi.to(hi)

    def get_extra_state(self) -> Tensor:
        """The two flags, so that a resumed run observes exactly what an uninterrupted one would."""
        return torch.tensor([self.observing, self.has_range])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the flags of a checkpoint."""
        self.observing, self.has_range = cast(list[bool], state.tolist())

    def extra_repr(self) -> str:
        """Width and observer."""
        return f"bits={self.bits}, observer={self.observer}"


def _several_ranks() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _extremes_over_ranks(x: Tensor) -> tuple[Tensor, Tensor]:
    lo, hi = extremes(x)
    if not _several_ranks():
        return lo, hi
    ends = torch.stack([-lo, hi])
    distributed.all_reduce(ends, distributed.ReduceOp.MAX)
    return -ends[0], ends[1]


def _mean_over_ranks(values: Tensor) -> Tensor:
    if not _several_ranks():
        return values
    values = values.clone()
    distributed.all_reduce(values)
    return values / distributed.get_world_size()
