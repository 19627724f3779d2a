"""The code, configs and numbers in the documentation, extracted from the page and run."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import vlpet_lightning.pet
from tests.conformance import KINDS, Case, cases, check
from tests.conformance.bench import MODULES, make_batch
from vlpet_lightning.cli import module_from_config
from vlpet_lightning.commands.params import report_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
NAME = "vlpet_lightning.pet.scaled_adapter"


def blocks(text: str) -> dict[str, str]:
    """Return fenced blocks by the path in their first line."""
    found = re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return dict(found)


BLOCKS = blocks(PAGE)


@pytest.fixture
def unit(tmp_path, monkeypatch):
    """The page's unit, as if its file and its export existed."""
    module = types.ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, module)
    exec(compile(BLOCKS["vlpet_lightning/pet/scaled_adapter.py"], "scaled_adapter.py", "exec"), vars(module))
    exported: dict = {}
    exec(BLOCKS["vlpet_lightning/pet/__init__.py"], exported)
    monkeypatch.setattr(vlpet_lightning.pet, "ScaledAdapter", exported["ScaledAdapter"], raising=False)
    return exported["ScaledAdapter"]


@pytest.fixture
def config(tmp_path, unit):
    path = tmp_path / "scaled_adapter.yaml"
    path.write_text(BLOCKS["experiments/pet/scaled_adapter.yaml"])
    return ["--config", str(ROOT / "experiments" / "image_text.yaml"), "--config", str(path)]


def test_the_page_on_python_runs_in_order(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile("\n".join(code), "python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "5.93 %" in printed
    assert "encoder.ffn 1 torch.Size([2, " in printed
    assert f"\n{names['answers'][0]}: 0." in printed
    assert names["losses"][-1] < names["losses"][0]


def test_every_function_in_the_table_on_python_exists():
    page = (ROOT / "docs" / "python.md").read_text()
    table = [line.split("|")[1] for line in page.split("\n") if line.startswith("| `")]
    named = {name for cell in table for name in re.findall(r"`(\w+)\(", cell)}
    assert len(named) == 10
    assert named <= set(dir(vlpet_lightning))


def test_the_page_has_every_block():
    assert set(BLOCKS) == {
        "vlpet_lightning/pet/scaled_adapter.py",
        "vlpet_lightning/pet/__init__.py",
        "experiments/pet/scaled_adapter.yaml",
        "tests/conformance/cases.py",
        "your_method/test_conformance.py",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_row_of_the_page_passes_every_behaviour(unit, kind):
    row = eval(BLOCKS["tests/conformance/cases.py"], {**vars(cases), "ScaledAdapter": unit})
    assert isinstance(row, Case)
    check(row, kind)


def test_the_config_of_the_page_trains_what_the_page_says(config):
    said = re.search(r"must print ([\d,]+) as trained", PAGE)
    assert said is not None
    assert f"{report_of(config).trainable:,}" == said[1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_the_page_trains_on_either_backbone(config, unit, tiny_backbone, tiny_t5, kind):
    folder = {"bart": tiny_backbone, "t5": tiny_t5}[kind]
    settings = {"backbone": folder, "feature_dim": 16, "grid": 2}
    overrides = [f"--model.init_args.{name}={value}" for name, value in settings.items()]
    module = module_from_config([*config, f"--model=vlpet_lightning.{MODULES[kind].__name__}", *overrides])
    module.configure_model()
    assert {type(place.unit) for place in module.model.injected} == {unit}
    module.model.loss(make_batch(kind, "vqa")).backward()
    assert all(p.grad is not None for p in module.model.unit_parameters().values())


def test_a_unit_from_outside_is_tested_as_the_page_says(tmp_path):
    (tmp_path / "your_method").mkdir()
    package, test = tmp_path / "your_method" / "__init__.py", tmp_path / "your_method" / "test_conformance.py"
    package.write_text(BLOCKS["vlpet_lightning/pet/scaled_adapter.py"])
    test.write_text(BLOCKS["your_method/test_conformance.py"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(test)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
