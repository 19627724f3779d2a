"""The ``params`` command: count a config's parameters and list its units, without weights, data or a download."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from vlpet_lightning.cli import module_from_config
from vlpet_lightning.display import as_bytes, gigaflops
from vlpet_lightning.flops import tower_flops
from vlpet_lightning.memory import size
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import ParameterReport, count_parameters, placement_report


def model_of(args: Sequence[str]) -> VLModel:
    """Build the model that ``fit`` with these arguments would train, on the meta device (without values)."""
    module = module_from_config(args)
    with torch.device("meta"):
        return module.build(pretrained=False)


def report_of(args: Sequence[str]) -> ParameterReport:
    """Count the parameters of the model that ``fit`` with these arguments would train."""
    return count_parameters(model_of(args))


def tower_of(model: VLModel) -> dict[str, int] | None:
    """Return what stored features save of the vision tower: parameters, bytes in float32 and FLOPs of an image.

    None for models without a tower, or whose tower runs.
    """
    if model.backbone.reads_pixels:
        return None
    weights = [p for part in model.backbone.tower_parts(model.lm) for p in part.parameters()]
    if not weights:
        return None
    found = sum(p.numel() for p in weights)
    return {"parameters": found, "bytes": sum(map(size, weights)), "flops": tower_flops(model)}


def params(args: Sequence[str]) -> None:
    """Print the parameter counts of a config: total, trained, and by group.

    Args:
        args: ``--sites`` to list the units' sites and the parameters that each rule matched, ``--json`` for JSON,
            ``--help``; all other arguments are those of ``fit``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlpet_lightning params",
        description="Count the parameters of a config on the meta device: total, trained, and by group.",
        epilog="Several --config files overlay each other in order; any override that fit takes works here.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="a config of fit")
    parser.add_argument("--json", action="store_true", help="print JSON: total, trainable, percent, groups")
    parser.add_argument(
        "--sites",
        action="store_true",
        help="also list the unit at every site and layer, and the parameters that each `trainable` rule matched",
    )
    known, overrides = parser.parse_known_args(args)
    model = model_of([word for path in known.config for word in ("--config", path)] + overrides)
    report = count_parameters(model)
    places = placement_report(model) if known.sites else None
    tower = tower_of(model)
    if known.json:
        figures = report.as_dict() | ({} if places is None else places.as_dict())
        figures |= {} if tower is None else {"tower": tower}
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for table in [*([] if places is None else places.tables()), report.table()]:
        Console().print(table)
    if tower is not None:
        Console().print(
            f"{tower['parameters']:,} of these parameters are the vision tower's. Training on stored features neither "
            f"loads nor runs it, which saves {as_bytes(tower['bytes'])} in float32, and {gigaflops(tower['flops'])} "
            "per image in every step.",
            highlight=False,
        )
