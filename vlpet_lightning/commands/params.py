"""``params``: count what a config would train, without weights, data or a download."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch
from rich.console import Console

from vlpet_lightning.cli import module_from_config
from vlpet_lightning.parameters import ParameterReport, count_parameters


def report_of(args: Sequence[str]) -> ParameterReport:
    """Count the parameters of the model that ``fit`` with these arguments would train, on the meta device."""
    module = module_from_config(args)
    with torch.device("meta"):
        return count_parameters(module.build(pretrained=False))


def params(args: Sequence[str]) -> None:
    """Print the parameters of a config: all, trained, and by group.

    Args:
        args: ``--json`` for JSON, ``--help``; everything else is read as the arguments of ``fit``.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlpet_lightning params",
        description="Count the parameters of a config on the meta device: all, trained, and by group.",
        epilog="Give --config several times to lay one file over the other; any override that fit takes works here.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help="a config of fit")
    parser.add_argument("--json", action="store_true", help="print JSON: total, trainable, percent, groups")
    known, overrides = parser.parse_known_args(args)
    report = report_of([word for path in known.config for word in ("--config", path)] + overrides)
    if known.json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        Console().print(report.table())
