"""The ranks in the plain data of placements: finding them, and replacing their values.

A rank is an integer constructor argument whose name a class lists in its attribute ``ranks``; a class without that
attribute, such as a gate, has the argument ``rank``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from vlpet_lightning.pet.serialization import find_class

Path = tuple[str | int, ...]  # keys and indices that lead to a value
DEFAULT = ("rank",)


@dataclass(frozen=True)
class Rank:
    """One rank of a placement.

    Args:
        unit: Name of the class that takes it.
        name: Name of its constructor argument.
        value: Its value.
    """

    unit: str
    name: str
    value: int

    def __str__(self) -> str:
        return f"{self.unit} {self.value}" if self.name == "rank" else f"{self.unit} {self.name} {self.value}"


def ranks_in(data: Any) -> dict[Path, Rank]:
    """Find the ranks in plain data from :func:`vlpet_lightning.pet.serialization.placements_to_plain`.

    >>> gate = {"class_path": "vlpet_lightning.pet.LargeGate", "init_args": {"rank": 8, "scale": 1.0}}
    >>> unit = {"class_path": "vlpet_lightning.pet.VLPET", "init_args": {"rank": 16, "heads": 4, "gate": gate}}
    >>> for path, rank in ranks_in(unit).items():
    ...     print(rank, "at", *path)
    VLPET 16 at init_args rank
    LargeGate 8 at init_args gate init_args rank

    Returns:
        Ranks by their path in ``data``, outermost first.

    Raises:
        ValueError: If a class does not exist or is no module.
    """
    if isinstance(data, list):
        return {(index, *path): rank for index, item in enumerate(data) for path, rank in ranks_in(item).items()}
    if not isinstance(data, dict):
        return {}
    found: dict[Path, Rank] = {}
    settings = data.get("init_args")
    if "class_path" in data and isinstance(settings, dict):
        name = data["class_path"].rpartition(".")[2]
        kind = find_class(data["class_path"], trusted(data))
        for argument in getattr(kind, "ranks", DEFAULT):
            value = settings.get(argument)
            if isinstance(value, int) and not isinstance(value, bool):
                found["init_args", argument] = Rank(name, argument, value)
    for key, item in data.items():
        found |= {(key, *path): rank for path, rank in ranks_in(item).items()}
    return found


def trusted(data: Any) -> list[str]:
    """Return the packages of all classes in plain data that was made from a config, which has imported them before."""
    if isinstance(data, list):
        return sorted({package for item in data for package in trusted(item)})
    if not isinstance(data, dict):
        return []
    own = {data["class_path"].partition(".")[0]} if isinstance(data.get("class_path"), str) else set()
    return sorted(own.union(*(trusted(item) for item in data.values())))


def with_ranks(data: Any, values: Mapping[Path, int]) -> Any:
    """Return a copy of plain data with other values at some paths."""
    changed = deepcopy(data)
    for path, value in values.items():
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
    return changed
