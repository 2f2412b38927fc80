"""The end of every error message about an unknown name."""

import difflib
from collections.abc import Iterable


def closest(name: object, accepted: Iterable[str]) -> str:
    """The closest accepted name, if one is close, and the whole list."""
    accepted = list(accepted)
    match = difflib.get_close_matches(str(name), accepted, n=1)
    hint = f" Did you mean {match[0]!r}?" if match else ""
    return f"{hint} Accepted: {', '.join(accepted)}."
