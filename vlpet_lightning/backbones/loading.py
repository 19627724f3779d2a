"""Loading of pretrained weights, and checks of the installed transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from transformers.utils import logging as transformers_logging

COMPILES_FROM = (5, 23)


def check_compilable(installed: str = transformers.__version__) -> None:
    """Check that the language model's own code compiles without graph breaks.

    Raises:
        ValueError: If transformers is older than 5.23, whose BART draws and compares a random number in every layer.
    """
    if tuple(map(int, installed.split(".")[:2])) < COMPILES_FROM:
        wanted = ".".join(map(str, COMPILES_FROM))
        raise ValueError(
            f"compile_model needs transformers {wanted} or newer, which needs Python 3.11; {installed} is installed: "
            "use a newer Python, or omit compile_model"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bar and load report; :func:`checked_state` reports problems."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def checked_state(name_or_path: str, info: dict[str, Any]) -> None:
    """Check that a pretrained checkpoint contains all weights of the model.

    Raises:
        ValueError: If keys are missing, except for tied weights, which transformers fills in.
    """
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ValueError(
            f"the weights at {name_or_path!r} lack {len(missing)} tensors of the model, e.g. {missing[:3]}"
        )
