"""OpenMax: per-class Weibull tails of the distance to the mean logit vector, in two forms of the
score.

Bendale and Boult, "Towards Open Set Deep Networks", CVPR 2016, and the form of it in the released
OSRCI code.
"""

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class WeibullTail:
    """Two-parameter Weibull distribution of translated distances, the smallest being at 1.

    Attributes:
        shape: exponent.
        scale: of the translated distances.
        small_score: smallest distance in the tail.
        size: number of distances in the tail.
    """

    shape: float
    scale: float
    small_score: float
    size: int

    @classmethod
    def fit(cls, distances: Tensor, tail_size: int = 20) -> "WeibullTail":
        """Maximum likelihood fit to the largest ``min(n, tail_size)`` distances, in float64.

        The shape k solves ``sum x^k ln x / sum x^k - 1/k = mean ln x`` with x = distance + 1 -
        smallest; the left side grows with k, so bisection finds it.

        Args:
            distances: [n], none negative.
            tail_size: largest number of distances used.

        Raises:
            ValueError: the tail has fewer than two distinct distances, for which no maximum exists.
        """
        tail = distances.detach().double().cpu().flatten().sort(descending=True).values[:tail_size]
        if len(tail) < 2 or not torch.isfinite(tail).all() or tail[0] - tail[-1] <= 1e-12 * tail[0]:
            raise ValueError(
                f"the Weibull tail of {len(tail)} distances needs at least two distinct finite ones"
            )
        small = tail[-1].item()
        translated = tail + 1 - small
        largest = translated[0].item()
        # Powers of x / max(x) cannot overflow; scaling x leaves the shape equation as it is.
        relative = translated / largest
        logs = relative.log()

        def slope(shape: float) -> float:
            powers = relative**shape
            return ((powers * logs).sum() / powers.sum() - 1 / shape - logs.mean()).item()

        low, high = 1e-6, 1.0
        while slope(high) < 0:
            low, high = high, 2 * high
        for _ in range(200):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            low, high = (middle, high) if slope(middle) < 0 else (low, middle)
        shape = (low + high) / 2
        scale = largest * (relative**shape).mean().item() ** (1 / shape)
        return cls(shape, scale, small, len(tail))

    def cdf(self, distances: Tensor) -> Tensor:
        """Probability that a tail distance is smaller, 0 below the tail's translated origin; any
        shape.
        """
        return _weibull_cdf(distances, self.shape, self.scale, self.small_score)


def _weibull_cdf(
    distances: Tensor,
    shape: float | Tensor,
    scale: float | Tensor,
    small_score: float | Tensor,
) -> Tensor:
    relative = ((distances + 1 - small_score) / scale).clamp_min(0)
    return -torch.expm1(-(relative**shape))


def openmax_recalibrate(logits: Tensor, weibull_cdf: Tensor, alpha: int = 10) -> Tensor:
    """OpenMax probabilities over K+1 classes, the unknown one last (Bendale and Boult).

    The ``alpha`` largest logits, rank r counted from 0, are multiplied by ``w = 1 - cdf * (alpha -
    r) / alpha``; what they lose, ``sum logit * (1 - w)``, is the logit of the unknown class.

    Args:
        logits: [N, K].
        weibull_cdf: [N, K].
        alpha: number of ranks; more than K means K.

    Returns:
        Tensor [N, K+1] of probabilities.

    Raises:
        ValueError: ``alpha`` is below 1.
    """
    if alpha < 1:
        raise ValueError(f"alpha={alpha} must be at least 1")
    alpha = min(alpha, logits.shape[1])
    ranks = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    weights = 1 - weibull_cdf * (alpha - ranks).clamp_min(0) / alpha
    unknown = (logits * (1 - weights)).sum(1, keepdim=True)
    return torch.cat([logits * weights, unknown], 1).softmax(1)


def openmax_reference_score(logits: Tensor, weibull_cdf: Tensor) -> Tensor:
    """``-log sum_k exp(logit_k * (1 - cdf_k))``, without ranks (released code).

    Returns:
        Tensor [N], larger = more unknown.
    """
    return -(logits * (1 - weibull_cdf)).logsumexp(1)


class OpenMax(nn.Module):
    """Weibull tails of K classes, fitted once; the state consists of buffers of fixed shape.

    Args:
        num_classes: K.
        tail_size: largest number of distances that a tail is fitted to.

    Raises:
        ValueError: ``num_classes`` is below 1 or ``tail_size`` below 2.
    """

    mavs: Tensor
    shape: Tensor
    scale: Tensor
    small_score: Tensor
    tail: Tensor
    correct: Tensor
    fitted: Tensor

    def __init__(self, num_classes: int, tail_size: int = 20) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        if tail_size < 2:
            raise ValueError(f"tail_size={tail_size} must be at least 2 for a Weibull fit")
        self.num_classes = num_classes
        self.tail_size = tail_size
        self.register_buffer("mavs", torch.zeros(num_classes, num_classes))
        self.register_buffer("shape", torch.ones(num_classes))
        # An infinite scale makes the cdf 0 everywhere: the state of a class without a fit.
        self.register_buffer("scale", torch.full((num_classes,), torch.inf))
        self.register_buffer("small_score", torch.zeros(num_classes))
        self.register_buffer("tail", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("correct", torch.tensor(0))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, logits: Tensor, target: Tensor) -> "OpenMax":
        """Fits mean vectors and tails to the correctly classified samples.

        A class without a correct sample, or with fewer than two distinct tail distances, gets the
        cdf 0, with a warning.

        Args:
            logits: of training images [N, K].
            target: their classes [N].

        Returns:
            Itself.

        Raises:
            ValueError: ``logits`` does not have K columns or ``target`` not N entries.
        """
        self._check(logits)
        if target.shape != logits.shape[:1]:
            raise ValueError(
                f"target of shape {tuple(target.shape)} does not fit {len(logits)} logits"
            )
        right = logits.argmax(1) == target
        self.correct.copy_(right.sum())
        self.tail.zero_()
        self.mavs.zero_()
        for index in range(self.num_classes):
            rows = logits[right & (target == index)].double()
            shape, scale, small = 1.0, torch.inf, 0.0
            if len(rows):
                center = rows.mean(0)
                self.mavs[index] = center
                distances = (rows - center).norm(dim=1)
                self.tail[index] = min(len(rows), self.tail_size)
            try:
                fit = WeibullTail.fit(distances if len(rows) else rows.new_empty(0), self.tail_size)
                shape, scale, small = fit.shape, fit.scale, fit.small_score
            except ValueError:
                warnings.warn(
                    f"OpenMax: class {index} has {len(rows)} correctly classified samples, "
                    "too few distinct ones for a Weibull tail; its cdf is 0",
                    stacklevel=2,
                )
            self.shape[index], self.scale[index], self.small_score[index] = shape, scale, small
        self.fitted.fill_(True)
        return self

    def cdf(self, logits: Tensor) -> Tensor:
        """Probability under every class's tail that the sample is an outlier: [N, K] -> [N, K].

        Raises:
            ValueError: ``logits`` does not have K columns.
            RuntimeError: not fitted.
        """
        self._check(logits)
        if not self.fitted:
            raise RuntimeError("OpenMax is not fitted; call fit(logits, target) first")
        # Without the matrix-product shortcut, which cancels badly for small distances.
        distances = torch.cdist(
            logits.to(self.mavs.dtype), self.mavs, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return _weibull_cdf(distances, self.shape, self.scale, self.small_score)

    def score(
        self,
        logits: Tensor,
        variant: Literal["reference", "bendale"] = "reference",
        alpha: int = 10,
    ) -> Tensor:
        """Score [N] of logits [N, K], larger = more unknown.

        Args:
            logits: [N, K].
            variant: ``"reference"``: :func:`openmax_reference_score`; ``"bendale"``: the unknown
                probability of :func:`openmax_recalibrate`.
            alpha: ranks of ``"bendale"``; more than K means K.

        Raises:
            ValueError: ``variant`` is unknown.
            RuntimeError: not fitted.
        """
        cdf = self.cdf(logits)
        logits = logits.to(cdf.dtype)
        if variant == "reference":
            return openmax_reference_score(logits, cdf)
        if variant == "bendale":
            return openmax_recalibrate(logits, cdf, alpha)[:, -1]
        raise ValueError(f"unknown variant={variant!r}; choose 'reference' or 'bendale'")

    def _check(self, logits: Tensor) -> None:
        if logits.dim() != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} do not fit {self.num_classes} classes"
            )
