"""Conversion of placements to and from plain data, to record the model that a weights file belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

from vlpet_lightning.pet.placement import Placement

OURS = "vlpet_lightning.pet"
UNWRITTEN = "unwritten"


def _class_of(factory: Any) -> type | None:
    """Return the class that a factory builds; factories from a config carry it as an argument."""
    if isinstance(factory, partial):
        return next((part for part in (factory.func, *factory.args) if isinstance(part, type)), None)
    return factory if isinstance(factory, type) else None


def _class_path(kind: type) -> str:
    module, name = kind.__module__, kind.__qualname__
    package = module.rpartition(".")[0]
    if package and getattr(import_module(package), name, None) is kind:
        module = package  # `vlpet_lightning.pet.VLPET`, not `vlpet_lightning.pet.vlpet.VLPET`
    return f"{module}.{name}"


def _defaults(kind: type) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def to_plain(value: Any) -> Any:
    """Convert a factory to ``{class_path, init_args}`` with explicit defaults; plain values are returned unchanged.

    A value that cannot be serialised becomes ``{UNWRITTEN: text}``; see :func:`check_written`.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    kind = _class_of(value)
    if kind is None:
        return {UNWRITTEN: repr(value)}
    given = value.keywords if isinstance(value, partial) else {}
    return {"class_path": _class_path(kind), "init_args": to_plain(_defaults(kind) | given)}


def placements_to_plain(placements: Iterable[Placement]) -> list[dict[str, Any]]:
    """Convert placements to their form in a config; ``positions`` is left out if it is ``all``."""
    return [
        {"at": list(placement.at), "unit": to_plain(placement.unit)}
        | ({} if placement.positions == "all" else {"positions": placement.positions})
        for placement in placements
    ]


def positions_in_words(entry: Mapping[str, Any]) -> str:
    """Return the positions of a placement's plain data, as words after those for its unit; empty for all positions.

    >>> positions_in_words({"at": ["decoder.ffn"], "unit": ..., "positions": "prefix"})
    ' at prefix positions'
    """
    positions = entry.get("positions", "all")
    return "" if positions == "all" else f" at {positions} positions"


def check_written(data: Any) -> None:
    """Check that plain data is complete.

    Raises:
        ValueError: If a part of it could not be serialised.
    """
    if isinstance(data, dict) and UNWRITTEN in data:
        raise ValueError(
            f"{data[UNWRITTEN]} cannot be written to a file: make units from a class, or functools.partial of a class"
        )
    for part in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        check_written(part)


def _allowed(path: str, allow: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in (OURS, *allow))


def find_class(path: str, allow: Sequence[str] = ()) -> type:
    """Import the module class with the given path.

    Args:
        path: ``package.module.Class``.
        allow: Classes, modules or packages that may be imported in addition to this library's own.

    Raises:
        ValueError: If the class is not allowed or does not exist. Nothing that is not allowed is imported.
    """
    refusal = ValueError(
        f"{path!r} is neither a class of {OURS} nor allowed: it was not imported or run. If you trust it, pass "
        f"allow=[{path!r}]"
    )
    if not _allowed(path, allow):
        raise refusal
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no class {path!r}: {error}") from error
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise ValueError(f"{path!r} is no torch.nn.Module class")
    if not _allowed(f"{kind.__module__}.{kind.__qualname__}", allow):  # e.g. a class that an allowed module imports
        raise refusal
    return kind


class _Recorded(partial):
    """A factory read from a record; its errors name the position in that record."""

    where = ""

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except Exception as error:  # a class may raise anything on the values of a damaged record
            raise ValueError(f"{self.where}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Check a value against a type annotation; annotations that our classes' settings do not use always match."""
    origin = get_origin(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(hint))
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_fits(item, get_args(hint)[0]) for item in value)
    if origin is Callable:
        return callable(value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def _check_types(kind: type, class_path: str, arguments: dict[str, Any]) -> None:
    try:
        hints = get_type_hints(kind.__init__)  # type: ignore[misc]
    except NameError:  # another library may have annotations that exist for type checkers only
        return
    for name, value in arguments.items():
        if name in hints and not _fits(value, hints[name]):
            hint = hints[name]
            wanted = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise ValueError(f"{class_path} needs {wanted} for {name}, got {value!r}")


def from_plain(data: Any, allow: Sequence[str] = ()) -> Any:
    """Convert ``{class_path, init_args}`` to a factory; plain values are returned unchanged.

    Raises:
        ValueError: As in :func:`find_class`, or if an argument is unknown or has the wrong type.
    """
    if isinstance(data, list):
        return [from_plain(item, allow) for item in data]
    if not isinstance(data, dict) or "class_path" not in data:
        return data
    kind = find_class(data["class_path"], allow)
    arguments = {name: from_plain(value, allow) for name, value in data.get("init_args", {}).items()}
    parameters = inspect.signature(kind).parameters
    unknown = sorted(set(arguments) - set(parameters))
    if unknown and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(f"{data['class_path']} has no setting {unknown[0]!r}: it has {', '.join(parameters)}")
    _check_types(kind, data["class_path"], arguments)
    return partial(kind, **arguments)


def recorded(data: Any, allow: Sequence[str], where: str) -> Any:
    """Convert data as :func:`from_plain` does, with errors that name its source, also when a unit is built later.

    Args:
        data: ``{class_path, init_args}``.
        allow: As in :func:`find_class`.
        where: File and position of the data.

    Raises:
        ValueError: As in :func:`from_plain`, or if the data does not describe a factory.
    """
    try:
        factory = from_plain(data, allow)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(factory, partial):
        raise ValueError(f"{where} must be a class_path with init_args, got {data!r}")
    named = _Recorded(factory)
    named.where = where
    return named


def placements_from_plain(
    data: Sequence[dict[str, Any]], allow: Sequence[str] = (), source: str = "recipe"
) -> list[Placement]:
    """Rebuild placements from the output of :func:`placements_to_plain`; errors name ``source`` as their origin.

    Raises:
        ValueError: As in :func:`recorded`.
    """
    return [
        Placement(
            list(entry["at"]),
            recorded(entry["unit"], allow, f"{source}: placements[{number}].unit"),
            entry.get("positions", "all"),
        )
        for number, entry in enumerate(data)
    ]
