"""What a module that generates images offers to those who judge them, and how one is read from a checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from lightning_modules.checkpoints import load_frozen
from lightning_modules.nn.pixels import in_8_bits
from lightning_modules.paper import PaperModule


class ImageGenerator(Protocol):
    """A module with images of its own, numbered, so that any process can make any part of them."""

    def generated_kinds(self) -> dict[str, int | None]:
        """Kinds of images by name, the first one is the module's own idea of its result, with how many there are;
        None = as many as one wants."""
        ...

    def generate(self, kind: str, indices: Tensor) -> Tensor:
        """The images [B, C, H, W] in [0, 1] with the numbers ``indices`` [B]: a function of the weights, the run's seed
        and each number alone."""
        ...


def generated_count(module: ImageGenerator, kind: str, wanted: int | None) -> int:
    """How many images of a kind there are to judge.

    Raises:
        ValueError: the module makes no such kind, has none yet, or has no end and ``wanted`` is None.
    """
    kinds = module.generated_kinds()
    if kind not in kinds:
        raise ValueError(
            f"{type(module).__name__} generates no {kind!r}; it has {', '.join(kinds) or 'no images'}"
        )
    count = kinds[kind]
    if count == 0:
        raise ValueError(
            f"{type(module).__name__} has no {kind} yet; train it to the end of the phase that makes them"
        )
    if count is None and wanted is None:
        raise ValueError(f"{kind} of {type(module).__name__} have no end; say how many to make")
    return min(number for number in (count, wanted) if number is not None)


def generated_batches(
    module: ImageGenerator, kind: str, indices: Tensor, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (numbers, images), the images rounded to 8 bits as those that were ever saved to a file."""
    for part in indices.split(batch_size):
        yield part, in_8_bits(module.generate(kind, part))


def load_generator(path: str | Path) -> PaperModule:
    """The module that wrote a checkpoint, frozen and in evaluation mode.

    Args:
        path: a checkpoint of this collection.

    Raises:
        FileNotFoundError: there is no such file.
        RuntimeError: it is no readable checkpoint, none of this collection, or of a module that generates no images.
    """
    return load_frozen(path, "--model.generator", generated_kinds="generates no images")
