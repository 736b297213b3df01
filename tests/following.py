"""A page whose files are taken out of it: a path in backticks and a colon on a line of its own, then the block."""

import re

_BLOCK = re.compile(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> dict[str, str]:
    """Content by path, in the order of the page."""
    return dict(_BLOCK.findall(text))
