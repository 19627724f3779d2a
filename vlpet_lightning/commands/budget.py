"""The ``budget`` command: ranks and sites of a method that train a given number of parameters, with the YAML to run."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.budget import Budget, Candidate, sites_of
from vlpet_lightning.commands.budget_methods import Method, candidates, read_method
from vlpet_lightning.commands.files import BASE, as_words, check_out, find_config
from vlpet_lightning.overlays import read_config
from vlpet_lightning.pet.ranks import ranks_in

PROGRAM = "python -m vlpet_lightning"
WIDTH = 110  # of the YAML


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options."""
    found = argparse.ArgumentParser(
        prog=f"{PROGRAM} budget",
        description="Find ranks and sites of a method that train a given share of the parameters, without weights or "
        "data, and print the YAML to run.",
        epilog="Any override that fit takes works here, e.g. --model.feature_dim 512.",
        allow_abbrev=False,
    )
    budget = found.add_mutually_exclusive_group(required=True)
    budget.add_argument("--percent", metavar="P", help="trained parameters in percent of all, as in the papers")
    budget.add_argument("--parameters", metavar="N", help="number of trained parameters")
    found.add_argument(
        "--method", required=True, nargs="+", action="extend", help="names of files in experiments/pet, or paths"
    )
    found.add_argument("--backbone", metavar="NAME", help="name of a file in experiments/backbone, or a path")
    found.add_argument(
        "--config", action="append", metavar="FILE", help=f"experiment; by default experiments/{BASE}.yaml"
    )
    found.add_argument("--max-rank", type=int, metavar="R", help="largest rank; by default the width of the backbone")
    found.add_argument("--choose", type=int, default=1, metavar="N", help="row of the table to print as YAML")
    found.add_argument("--out", type=Path, metavar="FILE", help="write the YAML to this file")
    found.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    found.add_argument("--json", action="store_true", help="print JSON: budget, candidates and the YAML")
    return found


def read_budget(percent: str | None, parameters: str | None) -> Budget:
    """Read a budget from the command line.

    Raises:
        ValueError: If it is no number, or out of range.
    """
    try:
        return Budget(
            percent=None if percent is None else Decimal(percent.rstrip(" %")),
            parameters=None if parameters is None else int(parameters.replace(",", "")),
        )
    except InvalidOperation as error:
        raise ValueError(f"--percent must be a number such as 3.0, got {percent!r}") from error
    except ValueError as error:
        if parameters is None or "invalid literal" not in str(error):
            raise
        raise ValueError(f"--parameters must be a whole number such as 4000000, got {parameters!r}") from error


def overlay(method: Method, candidate: Candidate) -> dict[str, Any]:
    """Return the method's overlay with the candidate's placements; all its other settings are kept."""
    content = read_config(method.path)
    model = dict(content.get("model") or {})
    model.pop("placements", None)
    settings = dict(model.get("init_args") or {})
    settings |= {"placements": candidate.placements, "trainable": list(method.module.rules)}
    return {**content, "model": {**model, "init_args": settings}}


def as_yaml(
    method: Method, candidate: Candidate, budget: Budget, words: Sequence[str], overrides: Sequence[str], out: Path
) -> str:
    """Return a candidate as a config file with a header that states budget, counts and commands."""
    configs = as_words([*method.configs[:-1], out])
    head = [
        f"{method.name} with a budget of {budget}.",
        f"Trained: {candidate.counts.trained:,} of {candidate.counts.total:,} parameters of "
        f"{method.module.backbone_name}, {candidate.counts.percent:.4f} %.",
        f"Ranks: {ranks_text(candidate)}. Sites: {', '.join(sites_of(candidate.placements))}.",
        f"Made from {method.path} by:",
        f"  {PROGRAM} budget {shlex.join(words)}",
        "Overlay for an experiment:",
        f"  {PROGRAM} fit {shlex.join([*configs, *overrides])}",
    ]
    body = yaml.safe_dump(overlay(method, candidate), sort_keys=False, default_flow_style=None, width=WIDTH)
    return "".join(f"# {line}\n" for line in head) + body


def ranks_text(candidate: Candidate) -> str:
    """Format the ranks of a candidate."""
    return ", ".join(dict.fromkeys(map(str, ranks_in(candidate.placements).values())))


def as_table(rows: Sequence[tuple[Method, Candidate]], budget: Budget) -> Table:
    """Return the candidates as a table for the terminal."""
    table = Table(title=f"budget: {budget}", caption="exact candidates are marked with *; distances are to the budget")
    several = len({method.name for method, _ in rows}) > 1
    for heading in ["", *(["method"] if several else []), "sites", "searched", "ranks"]:
        table.add_column(heading, overflow="fold")
    for heading in ("trained", "%", "distance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (method, one) in enumerate(rows, 1):
        exact = budget.is_met(one.counts)
        distance = budget.distance(one.counts)
        far = f"{distance:+,.0f}" if budget.percent is None else f"{distance:+.{budget.digits + 1}f}"
        cells = [f"{number}{'*' if exact else ''}", *([method.name] if several else [])]
        cells += [one.sites, one.ranks, ranks_text(one), f"{one.counts.trained:,}", f"{one.counts.percent:.3f}", far]
        table.add_row(*cells, style="bold" if exact else None)
    return table


def as_json(rows: Sequence[tuple[Method, Candidate]], budget: Budget) -> list[dict[str, Any]]:
    """Return the candidates as plain data."""
    return [
        {
            "method": method.name,
            "sites": sites_of(one.placements),
            "searched": one.ranks,
            "ranks": [
                {"path": list(path), "unit": rank.unit, "name": rank.name, "value": rank.value}
                for path, rank in ranks_in(one.placements).items()
            ],
            "trainable": one.counts.trained,
            "total": one.counts.total,
            "percent": one.counts.percent,
            "distance": budget.distance(one.counts),
            "exact": budget.is_met(one.counts),
        }
        for method, one in rows
    ]


def budget(args: Sequence[str]) -> None:
    """Print the candidates that meet a budget of trained parameters, and the YAML of one of them.

    Args:
        args: ``--percent`` or ``--parameters``, ``--method``, ``--backbone``, ``--config``, ``--max-rank``,
            ``--choose``, ``--out``, ``--overwrite``, ``--json``, ``--help``; all other arguments are those of ``fit``.

    Raises:
        FileExistsError: If ``--out`` exists.
        FileNotFoundError: If a config does not exist.
        ValueError: If the budget is out of reach, or a method has no rank.
    """
    known, overrides = parser().parse_known_args(args)
    wanted = read_budget(known.percent, known.parameters)
    for name, value in (("--max-rank", known.max_rank), ("--choose", known.choose)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if known.out is not None:
        check_out(known.out, known.overwrite)
    configs = [find_config(name) for name in known.config or [BASE]]
    configs += [] if known.backbone is None else [find_config(known.backbone, ["backbone"])]
    console = Console(stderr=True)
    methods = [read_method(name, configs, overrides) for name in dict.fromkeys(known.method)]
    rows = [(m, one) for m in methods for one in candidates(m, wanted, known.max_rank, console)]
    rows.sort(key=lambda row: (not row[1].keeps_method, abs(wanted.distance(row[1].counts))))
    if known.choose > len(rows):
        raise ValueError(f"--choose is {known.choose}, and there are {len(rows)} candidates")
    method, chosen = rows[known.choose - 1]
    text = as_yaml(method, chosen, wanted, args, overrides, known.out or Path("FILE.yaml"))
    if known.out is not None:
        with atomic_write(known.out) as file:
            file.write(text.encode())
    for note in _notes(methods):
        console.print(note, style="yellow", soft_wrap=True)
    if known.json:
        figures = {"budget": str(wanted), "candidates": as_json(rows, wanted), "chosen": known.choose, "yaml": text}
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    Console().print(as_table(rows, wanted))
    sys.stdout.write(text if known.out is None else f"{known.out}: row {known.choose}\n")


def _notes(methods: Sequence[Method]) -> list[str]:
    """Return hints at overlays with the settings published for the backbone."""
    found = []
    for method in methods:
        other = method.path.with_name(f"{method.path.stem}_{method.module.kind}.yaml")
        if other.is_file():
            found.append(f"{other.stem} has the settings that were published for {method.module.kind.upper()}")
    return found
