"""``python -m vlpet_lightning VERB``: fit, validate, test, predict, and :mod:`vlpet_lightning.commands`."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table

from vlpet_lightning.commands import VERBS, Verb
from vlpet_lightning.user_errors import for_the_user

RUN_VERBS = {
    "fit": "train, from a config; `--ckpt_path` resumes",
    "validate": "score the validation splits",
    "test": "score the test splits",
    "predict": "write predictions for the test splits",
}
DEBUG = "VLPET_TRACEBACK"  # environment variable: show tracebacks of user errors too


def usage(first: Sequence[str] = ()) -> Table:
    """Build the table of verbs, or of those that begin with the given words."""
    table = Table(title=" ".join(["python -m vlpet_lightning", *first, "VERB [--help]"]), box=None, show_header=False)
    for name, text in RUN_VERBS.items() if not first else ():
        table.add_row(name, text)
    for words, verb in VERBS.items():
        if words[: len(first)] == tuple(first):
            table.add_row(" ".join(words), verb.help)
    return table


def find(args: Sequence[str]) -> tuple[Verb, list[str]] | None:
    """Return the verb that a command line begins with, and the remaining arguments."""
    for words, verb in VERBS.items():
        if tuple(args[: len(words)]) == words:
            return verb, list(args[len(words) :])
    return None


def load(module: str) -> ModuleType:
    """Import a module and what it needs, without garbage collection: that takes a fifth of the time of large imports.

    The imported objects are then exempt from later collections, since they live as long as the process.
    """
    if module in sys.modules:
        return sys.modules[module]
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def call(verb: Verb, args: Sequence[str]) -> Any:
    """Call a verb's function with the command-line arguments."""
    module, _, name = verb.function.partition(":")
    function: Callable[..., Any] = getattr(load(module), name)
    if verb.reads_words:
        return function(args)
    from jsonargparse import auto_cli

    words = next(words for words, known in VERBS.items() if known is verb)
    program = f"python -m vlpet_lightning {' '.join(words)}"
    return auto_cli(function, args=list(args), as_positional=False, prog=program, allow_abbrev=False)


def run(args: Sequence[str]) -> int:
    """Run a command line and return the exit status."""
    found = find(args)
    if found is not None:
        call(*found)
        return 0
    if args and args[0] in RUN_VERBS:
        load("vlpet_lightning.cli").main(args)
        return 0
    first = args[:-1] if args and args[-1] in ("-h", "--help") else args  # of several verbs, or none
    asked_for_help = not first or any(words[: len(first)] == tuple(first) for words in VERBS)
    console = Console(stderr=not asked_for_help)
    if not asked_for_help:
        verbs = [*RUN_VERBS, *(" ".join(words) for words in VERBS)]
        near = get_close_matches(" ".join(args[:3]), verbs, n=1) or get_close_matches(" ".join(args[:2]), verbs, n=1)
        cure = f": did you mean {near[0]!r}?" if near else ""
        console.print(f"unknown verb {' '.join(args[:2])!r}{cure}", style="bold red")
    console.print(usage(first if asked_for_help else ()))
    return 0 if asked_for_help else 2


def main() -> None:
    """Run the command line of this process."""
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # caused by Lightning's use of torch; users cannot fix it
    try:
        sys.exit(run(sys.argv[1:]))
    except Exception as error:
        meant = for_the_user(error)
        if meant is None or os.environ.get(DEBUG):
            raise
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"[bold red]{type(meant).__name__}:[/] ", end="")
        console.print(str(meant), markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
