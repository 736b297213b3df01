"""Checkpoints read: a module of this collection without being told its class, and weights of the released codes."""

from contextvars import Context
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lightning_modules.files import read_tensors
from lightning_modules.paper import PaperModule


def load_frozen(path: str | Path, option: str, **methods: str) -> PaperModule:
    """The module that wrote a checkpoint, frozen and in evaluation mode, on the CPU.

    Args:
        path: a checkpoint of this collection.
        option: of the command line by which it is given, for the messages.
        methods: what the module must have, each with what a module does not do that lacks it.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is no readable checkpoint, none of this collection, or of a module without these methods.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; give one by {option} FILE")
    written = read_tensors(path, f"checkpoint ({option})")
    name = written.get("module_class") if isinstance(written, dict) else None
    found = [kind for kind in _descendants(PaperModule) if kind.__name__ == name]
    if not found:
        raise RuntimeError(
            f"{path} was written by {name or 'something else than this collection'}, which is no module here"
        )
    for method, lack in methods.items():
        if not hasattr(found[0], method):
            raise RuntimeError(f"{path} holds a {name}, which {lack}")
    # In a context of its own: inside the command line Lightning would give the module that is being built, and whose
    # part this one is, as the source of its hyper-parameters.
    with torch.random.fork_rng(devices=[]):  # its initial weights are replaced, whatever they are
        module = Context().run(
            found[0].load_from_checkpoint, path, map_location="cpu", weights_only=True
        )
    return cast(PaperModule, module.eval().requires_grad_(False))


def read_reference_state(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict of a network in a file of a released code, on the CPU.

    Args:
        path: of the file.
        key: under which the file has it; None: it is all there is in the file.

    Returns:
        Weights by name, without the ``module.`` that networks saved from DataParallel have before it.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it cannot be read, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    stored = read_tensors(path)
    state = stored if key is None or not isinstance(stored, dict) else stored.get(key)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise RuntimeError(
            f"{path} does not hold the weights of a network{f' under {key}' if key else ''}"
        )
    return {name.removeprefix("module."): value.detach() for name, value in state.items()}


def _descendants(kind: type[PaperModule]) -> list[type[PaperModule]]:
    found = []
    for child in kind.__subclasses__():
        found += [child, *_descendants(child)]
    return found
