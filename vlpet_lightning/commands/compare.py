"""The ``compare`` command: cost and settings of two configs side by side, without weights, data or a GPU."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from vlpet_lightning.atomic_file import atomic_write
from vlpet_lightning.cli import ModelOnly
from vlpet_lightning.commands.files import as_words, check_out, find_config
from vlpet_lightning.cost import Cost, Step, cost_of, default_step
from vlpet_lightning.display import as_bytes, gigaflops
from vlpet_lightning.memory import PRECISIONS
from vlpet_lightning.module import VLModule
from vlpet_lightning.parameters import GROUPS
from vlpet_lightning.pet.serialization import placements_to_plain, positions_in_words
from vlpet_lightning.protocol import flattened, short
from vlpet_lightning.tasks import TASKS

JOIN = "+"  # between a config and its overlays
FOLDERS = ("", "backbone", "pet", "protocol")
NOT_COUNTED = (
    "Activations are what autograd holds at the end of the forward pass, without parameters. Not counted: workspaces, "
    "temporary tensors of the loss and of the backward pass, fragmentation, pools of CUDA graphs, the savings of "
    "compilation."
)


@dataclass(frozen=True)
class Side:
    """One of the two configs.

    Args:
        name: Heading of its column.
        module: Its module, not built.
        settings: All its settings as plain data; ``placements`` is a one-line summary of the unit of each site.
    """

    name: str
    module: VLModule
    settings: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A figure of both configs.

    Args:
        name: Name of the figure.
        values: Its values; None if one is unknown.
        show: Formats a value.
    """

    name: str
    values: tuple[float | None, float | None]
    show: Callable[[float], str]

    def cells(self) -> list[str]:
        """Return name, values, difference and ratio as text."""
        first, second = self.values
        if first is None or second is None:
            return [self.name, *("unknown" if value is None else self.show(value) for value in self.values), "", ""]
        sign = "+" if second > first else "-" if second < first else ""
        difference = f"{sign}{self.show(abs(second - first))}" if sign else "0"
        return [self.name, self.show(first), self.show(second), difference, f"{second / first:.3f}" if first else ""]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's own options."""
    found = argparse.ArgumentParser(
        prog="python -m vlpet_lightning compare",
        usage="%(prog)s CONFIG CONFIG [options] [overrides of fit]",
        description="Compare two configs: parameters, FLOPs, activation memory, checkpoint size and settings. A CONFIG "
        "is a path, or a name in experiments or its folders; + joins a config and its overlays.",
        epilog="Overrides that fit takes, e.g. --model.feature_dim 512, apply to both configs.",
        allow_abbrev=False,
    )
    found.add_argument("configs", nargs=2, metavar="CONFIG", help="e.g. image_text+t5_base+lora_t5")
    found.add_argument("--task", default="vqa", choices=list(TASKS), help="task of the step; default vqa")
    found.add_argument("--batch-size", type=int, metavar="B", help="samples; by default the task's batch in the config")
    found.add_argument("--text", type=int, metavar="T", help="text tokens; default: the task's limit, or 20")
    found.add_argument("--target", type=int, metavar="L", help="target tokens; default: the task's limit, or 5")
    found.add_argument("--vectors", type=int, metavar="F", help="feature vectors per image, or frames per clip")
    found.add_argument("--precision", choices=list(PRECISIONS), help="default: the trainer's precision in the config")
    found.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="whose kernels save activations")
    found.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables as Markdown")
    found.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    found.add_argument("--json", action="store_true", help="print JSON: step, cost and differing settings")
    return found


def paths_of(text: str) -> list[Path]:
    """Return the config files that a side of the comparison joins by ``+`` or ``,``."""
    return [Path(text)] if Path(text).is_file() else [find_config(name, FOLDERS) for name in re.split(r"[+,]", text)]


def read_side(text: str, overrides: Sequence[str]) -> Side:
    """Read a side of the comparison.

    Raises:
        FileNotFoundError: If a config does not exist.
    """
    paths = paths_of(text)
    cli = ModelOnly([*as_words(paths), *overrides], run=False)
    settings = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    placements = placements_to_plain(cli.model.placements)
    settings["model"]["init_args"]["placements"] = {
        site: unit_text(placement["unit"]) + positions_in_words(placement)
        for placement in placements
        for site in placement["at"]
    }
    return Side(JOIN.join(path.stem for path in paths), cli.model, settings)


def unit_text(data: Any) -> str:
    """Summarise the plain data of a unit in one line.

    >>> gate = {"class_path": "vlpet_lightning.pet.LargeGate", "init_args": {"rank": 8}}
    >>> unit_text({"class_path": "vlpet_lightning.pet.VLPET", "init_args": {"rank": 96, "gate": gate}})
    'VLPET(rank=96, gate=LargeGate(rank=8))'
    """
    if not isinstance(data, dict) or "class_path" not in data:
        return str(data)
    settings = data.get("init_args") or {}
    inside = ", ".join(f"{name}={unit_text(value)}" for name, value in settings.items())
    return f"{data['class_path'].rpartition('.')[2]}({inside})"


def differing(sides: Sequence[Side]) -> dict[str, tuple[str, str]]:
    """Return the settings in which two configs differ, as text; ``-`` where one lacks it."""
    first, second = (dict(flattened(side.settings)) for side in sides)
    return {
        name.replace(".init_args.", ".", 1): (_value(first, name), _value(second, name))
        for name in dict.fromkeys([*first, *second])
        if first.get(name) != second.get(name) and not name.startswith("config")
    }


def _value(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return "-"
    value = settings[name]
    return value if ".placements" in name and isinstance(value, str) else short(value)


def whole(value: float) -> str:
    """Format a number of parameters."""
    return f"{value:,.0f}"


def percentage(value: float) -> str:
    """Format a percentage."""
    return f"{value:.2f} %"


def rows(costs: Sequence[Cost], steps: Sequence[Step]) -> Iterator[Row]:
    """Yield the figures of two configs."""

    def row(name: str, show: Callable[[float], str], figure: Callable[[Cost], float | None]) -> Row:
        return Row(name, (figure(costs[0]), figure(costs[1])), show)

    yield row("all parameters", whole, lambda cost: cost.parameters.total)
    yield row("trained parameters", whole, lambda cost: cost.parameters.trainable)
    yield row("trained, percent of all", percentage, lambda cost: cost.parameters.percent)
    for group in GROUPS:
        if any(cost.parameters.groups[group].trainable for cost in costs if group in cost.parameters.groups):
            yield row(f"  {group}", whole, lambda cost, name=group: _trained(cost, name))  # type: ignore[misc]
    yield row("FLOPs of a step, per sample", gigaflops, lambda cost: cost.flops)
    if any(cost.tower_flops for cost in costs):
        yield row("  of the vision tower (not run)", gigaflops, lambda cost: cost.tower_flops)
    yield row("activation memory", as_bytes, lambda cost: cost.activations)
    samples = {id(cost): step.samples for cost, step in zip(costs, steps, strict=True)}
    yield row("  per sample", as_bytes, lambda cost: cost.activations and cost.activations / samples[id(cost)])
    yield row("weights", as_bytes, lambda cost: cost.weights)
    if any(cost.tower_weights for cost in costs):
        yield row("  of the vision tower (not loaded)", as_bytes, lambda cost: cost.tower_weights)
    yield row("gradients", as_bytes, lambda cost: cost.gradients)
    yield row("optimiser state", as_bytes, lambda cost: cost.optimizer)
    yield row("memory of a step, sum", as_bytes, lambda cost: cost.memory)
    yield row("checkpoint", as_bytes, lambda cost: cost.checkpoint)
    yield row("exported weights", as_bytes, lambda cost: cost.export)
    yield row("time to build", lambda value: f"{value:.2f} s", lambda cost: cost.build_seconds)


def _trained(cost: Cost, group: str) -> int:
    found = cost.parameters.groups.get(group)
    return 0 if found is None else found.trainable


def step_text(step: Step, cost: Cost) -> str:
    """Describe a step in one line."""
    template = {None: " without the template (there is no tokenizer in a folder)", 0: ""}
    inside = template.get(cost.template_tokens, f" with {cost.template_tokens} of the template")
    return (
        f"{step.task}, {step.samples} samples, {step.text} text tokens, {cost.encoder_tokens} encoder tokens{inside}, "
        f"{step.target} target tokens, {step.precision}, kernels of a {'GPU' if step.gpu else 'CPU'}"
    )


def as_tables(
    sides: Sequence[Side], figures: Sequence[Row], settings: Mapping[str, tuple[str, str]], title: str
) -> list[Table | Text]:
    """Return figures and differing settings for the terminal."""
    table = Table()
    table.add_column("")
    for heading in (*_headings(sides), "difference", "ratio"):
        table.add_column(heading, justify="right", overflow="fold")
    for row in figures:
        table.add_row(*row.cells())
    found: list[Table | Text] = [Text(title), table, Text(NOT_COUNTED, style="dim")]
    if not settings:
        return [*found, Text("The configs have the same settings.")]
    differing_settings = Table(title="settings that differ")
    for heading in ("setting", *_headings(sides)):
        differing_settings.add_column(heading, overflow="fold")
    for name, values in settings.items():
        differing_settings.add_row(name, *map(Text, values))
    return [*found, differing_settings]


def as_markdown(
    sides: Sequence[Side], figures: Sequence[Row], settings: Mapping[str, tuple[str, str]], title: str
) -> str:
    """Return figures and differing settings as Markdown."""
    first, second = _headings(sides)
    lines = [f"# {first} and {second}", "", title, ""]
    lines += [f"| | {first} | {second} | difference | ratio |", "|---|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in figures]
    lines += ["", NOT_COUNTED, "", "## Settings that differ", "", f"| setting | {first} | {second} |", "|---|---|---|"]
    lines += ["| " + " | ".join(text.replace("|", "\\|") for text in (name, *v)) + " |" for name, v in settings.items()]
    return "\n".join(lines) + "\n"


def _headings(sides: Sequence[Side]) -> tuple[str, str]:
    """Return the names of two configs without the files that both begin with."""
    first, second = (side.name.split(JOIN) for side in sides)
    if first == second:
        return f"{sides[0].name} (1)", f"{sides[1].name} (2)"
    while len(first) > 1 and len(second) > 1 and first[0] == second[0]:
        first, second = first[1:], second[1:]
    return JOIN.join(first), JOIN.join(second)


def compare(args: Sequence[str]) -> None:
    """Print cost and differing settings of two configs.

    Args:
        args: Two configs, ``--task``, ``--batch-size``, ``--text``, ``--target``, ``--vectors``, ``--precision``,
            ``--device``, ``--out``, ``--overwrite``, ``--json``, ``--help``; all other arguments are those of ``fit``.

    Raises:
        FileExistsError: If ``--out`` exists.
        FileNotFoundError: If a config does not exist.
        ValueError: If a number is out of range, or a config does not support the task or precision.
    """
    known, overrides = parser().parse_known_args(args)
    if known.out is not None:
        check_out(known.out, known.overwrite)
    sides = [read_side(text, overrides) for text in known.configs]
    given = {
        "samples": known.batch_size,
        "text": known.text,
        "target": known.target,
        "vectors": known.vectors,
        "precision": known.precision,
        "gpu": known.device == "gpu",
    }
    steps = [default_step(known.task, side.settings, **given) for side in sides]
    console = Console(stderr=True)
    pairs = list(zip(sides, steps, strict=True))
    costs = [cost_of(side.module, step) for side, step in track(pairs, "measuring", console=console, transient=True)]
    settings = differing(sides)
    said = [step_text(step, cost) for step, cost in zip(steps, costs, strict=True)]
    title = f"step: {said[0]}" if said[0] == said[1] else f"steps: {said[0]}; {said[1]}"
    figures = list(rows(costs, steps))
    if known.out is not None:
        with atomic_write(known.out) as file:
            file.write(as_markdown(sides, figures, settings, title).encode())
    if known.json:
        found = [
            {"config": side.name, "step": asdict(step), **cost.as_dict()}
            for side, step, cost in zip(sides, steps, costs, strict=True)
        ]
        sys.stdout.write(json.dumps({"configs": found, "settings": settings}, indent=2) + "\n")
        return
    for table in as_tables(sides, figures, settings, title):
        Console().print(table)
