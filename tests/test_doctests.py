"""The examples in docstrings, run offline on tiny models."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import vlpet_lightning as vl
from tests.test_imports import OURS, files, module_name

PROMPT = ">>> "
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
ELSEWHERE = {"vlpet_lightning.predictor"}  # needs an export and a picture: tests/test_predictor.py
PYTHON = ("build", "count_parameters", "from_config", "load_pet", "load_run", "make_batch", "placement_report")
PYTHON += ("random_backbone", "save_pet")


def written() -> list[str]:
    """Return the modules with examples."""
    sources = {module_name(path): path.read_text() for package in sorted(OURS) for path in files(package)}
    return sorted(name for name, source in sources.items() if PROMPT in source and name not in ELSEWHERE)


@pytest.mark.parametrize("name", written())
def test_the_examples_of_a_module_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no example depends on the folder
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", PYTHON)
def test_every_function_for_notebooks_has_an_example(name: str) -> None:
    assert PROMPT in (getattr(vl, name).__doc__ or "")
