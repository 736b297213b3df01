"""Networks put into another mode for a while; every flag comes back, also after an error."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def _mode(training: bool, modules: tuple[object, ...]) -> Iterator[None]:
    networks = [module for module in modules if isinstance(module, nn.Module)]
    flags = [(part, part.training) for network in networks for part in network.modules()]
    try:
        for network in networks:
            network.train(training)
        yield
    finally:
        for part, flag in flags:
            part.training = flag


@contextmanager
def eval_mode(*modules: object) -> Iterator[None]:
    """Networks in evaluation mode for the duration; every submodule gets its own flag back."""
    with _mode(False, modules):
        yield


@contextmanager
def train_mode(*modules: object) -> Iterator[None]:
    """Networks in training mode for the duration; flags and running statistics come back."""
    buffers = [
        (buffer, buffer.detach().clone())
        for module in modules
        if isinstance(module, nn.Module)
        for buffer in module.buffers()
    ]
    try:
        with _mode(True, modules):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


@contextmanager
def frozen(*modules: object) -> Iterator[None]:
    """No parameter of the networks requires a gradient for the duration; the flags come back."""
    parameters = [
        parameter
        for module in modules
        if isinstance(module, nn.Module)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def frozen_statistics(*networks: nn.Module) -> Iterator[None]:
    """Batch norms keep normalising with their batch, but their running statistics stay as they are."""
    norms = [
        (part, part.track_running_stats)
        for network in networks
        for part in network.modules()
        if isinstance(part, _BatchNorm)
    ]
    try:
        for norm, _ in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracked in norms:
            norm.track_running_stats = tracked
