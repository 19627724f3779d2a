"""Sweep files as lists of points: the part of Weights & Biases' sweep format that needs no server.

The keys are documented at https://docs.wandb.ai/guides/sweeps/sweep-config-keys.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

ARGS_FILE = "${args_json_file}"
PROGRAM = ["-m", "vlpet_lightning"]  # uses the Python and environment of the sweep
DROPPED = ("${env}", "${interpreter}", "python", "python3")
METHODS = ("grid", "random")
KNOWN = {
    *("name", "description", "project", "entity", "method", "metric", "parameters", "program", "command", "run_cap"),
    "early_terminate",
}
Point = dict[str, Any]


class SweepError(ValueError):
    """Raised if a sweep cannot be run; the message names the file, the key and the cure."""


@dataclass(frozen=True)
class Metric:
    """Metric by which runs are compared.

    Args:
        name: Name in the logs.
        maximize: Whether higher is better.
    """

    name: str
    maximize: bool


@dataclass(frozen=True)
class Sweep:
    """Contents of a sweep file.

    Args:
        path: The file.
        name: Name of the sweep.
        words: Arguments after ``fit`` in the command.
        metric: Metric by which runs are compared.
        points: Settings of each run as a nested dictionary.
        varying: Dotted names of the settings that vary.
        notes: Notes to show before the sweep is run.
    """

    path: Path
    name: str
    words: list[str]
    metric: Metric | None
    points: list[Point]
    varying: list[str]
    notes: list[str]

    @property
    def slug(self) -> str:
        """Name of the sweep in the names of folders and runs."""
        return re.sub(r"[^\w.-]+", "-", self.name, flags=re.ASCII)


def read_sweep(path: Path, *, count: int | None = None, seed: int = 0) -> Sweep:
    """Read a sweep file.

    Args:
        path: The file.
        count: Number of points of a random sweep, overriding its ``run_cap``; maximum number of points of a grid.
        seed: Seed of a random sweep.

    Raises:
        FileNotFoundError: If the file does not exist.
        SweepError: If the sweep cannot be run here.
    """
    content = _load(path)
    method = content.get("method")
    if method not in METHODS:
        raise SweepError(
            f"{path}: method is {method!r}, here it can be {' or '.join(METHODS)}; others need W&B's agent"
        )
    leaves = _all_leaves(path, content.get("parameters"))
    limit = count if count is not None else _cap(path, content.get("run_cap"))
    points = _grid(path, leaves) if method == "grid" else _random(path, leaves, limit, seed)
    points = points[:limit]
    _check_json(path, points)
    notes = ["early_terminate has no effect here: every run completes"] if "early_terminate" in content else []
    different = len({json.dumps(point, sort_keys=True) for point in points})
    if different < len(points):
        notes.append(f"only {different} of the {len(points)} points are different: some are run several times")
    return Sweep(
        path=path,
        name=str(content.get("name") or path.stem),
        words=_words(path, content.get("command")),
        metric=_metric(path, content.get("metric")),
        points=points,
        varying=[name for name, leaf in leaves.items() if "value" not in leaf],
        notes=notes,
    )


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no sweep file {path}: see experiments/sweeps")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SweepError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} is not a sweep: it must be a YAML mapping")
    unknown = sorted(map(str, content.keys() - KNOWN))
    if unknown:
        raise SweepError(f"{path} has unknown keys {', '.join(unknown)}: a sweep has {', '.join(sorted(KNOWN))}")
    return content


def _check_json(path: Path, points: Sequence[Point]) -> None:
    """Check that all points can be written as JSON, the format in which runs receive them."""
    for point in points:
        try:
            json.dumps(point)
        except (TypeError, ValueError) as error:
            raise SweepError(f"{path}: a value cannot be written as JSON ({error}): put it in quotes") from error


def _words(path: Path, command: Any) -> list[str]:
    words = [str(word) for word in command] if isinstance(command, list) else []
    start = words.index("fit") if "fit" in words else 0
    before = [word for word in words[:start] if word not in DROPPED]
    if before != PROGRAM or ARGS_FILE not in words:  # another launcher, such as torchrun, would be dropped
        raise SweepError(
            f'{path}: command must be like ["${{env}}", python, -m, vlpet_lightning, fit, --config, FILE, --config, '
            f'"{ARGS_FILE}"], got {command!r}'
        )
    if any(word.startswith("--ckpt_path") for word in words):
        raise SweepError(f"{path}: command must not have --ckpt_path: a point resumes from its own checkpoint")
    return words[start + 1 :]


def _metric(path: Path, metric: Any) -> Metric | None:
    if metric is None:
        return None
    if not isinstance(metric, dict) or "name" not in metric or metric.get("goal", "minimize") not in GOALS:
        raise SweepError(f"{path}: metric must have a name and a goal of {' or '.join(GOALS)}, got {metric!r}")
    return Metric(str(metric["name"]), metric.get("goal", "minimize") == "maximize")


GOALS = ("minimize", "maximize")


def _cap(path: Path, cap: Any) -> int | None:
    if cap is None or (isinstance(cap, int) and not isinstance(cap, bool) and cap > 0):
        return cap
    raise SweepError(f"{path}: run_cap must be a whole number of runs, 1 or more, got {cap!r}")


def _all_leaves(path: Path, parameters: Any) -> dict[str, dict[str, Any]]:
    """Return all parameters by dotted name; refuse a parameter given twice or as part of another."""
    if not isinstance(parameters, dict) or not parameters:
        raise SweepError(f"{path} has no parameters: expected settings of fit by name, got {parameters!r}")
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in _leaves(path, parameters):
        for other in found:
            if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}."):
                raise SweepError(
                    f"{path}: parameters {other} and {name} both set {max(other, name, key=len)}: drop one"
                )
        found[name] = leaf
    return found


def _leaves(path: Path, parameters: dict[str, Any], above: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Return name and entry of every parameter, including nested ones."""
    found: list[tuple[str, dict[str, Any]]] = []
    for key, entry in parameters.items():
        name = f"{above}{key}"
        if not isinstance(entry, dict):
            raise SweepError(f"{path}: parameter {name} must have value, values or a distribution, got {entry!r}")
        if isinstance(entry.get("parameters"), dict):
            found += _leaves(path, entry["parameters"], f"{name}.")
        else:
            found.append((name, entry))
    return found


def _grid(path: Path, leaves: dict[str, dict[str, Any]]) -> list[Point]:
    for name, leaf in leaves.items():
        if not ("value" in leaf or (isinstance(leaf.get("values"), list) and leaf["values"])):
            raise SweepError(f"{path}: parameter {name} of a grid must have value or a list of values, got {leaf!r}")
    choices = [[leaf["value"]] if "value" in leaf else leaf["values"] for leaf in leaves.values()]
    return [_nested(dict(zip(leaves, chosen, strict=True))) for chosen in product(*choices)]


def _random(path: Path, leaves: dict[str, dict[str, Any]], count: int | None, seed: int) -> list[Point]:
    if count is None:
        raise SweepError(f"{path}: a random sweep has no end: give --count, or run_cap in the file")
    draws = {name: _draw(path, name, leaf) for name, leaf in leaves.items()}
    for name, draw in draws.items():
        try:
            draw(random.Random(seed))
        except (ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise SweepError(
                f"{path}: nothing can be drawn for parameter {name} from {leaves[name]!r} ({error}): values must be a "
                "list, with a probability each or none; min of a log distribution and q more than 0"
            ) from error
    # each point has its own generator: adding points does not change the existing ones
    return [
        _nested({name: draw(random.Random(f"{seed}/{number}/{name}")) for name, draw in draws.items()})
        for number in range(count)
    ]


def _draw(path: Path, name: str, leaf: dict[str, Any]) -> Callable[[random.Random], Any]:
    if "value" in leaf:
        return lambda rng: leaf["value"]
    if "values" in leaf:
        return lambda rng: rng.choices(leaf["values"], leaf.get("probabilities"))[0]
    low, high, step = leaf.get("min"), leaf.get("max"), leaf.get("q", 1)
    whole = isinstance(low, int) and isinstance(high, int)
    kind = leaf.get("distribution", "int_uniform" if whole else "uniform")
    if kind not in DISTRIBUTIONS:
        raise SweepError(
            f"{path}: parameter {name} has the distribution {kind!r}, here it can be {', '.join(DISTRIBUTIONS)}"
        )
    if not isinstance(low, int | float) or not isinstance(high, int | float) or low > high:
        cure = "; YAML reads 1e-5 as text: write 1.0e-5" if any(isinstance(end, str) for end in (low, high)) else ""
        raise SweepError(f"{path}: parameter {name} needs numbers min and max, got {leaf!r}{cure}")
    return lambda rng: DISTRIBUTIONS[kind](rng, low, high, step)


def _log(rng: random.Random, low: float, high: float) -> float:
    return min(high, max(low, math.exp(rng.uniform(math.log(low), math.log(high)))))


def _multiple(value: float, low: float, high: float, step: float) -> float:
    """Return the multiple of a step nearest to a value, within bounds."""
    least, most = math.ceil(low / step), math.floor(high / step)
    if least > most:
        raise ValueError(f"no multiple of {step} lies between min and max")
    return min(most, max(least, round(value / step))) * step


DISTRIBUTIONS: dict[str, Callable[[random.Random, Any, Any, Any], Any]] = {
    "uniform": lambda rng, low, high, step: rng.uniform(low, high),
    "q_uniform": lambda rng, low, high, step: _multiple(rng.uniform(low, high), low, high, step),
    "int_uniform": lambda rng, low, high, step: rng.randint(low, high),
    "log_uniform_values": lambda rng, low, high, step: _log(rng, low, high),
    "q_log_uniform_values": lambda rng, low, high, step: _multiple(_log(rng, low, high), low, high, step),
}


def _nested(flat: dict[str, Any]) -> Point:
    """Convert dotted names to nested dictionaries."""
    nested: Point = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested


def setting(point: Point, name: str) -> Any:
    """Return a setting of a point by its dotted name."""
    found: Any = point
    for part in name.split("."):
        found = found[part]
    return found


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten dotted names to their last part where that is unique."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: short if last.count(short) == 1 else name for name, short in zip(names, last, strict=True)}
