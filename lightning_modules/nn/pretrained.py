"""Pretrained torchvision weights: found on this machine, downloaded only on demand, checked when loaded."""

import re
from pathlib import Path
from typing import Any

import torch

from lightning_modules.files import read_tensors


def local_path(url: str, weights_path: str | None = None) -> Path:
    """Where the weights file is expected: ``weights_path``, or the url's file name in torch.hub's folder."""
    if weights_path is not None:
        return Path(weights_path).expanduser()
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def weights_file(name: str, weights: Any, weights_path: str | None, download: bool) -> Path:
    """The file of a torchvision network's weights, after a download if that is allowed.

    Args:
        name: of the network, for the messages.
        weights: entry of the network's torchvision ``WeightsEnum``.
        weights_path: see :func:`local_path`.
        download: lets torchvision fetch a missing file into torch.hub's folder.

    Raises:
        FileNotFoundError: the weights are not on this machine.
        RuntimeError: the download failed.
    """
    file = local_path(weights.url, weights_path)
    if file.is_file():
        return file
    if weights_path is not None or not download:
        allow = "" if weights_path is not None else ", or give --model.download true"
        raise FileNotFoundError(missing_weights(name, weights.url, file) + allow)
    try:
        weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:
        raise RuntimeError(
            f"the weights of {name} could not be downloaded from {weights.url} ({error}); bring "
            "the file by other means and give --model.weights_path FILE"
        ) from error
    return file


def read_weights(name: str, file: Path) -> dict[str, Any]:
    """The state dict in a weights file, with the names of today's torchvision.

    Raises:
        RuntimeError: the file holds something else.
    """
    try:
        state = dict(read_tensors(file, f"file of the weights of {name} (--model.weights_path)"))
    except (TypeError, ValueError) as error:
        raise RuntimeError(wrong_weights(name, file, error)) from error
    if name.startswith("densenet"):  # its files have older names, norm.1 for norm1
        old = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\.")
        state = {old.sub(r"\1\2.", key): value for key, value in state.items()}
    return state


def missing_weights(name: str, url: str, file: Path) -> str:
    """Message for weights that are not where they should be."""
    return (
        f"the weights of {name} are not at {file}: get {url} and give --model.weights_path FILE "
        f"or put it into {Path(torch.hub.get_dir(), 'checkpoints')}"
    )


def wrong_weights(name: str, file: Path, error: Exception) -> str:
    """Message for a file that holds something else."""
    reason = " ".join(str(error).split())[:300]
    return f"{file} does not hold the weights of {name} (--model.weights_path): {reason}"
