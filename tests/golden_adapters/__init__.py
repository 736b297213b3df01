"""Adapters from golden cases to our code: one module per paper, named as its golden file.

A module defines ``ADAPTERS``, from the ``family`` of a case to a function that takes the whole case
and returns a dict with at least the keys of ``case["expected"]``.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

Adapter = Callable[[dict[str, Any]], dict[str, Any]]

ADAPTERS: dict[str, dict[str, Adapter]] = {}
"""Adapters by family and paper; several papers may use one family name."""

for _module in pkgutil.iter_modules(__path__):
    _adapters = importlib.import_module(f"{__name__}.{_module.name}").ADAPTERS
    for _family, _adapter in _adapters.items():
        ADAPTERS.setdefault(_family, {})[_module.name] = _adapter


def adapter_for(paper: str, family: str) -> Adapter:
    """The adapter of a family; of several papers with it, the one that the file name begins with.

    Raises:
        KeyError: there is none, or several and the file name says nothing.
    """
    choices = ADAPTERS.get(family, {})
    named = [name for name in choices if paper.startswith(name)]
    if not named and len(choices) == 1:
        named = list(choices)
    if not named:
        raise KeyError(
            f"no adapter for family {family!r} of {paper}.json"
            + (f"; {', '.join(choices)} have one each" if choices else "")
        )
    return choices[max(named, key=len)]
