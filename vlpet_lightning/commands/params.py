"""``params``: count what a config would train, and show where its units are, without weights, data or a download."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from vlpet_lightning.cli import module_from_config
from vlpet_lightning.model import VLModel
from vlpet_lightning.parameters import ParameterReport, count_parameters, placement_report


def model_of(args: Sequence[str]) -> VLModel:
    """The model that ``fit`` with these arguments would train, without values: on the meta device."""
    module = module_from_config(args)
    with torch.device("meta"):
        return module.build(pretrained=False)


def report_of(args: Sequence[str]) -> ParameterReport:
    """Count the parameters of the model that ``fit`` with these arguments would train."""
    return count_parameters(model_of(args))


def params(args: Sequence[str]) -> None:
    """Print the parameters of a config: all, trained, and by group.

    Args:
        args: ``--sites`` for where the units are and what the rules matched, ``--json`` for JSON, ``--help``;
            everything else is read as the arguments of ``fit``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlpet_lightning params",
        description="Count the parameters of a config on the meta device: all, trained, and by group.",
        epilog="Give --config several times to lay one file over the other; any override that fit takes works here.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="a config of fit")
    parser.add_argument("--json", action="store_true", help="print JSON: total, trainable, percent, groups")
    parser.add_argument(
        "--sites",
        action="store_true",
        help="print which unit is at which site and layer, and what each `trainable` rule matched, too",
    )
    known, overrides = parser.parse_known_args(args)
    model = model_of([word for path in known.config for word in ("--config", path)] + overrides)
    report = count_parameters(model)
    places = placement_report(model) if known.sites else None
    if known.json:
        figures = report.as_dict() | ({} if places is None else places.as_dict())
        sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        return
    for table in [*([] if places is None else places.tables()), report.table()]:
        Console().print(table)
