"""What stands for everything in a checkpoint that is read by name only."""

import dataclasses
from typing import Any


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Opaque:
    """Stands for a class, a function or an instance that the reader knows only by name.

    Attributes:
        name: dotted name that the file gave, such as ``"yacs.config.CfgNode"``.
        items: what the file stored by key in it, for subclasses of dict; else empty.
        fault: of a tensor, why it can't be read, such as ``"a sparse tensor: not supported"``;
            else empty.
    """

    name: str
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)
    fault: str = ""

    def __repr__(self) -> str:
        return f"<opaque {self.name}>"  # not the items: they may nest without end
