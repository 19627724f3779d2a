"""Config nodes (``class_path`` and ``init_args``) for units and gates of this library."""

from __future__ import annotations

from typing import Any

from vlpet_lightning.pet.serialization import OURS

Node = dict[str, Any]


def spec(kind: type, **arguments: Any) -> Node:
    """Build the config node of a ``kind``; arguments that are None are omitted."""
    given = {name: value for name, value in arguments.items() if value is not None}
    return {"class_path": f"{OURS}.{kind.__name__}"} | ({"init_args": given} if given else {})
