"""Reports of a model as text and as HTML."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vlpet_lightning as vl
from tests.runs import tiny_module
from vlpet_lightning.parameters import ParameterReport, PlacementReport


@pytest.fixture
def module(tiny_backbone: Path) -> vl.VLModule:
    module = tiny_module(tiny_backbone)
    module.configure_model()
    return module


def test_a_module_is_reported_like_its_model(module: vl.VLModule) -> None:
    assert vl.count_parameters(module) == vl.count_parameters(module.built())
    assert vl.placement_report(module) == vl.placement_report(module.built())


def test_a_module_that_is_not_built_cannot_be_counted(tiny_backbone: Path) -> None:
    with pytest.raises(RuntimeError, match="not built yet"):
        vl.count_parameters(tiny_module(tiny_backbone))


def rows(html: str) -> list[list[str]]:
    found = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[hd] style=\"[^\"]*\">(.*?)</t[hd]>", row) for row in found]


def test_counts_are_the_same_as_text_and_as_html(module: vl.VLModule) -> None:
    report: ParameterReport = vl.count_parameters(module)
    wanted = [[name, f"{count.trainable:,}", f"{count.total:,}"] for name, count in report.groups.items()]
    wanted.append(["sum", f"{report.trainable:,}", f"{report.total:,}"])
    assert [row[:3] for row in rows(report._repr_html_())][1:] == wanted
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in repr(report).split("\n") if "│" in line]
    assert [line[:3] for line in lines] == wanted
    assert repr(report).split("\n")[0].strip() == (
        f"{report.trainable:,} of {report.total:,} parameters are trained: {report.percent:.2f} %"
    )


def test_placements_show_every_site_and_rule(module: vl.VLModule) -> None:
    report: PlacementReport = vl.placement_report(module)
    html, text = report._repr_html_(), repr(report)
    for row in report.sites:
        assert [row.site, row.unit.replace(">", "&gt;"), "0-1", f"{row.parameters:,}"] in rows(html)
        assert row.site in text
    for rule in report.rules:
        assert [rule.rule, f"{rule.tensors:,}", f"{rule.parameters:,}"] in rows(html)
    assert f"<p>free sites: {', '.join(report.free_sites)}</p>" in html


def test_text_does_not_depend_on_the_terminal(module: vl.VLModule, monkeypatch: pytest.MonkeyPatch) -> None:
    report = vl.placement_report(module)
    before = repr(report)
    for name, value in (("COLUMNS", "30"), ("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1")):
        monkeypatch.setenv(name, value)
        assert repr(report) == before
    assert max(map(len, before.split("\n"))) <= 100
    assert all(line == line.rstrip() for line in before.split("\n"))
