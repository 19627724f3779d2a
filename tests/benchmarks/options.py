"""Options that the benchmarks of models share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tests.benchmarks.contenders import KINDS, METHODS


def model_parser(
    name: str,
    description: str | None,
    *,
    methods: list[str],
    batch: int | list[int] = 16,
    choices: Sequence[str] = tuple(METHODS),
) -> argparse.ArgumentParser:
    """Return a parser with the shared options.

    Args:
        name: Name of the benchmark.
        description: Text of its help.
        methods: Methods that are measured by default.
        batch: Default batch size, or sizes of a benchmark that takes several.
        choices: Names of all methods.
    """
    found = argparse.ArgumentParser(prog=f"python -m tests.benchmarks {name}", description=description)
    found.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    found.add_argument("--methods", nargs="+", choices=list(choices), default=methods)
    found.add_argument("--batch", type=int, default=batch, nargs="+" if isinstance(batch, list) else None)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--tiny", action="store_true", help="two layers of width 64")
    found.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return found
