"""Losses of GDFQ: a conditional generator matches P's batch-norm statistics, Q learns from P on its images.

Xu et al., "Generative Low-bitwidth Data Free Quantization", ECCV 2020.
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from lightning_modules.arguments import demand_choice
from lightning_modules.zaq.zeroq import NormInput, network_statistics_loss

Reduction = Literal["mean", "batchmean"]


def gdfq_generator_loss(
    logits_p: Tensor, labels: Tensor, norm_inputs: Sequence[NormInput], bns_weight: float = 0.1
) -> dict[str, Tensor]:
    """Cross entropy of P at the class asked for, and the distance to P's batch-norm statistics (released code).

    Args:
        logits_p: P's logits of the generated images [B, K].
        labels: the classes they were generated for [B].
        norm_inputs: what P's batch norms got in that forward pass, of
            :func:`~lightning_modules.zaq.zeroq.record_norm_inputs`.
        bns_weight: factor of the distance.

    Returns:
        Scalars ``classification``, ``statistics`` (unweighted) and ``total``.

    Raises:
        ValueError: no batch norm was recorded.
    """
    classification = F.cross_entropy(logits_p, labels)
    statistics = network_statistics_loss(norm_inputs, "gdfq")
    total = classification + bns_weight * statistics
    return {"classification": classification, "statistics": statistics, "total": total}


def gdfq_student_loss(
    logits_q: Tensor,
    logits_p: Tensor,
    labels: Tensor,
    temperature: float = 20.0,
    alpha: float = 1.0,
    reduction: Reduction = "mean",
) -> dict[str, Tensor]:
    """Distillation at a temperature plus the cross entropy of Q (released code).

    Args:
        logits_q: [B, K].
        logits_p: [B, K], detached.
        labels: the classes the images were generated for [B].
        temperature: T; the distillation is ``T**2 * KL(softmax(P / T) || softmax(Q / T))``.
        alpha: factor of the distillation.
        reduction: ``mean`` divides the divergence by B*K (released code), which makes it K times weaker than
            ``batchmean``, which divides by B (definition).

    Returns:
        Scalars ``distillation`` (with T**2, without alpha), ``classification`` and ``total``.

    Raises:
        ValueError: a temperature of 0 or less, or an unknown reduction.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} of the distillation must be above 0")
    demand_choice(Reduction, reduction=reduction)
    divergence = F.kl_div(
        (logits_q / temperature).log_softmax(1),
        (logits_p / temperature).log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    if reduction == "mean":  # torch is about to give this name another meaning
        divergence = divergence / logits_q.shape[1]
    distillation = temperature**2 * divergence
    classification = F.cross_entropy(logits_q, labels)
    total = alpha * distillation + classification
    return {"distillation": distillation, "classification": classification, "total": total}
