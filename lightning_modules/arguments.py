"""Checks of arguments that many constructors make, with one message each."""

from typing import Any, get_args


def demand_at_least(
    least: float, /, *, most: float | None = None, option: str = "", **values: float | None
) -> None:
    """Checks arguments, given by name; None passes.

    Args:
        least: the smallest value allowed.
        most: the largest one, if there is any.
        option: what precedes the name on the command line, e.g. ``--model.``; for the message.
        **values: the arguments.

    Raises:
        ValueError: one is below or above; names it and its value.
    """
    for name, value in values.items():
        if value is None or least <= value <= (value if most is None else most):
            continue
        limits = f"at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"{name}={value} must be {limits}{_hint(option, name)}")


def demand_choice(choices: Any, /, *, option: str = "", **values: str) -> None:
    """Checks arguments, given by name, that are one of a few words.

    Args:
        choices: the words, or a ``Literal`` of them.
        option: what precedes the name on the command line, e.g. ``--model.``; for the message.
        **values: the arguments.

    Raises:
        ValueError: one is another word; names it, its value and the choices.
    """
    known = get_args(choices) or tuple(choices)
    for name, value in values.items():
        if value not in known:
            raise ValueError(
                f"unknown {name}={value!r}; choose one of {', '.join(known)}{_hint(option, name)}"
            )


def _hint(option: str, name: str) -> str:
    return f" ({option}{name})" if option else ""
