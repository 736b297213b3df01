"""How well translations between domains show what was asked for: accuracies of a classifier that was trained apart."""

from typing import get_args

import torch
from torch import Tensor

from lightning_modules.attributes import LabelKind


def gan_test_accuracy(targets: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
    """GAN-test: does a classifier of real images find the edited attribute? (MatchGAN, released code).

    Every image is translated once per attribute; translation k counts for attribute k alone, what happens to the
    others is not looked at.

    Args:
        targets: asked-for labels [N, c, c] of image, translation, attribute, zeros and ones; one-hot for classes.
        predictions: found ones, likewise.

    Returns:
        Accuracies per attribute, float64 [c], and their mean.

    Raises:
        ValueError: no image, or shapes that are not [N, c, c] or differ.
    """
    n, c = (*targets.shape, 0, 0)[:2]
    if not n or targets.shape != (n, c, c) or predictions.shape != targets.shape:
        raise ValueError(
            f"targets {tuple(targets.shape)} and predictions {tuple(predictions.shape)} must both be "
            "[N, c, c] with at least one image: one translation per attribute"
        )
    right = targets == predictions.to(targets)
    per_domain = right.diagonal(dim1=1, dim2=2).double().mean(0)
    return per_domain, per_domain.mean()


def gan_train_accuracy(logits: Tensor, labels: Tensor, kind: LabelKind) -> tuple[Tensor, Tensor]:
    """Accuracy of a classifier, for GAN-train one that was trained on translations, on real images.

    Args:
        logits: [N, c].
        labels: zeros and ones [N, c] for ``multi_label``, where a positive logit is a one; class indices [N] for
            ``single_label``, where the largest logit counts.
        kind: which of the two.

    Returns:
        For ``multi_label`` the accuracies per attribute, float64 [c], and their mean; for ``single_label`` those per
        class (nan for a class without images) and that of all images.

    Raises:
        ValueError: no image, shapes that do not fit, or unknown ``kind``.
    """
    if kind not in get_args(LabelKind):
        raise ValueError(f"unknown kind={kind!r} of labels; choose one of {get_args(LabelKind)}")
    expected = logits.shape if kind == "multi_label" else logits.shape[:1]
    if labels.shape != expected or not len(logits):
        raise ValueError(
            f"logits {tuple(logits.shape)} need {kind} labels of shape {tuple(expected)} and at least one "
            f"image, got {tuple(labels.shape)}"
        )
    if kind == "multi_label":
        per_attribute = ((logits > 0) == (labels > 0)).double().mean(0)
        return per_attribute, per_attribute.mean()
    right = (logits.argmax(1) == labels).double()
    classes = torch.arange(logits.shape[1], device=logits.device)
    member = (labels[:, None] == classes).double()
    return (member * right[:, None]).sum(0) / member.sum(0), right.mean()
