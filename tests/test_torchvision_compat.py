"""The fix for a torchvision whose compiled part does not load, each case in its own process."""

from __future__ import annotations

import importlib.machinery
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlpet_lightning.torchvision_compat import SCHEMAS, compiled_part_loads

ROOT = Path(__file__).parents[1]
EXTENSION = "_C" + importlib.machinery.EXTENSION_SUFFIXES[0]
REPORT = """
from vlpet_lightning import torchvision_compat
from vlpet_lightning.torchvision_compat import SCHEMAS, compiled_part_loads, define_missing_operators
try:
    import torchvision
except ModuleNotFoundError:
    pass
import torch
_library = torchvision_compat._library
defined = [name for name in SCHEMAS if hasattr(torch.ops.torchvision, name)]
print("loads" if compiled_part_loads() else "does not load", defined, _library is not None, define_missing_operators())
"""


def python(code: str, *first: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter with folders first on its path."""
    path = os.pathsep.join(str(folder) for folder in (*first, ROOT))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def output(code: str, *first: Path) -> str:
    ran = python(code, *first)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.fixture
def stub(tmp_path):
    """A fake torchvision package without a compiled part."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("")
    return tmp_path


def test_without_a_compiled_part_the_operators_are_declared(stub):
    assert output(REPORT, stub) == "does not load ['nms', 'qnms'] True []"


def test_with_a_compiled_part_that_fails_to_load_the_operators_are_declared(stub):
    (stub / "torchvision" / EXTENSION).write_bytes(b"not a library")
    assert output(REPORT, stub) == "does not load ['nms', 'qnms'] True []"


def test_with_a_compiled_part_that_loads_nothing_is_declared(stub):
    (stub / "torchvision" / EXTENSION).symlink_to(torch._C.__file__)  # any library that loads
    assert output(REPORT, stub) == "loads [] False []"


def test_without_torchvision_nothing_is_declared():
    hide = "import sys; sys.modules['torchvision'] = None\n"
    assert output(hide + REPORT) == "loads [] False []"


def test_an_operator_that_is_there_is_not_declared_again(stub):
    already = "import torch; library = torch.library.Library('torchvision', 'FRAGMENT'); library.define("
    ran = output(f"{already}{SCHEMAS['nms']!r})\n{REPORT}", stub)
    assert ran == "does not load ['nms', 'qnms'] True []"


@pytest.mark.parametrize(
    "first",
    ["data_modules", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vlpet_lightning", "callbacks"))],
)
def test_lightning_and_torchvision_import_behind_each_of_our_packages(first):
    code = f"import {first}, lightning.pytorch, torchvision, torchvision.transforms\nprint(torchvision.__name__)"
    assert output(code) == "torchvision"


def test_importing_the_package_imports_neither_torch_nor_torchvision():
    code = "import sys, vlpet_lightning.__main__; print({'torch', 'torchvision'} & set(sys.modules))"
    assert output(code) == "set()"


@pytest.mark.skipif(compiled_part_loads(), reason="torchvision's compiled part loads here: there is nothing to cure")
def test_torchvision_needs_the_cure_here():
    ran = python("import torchvision")
    assert ran.returncode != 0
    assert "operator torchvision::nms does not exist" in ran.stderr


@pytest.mark.skipif(not compiled_part_loads(), reason="torchvision's compiled part does not load here")
def test_a_torchvision_that_works_keeps_its_operators():
    code = "import vlpet_lightning, torchvision\nprint(torchvision.extension._has_ops())"
    assert output(code) == "True"
    assert output(REPORT).endswith("False []")
