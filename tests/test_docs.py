"""The code, configs and numbers in the documentation, extracted from the page and run."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from transformers import MT5Config

import vlpet_lightning.pet
from tests.backbones import test_known, test_untouched
from tests.conformance import KINDS, Case, bench, cases, check
from tests.conformance.bench import TINY, make_batch
from vlpet_lightning import backbones, module
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
    module = module_from_config([*config, f"--model=vlpet_lightning.{TINY[kind].module.__name__}", *overrides])
    module.configure_model()
    assert {type(place.unit) for place in module.model.injected} == {unit}
    module.model.loss(make_batch(kind, "vqa")).backward()
    assert all(p.grad is not None for p in module.model.unit_parameters().values())


@pytest.mark.slow  # test_the_row_of_the_page_passes_every_behaviour runs the same unit
def test_a_unit_from_outside_is_tested_as_the_page_says(tmp_path):
    (tmp_path / "your_method").mkdir()
    package, test = tmp_path / "your_method" / "__init__.py", tmp_path / "your_method" / "test_conformance.py"
    package.write_text(BLOCKS["vlpet_lightning/pet/scaled_adapter.py"])
    test.write_text(BLOCKS["your_method/test_conformance.py"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(test)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


# adding a backbone ---------------------------------------------------------------------------------------------------

BACKBONE_PAGE = (ROOT / "docs" / "adding_a_backbone.md").read_text()
BACKBONE_BLOCKS = blocks(BACKBONE_PAGE)


@pytest.fixture
def mt5(monkeypatch):
    """The page's backbone, class and test row, as if they had been added."""
    name = "vlpet_lightning.backbones.mt5"
    added = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, added)
    exec(compile(BACKBONE_BLOCKS["vlpet_lightning/backbones/mt5.py"], "mt5.py", "exec"), vars(added))
    table = dict(vars(backbones))
    exec(BACKBONE_BLOCKS["vlpet_lightning/backbones/__init__.py"], table)
    monkeypatch.setitem(backbones.BACKBONES, "mt5", table["BACKBONES"]["mt5"])
    classes = dict(vars(module))
    exec(BACKBONE_BLOCKS["vlpet_lightning/module.py"], classes)
    monkeypatch.setitem(module.MODULES, "mt5", classes["MODULES"]["mt5"])
    monkeypatch.setattr(vlpet_lightning, "VLMT5", classes["VLMT5"], raising=False)
    tests = {**vars(bench), "VLMT5": classes["VLMT5"], "MT5Config": MT5Config, "TINY": dict(TINY)}
    exec(BACKBONE_BLOCKS["tests/conformance/bench.py"], tests)
    monkeypatch.setitem(TINY, "mt5", tests["TINY"]["mt5"])
    return backbones.BACKBONES["mt5"]


@pytest.mark.parametrize("padded", [False, True])
def test_the_backbone_of_the_page_computes_what_hugging_face_computes(mt5, padded):
    test_untouched.test_states_and_logits_are_those_of_hugging_face("mt5", "sdpa", padded)


@pytest.mark.parametrize("name", ["vlpet-large", "full"])
def test_the_backbone_of_the_page_passes_every_behaviour(mt5, name):
    check(next(case for case in cases.CASES if case.name == name), "mt5")


def test_the_models_known_by_the_page_have_their_published_sizes(mt5, monkeypatch):
    published = {"PUBLISHED": {}}
    exec(BACKBONE_BLOCKS["tests/backbones/test_known.py"], published)
    assert set(published["PUBLISHED"]) == set(mt5.known)
    for name, size in published["PUBLISHED"].items():
        monkeypatch.setitem(test_known.PUBLISHED, name, size)
        test_known.test_a_model_known_by_name_has_its_published_size(name)


def test_the_overlay_of_the_page_is_counted_as_the_page_says(mt5, tmp_path):
    path = tmp_path / "mt5_base.yaml"
    path.write_text(BACKBONE_BLOCKS["experiments/backbone/mt5_base.yaml"])
    files = [ROOT / "experiments" / "image_text.yaml", path, ROOT / "experiments" / "pet" / "vlpet_large_t5.yaml"]
    said = re.search(r"must print ([\d,]+) of ([\d,]+) parameters as trained", BACKBONE_PAGE)
    assert said is not None
    found = report_of([word for file in files for word in ("--config", str(file))])
    assert (f"{found.trainable:,}", f"{found.total:,}") == said.groups()


def test_the_page_lists_every_backbone_and_every_model_known_by_name():
    table = {}
    for line in BACKBONE_PAGE.split("\n"):
        if line.startswith("| `") and "`VL" in line:
            kind, name, known = (cell.strip() for cell in line.split("|")[1:4])
            table[kind.strip("`")] = (name.strip("`"), known)
    assert {kind: name for kind, (name, _) in table.items()} == {
        kind: cls.__name__ for kind, cls in module.MODULES.items()
    }
    for kind, (_, known) in table.items():
        listed = set()
        for group in known.split(";"):
            first, *others = re.findall(r"`([^`]+)`", group)
            listed |= {first, *(first.rpartition("-")[0] + other for other in others)}
        assert listed == {name for name in backbones.BACKBONES[kind].known if not name.startswith("google-t5/")}
